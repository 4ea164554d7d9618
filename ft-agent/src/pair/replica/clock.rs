//! The clock of a replica.

use nix::time::{ClockId, clock_gettime};

/// Time in ns, by a monotonic clock that also runs while the host is suspended.
pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).unwrap_or_else(|e| unreachable!("CLOCK_BOOTTIME: {e}"));
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}
