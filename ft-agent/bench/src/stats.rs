//! Medians with their intervals, and histograms that can be added up.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A median, or a center, with its distribution-free 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Median {
    /// The median.
    pub median: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// The median of these values; `None` without values. With fewer than six values no order statistics give a 95 % interval,
/// and the range is taken instead.
pub fn median(values: impl IntoIterator<Item = f64>) -> Option<Median> {
    let mut values: Vec<f64> = values.into_iter().filter(|v| v.is_finite()).collect();
    values.sort_by(f64::total_cmp);
    let n = values.len();
    if n == 0 {
        return None;
    }
    // The median lies between the k-th smallest and the k-th largest value unless n tosses of a coin give fewer than k heads
    // or fewer than k tails.
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

/// The Hodges-Lehmann center of these ratios and its 95 % interval: the median of the means of all pairs. It assumes a
/// distribution symmetric about its center; logarithms of ratios are symmetric if neither side is favoured. The interval is
/// that of Wilcoxon's signed-rank test, a fifth narrower than the median's. `None` without values; with fewer than six, the
/// range.
pub fn center_of_ratios(ratios: impl IntoIterator<Item = f64>) -> Option<Median> {
    let logs: Vec<f64> = ratios.into_iter().map(f64::ln).filter(|v| v.is_finite()).collect();
    let n = logs.len();
    if n == 0 {
        return None;
    }
    let pair = |i: usize| (i..n).map(move |j| (i, j));
    let mut means: Vec<f64> = (0..n).flat_map(pair).map(|(i, j)| (logs[i] + logs[j]) / 2.0).collect();
    means.sort_by(f64::total_cmp);
    let all = means.len();
    let k = ranks_beyond(n).max(1);
    let median = (means[(all - 1) / 2] + means[all / 2]) / 2.0;
    Some(Median { median: median.exp(), low: means[k - 1].exp(), high: means[all - k].exp() })
}

/// The largest k such that the sum of signed ranks of n values is below k with a probability of at most 2.5 %.
fn ranks_beyond(n: usize) -> usize {
    // Each rank is in the sum with probability 1/2.
    let mut probability = vec![1.0];
    for rank in 1..=n {
        let mut next = vec![0.0; probability.len() + rank];
        for (sum, p) in probability.iter().enumerate() {
            next[sum] += p / 2.0;
            next[sum + rank] += p / 2.0;
        }
        probability = next;
    }
    let below = probability.iter().scan(0.0, |sum, p| {
        *sum += p;
        Some(*sum)
    });
    below.take_while(|below| *below <= 0.025).count()
}

/// Slope of the least-squares line through the points; `None` for fewer than two different values of x.
pub fn slope(points: &[(f64, f64)]) -> Option<f64> {
    let n = points.len() as f64;
    let (sx, sy) = points.iter().fold((0.0, 0.0), |(sx, sy), (x, y)| (sx + x, sy + y));
    let (sxx, sxy) = points.iter().fold((0.0, 0.0), |(sxx, sxy), (x, y)| (sxx + x * x, sxy + x * y));
    let spread = n * sxx - sx * sx;
    (spread > 0.0).then(|| (n * sxy - sx * sy) / spread)
}

/// The value that this share of the sorted values is below; 0 without values.
pub fn quantile(sorted: &[u32], share: f64) -> f64 {
    let at = (sorted.len() as f64 * share) as usize;
    sorted.get(at.min(sorted.len().saturating_sub(1))).map_or(0.0, |v| f64::from(*v))
}

/// Ratio of the bounds of a bucket of [`Histogram`].
const BUCKET: f64 = 1.05;

/// Counts of latencies in logarithmic buckets, each 5 % wide.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Histogram(pub BTreeMap<u16, u64>);

impl Histogram {
    /// The histogram of latencies in µs.
    pub fn new(us: &[u32]) -> Histogram {
        let mut histogram = Histogram::default();
        for us in us {
            let bucket = f64::from((*us).max(1)).ln() / BUCKET.ln();
            *histogram.0.entry(bucket as u16).or_default() += 1;
        }
        histogram
    }

    /// Adds the counts of another histogram.
    pub fn add(&mut self, other: &Histogram) {
        for (bucket, count) in &other.0 {
            *self.0.entry(*bucket).or_default() += count;
        }
    }

    /// Points of the distribution: a latency in µs, and the share of latencies above it.
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
    fn centers_are_those_of_the_tables() {
        // Critical values of the signed ranks at 5 %, two-sided: 0 for 6, 8 for 10, 137 for 30.
        assert_eq!([6, 10, 30].map(ranks_beyond), [1, 9, 138]);
        let m = center_of_ratios([0.5, 1.0, 2.0]).unwrap();
        assert!((m.median - 1.0).abs() < 1e-12 && m.low == 0.5 && m.high == 2.0);
        // One wild value moves it little.
        let m = center_of_ratios([1.0, 1.01, 0.99, 1.02, 0.98, 1.0, 1.0, 9.0]).unwrap();
        assert!(m.median < 1.02 && m.low < 1.0 && m.low > 0.97, "{m:?}");
        assert_eq!(center_of_ratios([]), None);
    }

    #[test]
    fn a_line_goes_through_its_points() {
        assert!((slope(&[(1.0, 3.0), (2.0, 5.0), (4.0, 9.0)]).unwrap() - 2.0).abs() < 1e-12);
        assert_eq!(slope(&[(1.0, 3.0), (1.0, 4.0)]), None);
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
