//! Jumps, calls, returns, loops.

use iced_x86::code_asm::*;

use crate::guest::*;
use crate::r;

#[test]
fn calls_return_to_the_next_instruction() {
    let mut g = Guest::asm(|a| {
        let mut f = a.create_label();
        let mut end = a.create_label();
        a.call(f)?;
        a.add(rax, 1)?;
        a.lea(rcx, ptr(f))?;
        a.push(7)?;
        a.call(rcx)?;
        a.mov(qword_ptr(DATA), rcx)?;
        a.push(7)?;
        a.call(qword_ptr(DATA))?;
        a.jmp(end)?;
        a.set_label(&mut f)?;
        a.add(rax, 0x10)?;
        a.ret_1(8)?;
        a.set_label(&mut end)?;
        a.nop()
    });
    let regs = g.done();
    assert_eq!((regs[r::RAX], regs[r::RSP]), (0x31, STACK + 8));
}

#[test]
fn jumps_through_registers_and_memory() {
    let mut g = Guest::asm(|a| {
        let mut one = a.create_label();
        let mut two = a.create_label();
        a.lea(rax, ptr(one))?;
        a.jmp(rax)?;
        a.ud2()?;
        a.set_label(&mut one)?;
        a.lea(rcx, ptr(two))?;
        a.mov(qword_ptr(DATA), rcx)?;
        a.jmp(qword_ptr(DATA))?;
        a.ud2()?;
        a.set_label(&mut two)?;
        a.nop()
    });
    g.done();
}

#[test]
fn targets_that_are_not_canonical_fault_at_the_branch_and_change_nothing() {
    let bad = 1 << 63;
    let fault = Outcome::Fault { vector: 13, error: Some(0), rip: CODE };
    let mut g = Guest::asm(|a| a.jmp(rax)).reg(r::RAX, bad);
    assert_eq!(g.run(), fault);
    let mut g = Guest::asm(|a| a.call(rax)).reg(r::RAX, bad).user();
    assert_eq!(g.run(), fault);
    assert_eq!(g.read_u64(KERNEL_STACK - 16), STACK);
    let mut g = Guest::asm(|a| a.ret()).user();
    g.write_u64(STACK, bad);
    assert_eq!(g.run(), fault);
    assert_eq!(g.read_u64(KERNEL_STACK - 16), STACK);
}

#[test]
fn loops_count_in_rcx_or_ecx() {
    let looped = |code: &[u8], count, flags| {
        // inc rax; loop back
        let mut g = Guest::new(&[&[0x48, 0xff, 0xc0][..], code].concat()).reg(r::RCX, count).flags(flags);
        let regs = g.done();
        (regs[r::RAX], regs[r::RCX])
    };
    assert_eq!(looped(&[0xe2, 0xfb], 3, 0), (3, 0));
    assert_eq!(looped(&[0x67, 0xe2, 0xfa], 0xffff_0000_0003, 0), (3, 0));
    // INC clears ZF here: LOOPE ends at once, LOOPNE goes on.
    assert_eq!(looped(&[0xe1, 0xfb], 3, 0), (1, 2));
    assert_eq!(looped(&[0xe0, 0xfb], 3, 0), (3, 0));
}

#[test]
fn jrcxz_checks_rcx_or_ecx_by_the_address_size() {
    let skipped = |code: &[u8], count| {
        let mut g = Guest::new(&[code, &[0xb0, 1]].concat()).reg(r::RCX, count);
        g.done()[r::RAX] == 0
    };
    assert!(skipped(&[0xe3, 2], 0));
    assert!(!skipped(&[0xe3, 2], 1 << 32));
    assert!(skipped(&[0x67, 0xe3, 2], 1 << 32));
}
