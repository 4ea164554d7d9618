//! When the peer is lost (rule 2), and when outputs may leave (rule 5).

use logging_channel::message::Beat;

use crate::config::Timing;
use crate::event::Suspicion;

/// What is known of the peer and of this side's own guest loop, in ns of this side's clock.
#[derive(Debug)]
pub(crate) struct Watch {
    timing: Timing,
    /// Something was heard.
    heard_at: u64,
    /// This side's latest stamp that the peer has heard: until then at least it was listening.
    echoed: Option<u64>,
    /// The peer's latest stamp.
    stamp: u64,
    peer_turns: u64,
    peer_records: u64,
    progress_at: u64,
    turns: u64,
    turn_at: u64,
    /// The loop stood still until then, and the peer has to have heard that it turns again.
    resumed_at: u64,
    ticked_at: u64,
    /// No judgement of silence before this: this side itself was stopped, and has first to read what came meanwhile.
    judge_from: u64,
}

impl Watch {
    pub(crate) fn new(timing: Timing, now: u64) -> Watch {
        Watch {
            timing,
            heard_at: now,
            echoed: None,
            stamp: 0,
            peer_turns: 0,
            peer_records: 0,
            progress_at: now,
            turns: 0,
            turn_at: now,
            resumed_at: 0,
            ticked_at: now,
            judge_from: now,
        }
    }

    /// The guest runs from now on.
    pub(crate) fn start(&mut self, now: u64) {
        (self.heard_at, self.progress_at, self.turn_at) = (now, now, now);
    }

    pub(crate) fn heard(&mut self, now: u64) {
        self.heard_at = now;
    }

    /// The peer has heard this stamp of ours.
    pub(crate) fn echoed(&mut self, stamp: u64) {
        self.echoed = self.echoed.max(Some(stamp)).filter(|s| *s > 0);
    }

    pub(crate) fn beat(&mut self, now: u64, beat: &Beat) {
        self.echoed(beat.echo_ns);
        self.stamp = self.stamp.max(beat.stamp_ns);
        if beat.turns != self.peer_turns || beat.records != self.peer_records {
            self.progress_at = now;
        }
        (self.peer_turns, self.peer_records) = (beat.turns, beat.records);
    }

    /// The peer has nothing to do.
    pub(crate) fn idle(&mut self, now: u64) {
        self.progress_at = now;
    }

    /// This side's guest loop has made a turn.
    pub(crate) fn turn(&mut self, now: u64) {
        if now.saturating_sub(self.turn_at) > self.timing.timeout_ns / 2 {
            self.resumed_at = now;
        }
        self.turns += 1;
        self.turn_at = now;
    }

    /// This side's guest loop has made a turn not long ago.
    pub(crate) fn is_turning(&self, now: u64) -> bool {
        now.saturating_sub(self.turn_at) <= self.timing.timeout_ns / 2
    }

    /// This side's guest loop makes no turns, and that is not because this side itself was stopped.
    pub(crate) fn is_stuck(&self, now: u64) -> bool {
        now >= self.judge_from && now.saturating_sub(self.turn_at) >= self.timing.progress_timeout_ns
    }

    pub(crate) fn turns(&self) -> u64 {
        self.turns
    }

    /// The latest stamp of the peer's, to send back.
    pub(crate) fn echo(&self) -> u64 {
        self.stamp
    }

    /// Time has passed and there was nothing to read. Whether the peer is lost (rule 2).
    pub(crate) fn tick(&mut self, now: u64) -> Option<Suspicion> {
        if now.saturating_sub(self.ticked_at) > self.timing.timeout_ns / 4 {
            // Longer than the peer's gate stays open after its last word, whatever this clock did meanwhile.
            self.judge_from = now + self.timing.timeout_ns * 3 / 4;
        }
        self.ticked_at = now;
        if now < self.judge_from {
            return None;
        }
        let silence = now.saturating_sub(self.heard_at);
        if silence >= self.timing.timeout_ns {
            return Some(Suspicion::Silent(silence / 1_000_000));
        }
        let stuck = now.saturating_sub(self.progress_at);
        (stuck >= self.timing.progress_timeout_ns).then_some(Suspicion::NoProgress(stuck / 1_000_000))
    }

    /// Whether outputs may leave (rule 5): the peer is known to have heard us, and our loop to have turned, less than
    /// half the timeout ago. A peer that suspects us by its clock has then not yet done so, wherever this process was
    /// stopped in between: what it heard is proven by our own stamp, not by when its word was read.
    pub(crate) fn is_fresh(&self, now: u64) -> bool {
        let recent = |at: u64| now.saturating_sub(at) <= self.timing.timeout_ns / 2;
        self.echoed.is_some_and(|at| recent(at) && at >= self.resumed_at) && self.is_turning(now)
    }
}
