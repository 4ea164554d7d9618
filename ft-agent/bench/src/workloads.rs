//! What the guests are given to do.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::Error;

/// Which of vmft's guests runs: they have different services.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Guest {
    /// Linux with redis and a web server.
    #[default]
    Linux,
    /// The bare-metal guest.
    Bare,
}

/// How a guest is loaded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Load {
    /// Commands of redis, one after the other on each of so many connections.
    Redis(&'static str, usize),
    /// Requests to the bare guest's counter, likewise.
    Counter(usize),
    /// One byte there and back.
    PingPong,
    /// One byte there and back so many times a second, whether or not the one before has come back.
    Paced(u32),
    /// Bulk TCP into the guest.
    Receive,
    /// Bulk TCP out of it.
    Transmit,
    /// A file of the web server, a connection each.
    Http(&'static str),
    /// A workload of the guest's own, of this size; an operation is one run of it.
    Work(&'static str, u32),
    /// Nothing.
    Idle,
}

/// A row of the report. The value of a run is operations a second, or Mbit/s.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// Its name in the report.
    pub name: &'static str,
    /// What is done.
    pub load: Load,
    /// What protected/unprotected shall be at least.
    pub bar: Option<f64>,
    /// What the paper of 2010 has for something like it, at its best.
    pub paper: Option<(f64, &'static str)>,
    /// A point of a curve: what grows, and where. Measured when it is named only.
    pub point: Option<(&'static str, f64)>,
}

const fn row(name: &'static str, load: Load, bar: Option<f64>) -> Workload {
    Workload { name, load, bar, paper: None, point: None }
}

const fn beside(mut workload: Workload, ratio: f64, what: &'static str) -> Workload {
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
    beside(row("redis set c50", Redis("set", 50), Some(0.92)), 0.94, "MS-SQL DVD Store"),
    row("redis get c1", Redis("get", 1), None),
    row("redis get c10", Redis("get", 10), None),
    beside(row("redis get c50", Redis("get", 50), Some(0.92)), 0.99, "Oracle Swingbench"),
    row("redis incr c1", Redis("incr", 1), None),
    row("redis incr c10", Redis("incr", 10), None),
    row("redis incr c50", Redis("incr", 50), Some(0.92)),
    row("ping-pong", PingPong, None),
    beside(row("tcp receive", Receive, Some(0.90)), 0.91, "netperf receive, 10 Gb/s"),
    beside(row("tcp transmit", Transmit, Some(0.95)), 0.99, "netperf transmit, 10 Gb/s"),
    beside(row("cpu loop", Work("loop", 2_000), Some(0.98)), 0.98, "SPECjbb2005"),
    row("cpu sha256", Work("sha256", 1), Some(0.98)),
    row("memory", Work("memory", 512), Some(0.98)),
    beside(row("kernel fork", Work("fork", 60), Some(0.98)), 0.95, "kernel compile"),
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
    beside(row("tcp receive", Receive, Some(0.90)), 0.91, "netperf receive, 10 Gb/s"),
    beside(row("tcp transmit", Transmit, Some(0.95)), 0.99, "netperf transmit, 10 Gb/s"),
    beside(row("cpu spin", Work("spin", 20_000_000), Some(0.98)), 0.98, "SPECjbb2005"),
    row("memory", Work("mem", 256), Some(0.98)),
    row("idle", Idle, None),
    point("packets 1000", PACKETS, 1000, Paced(1000)),
    point("packets 2000", PACKETS, 2000, Paced(2000)),
    point("packets 4000", PACKETS, 4000, Paced(4000)),
    point("packets 8000", PACKETS, 8000, Paced(8000)),
];

impl Guest {
    /// All that there is to do for it.
    pub fn workloads(self) -> &'static [Workload] {
        match self {
            Guest::Linux => LINUX,
            Guest::Bare => BARE,
        }
    }

    /// Those whose name begins with one of these; for none, all but the points of curves.
    ///
    /// # Errors
    /// No name begins so.
    pub fn select(self, only: &[String]) -> Result<Vec<&'static Workload>, Error> {
        let all = self.workloads();
        let named = |prefix: &str| all.iter().any(|w| w.name.starts_with(prefix));
        if let Some(wrong) = only.iter().find(|prefix| !named(prefix)) {
            let names: Vec<_> = all.iter().map(|w| w.name).collect();
            return Err(Error::Only(wrong.clone(), names.join(", ")));
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
            |only: &[&str]| Guest::Linux.select(&only.iter().map(|s| s.to_string()).collect::<Vec<_>>());
        assert_eq!(linux(&["redis set", "idle"]).unwrap().len(), 4);
        assert_eq!(linux(&["packets"]).unwrap().len(), 5);
        assert!(linux(&[]).unwrap().iter().all(|w| w.point.is_none()));
        assert!(linux(&["radis"]).unwrap_err().to_string().contains("radis"));
    }
}
