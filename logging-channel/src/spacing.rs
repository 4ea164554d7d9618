//! When outputs leave, and when they wait for others to leave with them.

/// Times that outputs leave at once after the guest has rested: its acknowledgement of a request, and its answer.
const AT_ONCE: u32 = 2;
/// The same, at most, where outputs have waited in vain for others.
const AT_ONCE_MAX: u32 = 64;
/// Waits that are half as long after the guest has rested while outputs waited: it had nothing to do without their answers.
const SHORTER: u32 = 8;

/// Moderates how often outputs leave, as a network card does its interrupts: each departure costs both hosts a message and its
/// acknowledgement. Those of a guest that waits for answers leave at once; where many follow close upon one another, all
/// of a while leave together.
#[derive(Debug)]
pub(crate) struct Spacing {
    /// When outputs last left, and how many had been recorded.
    left_at: u64,
    left: u64,
    /// Departures that need not wait, and how many there will be after a wait in vain.
    at_once: u32,
    grant: u32,
    /// Outputs recorded at the last look, looks since the last departure that found more, and whether some had to wait.
    seen: u64,
    bursts: u32,
    waits: bool,
    /// Waits to come that are shorter.
    shorter: u32,
}

impl Spacing {
    pub(crate) fn new() -> Spacing {
        Spacing {
            left_at: 0,
            left: 0,
            at_once: AT_ONCE,
            grant: AT_ONCE,
            seen: 0,
            bursts: 0,
            waits: false,
            shorter: 0,
        }
    }

    /// Of `recorded` outputs in all, those that are still here may leave now, and do.
    pub(crate) fn may_leave(&mut self, now: u64, recorded: u64, spacing_ns: u64) -> bool {
        self.bursts += u32::from(recorded > self.seen);
        self.seen = recorded;
        if recorded == self.left {
            return false;
        }
        let spacing_ns = if self.shorter > 0 { spacing_ns / 2 } else { spacing_ns };
        if self.at_once > 0 {
            self.at_once -= 1;
        } else if now.saturating_sub(self.left_at) < spacing_ns {
            self.waits = true;
            return false;
        } else {
            self.shorter = self.shorter.saturating_sub(1);
            if self.judge_wait() {
                self.at_once = self.grant;
            }
        }
        (self.left_at, self.left, self.bursts, self.waits) = (now, recorded, 0, false);
        true
    }

    /// Some of the outputs that are here had to wait at a look.
    pub(crate) fn has_waited(&self) -> bool {
        self.waits
    }

    /// The guest rests: nothing follows that could leave together with what is here.
    pub(crate) fn rest(&mut self) {
        if self.waits {
            self.shorter = SHORTER;
        }
        self.judge_wait();
        self.at_once = self.at_once.max(self.grant);
    }

    /// Whether the wait that ends here was in vain.
    fn judge_wait(&mut self) -> bool {
        let in_vain = self.waits && self.bursts < 2;
        if in_vain {
            self.grant = AT_ONCE_MAX.min(2 * self.grant);
        } else if self.waits {
            self.grant = AT_ONCE;
        }
        in_vain
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPACING: u64 = 500;

    /// Outputs at these times, each seen by a turn of the guest's loop then; when outputs left.
    fn departures(spacing: &mut Spacing, outputs: impl Iterator<Item = u64>) -> Vec<u64> {
        let seen = spacing.seen;
        let mut left = Vec::new();
        for (n, now) in (1..).zip(outputs) {
            if spacing.may_leave(now, seen + n, SPACING) {
                left.push(now);
            }
        }
        left
    }

    #[test]
    fn outputs_that_are_far_between_leave_at_once() {
        let times = || (1..100).map(|n| n * SPACING);
        assert_eq!(departures(&mut Spacing::new(), times()), times().collect::<Vec<_>>());
    }

    #[test]
    fn many_outputs_leave_together() {
        let left = departures(&mut Spacing::new(), (1000..6000).step_by(100));
        // The first and those that follow at once, then one departure each spacing.
        assert_eq!(left[..8], [1000, 1100, 1600, 2100, 2600, 3100, 3600, 4100]);
    }

    #[test]
    fn a_guest_that_rests_answers_at_once() {
        let mut spacing = Spacing::new();
        departures(&mut spacing, (1000..6000).step_by(100));
        spacing.rest();
        assert_eq!(departures(&mut spacing, (6000..6300).step_by(100)), [6000, 6100]);
    }

    #[test]
    fn a_guest_that_rests_while_outputs_wait_waits_less() {
        let mut spacing = Spacing::new();
        departures(&mut spacing, (1000..6000).step_by(100));
        assert!(!spacing.may_leave(6000, spacing.seen + 1, SPACING));
        spacing.rest();
        let left = departures(&mut spacing, (6100..12000).step_by(50));
        // Two at once, eight after half the time, and then as before.
        assert_eq!(left[..4], [6100, 6150, 6400, 6650]);
        assert_eq!(left[8..13], [7900, 8150, 8650, 9150, 9650]);
    }

    #[test]
    fn waits_that_bring_nothing_become_rare() {
        // One output, and the next 300 after it has left: who asks waits for the answer.
        let (mut spacing, mut now, mut late) = (Spacing::new(), 1000, Vec::new());
        for n in 1..500 {
            now += 300;
            let asked = now;
            while !spacing.may_leave(now, n, SPACING) {
                now += 50;
            }
            late.extend((now > asked).then_some(n));
        }
        assert_eq!(late, [3, 8, 17, 34, 67, 132, 197, 262, 327, 392, 457]);
    }
}
