//! Single stepping, breakpoints of all kinds, and what suppresses them.

use iced_x86::code_asm::*;

use crate::guest::*;

const TF: u64 = 1 << 8;
const RF: u64 = 1 << 16;
const BS: u64 = 1 << 14;
const BD: u64 = 1 << 13;

fn trap(rip: u64) -> Outcome {
    Outcome::Fault { vector: 1, error: None, rip }
}

/// DR7 that enables breakpoint `n` with R/W `kind` and LEN `len`.
fn enable(n: u64, kind: u64, len: u64) -> u64 {
    0x400 | 1 << (2 * n) | (kind | len << 2) << (16 + 4 * n)
}

fn pushed_rflags(g: &Guest) -> u64 {
    g.read_u64(g.state.gpr[4] + 16)
}

#[test]
fn tf_traps_after_one_instruction() {
    let mut g = Guest::asm(|a| {
        a.nop()?;
        a.nop()
    })
    .flags(TF);
    g.state.sys.dr6 = 0xffff_0ff0;
    assert_eq!(g.run(), trap(CODE + 1));
    assert_eq!(g.state.sys.dr6, 0xffff_0ff0 | BS);
    assert_eq!((g.state.rflags & TF, pushed_rflags(&g) & (TF | RF)), (0, TF));
    assert_eq!(g.state.retired, 1);
}

#[test]
fn a_fault_comes_before_the_trap_and_pushes_tf_and_rf() {
    let mut g = Guest::asm(|a| a.ud2()).flags(TF);
    assert_eq!(g.run(), Outcome::Fault { vector: 6, error: None, rip: CODE });
    assert_eq!(pushed_rflags(&g) & (TF | RF), TF | RF);
}

#[test]
fn popf_that_sets_tf_lets_one_instruction_pass() {
    let mut g = Guest::asm(|a| {
        a.push(TF as i32)?;
        a.popfq()?;
        a.nop()?;
        a.nop()
    });
    // PUSH imm32 has 5 bytes, POPFQ one.
    assert_eq!(g.run(), trap(CODE + 7));
    // A POPFQ that clears TF is trapped itself.
    let mut g = Guest::asm(|a| {
        a.popfq()?;
        a.nop()
    })
    .flags(TF);
    assert_eq!(g.run(), trap(CODE + 1));
    assert_eq!(pushed_rflags(&g) & TF, 0);
}

#[test]
fn a_load_of_ss_holds_the_trap_off_for_an_instruction() {
    let mut g = Guest::asm(|a| {
        a.mov(ss, eax)?;
        a.nop()?;
        a.nop()
    })
    .reg(0, KERNEL_DATA as u64)
    .flags(TF);
    assert_eq!(g.run(), trap(CODE + 3));
    assert_eq!(g.state.retired, 2);
}

#[test]
fn int_n_is_not_trapped_and_neither_is_its_handler() {
    let mut g = Guest::asm(|a| a.int(0x30)).flags(TF);
    assert_eq!(g.run(), Outcome::Fault { vector: 0x30, error: None, rip: CODE + 2 });
    assert_eq!(pushed_rflags(&g) & TF, TF);
}

#[test]
fn int1_is_a_trap_whatever_the_gates_dpl() {
    let mut g = Guest::asm(|a| a.int1()).user();
    assert_eq!(g.run(), trap(CODE + 1));
}

#[test]
fn each_iteration_of_rep_is_a_step() {
    let mut g = Guest::asm(|a| a.rep().stosb()).reg(1, 3).reg(7, DATA).reg(0, 9).flags(TF);
    assert_eq!(g.run(), trap(CODE));
    assert_eq!((g.state.gpr[1], g.state.retired), (2, 1));
    // Between iterations RF is pushed, so that a breakpoint at REP is hit only once.
    assert_eq!(pushed_rflags(&g) & RF, RF);
    let mut g = Guest::asm(|a| a.rep().stosb()).reg(1, 1).reg(7, DATA).flags(TF);
    assert_eq!(g.run(), trap(CODE + 2));
    assert_eq!(pushed_rflags(&g) & RF, 0);
}

#[test]
fn hlt_is_trapped_and_wakes() {
    let mut g = Guest::asm(|a| a.hlt()).flags(TF);
    assert_eq!(g.run(), trap(CODE + 1));
    assert!(!g.state.halted);
}

#[test]
fn iret_that_sets_tf_lets_one_instruction_pass() {
    let mut g = Guest::asm(|a| a.iretq()).reg(4, DATA);
    let frame = [CODE + 0x800, USER_CODE as u64, TF | 2, STACK, USER_DATA as u64];
    for (n, v) in frame.into_iter().enumerate() {
        g.write_u64(DATA + 8 * n as u64, v);
    }
    g.write(CODE + 0x800, &[0x90, 0x90]);
    assert_eq!(g.run(), trap(CODE + 0x801));
}

#[test]
fn syscall_that_clears_tf_is_not_trapped_and_sysret_that_sets_it_is_at_once() {
    let mut g = Guest::asm(|a| a.syscall()).user().flags(TF);
    g.state.sys.star = (KERNEL_CODE as u64) << 32 | 0x18 << 48;
    g.state.sys.lstar = CODE + 0x800;
    g.state.sys.fmask = TF;
    g.write(CODE + 0x800, &assemble(|a| a.sysretq()));
    assert_eq!(g.run(), trap(CODE + 2));
    assert_eq!((g.state.retired, g.read_u64(g.state.gpr[4] + 8)), (2, USER_CODE as u64));
}

#[test]
fn an_instruction_breakpoint_is_a_fault_that_rf_passes() {
    let program = || {
        let mut g = Guest::asm(|a| {
            a.nop()?;
            a.inc(rax)
        });
        g.state.sys.dr[1] = CODE + 1;
        g.state.sys.dr7 = enable(1, 0, 0);
        g.state.sys.dr6 = 0xffff_0ff0;
        g
    };
    let mut g = program();
    assert_eq!(g.run(), trap(CODE + 1));
    assert_eq!((g.state.retired, g.state.sys.dr6), (1, 0xffff_0ff2));
    assert_eq!(pushed_rflags(&g) & RF, 0);
    // With RF the breakpoint is passed, and RF is clear after the instruction.
    let mut g = program().flags(RF);
    g.state.rip = CODE + 1;
    assert_eq!(g.done()[0], 1);
    assert_eq!(g.state.rflags & RF, 0);
    // RF for the previous instruction does not pass it.
    assert_eq!(program().flags(RF).run(), trap(CODE + 1));
    // A breakpoint that is not enabled does nothing.
    let mut g = program();
    g.state.sys.dr7 &= !0xff;
    assert_eq!(g.done()[0], 1);
}

#[test]
fn iret_passes_a_breakpoint_with_rf() {
    let mut g = Guest::asm(|a| a.iretq()).reg(4, DATA);
    let frame = [CODE + 0x800, KERNEL_CODE as u64, RF | 2, STACK, 0];
    for (n, v) in frame.into_iter().enumerate() {
        g.write_u64(DATA + 8 * n as u64, v);
    }
    g.write(CODE + 0x800, &assemble(|a| a.mov(byte_ptr(END), al)));
    g.state.sys.dr[0] = CODE + 0x800;
    g.state.sys.dr7 = enable(0, 0, 0);
    assert_eq!(g.run(), Outcome::Done);
}

#[test]
fn data_breakpoints_trap_after_the_access() {
    const ON_WRITE: u64 = 1;
    const ON_BOTH: u64 = 3;
    let program = |kind, len, address| {
        let mut g = Guest::asm(|a| {
            a.mov(rcx, qword_ptr(DATA))?;
            a.mov(qword_ptr(DATA + 8), rcx)?;
            a.nop()
        });
        g.state.sys.dr[3] = address;
        g.state.sys.dr7 = enable(3, kind, len);
        g
    };
    // Each MOV has 8 bytes.
    assert_eq!(program(ON_BOTH, 0, DATA + 7).run(), trap(CODE + 8));
    assert_eq!(program(ON_WRITE, 0, DATA + 7).run(), Outcome::Done);
    assert_eq!(program(ON_WRITE, 2, DATA + 8).run(), trap(CODE + 16));
    assert_eq!(program(ON_WRITE, 3, DATA + 12).run(), trap(CODE + 16));
    assert_eq!(program(ON_WRITE, 0, DATA + 16).run(), Outcome::Done);
    // A range of 8 bytes that begins before the address.
    assert_eq!(program(ON_WRITE, 2, DATA + 13).run(), trap(CODE + 16));
    let mut g = program(ON_WRITE, 0, DATA + 8);
    g.write_u64(DATA, 5);
    g.run();
    assert_eq!((g.state.sys.dr6 & 0xf, g.read_u64(DATA + 8)), (8, 5));
}

#[test]
fn a_data_breakpoint_is_not_hit_by_an_instruction_that_faults() {
    let mut g = Guest::asm(|a| a.mov(qword_ptr(DATA), rax));
    g.set_pte(DATA, 0);
    g.state.sys.dr[0] = DATA;
    g.state.sys.dr7 = enable(0, 1, 0);
    assert_eq!(g.run(), Outcome::Fault { vector: 14, error: Some(2), rip: CODE });
    assert_eq!(g.state.sys.dr6 & 0xf, 0);
}

#[test]
fn a_breakpoint_stops_a_copy_in_the_middle() {
    let mut g = Guest::asm(|a| a.rep().stosb()).reg(1, 100).reg(7, DATA).reg(0, 7);
    g.state.sys.dr[0] = DATA + 40;
    g.state.sys.dr7 = enable(0, 1, 0);
    assert_eq!(g.run(), trap(CODE));
    assert_eq!((g.state.gpr[1], g.read(DATA + 40, 2)), (59, &[7, 0][..]));
}

#[test]
fn general_detect_protects_the_debug_registers() {
    let mut g = Guest::asm(|a| a.mov(rax, dr0));
    g.state.sys.dr7 = 0x400 | 1 << 13;
    assert_eq!(g.run(), trap(CODE));
    assert_eq!((g.state.sys.dr6 & BD, g.state.sys.dr7), (BD, 0x400));
    assert_eq!(pushed_rflags(&g) & RF, RF);
}

#[test]
fn a_passed_breakpoint_stays_passed_until_the_device_has_answered() {
    let load = |a: &mut CodeAssembler| a.mov(rcx, qword_ptr(DEVICE + 0x2000));
    // After a load of SS: MOV SS has 2 bytes.
    let mut g = Guest::asm(|a| {
        a.mov(ss, eax)?;
        load(a)
    })
    .reg(0, KERNEL_DATA as u64);
    g.state.sys.dr[0] = CODE + 2;
    g.state.sys.dr7 = enable(0, 0, 0);
    assert_eq!(g.talk().len(), 1);
    // With RF.
    let mut g = Guest::asm(load).flags(RF);
    g.state.sys.dr[0] = CODE;
    g.state.sys.dr7 = enable(0, 0, 0);
    assert_eq!(g.talk().len(), 1);
}
