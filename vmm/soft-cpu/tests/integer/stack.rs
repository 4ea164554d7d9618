//! PUSH, POP, PUSHF, POPF, ENTER, LEAVE.

use iced_x86::code_asm::*;

use crate::guest::*;
use crate::{f, r};

#[test]
fn pushes_and_pops_in_both_widths() {
    let mut g = Guest::asm(|a| {
        a.push(rax)?;
        a.push(-1)?;
        a.push(qword_ptr(rsp))?;
        a.pop(rcx)?;
        a.push(ax)?;
        a.pop(dx)?;
        a.pop(rbx)?;
        a.pop(qword_ptr(DATA))
    })
    .reg(r::RAX, 0x1122_3344_5566_7788);
    let regs = g.done();
    assert_eq!((regs[r::RCX], regs[r::RBX], regs[r::RDX]), (!0, !0, 0x7788));
    assert_eq!(g.read_u64(DATA), 0x1122_3344_5566_7788);
    assert_eq!(regs[r::RSP], STACK);
}

#[test]
fn rsp_as_operand() {
    let mut g = Guest::asm(|a| {
        a.push(rsp)?;
        a.mov(rax, qword_ptr(rsp))?;
        a.mov(qword_ptr(rsp), 0x1234)?;
        // The address counts from RSP after the pop.
        a.pop(qword_ptr(rsp - 16))?;
        a.mov(rcx, qword_ptr(rsp - 16))?;
        a.push(0x5678)?;
        a.pop(rsp)
    });
    let regs = g.done();
    assert_eq!((regs[r::RAX], regs[r::RCX], regs[r::RSP]), (STACK, 0x1234, 0x5678));
}

#[test]
fn a_push_or_pop_that_faults_leaves_rsp() {
    let mut g = Guest::asm(|a| a.push(rax)).reg(r::RSP, DATA + 0x1008).user();
    g.set_pte(DATA + 0x1000, 0);
    assert_eq!(g.run(), Outcome::Fault { vector: 14, error: Some(6), rip: CODE });
    assert_eq!(g.read_u64(KERNEL_STACK - 16), DATA + 0x1008);

    let mut g = Guest::asm(|a| a.pop(qword_ptr(rbx))).reg(r::RBX, 0x1000_0000).user();
    assert_eq!(g.run(), Outcome::Fault { vector: 14, error: Some(6), rip: CODE });
    assert_eq!(g.read_u64(KERNEL_STACK - 16), STACK);
}

#[test]
fn a_stack_that_is_not_canonical_is_a_stack_fault() {
    let mut g = Guest::asm(|a| a.push(rax)).reg(r::RSP, 1 << 63).user();
    assert_eq!(g.run(), Outcome::Fault { vector: 12, error: Some(0), rip: CODE });
    let mut g = Guest::asm(|a| a.mov(rax, qword_ptr(rbp))).reg(r::RBP, 1 << 63);
    assert_eq!(g.run(), Outcome::Fault { vector: 12, error: Some(0), rip: CODE });
    // An override that is ignored does not change the segment.
    let mut g = Guest::new(&[0x36, 0x48, 0x8b, 0x03]).reg(r::RBX, 1 << 63);
    assert_eq!(g.run(), Outcome::Fault { vector: 13, error: Some(0), rip: CODE });
}

const IF: u64 = 1 << 9;
const IOPL: u64 = 3 << 12;
const TF: u64 = 1 << 8;
const NT: u64 = 1 << 14;
const RF: u64 = 1 << 16;
const AC: u64 = 1 << 18;
const VIP: u64 = 1 << 20;
const ID: u64 = 1 << 21;

/// RFLAGS after POPF of `value`.
fn popf(user: bool, start: u64, value: u64) -> u64 {
    let mut g = Guest::asm(|a| {
        a.push(rax)?;
        a.popfq()
    })
    .reg(r::RAX, value)
    .flags(start);
    if user {
        g = g.user();
    }
    g.done();
    g.state.rflags
}

#[test]
fn popf_changes_what_the_privilege_level_allows() {
    let all = f::STATUS | IF | f::D | IOPL | NT | AC | ID;
    assert_eq!(popf(false, 0, !TF), all | 2);
    assert_eq!(popf(false, all | VIP, 0), 2 | VIP);
    assert_eq!(popf(true, 0, !TF), all & !(IF | IOPL) | 2);
    assert_eq!(popf(true, IF, 0), IF | 2);
    assert_eq!(popf(true, IOPL, !TF), all | 2);
    assert_eq!(popf(true, IOPL | IF, 0), IOPL | 2);
}

#[test]
fn popf_of_16_bits_leaves_the_upper_flags_and_pushf_shows_neither_rf_nor_vm() {
    let mut g = Guest::asm(|a| {
        a.mov(word_ptr(rsp - 2), f::C as u32)?;
        a.sub(rsp, 2)?;
        a.popf()?;
        a.pushfq()?;
        a.pop(rax)
    })
    .flags(AC | ID | f::S);
    assert_eq!(g.done()[r::RAX], AC | ID | f::C | 2);
    let mut g = Guest::asm(|a| {
        a.pushfq()?;
        a.pop(rax)
    })
    .flags(RF | f::Z);
    assert_eq!(g.done()[r::RAX], f::Z | 2);
}

#[test]
fn enter_and_leave() {
    let mut g = Guest::asm(|a| {
        a.enter(0x20, 0)?;
        a.mov(rax, rbp)?;
        a.mov(rcx, rsp)?;
        a.leave()
    })
    .reg(r::RBP, 0x1234);
    let regs = g.done();
    assert_eq!((regs[r::RAX], regs[r::RCX]), (STACK - 8, STACK - 0x28));
    assert_eq!((regs[r::RBP], regs[r::RSP]), (0x1234, STACK));

    // Level 3: two display entries from the old frame, then the new frame's own address.
    let mut g = Guest::asm(|a| a.enter(8, 3)).reg(r::RBP, DATA + 0x100);
    g.write_u64(DATA + 0xf8, 0xaaaa);
    g.write_u64(DATA + 0xf0, 0xbbbb);
    let regs = g.done();
    assert_eq!((regs[r::RBP], regs[r::RSP]), (STACK - 8, STACK - 40));
    let frame = [8, 16, 24, 32].map(|n| g.read_u64(STACK - n));
    assert_eq!(frame, [DATA + 0x100, 0xaaaa, 0xbbbb, STACK - 8]);
}
