//! `--until`: waits for a text that the guest prints, as long as it can still print it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long a guest may take to print the text, if the user does not say.
pub const WITHIN_DEFAULT: Duration = Duration::from_secs(600);
/// A guest that nothing can reach is given up after it has rested for this long, if the user does not say how long to wait.
const REST_MAX: Duration = Duration::from_secs(10);
/// A guest rests if it works for less than one part in this many.
const REST_SHARE: u32 = 100;
/// How often to look, at least.
pub const LOOK_INTERVAL: Duration = Duration::from_millis(500);

/// What the user waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Awaited {
    /// The text.
    pub text: String,
    /// How long to wait, if the user says so.
    pub within: Option<Duration>,
}

/// Decides when a guest cannot be expected to print a text any more.
pub struct Until {
    awaited: Awaited,
    /// The guest has a network, by which something may reach it.
    network: bool,
    /// Standard input has ended, so that no keys will come.
    keys_ended: Arc<AtomicBool>,
    begin: Instant,
    rest: Rest,
}

/// A time in which the guest has printed nothing and hardly worked.
struct Rest {
    since: Instant,
    slept: Duration,
    printed: u64,
}

impl Until {
    /// Begins to wait. `network`: frames can reach the guest.
    pub fn new(awaited: Awaited, network: bool, now: Instant) -> Until {
        let rest = Rest { since: now, slept: Duration::ZERO, printed: 0 };
        Until { awaited, network, keys_ended: Arc::default(), begin: now, rest }
    }

    /// The text.
    pub fn text(&self) -> &str {
        &self.awaited.text
    }

    /// To be set when standard input has ended.
    pub fn keys_ended(&self) -> Arc<AtomicBool> {
        self.keys_ended.clone()
    }

    /// Why there is no use in waiting any longer, if there is none. `slept`: how long the guest has been idle so far.
    /// `printed`: how many bytes it has printed. `disk_works`: a disk request is under way.
    pub fn is_hopeless(
        &mut self,
        now: Instant,
        slept: Duration,
        printed: u64,
        disk_works: bool,
    ) -> Option<String> {
        let limit = self.awaited.within.unwrap_or(WITHIN_DEFAULT);
        if now - self.begin >= limit {
            return Some(format!("not within {} s; --within gives it another time", limit.as_secs()));
        }
        if self.awaited.within.is_some() || self.network || !self.keys_ended.load(Ordering::Relaxed) {
            return None;
        }
        let passed = now - self.rest.since;
        let worked = passed.saturating_sub(slept - self.rest.slept);
        let has_worked = passed > LOOK_INTERVAL && worked * REST_SHARE > passed;
        if has_worked || disk_works || printed != self.rest.printed {
            self.rest = Rest { since: now, slept, printed };
            return None;
        }
        (passed >= REST_MAX).then(|| {
            format!(
                "it is idle, and nothing can reach it: it has no network, and standard input has ended; give it --tap, \
                 or say with --within how long to wait (idle for {} s)",
                passed.as_secs()
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn until(within: Option<u64>, network: bool) -> (Until, Instant) {
        let now = Instant::now();
        let awaited = Awaited { text: "READY".into(), within: within.map(Duration::from_secs) };
        let until = Until::new(awaited, network, now);
        until.keys_ended().store(true, Ordering::Relaxed);
        (until, now)
    }

    /// The first second at which a guest is given up that sleeps `slept_permille` of the time.
    fn given_up(mut until: Until, begin: Instant, slept_permille: u32) -> Option<u64> {
        (1..2000).find(|s| {
            let passed = Duration::from_secs(*s);
            until.is_hopeless(begin + passed, passed * slept_permille / 1000, 0, false).is_some()
        })
    }

    #[test]
    fn a_guest_that_rests_and_that_nothing_can_reach_is_given_up() {
        let (resting, begin) = until(None, false);
        assert_eq!(given_up(resting, begin, 998), Some(10));
        let (busy, begin) = until(None, false);
        assert_eq!(given_up(busy, begin, 900), Some(600));
        let (connected, begin) = until(None, true);
        assert_eq!(given_up(connected, begin, 998), Some(600));
        let (told, begin) = until(Some(30), false);
        assert_eq!(given_up(told, begin, 998), Some(30));
    }

    #[test]
    fn keys_disks_and_output_are_signs_of_hope() {
        let (mut open, begin) = until(None, false);
        open.keys_ended.store(false, Ordering::Relaxed);
        assert_eq!(given_up(open, begin, 1000), Some(600));
        (open, _) = until(None, false);
        let begin = open.begin;
        let at = |s| (begin + Duration::from_secs(s), Duration::from_secs(s));
        for (s, printed, disk) in [(9, 0, true), (18, 5, false), (27, 5, false)] {
            let (now, slept) = at(s);
            assert_eq!(open.is_hopeless(now, slept, printed, disk), None, "{s}");
        }
        let (now, slept) = at(28);
        assert!(open.is_hopeless(now, slept, 5, false).is_some());
    }
}
