//! Operations that only the x87 has.

use super::convert::{convert, integer_part, note_inexact};
use super::format::{Class, Exact, F80, Float, Operand, Target, note_denormal};
use super::{Context, IE, OE, PE, UE, ZE};

/// Loads a single or double into a register (FLD m32, FLD m64). An unmasked DE does not keep it from being loaded.
pub fn load(a: Operand, cx: &mut Context) -> F80 {
    if let Some(nan) = F80::nan_result(a, a, cx) {
        return nan;
    }
    note_denormal(a, a, cx);
    // Every single and double is a normal F80.
    F80::pack(a)
}

/// Stores a register as a single or double (FST m32, FST m64). With an unmasked overflow or underflow there is no
/// result to store, nor a word about its exactness.
pub fn store<R: Float>(a: F80, cx: &mut Context) -> R {
    let value = convert(a.operand(), false, cx);
    if cx.flags & !cx.masked & (OE | UE) != 0 {
        cx.flags &= !PE;
    }
    value
}

/// What FPREM and FPREM1 leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remainder {
    /// The new ST(0).
    pub value: F80,
    /// The low three bits of the quotient (C0, C3, C1 from the highest), zero if incomplete; nothing for a NaN.
    pub quotient: Option<u8>,
    /// The reduction is partial (C2): run it again.
    pub incomplete: bool,
}

/// The remainder of `a / b`, the quotient being truncated (FPREM) or rounded to nearest (FPREM1).
pub fn remainder(a: F80, b: F80, nearest: bool, cx: &mut Context) -> Remainder {
    let (a, b) = (a.operand(), b.operand());
    let nan = |value| Remainder { value, quotient: None, incomplete: false };
    let complete = |value| Remainder { value, quotient: Some(0), incomplete: false };
    if let Some(value) = F80::nan_result(a, b, cx) {
        return nan(value);
    }
    if a.class == Class::Infinity || b.class == Class::Zero {
        return nan(F80::invalid(cx));
    }
    note_denormal(a, b, cx);
    if a.class == Class::Zero || b.class == Class::Infinity {
        return complete(unchanged(a, cx));
    }
    let distance = a.exp - b.exp;
    if distance < -1 {
        return complete(F80::pack(a.exact().round(Target::EXTENDED, cx)));
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
        _ => Exact::normalised(sign, unit + 64, rest).round(Target::EXTENDED, cx),
    };
    let quotient = if incomplete { 0 } else { quotient as u8 & 7 };
    Remainder { value: F80::pack(value), quotient: Some(quotient), incomplete }
}

/// A number that an operation hands through: a pseudo-denormal becomes normal, and a denormal is no underflow.
fn unchanged(a: Operand, cx: &Context) -> F80 {
    match a.class {
        Class::Denormal => F80::pack(a.exact().round(Target::EXTENDED, &mut Context { masked: 0x3f, ..*cx })),
        _ => F80::pack(a),
    }
}

/// `a · 2^trunc(b)` (FSCALE).
pub fn scale(a: F80, b: F80, cx: &mut Context) -> F80 {
    let (a, b) = (a.operand(), b.operand());
    if let Some(nan) = F80::nan_result(a, b, cx) {
        return nan;
    }
    if b.class == Class::Infinity {
        let impossible = if b.sign { Class::Infinity } else { Class::Zero };
        if a.class == impossible {
            return F80::invalid(cx);
        }
        note_denormal(a, b, cx);
        return F80::pack(if b.sign { Operand::zero(a.sign) } else { Operand::infinity(a.sign) });
    }
    note_denormal(a, b, cx);
    if matches!(a.class, Class::Zero | Class::Infinity) || b.class == Class::Zero {
        return unchanged(a, cx);
    }
    // 2^17 moves every number far beyond either end.
    let by = match b.class {
        _ if b.exp < 0 => 0,
        _ if b.exp > 16 => 1 << 17,
        _ => (b.sig >> (63 - b.exp)) as i32,
    };
    let exp = a.exp + if b.sign { -by } else { by };
    F80::pack(Exact { exp, ..a.exact() }.round(Target::EXTENDED, cx))
}

/// The exponent and the significand of `a`, in this order, as numbers (FXTRACT).
pub fn extract(a: F80, cx: &mut Context) -> (F80, F80) {
    let a = a.operand();
    if let Some(nan) = F80::nan_result(a, a, cx) {
        return (nan, nan);
    }
    note_denormal(a, a, cx);
    match a.class {
        Class::Zero => {
            cx.flags |= ZE;
            (F80::pack(Operand::infinity(true)), F80::pack(a))
        }
        Class::Infinity => (F80::pack(Operand::infinity(false)), F80::pack(a)),
        _ => (
            F80::pack(Operand::from_i64(a.exp.into())),
            F80::pack(Operand { exp: 0, class: Class::Normal, ..a }),
        ),
    }
}

/// The 80 bits of packed BCD for "does not fit".
const BCD_INDEFINITE: u128 = 0xffff_c000_0000_0000_0000;

/// The number that 80 bits of packed BCD stand for (FBLD). A digit above nine counts for its value.
pub fn from_bcd(bcd: u128) -> F80 {
    let digits = (0..18).rev().fold(0, |n, i| n * 10 + (bcd >> (4 * i) & 15) as i64);
    let number = Operand::from_i64(digits);
    F80::pack(Operand { sign: bcd >> 79 & 1 != 0, ..number })
}

/// The 80 bits of packed BCD of `a`, rounded (FBSTP). What has more than 18 digits is an invalid operation.
pub fn to_bcd(a: F80, cx: &mut Context) -> u128 {
    let a = a.operand();
    if a.class >= Class::Infinity || a.exp > 63 {
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
