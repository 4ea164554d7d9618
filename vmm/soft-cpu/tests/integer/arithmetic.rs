//! ADD to CMP, INC to NOT, multiplication and division, bits.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::guest::*;
use crate::{f, r};

/// Runs one instruction with the given RAX, RCX, RDX and RFLAGS; returns RAX, RDX and the status flags.
fn one(
    f: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    [a0, c0, d0]: [u64; 3],
    flags: u64,
) -> (u64, u64, u64) {
    let mut g = Guest::asm(f).reg(r::RAX, a0).reg(r::RCX, c0).reg(r::RDX, d0).flags(flags);
    let regs = g.done();
    (regs[r::RAX], regs[r::RDX], g.state.rflags & f::STATUS)
}

#[test]
fn additions_and_subtractions() {
    use f::*;
    let ones = !0u64;
    assert_eq!(one(|a| a.add(al, cl), [0x7f, 1, 0], 0), (0x80, 0, S | O | A));
    assert_eq!(one(|a| a.add(rax, rcx), [ones, 1, 0], 0), (0, 0, C | Z | P | A));
    assert_eq!(one(|a| a.adc(rax, rcx), [ones, ones, 0], C), (ones, 0, C | S | P | A));
    assert_eq!(one(|a| a.adc(ax, cx), [0x7fff, 0, 0], C), (0x8000, 0, S | O | A | P));
    assert_eq!(one(|a| a.sub(eax, ecx), [0, 1, 0], 0), (0xffff_ffff, 0, C | S | P | A));
    assert_eq!(one(|a| a.sub(al, cl), [0x80, 1, 0], 0), (0x7f, 0, O | A));
    assert_eq!(one(|a| a.sbb(rax, rcx), [0, ones, 0], C), (0, 0, C | Z | P | A));
    assert_eq!(one(|a| a.sbb(eax, eax), [5, 0, 0], C), (0xffff_ffff, 0, C | S | P | A));
    assert_eq!(one(|a| a.cmp(rax, -1), [ones, 0, 0], C), (ones, 0, Z | P));
    assert_eq!(one(|a| a.and(rax, -16), [0x1f, 0, 0], C | O | A), (0x10, 0, 0));
    assert_eq!(one(|a| a.test(al, al), [0x80, 0, 0], C), (0x80, 0, S));
}

#[test]
fn inc_and_dec_leave_cf() {
    use f::*;
    assert_eq!(one(|a| a.inc(al), [0xff, 0, 0], C), (0, 0, C | Z | P | A));
    assert_eq!(one(|a| a.inc(al), [0x7f, 0, 0], 0), (0x80, 0, S | O | A));
    assert_eq!(one(|a| a.inc(al), [0x7f, 0, 0], C), (0x80, 0, C | S | O | A));
    assert_eq!(one(|a| a.dec(rax), [0, 0, 0], 0), (!0, 0, S | P | A));
    assert_eq!(one(|a| a.dec(eax), [0x8000_0000, 0, 0], C), (0x7fff_ffff, 0, C | O | P | A));
}

#[test]
fn neg_and_not() {
    use f::*;
    assert_eq!(one(|a| a.neg(rax), [0, 0, 0], C), (0, 0, Z | P));
    assert_eq!(one(|a| a.neg(al), [0x80, 0, 0], 0), (0x80, 0, C | S | O));
    assert_eq!(one(|a| a.neg(ax), [1, 0, 0], 0), (0xffff, 0, C | S | P | A));
    assert_eq!(one(|a| a.not(eax), [1, 0, 0], STATUS), (0xffff_fffe, 0, STATUS));
}

#[test]
fn operations_on_memory() {
    let mut g = Guest::asm(|a| {
        a.lock().inc(dword_ptr(rbx))?;
        a.neg(qword_ptr(rbx + 8))?;
        a.lock().not(byte_ptr(rbx + 16))?;
        a.lock().bts(qword_ptr(rbx + 24), 65)
    })
    .reg(r::RBX, DATA);
    g.write_u64(DATA, 0x1_ffff_ffff);
    g.write_u64(DATA + 8, 5);
    g.done();
    assert_eq!(g.read_u64(DATA), 0x1_0000_0000);
    assert_eq!(g.read_u64(DATA + 8), -5i64 as u64);
    assert_eq!(g.read_u64(DATA + 16), 0xff);
    assert_eq!(g.read_u64(DATA + 24), 2);
}

#[test]
fn multiplications() {
    use f::*;
    let defined = C | O;
    let mul = |f: fn(&mut CodeAssembler) -> Result<(), IcedError>, regs| {
        let (low, high, flags) = one(f, regs, 0);
        (low, high, flags & defined)
    };
    let m = 0xffff_ffff_ffff_ffffu64;
    assert_eq!(mul(|a| a.mul(cl), [0xff10, 0x10, 9]), (0x0100, 9, C | O));
    assert_eq!(mul(|a| a.mul(cl), [0xff03, 5, 9]), (15, 9, 0));
    assert_eq!(mul(|a| a.mul(cx), [0xffff, 0xffff, m]), (1, 0xffff_ffff_ffff_fffe, C | O));
    assert_eq!(mul(|a| a.mul(ecx), [m, m, m]), (1, 0xffff_fffe, C | O));
    assert_eq!(mul(|a| a.mul(rcx), [m, m, 0]), (1, m - 1, C | O));
    assert_eq!(mul(|a| a.mul(rcx), [m, 1, 7]), (m, 0, 0));
    assert_eq!(mul(|a| a.imul(cl), [0x80, 0xff, 9]), (0x80, 9, C | O));
    assert_eq!(mul(|a| a.imul(rcx), [m, 3, 9]), (-3i64 as u64, m, 0));
    assert_eq!(mul(|a| a.imul_2(eax, ecx), [0x4000_0000, 2, 9]), (0x8000_0000, 9, C | O));
    assert_eq!(mul(|a| a.imul_2(ax, cx), [m, 2, 9]), (0xffff_ffff_ffff_fffe, 9, 0));
    assert_eq!(mul(|a| a.imul_3(rax, rcx, -3), [0, 1 << 62, 9]), (1 << 62, 9, C | O));
    assert_eq!(mul(|a| a.imul_3(eax, ecx, 100), [m, 7, 9]), (700, 9, 0));
}

#[test]
fn divisions() {
    let div = |f: fn(&mut CodeAssembler) -> Result<(), IcedError>, regs| {
        let (quotient, remainder, flags) = one(f, regs, f::STATUS);
        assert_eq!(flags, f::STATUS);
        (quotient, remainder)
    };
    assert_eq!(div(|a| a.div(cl), [0x1234, 0x56, 9]), (0x1036, 9));
    assert_eq!(div(|a| a.div(cx), [0x5678, 0x1235, 0x1234]), (0xfff6, 0x0c8a));
    assert_eq!(div(|a| a.div(ecx), [7, 1 << 31, 1]), (2, 7));
    assert_eq!(div(|a| a.div(rcx), [3, 1 << 63, 1]), (2, 3));
    assert_eq!(div(|a| a.div(rcx), [!0, !0, !0 - 1]), (!0, !0 - 1));
    assert_eq!(div(|a| a.idiv(cl), [0xfff9, 2, 9]), (0xfffd, 9));
    assert_eq!(div(|a| a.idiv(ecx), [0xffff_fff9, 2, 0xffff_ffff]), (0xffff_fffd, 0xffff_ffff));
    assert_eq!(div(|a| a.idiv(rcx), [-7i64 as u64, -2i64 as u64, !0]), (3, !0));
    assert_eq!(div(|a| a.idiv(rcx), [0, 4, 1]), (1 << 62, 0));
    assert_eq!(div(|a| a.idiv(rcx), [0, 1 << 63, 1 << 62]), (1 << 63, 0));
}

#[test]
fn divisions_that_have_no_quotient_are_divide_errors() {
    type Program = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    let cases: [(Program, [u64; 3]); 10] = [
        (|a| a.div(cl), [5, 0, 0]),
        (|a| a.div(cl), [0x100, 1, 0]),
        (|a| a.div(rcx), [0, 1, 1]),
        (|a| a.div(rcx), [0, 0, 0]),
        (|a| a.idiv(rcx), [0, 0, 0]),
        (|a| a.idiv(cl), [0x0080, 1, 0]),
        (|a| a.idiv(ecx), [0x8000_0000, !0, !0]),
        (|a| a.idiv(rcx), [1 << 63, !0, !0]),
        (|a| a.idiv(rcx), [0, !0, 1 << 63]),
        (|a| a.idiv(rcx), [0, 1, 1 << 63]),
    ];
    for (program, [a0, c0, d0]) in cases {
        let mut g = Guest::asm(program).reg(r::RAX, a0).reg(r::RCX, c0).reg(r::RDX, d0);
        assert_eq!(g.run(), Outcome::Fault { vector: 0, error: None, rip: CODE });
        assert_eq!((g.state.gpr[r::RAX], g.state.gpr[r::RDX]), (a0, d0));
    }
}

#[test]
fn bit_tests_in_registers_take_the_offset_modulo_the_width() {
    use f::*;
    assert_eq!(one(|a| a.bt(eax, ecx), [0x10, 36, 0], STATUS - C), (0x10, 0, STATUS));
    assert_eq!(one(|a| a.bts(rax, rcx), [0, 127, 0], C), (1 << 63, 0, 0));
    assert_eq!(one(|a| a.btr(ax, cx), [0xffff, 16, 0], 0), (0xfffe, 0, C));
    assert_eq!(one(|a| a.btc(eax, 33), [!0, 0, 0], 0), (0xffff_fffd, 0, C));
}

#[test]
fn bit_tests_in_memory_reach_as_far_as_the_register_says() {
    let mut g = Guest::asm(|a| {
        a.bts(qword_ptr(rbx), rax)?;
        a.btc(dword_ptr(rbx), ecx)?;
        a.bt(word_ptr(rbx), dx)?;
        a.setb(sil)
    })
    .reg(r::RBX, DATA + 0x1000)
    .reg(r::RAX, -1i64 as u64)
    .reg(r::RCX, 0x1_0000_1000)
    .reg(r::RDX, -16i64 as u64 & 0xffff);
    g.write_u64(DATA + 0xff8, 1 << 48);
    let regs = g.done();
    assert_eq!(g.read_u64(DATA + 0xff8), 1 << 63 | 1 << 48);
    assert_eq!(g.read_u64(DATA + 0x1200), 1);
    assert_eq!(regs[r::RSI], 1);
}

#[test]
fn bit_scans() {
    use f::*;
    let zf = |(index, other, flags): (u64, u64, u64)| (index, other, flags & Z);
    assert_eq!(zf(one(|a| a.bsf(rax, rcx), [0, 0x50, 0], 0)), (4, 0, 0));
    assert_eq!(zf(one(|a| a.bsr(rax, rcx), [0, 0x50, 0], 0)), (6, 0, 0));
    assert_eq!(zf(one(|a| a.bsr(eax, ecx), [!0, 0x8000_0000, 0], 0)), (31, 0, 0));
    assert_eq!(zf(one(|a| a.bsf(eax, ecx), [!0, 1 << 32, 0], 0)), (!0, 0, Z));
    assert_eq!(zf(one(|a| a.bsr(ax, cx), [7, 1 << 16, 0], 0)), (7, 0, Z));
    // Without BMI1 in CPUID, TZCNT is BSF.
    assert_eq!(zf(one(|a| a.tzcnt(rax, rcx), [9, 0, 0], 0)), (9, 0, Z));
    assert_eq!(one(|a| a.popcnt(rax, rcx), [9, !0, 0], STATUS), (64, 0, 0));
    assert_eq!(one(|a| a.popcnt(eax, ecx), [9, 1 << 32, 0], STATUS), (0, 0, Z));
}

#[test]
fn flags_by_hand() {
    use f::*;
    let mut g = Guest::asm(|a| {
        a.lahf()?;
        a.mov(cl, ah)?;
        a.mov(ah, 0xff)?;
        a.sahf()?;
        a.cmc()?;
        a.std()
    })
    .flags(C | Z | O);
    assert_eq!(g.done()[r::RCX], C | Z | 2);
    assert_eq!(g.state.rflags, STATUS - C | D | 2);
    assert_eq!(one(|a| a.stc(), [0; 3], O | Z).2, O | Z | C);
    assert_eq!(one(|a| a.clc(), [0; 3], STATUS).2, STATUS - C);
}
