//! Far transfers: JMP, CALL, RET, IRET, SYSCALL, SYSRET, SYSENTER, SYSEXIT, and their checks.

use iced_x86::code_asm::*;

use crate::guest::*;

const NOT_CANONICAL: u64 = 0x8000_0000_0000;
const IF: u64 = 1 << 9;

fn fault(vector: u8, error: u16) -> Outcome {
    Outcome::Fault { vector, error: Some(error as u32), rip: CODE }
}

/// IRETQ with this frame.
fn iret(to: u64, code: u16, rflags: u64, top: u64, stack: u16) -> Guest {
    let mut g = Guest::asm(|a| a.iretq()).reg(4, DATA);
    for (n, v) in [to, code as u64, rflags, top, stack as u64].into_iter().enumerate() {
        g.write_u64(DATA + 8 * n as u64, v);
    }
    let end = assemble(|a| a.mov(byte_ptr(END), al));
    g.write(CODE + 0x800, &end);
    g
}

const TARGET: u64 = CODE + 0x800;

#[test]
fn iret_goes_to_user_mode() {
    let mut g = iret(TARGET, USER_CODE, 0x3202 | 0x4_0000, STACK, USER_DATA);
    // Data segments of ring 0 become null; the base of GS stays.
    g.state.gs_base = 77;
    g.done();
    let s = &g.state;
    assert_eq!((s.gpr[4], s.sys.seg[1].selector, s.sys.seg[2].selector), (STACK, USER_CODE, USER_DATA));
    assert_eq!(s.rflags, 0x3202 | 0x4_0000);
    assert_eq!((s.sys.seg[3].selector, s.sys.seg[5].selector, s.gs_base), (0, 0, 77));
    assert_eq!(s.retired, 1);
}

#[test]
fn iret_stays_in_the_kernel_with_a_null_ss() {
    let mut g = iret(TARGET, KERNEL_CODE, 2, STACK - 1, 0);
    g.done();
    assert_eq!((g.state.gpr[4], g.state.sys.seg[2].selector), (STACK - 1, 0));
}

#[test]
fn iret_checks_its_frame() {
    for (to, code, stack, expected) in [
        (TARGET, 0, USER_DATA, fault(13, 0)),
        (TARGET, KERNEL_DATA, KERNEL_DATA, fault(13, KERNEL_DATA)),
        (TARGET, USER_CODE & !3, KERNEL_DATA, fault(13, USER_CODE & !3)),
        (TARGET, 0x70, KERNEL_DATA, fault(13, 0x70)),
        // 32-bit code.
        (TARGET, 0x18 | 3, USER_DATA, fault(13, 0x18)),
        (TARGET, USER_CODE, 3, fault(13, 0)),
        (TARGET, USER_CODE, KERNEL_DATA, fault(13, KERNEL_DATA)),
        (NOT_CANONICAL, KERNEL_CODE, KERNEL_DATA, fault(13, 0)),
    ] {
        let mut g = iret(to, code, 2, STACK, stack);
        assert_eq!(g.run(), expected, "{code:#x} {stack:#x}");
        assert_eq!(g.state.gpr[4], (DATA & !15) - 48);
    }
    let mut g = iret(TARGET, KERNEL_CODE, 2, STACK, 0).flags(1 << 14);
    assert_eq!(g.run(), fault(13, 0));
    // Never to an inner level.
    let mut g = iret(TARGET, KERNEL_CODE, 2, STACK, KERNEL_DATA).user();
    assert_eq!(g.run(), fault(13, KERNEL_CODE));
}

#[test]
fn iret_in_user_mode_cannot_change_if_and_iopl() {
    let mut g = iret(TARGET, USER_CODE, 0x3002, STACK, USER_DATA).user().flags(IF);
    g.done();
    assert_eq!(g.state.rflags, 0x202);
    // With IOPL 3 it can change IF, but still not IOPL.
    let mut g = iret(TARGET, USER_CODE, 2, STACK, USER_DATA).user().flags(IF | 0x3000);
    g.done();
    assert_eq!(g.state.rflags, 0x3002);
}

#[test]
fn iret_of_32_and_16_bits() {
    let mut g = Guest::asm(|a| a.iretd()).reg(4, DATA);
    for (n, v) in [TARGET as u32, KERNEL_CODE as u32, 0x206, 0x1234_5678, 0].into_iter().enumerate() {
        g.write(DATA + 4 * n as u64, &v.to_le_bytes());
    }
    let end = assemble(|a| a.mov(byte_ptr(END), al));
    g.write(TARGET, &end);
    g.done();
    assert_eq!((g.state.gpr[4], g.state.rflags), (0x1234_5678, 0x206));
    let mut g = Guest::asm(|a| a.iret()).reg(4, DATA).flags(1 << 18);
    for (n, v) in [0x9000u16, KERNEL_CODE, 0x206, 0x5678, 0].into_iter().enumerate() {
        g.write(DATA + 2 * n as u64, &v.to_le_bytes());
    }
    g.write(0x9000, &end);
    g.done();
    // AC is above the 16 bits that were loaded.
    assert_eq!((g.state.gpr[4], g.state.rflags), (0x5678, 0x4_0206));
}

#[test]
fn far_jump_call_and_return() {
    let mut g = Guest::asm(|a| {
        let mut sub = a.create_label();
        let mut end = a.create_label();
        a.lea(rax, ptr(sub))?;
        a.mov(qword_ptr(DATA), rax)?;
        a.mov(word_ptr(DATA + 8), KERNEL_CODE as i32)?;
        a.db(&[0x48, 0xff, 0x1c, 0x25])?; // CALL m16:64 [DATA]
        a.dd(&[DATA as u32])?;
        a.mov(rbx, 1u64)?;
        a.jmp(end)?;
        a.set_label(&mut sub)?;
        a.mov(rcx, qword_ptr(rsp + 8))?;
        a.db(&[0x48, 0xcb])?; // RETFQ
        a.set_label(&mut end)?;
        a.nop()
    });
    let r = g.done();
    assert_eq!((r[1], r[3], r[4]), (KERNEL_CODE as u64, 1, STACK));
    let jump = |selector: u16, rip: u64| {
        let mut g = Guest::new(&[&[0x48, 0xff, 0x2c, 0x25][..], &(DATA as u32).to_le_bytes()].concat());
        g.write_u64(DATA, rip);
        g.write(DATA + 8, &selector.to_le_bytes());
        g.write(TARGET, &assemble(|a| a.mov(byte_ptr(END), al)));
        g
    };
    assert_eq!(jump(KERNEL_CODE, TARGET).run(), Outcome::Done);
    assert_eq!(jump(0, TARGET).run(), fault(13, 0));
    assert_eq!(jump(KERNEL_CODE, NOT_CANONICAL).run(), fault(13, 0));
    assert_eq!(jump(USER_CODE, TARGET).run(), fault(13, USER_CODE & !3));
    assert_eq!(jump(USER_CODE, TARGET).user().run(), Outcome::Done);
    assert_eq!(jump(TSS_SELECTOR, TARGET).run(), fault(13, TSS_SELECTOR));
}

#[test]
fn a_far_return_to_user_mode_takes_the_stack_with_it() {
    // RETFQ 16: parameters are released on both stacks.
    let mut g = Guest::new(&[0x48, 0xca, 16, 0]).reg(4, DATA);
    for (n, v) in [TARGET, USER_CODE as u64, 0, 0, STACK, USER_DATA as u64].into_iter().enumerate() {
        g.write_u64(DATA + 8 * n as u64, v);
    }
    g.write(TARGET, &assemble(|a| a.mov(byte_ptr(END), al)));
    g.done();
    assert_eq!((g.state.gpr[4], g.state.sys.seg[2].selector), (STACK + 16, USER_DATA));
}

fn with_syscall(g: &mut Guest) {
    g.state.sys.star = (KERNEL_CODE as u64) << 32 | 0x18 << 48;
    g.state.sys.lstar = TARGET;
    g.state.sys.fmask = IF | 0x100 | 0x400;
}

#[test]
fn syscall_and_sysret() {
    let mut g = Guest::asm(|a| {
        a.syscall()?;
        a.mov(rbx, 5u64)
    })
    .user()
    .flags(IF | 0x400 | 1);
    with_syscall(&mut g);
    g.write(
        TARGET,
        &assemble(|a| {
            a.mov(r8, cs)?;
            a.mov(r9, ss)?;
            a.pushfq()?;
            a.pop(r10)?;
            a.sysretq()
        }),
    );
    let r = g.done();
    assert_eq!((r[8], r[9], r[10]), (KERNEL_CODE as u64, KERNEL_DATA as u64, 3));
    assert_eq!((r[1], r[11], r[3]), (CODE + 2, 0x603, 5));
    let s = &g.state;
    assert_eq!((s.sys.seg[1].selector, s.sys.seg[2].selector, s.rflags), (USER_CODE, USER_DATA, 0x603));
    assert_eq!((s.sys.seg[1].attr, s.sys.seg[2].attr), (0xa0fb, 0xc0f3));
}

#[test]
fn syscall_and_sysret_are_checked() {
    let undefined = Outcome::Fault { vector: 6, error: None, rip: CODE };
    for program in [assemble(|a| a.syscall()), assemble(|a| a.sysretq())] {
        let mut g = Guest::new(&program);
        g.state.sys.efer &= !1;
        assert_eq!(g.run(), undefined);
    }
    let mut g = Guest::asm(|a| a.sysretq()).reg(1, NOT_CANONICAL);
    assert_eq!(g.run(), fault(13, 0));
    // To compatibility mode, which does not exist here.
    assert_eq!(Guest::asm(|a| a.sysret()).run(), fault(13, 0));
}

#[test]
fn sysenter_and_sysexit() {
    let mut g = Guest::asm(|a| a.sysenter()).user().flags(IF);
    g.state.sys.sysenter = [KERNEL_CODE as u64, STACK - 64, TARGET];
    g.write(
        TARGET,
        &assemble(|a| {
            a.mov(r8, ss)?;
            a.pushfq()?;
            a.pop(r10)?;
            a.mov(rcx, STACK)?;
            a.mov(rdx, CODE + 0x900)?;
            a.sysexitq()
        }),
    );
    g.write(CODE + 0x900, &assemble(|a| a.mov(byte_ptr(END), al)));
    let r = g.done();
    assert_eq!((r[8], r[10], r[4]), (KERNEL_DATA as u64, 2, STACK));
    assert_eq!((g.state.sys.seg[1].selector, g.state.sys.seg[2].selector), (0x2b, 0x33));
    assert_eq!(Guest::asm(|a| a.sysenter()).run(), fault(13, 0));
}
