//! Operations that exist only on the x87.

use super::convert::{convert, integer_part, note_inexact};
use super::format::{F80, Float, FloatClass, Operand, RoundingTarget, Unrounded, note_denormal};
use super::{FloatContext, IE, OE, PE, UE, ZE};

/// Loads a single or double into a register (FLD m32, FLD m64). An unmasked DE does not prevent the load.
pub fn load(a: Operand, cx: &mut FloatContext) -> F80 {
    if let Some(nan) = F80::nan_result(a, a, cx) {
        return nan;
    }
    note_denormal(a, a, cx);
    // Every single and double is a normal F80.
    F80::pack(a)
}

/// Stores a register as a single or double (FST m32, FST m64). With an unmasked overflow or underflow nothing
/// is stored, and PE is not reported.
pub fn store<R: Float>(a: F80, cx: &mut FloatContext) -> R {
    let value = convert(a.operand(), false, cx);
    if cx.flags & !cx.masked & (OE | UE) != 0 {
        cx.flags &= !PE;
    }
    value
}

/// The result of FPREM and FPREM1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remainder {
    /// The new ST(0).
    pub value: F80,
    /// The low three bits of the quotient (C0, C3, C1 from the highest), zero if incomplete; `None` for a
    /// NaN.
    pub quotient: Option<u8>,
    /// The reduction is partial (C2): run it again.
    pub incomplete: bool,
}

/// The remainder of `a / b`, with the quotient truncated (FPREM) or rounded to nearest (FPREM1).
pub fn remainder(a: F80, b: F80, nearest: bool, cx: &mut FloatContext) -> Remainder {
    let (a, b) = (a.operand(), b.operand());
    let nan = |value| Remainder { value, quotient: None, incomplete: false };
    let complete = |value| Remainder { value, quotient: Some(0), incomplete: false };
    if let Some(value) = F80::nan_result(a, b, cx) {
        return nan(value);
    }
    if a.class == FloatClass::Infinity || b.class == FloatClass::Zero {
        return nan(F80::invalid(cx));
    }
    note_denormal(a, b, cx);
    if a.class == FloatClass::Zero || b.class == FloatClass::Infinity {
        return complete(unchanged(a, cx));
    }
    let distance = a.exp - b.exp;
    if distance < -1 {
        return complete(F80::pack(a.unrounded().round(RoundingTarget::EXTENDED, cx)));
    }
    let incomplete = distance >= 64;
    let step = if incomplete { 32 + distance % 32 } else { distance };
    // Both as integers in units of 2^(unit-63).
    let (dividend, divisor, unit) = match step {
        -1 => (u128::from(a.sig), u128::from(b.sig) << 1, a.exp),
        _ => (u128::from(a.sig) << step, u128::from(b.sig), b.exp + distance - step),
    };
    let (mut quotient, mut rest, mut sign) = (dividend / divisor, dividend % divisor, a.sign);
    if nearest && !incomplete && (2 * rest > divisor || 2 * rest == divisor && quotient & 1 != 0) {
        quotient += 1;
        rest = divisor - rest;
        sign = !sign;
    }
    let value = match rest {
        0 => Operand::zero(a.sign),
        _ => Unrounded::normalised(sign, unit + 64, rest).round(RoundingTarget::EXTENDED, cx),
    };
    let quotient = if incomplete { 0 } else { quotient as u8 & 7 };
    Remainder { value: F80::pack(value), quotient: Some(quotient), incomplete }
}

/// An operand that is the result: a pseudo-denormal becomes normal, and a denormal does not count as an
/// underflow.
fn unchanged(a: Operand, cx: &FloatContext) -> F80 {
    match a.class {
        FloatClass::Denormal => F80::pack(
            a.unrounded().round(RoundingTarget::EXTENDED, &mut FloatContext { masked: 0x3f, ..*cx }),
        ),
        _ => F80::pack(a),
    }
}

/// `a · 2^trunc(b)` (FSCALE).
pub fn scale(a: F80, b: F80, cx: &mut FloatContext) -> F80 {
    let (a, b) = (a.operand(), b.operand());
    if let Some(nan) = F80::nan_result(a, b, cx) {
        return nan;
    }
    if b.class == FloatClass::Infinity {
        let impossible = if b.sign { FloatClass::Infinity } else { FloatClass::Zero };
        if a.class == impossible {
            return F80::invalid(cx);
        }
        note_denormal(a, b, cx);
        return F80::pack(if b.sign { Operand::zero(a.sign) } else { Operand::infinity(a.sign) });
    }
    note_denormal(a, b, cx);
    if matches!(a.class, FloatClass::Zero | FloatClass::Infinity) || b.class == FloatClass::Zero {
        return unchanged(a, cx);
    }
    // 2^17 moves every number far out of range.
    let by = match b.class {
        _ if b.exp < 0 => 0,
        _ if b.exp > 16 => 1 << 17,
        _ => (b.sig >> (63 - b.exp)) as i32,
    };
    let exp = a.exp + if b.sign { -by } else { by };
    F80::pack(Unrounded { exp, ..a.unrounded() }.round(RoundingTarget::EXTENDED, cx))
}

/// The exponent and the significand of `a`, in this order, as numbers (FXTRACT).
pub fn extract(a: F80, cx: &mut FloatContext) -> (F80, F80) {
    let a = a.operand();
    if let Some(nan) = F80::nan_result(a, a, cx) {
        return (nan, nan);
    }
    note_denormal(a, a, cx);
    match a.class {
        FloatClass::Zero => {
            cx.flags |= ZE;
            (F80::pack(Operand::infinity(true)), F80::pack(a))
        }
        FloatClass::Infinity => (F80::pack(Operand::infinity(false)), F80::pack(a)),
        _ => (
            F80::pack(Operand::from_i64(a.exp.into())),
            F80::pack(Operand { exp: 0, class: FloatClass::Normal, ..a }),
        ),
    }
}

/// The 80 bits of packed BCD for a number that does not fit.
const BCD_INDEFINITE: u128 = 0xffff_c000_0000_0000_0000;

/// Converts 80 bits of packed BCD to a number (FBLD). A digit above nine counts with its value.
pub fn from_bcd(bcd: u128) -> F80 {
    let digits = (0..18).rev().fold(0, |n, i| n * 10 + (bcd >> (4 * i) & 15) as i64);
    let number = Operand::from_i64(digits);
    F80::pack(Operand { sign: bcd >> 79 & 1 != 0, ..number })
}

/// Rounds `a` and converts it to 80 bits of packed BCD (FBSTP). More than 18 digits are an invalid operation.
pub fn to_bcd(a: F80, cx: &mut FloatContext) -> u128 {
    let a = a.operand();
    if a.class >= FloatClass::Infinity || a.exp > 63 {
        cx.flags |= IE;
        return BCD_INDEFINITE;
    }
    let part = integer_part(a, cx.rounding);
    if part.kept >= 10u128.pow(18) {
        cx.flags |= IE;
        return BCD_INDEFINITE;
    }
    note_inexact(&part, cx);
    let mut rest = part.kept as u64;
    let mut bcd = u128::from(a.sign) << 79;
    for i in 0..18 {
        bcd |= u128::from(rest % 10) << (4 * i);
        rest /= 10;
    }
    bcd
}
