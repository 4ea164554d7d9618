//! The cache of decoded code is invisible: however code is changed, the next instruction is the new one.

use iced_x86::code_asm::*;
use soft_cpu::{CpuExit, RunLimit};

use crate::guest::*;

/// `mov bl, N; ret` at DATA.
fn subroutine(g: &mut Guest, at: u64) {
    g.write(at, &[0xb3, 1, 0xc3]);
}

#[test]
fn code_that_is_written_after_it_ran() {
    let mut g = Guest::asm(|a| {
        a.mov(rdx, DATA)?;
        a.call(rdx)?;
        a.mov(cl, bl)?;
        a.mov(byte_ptr(rdx + 1), 2)?;
        a.call(rdx)
    });
    subroutine(&mut g, DATA);
    let r = g.done();
    assert_eq!((r[1], r[3]), (1, 2));
}

#[test]
fn code_that_is_written_through_an_alias() {
    let mut g = Guest::asm(|a| {
        a.mov(rdx, DATA)?;
        a.call(rdx)?;
        a.mov(byte_ptr(DATA + 0x5001), 2)?;
        a.call(rdx)
    });
    g.set_pte(DATA + 0x5000, DATA | 7);
    subroutine(&mut g, DATA);
    assert_eq!(g.done()[3], 2);
}

#[test]
fn an_instruction_that_changes_the_next_one() {
    for near in [true, false] {
        // MOV byte [next + 1], 2; next: MOV BL, 1. Once in the same 64 bytes, once beyond.
        let mut g = Guest::asm(|a| {
            let mut next = a.create_label();
            a.lea(rdx, ptr(next))?;
            a.mov(byte_ptr(rdx + 1), 2)?;
            if !near {
                for _ in 0..70 {
                    a.nop()?;
                }
            }
            a.set_label(&mut next)?;
            a.mov(bl, 1)
        });
        assert_eq!(g.done()[3], 2, "near {near}");
    }
}

#[test]
fn a_loop_that_changes_itself_each_time() {
    // The immediate of ADD EAX, imm32 is incremented 100 times: 1 + 2 + ... + 100.
    let mut g = Guest::asm(|a| {
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.db(&[0x05, 1, 0, 0, 0])?;
        a.lea(rdx, ptr(top))?;
        a.inc(dword_ptr(rdx + 1))?;
        a.dec(ecx)?;
        a.jne(top)
    })
    .reg(1, 100);
    assert_eq!(g.done()[0], 5050);
}

#[test]
fn rep_stos_over_itself() {
    // REP STOSB overwrites the instructions after it with NOPs (0x90).
    let mut g = Guest::asm(|a| {
        let mut behind = a.create_label();
        a.lea(rdi, ptr(behind))?;
        a.mov(ecx, 4)?;
        a.mov(eax, 0x90)?;
        a.rep().stosb()?;
        a.set_label(&mut behind)?;
        a.ud2()?;
        a.ud2()?;
        a.mov(rbx, 7u64)
    });
    assert_eq!(g.done()[3], 7);
}

#[test]
fn a_push_and_a_cmpxchg_into_code() {
    let mut g = Guest::asm(|a| {
        a.mov(rdx, DATA)?;
        a.call(rdx)?;
        a.mov(rsi, rsp)?;
        a.lea(rsp, ptr(rdx + 8))?;
        a.mov(rax, 0x9090_90c3_02b3u64)?;
        a.push(rax)?;
        a.mov(rsp, rsi)?;
        a.call(rdx)?;
        a.mov(dil, bl)?;
        a.mov(rax, 0x9090_90c3_02b3u64)?;
        a.mov(rcx, 0x9090_90c3_03b3u64)?;
        a.lock().cmpxchg(qword_ptr(rdx), rcx)?;
        a.call(rdx)
    });
    subroutine(&mut g, DATA);
    let r = g.done();
    assert_eq!((r[7] & 0xff, r[3] & 0xff), (2, 3));
}

#[test]
fn a_store_across_two_pages_of_code() {
    let at = DATA + 0xffe;
    let mut g = Guest::asm(|a| {
        a.mov(rdx, at)?;
        a.call(rdx)?;
        a.mov(dword_ptr(rdx), 0x90c3_02b3u32 as i32)?;
        a.call(rdx)
    });
    subroutine(&mut g, at);
    assert_eq!(g.done()[3], 2);
}

#[test]
fn an_instruction_across_pages_whose_second_half_is_remapped() {
    // MOV BL, imm8 with the immediate on the next page.
    let at = DATA + 0xfff;
    let mut g = Guest::asm(|a| {
        a.mov(rdx, at)?;
        a.call(rdx)?;
        a.mov(rcx, (DATA + 0x5000) | 7)?;
        a.mov(qword_ptr(PT + (DATA + 0x1000) / 4096 * 8), rcx)?;
        a.invlpg(byte_ptr(DATA + 0x1000))?;
        a.call(rdx)
    });
    subroutine(&mut g, at);
    g.write(DATA + 0x5000, &[2, 0xc3]);
    assert_eq!(g.done()[3], 2);
}

#[test]
fn a_page_table_in_the_page_of_the_code_gets_its_accessed_bits() {
    // The first half of PT's page maps the first MiB; code in its second half runs, and the walk passes
    // through that page.
    let at = PT + 0xf00;
    let mut g = Guest::asm(|a| a.jmp(rdx)).reg(2, at);
    let code = assemble(|a| {
        a.mov(rax, qword_ptr(DATA))?;
        a.mov(byte_ptr(END), al)
    });
    g.write(at, &code);
    g.done();
    assert_eq!(g.read_u64(PT + DATA / 4096 * 8) & 0x20, 0x20);
}

#[test]
fn the_machine_changes_code() {
    let mut g = Guest::asm(|a| {
        a.mov(rdx, DATA)?;
        a.call(rdx)?;
        a.call(rdx)
    });
    subroutine(&mut g, DATA);
    g.cpu.restore(&g.state);
    // MOV, CALL, MOV, RET.
    let limit = RunLimit { until: 4, interrupt_window: false };
    assert_eq!(g.cpu.run(&mut g.ram, &limit), CpuExit::Reached);
    g.write(DATA + 1, &[2]);
    g.cpu.ram_changed((DATA / 4096) as u32);
    g.cpu.run(&mut g.ram, &RunLimit { until: 1000, ..limit });
    assert_eq!(g.cpu.save().gpr[3], 2);
}
