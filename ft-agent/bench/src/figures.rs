//! Numbers and ratios as the tables show them.

use crate::stats::Median;

/// A ratio with its interval.
pub fn interval(ratio: Median) -> String {
    format!("{:.3} ({:.3}–{:.3})", ratio.median, ratio.low, ratio.high)
}

/// Formats a number with three significant digits.
pub fn number(value: f64) -> String {
    match value.abs() {
        _ if value.is_nan() => "–".into(),
        a if a >= 100.0 => format!("{value:.0}"),
        a if a >= 10.0 => format!("{value:.1}"),
        a if a >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_significant_digits() {
        let numbers = [1234.5, 12.34, 1.234, 0.0123, f64::NAN].map(number);
        assert_eq!(numbers, ["1234", "12.3", "1.23", "0.012", "–"]);
    }
}
