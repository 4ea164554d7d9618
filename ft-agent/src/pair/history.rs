//! The history of this side for `vmft status`: the steps of the last failover, and the log's rate.

use std::collections::VecDeque;
use std::time::{SystemTime, UNIX_EPOCH};

use super::report::Failover;

/// Time between two samples of the log's bytes, ns.
const SAMPLE_NS: u64 = 1_000_000_000;
/// How many samples are kept.
const SAMPLES: usize = 5;

/// The last failover, and samples of the log's bytes.
#[derive(Default)]
pub struct History {
    /// The last failover.
    pub failover: Option<Failover>,
    /// How often this side went on without the other.
    pub failovers: u64,
    lost_at: u64,
    /// Bytes of the channel's messages, sent and received.
    pub log_bytes: u64,
    /// Pairs of a time, ns, and the bytes until then.
    samples: VecDeque<(u64, u64)>,
}

impl History {
    /// The peer is lost: a failover begins.
    pub fn peer_lost(&mut self, now: u64, reason: String) {
        let at_unix_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64());
        self.failover = Some(Failover { reason, at_unix_s, ..Failover::default() });
        self.lost_at = now;
    }

    /// The primary hands over to this side: a planned failover begins.
    pub fn handover_begins(&mut self, now: u64, reason: String) {
        self.peer_lost(now, reason);
        if let Some(failover) = &mut self.failover {
            failover.planned = true;
        }
    }

    /// The store is asked for a verdict.
    pub fn store_asked(&mut self, now: u64) {
        self.record_step(now, |f| &mut f.asked_ms);
    }

    /// The store has decided that this side lives.
    pub fn verdict_won(&mut self, now: u64) {
        self.record_step(now, |f| &mut f.verdict_ms);
    }

    /// The guest runs on this side.
    pub fn guest_running(&mut self, now: u64) {
        self.record_step(now, |f| &mut f.running_ms);
    }

    /// A frame of the guest leaves.
    pub fn frame_sent(&mut self, now: u64) {
        self.record_step(now, |f| &mut f.first_frame_ms);
    }

    /// Records the time of a step of the last failover, the first time that the step is done.
    fn record_step(&mut self, now: u64, field: impl FnOnce(&mut Failover) -> &mut Option<f64>) {
        if let Some(failover) = &mut self.failover {
            field(failover).get_or_insert((now - self.lost_at) as f64 / 1e6);
        }
    }

    /// The log's rate over the last seconds, bytes per second. To be called about once a second.
    pub fn log_rate(&mut self, now: u64) -> f64 {
        self.sample(now);
        let Some((then, bytes)) = self.samples.front().copied() else { return 0.0 };
        (self.log_bytes - bytes) as f64 * 1e9 / (now - then).max(1) as f64
    }

    /// Takes a sample if one is due.
    fn sample(&mut self, now: u64) {
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
    fn each_step_of_the_last_failover_keeps_its_first_time() {
        let mut history = History::default();
        history.frame_sent(5);
        assert_eq!(history.failover, None);
        history.peer_lost(1_000_000, "silence".into());
        history.store_asked(2_000_000);
        history.store_asked(9_000_000);
        history.frame_sent(3_500_000);
        let failover = history.failover.unwrap();
        assert_eq!(
            (failover.asked_ms, failover.verdict_ms, failover.first_frame_ms),
            (Some(1.0), None, Some(2.5))
        );
    }

    #[test]
    fn the_rate_is_that_of_the_last_seconds() {
        let mut history = History::default();
        for second in 0..20 {
            history.log_bytes = if second < 10 { 0 } else { (second - 10) * 1000 };
            history.sample(second * SAMPLE_NS);
        }
        assert_eq!(history.log_rate(19 * SAMPLE_NS), 1000.0);
    }
}
