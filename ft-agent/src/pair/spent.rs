//! Where the time of a guest's thread goes, and what the channel does for its outputs.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// A sum that several threads add to.
#[derive(Default)]
pub struct Sum(AtomicU64);

impl Sum {
    /// Adds; sums of moments may wrap, as long as their difference does not.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Takes away.
    pub fn sub(&self, n: u64) {
        self.0.fetch_sub(n, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// See the module.
#[derive(Default)]
pub struct Spent {
    /// The guest's thread appends records, holds outputs and writes to the channel, ns.
    pub recording_ns: Sum,
    /// It rests because the backup is behind, ns.
    pub slowed_ns: Sum,
    /// It waits for the outside because the guest is idle, ns.
    pub idle_ns: Sum,
    /// When outputs left less when they were held, ns.
    pub held_ns: Sum,
    /// Times that something was written to the channel.
    pub writes: Sum,
    /// Times that something was read from it.
    pub reads: Sum,
}

/// [`Spent`] at a moment, for `vmft status`. What is left of the wall time is the guest's code and its exits.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Times {
    /// ms in which the guest's thread recorded.
    pub recording_ms: f64,
    /// ms in which it rested because the backup is behind.
    pub slowed_ms: f64,
    /// ms in which the guest was idle.
    pub idle_ms: f64,
    /// ms that outputs waited in the gate, summed over all.
    pub held_ms: f64,
    /// Writes to the channel.
    pub writes: u64,
    /// Reads from it that brought something.
    pub reads: u64,
}

impl Spent {
    /// At this moment, with so many outputs still held.
    pub fn at(&self, now: u64, held: u64) -> Times {
        let ms = |sum: &Sum| sum.get() as f64 / 1e6;
        Times {
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
    fn outputs_that_wait_still_count_until_now() {
        let spent = Spent::default();
        spent.held_ns.sub(1_000_000);
        spent.held_ns.sub(2_000_000);
        spent.held_ns.add(4_000_000);
        assert_eq!(spent.at(5_000_000, 1).held_ms, 6.0);
    }
}
