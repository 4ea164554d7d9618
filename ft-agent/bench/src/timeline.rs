//! A timeline of the pair through the loss of its primary: log traffic, lag, and the latency that a client sees.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::monitor::status;
use crate::workloads::{BenchGuest, Load};
use crate::{BenchArgs, BenchError, load};

/// Time between two readings of the pair's status.
const STEP: Duration = Duration::from_millis(20);
/// Number of connections that load the guest.
const CONNECTIONS: usize = 10;

/// The pair over time. Times are in s from the start.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Timeline {
    /// When the primary was killed.
    pub killed_s: Option<f64>,
    /// Readings of the replicas' status: time, role of the replica, lag in ms, bytes sent over the channel so far.
    pub looks: Vec<(f64, String, f64, u64)>,
    /// Round trips of single bytes to the guest and back: when the byte left, and how long it took, ms.
    pub round_trips: Vec<(f64, f64)>,
}

/// Loads the protected guest for this many seconds and records the timeline.
///
/// # Errors
/// The guest does not answer; if the primary was killed, the backup did not go live.
pub fn record_timeline(args: &BenchArgs, seconds: f64) -> Result<Timeline, BenchError> {
    let (start, time) = (Instant::now(), Duration::from_secs_f64(seconds));
    let guest = args.protected[0];
    let named = |source| BenchError::Guest { what: format!("{guest} during the timeline"), source };
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let looks = scope.spawn(|| sample_pair(args, start, &done));
        let load = scope.spawn(|| load::run(args.guest, load_of(args.guest), guest, time));
        let killed_s = args.kill.map(|pid| {
            scope.spawn(move || {
                std::thread::sleep(time / 2);
                // If the primary no longer exists there is nothing to kill; the round trips show the gap.
                kill(Pid::from_raw(pid), Signal::SIGKILL).ok();
                start.elapsed().as_secs_f64()
            })
        });
        let round_trips = load::round_trips(args.guest, guest, start, time);
        let loaded = load.join();
        done.store(true, Ordering::Relaxed);
        loaded.unwrap_or_else(|_| Err(std::io::Error::other("a client panicked"))).map_err(named)?;
        Ok(Timeline {
            killed_s: killed_s.and_then(|thread| thread.join().ok()),
            looks: looks.join().unwrap_or_default(),
            round_trips: round_trips.map_err(named)?,
        })
    })
}

fn load_of(guest: BenchGuest) -> Load {
    match guest {
        BenchGuest::Linux => Load::Redis("set", CONNECTIONS),
        BenchGuest::Bare => Load::Counter(CONNECTIONS),
    }
}

fn sample_pair(args: &BenchArgs, start: Instant, done: &AtomicBool) -> Vec<(f64, String, f64, u64)> {
    let mut looks = Vec::new();
    while !done.load(Ordering::Relaxed) {
        for control in &args.controls {
            // A replica that no longer runs is left out.
            if let Ok(status) = status(control) {
                looks.push((start.elapsed().as_secs_f64(), status.role, status.lag_ms, status.log_bytes));
            }
        }
        std::thread::sleep(STEP);
    }
    looks
}
