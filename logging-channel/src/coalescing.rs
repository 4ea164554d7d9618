//! Output coalescing: when outputs leave at once, and when they wait to leave together with others.

/// Number of departures that need not wait after the guest loop has waited: one for its acknowledgement of a
/// request, one for its answer.
const AT_ONCE: u32 = 2;
/// The largest such number, reached when outputs are held back in vain again and again.
const AT_ONCE_MAX: u32 = 64;
/// Number of waits that are half as long after the guest loop has waited while outputs were held back: the
/// guest had nothing to do until those were answered.
const SHORTER: u32 = 8;

/// Limits how often outputs leave, as a network card limits its interrupts: each departure costs both hosts a
/// message and its acknowledgement. The outputs of a guest that waits for answers leave at once. Where
/// outputs follow each other quickly, those of one interval leave together.
#[derive(Debug)]
pub(crate) struct OutputCoalescing {
    /// When outputs last left, and how many had been recorded by then.
    left_at: u64,
    left: u64,
    /// Departures still to come that need not wait, and how many are granted after a wait in vain.
    at_once: u32,
    grant: u32,
    /// Outputs recorded at the last check.
    seen: u64,
    /// Checks since the last departure that found new outputs.
    bursts: u32,
    /// Some outputs have been held back at a check since the last departure.
    holds_back: bool,
    /// Waits still to come that are shorter.
    shorter: u32,
}

impl OutputCoalescing {
    pub(crate) fn new() -> OutputCoalescing {
        OutputCoalescing {
            left_at: 0,
            left: 0,
            at_once: AT_ONCE,
            grant: AT_ONCE,
            seen: 0,
            bursts: 0,
            holds_back: false,
            shorter: 0,
        }
    }

    /// Decides whether all outputs that are still here leave now, of `recorded` in total. If it returns true,
    /// they count as left.
    pub(crate) fn leave_if_due(&mut self, now: u64, recorded: u64, interval_ns: u64) -> bool {
        self.bursts += u32::from(recorded > self.seen);
        self.seen = recorded;
        if recorded == self.left {
            return false;
        }
        let interval_ns = if self.shorter > 0 { interval_ns / 2 } else { interval_ns };
        if self.at_once > 0 {
            self.at_once -= 1;
        } else if now.saturating_sub(self.left_at) < interval_ns {
            self.holds_back = true;
            return false;
        } else {
            self.shorter = self.shorter.saturating_sub(1);
            if self.end_wait() {
                self.at_once = self.grant;
            }
        }
        (self.left_at, self.left, self.bursts, self.holds_back) = (now, recorded, 0, false);
        true
    }

    /// Whether some of the outputs that are here have been held back.
    pub(crate) fn holds_back(&self) -> bool {
        self.holds_back
    }

    /// The guest loop is about to wait: no output will follow that could leave together with those that are
    /// here.
    pub(crate) fn guest_loop_waits(&mut self) {
        if self.holds_back {
            self.shorter = SHORTER;
        }
        self.end_wait();
        self.at_once = self.at_once.max(self.grant);
    }

    /// Adapts the grant to the wait that ends here, if there was one. Returns whether it was in vain.
    fn end_wait(&mut self) -> bool {
        let in_vain = self.holds_back && self.bursts < 2;
        if in_vain {
            self.grant = AT_ONCE_MAX.min(2 * self.grant);
        } else if self.holds_back {
            self.grant = AT_ONCE;
        }
        in_vain
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: u64 = 500;

    /// Records an output at each of these times, with a turn of the guest loop. Returns when outputs left.
    fn departures(coalescing: &mut OutputCoalescing, outputs: impl Iterator<Item = u64>) -> Vec<u64> {
        let seen = coalescing.seen;
        let mut left = Vec::new();
        for (n, now) in (1..).zip(outputs) {
            if coalescing.leave_if_due(now, seen + n, INTERVAL) {
                left.push(now);
            }
        }
        left
    }

    #[test]
    fn outputs_that_are_far_between_leave_at_once() {
        let times = || (1..100).map(|n| n * INTERVAL);
        assert_eq!(departures(&mut OutputCoalescing::new(), times()), times().collect::<Vec<_>>());
    }

    #[test]
    fn many_outputs_leave_together() {
        let left = departures(&mut OutputCoalescing::new(), (1000..6000).step_by(100));
        // The first, the next one at once, then one departure in each interval.
        assert_eq!(left[..8], [1000, 1100, 1600, 2100, 2600, 3100, 3600, 4100]);
    }

    #[test]
    fn a_guest_that_waits_answers_at_once() {
        let mut coalescing = OutputCoalescing::new();
        departures(&mut coalescing, (1000..6000).step_by(100));
        coalescing.guest_loop_waits();
        assert_eq!(departures(&mut coalescing, (6000..6300).step_by(100)), [6000, 6100]);
    }

    #[test]
    fn a_guest_that_waits_for_its_held_outputs_has_them_held_for_less() {
        let mut coalescing = OutputCoalescing::new();
        departures(&mut coalescing, (1000..6000).step_by(100));
        assert!(!coalescing.leave_if_due(6000, coalescing.seen + 1, INTERVAL));
        coalescing.guest_loop_waits();
        let left = departures(&mut coalescing, (6100..12000).step_by(50));
        // Two at once, eight after half the interval, and then as before.
        assert_eq!(left[..4], [6100, 6150, 6400, 6650]);
        assert_eq!(left[8..13], [7900, 8150, 8650, 9150, 9650]);
    }

    #[test]
    fn waits_in_vain_become_rare() {
        // One output, and the next one 300 after it has left: the client sends a request after each answer.
        let (mut coalescing, mut now, mut late) = (OutputCoalescing::new(), 1000, Vec::new());
        for n in 1..500 {
            now += 300;
            let asked = now;
            while !coalescing.leave_if_due(now, n, INTERVAL) {
                now += 50;
            }
            late.extend((now > asked).then_some(n));
        }
        assert_eq!(late, [3, 8, 17, 34, 67, 132, 197, 262, 327, 392, 457]);
    }
}
