//! How to go on towards a target of the counter: a pure function.

/// What to do next on the way to a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Run at full speed with the counter armed for so many ticks.
    RunFree(u64),
    /// The counter cannot be trusted to stop in time any more: go on by breakpoint.
    CloseIn,
    /// The count is that of the target; the breakpoint says when RIP is, too.
    Arrived,
    /// The target lies behind.
    Overshot,
}

/// What comes next at count `now` for somebody who wants to `target`, when an overflow may be up to `margin` ticks late.
///
/// The counter is armed for a margin less than what is left, and never for less than a margin: a counter cannot be
/// relied on for periods shorter than its skid.
pub fn next(now: u64, target: u64, margin: u64) -> Step {
    match target.checked_sub(now) {
        None => Step::Overshot,
        Some(0) => Step::Arrived,
        Some(left) if left > margin.saturating_mul(2) => Step::RunFree(left - margin),
        Some(_) => Step::CloseIn,
    }
}

/// How late an overflow may be: what this host's counter has shown, doubled whenever it shows worse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Margin {
    ticks: u64,
    max: u64,
}

impl Margin {
    /// A margin of `ticks`, that may grow up to `max`.
    pub fn new(ticks: u64, max: u64) -> Margin {
        Margin { ticks: ticks.max(1), max }
    }

    /// In ticks of the counter.
    pub fn ticks(self) -> u64 {
        self.ticks
    }

    /// Doubles it for another try. `None`: it is as wide as it may be, so that the trouble is another one.
    pub fn widened(self) -> Option<Margin> {
        (self.ticks < self.max).then(|| Margin { ticks: self.ticks.saturating_mul(2).min(self.max), ..self })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counter_is_armed_only_where_it_stops_in_time() {
        assert_eq!(next(0, 1000, 100), Step::RunFree(900));
        assert_eq!(next(0, 201, 100), Step::RunFree(101));
        assert_eq!(next(0, 200, 100), Step::CloseIn);
        assert_eq!(next(999, 1000, 100), Step::CloseIn);
        assert_eq!(next(1000, 1000, 100), Step::Arrived);
        assert_eq!(next(1001, 1000, 100), Step::Overshot);
        assert_eq!(next(0, u64::MAX, u64::MAX), Step::CloseIn);
    }

    proptest::proptest! {
        #[test]
        fn no_skid_within_the_margin_passes_the_target(now: u64, ahead in 0..1u64 << 40, margin in 1..1u64 << 30) {
            let target = now.saturating_add(ahead);
            if let Step::RunFree(ticks) = next(now, target, margin) {
                proptest::prop_assert!(ticks >= margin && now + ticks + margin <= target);
            }
        }
    }

    #[test]
    fn a_margin_doubles_to_its_end() {
        let margin = Margin::new(300, 1000);
        let widths: Vec<_> =
            std::iter::successors(Some(margin), |m| m.widened()).map(Margin::ticks).collect();
        assert_eq!(widths, [300, 600, 1000]);
    }
}
