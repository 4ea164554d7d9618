//! Medians and their intervals, and distributions that can be added up.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A median with its distribution-free 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Median {
    /// The median.
    pub median: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// Of these values; `None` when there are none. Under six values no order statistics make a 95 % interval: their range
/// stands for it.
pub fn median(values: impl IntoIterator<Item = f64>) -> Option<Median> {
    let mut values: Vec<f64> = values.into_iter().filter(|v| v.is_finite()).collect();
    values.sort_by(f64::total_cmp);
    let n = values.len();
    if n == 0 {
        return None;
    }
    // The k-th smallest and the k-th largest value hold the median between them unless fewer than k of n tosses of a coin
    // are heads, or fewer than k are tails.
    let (mut k, mut below, mut probability) = (0, 0.0, 0.5f64.powi(n as i32));
    while k < n / 2 && below + probability <= 0.025 {
        below += probability;
        probability *= (n - k) as f64 / (k + 1) as f64;
        k += 1;
    }
    let k = k.max(1);
    let middle = (values[(n - 1) / 2] + values[n / 2]) / 2.0;
    Some(Median { median: middle, low: values[k - 1], high: values[n - k] })
}

/// The value below which this share of the sorted values is; 0 when there are none.
pub fn quantile(sorted: &[u32], share: f64) -> f64 {
    let at = (sorted.len() as f64 * share) as usize;
    sorted.get(at.min(sorted.len().saturating_sub(1))).map_or(0.0, |v| f64::from(*v))
}

/// Width of a bucket of [`Histogram`].
const BUCKET: f64 = 1.05;

/// Counts of latencies by their logarithm: 5 % a bucket.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Histogram(pub BTreeMap<u16, u64>);

impl Histogram {
    /// Of latencies in µs.
    pub fn new(us: &[u32]) -> Histogram {
        let mut histogram = Histogram::default();
        for us in us {
            let bucket = f64::from((*us).max(1)).ln() / BUCKET.ln();
            *histogram.0.entry(bucket as u16).or_default() += 1;
        }
        histogram
    }

    /// Adds another one.
    pub fn add(&mut self, other: &Histogram) {
        for (bucket, count) in &other.0 {
            *self.0.entry(*bucket).or_default() += count;
        }
    }

    /// Points of the distribution: µs, share of latencies above.
    pub fn shares_above(&self) -> Vec<(f64, f64)> {
        let all = self.0.values().sum::<u64>() as f64;
        let mut above = all;
        let point = |(bucket, count): (&u16, &u64)| {
            above -= *count as f64;
            (BUCKET.powi(i32::from(*bucket) + 1), above / all)
        };
        self.0.iter().map(point).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_those_of_the_tables() {
        // Binomial tables: of 30 values the 10th and 21st, of 6 the ends.
        let m = median((1..=30).map(f64::from)).unwrap();
        assert_eq!((m.low, m.median, m.high), (10.0, 15.5, 21.0));
        let m = median((1..=6).map(f64::from)).unwrap();
        assert_eq!((m.low, m.median, m.high), (1.0, 3.5, 6.0));
        assert_eq!(median([2.0]).unwrap(), Median { median: 2.0, low: 2.0, high: 2.0 });
        assert_eq!(median([f64::NAN]), None);
    }

    #[test]
    fn quantiles_and_shares() {
        let us: Vec<u32> = (1..=100).collect();
        assert_eq!((quantile(&us, 0.5), quantile(&us, 0.99), quantile(&[], 0.5)), (51.0, 100.0, 0.0));
        let mut histogram = Histogram::new(&[100; 3]);
        histogram.add(&Histogram::new(&[1000]));
        let shares = histogram.shares_above();
        assert_eq!(shares.len(), 2);
        assert!((shares[0].0 / 100.0 - 1.0).abs() < 0.06 && shares[0].1 == 0.25 && shares[1].1 == 0.0);
    }
}
