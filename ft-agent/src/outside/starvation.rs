//! Detects starved inputs: if positions are the guest's exits, a guest that makes no exit receives no input.

use std::time::{Duration, Instant};

use entry::Position;
use tracing::warn;

/// Counts of starved inputs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Starved {
    /// Number of waits that were longer than the limit.
    pub times: u64,
    /// The longest of them.
    pub longest: Duration,
}

/// Watches the guest's position while an input waits.
pub struct Starvation {
    limit: Duration,
    /// Position of the guest's last exit when an input waited, and when that was first seen.
    waiting: Option<(Position, Instant)>,
    /// Whether the current wait is counted already.
    counted: bool,
    counts: Starved,
}

impl Starvation {
    /// Counts waits that are longer than `limit`.
    pub fn new(limit: Duration) -> Starvation {
        Starvation { limit, waiting: None, counted: false, counts: Starved::default() }
    }

    /// Notes that an input waits for the first exit after `at`.
    pub fn observe(&mut self, at: Position) {
        let since = match self.waiting {
            Some((last, since)) if last == at => since,
            _ => {
                self.counted = false;
                let now = Instant::now();
                self.waiting = Some((at, now));
                now
            }
        };
        let waited = since.elapsed();
        if waited < self.limit {
            return;
        }
        if self.counts.times == 0 {
            warn!(
                "the guest has made no exit for {:.1} s while an input waits (reported once; later cases are only counted)",
                waited.as_secs_f64()
            );
        }
        self.counts.times += u64::from(!std::mem::replace(&mut self.counted, true));
        self.counts.longest = self.counts.longest.max(waited);
    }

    /// The counts so far.
    pub fn counts(&self) -> Starved {
        self.counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_long_wait_is_counted_once() {
        let mut starvation = Starvation::new(Duration::ZERO);
        for position in [1, 1, 1, 2, 2] {
            starvation.observe(Position::exact(position));
        }
        assert_eq!(starvation.counts().times, 2);
        let mut patient = Starvation::new(Duration::from_secs(3600));
        patient.observe(Position::exact(1));
        patient.observe(Position::exact(1));
        assert_eq!(patient.counts().times, 0);
    }
}
