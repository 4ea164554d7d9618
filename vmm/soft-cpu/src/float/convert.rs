//! Conversions between formats, and to and from integers.

use super::format::{
    Float, FloatClass, Operand, Rounded, RoundingTarget, Unrounded, note_denormal, round_at,
};
use super::{FloatContext, IE, PE, Rounding};

/// Converts a number to another format (CVTSS2SD, CVTSD2SS, FST). `notes_denormal` is false for the x87's
/// stores, which do not raise DE.
pub fn convert<R: Float>(a: Operand, notes_denormal: bool, cx: &mut FloatContext) -> R {
    if let Some(nan) = R::nan_result(a, a, cx) {
        return nan;
    }
    if matches!(a.class, FloatClass::Zero | FloatClass::Infinity) {
        return R::pack(a);
    }
    if notes_denormal {
        note_denormal(a, a, cx);
    }
    R::pack(a.unrounded().round(R::target(cx), cx))
}

/// Converts an integer (CVTSI2SS, FILD).
pub fn from_int<R: Float>(n: i64, cx: &mut FloatContext) -> R {
    let n = Operand::from_i64(n);
    if n.class == FloatClass::Zero { R::pack(n) } else { R::pack(n.unrounded().round(R::target(cx), cx)) }
}

/// Rounds a finite number below 2^64 to an integer.
pub(super) fn integer_part(a: Operand, mode: Rounding) -> Rounded {
    if a.class == FloatClass::Zero {
        return Rounded { kept: 0, inexact: false, up: false };
    }
    round_at(u128::from(a.sig) << 64, (127 - a.exp.max(-2)) as u32, a.sign, mode)
}

/// Converts to a signed integer of `bits` bits, sign-extended (CVTSS2SI, FIST). A number that does not fit is
/// an invalid operation, whose result is the smallest integer.
pub fn to_int(a: Operand, bits: u32, rounding: Rounding, cx: &mut FloatContext) -> i64 {
    let indefinite = i64::MIN >> (64 - bits);
    if a.class >= FloatClass::Infinity || a.class != FloatClass::Zero && a.exp > 63 {
        cx.flags |= IE;
        return indefinite;
    }
    let part = integer_part(a, rounding);
    let limit = (1u128 << (bits - 1)) - u128::from(!a.sign);
    if part.kept > limit {
        cx.flags |= IE;
        return indefinite;
    }
    note_inexact(&part, cx);
    let magnitude = part.kept as i64;
    if a.sign { magnitude.wrapping_neg() } else { magnitude }
}

/// Notes how a number was rounded.
pub(super) fn note_inexact(part: &Rounded, cx: &mut FloatContext) {
    cx.rounded_up = part.up;
    if part.inexact {
        cx.flags |= PE;
    }
}

/// Rounds to an integral number (ROUNDSS, FRNDINT). `notes_denormal` is true for FRNDINT only.
pub fn round_to_integral<R: Float>(
    a: Operand,
    rounding: Rounding,
    notes_denormal: bool,
    cx: &mut FloatContext,
) -> R {
    if let Some(nan) = R::nan_result(a, a, cx) {
        return nan;
    }
    if notes_denormal {
        note_denormal(a, a, cx);
    }
    if matches!(a.class, FloatClass::Zero | FloatClass::Infinity) || a.exp >= 63 {
        return R::pack(a);
    }
    let part = integer_part(a, rounding);
    note_inexact(&part, cx);
    if part.kept == 0 {
        return R::pack(Operand::zero(a.sign));
    }
    // At most 2^63, so exact in the format that it came from.
    R::pack(Unrounded::normalised(a.sign, 127, part.kept).round(RoundingTarget::EXTENDED, &mut { *cx }))
}
