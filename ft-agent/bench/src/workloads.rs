//! The workloads: what the guests are given to do.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::BenchError;

/// Which of vmft's guests runs; they have different services.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BenchGuest {
    /// Linux with redis and a web server.
    #[default]
    Linux,
    /// The bare-metal guest.
    Bare,
}

/// The kind of load that a client puts on a guest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Load {
    /// A redis command, repeated on each of this many connections.
    Redis(&'static str, usize),
    /// Requests to the bare guest's counter, repeated on each of this many connections.
    Counter(usize),
    /// One byte to the guest and back.
    PingPong,
    /// One byte to the guest and back this many times a second, whether or not the byte before has come back.
    Paced(u32),
    /// Bulk TCP into the guest.
    Receive,
    /// Bulk TCP out of the guest.
    Transmit,
    /// A file of the web server, each time on a new connection.
    Http(&'static str),
    /// One of the guest's own workloads, of this size; an operation is one run of it.
    Work(&'static str, u32),
    /// No load.
    Idle,
}

/// A workload, which is a row of the report. Its value is in operations a second, or in Mbit/s.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// Its name in the report.
    pub name: &'static str,
    /// The load.
    pub load: Load,
    /// The ratio protected/unprotected has to be at least this.
    pub bar: Option<f64>,
    /// The best ratio that the paper of 2010 gives for a similar workload, and that workload.
    pub paper: Option<(f64, &'static str)>,
    /// For a point of a curve, the axis and the value on it. Such workloads are measured only when `--only` names them.
    pub point: Option<(&'static str, f64)>,
}

const fn row(name: &'static str, load: Load, bar: Option<f64>) -> Workload {
    Workload { name, load, bar, paper: None, point: None }
}

const fn with_paper(mut workload: Workload, ratio: f64, what: &'static str) -> Workload {
    workload.paper = Some((ratio, what));
    workload
}

const fn point(name: &'static str, axis: &'static str, at: u32, load: Load) -> Workload {
    Workload { point: Some((axis, at as f64)), ..row(name, load, None) }
}

use Load::{Counter, Http, Idle, Paced, PingPong, Receive, Redis, Transmit, Work};

const CONNECTIONS: &str = "connections";
const PACKETS: &str = "packets a second each way";

const LINUX: &[Workload] = &[
    row("redis set c1", Redis("set", 1), None),
    row("redis set c10", Redis("set", 10), None),
    with_paper(row("redis set c50", Redis("set", 50), Some(0.92)), 0.94, "MS-SQL DVD Store"),
    row("redis get c1", Redis("get", 1), None),
    row("redis get c10", Redis("get", 10), None),
    with_paper(row("redis get c50", Redis("get", 50), Some(0.92)), 0.99, "Oracle Swingbench"),
    row("redis incr c1", Redis("incr", 1), None),
    row("redis incr c10", Redis("incr", 10), None),
    row("redis incr c50", Redis("incr", 50), Some(0.92)),
    row("ping-pong", PingPong, None),
    with_paper(row("tcp receive", Receive, Some(0.90)), 0.91, "netperf receive, 10 Gb/s"),
    with_paper(row("tcp transmit", Transmit, Some(0.95)), 0.99, "netperf transmit, 10 Gb/s"),
    with_paper(row("cpu loop", Work("loop", 2_000), Some(0.98)), 0.98, "SPECjbb2005"),
    row("cpu sha256", Work("sha256", 1), Some(0.98)),
    row("memory", Work("memory", 512), Some(0.98)),
    with_paper(row("kernel fork", Work("fork", 60), Some(0.98)), 0.95, "kernel compile"),
    row("kernel pipe", Work("pipe", 48), Some(0.98)),
    row("kernel files", Work("files", 300), Some(0.98)),
    row("disk write", Work("disk-write", 16), Some(0.95)),
    row("disk read", Work("disk-read", 16), Some(0.95)),
    row("disk random", Work("disk-random", 60), Some(0.95)),
    row("disk sync", Work("disk-sync", 30), Some(0.95)),
    row("http small", Http("/index.html"), None),
    row("http large", Http("/16M"), None),
    row("idle", Idle, None),
    point("connections 1", CONNECTIONS, 1, Redis("set", 1)),
    point("connections 3", CONNECTIONS, 3, Redis("set", 3)),
    point("connections 10", CONNECTIONS, 10, Redis("set", 10)),
    point("connections 30", CONNECTIONS, 30, Redis("set", 30)),
    point("connections 100", CONNECTIONS, 100, Redis("set", 100)),
    point("packets 250", PACKETS, 250, Paced(250)),
    point("packets 500", PACKETS, 500, Paced(500)),
    point("packets 1000", PACKETS, 1000, Paced(1000)),
    point("packets 2000", PACKETS, 2000, Paced(2000)),
    point("packets 4000", PACKETS, 4000, Paced(4000)),
];

const BARE: &[Workload] = &[
    row("counter c1", Counter(1), None),
    row("counter c10", Counter(10), None),
    row("counter c30", Counter(30), Some(0.92)),
    row("counter c50", Counter(50), Some(0.92)),
    row("ping-pong", PingPong, None),
    with_paper(row("tcp receive", Receive, Some(0.90)), 0.91, "netperf receive, 10 Gb/s"),
    with_paper(row("tcp transmit", Transmit, Some(0.95)), 0.99, "netperf transmit, 10 Gb/s"),
    with_paper(row("cpu spin", Work("spin", 20_000_000), Some(0.98)), 0.98, "SPECjbb2005"),
    row("memory", Work("mem", 256), Some(0.98)),
    row("idle", Idle, None),
    point("packets 1000", PACKETS, 1000, Paced(1000)),
    point("packets 2000", PACKETS, 2000, Paced(2000)),
    point("packets 4000", PACKETS, 4000, Paced(4000)),
    point("packets 8000", PACKETS, 8000, Paced(8000)),
];

impl BenchGuest {
    /// All workloads for this guest.
    pub fn workloads(self) -> &'static [Workload] {
        match self {
            BenchGuest::Linux => LINUX,
            BenchGuest::Bare => BARE,
        }
    }

    /// The workloads whose names begin with one of `only`; if that is empty, all but the points of curves.
    ///
    /// # Errors
    /// An element of `only` matches no name.
    pub fn select(self, only: &[String]) -> Result<Vec<&'static Workload>, BenchError> {
        let all = self.workloads();
        let named = |prefix: &str| all.iter().any(|w| w.name.starts_with(prefix));
        if let Some(wrong) = only.iter().find(|prefix| !named(prefix)) {
            let names: Vec<_> = all.iter().map(|w| w.name).collect();
            return Err(BenchError::Only(wrong.clone(), names.join(", ")));
        }
        let wanted = |w: &&Workload| match only {
            [] => w.point.is_none(),
            only => only.iter().any(|prefix| w.name.starts_with(prefix)),
        };
        Ok(all.iter().filter(wanted).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_selected_by_their_beginning() {
        let linux =
            |only: &[&str]| BenchGuest::Linux.select(&only.iter().map(|s| s.to_string()).collect::<Vec<_>>());
        assert_eq!(linux(&["redis set", "idle"]).unwrap().len(), 4);
        assert_eq!(linux(&["packets"]).unwrap().len(), 5);
        assert!(linux(&[]).unwrap().iter().all(|w| w.point.is_none()));
        assert!(linux(&["radis"]).unwrap_err().to_string().contains("radis"));
    }
}
