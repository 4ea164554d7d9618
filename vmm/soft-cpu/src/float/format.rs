//! The formats: unpacking, rounding, packing.

use super::{DE, FloatContext, IE, OE, PE, Rounding, UE};

/// An IEEE single, as its bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct F32(pub u32);

/// An IEEE double, as its bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct F64(pub u64);

/// The x87's double extended, as its bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct F80 {
    /// The significand with its explicit integer bit.
    pub significand: u64,
    /// Sign (bit 15) and biased exponent.
    pub sign_exp: u16,
}

/// The class of an encoding. The order matters: everything from `Quiet` on is not a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FloatClass {
    /// Zero.
    Zero,
    /// A denormal, or the x87's pseudo-denormal.
    Denormal,
    /// A normal number.
    Normal,
    /// Infinity.
    Infinity,
    /// A quiet NaN.
    Quiet,
    /// A signaling NaN.
    Signaling,
    /// An encoding that the x87 does not support (unnormal, pseudo-NaN, pseudo-infinity).
    Unsupported,
}

/// An unpacked number: `±sig · 2^(exp-63)`, with bit 63 of `sig` set unless it is zero. For a NaN `sig` is
/// the payload, with the integer bit 63 and the quiet bit 62.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operand {
    /// Its class.
    pub class: FloatClass,
    /// Whether it is negative.
    pub sign: bool,
    /// Unbiased exponent of a number; meaningless otherwise.
    pub exp: i32,
    /// The significand, normalised to bit 63.
    pub sig: u64,
}

const INTEGER_BIT: u64 = 1 << 63;
const QUIET_BIT: u64 = 1 << 62;

impl Operand {
    /// The NaN of an invalid operation ("real indefinite").
    pub const DEFAULT_NAN: Operand =
        Operand { class: FloatClass::Quiet, sign: true, exp: 0, sig: INTEGER_BIT | QUIET_BIT };

    /// A zero.
    pub const fn zero(sign: bool) -> Operand {
        Operand { class: FloatClass::Zero, sign, exp: 0, sig: 0 }
    }

    /// An infinity.
    pub const fn infinity(sign: bool) -> Operand {
        Operand { class: FloatClass::Infinity, sign, exp: 0, sig: INTEGER_BIT }
    }

    /// The integer `n`, exactly.
    pub const fn from_i64(n: i64) -> Operand {
        if n == 0 {
            return Operand::zero(false);
        }
        let magnitude = n.unsigned_abs();
        let zeros = magnitude.leading_zeros();
        Operand { class: FloatClass::Normal, sign: n < 0, exp: 63 - zeros as i32, sig: magnitude << zeros }
    }

    /// Whether it is not a number: a NaN or an unsupported encoding.
    pub fn is_nan(&self) -> bool {
        self.class >= FloatClass::Quiet
    }

    /// Unpacks the fields of an IEEE encoding: biased exponent, fraction moved up to bit 62, and the bias.
    fn from_ieee(sign: bool, biased: u32, fraction: u64, bias: i32, daz: bool) -> Operand {
        if biased == 0 {
            if fraction == 0 || daz {
                return Operand::zero(sign);
            }
            let zeros = fraction.leading_zeros();
            return Operand {
                class: FloatClass::Denormal,
                sign,
                exp: 1 - bias - zeros as i32,
                sig: fraction << zeros,
            };
        }
        let sig = INTEGER_BIT | fraction;
        if biased as i32 == 2 * bias + 1 {
            return Operand { class: special_class(sig), sign, exp: 0, sig };
        }
        Operand { class: FloatClass::Normal, sign, exp: biased as i32 - bias, sig }
    }

    /// The biased exponent and the significand of the packed number, in a format with exponent bias `bias`.
    fn biased(&self, bias: i32) -> (u64, u64) {
        match self.class {
            FloatClass::Zero => (0, 0),
            FloatClass::Normal | FloatClass::Denormal if self.sig & INTEGER_BIT == 0 => (0, self.sig),
            FloatClass::Normal | FloatClass::Denormal => ((self.exp + bias) as u64, self.sig),
            _ => (2 * bias as u64 + 1, self.sig),
        }
    }

    /// The number as a result to be rounded. It must be a number other than zero and infinity.
    pub(super) fn unrounded(&self) -> Unrounded {
        Unrounded { sign: self.sign, exp: self.exp, sig: u128::from(self.sig) << 64 }
    }
}

/// The class of an all-ones exponent with this significand.
fn special_class(sig: u64) -> FloatClass {
    if sig & INTEGER_BIT == 0 {
        FloatClass::Unsupported
    } else if sig == INTEGER_BIT {
        FloatClass::Infinity
    } else if sig & QUIET_BIT != 0 {
        FloatClass::Quiet
    } else {
        FloatClass::Signaling
    }
}

/// The precision and range that results are rounded to.
#[derive(Clone, Copy)]
pub struct RoundingTarget {
    /// Bits of the significand.
    pub(super) precision: u32,
    /// Exponent of the largest numbers; the smallest normal has `1 - exp_max`.
    pub(super) exp_max: i32,
}

impl RoundingTarget {
    /// Full x87 precision, for the operations that ignore the precision control.
    pub(super) const EXTENDED: RoundingTarget = RoundingTarget { precision: 64, exp_max: 16383 };
}

/// A floating-point format.
pub trait Float: Copy {
    /// Unpacks the encoding; with `cx.daz` a denormal is a zero.
    fn unpack(self, cx: &FloatContext) -> Operand;
    /// The encoding of a number, which must fit, as it does after rounding.
    fn pack(number: Operand) -> Self;
    /// What the results of arithmetic are rounded to.
    fn target(cx: &FloatContext) -> RoundingTarget;
    /// Which of two operands, at least one of them a NaN, gives the result its payload.
    fn choose_nan(a: Operand, b: Operand) -> Operand;

    /// Sets the flag of an invalid operation and returns its NaN.
    fn invalid(cx: &mut FloatContext) -> Self {
        cx.flags |= IE;
        Self::pack(Operand::DEFAULT_NAN)
    }

    /// The result if one of the operands is a NaN, else `None`. An operation with one operand passes it
    /// twice.
    #[inline]
    fn nan_result(a: Operand, b: Operand, cx: &mut FloatContext) -> Option<Self> {
        let worst = a.class.max(b.class);
        if worst < FloatClass::Quiet {
            return None;
        }
        if worst == FloatClass::Unsupported {
            return Some(Self::invalid(cx));
        }
        if worst == FloatClass::Signaling {
            cx.flags |= IE;
        }
        let chosen = Self::choose_nan(a, b);
        Some(Self::pack(Operand { sig: chosen.sig | QUIET_BIT, ..chosen }))
    }
}

fn first_nan(a: Operand, b: Operand) -> Operand {
    if a.is_nan() { a } else { b }
}

impl Float for F32 {
    #[inline]
    fn unpack(self, cx: &FloatContext) -> Operand {
        let fraction = u64::from(self.0 & 0x7f_ffff) << 40;
        Operand::from_ieee(self.0 >> 31 != 0, self.0 >> 23 & 0xff, fraction, 127, cx.daz)
    }

    #[inline]
    fn pack(number: Operand) -> F32 {
        let (exp, sig) = number.biased(127);
        F32(u32::from(number.sign) << 31 | (exp as u32) << 23 | (sig >> 40) as u32 & 0x7f_ffff)
    }

    fn target(_: &FloatContext) -> RoundingTarget {
        RoundingTarget { precision: 24, exp_max: 127 }
    }

    fn choose_nan(a: Operand, b: Operand) -> Operand {
        first_nan(a, b)
    }
}

impl Float for F64 {
    #[inline]
    fn unpack(self, cx: &FloatContext) -> Operand {
        let fraction = (self.0 & 0xf_ffff_ffff_ffff) << 11;
        Operand::from_ieee(self.0 >> 63 != 0, (self.0 >> 52) as u32 & 0x7ff, fraction, 1023, cx.daz)
    }

    #[inline]
    fn pack(number: Operand) -> F64 {
        let (exp, sig) = number.biased(1023);
        F64(u64::from(number.sign) << 63 | exp << 52 | sig >> 11 & 0xf_ffff_ffff_ffff)
    }

    fn target(_: &FloatContext) -> RoundingTarget {
        RoundingTarget { precision: 53, exp_max: 1023 }
    }

    fn choose_nan(a: Operand, b: Operand) -> Operand {
        first_nan(a, b)
    }
}

impl F80 {
    /// One, which FPTAN pushes.
    pub const ONE: F80 = F80 { significand: INTEGER_BIT, sign_exp: 0x3fff };
    /// The NaN of an invalid operation ("real indefinite").
    pub const DEFAULT_NAN: F80 = F80 { significand: INTEGER_BIT | QUIET_BIT, sign_exp: 0xffff };

    /// Unpacks the encoding, with the class that FXAM reports.
    pub fn operand(self) -> Operand {
        let sign = self.sign_exp >> 15 != 0;
        let biased = i32::from(self.sign_exp & 0x7fff);
        let sig = self.significand;
        if biased == 0x7fff {
            return Operand { class: special_class(sig), sign, exp: 0, sig };
        }
        if sig == 0 && biased == 0 {
            return Operand::zero(sign);
        }
        let zeros = sig.leading_zeros();
        let class = match (biased, zeros) {
            (0, _) => FloatClass::Denormal,
            (_, 0) => FloatClass::Normal,
            _ => return Operand { class: FloatClass::Unsupported, sign, exp: 0, sig },
        };
        Operand { class, sign, exp: biased.max(1) - 16383 - zeros as i32, sig: sig << zeros }
    }
}

impl Float for F80 {
    fn unpack(self, _: &FloatContext) -> Operand {
        self.operand()
    }

    fn pack(number: Operand) -> F80 {
        let (exp, significand) = number.biased(16383);
        F80 { significand, sign_exp: u16::from(number.sign) << 15 | exp as u16 }
    }

    fn target(cx: &FloatContext) -> RoundingTarget {
        RoundingTarget { precision: cx.precision, exp_max: 16383 }
    }

    /// A quiet NaN before a signaling one, then the larger significand, then the positive one.
    fn choose_nan(a: Operand, b: Operand) -> Operand {
        let rank =
            |n: Operand| (n.class == FloatClass::Quiet, n.class == FloatClass::Signaling, n.sig, !n.sign);
        if rank(a) >= rank(b) { a } else { b }
    }
}

/// A result before rounding: `±sig · 2^(exp-127)` with bit 127 of `sig` set. If the true value has bits below
/// the last one, the last bit is set ("sticky").
#[derive(Clone, Copy, Debug)]
pub struct Unrounded {
    pub(super) sign: bool,
    pub(super) exp: i32,
    pub(super) sig: u128,
}

/// By how much the x87 changes the exponent of a result with an unmasked overflow or underflow.
const EXPONENT_ADJUST: i32 = 24576;

impl Unrounded {
    /// Moves the highest set bit of a non-zero `sig` to bit 127.
    pub(super) fn normalised(sign: bool, exp: i32, sig: u128) -> Unrounded {
        let zeros = sig.leading_zeros();
        Unrounded { sign, exp: exp - zeros as i32, sig: sig << zeros }
    }

    /// Rounds to `target` and sets flags.
    #[inline]
    pub(super) fn round(self, target: RoundingTarget, cx: &mut FloatContext) -> Operand {
        let p = target.precision;
        let rounded = round_at(self.sig, 128 - p, self.sign, cx.rounding);
        let carried = (rounded.kept >> p) as u32;
        let exp = self.exp + carried as i32;
        let number = |exp: i32, kept: u128| Operand {
            class: FloatClass::Normal,
            sign: self.sign,
            exp,
            sig: (kept << (64 - p)) as u64,
        };
        cx.rounded_up = rounded.up;
        if rounded.inexact {
            cx.flags |= PE;
        }
        if exp < 1 - target.exp_max {
            return self.round_tiny(target, cx, number(exp, rounded.kept >> carried));
        }
        if exp > target.exp_max {
            return self.overflow(target, cx, number(exp, rounded.kept >> carried));
        }
        number(exp, rounded.kept >> carried)
    }

    /// The result of an overflow; `unbounded` is the number rounded as if there were no largest exponent.
    #[cold]
    fn overflow(self, target: RoundingTarget, cx: &mut FloatContext, unbounded: Operand) -> Operand {
        cx.flags |= OE;
        if cx.masked & OE == 0 {
            let exp = unbounded.exp - EXPONENT_ADJUST;
            if exp <= target.exp_max {
                return Operand { exp, ..unbounded };
            }
            // FSCALE's massive overflow.
            cx.flags |= PE;
            cx.rounded_up = true;
            return Operand::infinity(self.sign);
        }
        cx.flags |= PE;
        cx.rounded_up = match cx.rounding {
            Rounding::Nearest => true,
            Rounding::Down => self.sign,
            Rounding::Up => !self.sign,
            Rounding::Zero => false,
        };
        if cx.rounded_up {
            return Operand::infinity(self.sign);
        }
        let sig = u64::MAX << (64 - target.precision);
        Operand { class: FloatClass::Normal, sign: self.sign, exp: target.exp_max, sig }
    }

    /// Rounds a tiny number; `unbounded` is the number rounded as if there were no smallest exponent.
    #[cold]
    fn round_tiny(self, target: RoundingTarget, cx: &mut FloatContext, unbounded: Operand) -> Operand {
        let exp_min = 1 - target.exp_max;
        if cx.masked & UE == 0 {
            cx.flags |= UE;
            let exp = unbounded.exp + EXPONENT_ADJUST;
            if exp >= exp_min {
                return Operand { exp, ..unbounded };
            }
            // FSCALE's massive underflow.
            cx.flags |= PE;
            cx.rounded_up = false;
            return Operand::zero(self.sign);
        } else if cx.ftz {
            cx.flags |= UE | PE;
            return Operand::zero(self.sign);
        }
        let drop = 128 - target.precision + (exp_min - self.exp) as u32;
        let rounded = round_at(self.sig, drop, self.sign, cx.rounding);
        cx.rounded_up = rounded.up;
        if rounded.inexact {
            cx.flags |= UE | PE;
        }
        if rounded.kept == 0 {
            return Operand::zero(self.sign);
        }
        let sig = (rounded.kept << (64 - target.precision)) as u64;
        Operand { class: FloatClass::Denormal, sign: self.sign, exp: exp_min, sig }
    }
}

/// A significand rounded to an integer.
pub(super) struct Rounded {
    pub(super) kept: u128,
    pub(super) inexact: bool,
    pub(super) up: bool,
}

/// Drops the low `drop` (at least one) bits of `sig`, rounding.
#[inline]
pub(super) fn round_at(sig: u128, drop: u32, sign: bool, mode: Rounding) -> Rounded {
    // `rest` is the dropped part with its highest bit at bit 127; beyond 128 bits only "some, less than half"
    // counts.
    let (kept, rest) = match drop {
        ..=127 => (sig >> drop, sig << (128 - drop)),
        128 => (0, sig),
        _ => (0, u128::from(sig != 0)),
    };
    let half = 1 << 127;
    let up = match mode {
        Rounding::Nearest => rest > half || rest == half && kept & 1 != 0,
        Rounding::Down => sign && rest != 0,
        Rounding::Up => !sign && rest != 0,
        Rounding::Zero => false,
    };
    Rounded { kept: kept + u128::from(up), inexact: rest != 0, up }
}

/// Notes a denormal operand.
#[inline]
pub(super) fn note_denormal(a: Operand, b: Operand, cx: &mut FloatContext) {
    if a.class == FloatClass::Denormal || b.class == FloatClass::Denormal {
        cx.flags |= DE;
    }
}
