//! Messages about what others do, at a bounded rate: nobody fills the log by connecting often.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The interval of lines, and how many may come at once.
const INTERVAL: Duration = Duration::from_secs(5);
const LINES_MAX: u32 = 5;

/// Writes at most [`LINES_MAX`] lines in each interval, and then how many were left out.
#[derive(Default)]
pub struct BoundedLog(Mutex<LogInterval>);

#[derive(Default)]
struct LogInterval {
    begun: Option<Instant>,
    lines: u32,
    left_out: u64,
}

impl BoundedLog {
    /// Writes a line, unless there were too many.
    pub fn line(&self, text: impl FnOnce() -> String) {
        if let Some(left_out) = self.admit(Instant::now()) {
            if left_out > 0 {
                eprintln!("{left_out} more messages about connections were left out");
            }
            eprintln!("{}", text());
        }
    }

    /// Whether a line may be written now, and then how many were left out before it.
    fn admit(&self, now: Instant) -> Option<u64> {
        let mut interval = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut left_out = 0;
        if interval.begun.is_none_or(|begun| now - begun >= INTERVAL) {
            left_out = interval.left_out;
            *interval = LogInterval { begun: Some(now), ..LogInterval::default() };
        }
        interval.lines += 1;
        if interval.lines > LINES_MAX {
            interval.left_out += 1;
            return None;
        }
        Some(left_out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_a_few_lines_and_a_count() {
        let (log, now) = (BoundedLog::default(), Instant::now());
        let written = (0..1000).filter(|_| log.admit(now).is_some()).count();
        assert_eq!(written, LINES_MAX as usize);
        assert_eq!(log.admit(now + INTERVAL), Some(1000 - u64::from(LINES_MAX)));
        assert_eq!(log.admit(now + INTERVAL), Some(0));
    }
}
