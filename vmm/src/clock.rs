//! Guest time: one value, from which TSC, PIT and RTC are computed.
//!
//! On an engine that counts instructions, each takes 1 ns of guest time; on the others time stands still while the guest
//! runs. On all engines [`Clock::raise`] moves it forward: to the next deadline at HLT, and by `Input::Clock`.

use entry::{Position, PositionUnit};
use serde::{Deserialize, Serialize};

/// Guest time as state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clock {
    /// Each instruction counts as one nanosecond.
    follows_instructions: bool,
    /// Guest time minus the share that the position contributes, in ns.
    offset_ns: u64,
}

impl Clock {
    /// Time 0 at position 0.
    pub fn new(unit: PositionUnit) -> Clock {
        Clock { follows_instructions: unit == PositionUnit::Instructions, offset_ns: 0 }
    }

    /// What to add to the share that the engine counts itself, in ns.
    pub fn offset_ns(&self) -> u64 {
        self.offset_ns
    }

    /// Guest time at a position, in ns since the machine began.
    pub fn time_ns(&self, at: Position) -> u64 {
        self.offset_ns + if self.follows_instructions { at.count } else { 0 }
    }

    /// Moves time forward to `time_ns`; never back.
    pub fn raise(&mut self, at: Position, time_ns: u64) {
        let ahead = time_ns.saturating_sub(self.time_ns(at));
        // 2^63 ns are 292 years: a limit that keeps every later sum from overflowing.
        self.offset_ns = (self.offset_ns + ahead.min(1 << 63)).min(1 << 63);
    }

    /// The position at which time is `time_ns`. `None` if executing does not move time on this engine.
    pub fn position_of(&self, time_ns: u64) -> Option<Position> {
        let count = time_ns.saturating_sub(self.offset_ns);
        self.follows_instructions.then_some(Position::exact(count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_follows_instructions_and_never_goes_back() {
        let mut clock = Clock::new(PositionUnit::Instructions);
        let at = Position::exact(100);
        assert_eq!(clock.time_ns(at), 100);
        clock.raise(at, 1_000);
        clock.raise(at, 500);
        assert_eq!(clock.time_ns(at), 1_000);
        assert_eq!(clock.position_of(1_250), Some(Position::exact(350)));
        assert_eq!(clock.time_ns(Position::exact(350)), 1_250);
    }

    #[test]
    fn without_counting_only_raising_moves_time() {
        let mut clock = Clock::new(PositionUnit::SynchronousExits);
        clock.raise(Position::exact(7), 42);
        assert_eq!(clock.time_ns(Position::exact(1_000)), 42);
        assert_eq!(clock.position_of(43), None);
    }

    #[test]
    fn absurd_times_do_not_overflow() {
        let mut clock = Clock::new(PositionUnit::Instructions);
        clock.raise(Position::exact(1), u64::MAX);
        clock.raise(Position::exact(1 << 40), u64::MAX);
        assert!(clock.time_ns(Position::exact(1 << 41)) > 1 << 62);
    }
}
