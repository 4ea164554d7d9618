//! A run stops exactly at every count, and the state there does not depend on how it got there: in one run,
//! in single steps, or in single steps with a save and restore of the CPU after each.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use soft_cpu::{CpuExit, CpuState};

use crate::guest::*;

/// A program with its start state, and an interrupt that is injected at a count.
struct Case {
    make: fn() -> Guest,
    interrupt: Option<(u64, u8)>,
}

impl Case {
    /// Continues to `until`, injecting the interrupt if its count is reached. Returns false if the program
    /// has ended.
    fn go(&self, g: &mut Guest, until: u64, log: &mut Vec<CpuExit>) -> bool {
        if let Some((at, vector)) = self.interrupt
            && g.cpu.retired() <= at
            && at < until
        {
            if g.cpu.retired() < at && !g.drive(at, log) {
                return false;
            }
            g.cpu.inject(vector);
        }
        g.drive(until, log)
    }

    fn start(&self) -> Guest {
        let mut g = (self.make)();
        // Every handler returns; handlers of faults drop the error code and skip as many bytes of code as R15
        // has.
        for v in 0..256u64 {
            let coded = matches!(v, 8 | 10..=14 | 17);
            let handler = assemble(|a| {
                if coded {
                    a.add(rsp, 8)?;
                }
                if v < 32 {
                    a.add(qword_ptr(rsp), r15)?;
                }
                a.iretq()
            });
            g.write(HANDLERS + 16 * v, &handler);
        }
        g.cpu.restore(&g.state);
        g
    }

    fn check(&self) {
        let mut steps = self.start();
        let mut restored = self.start();
        let (mut steps_log, mut restored_log) = (Vec::new(), Vec::new());
        for k in 1..2000 {
            let mut whole = self.start();
            let mut whole_log = Vec::new();
            let more = self.go(&mut whole, k, &mut whole_log);
            assert_eq!(self.go(&mut steps, k, &mut steps_log), more);
            assert_eq!(self.go(&mut restored, k, &mut restored_log), more);
            if !more {
                assert!(k > 5, "the program is too short to show anything");
                return;
            }
            let state = whole.cpu.save();
            assert_eq!(state.retired, k);
            same(&state, &steps.cpu.save(), k);
            same(&state, &restored.cpu.save(), k);
            assert!(whole.ram == steps.ram && whole.ram == restored.ram, "RAM differs at {k}");
            assert_eq!(whole_log, steps_log);
            assert_eq!(whole_log, restored_log);
            restored.cpu.restore(&state);
        }
        panic!("the program does not end");
    }
}

#[track_caller]
fn same(a: &CpuState, b: &CpuState, k: u64) {
    assert_eq!(a.tlb, b.tlb, "TLB at {k}");
    assert_eq!(a, b, "at {k}");
}

fn asm(f: fn(&mut CodeAssembler) -> Result<(), IcedError>) -> Guest {
    Guest::asm(f)
}

fn check(make: fn() -> Guest) {
    Case { make, interrupt: None }.check();
}

#[test]
fn loops_and_calls() {
    check(|| {
        asm(|a| {
            let mut top = a.create_label();
            let mut sub = a.create_label();
            a.mov(ecx, 20)?;
            a.set_label(&mut top)?;
            a.call(sub)?;
            a.dec(ecx)?;
            a.jne(top)?;
            a.mov(byte_ptr(END), al)?;
            a.set_label(&mut sub)?;
            a.add(qword_ptr(DATA), rcx)?;
            a.ret()
        })
    });
}

#[test]
fn inside_rep() {
    check(|| {
        let mut g = asm(|a| {
            a.mov(ecx, 30)?;
            a.mov(edi, (DATA + 0xff0) as u32)?;
            a.mov(al, 0x55)?;
            a.rep().stosb()?;
            a.mov(ecx, 20)?;
            a.mov(esi, (DATA + 0xff0) as u32)?;
            a.rep().movsw()?;
            a.mov(ecx, 50)?;
            a.mov(edi, (DATA + 0xff0) as u32)?;
            a.repe().scasb()?;
            a.xor(ecx, ecx)?;
            a.rep().movsb()
        });
        g.state.gpr[15] = 0;
        g
    });
}

#[test]
fn a_rep_that_is_interrupted_between_two_iterations() {
    for at in 3..12 {
        let make = || {
            asm(|a| {
                a.mov(ecx, 8)?;
                a.mov(edi, DATA as u32)?;
                a.rep().stosq()?;
                a.nop()
            })
            .flags(1 << 9)
        };
        Case { make, interrupt: Some((at, 0x50)) }.check();
    }
}

#[test]
fn faults() {
    check(|| {
        let mut g = asm(|a| {
            // Each of these has 2 bytes, which the handler skips.
            a.mov(r15, 2u64)?;
            a.ud2()?;
            a.mov(ebx, 0x800_0000)?;
            a.mov(eax, dword_ptr(rbx))?;
            a.mov(dword_ptr(rbx), eax)?;
            a.xor(edx, edx)?;
            a.xor(ecx, ecx)?;
            a.div(ecx)?;
            a.mov(r15, 0u64)?;
            a.int(0x60)?;
            a.int3()?;
            a.nop()
        });
        g.state.gpr[0] = 1;
        g
    });
}

#[test]
fn user_and_kernel() {
    check(|| {
        let mut g = asm(|a| {
            let mut top = a.create_label();
            a.mov(ebx, 5)?;
            a.set_label(&mut top)?;
            a.syscall()?;
            a.dec(ebx)?;
            a.jne(top)
        })
        .user()
        .flags(1 << 9);
        g.state.sys.star = (KERNEL_CODE as u64) << 32 | 0x18 << 48;
        g.state.sys.lstar = CODE + 0x800;
        g.state.sys.fmask = 0x700;
        let kernel = assemble(|a| {
            a.swapgs()?;
            a.mov(rax, cr3)?;
            a.mov(cr3, rax)?;
            a.sti()?;
            a.cli()?;
            a.swapgs()?;
            a.sysretq()
        });
        g.write(CODE + 0x800, &kernel);
        g
    });
}

#[test]
fn devices() {
    check(|| {
        let mut g = asm(|a| {
            a.mov(rax, qword_ptr(DEVICE + 0x2000))?;
            a.add(dword_ptr(DEVICE + 0x2010), eax)?;
            a.in_(al, 0x60)?;
            a.out(0x61, al)?;
            a.mov(eax, dword_ptr(DATA + 0xffe))?;
            a.mov(dword_ptr(DATA + 0xffe), eax)?;
            a.mov(esi, DEVICE as u32 + 0x3000)?;
            a.mov(edi, DATA as u32 + 0x2000)?;
            a.mov(ecx, 6)?;
            a.rep().movsd()?;
            a.mov(edx, 0x1f0)?;
            a.mov(ecx, 5)?;
            a.rep().insw()?;
            a.mov(esi, DATA as u32 + 0x2000)?;
            a.mov(ecx, 5)?;
            a.rep().outsb()
        });
        g.set_pte(DATA + 0x1000, (DEVICE + 0x4000) | 7);
        g
    });
}

#[test]
fn code_that_changes_itself() {
    check(|| {
        asm(|a| {
            let mut top = a.create_label();
            a.mov(ecx, 10)?;
            a.set_label(&mut top)?;
            a.db(&[0x05, 1, 0, 0, 0])?;
            a.lea(rdx, ptr(top))?;
            a.inc(dword_ptr(rdx + 1))?;
            a.dec(ecx)?;
            a.jne(top)
        })
    });
}

#[test]
fn stale_translations() {
    check(|| {
        asm(|a| {
            let mut top = a.create_label();
            a.mov(ecx, 6)?;
            a.mov(rdx, (DATA + 0x5000) | 7)?;
            a.set_label(&mut top)?;
            a.inc(qword_ptr(DATA))?;
            a.add(rax, qword_ptr(DATA + 0x5000))?;
            a.xchg(qword_ptr(PT + DATA / 4096 * 8), rdx)?;
            a.inc(qword_ptr(DATA))?;
            a.invlpg(byte_ptr(DATA))?;
            a.dec(ecx)?;
            a.jne(top)
        })
    });
}

#[test]
fn a_page_fault_at_the_page_of_the_code_and_of_its_handler() {
    check(|| {
        let mut g = asm(|a| {
            let mut top = a.create_label();
            a.mov(ebx, 3)?;
            a.set_label(&mut top)?;
            a.mov(byte_ptr(CODE + 0x800), bl)?;
            a.dec(ebx)?;
            a.jne(top)
        });
        // The handler of #PF skips the store, which has 7 bytes, and lies in the same read-only page.
        let handler = assemble(|a| {
            a.add(rsp, 8)?;
            a.add(qword_ptr(rsp), 7)?;
            a.iretq()
        });
        g.write(CODE + 0x400, &handler);
        g.write(IDT + 14 * 16, &((CODE + 0x400) as u16).to_le_bytes());
        g.write(IDT + 14 * 16 + 6, &((CODE >> 16) as u16).to_le_bytes());
        g.set_pte(CODE, CODE | 5);
        g
    });
}

#[test]
fn single_steps_of_the_guest() {
    check(|| {
        let mut g = asm(|a| {
            a.push(0x100)?;
            a.popfq()?;
            a.mov(eax, 1)?;
            a.mov(ecx, 4)?;
            a.mov(edi, DATA as u32)?;
            a.rep().stosb()?;
            a.mov(ss, bx)?;
            a.nop()?;
            a.add(qword_ptr(DATA), rax)?;
            a.push(0)?;
            a.popfq()?;
            a.nop()
        });
        g.state.gpr[3] = KERNEL_DATA as u64;
        g
    });
}

#[test]
fn breakpoints_of_the_guest() {
    check(|| {
        let mut g = asm(|a| {
            let mut top = a.create_label();
            a.mov(eax, 3)?;
            a.set_label(&mut top)?;
            a.mov(ecx, 4)?;
            a.mov(edi, DATA as u32)?;
            a.rep().stosb()?;
            a.dec(eax)?;
            a.jne(top)
        });
        // A write in the middle of REP.
        g.state.sys.dr[0] = DATA + 2;
        g.state.sys.dr7 = 0x401 | 1 << 16;
        g
    });
}

#[test]
fn interrupts() {
    for at in 0..14 {
        let make = || {
            asm(|a| {
                let mut top = a.create_label();
                a.mov(ecx, 4)?;
                a.set_label(&mut top)?;
                a.add(qword_ptr(DATA), rcx)?;
                a.mov(rax, qword_ptr(DEVICE + 0x2000))?;
                a.dec(ecx)?;
                a.jne(top)
            })
            .flags(1 << 9)
        };
        Case { make, interrupt: Some((at, 0x40)) }.check();
    }
}
