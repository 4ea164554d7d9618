//! RCPSS and RSQRTSS by our definition: the true value at 12 significant bits, rounded to nearest even.

use super::format::{Class, Exact, F32, F64, Float, Operand, Target};
use super::{Context, Rounding, div, sqrt};

/// Denormals are zeros, everything is masked, nothing is reported.
const QUIET: Context = Context {
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
    // A single's reciprocal is a normal double. A quotient of singles that lies close to the middle between two
    // 12-bit numbers would need more bits than a single has to be exactly there, so rounding twice is harmless.
    narrow(div::<F64>(one, x, &mut { QUIET }))
}

/// An approximation of `1/√x`.
pub fn reciprocal_sqrt(x: F32) -> F32 {
    let x = x.unpack(&QUIET);
    let one = Operand::from_i64(1);
    if x.class == Class::Zero {
        return F32::pack(Operand::infinity(x.sign));
    }
    let root = sqrt::<F64>(x, &mut { QUIET }).unpack(&QUIET);
    narrow(div::<F64>(one, root, &mut { QUIET }))
}

fn narrow(x: F64) -> F32 {
    let x = x.unpack(&QUIET);
    if x.is_nan() || matches!(x.class, Class::Zero | Class::Infinity) {
        return F32::pack(if x.is_nan() { Operand { sig: x.sig | 1 << 62, ..x } } else { x });
    }
    let exact: Exact = x.exact();
    F32::pack(exact.round(Target { precision: 12, exp_max: 127 }, &mut { QUIET }))
}
