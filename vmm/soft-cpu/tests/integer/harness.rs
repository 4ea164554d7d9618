//! The harness itself: programs end, faults are reported with their error code, counts are exact.

use iced_x86::code_asm::*;

use crate::guest::*;
use soft_cpu::CpuExit;

#[test]
fn a_program_runs_to_its_end_and_its_instructions_are_counted() {
    let mut g = Guest::asm(|a| {
        a.mov(rax, 5u64)?;
        a.add(rax, 7)
    });
    assert_eq!(g.done()[0], 12);
    assert_eq!(g.state.retired, 2);
}

#[test]
fn a_fault_reports_vector_error_code_and_address() {
    let mut g = Guest::asm(|a| {
        a.mov(rax, 0x1000_0000u64)?;
        a.mov(ptr(rax), rax)
    });
    let second = CODE + 10;
    assert_eq!(g.run(), Outcome::Fault { vector: 14, error: Some(2), rip: second });
    let mut g = Guest::asm(|a| a.ud2());
    assert_eq!(g.run(), Outcome::Fault { vector: 6, error: None, rip: CODE });
    assert_eq!(g.state.retired, 0);
}

#[test]
fn user_mode_faults_arrive_on_the_kernel_stack() {
    let mut g = Guest::asm(|a| a.mov(ptr(0x1000_0000), rax)).user();
    assert_eq!(g.run(), Outcome::Fault { vector: 14, error: Some(6), rip: CODE });
    assert_eq!(g.state.gpr[4], KERNEL_STACK - 48);
}

#[test]
fn a_run_stops_exactly_at_its_limit() {
    let program = assemble(|a| {
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.inc(rax)?;
        a.dec(rcx)?;
        a.jne(top)
    });
    for limit in 0..30 {
        let mut g = Guest::new(&program).reg(1, 10);
        assert_eq!(g.run_to(limit), Outcome::Exit(CpuExit::Reached));
        assert_eq!(g.state.retired, limit);
        assert_eq!(g.state.gpr[0], limit.div_ceil(3));
    }
}

#[test]
fn a_run_that_is_stopped_and_restored_anywhere_ends_the_same() {
    let program = assemble(|a| {
        let mut top = a.create_label();
        let mut function = a.create_label();
        let mut end = a.create_label();
        a.set_label(&mut top)?;
        a.call(function)?;
        a.mov(rsi, DATA)?;
        a.mov(rdi, DATA + 0xff0)?;
        a.mov(ecx, 50)?;
        a.rep().movsb()?;
        a.add(byte_ptr(DATA), 3)?;
        a.dec(rbx)?;
        a.jne(top)?;
        a.jmp(end)?;
        a.set_label(&mut function)?;
        a.push(rbx)?;
        a.imul_2(rax, rbx)?;
        a.rol(rax, 7)?;
        a.mov(qword_ptr(rsp - 64), rax)?;
        a.adc(rdx, qword_ptr(rsp - 64))?;
        a.pop(rbx)?;
        a.ret()?;
        a.set_label(&mut end)?;
        a.nop()
    });
    let start = || Guest::new(&program).reg(0, 12345).reg(3, 20);
    let mut whole = start();
    whole.done();
    for piece in [1, 2, 3, 7, 64] {
        let mut g = start();
        while g.run_to(g.state.retired + piece) == Outcome::Exit(CpuExit::Reached) {}
        assert_eq!(g.state, whole.state, "in pieces of {piece}");
        assert!(g.ram == whole.ram, "in pieces of {piece}");
    }
}
