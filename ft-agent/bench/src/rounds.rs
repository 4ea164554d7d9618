//! Rounds: each workload runs on both sides and on the other virtual machines, in random order.
//!
//! A round runs a workload on the two sides in the order A B B A or B A A B, so that a disturbance that grows or fades
//! meanwhile affects both equally. The order is chosen at random in one round, and the next round takes the other order.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::monitor::{Disturbance, HostCpuTime, StatusSample, cpu_s, lags_during, status};
use crate::stats::{Histogram, quantile};
use crate::workloads::{BenchGuest, Load, Workload};
use crate::{BenchArgs, BenchError, load};

/// Size in MiB of the file that the disk workloads read.
const DISK_FILE_MIB: u32 = 16;
/// At most this often a round's runs of a workload are repeated because other programs used the host.
const REPEATS: usize = 2;

/// One of the two guests that are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BenchSide {
    /// The guest without a backup.
    Unprotected,
    /// The guest of the pair.
    Protected,
}

impl BenchSide {
    fn other(self) -> BenchSide {
        match self {
            BenchSide::Unprotected => BenchSide::Protected,
            BenchSide::Protected => BenchSide::Unprotected,
        }
    }
}

/// One run of a workload on one side, or on another virtual machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BenchRun {
    /// Its round.
    pub round: usize,
    /// What was varied, as `name=value`; empty for the report's main table.
    pub setting: String,
    /// Name of the workload.
    pub workload: String,
    /// The side that it ran on.
    pub side: BenchSide,
    /// The other virtual machine that it ran on, if it did; `side` then means nothing.
    pub peer: Option<String>,
    /// Operations done, or bits moved.
    pub operations: f64,
    /// The time that they took, s.
    pub seconds: f64,
    /// Median latency, µs; 0 without latencies.
    pub p50_us: f64,
    /// 99th percentile of the latencies, µs; 0 without latencies.
    pub p99_us: f64,
    /// All latencies.
    pub latencies: Histogram,
    /// CPU seconds of the processes of the measured guests, and of the processes beyond them; empty when no processes are
    /// given.
    pub cpu_s: Vec<f64>,
    /// What the pair did, if its control sockets are given.
    pub pair: Option<PairRun>,
    /// How much other programs used the host during the round's runs of this workload.
    pub disturbance: Disturbance,
    /// It was repeated because of that, and does not count.
    pub repeated: bool,
}

/// What the pair did in a run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PairRun {
    /// Time from the first reading of its status to the last, s.
    pub seconds: f64,
    /// Bytes sent over the channel.
    pub log_bytes: u64,
    /// Outputs that left the gate.
    pub outputs: u64,
    /// Samples of the lag, ms.
    pub lags_ms: Vec<f64>,
    /// Time that the guest's thread spent on recording, ms.
    pub recording_ms: f64,
    /// Time that the guest's thread slept because the backup was too far behind, ms.
    pub slowed_ms: f64,
    /// Time that the guest's thread slept because the guest was idle, ms.
    pub idle_ms: f64,
    /// Sum of the times that outputs waited in the gate, ms.
    pub held_ms: f64,
    /// Writes to the channel.
    pub writes: f64,
    /// Reads from the channel.
    pub reads: f64,
}

impl BenchRun {
    /// Operations a second.
    pub fn rate(&self) -> f64 {
        self.operations / self.seconds
    }

    /// CPU seconds of the measured guests' processes for an operation.
    pub fn cpu_s_per_operation(&self) -> Option<f64> {
        Some(self.cpu_s.first()? / self.operations)
    }
}

/// Another virtual machine (QEMU, for instance) with the same guest, for comparison.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ComparisonVm {
    /// Its name in the report.
    pub name: String,
    /// Address of its guest.
    pub guest: IpAddr,
    /// Its process, which is stopped while it is not measured: it may use CPU time even when its guest is idle.
    pub pid: u32,
}

impl std::str::FromStr for ComparisonVm {
    type Err = String;

    /// `NAME=ADDRESS,PID`.
    fn from_str(text: &str) -> Result<ComparisonVm, String> {
        let parts = text.rsplit_once('=').and_then(|(name, rest)| Some((name, rest.rsplit_once(',')?)));
        let (name, (guest, pid)) = parts.ok_or("it is not NAME=ADDRESS,PID")?;
        let guest = guest.parse().map_err(|_| format!("{guest:?} is not an IP address"))?;
        let pid = pid.parse().map_err(|_| format!("{pid:?} is not a process id"))?;
        Ok(ComparisonVm { name: name.into(), guest, pid })
    }
}

impl ComparisonVm {
    /// Lets the process run while `f` runs, and stops it afterwards.
    fn while_running<T>(&self, f: impl FnOnce() -> Result<T, BenchError>) -> Result<T, BenchError> {
        let signal = |signal| {
            let pid = Pid::from_raw(self.pid as i32);
            kill(pid, signal).map_err(|e| BenchError::Process { pid: self.pid, source: e.into() })
        };
        signal(Signal::SIGCONT)?;
        let result = f();
        signal(Signal::SIGSTOP)?;
        result
    }
}

/// The guests that a run loads.
#[derive(Clone, Copy)]
struct RunTarget<'a> {
    side: BenchSide,
    peer: Option<&'a ComparisonVm>,
    guests: &'a [IpAddr],
    pids: &'a [u32],
}

impl RunTarget<'_> {
    fn side(args: &BenchArgs, side: BenchSide) -> RunTarget<'_> {
        let (guests, pids) = match side {
            BenchSide::Unprotected => (&args.unprotected, &args.unprotected_pids),
            BenchSide::Protected => (&args.protected, &args.protected_pids),
        };
        RunTarget { side, peer: None, guests, pids }
    }

    fn peer(peer: &ComparisonVm) -> RunTarget<'_> {
        let (guests, pids) = (std::slice::from_ref(&peer.guest), std::slice::from_ref(&peer.pid));
        RunTarget { side: BenchSide::Unprotected, peer: Some(peer), guests, pids }
    }
}

/// Starts the servers and makes the files that the workloads need in the guests, and runs each workload once, unmeasured.
///
/// # Errors
/// A guest does not answer.
pub fn prepare(args: &BenchArgs, wanted: &[&Workload]) -> Result<(), BenchError> {
    for guest in args.protected.iter().chain(&args.unprotected) {
        prepare_guest(args, wanted, *guest)?;
    }
    for workload in wanted.iter().filter(|w| w.load != Load::Idle) {
        for side in [BenchSide::Unprotected, BenchSide::Protected] {
            run(args, workload, RunTarget::side(args, side), 0, Duration::from_millis(50))?;
        }
    }
    for peer in &args.peers {
        peer.while_running(|| prepare_guest(args, &wanted_of_peer(wanted), peer.guest))?;
    }
    Ok(())
}

fn prepare_guest(args: &BenchArgs, wanted: &[&Workload], guest: IpAddr) -> Result<(), BenchError> {
    let named = |source| BenchError::Guest { what: guest.to_string(), source };
    if args.guest == BenchGuest::Linux {
        load::start_servers(guest).map_err(named)?;
    }
    if wanted.iter().any(|w| w.name.starts_with("disk")) {
        load::run_workload(args.guest, guest, "disk-write", DISK_FILE_MIB).map_err(named)?;
    }
    Ok(())
}

/// The workloads for other virtual machines: they have no disk, and what they do when idle is not of interest.
fn wanted_of_peer<'a>(wanted: &[&'a Workload]) -> Vec<&'a Workload> {
    wanted.iter().copied().filter(|w| !w.name.starts_with("disk") && w.load != Load::Idle).collect()
}

/// Runs a round.
///
/// # Errors
/// A guest does not answer.
pub fn round(args: &BenchArgs, wanted: &[&Workload], round: usize) -> Result<Vec<BenchRun>, BenchError> {
    let mut order = wanted.to_vec();
    fastrand::shuffle(&mut order);
    let mut runs = Vec::new();
    for workload in order {
        run_on_both_sides(args, workload, round, &mut runs)?;
        if !wanted_of_peer(&[workload]).is_empty() && round < args.peer_rounds {
            let mut peers: Vec<_> = args.peers.iter().collect();
            fastrand::shuffle(&mut peers);
            for peer in peers {
                let time = Duration::from_secs_f64(args.seconds);
                runs.push(peer.while_running(|| run(args, workload, RunTarget::peer(peer), round, time))?);
            }
        }
    }
    Ok(runs)
}

/// Runs a workload on both sides, and repeats that when other programs used the host meanwhile. Whether the runs are
/// repeated does not depend on their results.
fn run_on_both_sides(
    args: &BenchArgs,
    workload: &Workload,
    round: usize,
    runs: &mut Vec<BenchRun>,
) -> Result<(), BenchError> {
    let first = first_side(workload.name, round);
    let own: Vec<u32> = args.protected_pids.iter().chain(&args.unprotected_pids).copied().collect();
    for attempt in 0..=REPEATS {
        let before = HostCpuTime::read(&own)?;
        let begin = runs.len();
        for side in [first, first.other(), first.other(), first] {
            let time = Duration::from_secs_f64(args.seconds);
            runs.push(run(args, workload, RunTarget::side(args, side), round, time)?);
        }
        let disturbance = HostCpuTime::read(&own)?.since(&before);
        let repeated = disturbance.matters() && attempt < REPEATS;
        for run in &mut runs[begin..] {
            run.disturbance = disturbance;
            run.repeated = repeated;
        }
        if !repeated {
            break;
        }
    }
    Ok(())
}

/// The side that runs first. It is random in one round, and the other side in the next, also when rounds are added to a report
/// later.
fn first_side(workload: &str, round: usize) -> BenchSide {
    let seed = workload.bytes().fold(round as u64 / 2, |hash, byte| hash.wrapping_mul(31) + u64::from(byte));
    match fastrand::Rng::with_seed(seed).bool() ^ (round % 2 == 1) {
        true => BenchSide::Protected,
        false => BenchSide::Unprotected,
    }
}

fn run(
    args: &BenchArgs,
    workload: &Workload,
    target: RunTarget,
    round: usize,
    time: Duration,
) -> Result<BenchRun, BenchError> {
    let side = target.side;
    let control = args.controls.first().filter(|_| side == BenchSide::Protected);
    let before = control.map(|c| (Instant::now(), status(c)));
    let cpu_before = cpu_s(target.pids)?;
    let (outcome, lags_ms) = lags_during(control, || on_all(args, target, workload.load, time));
    let cpu_after = cpu_s(target.pids)?;
    let whose =
        target.peer.map_or_else(|| format!("the {side:?} side").to_lowercase(), |peer| peer.name.clone());
    let outcome = outcome
        .map_err(|source| BenchError::Guest { what: format!("of {whose} with {}", workload.name), source })?;
    let pair = match (control, before) {
        (Some(control), Some((begin, Ok(before)))) => status(control)
            .ok()
            .map(|after| PairRun::between(&before, &after, begin.elapsed().as_secs_f64(), lags_ms)),
        _ => None,
    };
    let mut sorted = outcome.latencies_us;
    sorted.sort_unstable();
    let cpu: Vec<f64> = cpu_after.iter().zip(&cpu_before).map(|(after, before)| after - before).collect();
    let (measured, beside) = cpu.split_at(args.counted.min(cpu.len()));
    Ok(BenchRun {
        round,
        setting: args.setting.clone(),
        workload: workload.name.into(),
        side,
        peer: target.peer.map(|peer| peer.name.clone()),
        operations: outcome.operations,
        seconds: outcome.seconds,
        p50_us: quantile(&sorted, 0.5),
        p99_us: quantile(&sorted, 0.99),
        latencies: Histogram::new(&sorted),
        cpu_s: [measured, beside].iter().filter(|cpu| !cpu.is_empty()).map(|cpu| cpu.iter().sum()).collect(),
        pair,
        disturbance: Disturbance::default(),
        repeated: false,
    })
}

/// Puts the same load on all guests at the same time; the result is that of the counted ones.
fn on_all(
    args: &BenchArgs,
    target: RunTarget,
    load: Load,
    time: Duration,
) -> std::io::Result<load::LoadResult> {
    std::thread::scope(|scope| {
        let client = |(n, guest): (usize, &IpAddr)| {
            let (guest, core) = (*guest, args.client_cores.get(n % args.client_cores.len().max(1)).copied());
            scope.spawn(move || {
                core.map_or(Ok(()), load::pin)?;
                load::run(args.guest, load, guest, time)
            })
        };
        let all: Vec<_> = target.guests.iter().enumerate().map(client).collect();
        let panicked = |_| Err(std::io::Error::other("a client panicked"));
        let mut outcomes = all.into_iter().map(|client| client.join().unwrap_or_else(panicked));
        let counted: Vec<_> = outcomes.by_ref().take(args.counted.max(1)).collect::<std::io::Result<_>>()?;
        outcomes.try_for_each(|outcome| outcome.map(drop))?;
        Ok(counted.into_iter().reduce(load::LoadResult::combine).unwrap_or_default())
    })
}

impl PairRun {
    fn between(before: &StatusSample, after: &StatusSample, seconds: f64, lags_ms: Vec<f64>) -> PairRun {
        let spent = |what: &str| {
            let ms = |status: &StatusSample| status.spent[what].as_f64().unwrap_or(0.0);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_side_is_first_as_often_as_the_other() {
        for workload in BenchGuest::Linux.workloads() {
            let firsts = (0..30).filter(|round| first_side(workload.name, *round) == BenchSide::Protected);
            assert_eq!(firsts.count(), 15, "{}", workload.name);
        }
        let names = BenchGuest::Linux.workloads();
        let firsts = names.iter().filter(|w| first_side(w.name, 0) == BenchSide::Protected).count();
        assert!((names.len() / 4..names.len() * 3 / 4).contains(&firsts), "{firsts} of {}", names.len());
    }

    #[test]
    fn peers_are_named() {
        let peer: ComparisonVm = "QEMU rr=record=10.0.0.9,77".parse().unwrap();
        assert_eq!(
            peer,
            ComparisonVm { name: "QEMU rr=record".into(), guest: [10, 0, 0, 9].into(), pid: 77 }
        );
        assert!("QEMU=10.0.0.9".parse::<ComparisonVm>().is_err());
        assert!("QEMU=10.0.0,9".parse::<ComparisonVm>().unwrap_err().contains("address"));
    }
}
