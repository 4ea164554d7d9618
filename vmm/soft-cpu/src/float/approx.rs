//! RCPSS and RSQRTSS as defined for this CPU: the true value rounded to nearest even at 12 significant bits.

use super::format::{F32, F64, Float, FloatClass, Operand, RoundingTarget, Unrounded};
use super::{FloatContext, Rounding, div, sqrt};

/// Denormals are zeros, all exceptions are masked, and none is reported.
const QUIET: FloatContext = FloatContext {
    rounding: Rounding::Nearest,
    precision: 64,
    masked: 0x3f,
    daz: true,
    ftz: true,
    flags: 0,
    rounded_up: false,
};

/// An approximation of `1/x`.
pub fn reciprocal(x: F32) -> F32 {
    let x = x.unpack(&QUIET);
    let one = Operand::from_i64(1);
    // The reciprocal of a single is a normal double. Rounding twice is harmless: the reciprocal is never so
    // close to the middle between two 12-bit numbers that the first rounding moves it there.
    narrow(div::<F64>(one, x, &mut { QUIET }))
}

/// An approximation of `1/√x`.
pub fn reciprocal_sqrt(x: F32) -> F32 {
    let x = x.unpack(&QUIET);
    let one = Operand::from_i64(1);
    if x.class == FloatClass::Zero {
        return F32::pack(Operand::infinity(x.sign));
    }
    let root = sqrt::<F64>(x, &mut { QUIET }).unpack(&QUIET);
    narrow(div::<F64>(one, root, &mut { QUIET }))
}

fn narrow(x: F64) -> F32 {
    let x = x.unpack(&QUIET);
    if x.is_nan() || matches!(x.class, FloatClass::Zero | FloatClass::Infinity) {
        return F32::pack(if x.is_nan() { Operand { sig: x.sig | 1 << 62, ..x } } else { x });
    }
    let exact: Unrounded = x.unrounded();
    F32::pack(exact.round(RoundingTarget { precision: 12, exp_max: 127 }, &mut { QUIET }))
}
