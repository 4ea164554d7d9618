//! MOV, MOVZX, LEA, CMOVcc and similar instructions; XCHG, XADD, CMPXCHG.

use iced_x86::code_asm::*;

use crate::guest::*;
use crate::{f, r};

const ONES: u64 = !0;

#[test]
fn narrow_writes_keep_the_rest_and_32_bit_ones_clear_it() {
    let mut g = Guest::asm(|a| {
        a.mov(al, 0x11)?;
        a.mov(ch, 0x22)?;
        a.mov(dx, 0x3333)?;
        a.mov(ebx, 0x4444_4444)?;
        a.mov(rsi, -2i64)?;
        a.mov(dil, 0x55)
    });
    for n in [r::RAX, r::RCX, r::RDX, r::RBX, r::RDI] {
        g.state.gpr[n] = ONES;
    }
    let regs = g.done();
    assert_eq!(regs[r::RAX], 0xffff_ffff_ffff_ff11);
    assert_eq!(regs[r::RCX], 0xffff_ffff_ffff_22ff);
    assert_eq!(regs[r::RDX], 0xffff_ffff_ffff_3333);
    assert_eq!(regs[r::RBX], 0x4444_4444);
    assert_eq!(regs[r::RSI], -2i64 as u64);
    assert_eq!(regs[r::RDI], 0xffff_ffff_ffff_ff55);
}

#[test]
fn mov_reaches_memory_in_every_width_and_across_pages() {
    let at = DATA + 0xffc;
    let mut g = Guest::asm(|a| {
        a.mov(qword_ptr(rbx), rax)?;
        a.mov(cl, byte_ptr(rbx + 7))?;
        a.mov(dx, word_ptr(rbx + 3))?;
        a.mov(esi, dword_ptr(rbx + 2))?;
        a.mov(rdi, qword_ptr(rbx))?;
        a.mov(dword_ptr(rbx + 16), -1)?;
        a.mov(qword_ptr(rbx + 24), -1)
    })
    .reg(r::RAX, 0x8877_6655_4433_2211)
    .reg(r::RBX, at);
    let regs = g.done();
    assert_eq!(g.read_u64(at), 0x8877_6655_4433_2211);
    assert_eq!(regs[r::RCX], 0x88);
    assert_eq!(regs[r::RDX], 0x5544);
    assert_eq!(regs[r::RSI], 0x6655_4433);
    assert_eq!(regs[r::RDI], 0x8877_6655_4433_2211);
    assert_eq!((g.read_u64(at + 16), g.read_u64(at + 24)), (0xffff_ffff, ONES));
}

#[test]
fn a_store_across_pages_of_which_one_is_read_only_writes_neither() {
    let mut g = Guest::asm(|a| a.mov(qword_ptr(rbx), rax)).reg(r::RBX, DATA + 0xffc).reg(r::RAX, ONES);
    g.set_pte(DATA + 0x1000, DATA + 0x1000 | 5);
    assert_eq!(g.run(), Outcome::Fault { vector: 14, error: Some(3), rip: CODE });
    assert_eq!(g.state.sys.cr2, DATA + 0x1000);
    assert_eq!(g.read_u64(DATA + 0xff8), 0);
}

#[test]
fn moffs_has_64_bits_of_address_and_32_with_a_prefix() {
    let long = [&[0x48, 0xa1][..], &DATA.to_le_bytes(), &[0xa2], &(DATA + 8).to_le_bytes()].concat();
    let mut g = Guest::new(&long);
    g.write_u64(DATA, 0x0102_0304_0506_0708);
    assert_eq!(g.done()[r::RAX], 0x0102_0304_0506_0708);
    assert_eq!(g.read_u64(DATA + 8), 8);

    let short = [&[0x67, 0xa1][..], &(DATA as u32).to_le_bytes()].concat();
    let mut g = Guest::new(&short);
    g.write_u64(DATA, 0x0102_0304_0506_0708);
    assert_eq!(g.done()[r::RAX], 0x0506_0708);

    let mut g = Guest::new(&[&[0xa0][..], &(1u64 << 63).to_le_bytes()].concat());
    assert_eq!(g.run(), Outcome::Fault { vector: 13, error: Some(0), rip: CODE });
}

#[test]
fn extensions() {
    let mut g = Guest::asm(|a| {
        a.movzx(rcx, al)?;
        a.movsx(rdx, al)?;
        a.movsx(ebx, ax)?;
        a.movsxd(rsi, eax)?;
        a.movzx(edi, ah)?;
        a.movsx(r8, word_ptr(rbp))
    })
    .reg(r::RAX, 0x1234_5678_8765_f1f2)
    .reg(r::RBP, DATA);
    g.write_u64(DATA, 0x8000);
    let regs = g.done();
    assert_eq!(regs[r::RCX], 0xf2);
    assert_eq!(regs[r::RDX], 0xffff_ffff_ffff_fff2);
    assert_eq!(regs[r::RBX], 0xffff_f1f2);
    assert_eq!(regs[r::RSI], 0xffff_ffff_8765_f1f2);
    assert_eq!(regs[r::RDI], 0xf1);
    assert_eq!(regs[r::R8], 0xffff_ffff_ffff_8000);
}

#[test]
fn lea_truncates_the_address_to_the_address_size_and_the_result_to_the_operand_size() {
    let mut g = Guest::asm(|a| {
        a.lea(rcx, ptr(rax + rbx * 8 - 1))?;
        a.lea(edx, ptr(rax + rbx * 8 - 1))?;
        a.lea(si, ptr(rax + rbx * 8 - 1))?;
        a.lea(rdi, ptr(eax + ebx * 8 - 1))?;
        a.lea(r8, ptr(CODE + 0x1000))
    })
    .reg(r::RAX, 0x1111_1111_ffff_ffff)
    .reg(r::RBX, 2)
    .reg(r::RSI, ONES);
    let regs = g.done();
    assert_eq!(regs[r::RCX], 0x1111_1112_0000_000e);
    assert_eq!(regs[r::RDX], 0xe);
    assert_eq!(regs[r::RSI], 0xffff_ffff_ffff_000e);
    assert_eq!(regs[r::RDI], 0xe);
    assert_eq!(regs[r::R8], CODE + 0x1000);
}

#[test]
fn addresses_wrap_at_32_bits_with_the_prefix_before_the_segment_base_is_added() {
    let mut g = Guest::asm(|a| a.mov(rcx, qword_ptr(eax + 0x10).fs())).reg(r::RAX, 0x5_ffff_fff0);
    g.state.fs_base = DATA;
    g.write_u64(DATA, 77);
    assert_eq!(g.done()[r::RCX], 77);
}

#[test]
fn rip_relative_operands_count_from_the_next_instruction() {
    // The operand is the last 8 bytes of the second instruction, which are its immediate.
    let mut g = Guest::new(&[
        0x48, 0x8b, 0x05, 2, 0, 0, 0, // mov rax, [rip + 2]
        0x48, 0xb9, 1, 2, 3, 4, 5, 6, 7, 8, // mov rcx, imm64
    ]);
    assert_eq!(g.done()[r::RAX], 0x0807_0605_0403_0201);
}

#[test]
fn cmov_always_reads_and_always_zero_extends() {
    let mut g = Guest::asm(|a| {
        a.cmove(eax, ecx)?;
        a.cmove(rbx, rcx)?;
        a.cmove(dx, cx)
    })
    .reg(r::RAX, ONES)
    .reg(r::RBX, ONES)
    .reg(r::RDX, ONES);
    let regs = g.done();
    assert_eq!((regs[r::RAX], regs[r::RBX], regs[r::RDX]), (0xffff_ffff, ONES, ONES));

    let mut g = Guest::asm(|a| a.cmove(eax, dword_ptr(0x1000_0000)));
    assert_eq!(g.run(), Outcome::Fault { vector: 14, error: Some(0), rip: CODE });
}

/// Each condition as a function of CF, PF, ZF, SF and OF (SDM 1, appendix B).
fn holds(cc: u8, v: u64) -> bool {
    let (c, p, z, s, o) = (v & f::C != 0, v & f::P != 0, v & f::Z != 0, v & f::S != 0, v & f::O != 0);
    let base = [o, c, z, c || z, s, p, s != o, z || s != o][cc as usize >> 1];
    base != (cc & 1 == 1)
}

#[test]
fn all_conditions_of_setcc_cmovcc_and_jcc() {
    for cc in 0..16 {
        let program = [
            &[0x0f, 0x90 | cc, 0xc0][..],   // setcc al
            &[0x48, 0x0f, 0x40 | cc, 0xca], // cmovcc rcx, rdx
            &[0x70 | cc, 2],                // jcc over the next
            &[0xb3, 1],                     // mov bl, 1
            &[0x0f, 0x80 | cc, 3, 0, 0, 0], // jcc over the next
            &[0x40, 0xb6, 1],               // mov sil, 1
        ]
        .concat();
        for bits in 0..32 {
            let flag = |n: u64, bit: u64| if bits >> n & 1 != 0 { bit } else { 0 };
            let v = flag(0, f::C) | flag(1, f::P) | flag(2, f::Z) | flag(3, f::S) | flag(4, f::O);
            let mut g = Guest::new(&program).flags(v).reg(r::RDX, 1);
            let regs = g.done();
            let taken = holds(cc, v) as u64;
            assert_eq!((regs[r::RAX], regs[r::RCX]), (taken, taken), "cc {cc:#x} flags {v:#x}");
            assert_eq!((regs[r::RBX], regs[r::RSI]), (1 - taken, 1 - taken), "cc {cc:#x} flags {v:#x}");
        }
    }
}

#[test]
fn setcc_to_memory_writes_one_byte() {
    let mut g = Guest::asm(|a| a.setne(byte_ptr(rbx))).reg(r::RBX, DATA);
    g.write_u64(DATA, ONES);
    g.done();
    assert_eq!(g.read_u64(DATA), 0xffff_ffff_ffff_ff01);
}

#[test]
fn bswap_xlat_and_conversions_of_the_accumulator() {
    let mut g = Guest::asm(|a| {
        a.bswap(rcx)?;
        a.bswap(edx)?;
        a.xlatb()?;
        a.mov(r8b, al)?;
        a.cbw()?;
        a.mov(r9w, ax)?;
        a.cwde()?;
        a.mov(r10, rax)?;
        a.cdqe()?;
        a.mov(r11, rax)?;
        a.mov(rdx, 0x1111_1111_1111_1111u64)?;
        a.cwd()?;
        a.mov(r12, rdx)?;
        a.cdq()?;
        a.mov(r13, rdx)?;
        a.cqo()
    })
    .reg(r::RAX, 0x1_0000_0005)
    .reg(r::RBX, DATA)
    .reg(r::RCX, 0x0102_0304_0506_0708)
    .reg(r::RDX, 0xffff_ffff_0102_0304);
    g.write(DATA + 5, &[0x80]);
    let regs = g.done();
    assert_eq!(regs[r::RCX], 0x0807_0605_0403_0201);
    assert_eq!(regs[8], 0x80);
    assert_eq!(regs[9], 0xff80);
    assert_eq!(regs[10], 0xffff_ff80);
    assert_eq!(regs[11], 0xffff_ffff_ffff_ff80);
    assert_eq!(regs[12], 0x1111_1111_1111_ffff);
    assert_eq!(regs[13], 0xffff_ffff);
    assert_eq!(regs[r::RDX], ONES);
}

#[test]
fn exchanges() {
    let mut g = Guest::asm(|a| {
        a.xchg(rax, rcx)?;
        a.xchg(al, ah)?;
        a.xchg(qword_ptr(rbx), rdx)?;
        a.xchg(edi, esi)
    })
    .reg(r::RAX, 1)
    .reg(r::RCX, 0x0203)
    .reg(r::RBX, DATA)
    .reg(r::RDX, 7)
    .reg(r::RDI, ONES)
    .reg(r::RSI, 0x1_0000_0002);
    g.write_u64(DATA, 9);
    let regs = g.done();
    assert_eq!((regs[r::RAX], regs[r::RCX]), (0x0302, 1));
    assert_eq!((regs[r::RDX], g.read_u64(DATA)), (9, 7));
    assert_eq!((regs[r::RDI], regs[r::RSI]), (2, 0xffff_ffff));
}

#[test]
fn xchg_with_a_page_that_cannot_be_written_changes_nothing() {
    let mut g = Guest::asm(|a| a.xchg(qword_ptr(rbx), rdx)).reg(r::RBX, DATA).reg(r::RDX, 7);
    g.set_pte(DATA, DATA | 5);
    assert_eq!(g.run(), Outcome::Fault { vector: 14, error: Some(3), rip: CODE });
    assert_eq!(g.state.gpr[r::RDX], 7);
}

#[test]
fn xadd() {
    let mut g = Guest::asm(|a| {
        a.xadd(qword_ptr(rbx), rax)?;
        a.xadd(cl, cl)?;
        a.lock().xadd(dword_ptr(rbx + 8), edx)
    })
    .reg(r::RAX, 5)
    .reg(r::RBX, DATA)
    .reg(r::RCX, 0x40)
    .reg(r::RDX, ONES);
    g.write_u64(DATA, 10);
    g.write_u64(DATA + 8, 0x1_0000_0001);
    let regs = g.done();
    assert_eq!((regs[r::RAX], g.read_u64(DATA)), (10, 15));
    assert_eq!(regs[r::RCX], 0x80);
    assert_eq!((regs[r::RDX], g.read_u64(DATA + 8)), (1, 0x1_0000_0000));
    assert_eq!(g.state.rflags & f::STATUS, f::C | f::Z | f::P | f::A);
}

#[test]
fn cmpxchg_writes_memory_or_the_accumulator() {
    let program = |a: &mut CodeAssembler| {
        a.lock().cmpxchg(dword_ptr(rbx), ecx)?;
        a.mov(r8d, dword_ptr(rbx))
    };
    let mut g = Guest::asm(program).reg(r::RBX, DATA).reg(r::RAX, 0xf_0000_0005).reg(r::RCX, 9);
    g.write_u64(DATA, 5);
    let regs = g.done();
    // Equal: the accumulator is not written, so its upper half stays.
    assert_eq!((regs[r::RAX], regs[r::R8]), (0xf_0000_0005, 9));
    assert_eq!(g.state.rflags & f::Z, f::Z);

    let mut g = Guest::asm(program).reg(r::RBX, DATA).reg(r::RAX, 0xf_0000_0005).reg(r::RCX, 9);
    g.write_u64(DATA, 6);
    let regs = g.done();
    assert_eq!((regs[r::RAX], regs[r::R8]), (6, 6));
    assert_eq!(g.state.rflags & f::STATUS, f::C | f::S | f::A | f::P);
}

#[test]
fn cmpxchg_faults_as_a_write_even_where_it_would_not_change_memory() {
    let mut g = Guest::asm(|a| a.cmpxchg(dword_ptr(rbx), ecx)).reg(r::RBX, DATA).reg(r::RAX, 1);
    g.set_pte(DATA, DATA | 5);
    assert_eq!(g.run(), Outcome::Fault { vector: 14, error: Some(3), rip: CODE });
    assert_eq!(g.state.gpr[r::RAX], 1);
}

#[test]
fn cmpxchg8b_and_16b() {
    let mut g = Guest::asm(|a| {
        a.lock().cmpxchg8b(qword_ptr(rsi))?;
        a.setz(r8b)?;
        a.lock().cmpxchg8b(qword_ptr(rsi))?;
        a.setz(r9b)
    })
    .reg(r::RSI, DATA + 4)
    .reg(r::RAX, 1)
    .reg(r::RDX, 2)
    .reg(r::RBX, 3)
    .reg(r::RCX, 4);
    g.write_u64(DATA + 4, 0x2_0000_0001);
    let regs = g.done();
    assert_eq!(g.read_u64(DATA + 4), 0x4_0000_0003);
    assert_eq!((regs[8], regs[9]), (1, 0));
    assert_eq!((regs[r::RAX], regs[r::RDX]), (3, 4));

    let wide = |a: &mut CodeAssembler| a.lock().cmpxchg16b(xmmword_ptr(rsi));
    let mut g = Guest::asm(wide).reg(r::RSI, DATA + 16).reg(r::RAX, 1).reg(r::RBX, 3).reg(r::RCX, 4);
    g.write_u64(DATA + 16, 1);
    g.done();
    assert_eq!((g.read_u64(DATA + 16), g.read_u64(DATA + 24)), (3, 4));
    let mut g = Guest::asm(wide).reg(r::RSI, DATA + 8);
    assert_eq!(g.run(), Outcome::Fault { vector: 13, error: Some(0), rip: CODE });
}
