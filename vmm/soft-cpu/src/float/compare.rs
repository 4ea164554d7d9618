//! Comparison, minimum and maximum.

use std::cmp::Ordering;

use super::format::{Float, FloatClass, Operand, note_denormal};
use super::{FloatContext, IE};

/// Compares two operands; `None` is unordered. With `quiet` a quiet NaN is not an invalid operation (UCOMISS,
/// FUCOM).
pub fn compare(a: Operand, b: Operand, quiet: bool, cx: &mut FloatContext) -> Option<Ordering> {
    if a.is_nan() || b.is_nan() {
        if !quiet || a.class.max(b.class) > FloatClass::Quiet {
            cx.flags |= IE;
        }
        return None;
    }
    note_denormal(a, b, cx);
    Some(order(a, b))
}

/// The order of two operands that are not NaNs.
fn order(a: Operand, b: Operand) -> Ordering {
    // Zeros are equal whatever their signs are; otherwise the order is by sign, then class, then magnitude.
    let rank = |n: Operand| {
        let magnitude = match n.class {
            FloatClass::Zero => (0, 0, 0),
            FloatClass::Infinity => (2, 0, 0),
            _ => (1, n.exp, n.sig),
        };
        (n.sign && n.class != FloatClass::Zero, magnitude)
    };
    match (rank(a), rank(b)) {
        ((false, a), (false, b)) => a.cmp(&b),
        ((true, a), (true, b)) => b.cmp(&a),
        ((a, _), (b, _)) => b.cmp(&a),
    }
}

/// MINSS: `b` if the operands are equal or either is a NaN.
pub fn min<F: Float>(a: F, b: F, cx: &mut FloatContext) -> F {
    select(a, b, Ordering::Less, cx)
}

/// MAXSS: `b` if the operands are equal or either is a NaN.
pub fn max<F: Float>(a: F, b: F, cx: &mut FloatContext) -> F {
    select(a, b, Ordering::Greater, cx)
}

fn select<F: Float>(a: F, b: F, wanted: Ordering, cx: &mut FloatContext) -> F {
    let (x, y) = (a.unpack(cx), b.unpack(cx));
    let (value, number) = if compare(x, y, false, cx) == Some(wanted) { (a, x) } else { (b, y) };
    // With DAZ a denormal that is selected has become a zero.
    if number.class == FloatClass::Zero { F::pack(number) } else { value }
}

/// A predicate of CMPSS, CMPPS, CMPSD or CMPPD, encoded as in their immediate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Predicate(pub u8);

impl Predicate {
    /// Whether the predicate (the low three bits) holds for `a` and `b`.
    pub fn holds(self, a: Operand, b: Operand, cx: &mut FloatContext) -> bool {
        // For EQ and UNORD only signaling NaNs are invalid operations, for LT and LE all NaNs.
        let quiet = matches!(self.0 & 3, 0 | 3);
        let order = compare(a, b, quiet, cx);
        let plain = match self.0 & 3 {
            0 => order == Some(Ordering::Equal),
            1 => order == Some(Ordering::Less),
            2 => matches!(order, Some(Ordering::Less | Ordering::Equal)),
            _ => order.is_none(),
        };
        plain != (self.0 & 4 != 0)
    }
}
