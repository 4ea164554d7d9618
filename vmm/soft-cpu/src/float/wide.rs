//! Numbers with 128 significant bits, truncated rather than rounded: the transcendental functions compute
//! with these.

use super::arith::shift_right_sticky;
use super::format::{Operand, Unrounded};

/// `±sig · 2^(exp-127)` with bit 127 of `sig` set, or zero when `sig` is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wide {
    pub(super) sign: bool,
    pub(super) exp: i32,
    pub(super) sig: u128,
}

impl Wide {
    pub(super) const ONE: Wide = Wide::new(0, 1 << 127);
    pub(super) const LN_2: Wide = Wide::new(-1, 0xb172_17f7_d1cf_79ab_c9e3_b398_03f2_f6af);
    pub(super) const LOG2_E: Wide = Wide::new(0, 0xb8aa_3b29_5c17_f0bb_be87_fed0_691d_3e88);
    pub(super) const PI: Wide = Wide::new(1, 0xc90f_daa2_2168_c234_c4c6_628b_80dc_1cd1);
    pub(super) const LOG2_10: Wide = Wide::new(1, 0xd49a_784b_cd1b_8afe_492b_f6ff_4daf_db4c);
    pub(super) const LOG10_2: Wide = Wide::new(-2, 0x9a20_9a84_fbcf_f798_8f89_59ac_0b7c_9178);

    /// A positive number.
    pub(super) const fn new(exp: i32, sig: u128) -> Wide {
        Wide { sign: false, exp, sig }
    }

    fn normalised(sign: bool, exp: i32, sig: u128) -> Wide {
        match sig {
            0 => Wide { sign, exp: 0, sig },
            _ => {
                let Unrounded { sign, exp, sig } = Unrounded::normalised(sign, exp, sig);
                Wide { sign, exp, sig }
            }
        }
    }

    /// From a finite number.
    pub(super) fn from_operand(n: Operand) -> Wide {
        Wide { sign: n.sign, exp: n.exp, sig: u128::from(n.sig) << 64 }
    }

    pub(super) fn from_int(n: i32) -> Wide {
        Wide::from_operand(Operand::from_i64(n.into()))
    }

    pub(super) fn negate(self) -> Wide {
        Wide { sign: !self.sign, ..self }
    }

    /// `self · 2^by`.
    pub(super) fn scale(self, by: i32) -> Wide {
        Wide { exp: self.exp + by, ..self }
    }

    pub(super) fn add(self, other: Wide) -> Wide {
        if self.sig == 0 || other.sig == 0 {
            return if self.sig == 0 { other } else { self };
        }
        let (large, small) =
            if (self.exp, self.sig) >= (other.exp, other.sig) { (self, other) } else { (other, self) };
        let distance = (large.exp - small.exp) as u32;
        if large.sign == small.sign {
            // One bit of room for the carry.
            let sum = (large.sig >> 1) + (shift_right_sticky(small.sig, distance) >> 1);
            return Wide::normalised(large.sign, large.exp + 1, sum);
        }
        let difference = large.sig - shift_right_sticky(small.sig, distance);
        Wide::normalised(large.sign, large.exp, difference)
    }

    pub(super) fn mul(self, other: Wide) -> Wide {
        let high = mul_high(self.sig, other.sig);
        Wide::normalised(self.sign ^ other.sign, self.exp + other.exp + 1, high)
    }

    /// `self / by`, for a small positive divisor.
    pub(super) fn div_int(self, by: u32) -> Wide {
        Wide::normalised(self.sign, self.exp, self.sig / u128::from(by))
    }

    /// `self / other`; `other` must not be zero.
    pub(super) fn div(self, other: Wide) -> Wide {
        // Long division, one bit per iteration; the rest may need a 129th bit.
        let mut quotient = 0;
        let mut rest = self.sig;
        let mut carry = false;
        for _ in 0..128 {
            quotient <<= 1;
            if carry || rest >= other.sig {
                rest = rest.wrapping_sub(other.sig);
                quotient |= 1;
            }
            carry = rest >> 127 != 0;
            rest <<= 1;
        }
        Wide::normalised(self.sign ^ other.sign, self.exp - other.exp, quotient)
    }

    /// Whether `self` is too small to change `sum`.
    pub(super) fn is_negligible(self, sum: Wide) -> bool {
        self.sig == 0 || self.exp < sum.exp - 128
    }

    /// The number as a result to be rounded. `exact`: it has not been truncated.
    pub(super) fn result(self, exact: bool) -> Unrounded {
        Unrounded { sign: self.sign, exp: self.exp, sig: self.sig | u128::from(!exact) }
    }
}

/// The high half of the product.
fn mul_high(a: u128, b: u128) -> u128 {
    let low = |n: u128| n & u128::from(u64::MAX);
    let (a1, a0, b1, b0) = (a >> 64, low(a), b >> 64, low(b));
    let (cross1, cross2) = (a1 * b0, a0 * b1);
    let middle = ((a0 * b0) >> 64) + low(cross1) + low(cross2);
    a1 * b1 + (cross1 >> 64) + (cross2 >> 64) + (middle >> 64)
}
