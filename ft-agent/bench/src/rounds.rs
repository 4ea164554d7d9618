//! Rounds: each workload once on both sides, one right after the other, in random order.

use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::stats::{Histogram, quantile};
use crate::watch::{Status, cpu_s, lags_during, status};
use crate::workloads::{Load, Workload};
use crate::{BenchArgs, Error, load};

/// Size in MiB of the file that the disk workloads read.
const DISK_FILE_MIB: u32 = 16;

/// Which guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// The one without a backup.
    Unprotected,
    /// The one of the pair.
    Protected,
}

/// One workload on one side.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Run {
    /// Its round.
    pub round: usize,
    /// Name of the workload.
    pub workload: String,
    /// On which side.
    pub side: Side,
    /// Operations done, or bits moved.
    pub operations: f64,
    /// In this time, s.
    pub seconds: f64,
    /// Median latency, µs; 0 without latencies.
    pub p50_us: f64,
    /// 99th percentile.
    pub p99_us: f64,
    /// All latencies.
    pub latencies: Histogram,
    /// CPU seconds of each process of the side: of the guest measured, then of the one beside it.
    pub cpu_s: Vec<f64>,
    /// What the pair did, where its control sockets are known.
    pub pair: Option<PairRun>,
}

/// What the pair did in a run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PairRun {
    /// Time from the first look at it to the last, s.
    pub seconds: f64,
    /// Bytes of the channel.
    pub log_bytes: u64,
    /// Outputs that left.
    pub outputs: u64,
    /// Samples of the lag, ms.
    pub lags_ms: Vec<f64>,
    /// Where the time of the guest's thread went, ms: recording, resting for the backup, idle.
    pub recording_ms: f64,
    /// See above.
    pub slowed_ms: f64,
    /// See above.
    pub idle_ms: f64,
    /// ms that outputs waited, summed.
    pub held_ms: f64,
    /// Writes to the channel, and reads from it.
    pub writes: f64,
    /// See above.
    pub reads: f64,
}

impl Run {
    /// Operations a second.
    pub fn rate(&self) -> f64 {
        self.operations / self.seconds
    }

    /// Of the process of the guest that is measured.
    pub fn cpu_s_per_operation(&self) -> Option<f64> {
        Some(self.cpu_s.first()? / self.operations)
    }
}

/// Guests of a side, the one that is measured first.
fn guests(args: &BenchArgs, side: Side) -> (&[IpAddr], &[u32]) {
    match side {
        Side::Unprotected => (&args.unprotected, &args.unprotected_pids),
        Side::Protected => (&args.protected, &args.protected_pids),
    }
}

/// Opens what the workloads need in the guests, and lets each workload run once, unmeasured.
///
/// # Errors
/// A guest does not answer.
pub fn prepare(args: &BenchArgs, wanted: &[&Workload]) -> Result<(), Error> {
    for guest in args.protected.iter().chain(&args.unprotected) {
        let named = |source| Error::Guest { what: guest.to_string(), source };
        load::start_servers(*guest).map_err(named)?;
        if wanted.iter().any(|w| w.name.starts_with("disk")) {
            load::work(*guest, "disk-write", DISK_FILE_MIB).map_err(named)?;
        }
    }
    for workload in wanted.iter().filter(|w| w.load != Load::Idle) {
        for side in [Side::Unprotected, Side::Protected] {
            run(args, workload, side, 0, Duration::from_millis(50))?;
        }
    }
    Ok(())
}

/// A round.
///
/// # Errors
/// A guest does not answer.
pub fn round(args: &BenchArgs, wanted: &[&Workload], round: usize) -> Result<Vec<Run>, Error> {
    let mut order = wanted.to_vec();
    fastrand::shuffle(&mut order);
    let mut runs = Vec::new();
    for workload in order {
        let mut sides = [Side::Unprotected, Side::Protected];
        fastrand::shuffle(&mut sides);
        for side in sides {
            runs.push(run(args, workload, side, round, Duration::from_secs_f64(args.seconds))?);
        }
    }
    Ok(runs)
}

fn run(
    args: &BenchArgs,
    workload: &Workload,
    side: Side,
    round: usize,
    time: Duration,
) -> Result<Run, Error> {
    let (guests, pids) = guests(args, side);
    let control = args.controls.first().filter(|_| side == Side::Protected);
    let before = control.map(|c| (std::time::Instant::now(), status(c)));
    let cpu_before = cpu_s(pids)?;
    let (outcome, lags_ms) = lags_during(control, || on_all(guests, workload.load, time));
    let cpu_after = cpu_s(pids)?;
    let outcome =
        outcome.map_err(|source| Error::Guest { what: format!("{}: {side:?}", workload.name), source })?;
    let pair = match (control, before) {
        (Some(control), Some((begin, Ok(before)))) => status(control)
            .ok()
            .map(|after| PairRun::between(&before, &after, begin.elapsed().as_secs_f64(), lags_ms)),
        _ => None,
    };
    let mut sorted = outcome.latencies_us;
    sorted.sort_unstable();
    Ok(Run {
        round,
        workload: workload.name.into(),
        side,
        operations: outcome.operations,
        seconds: outcome.seconds,
        p50_us: quantile(&sorted, 0.5),
        p99_us: quantile(&sorted, 0.99),
        latencies: Histogram::new(&sorted),
        cpu_s: cpu_after.iter().zip(&cpu_before).map(|(after, before)| after - before).collect(),
        pair,
    })
}

/// The same load on all guests at the same time; what the first one did counts.
fn on_all(guests: &[IpAddr], load: Load, time: Duration) -> std::io::Result<load::Outcome> {
    std::thread::scope(|scope| {
        let all: Vec<_> =
            guests.iter().map(|guest| scope.spawn(move || load::run(load, *guest, time))).collect();
        let panicked = |_| Err(std::io::Error::other("a client panicked"));
        let outcomes: Vec<_> = all.into_iter().map(|client| client.join().unwrap_or_else(panicked)).collect();
        let mut outcomes = outcomes.into_iter().collect::<std::io::Result<Vec<_>>>()?;
        Ok(outcomes.swap_remove(0))
    })
}

impl PairRun {
    fn between(before: &Status, after: &Status, seconds: f64, lags_ms: Vec<f64>) -> PairRun {
        let spent = |what: &str| {
            let ms = |status: &Status| status.spent[what].as_f64().unwrap_or(0.0);
            ms(after) - ms(before)
        };
        PairRun {
            seconds,
            log_bytes: after.log_bytes - before.log_bytes,
            outputs: after.outputs_released - before.outputs_released,
            lags_ms,
            recording_ms: spent("recording_ms"),
            slowed_ms: spent("slowed_ms"),
            idle_ms: spent("idle_ms"),
            held_ms: spent("held_ms"),
            writes: spent("writes"),
            reads: spent("reads"),
        }
    }
}
