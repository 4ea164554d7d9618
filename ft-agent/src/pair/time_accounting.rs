//! Time accounting: where the time of the guest's thread goes, how long outputs are held, and how often the
//! channel is written and read.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// A sum that several threads add to.
#[derive(Default)]
pub struct SharedSum(AtomicU64);

impl SharedSum {
    /// Adds to the sum, which may wrap: [`TimeAccounting::held_ns`] is a difference between sums of points in
    /// time.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Subtracts from the sum, which may wrap.
    pub fn sub(&self, n: u64) {
        self.0.fetch_sub(n, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The sums that the threads of a replica keep.
#[derive(Default)]
pub struct TimeAccounting {
    /// Time in which the guest's thread appended records, held outputs and wrote to the channel, ns.
    pub recording_ns: SharedSum,
    /// Time in which the guest's thread paused because the backup lags, ns.
    pub slowed_ns: SharedSum,
    /// Time in which the guest's thread waited for an input because the guest was idle, ns.
    pub idle_ns: SharedSum,
    /// The times at which outputs left, minus the times at which they were held, ns.
    pub held_ns: SharedSum,
    /// Writes to the channel.
    pub writes: SharedSum,
    /// Reads from the channel that returned data.
    pub reads: SharedSum,
}

/// The totals of [`TimeAccounting`] for `vmft status`. The rest of the wall-clock time went into the guest's
/// code and its exits.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct TimeTotals {
    /// Time in which the guest's thread recorded, ms.
    pub recording_ms: f64,
    /// Time in which the guest's thread paused because the backup lags, ms.
    pub slowed_ms: f64,
    /// Time in which the guest was idle, ms.
    pub idle_ms: f64,
    /// Time that outputs waited in the gate, summed over all outputs, ms.
    pub held_ms: f64,
    /// Writes to the channel.
    pub writes: u64,
    /// Reads from the channel that returned data.
    pub reads: u64,
}

impl TimeAccounting {
    /// The totals at time `now`, while `held` outputs are still in the gate.
    pub fn totals(&self, now: u64, held: u64) -> TimeTotals {
        let ms = |sum: &SharedSum| sum.get() as f64 / 1e6;
        TimeTotals {
            recording_ms: ms(&self.recording_ns),
            slowed_ms: ms(&self.slowed_ns),
            idle_ms: ms(&self.idle_ns),
            held_ms: self.held_ns.get().wrapping_add(held.wrapping_mul(now)) as f64 / 1e6,
            writes: self.writes.get(),
            reads: self.reads.get(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs_that_are_still_held_count_until_now() {
        let times = TimeAccounting::default();
        times.held_ns.sub(1_000_000);
        times.held_ns.sub(2_000_000);
        times.held_ns.add(4_000_000);
        assert_eq!(times.totals(5_000_000, 1).held_ms, 6.0);
    }
}
