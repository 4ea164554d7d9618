//! Guests that let inputs wait: where positions are the guest's exits, one that makes none takes nothing in.

use std::time::{Duration, Instant};

use entry::Position;

/// What was noticed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Starved {
    /// Waits that were longer than the limit.
    pub times: u64,
    /// The longest of them.
    pub longest: Duration,
}

/// Watches the position while something waits.
pub struct Starvation {
    limit: Duration,
    /// The guest's last exit while something waited, and when that was seen first.
    waiting: Option<(Position, Instant)>,
    /// The wait under way is counted.
    counted: bool,
    counts: Starved,
}

impl Starvation {
    /// Notices waits longer than `limit`.
    pub fn new(limit: Duration) -> Starvation {
        Starvation { limit, waiting: None, counted: false, counts: Starved::default() }
    }

    /// Something waits for the exit behind `at`.
    pub fn look(&mut self, at: Position) {
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
            eprintln!(
                "the guest has made no exit for {:.1} s while an input waits; it waits on (told once)",
                waited.as_secs_f64()
            );
        }
        self.counts.times += u64::from(!std::mem::replace(&mut self.counted, true));
        self.counts.longest = self.counts.longest.max(waited);
    }

    /// What was noticed so far.
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
            starvation.look(Position::exact(position));
        }
        assert_eq!(starvation.counts().times, 2);
        let mut patient = Starvation::new(Duration::from_secs(3600));
        patient.look(Position::exact(1));
        patient.look(Position::exact(1));
        assert_eq!(patient.counts().times, 0);
    }
}
