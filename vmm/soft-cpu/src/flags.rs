//! RFLAGS, with the six status flags kept lazily.
//!
//! An arithmetic instruction stores its result and its carry vector and computes no flag; readers derive what
//! they need. The carry vector has the carry out of each bit: CF is the carry out of the top bit, OF the XOR
//! of the carries out of the top two bits, AF the carry out of bit 3.

use crate::int::Int;

/// Status and control bits of RFLAGS (SDM 1, 3.4.3).
pub mod bits {
    #![allow(missing_docs)]
    pub const CF: u64 = 1 << 0;
    pub const FIXED: u64 = 1 << 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// The six flags that arithmetic sets.
    pub const STATUS: u64 = CF | PF | AF | ZF | SF | OF;
}
use bits::*;

/// RFLAGS.
#[derive(Clone, Copy, Debug, Default)]
pub struct Flags {
    /// ZF is `zero == 0`.
    zero: u64,
    /// SF is bit 63, PF the even parity of the low byte.
    sign: u64,
    /// CF is bit 63, OF is bit 63 ^ bit 62, AF is bit 3.
    carry: u64,
    /// All flags that are not status flags.
    non_status: u64,
}

impl Flags {
    /// Offsets of `zero`, `sign` and `carry`, for translated code.
    pub(crate) const OFFSETS: (usize, usize, usize) = (
        std::mem::offset_of!(Flags, zero),
        std::mem::offset_of!(Flags, sign),
        std::mem::offset_of!(Flags, carry),
    );

    /// From the bits of RFLAGS.
    pub fn from_bits(v: u64) -> Flags {
        let mut f = Flags { non_status: v & !STATUS | FIXED, ..Flags::default() };
        f.set_status(v);
        f
    }

    /// The bits of RFLAGS.
    pub fn to_bits(&self) -> u64 {
        self.non_status | self.status()
    }

    /// The flags that are not status flags (TF, IF, DF, IOPL and so on).
    #[inline(always)]
    pub fn non_status(&self) -> u64 {
        self.non_status
    }

    /// Sets and clears flags that are not status flags.
    #[inline]
    pub fn update_non_status(&mut self, clear: u64, set: u64) {
        debug_assert!((clear | set) & STATUS == 0);
        self.non_status = self.non_status & !clear | set;
    }

    /// The six status flags.
    #[inline]
    pub fn status(&self) -> u64 {
        (self.cf() as u64)
            | (self.pf() as u64) << 2
            | (self.af() as u64) << 4
            | (self.zf() as u64) << 6
            | (self.sf() as u64) << 7
            | (self.of() as u64) << 11
    }

    /// Sets the six status flags from RFLAGS' bits.
    #[inline]
    pub fn set_status(&mut self, v: u64) {
        self.zero = (v & ZF == 0) as u64;
        self.sign = (v & SF) << 56 | (v & PF == 0) as u64;
        self.set_carries(v & CF != 0, v & OF != 0, v & AF != 0);
    }

    /// Sets the status flags after an addition or subtraction of width `T` whose carry (borrow) vector is
    /// `carry`.
    #[inline(always)]
    pub fn set_arith<T: Int>(&mut self, result: T, carry: T) {
        self.set_result(result);
        let c = carry.to_u64();
        self.carry = if T::BITS == 64 { c } else { c << (64 - T::BITS) | c & 8 };
    }

    /// Sets the status flags after AND, OR, XOR, TEST: CF, OF and AF are clear.
    #[inline(always)]
    pub fn set_logic<T: Int>(&mut self, result: T) {
        self.set_result(result);
        self.carry = 0;
    }

    /// Sets ZF, SF and PF from a result.
    #[inline(always)]
    pub fn set_result<T: Int>(&mut self, result: T) {
        let r = result.sext();
        self.zero = r;
        self.sign = r;
    }

    /// Sets CF, OF and AF.
    #[inline(always)]
    pub fn set_carries(&mut self, cf: bool, of: bool, af: bool) {
        self.carry = (cf as u64) << 63 | ((cf ^ of) as u64) << 62 | (af as u64) << 3;
    }

    /// Sets CF only.
    #[inline(always)]
    pub fn set_cf(&mut self, cf: bool) {
        // Both top bits change, so that their XOR, which is OF, stays.
        let change = self.carry >> 63 ^ cf as u64;
        self.carry ^= change << 63 | change << 62;
    }

    /// Sets CF and OF; AF stays.
    #[inline]
    pub fn set_cf_of(&mut self, cf: bool, of: bool) {
        self.set_carries(cf, of, self.af());
    }

    /// Sets ZF only.
    #[inline]
    pub fn set_zf(&mut self, zf: bool) {
        self.zero = !zf as u64;
    }

    /// Carry.
    #[inline(always)]
    pub fn cf(&self) -> bool {
        self.carry >> 63 != 0
    }
    /// Parity.
    #[inline(always)]
    pub fn pf(&self) -> bool {
        (self.sign as u8).count_ones() & 1 == 0
    }
    /// Auxiliary carry.
    #[inline(always)]
    pub fn af(&self) -> bool {
        self.carry & 8 != 0
    }
    /// Zero.
    #[inline(always)]
    pub fn zf(&self) -> bool {
        self.zero == 0
    }
    /// Sign.
    #[inline(always)]
    pub fn sf(&self) -> bool {
        self.sign >> 63 != 0
    }
    /// Overflow.
    #[inline(always)]
    pub fn of(&self) -> bool {
        (self.carry ^ self.carry << 1) >> 63 != 0
    }

    /// Condition `CC` in the encoding of Jcc (SDM 2, appendix B.1.4): 0 is O, 1 is NO, … 15 is G.
    #[inline(always)]
    pub fn condition<const CC: u8>(&self) -> bool {
        let c = match CC >> 1 {
            0 => self.of(),
            1 => self.cf(),
            2 => self.zf(),
            3 => self.cf() || self.zf(),
            4 => self.sf(),
            5 => self.pf(),
            6 => self.sf() != self.of(),
            _ => self.zf() || self.sf() != self.of(),
        };
        c != (CC & 1 == 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_combination_survives_the_lazy_form() {
        for n in 0..64u64 {
            let v = (n & 1) * CF
                | (n >> 1 & 1) * PF
                | (n >> 2 & 1) * AF
                | (n >> 3 & 1) * ZF
                | (n >> 4 & 1) * SF
                | (n >> 5 & 1) * OF;
            assert_eq!(Flags::from_bits(v | IF).to_bits(), v | IF | FIXED);
        }
    }
}
