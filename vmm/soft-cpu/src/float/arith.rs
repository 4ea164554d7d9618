//! Addition, subtraction, multiplication, division, square root.

use super::format::{Float, FloatClass, Operand, Unrounded, note_denormal};
use super::{FloatContext, Rounding, ZE};

/// `a + b`.
#[inline]
pub fn add<R: Float>(a: Operand, b: Operand, cx: &mut FloatContext) -> R {
    if let Some(nan) = R::nan_result(a, b, cx) {
        return nan;
    }
    sum(a, b, cx)
}

/// `a - b`.
#[inline]
pub fn sub<R: Float>(a: Operand, b: Operand, cx: &mut FloatContext) -> R {
    if let Some(nan) = R::nan_result(a, b, cx) {
        return nan;
    }
    sum(a, Operand { sign: !b.sign, ..b }, cx)
}

/// The sum of two operands that are not NaNs.
#[inline]
fn sum<R: Float>(a: Operand, b: Operand, cx: &mut FloatContext) -> R {
    if a.class == FloatClass::Infinity || b.class == FloatClass::Infinity {
        if a.class == b.class && a.sign != b.sign {
            return R::invalid(cx);
        }
        note_denormal(a, b, cx);
        return R::pack(if a.class == FloatClass::Infinity { a } else { b });
    }
    note_denormal(a, b, cx);
    let exact = match (a.class, b.class) {
        (FloatClass::Zero, FloatClass::Zero) if a.sign == b.sign => return R::pack(a),
        (FloatClass::Zero, FloatClass::Zero) => return R::pack(Operand::zero(cx.rounding == Rounding::Down)),
        (FloatClass::Zero, _) => b.unrounded(),
        (_, FloatClass::Zero) => a.unrounded(),
        _ => match add_magnitudes(a, b) {
            Some(exact) => exact,
            None => return R::pack(Operand::zero(cx.rounding == Rounding::Down)),
        },
    };
    R::pack(exact.round(R::target(cx), cx))
}

/// The sum of two numbers other than zero, or `None` if they cancel.
#[inline]
fn add_magnitudes(a: Operand, b: Operand) -> Option<Unrounded> {
    let (large, small) = if (a.exp, a.sig) >= (b.exp, b.sig) { (a, b) } else { (b, a) };
    // Bit 126 is the top, so that a carry has room.
    let high = u128::from(large.sig) << 63;
    let low = shift_right_sticky(u128::from(small.sig) << 63, (large.exp - small.exp) as u32);
    let sum = if a.sign == b.sign { high + low } else { high - low };
    (sum != 0).then(|| Unrounded::normalised(large.sign, large.exp + 1, sum))
}

/// `sig >> by`, with the last bit set if a set bit was lost.
#[inline]
pub(super) fn shift_right_sticky(sig: u128, by: u32) -> u128 {
    match by {
        0 => sig,
        1..=127 => sig >> by | u128::from(sig << (128 - by) != 0),
        _ => u128::from(sig != 0),
    }
}

/// `a · b`.
#[inline]
pub fn mul<R: Float>(a: Operand, b: Operand, cx: &mut FloatContext) -> R {
    if let Some(nan) = R::nan_result(a, b, cx) {
        return nan;
    }
    let sign = a.sign ^ b.sign;
    let (low, high) = (a.class.min(b.class), a.class.max(b.class));
    if low == FloatClass::Zero && high == FloatClass::Infinity {
        return R::invalid(cx);
    }
    note_denormal(a, b, cx);
    if high == FloatClass::Infinity {
        return R::pack(Operand::infinity(sign));
    }
    if low == FloatClass::Zero {
        return R::pack(Operand::zero(sign));
    }
    let product = u128::from(a.sig) * u128::from(b.sig);
    R::pack(Unrounded::normalised(sign, a.exp + b.exp + 1, product).round(R::target(cx), cx))
}

/// `a / b`.
#[inline]
pub fn div<R: Float>(a: Operand, b: Operand, cx: &mut FloatContext) -> R {
    if let Some(nan) = R::nan_result(a, b, cx) {
        return nan;
    }
    let sign = a.sign ^ b.sign;
    match (a.class, b.class) {
        (FloatClass::Zero, FloatClass::Zero) | (FloatClass::Infinity, FloatClass::Infinity) => {
            return R::invalid(cx);
        }
        (FloatClass::Infinity, FloatClass::Zero) => return R::pack(Operand::infinity(sign)),
        (_, FloatClass::Zero) => {
            cx.flags |= ZE;
            return R::pack(Operand::infinity(sign));
        }
        _ => note_denormal(a, b, cx),
    }
    match (a.class, b.class) {
        (FloatClass::Infinity, _) => R::pack(Operand::infinity(sign)),
        (FloatClass::Zero, _) | (_, FloatClass::Infinity) => R::pack(Operand::zero(sign)),
        _ => R::pack(quotient(a, b, sign).round(R::target(cx), cx)),
    }
}

/// The quotient of two numbers other than zero.
#[inline]
fn quotient(a: Operand, b: Operand, sign: bool) -> Unrounded {
    let divisor = u128::from(b.sig);
    let dividend = u128::from(a.sig) << 63;
    let (high, rest) = (dividend / divisor, dividend % divisor);
    // `high` has at least 63 bits; the next two bits and whether anything follows complete it.
    let rest = rest << 2;
    let (low, rest) = (rest / divisor, rest % divisor);
    let sig = high << 64 | low << 62 | u128::from(rest != 0);
    Unrounded::normalised(sign, a.exp - b.exp, sig)
}

/// The square root of `a`.
pub fn sqrt<R: Float>(a: Operand, cx: &mut FloatContext) -> R {
    if let Some(nan) = R::nan_result(a, a, cx) {
        return nan;
    }
    if a.class == FloatClass::Zero {
        return R::pack(a);
    }
    if a.sign {
        return R::invalid(cx);
    }
    if a.class == FloatClass::Infinity {
        return R::pack(a);
    }
    note_denormal(a, a, cx);
    // a = n · 2^(2k) with a 127- or 128-bit n, so its root has 64 bits.
    let n = u128::from(a.sig) << (63 + (a.exp & 1));
    let root = n.isqrt();
    let rest = n - root * root;
    let sig = root << 64 | u128::from(rest > root) << 63 | u128::from(rest != 0);
    R::pack(Unrounded::normalised(false, a.exp >> 1, sig).round(R::target(cx), cx))
}
