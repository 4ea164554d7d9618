//! The page-table walk: rights, reserved bits, error codes, accessed and dirty bits.

use iced_x86::code_asm::*;

use crate::guest::*;

const P: u64 = 1;
const W: u64 = 2;
const U: u64 = 4;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const NX: u64 = 1 << 63;

fn read() -> Guest {
    Guest::asm(|a| a.mov(rax, qword_ptr(DATA)))
}

fn write() -> Guest {
    Guest::asm(|a| a.mov(qword_ptr(DATA), rax))
}

fn execute() -> Guest {
    let mut g = Guest::asm(|a| a.jmp(rdx)).reg(2, DATA);
    g.write(DATA, &[0x88, 0x04, 0x25]);
    g.write(DATA + 3, &(END as u32).to_le_bytes());
    g
}

/// Error code of the page fault that `g` takes with `entry` for DATA, `None` if it takes none.
fn fault(mut g: Guest, entry: u64) -> Option<u32> {
    g.set_pte(DATA, entry);
    match g.run() {
        Outcome::Done => None,
        Outcome::Fault { vector: 14, error, .. } => {
            assert_eq!(g.state.sys.cr2 & !7, DATA);
            error
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn rights_of_supervisor_and_user() {
    let all = DATA | P | W | U;
    for (entry, user, outcomes) in [
        (all, false, [None, None, None]),
        (all, true, [None, None, None]),
        (DATA | P | W, false, [None, None, None]),
        (DATA | P | W, true, [Some(5), Some(7), Some(0x15)]),
        (DATA | P | U, false, [None, Some(3), None]),
        (DATA | P | U, true, [None, Some(7), None]),
        (all | NX, false, [None, None, Some(0x11)]),
        (all | NX, true, [None, None, Some(0x15)]),
        (DATA | W | U, false, [Some(0), Some(2), Some(0x10)]),
        (DATA | W | U, true, [Some(4), Some(6), Some(0x14)]),
        // Bit 40 is reserved with 40 physical bits.
        (all | 1 << 40, false, [Some(9), Some(0xb), Some(0x19)]),
        (all | 1 << 51, true, [Some(0xd), Some(0xf), Some(0x1d)]),
        // Bits 52 to 62 are ignored.
        (all | 0x7ff << 52, true, [None, None, None]),
    ] {
        for (make, expected) in [read, write, execute].into_iter().zip(outcomes) {
            let g = if user { make().user() } else { make() };
            assert_eq!(fault(g, entry), expected, "{entry:#x} user {user}");
        }
    }
}

#[test]
fn write_protection_is_off_for_the_supervisor_without_wp() {
    let mut g = write();
    g.state.sys.cr0 &= !(1 << 16);
    assert_eq!(fault(g, DATA | P | U), None);
    let mut g = write().user();
    g.state.sys.cr0 &= !(1 << 16);
    assert_eq!(fault(g, DATA | P | U), Some(7));
}

#[test]
fn without_nxe_bit_63_is_reserved_and_error_codes_do_not_show_fetches() {
    let mut g = read();
    g.state.sys.efer &= !(1 << 11);
    assert_eq!(fault(g, DATA | P | W | U | NX), Some(9));
    let mut g = execute();
    g.state.sys.efer &= !(1 << 11);
    assert_eq!(fault(g, DATA | W | U), Some(0));
}

#[test]
fn accessed_and_dirty_bits_come_with_the_access() {
    let entry = |g: &Guest| g.read_u64(PT + DATA / 4096 * 8) & (A | D);
    let mut g = read();
    g.done();
    assert_eq!(entry(&g), A);
    let mut g = write();
    g.done();
    assert_eq!(entry(&g), A | D);
    assert_eq!(g.read_u64(PD) & A, A);
    assert_eq!(g.read_u64(PML4) & A, A);
    // An access that faults does not set them, nor does a read set the dirty bit.
    let mut g = write();
    g.set_pte(DATA, DATA | P | U);
    assert!(matches!(g.run(), Outcome::Fault { vector: 14, .. }));
    assert_eq!(entry(&g), 0);
    let mut g = Guest::asm(|a| {
        a.mov(rax, qword_ptr(DATA))?;
        a.cmp(qword_ptr(DATA), 0)
    });
    g.done();
    assert_eq!(entry(&g), A);
}

#[test]
fn a_read_modify_write_of_a_read_only_page_faults_as_a_write() {
    let mut g = Guest::asm(|a| a.add(qword_ptr(DATA), 1)).user();
    g.set_pte(DATA, DATA | P | U);
    assert_eq!(g.run(), Outcome::Fault { vector: 14, error: Some(7), rip: CODE });
    assert_eq!(g.read_u64(PT + DATA / 4096 * 8) & D, 0);
}

#[test]
fn large_pages_have_reserved_bits_below_their_frame() {
    let large = 0x20_0000u64;
    let read = || Guest::asm(|a| a.mov(rax, qword_ptr(large)));
    let mut g = read();
    // Bit 12 is PAT, which is allowed.
    g.write_u64(PD + 8, large | 0x1087);
    g.write_u64(large, 9);
    assert_eq!(g.done()[0], 9);
    for bit in [13, 20] {
        let mut g = read();
        g.write_u64(PD + 8, large | 0x87 | 1 << bit);
        assert_eq!(g.run(), Outcome::Fault { vector: 14, error: Some(9), rip: CODE });
    }
    let mut g = Guest::asm(|a| a.mov(rax, qword_ptr(2 * DEVICE)));
    g.write_u64(PDPT + 16, DEVICE | 0x87 | 1 << 29);
    assert_eq!(g.run(), Outcome::Fault { vector: 14, error: Some(9), rip: CODE });
    // The top level has no large pages.
    let mut g = Guest::asm(|a| a.mov(rax, qword_ptr(0x80_0000_0000u64)));
    g.write_u64(PML4 + 8, PDPT | 0x87);
    assert_eq!(g.reg(0, 0).run(), Outcome::Fault { vector: 14, error: Some(9), rip: CODE });
}

#[test]
fn rights_are_those_of_all_levels_together() {
    let large = 0x20_0000u64;
    let user_write = || Guest::asm(|a| a.mov(qword_ptr(large), rax)).user();
    let mut g = user_write();
    assert_eq!(g.run(), Outcome::Done);
    let mut g = user_write();
    g.write_u64(PD + 8, large | 0x85);
    assert_eq!(g.run(), Outcome::Fault { vector: 14, error: Some(7), rip: CODE });
    let mut g = user_write();
    g.write_u64(PD + 8, large | 0x83);
    assert_eq!(g.run(), Outcome::Fault { vector: 14, error: Some(7), rip: CODE });
}

#[test]
fn an_access_across_two_pages_writes_neither_when_the_second_faults() {
    let at = DATA + 0xffc;
    let mut g = Guest::asm(|a| a.mov(qword_ptr(at), rax)).reg(0, u64::MAX);
    g.set_pte(DATA + 0x1000, 0);
    assert_eq!(g.run(), Outcome::Fault { vector: 14, error: Some(2), rip: CODE });
    assert_eq!(g.state.sys.cr2, DATA + 0x1000);
    assert_eq!(g.read_u64(at), 0);
}

#[test]
fn addresses_that_are_not_canonical() {
    const HOLE: u64 = 0x8000_0000_0000;
    let mut g = Guest::asm(|a| a.mov(rax, qword_ptr(rbx))).reg(3, HOLE);
    assert_eq!(g.run(), Outcome::Fault { vector: 13, error: Some(0), rip: CODE });
    let mut g = Guest::asm(|a| a.mov(rax, qword_ptr(rbp))).reg(5, HOLE);
    assert_eq!(g.run(), Outcome::Fault { vector: 12, error: Some(0), rip: CODE });
    // Only the last byte is not canonical.
    let mut g = Guest::asm(|a| a.mov(rax, qword_ptr(rbx))).reg(3, HOLE - 4);
    g.write_u64(PML4 + 255 * 8, PDPT | 7);
    g.write_u64(PDPT + 511 * 8, PD | 7);
    g.write_u64(PD + 511 * 8, 0x87);
    assert_eq!(g.run(), Outcome::Fault { vector: 13, error: Some(0), rip: CODE });
    // A jump there faults at the target.
    let mut g = Guest::asm(|a| a.jmp(rbx)).reg(3, HOLE);
    assert!(matches!(g.run(), Outcome::Fault { vector: 13, error: Some(0), .. }));
    let mut g = Guest::asm(|a| a.push(rax)).reg(4, HOLE + 8);
    g.state.sys.tr.limit = 0x67;
    g.write(IDT + 12 * 16 + 4, &[1]);
    assert_eq!(g.run(), Outcome::Fault { vector: 12, error: Some(0), rip: CODE });
}
