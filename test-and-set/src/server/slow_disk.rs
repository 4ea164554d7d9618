//! Tells of a disk that is slow: no verdict is given before a majority of the members has it on the disk.

use std::time::{Duration, Instant};

use tracing::warn;

use crate::refusal_log::RefusalReasons;

/// From here on a change is slow: near to the silence after which members suspect their leader.
const SLOW: Duration = Duration::from_millis(250);

/// How often that was told.
#[derive(Default)]
pub struct SlowDisk(RefusalReasons);

impl SlowDisk {
    /// Notes that a change was begun then, and is on the disk now.
    pub fn note(&self, begun: Instant) {
        let (now, took) = (Instant::now(), begun.elapsed());
        if took >= SLOW
            && let Some(left_out) = self.0.refused("slow", now)
        {
            warn!(
                "the disk is slow: a change took {} ms ({left_out} more since the last line); if this lasts, look for other load on it, or for its faults",
                took.as_millis()
            );
        }
    }
}
