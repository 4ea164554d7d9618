//! Rounds: each workload on both sides and on the peers, in random order.
//!
//! A round's runs of a workload on the two sides come in the order A B B A or B A A B, so that what grows or fades over
//! them falls on both alike. Which of the two is a matter of chance in one round, and the other one in the next.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::stats::{Histogram, quantile};
use crate::watch::{Disturbance, Machine, Status, cpu_s, lags_during, status};
use crate::workloads::{Guest, Load, Workload};
use crate::{BenchArgs, Error, load};

/// Size in MiB of the file that the disk workloads read.
const DISK_FILE_MIB: u32 = 16;
/// How often a round's runs of a workload are made again because the machine was disturbed.
const REPEATS: usize = 2;

/// Which guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// The one without a backup.
    Unprotected,
    /// The one of the pair.
    Protected,
}

impl Side {
    fn other(self) -> Side {
        match self {
            Side::Unprotected => Side::Protected,
            Side::Protected => Side::Unprotected,
        }
    }
}

/// One workload on one side.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Run {
    /// Its round.
    pub round: usize,
    /// What was varied, as `name=value`; empty for the report's own rows.
    pub setting: String,
    /// Name of the workload.
    pub workload: String,
    /// On which side.
    pub side: Side,
    /// Or on which peer; it has no side then.
    pub peer: Option<String>,
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
    /// CPU seconds of the processes of the guests measured, and of those beside them; empty when they are not known.
    pub cpu_s: Vec<f64>,
    /// What the pair did, where its control sockets are known.
    pub pair: Option<PairRun>,
    /// What others did with the machine during the round's runs of this workload.
    pub disturbance: Disturbance,
    /// It was made again because of that, and does not count.
    pub repeated: bool,
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

    /// Of the processes of the guests that are measured.
    pub fn cpu_s_per_operation(&self) -> Option<f64> {
        Some(self.cpu_s.first()? / self.operations)
    }
}

/// Another machine with the same guest in it, for comparison.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its name in the report.
    pub name: String,
    /// Its guest.
    pub guest: IpAddr,
    /// Its process; it is stopped while it is not measured, for it may use a CPU even when it is idle.
    pub pid: u32,
}

impl std::str::FromStr for Peer {
    type Err = String;

    /// `NAME=ADDRESS,PID`.
    fn from_str(text: &str) -> Result<Peer, String> {
        let parts = text.rsplit_once('=').and_then(|(name, rest)| Some((name, rest.rsplit_once(',')?)));
        let (name, (guest, pid)) = parts.ok_or("it is not NAME=ADDRESS,PID")?;
        let guest = guest.parse().map_err(|_| format!("{guest:?} is no address"))?;
        let pid = pid.parse().map_err(|_| format!("{pid:?} is no process"))?;
        Ok(Peer { name: name.into(), guest, pid })
    }
}

impl Peer {
    /// Lets it run while `f` does.
    fn awake<T>(&self, f: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
        let signal = |signal| {
            let pid = Pid::from_raw(self.pid as i32);
            kill(pid, signal).map_err(|e| Error::Guest { what: self.name.clone(), source: e.into() })
        };
        signal(Signal::SIGCONT)?;
        let result = f();
        signal(Signal::SIGSTOP)?;
        result
    }
}

/// What one run is made on.
#[derive(Clone, Copy)]
struct Target<'a> {
    side: Side,
    peer: Option<&'a Peer>,
    guests: &'a [IpAddr],
    pids: &'a [u32],
}

impl Target<'_> {
    fn side(args: &BenchArgs, side: Side) -> Target<'_> {
        let (guests, pids) = match side {
            Side::Unprotected => (&args.unprotected, &args.unprotected_pids),
            Side::Protected => (&args.protected, &args.protected_pids),
        };
        Target { side, peer: None, guests, pids }
    }

    fn peer(peer: &Peer) -> Target<'_> {
        let (guests, pids) = (std::slice::from_ref(&peer.guest), std::slice::from_ref(&peer.pid));
        Target { side: Side::Unprotected, peer: Some(peer), guests, pids }
    }
}

/// Opens what the workloads need in the guests, and lets each workload run once, unmeasured.
///
/// # Errors
/// A guest does not answer.
pub fn prepare(args: &BenchArgs, wanted: &[&Workload]) -> Result<(), Error> {
    for guest in args.protected.iter().chain(&args.unprotected) {
        prepare_guest(args, wanted, *guest)?;
    }
    for workload in wanted.iter().filter(|w| w.load != Load::Idle) {
        for side in [Side::Unprotected, Side::Protected] {
            run(args, workload, Target::side(args, side), 0, Duration::from_millis(50))?;
        }
    }
    for peer in &args.peers {
        peer.awake(|| prepare_guest(args, &wanted_of_peer(wanted), peer.guest))?;
    }
    Ok(())
}

fn prepare_guest(args: &BenchArgs, wanted: &[&Workload], guest: IpAddr) -> Result<(), Error> {
    let named = |source| Error::Guest { what: guest.to_string(), source };
    if args.guest == Guest::Linux {
        load::start_servers(guest).map_err(named)?;
    }
    if wanted.iter().any(|w| w.name.starts_with("disk")) {
        load::work(args.guest, guest, "disk-write", DISK_FILE_MIB).map_err(named)?;
    }
    Ok(())
}

/// Peers have no disk, and their idling is their own matter.
fn wanted_of_peer<'a>(wanted: &[&'a Workload]) -> Vec<&'a Workload> {
    wanted.iter().copied().filter(|w| !w.name.starts_with("disk") && w.load != Load::Idle).collect()
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
        sides(args, workload, round, &mut runs)?;
        if !wanted_of_peer(&[workload]).is_empty() && round < args.peer_rounds {
            let mut peers: Vec<_> = args.peers.iter().collect();
            fastrand::shuffle(&mut peers);
            for peer in peers {
                let time = Duration::from_secs_f64(args.seconds);
                runs.push(peer.awake(|| run(args, workload, Target::peer(peer), round, time))?);
            }
        }
    }
    Ok(runs)
}

/// The runs of a workload on both sides, again when others used the machine meanwhile. Whether they are made again does
/// not depend on how they went.
fn sides(args: &BenchArgs, workload: &Workload, round: usize, runs: &mut Vec<Run>) -> Result<(), Error> {
    let first = first_side(workload.name, round);
    let own: Vec<u32> = args.protected_pids.iter().chain(&args.unprotected_pids).copied().collect();
    for attempt in 0..=REPEATS {
        let before = Machine::now(&own)?;
        let begin = runs.len();
        for side in [first, first.other(), first.other(), first] {
            let time = Duration::from_secs_f64(args.seconds);
            runs.push(run(args, workload, Target::side(args, side), round, time)?);
        }
        let disturbance = Machine::now(&own)?.since(&before);
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

/// By chance, and the other one in every second round, also when rounds are added to a report later.
fn first_side(workload: &str, round: usize) -> Side {
    let seed = workload.bytes().fold(round as u64 / 2, |hash, byte| hash.wrapping_mul(31) + u64::from(byte));
    match fastrand::Rng::with_seed(seed).bool() ^ (round % 2 == 1) {
        true => Side::Protected,
        false => Side::Unprotected,
    }
}

fn run(
    args: &BenchArgs,
    workload: &Workload,
    target: Target,
    round: usize,
    time: Duration,
) -> Result<Run, Error> {
    let side = target.side;
    let control = args.controls.first().filter(|_| side == Side::Protected);
    let before = control.map(|c| (Instant::now(), status(c)));
    let cpu_before = cpu_s(target.pids)?;
    let (outcome, lags_ms) = lags_during(control, || on_all(args, target, workload.load, time));
    let cpu_after = cpu_s(target.pids)?;
    let whose = target.peer.map_or_else(|| format!("{side:?}"), |peer| peer.name.clone());
    let outcome =
        outcome.map_err(|source| Error::Guest { what: format!("{}: {whose}", workload.name), source })?;
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
    Ok(Run {
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

/// The same load on all guests at the same time; what the counted ones did is the result.
fn on_all(args: &BenchArgs, target: Target, load: Load, time: Duration) -> std::io::Result<load::Outcome> {
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
        Ok(counted.into_iter().reduce(load::Outcome::beside).unwrap_or_default())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_side_is_first_as_often_as_the_other() {
        for workload in Guest::Linux.workloads() {
            let firsts = (0..30).filter(|round| first_side(workload.name, *round) == Side::Protected);
            assert_eq!(firsts.count(), 15, "{}", workload.name);
        }
        let names = Guest::Linux.workloads();
        let firsts = names.iter().filter(|w| first_side(w.name, 0) == Side::Protected).count();
        assert!((names.len() / 4..names.len() * 3 / 4).contains(&firsts), "{firsts} of {}", names.len());
    }

    #[test]
    fn peers_are_named() {
        let peer: Peer = "QEMU rr=record=10.0.0.9,77".parse().unwrap();
        assert_eq!(peer, Peer { name: "QEMU rr=record".into(), guest: [10, 0, 0, 9].into(), pid: 77 });
        assert!("QEMU=10.0.0.9".parse::<Peer>().is_err());
        assert!("QEMU=10.0.0,9".parse::<Peer>().unwrap_err().contains("address"));
    }
}
