//! The x87's transcendental functions as defined for this CPU: the mathematical function with about 120
//! correct bits, rounded once.
//!
//! Each reduces the argument and sums a power series in `Wide` numbers. The values of these functions are
//! irrational except for a few arguments, which are handled first; all other results count as inexact.

use super::format::{F80, Float, FloatClass, Operand, RoundingTarget, Unrounded, note_denormal};
use super::wide::Wide;
use super::{FloatContext, ZE};

fn finish(value: Unrounded, cx: &mut FloatContext) -> F80 {
    F80::pack(value.round(RoundingTarget::EXTENDED, cx))
}

fn zero(sign: bool) -> F80 {
    F80::pack(Operand::zero(sign))
}

fn infinity(sign: bool) -> F80 {
    F80::pack(Operand::infinity(sign))
}

/// The constants that FLDL2T, FLDL2E, FLDPI, FLDLG2 and FLDLN2 load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Constant {
    /// log2 10.
    Log2Ten,
    /// log2 e.
    Log2E,
    /// π.
    Pi,
    /// log10 2.
    Log10Two,
    /// ln 2.
    LnTwo,
}

impl Constant {
    /// The constant, rounded in the current mode; no exception is reported.
    pub fn value(self, cx: &FloatContext) -> F80 {
        let exact = match self {
            Constant::Log2Ten => Wide::LOG2_10,
            Constant::Log2E => Wide::LOG2_E,
            Constant::Pi => Wide::PI,
            Constant::Log10Two => Wide::LOG10_2,
            Constant::LnTwo => Wide::LN_2,
        };
        finish(exact.result(false), &mut { *cx })
    }
}

/// `2^x - 1` for |x| ≤ 1 (F2XM1); any other x is returned unchanged.
pub fn f2xm1(x: F80, cx: &mut FloatContext) -> F80 {
    let a = x.operand();
    if let Some(nan) = F80::nan_result(a, a, cx) {
        return nan;
    }
    note_denormal(a, a, cx);
    let one = Operand::from_i64(1);
    if a.class == FloatClass::Infinity && a.sign {
        return F80::pack(Operand { sign: true, ..one });
    }
    if matches!(a.class, FloatClass::Zero | FloatClass::Infinity) || a.exp > 0 {
        return x;
    }
    if a.exp == 0 {
        return match (a.sig == one.sig, a.sign) {
            (true, false) => F80::pack(one),
            (true, true) => F80::pack(Operand { sign: true, exp: -1, ..one }),
            (false, _) => x,
        };
    }
    let t = Wide::from_operand(a).mul(Wide::LN_2);
    let (mut sum, mut term) = (t, t);
    for k in 2.. {
        term = term.mul(t).div_int(k);
        sum = sum.add(term);
        if term.is_negligible(sum) {
            break;
        }
    }
    finish(sum.result(false), cx)
}

/// `s + s³/3 + s⁵/5 …`, with alternating signs if `alternate`: artanh or arctan of a small `s`.
fn odd_series(s: Wide, alternate: bool) -> Wide {
    let square = s.mul(s);
    let square = if alternate { square.negate() } else { square };
    let (mut sum, mut power) = (s, s);
    for k in 1.. {
        power = power.mul(square);
        let term = power.div_int(2 * k + 1);
        sum = sum.add(term);
        if term.is_negligible(sum) {
            break;
        }
    }
    sum
}

/// `ln((1+s)/(1-s)) / ln 2`.
fn log2_of_ratio(s: Wide) -> Wide {
    odd_series(s, false).mul(Wide::LOG2_E).scale(1)
}

/// The binary logarithm of a positive number, and whether it is exact.
fn log2(x: Wide) -> (Wide, bool) {
    /// The first bits of √2.
    const ROOT_2: u128 = 0xb504_f333_f9de_6484 << 64;
    let up = i32::from(x.sig > ROOT_2);
    let mantissa = Wide { exp: -up, ..x };
    let minus_one = Wide::ONE.negate();
    let below = mantissa.add(minus_one);
    let whole = Wide::from_int(x.exp + up);
    if below.sig == 0 {
        return (whole, true);
    }
    (whole.add(log2_of_ratio(below.div(mantissa.add(Wide::ONE)))), false)
}

/// `y · log2(x)` (FYL2X).
pub fn fyl2x(y: F80, x: F80, cx: &mut FloatContext) -> F80 {
    let (y, x) = (y.operand(), x.operand());
    if let Some(nan) = F80::nan_result(y, x, cx) {
        return nan;
    }
    if x.sign && x.class != FloatClass::Zero {
        return F80::invalid(cx);
    }
    match (x.class, y.class) {
        (FloatClass::Zero | FloatClass::Infinity, FloatClass::Zero) => return F80::invalid(cx),
        (FloatClass::Zero, FloatClass::Infinity) => return infinity(!y.sign),
        (FloatClass::Zero, _) => {
            cx.flags |= ZE;
            return infinity(!y.sign);
        }
        (FloatClass::Infinity, _) => {
            note_denormal(y, y, cx);
            return infinity(y.sign);
        }
        _ => {}
    }
    let (log, exact) = log2(Wide::from_operand(x));
    if log.sig == 0 && y.class == FloatClass::Infinity {
        return F80::invalid(cx);
    }
    note_denormal(y, x, cx);
    times_log(y, log, exact, cx)
}

/// `y · log2(x + 1)` (FYL2XP1). An `x` of -1 or less is an invalid operation.
pub fn fyl2xp1(y: F80, x: F80, cx: &mut FloatContext) -> F80 {
    let (y, x) = (y.operand(), x.operand());
    if let Some(nan) = F80::nan_result(y, x, cx) {
        return nan;
    }
    match (x.class, y.class) {
        (FloatClass::Zero, FloatClass::Infinity) | (FloatClass::Infinity, FloatClass::Zero) => {
            return F80::invalid(cx);
        }
        (FloatClass::Infinity, _) if x.sign => return F80::invalid(cx),
        (FloatClass::Infinity, _) => {
            note_denormal(y, y, cx);
            return infinity(y.sign);
        }
        (FloatClass::Zero, _) => {
            note_denormal(y, y, cx);
            return zero(x.sign ^ y.sign);
        }
        _ => {}
    }
    let wide = Wide::from_operand(x);
    if x.sign && x.exp >= 0 {
        return F80::invalid(cx);
    }
    note_denormal(y, x, cx);
    // Adding one would cost a small x its last bits.
    let (log, exact) = match x.exp {
        ..-2 => (log2_of_ratio(wide.div(wide.add(Wide::from_int(2)))), false),
        _ => log2(wide.add(Wide::ONE)),
    };
    times_log(y, log, exact, cx)
}

fn times_log(y: Operand, log: Wide, exact: bool, cx: &mut FloatContext) -> F80 {
    match y.class {
        FloatClass::Infinity => infinity(y.sign ^ log.sign),
        _ if y.class == FloatClass::Zero || log.sig == 0 => zero(y.sign ^ log.sign),
        _ => finish(Wide::from_operand(y).mul(log).result(exact), cx),
    }
}

/// `arctan(i/8)` for i from 1.
const ATAN_EIGHTHS: [Wide; 8] = [
    Wide::new(-4, 0xfead_d4d5_617b_6e32_c897_989f_3e88_8ef7),
    Wide::new(-3, 0xfadb_afc9_6406_eb15_6dc7_9ef5_f7a2_17e5),
    Wide::new(-2, 0xb7b0_ca0f_26f7_8473_8aa3_2122_dcfe_4483),
    Wide::new(-2, 0xed63_382b_0dda_7b45_6fe4_45ec_bc3a_8d03),
    Wide::new(-1, 0x8f00_5d5e_f7f5_9f9b_5c83_5e16_65c4_3747),
    Wide::new(-1, 0xa4bc_7d19_34f7_0924_19a8_7f2a_457d_ac9e),
    Wide::new(-1, 0xb805_3e2b_c231_9e73_cb2d_a552_10a4_443d),
    Wide::new(-1, 0xc90f_daa2_2168_c234_c4c6_628b_80dc_1cd1),
];

/// The arctangent of a positive number that is at most one.
fn atan(r: Wide) -> Wide {
    // Subtract the angle whose tangent is the nearest i/8.
    let nearest = if r.exp < -4 { 0 } else { ((r.sig >> (123 - r.exp)) as usize).div_ceil(2) };
    if nearest == 0 {
        return odd_series(r, true);
    }
    let c = Wide::from_int(nearest as i32).scale(-3);
    let t = r.add(c.negate()).div(Wide::ONE.add(r.mul(c)));
    ATAN_EIGHTHS[nearest - 1].add(odd_series(t, true))
}

/// The angle of the point (x, y) (FPATAN).
pub fn fpatan(y: F80, x: F80, cx: &mut FloatContext) -> F80 {
    let (y, x) = (y.operand(), x.operand());
    if let Some(nan) = F80::nan_result(y, x, cx) {
        return nan;
    }
    note_denormal(y, x, cx);
    let at_axis_x =
        y.class == FloatClass::Zero || x.class == FloatClass::Infinity && y.class != FloatClass::Infinity;
    let angle = if at_axis_x {
        if !x.sign {
            return zero(y.sign);
        }
        Wide::PI
    } else if y.class == FloatClass::Infinity && x.class == FloatClass::Infinity {
        let eighth = Wide::PI.scale(-2);
        if x.sign { Wide::PI.add(eighth.negate()) } else { eighth }
    } else if y.class == FloatClass::Infinity || x.class == FloatClass::Zero {
        Wide::PI.scale(-1)
    } else {
        angle_of(Wide::from_operand(y), Wide::from_operand(x))
    };
    finish(Wide { sign: y.sign, ..angle }.result(false), cx)
}

/// The angle of a point in the upper half, off the axes; the sign of `y` is ignored.
fn angle_of(y: Wide, x: Wide) -> Wide {
    let (y, left, x) = (Wide { sign: false, ..y }, x.sign, Wide { sign: false, ..x });
    let angle = if (y.exp, y.sig) > (x.exp, x.sig) {
        Wide::PI.scale(-1).add(atan(x.div(y)).negate())
    } else {
        atan(y.div(x))
    };
    if left { Wide::PI.add(angle.negate()) } else { angle }
}

/// 2/π · 2^320, the lowest word first.
const TWO_OVER_PI: [u64; 5] = [
    0xb724_6e3a_424d_d2e0,
    0xfe51_63ab_debb_c561,
    0xdb62_9599_3c43_9041,
    0xfc27_57d1_f534_ddc0,
    0xa2f9_836e_4e44_1529,
];

/// Writes |x| < 2^63 as `quadrant · π/2 + angle` with |angle| ≤ π/4; the sign of x is left out.
fn reduce(x: Operand) -> (u32, Wide) {
    let magnitude = Wide { sign: false, ..Wide::from_operand(x) };
    if x.exp < -1 {
        return (0, magnitude);
    }
    // |x| · 2/π, shifted so that the whole quarters are the highest word. The fraction keeps 320 bits, of which the
    // closest that 64 bits come to a multiple of π/2 below 2^63 leaves far more than 128.
    let mut words = [0; 6];
    let mut carry = 0;
    for (word, factor) in words.iter_mut().zip(TWO_OVER_PI) {
        carry += u128::from(x.sig) * u128::from(factor);
        *word = carry as u64;
        carry >>= 64;
    }
    words[5] = carry as u64;
    let shift = 63 - x.exp;
    let mut high = 0;
    for word in words.iter_mut().rev() {
        let both = u128::from(high) << 64 | u128::from(*word);
        high = *word;
        *word = (both >> shift) as u64;
    }
    let [fraction @ .., mut quadrant] = words;
    let past_half = fraction[4] >> 63 != 0;
    let fraction = fraction.map(|word| if past_half { !word } else { word });
    quadrant += u64::from(past_half);
    let quarters = Wide { sign: past_half, ..leading_bits(fraction) };
    ((quadrant & 3) as u32, quarters.mul(Wide::PI.scale(-1)))
}

/// The first 128 bits of a fraction in words.
fn leading_bits(fraction: [u64; 5]) -> Wide {
    let zero_words = fraction.iter().rev().take_while(|word| **word == 0).count();
    let word = |i: usize| u128::from(fraction.iter().rev().nth(zero_words + i).copied().unwrap_or(0));
    let high = word(0) << 64 | word(1);
    let shift = high.leading_zeros();
    let sig = if shift == 0 { high } else { high << shift | word(2) >> (64 - shift) };
    Wide::new(-1 - 64 * zero_words as i32 - shift as i32, sig)
}

/// `first · (1 - r²/((n+1)(n+2)) + r⁴/((n+1)…(n+4)) …)`.
fn circular_series(first: Wide, r: Wide, n: u32) -> Wide {
    let square = r.mul(r).negate();
    let (mut sum, mut term) = (first, first);
    for k in (n + 1..).step_by(2) {
        term = term.mul(square).div_int(k * (k + 1));
        sum = sum.add(term);
        if term.is_negligible(sum) {
            break;
        }
    }
    sum
}

/// The sine of `quadrant · π/2 + r`.
fn sine(quadrant: u32, r: Wide) -> Wide {
    let value = if quadrant & 1 == 0 { circular_series(r, r, 1) } else { circular_series(Wide::ONE, r, 0) };
    if quadrant & 2 != 0 { value.negate() } else { value }
}

/// Handles special operands of FSIN, FCOS and FPTAN: `None` for |x| ≥ 2^63, `Some(Some(result))` for a
/// special result, `Some(None)` if the function has to be computed.
fn circular_special(x: Operand, at_zero: Operand, cx: &mut FloatContext) -> Option<Option<F80>> {
    if let Some(nan) = F80::nan_result(x, x, cx) {
        return Some(Some(nan));
    }
    note_denormal(x, x, cx);
    match x.class {
        FloatClass::Infinity => Some(Some(F80::invalid(cx))),
        FloatClass::Zero => Some(Some(F80::pack(at_zero))),
        _ if x.exp >= 63 => None,
        _ => Some(None),
    }
}

/// The sine of x (FSIN), or `None` for |x| ≥ 2^63.
pub fn fsin(x: F80, cx: &mut FloatContext) -> Option<F80> {
    let x = x.operand();
    if let Some(special) = circular_special(x, x, cx)? {
        return Some(special);
    }
    let (quadrant, r) = reduce(x);
    let value = sine(quadrant, r);
    Some(finish(Wide { sign: value.sign ^ x.sign, ..value }.result(false), cx))
}

/// The cosine of x (FCOS), or `None` for |x| ≥ 2^63.
pub fn fcos(x: F80, cx: &mut FloatContext) -> Option<F80> {
    let x = x.operand();
    if let Some(special) = circular_special(x, Operand::from_i64(1), cx)? {
        return Some(special);
    }
    let (quadrant, r) = reduce(x);
    Some(finish(sine(quadrant + 1, r).result(false), cx))
}

/// The tangent of x (FPTAN), or `None` for |x| ≥ 2^63.
pub fn fptan(x: F80, cx: &mut FloatContext) -> Option<F80> {
    let x = x.operand();
    if let Some(special) = circular_special(x, x, cx)? {
        return Some(special);
    }
    let (quadrant, r) = reduce(x);
    let value = sine(quadrant, r).div(sine(quadrant + 1, r));
    Some(finish(Wide { sign: value.sign ^ x.sign, ..value }.result(false), cx))
}
