//! Ports and device memory: questions, their order and size, permissions, interrupts around them.

use iced_x86::code_asm::*;
use soft_cpu::{CpuExit, RunLimit};

use crate::device::value_at;
use crate::guest::*;

const GP: Outcome = Outcome::Fault { vector: 13, error: Some(0), rip: CODE };
const IF: u64 = 1 << 9;

#[test]
fn in_and_out_of_all_sizes() {
    let mut g = Guest::asm(|a| {
        a.in_(al, 0x60)?;
        a.out(0x80, al)?;
        a.in_(eax, dx)?;
        a.out(dx, eax)?;
        a.in_(ax, dx)?;
        a.out(dx, ax)
    })
    .reg(0, u64::MAX)
    .reg(2, 0xfff_1234);
    let log = g.talk();
    let v = value_at(0x1234) as u32;
    assert_eq!(
        log,
        [
            CpuExit::PioIn { port: 0x60, size: 1 },
            CpuExit::PioOut { port: 0x80, size: 1, value: 0x60 },
            CpuExit::PioIn { port: 0x1234, size: 4 },
            CpuExit::PioOut { port: 0x1234, size: 4, value: v },
            CpuExit::PioIn { port: 0x1234, size: 2 },
            CpuExit::PioOut { port: 0x1234, size: 2, value: v & 0xffff },
        ]
    );
    assert_eq!((g.state.gpr[0], g.state.retired), (v as u64, 6));
}

#[test]
fn a_port_in_8_bits_changes_al_alone() {
    let mut g = Guest::asm(|a| a.in_(al, 0x60)).reg(0, u64::MAX);
    g.talk();
    assert_eq!(g.state.gpr[0], !0xff | 0x60);
}

#[test]
fn repeated_input_and_output() {
    let mut g = Guest::asm(|a| {
        a.rep().insw()?;
        a.mov(rsi, DATA)?;
        a.mov(ecx, 3)?;
        a.rep().outsb()
    })
    .reg(1, 2)
    .reg(2, 0x1f0)
    .reg(7, DATA);
    let log = g.talk();
    let v = value_at(0x1f0) as u16;
    let input = CpuExit::PioIn { port: 0x1f0, size: 2 };
    let output = |value: u8| CpuExit::PioOut { port: 0x1f0, size: 1, value: value as u32 };
    let [low, high] = v.to_le_bytes();
    assert_eq!(log, [input, input, output(low), output(high), output(low)]);
    assert_eq!((g.state.gpr[7], g.state.gpr[6], g.state.gpr[1]), (DATA + 4, DATA + 3, 0));
    assert_eq!(g.state.retired, 2 + 2 + 3);
}

#[test]
fn input_to_a_page_that_faults_does_not_read_the_port() {
    let mut g = Guest::asm(|a| a.insb()).reg(7, DATA);
    g.set_pte(DATA, 0);
    assert_eq!(g.run(), Outcome::Fault { vector: 14, error: Some(2), rip: CODE });
}

#[test]
fn the_bitmap_of_the_task_allows_ports() {
    let program = |limit: u32| {
        let mut g = Guest::asm(|a| a.in_(ax, dx)).user().reg(2, 0x3ff);
        g.write(TSS + 0x66, &0x68u16.to_le_bytes());
        g.state.sys.tr.limit = limit;
        g
    };
    let asked = Outcome::Exit(CpuExit::PioIn { port: 0x3ff, size: 2 });
    // Ports 3ffh and 400h: bits of bytes 7fh and 80h.
    assert_eq!(program(0x68 + 0x80).run(), asked);
    assert_eq!(program(0x68 + 0x7f).run(), GP);
    let mut g = program(0x200);
    g.write(TSS + 0x68 + 0x80, &[1]);
    assert_eq!(g.run(), GP);
    let mut g = program(0x200);
    g.write(TSS + 0x68 + 0x80, &[0xfe]);
    assert_eq!(g.run(), asked);
    // IOPL 3 needs no bitmap.
    assert_eq!(program(0x67).flags(0x3000).run(), asked);
}

#[test]
fn accesses_to_device_memory_keep_their_size() {
    let mut g = Guest::asm(|a| {
        a.mov(rax, qword_ptr(DEVICE + 0x2008))?;
        a.add(dword_ptr(DEVICE + 0x2010), 1)?;
        a.mov(word_ptr(DEVICE + 0x2020), ax)
    });
    let log = g.talk();
    let v = value_at(0x2010) as u32;
    assert_eq!(
        log,
        [
            CpuExit::MmioRead { addr: DEVICE + 0x2008, size: 8 },
            CpuExit::MmioRead { addr: DEVICE + 0x2010, size: 4 },
            CpuExit::MmioWrite { addr: DEVICE + 0x2010, size: 4, value: v as u64 + 1 },
            CpuExit::MmioWrite { addr: DEVICE + 0x2020, size: 2, value: value_at(8) & 0xffff },
        ]
    );
    assert_eq!(g.state.gpr[0], value_at(8));
}

#[test]
fn an_access_from_ram_into_a_device_is_split() {
    // The page at DATA + 0x1000 is mapped to the device.
    let at = DATA + 0xffe;
    let mut g = Guest::asm(|a| {
        a.mov(eax, dword_ptr(at))?;
        a.mov(dword_ptr(at), 0x4433_2211)
    });
    g.set_pte(DATA + 0x1000, DEVICE | 7);
    g.write(at, &[0xaa, 0xbb]);
    let log = g.talk();
    assert_eq!(
        log,
        [
            CpuExit::MmioRead { addr: DEVICE, size: 2 },
            CpuExit::MmioWrite { addr: DEVICE, size: 2, value: 0x4433 },
        ]
    );
    assert_eq!(g.state.gpr[0], (value_at(0) & 0xffff) << 16 | 0xbbaa);
    assert_eq!(g.read(at, 2), [0x11, 0x22]);
}

#[test]
fn an_access_from_a_device_into_a_page_that_faults_asks_nothing() {
    let mut g = Guest::asm(|a| a.mov(qword_ptr(DATA + 0xffc), rax));
    g.set_pte(DATA, DEVICE | 7);
    g.set_pte(DATA + 0x1000, 0);
    assert_eq!(g.run(), Outcome::Fault { vector: 14, error: Some(2), rip: CODE });
}

#[test]
fn copies_between_device_and_ram() {
    let mut g = Guest::asm(|a| a.rep().movsd()).reg(1, 3).reg(6, DEVICE + 0x2000).reg(7, DATA);
    let log = g.talk();
    let read = |n: u64| CpuExit::MmioRead { addr: DEVICE + 0x2000 + 4 * n, size: 4 };
    assert_eq!(log, [read(0), read(1), read(2)]);
    assert_eq!(g.read_u64(DATA), value_at(0) & 0xffff_ffff | value_at(4) << 32);
    assert_eq!(g.state.retired, 3);
}

fn start(g: &mut Guest) {
    g.cpu.restore(&g.state);
}

fn run(g: &mut Guest, window: bool) -> CpuExit {
    let exit = g.cpu.run(&mut g.ram, &RunLimit { until: 1000, interrupt_window: window });
    g.state = g.cpu.save();
    exit
}

#[test]
fn sti_holds_interrupts_off_for_one_instruction() {
    let mut g = Guest::asm(|a| {
        a.nop()?;
        a.sti()?;
        a.inc(rax)?;
        a.inc(rax)
    });
    start(&mut g);
    assert_eq!(run(&mut g, true), CpuExit::InterruptWindow);
    assert_eq!((g.state.gpr[0], g.state.retired), (1, 3));
    g.cpu.inject(0x40);
    assert_eq!(run(&mut g, false), CpuExit::MmioWrite { addr: DEVICE + 0x40, size: 1, value: 1 });
    assert_eq!(g.read_u64(g.state.gpr[4]), CODE + 5);
    // STI inhibits nothing if IF is already set.
    let mut g = Guest::asm(|a| a.sti()).flags(IF);
    start(&mut g);
    assert_eq!(run(&mut g, true), CpuExit::InterruptWindow);
    assert_eq!(g.state.retired, 0);
}

#[test]
fn an_interrupt_window_opens_after_every_instruction_that_sets_if() {
    for (program, frame) in [
        (assemble(|a| a.popfq()), [IF, 0, 0, 0, 0]),
        (assemble(|a| a.iretq()), [CODE + 0x800, KERNEL_CODE as u64, IF, STACK, 0]),
        (assemble(|a| a.sysretq()), [0; 5]),
    ] {
        let mut g = Guest::new(&program).reg(4, DATA).reg(1, CODE + 0x800).reg(11, IF);
        g.state.sys.star = 0x18 << 48;
        for (n, v) in frame.into_iter().enumerate() {
            g.write_u64(DATA + 8 * n as u64, v);
        }
        start(&mut g);
        assert_eq!(run(&mut g, true), CpuExit::InterruptWindow);
        assert_eq!(g.state.retired, 1);
    }
}

#[test]
fn a_load_of_ss_holds_interrupts_off() {
    let mut g = Guest::asm(|a| {
        a.mov(ss, ax)?;
        a.nop()?;
        a.nop()
    })
    .reg(0, KERNEL_DATA as u64)
    .flags(IF);
    start(&mut g);
    g.cpu.run(&mut g.ram, &RunLimit { until: 1, interrupt_window: false });
    assert!(!g.cpu.interruptible());
    assert_eq!(run(&mut g, true), CpuExit::InterruptWindow);
    assert_eq!(g.state.retired, 2);
}

#[test]
fn sti_hlt_sleeps_until_an_interrupt() {
    let mut g = Guest::asm(|a| {
        a.sti()?;
        a.hlt()?;
        a.nop()
    });
    start(&mut g);
    assert_eq!(run(&mut g, false), CpuExit::Hlt);
    assert_eq!((g.state.halted, g.state.retired), (true, 2));
    assert_eq!(run(&mut g, false), CpuExit::Hlt);
    assert!(g.cpu.interruptible());
    g.cpu.inject(0x41);
    assert_eq!(run(&mut g, false), CpuExit::MmioWrite { addr: DEVICE + 0x41, size: 1, value: 0 });
    assert_eq!((g.state.halted, g.read_u64(g.state.gpr[4])), (false, CODE + 2));
}
