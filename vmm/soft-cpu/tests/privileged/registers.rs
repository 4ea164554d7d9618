//! Control, debug and model-specific registers, table registers, CPUID, the time-stamp counter.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::guest::*;

const GP: Outcome = Outcome::Fault { vector: 13, error: Some(0), rip: CODE };

/// A program with RAX, RCX, RDX set.
fn one(f: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>, a: u64, c: u64, d: u64) -> Guest {
    Guest::asm(f).reg(0, a).reg(1, c).reg(2, d)
}

#[test]
fn privileged_instructions_fault_in_user_mode() {
    let programs: Vec<Vec<u8>> = vec![
        assemble(|a| a.hlt()),
        assemble(|a| a.mov(rax, cr0)),
        assemble(|a| a.mov(cr3, rax)),
        assemble(|a| a.mov(rax, dr0)),
        assemble(|a| a.mov(dr7, rax)),
        assemble(|a| a.clts()),
        assemble(|a| a.lmsw(ax)),
        assemble(|a| a.invlpg(byte_ptr(DATA))),
        assemble(|a| a.wbinvd()),
        assemble(|a| a.invd()),
        assemble(|a| a.lgdt(ptr(DATA))),
        assemble(|a| a.lidt(ptr(DATA))),
        assemble(|a| a.lldt(ax)),
        assemble(|a| a.ltr(ax)),
        assemble(|a| a.rdmsr()),
        assemble(|a| a.wrmsr()),
        assemble(|a| a.swapgs()),
        assemble(|a| a.sysretq()),
        assemble(|a| a.cli()),
        assemble(|a| a.sti()),
        assemble(|a| a.in_(al, dx)),
        assemble(|a| a.out(dx, al)),
        assemble(|a| a.rdpmc()),
    ];
    for p in programs {
        let mut g = Guest::new(&p).user();
        // No bitmap of ports.
        g.write(TSS + 0x66, &0x68u16.to_le_bytes());
        assert_eq!(g.run(), GP, "{p:x?}");
        assert_eq!(g.state.retired, 0);
    }
}

#[test]
fn instructions_that_do_not_exist_are_undefined() {
    for p in [
        vec![0x0f, 0x01, 0xd0],             // XGETBV
        vec![0x0f, 0x01, 0xc8],             // MONITOR
        vec![0x0f, 0x01, 0xc9],             // MWAIT
        vec![0x0f, 0xaa],                   // RSM
        vec![0xf3, 0x0f, 0xae, 0xc0],       // RDFSBASE
        vec![0x0f, 0x01, 0xca],             // CLAC
        vec![0x0f, 0xc7, 0xf0],             // RDRAND
        vec![0x0f, 0x20, 0xc8],             // MOV RAX, CR1
        vec![0x0f, 0x22, 0xe8],             // MOV CR5, RAX
        vec![0x8e, 0xc8],                   // MOV CS, AX
        vec![0xce],                         // INTO
        vec![0x66, 0x0f, 0x38, 0xdc, 0xc0], // AESENC
    ] {
        assert_eq!(Guest::new(&p).run(), Outcome::Fault { vector: 6, error: None, rip: CODE }, "{p:x?}");
    }
}

#[test]
fn control_registers_refuse_reserved_bits_and_leaving_long_mode() {
    let now = 0x8005_0033u64;
    for bad in [now & !(1 << 31), now & !1, now | 1 << 29, now | 1 << 32] {
        assert_eq!(one(|a| a.mov(cr0, rax), bad, 0, 0).run(), GP, "{bad:#x}");
    }
    // ET is fixed; undefined bits are ignored.
    let mut g = one(|a| a.mov(cr0, rax), now & !0x10 | 1 << 7 | 1 << 30, 0, 0);
    g.done();
    assert_eq!(g.state.sys.cr0, now | 1 << 30);
    for bad in [PML4 | 1 << 40, PML4 | 1 << 63] {
        assert_eq!(one(|a| a.mov(cr3, rax), bad, 0, 0).run(), GP);
    }
    // PAE cannot be cleared; VME, MCE, UMIP, FSGSBASE, OSXSAVE, SMEP, SMAP do not exist.
    let cr4_now = 0x6a0u64;
    for bad in [cr4_now & !0x20, cr4_now | 1, cr4_now | 1 << 6]
        .into_iter()
        .chain([11, 12, 16, 17, 18, 20, 21, 22, 32].map(|bit| cr4_now | 1 << bit))
    {
        assert_eq!(one(|a| a.mov(cr4, rax), bad, 0, 0).run(), GP, "{bad:#x}");
    }
    assert_eq!(one(|a| a.mov(cr8, rax), 16, 0, 0).run(), GP);
    let mut g = one(
        |a| {
            a.mov(cr8, rax)?;
            a.mov(rcx, cr8)
        },
        15,
        0,
        0,
    );
    assert_eq!(g.done()[1], 15);
}

#[test]
fn machine_status_word() {
    let mut g = one(
        |a| {
            a.lmsw(ax)?;
            a.smsw(ecx)?;
            a.clts()?;
            a.smsw(dx)?;
            a.smsw(word_ptr(DATA))
        },
        0xfffe,
        0,
        0,
    );
    let r = g.done();
    // PE stays set, NE and ET stay as they are.
    assert_eq!(r[1], 0x8005_003f);
    assert_eq!(r[2], 0x37);
    assert_eq!(g.read_u64(DATA), 0x37);
}

#[test]
fn debug_registers() {
    let mut g = one(
        |a| {
            a.mov(dr6, rax)?;
            a.mov(dr7, rcx)?;
            a.mov(rbx, dr6)?;
            a.mov(rsi, dr7)?;
            a.mov(dr7, rdx)
        },
        0xffff_ffff,
        0xffff_df00,
        0,
    );
    let r = g.done();
    assert_eq!((r[3], r[6]), (0xffff_efff, 0xffff_0700));
    assert_eq!(g.state.sys.dr7, 0x400);
    assert_eq!(one(|a| a.mov(dr6, rax), 1 << 32, 0, 0).run(), GP);
    assert_eq!(one(|a| a.mov(dr7, rax), 1 << 32, 0, 0).run(), GP);
    // DR4 and DR5 are aliases of DR6 and DR7; with CR4.DE they do not exist.
    let alias = [0x0f, 0x21, 0xe9]; // MOV RCX, DR5
    let mut g = Guest::new(&alias);
    g.state.sys.dr7 = 0x400;
    assert_eq!(g.done()[1], 0x400);
    let mut g = Guest::new(&alias);
    g.state.sys.cr4 |= 8;
    assert_eq!(g.run(), Outcome::Fault { vector: 6, error: None, rip: CODE });
}

#[test]
fn model_specific_registers_read_back() {
    for (n, v) in [
        (0x174u64, 0x10u64),
        (0x175, 0xffff_8000_0000_1000),
        (0x176, 0x1234_5678),
        (0x277, 0x0007_0405_0607_0106),
        (0xc000_0081, 0x0023_0010_0000_0000),
        (0xc000_0082, 0xffff_8000_0000_1000),
        (0xc000_0083, 0x1000),
        (0xc000_0084, 0x4_7700),
        (0xc000_0100, 0x7fff_ffff_ffff),
        (0xc000_0101, 0xffff_8000_0000_0000),
        (0xc000_0102, 0x5000),
        (0xc000_0103, 7),
    ] {
        let mut g = one(
            |a| {
                a.wrmsr()?;
                a.xor(eax, eax)?;
                a.xor(edx, edx)?;
                a.rdmsr()
            },
            v & 0xffff_ffff,
            n,
            v >> 32,
        );
        let r = g.done();
        assert_eq!(r[2] << 32 | r[0], v, "{n:#x}");
    }
}

#[test]
fn model_specific_registers_refuse_invalid_values() {
    let not_canonical = 0x8000_0000_0000u64;
    for (n, v) in [
        (0xc000_0082u64, not_canonical),
        (0xc000_0100, not_canonical),
        (0xc000_0101, not_canonical),
        (0xc000_0102, not_canonical),
        (0x175, not_canonical),
        (0x277, 2),
        (0x277, 8),
        (0xc000_0084, 1 << 32),
        (0xc000_0103, 1 << 32),
        // EFER: a reserved bit; LME while paging is on.
        (0xc000_0080, 0xd01 | 1 << 1),
        (0xc000_0080, 0xd01 & !(1 << 8)),
        // The APIC, MTRRs and all further registers do not exist.
        (0x1b, 0),
        (0xfe, 0),
        (0xdead, 0),
    ] {
        let g = one(|a| a.wrmsr(), v & 0xffff_ffff, n, v >> 32).run();
        assert_eq!(g, GP, "{n:#x} {v:#x}");
    }
    assert_eq!(one(|a| a.rdmsr(), 0, 0xdead, 0).run(), GP);
}

#[test]
fn lma_is_read_only_and_nxe_can_change() {
    let mut g = one(|a| a.wrmsr(), 0x101, 0xc000_0080, 0);
    g.done();
    assert_eq!(g.state.sys.efer, 0x501);
}

#[test]
fn the_time_stamp_counts_instructions_and_the_offset() {
    let program = assemble(|a| {
        a.nop()?;
        a.rdtsc()?;
        a.mov(esi, eax)?;
        a.rdtscp()?;
        a.mov(edi, eax)
    });
    let mut g = Guest::new(&program);
    g.state.sys.tsc_aux = 77;
    g.cpu.set_tsc_offset(0);
    g.state.tsc_offset = 5 << 32;
    let r = g.done();
    assert_eq!((r[6], r[7], r[2], r[1]), (1, 3, 5, 77));
    let mut g = Guest::asm(|a| a.rdtsc()).user();
    g.state.sys.cr4 |= 4;
    assert_eq!(g.run(), GP);
}

#[test]
fn a_write_of_the_time_stamp_counter_moves_its_adjustment() {
    let mut g = one(
        |a| {
            a.wrmsr()?;
            a.rdtsc()
        },
        1000,
        0x10,
        0,
    );
    g.state.tsc_offset = 500;
    // WRMSR is instruction 0 and sets the counter to 1000; RDTSC is instruction 1.
    assert_eq!(g.done()[0], 1001);
    assert_eq!(g.state.sys.tsc_adjust, 500);
}

#[test]
fn table_registers() {
    let mut g = Guest::asm(|a| {
        a.sgdt(ptr(DATA))?;
        a.sidt(ptr(DATA + 16))?;
        a.lgdt(ptr(DATA + 32))?;
        a.lidt(ptr(DATA + 48))
    });
    g.write(DATA + 32, &[0xff, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0xff]);
    g.write(DATA + 48, &[0xef, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    g.done();
    assert_eq!(g.read(DATA, 10), [0x3f, 0, 0, 0x50, 0, 0, 0, 0, 0, 0]);
    assert_eq!(g.read(DATA + 16, 10), [0xff, 0xf, 0, 0x70, 0, 0, 0, 0, 0, 0]);
    assert_eq!((g.state.sys.gdtr.base, g.state.sys.gdtr.limit), (0xffff_8000_0000_0000, 0xff));
    assert_eq!((g.state.sys.idtr.base, g.state.sys.idtr.limit), (1, 0xef));
    let mut g = Guest::asm(|a| a.lgdt(ptr(DATA)));
    g.write_u64(DATA + 2, 1 << 47);
    assert_eq!(g.run(), GP);
}

#[test]
fn swapgs_swaps() {
    let mut g = Guest::asm(|a| {
        a.swapgs()?;
        a.mov(rax, qword_ptr(8).gs())
    });
    g.state.gs_base = 1;
    g.state.sys.kernel_gs_base = DATA;
    g.write_u64(DATA + 8, 99);
    assert_eq!(g.done()[0], 99);
    assert_eq!((g.state.gs_base, g.state.sys.kernel_gs_base), (DATA, 1));
}

#[test]
fn cpuid_reports_the_features_that_exist() {
    let cpuid = |leaf: u64| {
        let r = one(|a| a.cpuid(), leaf | 0xffff_ffff_0000_0000, 0, 0).user().done();
        [r[0], r[3], r[1], r[2]]
    };
    let [max, b, c, d] = cpuid(0);
    let name: Vec<u8> = [b, d, c].iter().flat_map(|v| (*v as u32).to_le_bytes()).collect();
    assert_eq!(name, b"GenuineIntel");
    assert_eq!(max, 0x16);
    let [_, _, c, d] = cpuid(1);
    // x86-64-v2 needs SSE3, SSSE3, CMPXCHG16B, SSE4.1, SSE4.2, POPCNT; x86-64 CMOV, CX8, FPU, FXSR, MMX, SSE,
    // SSE2.
    let v2 = [0, 9, 13, 19, 20, 23];
    assert!(v2.iter().all(|bit| c >> bit & 1 == 1));
    assert!([15, 8, 0, 24, 23, 25, 26].iter().all(|bit| d >> bit & 1 == 1));
    // No APIC, no MONITOR, no XSAVE, no AVX, no RDRAND, no machine checks, no MTRRs.
    assert!([3, 26, 28, 30].iter().all(|bit| c >> bit & 1 == 0));
    assert!([9, 7, 12, 14].iter().all(|bit| d >> bit & 1 == 0));
    assert_eq!(cpuid(0x15), [1, 1, 1_000_000_000, 0]);
    assert_eq!(cpuid(0x8000_0008)[0], 48 << 8 | 40);
    assert_eq!(cpuid(0x8000_0001)[3], 0x2c10_0800);
}
