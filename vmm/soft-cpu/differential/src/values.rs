//! Values that instructions are likely to get wrong.

use crate::rng::CaseRng;

/// An integer of `bits` bits (zero-extended): edges of its range, bit patterns, small and random numbers.
pub fn int(rng: &mut CaseRng, bits: u32) -> u64 {
    let mask = u64::MAX >> (64 - bits);
    let top = 1u64 << (bits - 1);
    let v = match rng.below(14) {
        0 => 0,
        1 => 1,
        2 => mask,
        3 => top,
        4 => top - 1,
        5 => top + rng.below(3),
        6 => rng.below(17),
        7 => rng.below(17).wrapping_neg(),
        8 => 1 << rng.below(bits as u64),
        9 => (1 << rng.below(bits as u64)) - 1,
        10 => rng.below(256) * 0x0101_0101_0101_0101,
        11 => rng.bits() & rng.bits() & rng.bits(),
        // The edges of narrower integers, sign-extended.
        12 => (rng.pick(&[0x7f, 0x80, 0x7fff, 0x8000, 0x7fff_ffff, 0x8000_0000u64]))
            .wrapping_mul(rng.pick(&[1, u64::MAX])),
        _ => rng.bits(),
    };
    v & mask
}

/// A binary floating-point format: the number of fraction bits and of exponent bits.
#[derive(Clone, Copy)]
struct BinaryFormat {
    fraction: u32,
    exponent: u32,
}

const SINGLE: BinaryFormat = BinaryFormat { fraction: 23, exponent: 8 };
const DOUBLE: BinaryFormat = BinaryFormat { fraction: 52, exponent: 11 };
const EXTENDED: BinaryFormat = BinaryFormat { fraction: 63, exponent: 15 };

/// Draws a value: sign, biased exponent, fraction without integer bit.
fn float(rng: &mut CaseRng, f: BinaryFormat) -> (bool, u64, u64) {
    let ones = u64::MAX >> (64 - f.fraction);
    let quiet = 1u64 << (f.fraction - 1);
    let special = (1u64 << f.exponent) - 1;
    let bias = special >> 1;
    // Fractions with few bits set give exact results and ties.
    let fraction = match rng.below(6) {
        0 => 0,
        1 => ones,
        2 => ones - rng.below(4),
        3 => rng.below(4),
        4 => (rng.below(16) << (f.fraction - 4)) & ones,
        _ => rng.bits() & ones,
    };
    let (exponent, fraction) = match rng.below(16) {
        0 => (0, 0),
        1 => (0, fraction.max(1)),
        2 => (1, fraction),
        3 => (special - 1, fraction),
        4 => (special, 0),
        5 => (special, quiet | fraction),
        6 => (special, fraction & (quiet - 1) | 1),
        // Around the limits of integers.
        7 => (bias + rng.pick(&[14, 15, 16, 30, 31, 32, 51, 52, 53, 62, 63, 64]), fraction),
        // Where products and quotients overflow or become denormal.
        8 => (bias / 2 + rng.below(4), fraction),
        9 => (bias + bias / 2 + rng.below(4), fraction),
        10 => (rng.below(f.fraction as u64 + 4), fraction),
        11 => (rng.bits() & special, rng.bits() & ones),
        _ => (bias - 3 + rng.below(7), fraction),
    };
    (rng.chance(50), exponent.min(special), fraction)
}

/// A single-precision value's bits.
pub fn single(rng: &mut CaseRng) -> u32 {
    let (sign, exponent, fraction) = float(rng, SINGLE);
    (sign as u32) << 31 | (exponent as u32) << 23 | fraction as u32
}

/// A double-precision value's bits.
pub fn double(rng: &mut CaseRng) -> u64 {
    let (sign, exponent, fraction) = float(rng, DOUBLE);
    (sign as u64) << 63 | exponent << 52 | fraction
}

/// An 80-bit value: significand, sign and exponent. One in ten is of a kind that no operation returns
/// (pseudo-denormal, unnormal, pseudo-infinity, pseudo-NaN).
pub fn extended(rng: &mut CaseRng) -> (u64, u16) {
    let (sign, exponent, fraction) = float(rng, EXTENDED);
    let mut integer = (exponent != 0) as u64;
    if rng.chance(10) {
        integer ^= 1;
    }
    (integer << 63 | fraction, (sign as u16) << 15 | exponent as u16)
}

/// The type of the lanes of a vector or an operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LaneType {
    /// Integers of this many bits.
    Int(u32),
    /// Single precision.
    Single,
    /// Double precision.
    Double,
    /// Double extended precision: 80 bits, in 10 bytes.
    Extended,
    /// 18 decimal digits and a sign, in 10 bytes.
    Bcd,
}

/// 16 bytes of lanes.
pub fn lanes(rng: &mut CaseRng, lane: LaneType) -> [u8; 16] {
    let mut b = [0; 16];
    match lane {
        LaneType::Int(bits) => {
            let n = (bits / 8).clamp(1, 8) as usize;
            b.chunks_mut(n).for_each(|c| c.copy_from_slice(&int(rng, bits.min(64)).to_le_bytes()[..n]));
        }
        LaneType::Single => b.chunks_mut(4).for_each(|c| c.copy_from_slice(&single(rng).to_le_bytes())),
        LaneType::Double => b.chunks_mut(8).for_each(|c| c.copy_from_slice(&double(rng).to_le_bytes())),
        LaneType::Extended => {
            let (significand, sign_exponent) = extended(rng);
            b[..8].copy_from_slice(&significand.to_le_bytes());
            b[8..10].copy_from_slice(&sign_exponent.to_le_bytes());
        }
        LaneType::Bcd => {
            b[..9].fill_with(|| (rng.below(10) << 4 | rng.below(10)) as u8);
            b[9] = rng.pick(&[0, 0x80]);
        }
    }
    b
}

/// 16 bytes for an XMM register.
pub fn vector(rng: &mut CaseRng) -> u128 {
    let lane = rng.pick(&[
        LaneType::Single,
        LaneType::Single,
        LaneType::Double,
        LaneType::Double,
        LaneType::Int(8),
        LaneType::Int(16),
        LaneType::Int(32),
        LaneType::Int(64),
    ]);
    u128::from_le_bytes(lanes(rng, lane))
}
