//! Stale translations stay visible until the guest invalidates them, and are part of the saved state.

use iced_x86::code_asm::*;
use soft_cpu::{CpuExit, RunLimit};

use crate::guest::*;

const OTHER: u64 = DATA + 0x5000;
const OPEN: u64 = 7;
const GLOBAL: u64 = 1 << 8;

/// The entry of the page at [`DATA`].
fn entry() -> i32 {
    (PT + DATA / 4096 * 8) as i32
}

/// Loads from DATA, remaps it to OTHER, does `between`, loads again into RBX.
fn remapped(flags: u64, between: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) -> u64 {
    let mut g = Guest::asm(|a| {
        a.mov(rax, qword_ptr(DATA))?;
        a.mov(rcx, OTHER | OPEN | flags)?;
        a.mov(qword_ptr(entry()), rcx)?;
        between(a)?;
        a.mov(rbx, qword_ptr(DATA))
    });
    g.set_pte(DATA, DATA | OPEN | flags);
    g.write_u64(DATA, 1);
    g.write_u64(OTHER, 2);
    g.done()[3]
}

#[test]
fn a_stale_entry_is_visible_until_invlpg() {
    assert_eq!(remapped(0, |_| Ok(())), 1);
    assert_eq!(remapped(0, |a| a.invlpg(byte_ptr(DATA + 5))), 2);
    assert_eq!(remapped(0, |a| a.invlpg(byte_ptr(DATA + 0x1000))), 1);
    assert_eq!(remapped(GLOBAL, |a| a.invlpg(byte_ptr(DATA))), 2);
}

#[test]
fn a_write_of_cr3_keeps_global_entries_only() {
    let reload = |a: &mut CodeAssembler| {
        a.mov(rdx, cr3)?;
        a.mov(cr3, rdx)
    };
    assert_eq!(remapped(0, reload), 2);
    assert_eq!(remapped(GLOBAL, reload), 1);
}

#[test]
fn toggling_pge_or_wp_drops_everything() {
    let toggle_pge = |a: &mut CodeAssembler| {
        a.mov(rdx, cr4)?;
        a.xor(rdx, 0x80)?;
        a.mov(cr4, rdx)
    };
    assert_eq!(remapped(GLOBAL, toggle_pge), 2);
    let toggle_wp = |a: &mut CodeAssembler| {
        a.mov(rdx, cr0)?;
        a.btc(rdx, 16)?;
        a.mov(cr0, rdx)
    };
    assert_eq!(remapped(GLOBAL, toggle_wp), 2);
}

#[test]
fn a_write_through_a_stale_entry_goes_to_the_old_page() {
    let mut g = Guest::asm(|a| {
        a.mov(qword_ptr(DATA), 1)?;
        a.mov(rcx, OTHER | OPEN)?;
        a.mov(qword_ptr(entry()), rcx)?;
        a.mov(qword_ptr(DATA), 3)
    });
    g.done();
    assert_eq!((g.read_u64(DATA), g.read_u64(OTHER)), (3, 0));
}

#[test]
fn the_first_write_reads_the_page_table_again() {
    // The cached entry is not dirty, so that the write walks the page tables and finds the new page.
    let mut g = Guest::asm(|a| {
        a.mov(rax, qword_ptr(DATA))?;
        a.mov(rcx, OTHER | OPEN)?;
        a.mov(qword_ptr(entry()), rcx)?;
        a.mov(qword_ptr(DATA), 3)
    });
    g.done();
    assert_eq!((g.read_u64(DATA), g.read_u64(OTHER)), (0, 3));
}

#[test]
fn more_rights_need_no_invalidation() {
    let mut g = Guest::asm(|a| {
        a.mov(rax, qword_ptr(DATA))?;
        a.mov(rcx, DATA | OPEN)?;
        a.mov(qword_ptr(entry()), rcx)?;
        a.mov(qword_ptr(DATA), 3)
    });
    g.set_pte(DATA, DATA | 5);
    g.done();
    assert_eq!(g.read_u64(DATA), 3);
}

#[test]
fn a_page_fault_drops_the_entry_of_its_page() {
    // A stale writable entry is dropped when an instruction fetch faults at its page.
    const NO_EXECUTE: u64 = 1 << 63;
    let mut g = Guest::asm(|a| {
        a.mov(rax, qword_ptr(DATA))?;
        a.mov(rcx, OTHER | OPEN | NO_EXECUTE)?;
        a.mov(qword_ptr(entry()), rcx)?;
        a.mov(rdx, DATA)?;
        a.jmp(rdx)
    });
    g.write_u64(DATA, 1);
    g.write_u64(OTHER, 2);
    // The handler drops the error code and continues at R8, where DATA is loaded again.
    let back = assemble(|a| {
        a.mov(rbx, qword_ptr(DATA))?;
        a.mov(byte_ptr(END), al)
    });
    g.write(CODE + 0x800, &back);
    g.write(HANDLERS + 14 * 16, &[0x41, 0xff, 0xe0]);
    assert_eq!(g.reg(8, CODE + 0x800).done()[3], 2);
}

#[test]
fn stale_code_runs_until_invalidated() {
    let run = |flush: bool| {
        let mut g = Guest::asm(|a| {
            a.mov(rdx, DATA)?;
            a.call(rdx)?;
            a.mov(rcx, OTHER | OPEN)?;
            a.mov(qword_ptr(entry()), rcx)?;
            if flush {
                a.invlpg(byte_ptr(rdx))?;
            }
            a.call(rdx)
        });
        g.write(DATA, &[0xb3, 1, 0xc3]);
        g.write(OTHER, &[0xb3, 2, 0xc3]);
        g.done()[3]
    };
    assert_eq!(run(false), 1);
    assert_eq!(run(true), 2);
}

#[test]
fn invlpg_drops_all_pieces_of_a_large_page() {
    // The 2 MiB page at 2 MiB is remapped to 0: both of its cached pieces have to be dropped.
    let large = 0x20_0000u64;
    let mut g = Guest::asm(|a| {
        a.mov(rax, qword_ptr(large))?;
        a.mov(rax, qword_ptr(large + DATA))?;
        a.mov(qword_ptr(PD + 8), 0x87)?;
        a.mov(rsi, qword_ptr(large + DATA))?;
        a.invlpg(byte_ptr(large))?;
        a.mov(rdi, qword_ptr(large + DATA))
    });
    g.write_u64(large + DATA, 1);
    g.write_u64(DATA, 2);
    let r = g.done();
    assert_eq!((r[6], r[7]), (1, 2));
}

#[test]
fn pieces_of_large_pages_are_found_after_a_flush_and_a_restore() {
    let large = 0x20_0000u64;
    let mut g = Guest::asm(|a| {
        a.mov(rax, qword_ptr(large + DATA))?;
        a.mov(rcx, cr3)?;
        a.mov(cr3, rcx)?;
        a.mov(rax, qword_ptr(large + DATA))?;
        a.mov(qword_ptr(PD + 8), 0x87)?;
        a.invlpg(byte_ptr(large))?;
        a.mov(rdi, qword_ptr(large + DATA))
    });
    g.write_u64(large + DATA, 1);
    g.write_u64(DATA, 2);
    assert_eq!(g.run_to(5), Outcome::Exit(CpuExit::Reached));
    assert_eq!(g.done()[7], 2);
}

#[test]
fn a_stale_entry_survives_saving_and_restoring() {
    let mut g = Guest::asm(|a| {
        a.mov(rax, qword_ptr(DATA))?;
        a.mov(rcx, OTHER | OPEN)?;
        a.mov(qword_ptr(entry()), rcx)?;
        a.mov(rbx, qword_ptr(DATA))
    });
    g.write_u64(DATA, 1);
    g.write_u64(OTHER, 2);
    assert_eq!(g.run_to(3), Outcome::Exit(CpuExit::Reached));
    assert!(g.state.tlb.data.iter().any(|(_, e)| e.page == DATA >> 12));
    // `run` restores the saved state first.
    assert_eq!(g.done()[3], 1);
}

#[test]
fn a_restored_state_without_its_tlb_would_differ() {
    let mut g = Guest::asm(|a| {
        a.mov(rax, qword_ptr(DATA))?;
        a.mov(rcx, OTHER | OPEN)?;
        a.mov(qword_ptr(entry()), rcx)?;
        a.mov(rbx, qword_ptr(DATA))
    });
    g.write_u64(OTHER, 2);
    g.cpu.restore(&g.state);
    g.cpu.run(&mut g.ram, &RunLimit { until: 3, interrupt_window: false });
    g.state = g.cpu.save();
    g.state.tlb = Default::default();
    assert_eq!(g.done()[3], 2);
}
