//! How to approach a target count: a pure function.

/// What to do next on the way to a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Approach {
    /// Run at full speed, with the counter armed for this many ticks.
    RunFree(u64),
    /// The counter might not stop the guest in time any more: go on by breakpoint.
    CloseIn,
    /// The count is the target's. The breakpoint tells when RIP is the target's, too.
    Arrived,
    /// The count is past the target's.
    Overshot,
}

/// How to go on at count `now` towards `target`, if an overflow may be up to `margin` ticks late.
///
/// The counter is armed for the remaining ticks less a margin, and never for less than a margin, because a counter is not
/// reliable for periods shorter than its skid.
pub fn next_approach(now: u64, target: u64, margin: u64) -> Approach {
    match target.checked_sub(now) {
        None => Approach::Overshot,
        Some(0) => Approach::Arrived,
        Some(left) if left > margin.saturating_mul(2) => Approach::RunFree(left - margin),
        Some(_) => Approach::CloseIn,
    }
}

/// How late an overflow may be. It starts with what is known about the counter, and is doubled whenever an overflow was later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Margin {
    ticks: u64,
    max: u64,
}

impl Margin {
    /// A margin of `ticks` that may grow up to `max`.
    pub fn new(ticks: u64, max: u64) -> Margin {
        Margin { ticks: ticks.max(1), max }
    }

    /// The margin in ticks of the counter.
    pub fn ticks(self) -> u64 {
        self.ticks
    }

    /// The doubled margin, for another try. `None`: it is at its maximum, so skid is not the cause.
    pub fn widened(self) -> Option<Margin> {
        (self.ticks < self.max).then(|| Margin { ticks: self.ticks.saturating_mul(2).min(self.max), ..self })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counter_is_armed_only_where_it_stops_in_time() {
        assert_eq!(next_approach(0, 1000, 100), Approach::RunFree(900));
        assert_eq!(next_approach(0, 201, 100), Approach::RunFree(101));
        assert_eq!(next_approach(0, 200, 100), Approach::CloseIn);
        assert_eq!(next_approach(999, 1000, 100), Approach::CloseIn);
        assert_eq!(next_approach(1000, 1000, 100), Approach::Arrived);
        assert_eq!(next_approach(1001, 1000, 100), Approach::Overshot);
        assert_eq!(next_approach(0, u64::MAX, u64::MAX), Approach::CloseIn);
    }

    proptest::proptest! {
        #[test]
        fn no_skid_within_the_margin_passes_the_target(now: u64, ahead in 0..1u64 << 40, margin in 1..1u64 << 30) {
            let target = now.saturating_add(ahead);
            if let Approach::RunFree(ticks) = next_approach(now, target, margin) {
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
