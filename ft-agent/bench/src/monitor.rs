//! What is measured from outside while a guest is loaded: the pair's status and the CPU time of processes.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::BenchError;

/// Ticks a second in `/proc` (`USER_HZ`).
const TICKS: f64 = 100.0;
/// Time between two readings of the lag. Each one wakes a thread on the primary's host, a cost that the unprotected side
/// does not have.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// The fields of a replica's status that are used here. Counts are since its start.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct StatusSample {
    /// `primary` or `backup`.
    pub role: String,
    /// `protected`, `alone`...
    pub phase: String,
    /// How far the backup's execution is behind the primary's, ms.
    pub lag_ms: f64,
    /// Bytes sent over the channel.
    pub log_bytes: u64,
    /// Outputs that have left.
    pub outputs_released: u64,
    /// Time accounting of the guest's thread, and counts of the channel's system calls.
    pub spent: Value,
}

/// Reads a replica's status on its control socket.
///
/// # Errors
/// The replica does not answer there.
pub fn status(control: &Path) -> io::Result<StatusSample> {
    let mut socket = UnixStream::connect(control)?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    socket.write_all(b"\"status\"\n")?;
    let mut line = String::new();
    BufReader::new(socket).read_line(&mut line)?;
    let mut reply: Value = serde_json::from_str(&line)?;
    Ok(serde_json::from_value(reply["status"].take())?)
}

/// CPU seconds that each of these processes has used, with all its threads, including those that have ended.
///
/// # Errors
/// A process does not exist.
pub fn cpu_s(pids: &[u32]) -> Result<Vec<f64>, BenchError> {
    pids.iter().map(|pid| process_cpu_s(*pid)).collect()
}

fn process_cpu_s(pid: u32) -> Result<f64, BenchError> {
    let of = |pid| clock_getcpuclockid(Pid::from_raw(pid)).and_then(clock_gettime);
    let time = of(pid as i32).map_err(|e| BenchError::Process { pid, source: e.into() })?;
    Ok(time.tv_sec() as f64 + time.tv_nsec() as f64 / 1e9)
}

/// CPU time of this host and of the processes that belong to the measurement, since the host's start, in s.
pub struct HostCpuTime {
    /// Taken from this host by the hypervisor that it runs on.
    stolen: f64,
    /// Used by programs in user mode.
    programs: f64,
    /// The part of `programs` that was used by the guests' processes and this process.
    own: f64,
    /// All CPU time of the host, idle or not.
    whole: f64,
}

/// Shares of the host's CPU time that went to neither the guests nor the benchmark.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Disturbance {
    /// Taken by the hypervisor that this host runs on.
    pub stolen: f64,
    /// Used by other programs on this host.
    pub others: f64,
}

/// A measurement with a larger share is repeated. The kernel counts programs' time in ticks, which is coarse.
const STOLEN_MAX: f64 = 0.02;
const OTHERS_MAX: f64 = 0.06;

impl Disturbance {
    /// The measurement has to be repeated.
    pub fn matters(&self) -> bool {
        self.stolen > STOLEN_MAX || self.others > OTHERS_MAX
    }
}

impl HostCpuTime {
    /// Reads the times so far; `own` are the guests' processes. If it is empty, all programs count as part of the
    /// measurement.
    ///
    /// # Errors
    /// `/proc` cannot be read.
    pub fn read(own: &[u32]) -> Result<HostCpuTime, BenchError> {
        let fields = |path: String| {
            let text = std::fs::read_to_string(&path);
            let text = text.map_err(|source| BenchError::File { path: path.into(), source })?;
            // A program's name may have spaces in it.
            let line = text.lines().next().unwrap_or_default();
            let line = line.rsplit(')').next().unwrap_or_default();
            Ok(line.split_whitespace().map(|n| n.parse().unwrap_or(0.0) / TICKS).collect::<Vec<f64>>())
        };
        let cpu = fields("/proc/stat".into())?;
        // "cpu", then user, nice, system, idle, iowait, irq, softirq, steal.
        let at = |n: usize| cpu.get(n).copied().unwrap_or(0.0);
        let programs = at(1) + at(2);
        let mut used = 0.0;
        for pid in own.iter().chain(&[std::process::id()]) {
            // utime is the 12th field after the name.
            used += fields(format!("/proc/{pid}/stat"))?.get(11).copied().unwrap_or(0.0);
        }
        let own = if own.is_empty() { programs } else { used };
        Ok(HostCpuTime { stolen: at(8), programs, own, whole: cpu.iter().take(9).sum() })
    }

    /// What others used since `before`.
    pub fn since(&self, before: &HostCpuTime) -> Disturbance {
        let whole = (self.whole - before.whole).max(1.0 / TICKS);
        let others = (self.programs - before.programs) - (self.own - before.own);
        Disturbance { stolen: (self.stolen - before.stolen) / whole, others: others.max(0.0) / whole }
    }
}

/// Runs `f` and samples the lag meanwhile, in ms.
pub fn lags_during<T>(control: Option<&PathBuf>, f: impl FnOnce() -> T) -> (T, Vec<f64>) {
    let Some(control) = control else { return (f(), Vec::new()) };
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let sampler = scope.spawn(|| {
            let mut lags = Vec::new();
            while !done.load(Ordering::Relaxed) {
                std::thread::sleep(LOOK_INTERVAL);
                lags.extend(status(control).map(|s| s.lag_ms));
            }
            lags
        });
        let result = f();
        done.store(true, Ordering::Relaxed);
        (result, sampler.join().unwrap_or_default())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_is_gone_is_named() {
        let myself = std::process::id();
        assert!(cpu_s(&[myself, myself]).unwrap()[1] > 0.0);
        let mut gone = std::process::Command::new("true").spawn().unwrap();
        gone.wait().unwrap();
        assert!(cpu_s(&[gone.id()]).unwrap_err().to_string().contains(&gone.id().to_string()));
    }

    #[test]
    fn what_others_use_is_seen() {
        let at = |stolen, programs, own, whole| HostCpuTime { stolen, programs, own, whole };
        let quiet = at(1.0, 52.0, 21.5, 102.0).since(&at(1.0, 50.0, 20.0, 100.0));
        assert_eq!((quiet.stolen, quiet.others), (0.0, 0.25));
        assert!(quiet.matters() && !Disturbance { stolen: 0.01, others: 0.01 }.matters());
        assert!(at(1.1, 0.0, 0.0, 2.0).since(&at(1.0, 0.0, 0.0, 0.0)).matters());
    }

    #[test]
    fn this_process_is_its_own() {
        let me = [];
        let before = HostCpuTime::read(&me).unwrap();
        let now = HostCpuTime::read(&me).unwrap();
        assert!(now.whole >= before.whole && before.whole > 0.0 && now.since(&before).others == 0.0);
    }
}
