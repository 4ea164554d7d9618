//! When the peer is lost (rule 2), and until when this side may let outputs leave (rule 5).

use logging_channel::message::Beat;

use crate::config::PairTiming;
use crate::event::Suspicion;

/// What is known about the peer and about this side's own guest loop. All times are in ns of this side's
/// clock.
#[derive(Debug)]
pub(crate) struct FailureDetector {
    timing: PairTiming,
    /// When the peer was last heard.
    heard_at: u64,
    /// This side's latest stamp that came back from the peer: the peer was still listening at that time.
    echoed: Option<u64>,
    /// How old that stamp was when it came back.
    round_trip_ns: Option<u64>,
    /// The peer's latest stamp.
    peer_stamp: u64,
    peer_turns: u64,
    peer_records: u64,
    /// When the peer last made progress.
    progress_at: u64,
    /// Turns of this side's guest loop, and when it made the last one.
    turns: u64,
    turn_at: u64,
    /// When the guest loop went on after a standstill. The peer has to hear of it before outputs may leave
    /// again.
    resumed_at: u64,
    checked_at: u64,
    /// The peer's silence is not judged before this time: this process itself was stopped, and first has to
    /// read what arrived meanwhile.
    judge_from: u64,
}

impl FailureDetector {
    pub(crate) fn new(timing: PairTiming, now: u64) -> FailureDetector {
        FailureDetector {
            timing,
            heard_at: now,
            echoed: None,
            round_trip_ns: None,
            peer_stamp: 0,
            peer_turns: 0,
            peer_records: 0,
            progress_at: now,
            turns: 0,
            turn_at: now,
            resumed_at: 0,
            checked_at: now,
            judge_from: now,
        }
    }

    /// The guest runs from now on.
    pub(crate) fn start(&mut self, now: u64) {
        (self.heard_at, self.progress_at, self.turn_at) = (now, now, now);
    }

    /// Bytes came from the peer.
    pub(crate) fn peer_heard(&mut self, now: u64) {
        self.heard_at = now;
    }

    /// The peer has sent back this stamp of ours.
    pub(crate) fn stamp_echoed(&mut self, now: u64, stamp: u64) {
        if stamp > self.echoed.unwrap_or(0) {
            (self.echoed, self.round_trip_ns) = (Some(stamp), Some(now.saturating_sub(stamp)));
        }
    }

    /// How old the peer's last confirmation was when it came: the link's round trip, and the time for which the peer
    /// kept it, which is a beat's interval at most.
    pub(crate) fn round_trip_ns(&self) -> Option<u64> {
        self.round_trip_ns
    }

    /// A beat has come. `turns_count`: turns of the peer's guest loop are progress. Returns how old the stamp in it
    /// is, if it confirms a later one than those before.
    pub(crate) fn beat_received(&mut self, now: u64, beat: &Beat, turns_count: bool) -> Option<u64> {
        let echoed = self.echoed;
        self.stamp_echoed(now, beat.echo_ns);
        self.peer_stamp = self.peer_stamp.max(beat.stamp_ns);
        if turns_count && beat.turns != self.peer_turns || beat.records != self.peer_records {
            self.progress_at = now;
        }
        (self.peer_turns, self.peer_records) = (beat.turns, beat.records);
        self.round_trip_ns.filter(|_| self.echoed != echoed)
    }

    /// The peer has nothing to do, so no progress is expected of it.
    pub(crate) fn peer_idle(&mut self, now: u64) {
        self.progress_at = now;
    }

    /// This side's guest loop has made a turn.
    pub(crate) fn guest_loop_turned(&mut self, now: u64) {
        if now.saturating_sub(self.turn_at) > self.timing.timeout_ns / 2 {
            self.resumed_at = now;
        }
        self.turns += 1;
        self.turn_at = now;
    }

    /// Whether this side's guest loop has made a turn within half the timeout.
    pub(crate) fn is_guest_loop_alive(&self, now: u64) -> bool {
        now.saturating_sub(self.turn_at) <= self.timing.timeout_ns / 2
    }

    /// Whether this side's guest loop has stopped making turns although this process itself was not stopped.
    pub(crate) fn is_guest_loop_stuck(&self, now: u64) -> bool {
        now >= self.judge_from && now.saturating_sub(self.turn_at) >= self.timing.progress_timeout_ns
    }

    /// Turns of this side's guest loop.
    pub(crate) fn turns(&self) -> u64 {
        self.turns
    }

    /// The peer's latest stamp, to be sent back to it.
    pub(crate) fn peer_stamp(&self) -> u64 {
        self.peer_stamp
    }

    /// Whether the peer may be judged by what was heard of it: this process was not stopped itself a moment ago.
    pub(crate) fn may_judge(&self, now: u64) -> bool {
        now >= self.judge_from
    }

    /// Checks whether the peer is lost (rule 2). To be called when time has passed and there was nothing to
    /// read.
    pub(crate) fn check_peer(&mut self, now: u64) -> Option<Suspicion> {
        if now.saturating_sub(self.checked_at) > self.timing.timeout_ns / 4 {
            // This is longer than the peer's gate stays open after it last heard us, whatever this clock did
            // meanwhile.
            self.judge_from = now + self.timing.timeout_ns * 3 / 4;
        }
        self.checked_at = now;
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

    /// Whether nothing was heard from the peer for half the timeout, at least two beats (rule 10). A process
    /// that was stopped itself cannot tell yet: the peer's bytes may wait in its socket.
    pub(crate) fn is_peer_quiet(&self, now: u64) -> bool {
        let checks = now.saturating_sub(self.checked_at) <= self.timing.timeout_ns / 4;
        checks && now >= self.judge_from && now.saturating_sub(self.heard_at) >= self.timing.timeout_ns / 2
    }

    /// Whether the lease under which outputs may leave (rule 5) still holds: the peer is known to have heard
    /// us, and our guest loop to have made a turn, less than half the timeout ago. A peer that suspects us by
    /// its clock cannot have done so yet, wherever this process was stopped in between: our own stamp proves
    /// when the peer heard us, not the time at which we read its answer.
    pub(crate) fn holds_lease(&self, now: u64) -> bool {
        let recent = |at: u64| now.saturating_sub(at) <= self.timing.timeout_ns / 2;
        self.echoed.is_some_and(|at| recent(at) && at >= self.resumed_at) && self.is_guest_loop_alive(now)
    }
}
