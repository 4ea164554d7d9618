//! What happened on this side, for `vmft status`: the last failover's times and the log's rate.

use std::collections::VecDeque;
use std::time::{SystemTime, UNIX_EPOCH};

use super::status::Failover;

/// Samples of the log's bytes are this far apart, ns, and so many are kept.
const SAMPLE_NS: u64 = 1_000_000_000;
const SAMPLES: usize = 5;

/// See the module.
#[derive(Default)]
pub struct Story {
    /// The last failover.
    pub failover: Option<Failover>,
    /// How often this side went on without the other.
    pub failovers: u64,
    lost_at: u64,
    /// Bytes of the channel, as sent or received.
    pub log_bytes: u64,
    samples: VecDeque<(u64, u64)>,
}

impl Story {
    /// The peer is held for lost.
    pub fn lost(&mut self, now: u64, reason: String) {
        let at_unix_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64());
        self.failover = Some(Failover { reason, at_unix_s, ..Failover::default() });
        self.lost_at = now;
    }

    /// The store is asked.
    pub fn asked(&mut self, now: u64) {
        self.note(now, |f| &mut f.asked_ms);
    }

    /// This side lives.
    pub fn verdict(&mut self, now: u64) {
        self.note(now, |f| &mut f.verdict_ms);
    }

    /// The guest runs on.
    pub fn running(&mut self, now: u64) {
        self.note(now, |f| &mut f.running_ms);
    }

    /// A frame leaves.
    pub fn frame(&mut self, now: u64) {
        self.note(now, |f| &mut f.first_frame_ms);
    }

    /// The first time counts.
    fn note(&mut self, now: u64, field: impl FnOnce(&mut Failover) -> &mut Option<f64>) {
        if let Some(failover) = &mut self.failover {
            field(failover).get_or_insert((now - self.lost_at) as f64 / 1e6);
        }
    }

    /// Bytes of the log a second, over the last seconds; to be asked for once a second or so.
    pub fn log_rate(&mut self, now: u64) -> f64 {
        self.sample(now);
        let Some((then, bytes)) = self.samples.front().copied() else { return 0.0 };
        (self.log_bytes - bytes) as f64 * 1e9 / (now - then).max(1) as f64
    }

    /// Takes a sample, if it is time for one.
    pub fn sample(&mut self, now: u64) {
        if self.samples.back().is_none_or(|(last, _)| now - last >= SAMPLE_NS) {
            self.samples.push_back((now, self.log_bytes));
            if self.samples.len() > SAMPLES {
                self.samples.pop_front();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_times_of_the_last_failover_are_kept() {
        let mut story = Story::default();
        story.frame(5);
        assert_eq!(story.failover, None);
        story.lost(1_000_000, "silence".into());
        story.asked(2_000_000);
        story.asked(9_000_000);
        story.frame(3_500_000);
        let failover = story.failover.unwrap();
        assert_eq!(
            (failover.asked_ms, failover.verdict_ms, failover.first_frame_ms),
            (Some(1.0), None, Some(2.5))
        );
    }

    #[test]
    fn the_rate_is_that_of_the_last_seconds() {
        let mut story = Story::default();
        for second in 0..20 {
            story.log_bytes = if second < 10 { 0 } else { (second - 10) * 1000 };
            story.sample(second * SAMPLE_NS);
        }
        assert_eq!(story.log_rate(19 * SAMPLE_NS), 1000.0);
    }
}
