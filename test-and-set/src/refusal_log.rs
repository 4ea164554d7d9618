//! Which refusals are logged: the first at once, and while more follow a line after growing intervals, with the number of the
//! others. So nobody fills the log by connecting often.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The interval after the first line. It doubles with each line, up to [`INTERVAL_MAX`].
const INTERVAL_MIN: Duration = Duration::from_secs(1);
const INTERVAL_MAX: Duration = Duration::from_secs(64);

/// Whether a refusal is logged.
#[derive(Debug, PartialEq, Eq)]
pub enum RefusalLine {
    /// Now, with the number of refusals that were left out since the last line.
    Now {
        /// That number.
        left_out: u64,
    },
    /// It is counted. The caller has to call [`RefusalLog::report`] after this time.
    Later(Duration),
    /// It is counted, and another caller will report it.
    Counted,
}

/// Decides which refusals at one port are logged.
#[derive(Debug, Default)]
pub struct RefusalLog {
    /// When the next line may be logged.
    next: Option<Instant>,
    interval: Duration,
    left_out: u64,
    /// A caller was told [`RefusalLine::Later`], and has not reported yet.
    has_reporter: bool,
}

impl RefusalLog {
    /// A connection was refused.
    pub fn refused(&mut self, now: Instant) -> RefusalLine {
        match self.next.filter(|next| now < *next) {
            None => {
                self.line_at(now);
                RefusalLine::Now { left_out: std::mem::take(&mut self.left_out) }
            }
            Some(next) => {
                self.left_out += 1;
                match std::mem::replace(&mut self.has_reporter, true) {
                    false => RefusalLine::Later(next - now),
                    true => RefusalLine::Counted,
                }
            }
        }
    }

    /// The reporter has waited. Returns how many refusals it has to log.
    pub fn report(&mut self, now: Instant) -> u64 {
        self.has_reporter = false;
        if self.left_out > 0 {
            self.line_at(now);
        }
        std::mem::take(&mut self.left_out)
    }

    /// A line is logged. After a quiet time as long as the last interval the intervals begin anew.
    fn line_at(&mut self, now: Instant) {
        let goes_on = self.next.is_some_and(|next| now < next + self.interval);
        self.interval = if goes_on { INTERVAL_MAX.min(self.interval * 2) } else { INTERVAL_MIN };
        self.next = Some(now + self.interval);
    }
}

/// How many reasons are told apart; all others count as one.
const REASONS_MAX: usize = 16;

/// Refusals of a party that tries again and again: a reason that is new is logged at once, and one that is repeated as
/// [`RefusalLog`] says.
#[derive(Debug, Default)]
pub struct RefusalReasons(Mutex<BTreeMap<String, RefusalLog>>);

impl RefusalReasons {
    /// Whether a refusal for this reason is logged, and then how many like it were left out since the last line.
    pub fn refused(&self, why: &str, now: Instant) -> Option<u64> {
        let mut reasons = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_one_of_many = reasons.len() >= REASONS_MAX && !reasons.contains_key(why);
        let log = reasons.entry(if is_one_of_many { String::new() } else { why.into() }).or_default();
        match log.refused(now) {
            RefusalLine::Now { left_out } => Some(left_out),
            // The other side tries again, and then the count is logged.
            RefusalLine::Later(_) | RefusalLine::Counted => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_logged_at_growing_intervals_with_a_count_of_the_others() {
        let (mut log, begin) = (RefusalLog::default(), Instant::now());
        let ms = |n| begin + Duration::from_millis(n);
        assert_eq!(log.refused(ms(0)), RefusalLine::Now { left_out: 0 });
        assert_eq!(log.refused(ms(400)), RefusalLine::Later(Duration::from_millis(600)));
        for n in 0..1000 {
            assert_eq!(log.refused(ms(500 + n % 400)), RefusalLine::Counted);
        }
        assert_eq!(log.report(ms(1000)), 1001);
        assert_eq!(log.refused(ms(1500)), RefusalLine::Later(Duration::from_millis(1500)));
        // The reporter is late, and another refusal says it first.
        assert_eq!(log.refused(ms(3100)), RefusalLine::Now { left_out: 1 });
        assert_eq!(log.report(ms(3101)), 0);
        assert_eq!(log.refused(ms(3200)), RefusalLine::Later(Duration::from_millis(3900)));
        assert_eq!(log.report(ms(7100)), 1);
        // After a quiet time the intervals begin anew.
        assert_eq!(log.refused(ms(60_000)), RefusalLine::Now { left_out: 0 });
        assert_eq!(log.refused(ms(60_500)), RefusalLine::Later(Duration::from_millis(500)));
    }

    #[test]
    fn a_peer_that_is_refused_for_a_day_is_a_line_a_minute() {
        let (reasons, begin) = (RefusalReasons::default(), Instant::now());
        let halves = 0..2 * 86_400u64;
        let told: Vec<_> = halves
            .filter_map(|n| reasons.refused("it differs", begin + Duration::from_millis(500 * n)))
            .collect();
        assert!(told.len() < 86_400 / 64 + 10, "{} lines", told.len());
        assert_eq!(told[..4], [0, 1, 3, 7]);
        // A new reason is a line at once; however many there are.
        assert_eq!(reasons.refused("it differs in something else", begin), Some(0));
        let many = (0..1000).filter_map(|n| reasons.refused(&format!("it runs VM {n}"), begin)).count();
        assert!(many <= REASONS_MAX, "{many} lines");
    }
}
