//! Comparison, minimum and maximum.

use std::cmp::Ordering;

use super::format::{Class, Float, Operand, note_denormal};
use super::{Context, IE};

/// Compares two operands; `None` is unordered. `quiet` is the kind of comparison that does not object to a quiet NaN
/// (UCOMISS, FUCOM).
pub fn compare(a: Operand, b: Operand, quiet: bool, cx: &mut Context) -> Option<Ordering> {
    if a.is_nan() || b.is_nan() {
        if !quiet || a.class.max(b.class) > Class::Quiet {
            cx.flags |= IE;
        }
        return None;
    }
    note_denormal(a, b, cx);
    Some(order(a, b))
}

/// The order of two operands that are not NaNs.
fn order(a: Operand, b: Operand) -> Ordering {
    // Zeros are equal whatever their signs; otherwise sign, then class, then magnitude decide.
    let rank = |n: Operand| {
        let magnitude = match n.class {
            Class::Zero => (0, 0, 0),
            Class::Infinity => (2, 0, 0),
            _ => (1, n.exp, n.sig),
        };
        (n.sign && n.class != Class::Zero, magnitude)
    };
    match (rank(a), rank(b)) {
        ((false, a), (false, b)) => a.cmp(&b),
        ((true, a), (true, b)) => b.cmp(&a),
        ((a, _), (b, _)) => b.cmp(&a),
    }
}

/// MINSS: `b` if the operands are equal or either is a NaN.
pub fn min<F: Float>(a: F, b: F, cx: &mut Context) -> F {
    select(a, b, Ordering::Less, cx)
}

/// MAXSS: `b` if the operands are equal or either is a NaN.
pub fn max<F: Float>(a: F, b: F, cx: &mut Context) -> F {
    select(a, b, Ordering::Greater, cx)
}

fn select<F: Float>(a: F, b: F, wanted: Ordering, cx: &mut Context) -> F {
    let (x, y) = (a.unpack(cx), b.unpack(cx));
    let (value, number) = if compare(x, y, false, cx) == Some(wanted) { (a, x) } else { (b, y) };
    // Under DAZ a denormal that is chosen has become a zero.
    if number.class == Class::Zero { F::pack(number) } else { value }
}

/// The predicates of CMPSS and its kin, encoded as in their immediate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Predicate(pub u8);

impl Predicate {
    /// Whether the predicate (the low three bits) holds for `a` and `b`.
    pub fn holds(self, a: Operand, b: Operand, cx: &mut Context) -> bool {
        // EQ and UNORD object to signaling NaNs only, LT and LE to every NaN.
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
