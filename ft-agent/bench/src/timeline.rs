//! The pair over time, through the loss of its primary: log, lag, and the latency that a client sees.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::watch::status;
use crate::workloads::{Guest, Load};
use crate::{BenchArgs, Error, load};

/// Between two looks at the pair.
const STEP: Duration = Duration::from_millis(20);
/// Connections that load it.
const CONNECTIONS: usize = 10;

/// See the module. Times are in s from the start.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Timeline {
    /// When the primary was killed.
    pub killed_s: Option<f64>,
    /// Looks at the pair: time, role of who answered, lag in ms, bytes of its channel so far.
    pub looks: Vec<(f64, String, f64, u64)>,
    /// Byte after byte to the guest and back: when it left, and how long it took, ms.
    pub round_trips: Vec<(f64, f64)>,
}

/// Loads the protected guest and looks at it for so long.
///
/// # Errors
/// The guest was lost with its primary.
pub fn record(args: &BenchArgs, seconds: f64) -> Result<Timeline, Error> {
    let (start, time) = (Instant::now(), Duration::from_secs_f64(seconds));
    let guest = args.protected[0];
    let named = |source| Error::Guest { what: format!("{guest} through the timeline"), source };
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let looks = scope.spawn(|| look(args, start, &done));
        let load = scope.spawn(|| load::run(args.guest, load_of(args.guest), guest, time));
        let killed_s = args.kill.map(|pid| {
            scope.spawn(move || {
                std::thread::sleep(time / 2);
                // A primary that is gone already needs no killing; the round trips show it.
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

fn load_of(guest: Guest) -> Load {
    match guest {
        Guest::Linux => Load::Redis("set", CONNECTIONS),
        Guest::Bare => Load::Counter(CONNECTIONS),
    }
}

fn look(args: &BenchArgs, start: Instant, done: &AtomicBool) -> Vec<(f64, String, f64, u64)> {
    let mut looks = Vec::new();
    while !done.load(Ordering::Relaxed) {
        for control in &args.controls {
            // A side that is gone tells nothing.
            if let Ok(status) = status(control) {
                looks.push((start.elapsed().as_secs_f64(), status.role, status.lag_ms, status.log_bytes));
            }
        }
        std::thread::sleep(STEP);
    }
    looks
}
