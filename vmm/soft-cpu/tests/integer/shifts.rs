//! Shifts and rotates. AF is not compared where the SDM leaves it undefined, and OF only for a count of 1.

use crate::f::*;
use crate::guest::*;
use crate::r;

/// Runs an operation on RAX by CL, with RDX as a second source; gives RAX and the status flags.
fn by_cl(code: &[u8], rax: u64, rdx: u64, count: u64, flags: u64) -> (u64, u64) {
    again(&mut Guest::new(code), rax, rdx, count, flags)
}

/// [`by_cl`] with an existing guest.
fn again(g: &mut Guest, rax: u64, rdx: u64, count: u64, flags: u64) -> (u64, u64) {
    g.state.rip = CODE;
    g.state.gpr[r::RAX] = rax;
    g.state.gpr[r::RDX] = rdx;
    g.state.gpr[r::RCX] = count;
    g.state.rflags = flags | 2;
    (g.done()[r::RAX], g.state.rflags & STATUS)
}

/// `/n` of the group D0 to D3 on the accumulator, by CL, in each width.
fn group(n: u8, bits: u32) -> Vec<u8> {
    let modrm = 0xc0 | n << 3;
    match bits {
        8 => vec![0xd2, modrm],
        16 => vec![0x66, 0xd3, modrm],
        32 => vec![0xd3, modrm],
        _ => vec![0x48, 0xd3, modrm],
    }
}

/// Shifts a value of `bits` bits by one with operation `n`: returns the new value, CF and OF (SDM 2, "RCL",
/// "SAL").
fn step(n: u8, bits: u32, v: u64, cf: bool) -> (u64, bool, bool) {
    let mask = u64::MAX >> (64 - bits);
    let (top, second, low) = (v >> (bits - 1) & 1, v >> (bits - 2) & 1, v & 1);
    let up = v << 1 & mask;
    let down = |msb: u64| v >> 1 | msb << (bits - 1);
    match n {
        0 => (up | top, top != 0, top != second),
        1 => (down(low), low != 0, low != top),
        2 => (up | cf as u64, top != 0, top != second),
        3 => (down(cf as u64), low != 0, cf as u64 != top),
        4 | 6 => (up, top != 0, top != second),
        5 => (down(0), low != 0, top != 0),
        _ => (down(top), low != 0, false),
    }
}

/// Counts around each width, and around a width plus one, where masks and rotations through CF wrap.
const COUNTS: [u64; 20] = [0, 1, 2, 3, 7, 8, 9, 10, 15, 16, 17, 18, 24, 27, 31, 32, 33, 63, 64, 0xff];

#[test]
fn a_shift_by_a_count_is_as_many_shifts_by_one() {
    let values = [0, 1, 0x80, 0x8081, 0x5a5a_a5a5, 0x8000_0000_0000_0001, 0x0123_4567_89ab_cdef, !0];
    for (n, bits) in (0..8).flat_map(|n| [8, 16, 32, 64].map(|bits| (n, bits))) {
        let mask = u64::MAX >> (64 - bits);
        let count_mask = if bits == 64 { 63 } else { 31 };
        let mut g = Guest::new(&group(n, bits));
        for (value, count, start) in
            values.into_iter().flat_map(|v| COUNTS.into_iter().flat_map(move |c| [(v, c, 0), (v, c, STATUS)]))
        {
            let (got, flags) = again(&mut g, value, 0, count, start);
            let masked = count & count_mask;
            let (mut v, mut cf, mut of) = (value & mask, start & C != 0, start & O != 0);
            for _ in 0..masked {
                (v, cf, of) = step(n, bits, v, cf);
            }
            let upper = if bits == 32 { 0 } else { value & !mask };
            assert_eq!(got, upper | v, "/{n} {bits} bits, {value:#x} by {count}");
            let mut expected = start & STATUS & !(C | O) | if cf { C } else { 0 } | if of { O } else { 0 };
            let mut compared = STATUS;
            if masked > 1 {
                compared &= !O;
            }
            if n >= 4 && masked > 0 {
                compared &= !A;
                let bit = |on: bool, bit| if on { bit } else { 0 };
                let parity = (v as u8).count_ones().is_multiple_of(2);
                expected = expected & (C | O | A)
                    | bit(v == 0, Z)
                    | bit(v >> (bits - 1) & 1 != 0, S)
                    | bit(parity, P);
            }
            assert_eq!(
                flags & compared,
                expected & compared,
                "flags of /{n} {bits} bits, {value:#x} by {count} from {start:#x}"
            );
        }
    }
}

#[test]
fn double_shifts_take_their_bits_from_the_second_register() {
    let shld = [0x48, 0x0f, 0xa5, 0xd0];
    let shrd = [0x48, 0x0f, 0xad, 0xd0];
    let (a, b) = (0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210);
    assert_eq!(by_cl(&shld, a, b, 8, 0), (0x2345_6789_abcd_effe, C));
    assert_eq!(by_cl(&shrd, a, b, 8, 0), (0x1001_2345_6789_abcd, C));
    assert_eq!(by_cl(&shld, a, b, 64, Z), (a, Z));
    // SHLD by 1 sets OF if the sign changes.
    assert_eq!(by_cl(&shld, 1 << 62, 0, 1, 0), (1 << 63, S | O | P));
    let shld32 = [0x0f, 0xa5, 0xd0];
    assert_eq!(by_cl(&shld32, !0, 0x8000_0000, 1, 0).0, 0xffff_ffff);
    let shrd16 = [0x66, 0x0f, 0xac, 0xd0, 4];
    assert_eq!(by_cl(&shrd16, 0x1234, 0xabcd, 0, 0).0, 0xd123);
}

#[test]
fn shifts_of_memory_by_immediate_and_by_one() {
    let mut g = Guest::new(&[
        0x48, 0xc1, 0x23, 4, // shl qword [rbx], 4
        0xd0, 0x6b, 8, // shr byte [rbx + 8], 1
        0x66, 0xc1, 0x43, 16, 8, // rol word [rbx + 16], 8
    ])
    .reg(r::RBX, DATA);
    g.write_u64(DATA, 0x11);
    g.write_u64(DATA + 8, 0x1ff);
    g.write_u64(DATA + 16, 0x5_1234);
    g.done();
    assert_eq!([0, 8, 16].map(|n| g.read_u64(DATA + n)), [0x110, 0x17f, 0x5_3412]);
}
