//! What the guests are given to do.

use crate::Error;

/// How a guest is loaded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Load {
    /// Commands of redis, one after the other on each of so many connections.
    Redis(&'static str, usize),
    /// One byte there and back.
    PingPong,
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
}

const fn row(name: &'static str, load: Load, bar: Option<f64>) -> Workload {
    Workload { name, load, bar, paper: None }
}

const fn beside(mut workload: Workload, ratio: f64, what: &'static str) -> Workload {
    workload.paper = Some((ratio, what));
    workload
}

use Load::{Http, Idle, PingPong, Receive, Redis, Transmit, Work};

/// All there are.
pub const WORKLOADS: &[Workload] = &[
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
];

/// Those whose name begins with one of these; all for none.
///
/// # Errors
/// No name begins so.
pub fn select(only: &[String]) -> Result<Vec<&'static Workload>, Error> {
    let named = |prefix: &str| WORKLOADS.iter().any(|w| w.name.starts_with(prefix));
    if let Some(wrong) = only.iter().find(|prefix| !named(prefix)) {
        let names: Vec<_> = WORKLOADS.iter().map(|w| w.name).collect();
        return Err(Error::Only(wrong.clone(), names.join(", ")));
    }
    let wanted = |w: &&Workload| only.is_empty() || only.iter().any(|prefix| w.name.starts_with(prefix));
    Ok(WORKLOADS.iter().filter(wanted).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_selected_by_their_beginning() {
        assert_eq!(select(&["redis set".into(), "idle".into()]).unwrap().len(), 4);
        assert_eq!(select(&[]).unwrap().len(), WORKLOADS.len());
        assert!(select(&["radis".into()]).unwrap_err().to_string().contains("radis"));
    }
}
