//! What is looked at from outside while a guest is loaded: the pair's status and the processes' CPU time.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Error;

/// Of `/proc`, a second (`USER_HZ`).
const TICKS: f64 = 100.0;
/// Between two looks at the lag. Each costs the primary's host a thread's turn, which the other side has not.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// What the pair tells, of what is looked at here. Counts are since its start.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// `primary` or `backup`.
    pub role: String,
    /// `protected`, `alone`...
    pub phase: String,
    /// How far the backup is behind, ms.
    pub lag_ms: f64,
    /// Bytes of the channel.
    pub log_bytes: u64,
    /// Outputs that have left.
    pub outputs_released: u64,
    /// Where the time went.
    pub spent: Value,
}

/// Asks a replica on its control socket.
///
/// # Errors
/// Nobody answers there.
pub fn status(control: &Path) -> io::Result<Status> {
    let mut socket = UnixStream::connect(control)?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    socket.write_all(b"\"status\"\n")?;
    let mut line = String::new();
    BufReader::new(socket).read_line(&mut line)?;
    let mut reply: Value = serde_json::from_str(&line)?;
    Ok(serde_json::from_value(reply["status"].take())?)
}

/// CPU seconds that these processes have used, with all their threads, also those that have ended.
///
/// # Errors
/// One of them is gone.
pub fn cpu_s(pids: &[u32]) -> Result<Vec<f64>, Error> {
    pids.iter().map(|pid| process_cpu_s(*pid)).collect()
}

fn process_cpu_s(pid: u32) -> Result<f64, Error> {
    let of = |pid| clock_getcpuclockid(Pid::from_raw(pid)).and_then(clock_gettime);
    let time = of(pid as i32).map_err(|e| Error::Process { pid, source: e.into() })?;
    Ok(time.tv_sec() as f64 + time.tv_nsec() as f64 / 1e9)
}

/// CPU time of the machine and of those that belong to the measurement, so far. All in s.
pub struct Machine {
    /// Taken from this machine by what it runs on.
    stolen: f64,
    /// Spent by programs, without the kernel's own.
    programs: f64,
    /// Of that, by the guests' processes and this one.
    own: f64,
    /// All there was of it.
    whole: f64,
}

/// Shares of the machine's CPU time that others had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Disturbance {
    /// What this machine runs on.
    pub stolen: f64,
    /// Other programs on this machine.
    pub others: f64,
}

/// Above these shares a measurement is made again. The kernel counts programs' time by its ticks, and so roughly.
const STOLEN_MAX: f64 = 0.02;
const OTHERS_MAX: f64 = 0.06;

impl Disturbance {
    /// They had too much for a measurement.
    pub fn matters(&self) -> bool {
        self.stolen > STOLEN_MAX || self.others > OTHERS_MAX
    }
}

impl Machine {
    /// Looks, with these processes as those of the measurement. Without any it does not know what is its own, and says
    /// that nothing is anybody else's.
    ///
    /// # Errors
    /// `/proc` cannot be read.
    pub fn now(own: &[u32]) -> Result<Machine, Error> {
        let fields = |path: String| {
            let text = std::fs::read_to_string(&path);
            let text = text.map_err(|source| Error::File { path: path.into(), source })?;
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
            // Behind the name: utime is the 12th.
            used += fields(format!("/proc/{pid}/stat"))?.get(11).copied().unwrap_or(0.0);
        }
        let own = if own.is_empty() { programs } else { used };
        Ok(Machine { stolen: at(8), programs, own, whole: cpu.iter().take(9).sum() })
    }

    /// What others had since then.
    pub fn since(&self, before: &Machine) -> Disturbance {
        let whole = (self.whole - before.whole).max(1.0 / TICKS);
        let others = (self.programs - before.programs) - (self.own - before.own);
        Disturbance { stolen: (self.stolen - before.stolen) / whole, others: others.max(0.0) / whole }
    }
}

/// Samples of the lag while `f` runs, ms.
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
        let at = |stolen, programs, own, whole| Machine { stolen, programs, own, whole };
        let quiet = at(1.0, 52.0, 21.5, 102.0).since(&at(1.0, 50.0, 20.0, 100.0));
        assert_eq!((quiet.stolen, quiet.others), (0.0, 0.25));
        assert!(quiet.matters() && !Disturbance { stolen: 0.01, others: 0.01 }.matters());
        assert!(at(1.1, 0.0, 0.0, 2.0).since(&at(1.0, 0.0, 0.0, 0.0)).matters());
    }

    #[test]
    fn this_process_is_its_own() {
        let me = [];
        let before = Machine::now(&me).unwrap();
        let now = Machine::now(&me).unwrap();
        assert!(now.whole >= before.whole && before.whole > 0.0 && now.since(&before).others == 0.0);
    }
}
