//! The counters of a member, and their text for Prometheus.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::server::raft::RaftView;

/// The upper bounds of the buckets, in microseconds: each is √2 times the one before, so a quantile is exact to that factor.
const BUCKETS_US: [u64; 30] = [
    50, 71, 100, 141, 200, 283, 400, 566, 800, 1131, 1600, 2263, 3200, 4525, 6400, 9051, 12800, 18102, 25600,
    36204, 51200, 72408, 102400, 144815, 204800, 289631, 409600, 579262, 819200, 1158524,
];

/// A histogram of durations since the process started.
#[derive(Debug, Default)]
pub struct LatencyHistogram {
    buckets: [AtomicU64; BUCKETS_US.len()],
    count: AtomicU64,
    sum_us: AtomicU64,
}

impl LatencyHistogram {
    /// Adds a duration.
    pub fn add(&self, took: Duration) {
        let us = took.as_micros().try_into().unwrap_or(u64::MAX);
        if let Some(bucket) = BUCKETS_US.iter().position(|end| us <= *end) {
            self.buckets[bucket].fetch_add(1, Relaxed);
        }
        self.sum_us.fetch_add(us, Relaxed);
        self.count.fetch_add(1, Relaxed);
    }

    /// The number of durations added.
    pub fn count(&self) -> u64 {
        self.count.load(Relaxed)
    }

    /// The upper bound, in microseconds, of the first bucket at or below which this part of all durations lies; 0 if there are none.
    pub fn quantile_us(&self, part: f64) -> u64 {
        let wanted = (self.count() as f64 * part).ceil() as u64;
        let mut seen = 0;
        for (bucket, end) in self.buckets.iter().zip(BUCKETS_US) {
            seen += bucket.load(Relaxed);
            if seen >= wanted {
                return if wanted == 0 { 0 } else { end };
            }
        }
        u64::MAX
    }
}

/// The counters of a member.
#[derive(Debug, Default)]
pub struct NodeStats {
    /// Commands that this member applied as the leader.
    pub commands: LatencyHistogram,
    /// Linearizable reads that this member answered.
    pub reads: LatencyHistogram,
    /// Requests that could not be answered.
    pub failures: AtomicU64,
    /// Open connections.
    pub connections: AtomicU64,
    /// Connections that were refused, or closed because of invalid bytes.
    pub connections_faulty: AtomicU64,
}

impl NodeStats {
    /// The Prometheus text format, version 0.0.4.
    pub fn prometheus(&self, view: &RaftView, free_bytes: u64, data_bytes: u64) -> String {
        let mut out = String::new();
        let mut value = |name: &str, kind: &str, help: &str, value: u64| {
            write!(
                out,
                "# HELP vmft_store_{name} {help}\n# TYPE vmft_store_{name} {kind}\nvmft_store_{name} {value}\n"
            )
        };
        let done = value("is_leader", "gauge", "Whether this node leads.", u64::from(view.role == "leader"))
            .and(value(
                "has_leader",
                "gauge",
                "Whether this node knows a leader.",
                u64::from(view.leader.is_some()),
            ))
            .and(value("term", "gauge", "The Raft term.", view.term))
            .and(value("members", "gauge", "Members of the cluster.", view.members.len() as u64))
            .and(value("last_log_index", "gauge", "Last index in the log.", view.last_log_index.unwrap_or(0)))
            .and(value("applied_index", "gauge", "Last index applied.", view.applied_index.unwrap_or(0)))
            .and(value(
                "snapshot_index",
                "gauge",
                "Last index in the snapshot.",
                view.snapshot_index.unwrap_or(0),
            ))
            .and(value("vms", "gauge", "VMs known, the forgotten ones included.", view.vms))
            .and(value("disk_free_bytes", "gauge", "Free bytes on the disk of the data.", free_bytes))
            .and(value("data_bytes", "gauge", "Bytes of the data files.", data_bytes))
            .and(value("connections", "gauge", "Open connections.", self.connections.load(Relaxed)))
            .and(value(
                "connections_faulty_total",
                "counter",
                "Connections refused, or closed because of invalid bytes.",
                self.connections_faulty.load(Relaxed),
            ))
            .and(value(
                "failures_total",
                "counter",
                "Requests that could not be answered.",
                self.failures.load(Relaxed),
            ))
            .and(value(
                "log_lines_missing_total",
                "counter",
                "Lines that standard error did not take.",
                host_log::lines_missing(),
            ))
            .and(histogram(&mut out, "command_seconds", "Commands applied as the leader.", &self.commands))
            .and(histogram(&mut out, "read_seconds", "Linearizable reads.", &self.reads));
        // Writing to a String cannot fail.
        debug_assert!(done.is_ok());
        out
    }
}

fn histogram(out: &mut String, name: &str, help: &str, latency: &LatencyHistogram) -> std::fmt::Result {
    write!(out, "# HELP vmft_store_{name} {help}\n# TYPE vmft_store_{name} histogram\n")?;
    let mut seen = 0;
    for (bucket, end) in latency.buckets.iter().zip(BUCKETS_US) {
        seen += bucket.load(Relaxed);
        writeln!(out, "vmft_store_{name}_bucket{{le=\"{}\"}} {seen}", end as f64 / 1e6)?;
    }
    let (count, sum) = (latency.count().max(seen), latency.sum_us.load(Relaxed) as f64 / 1e6);
    writeln!(out, "vmft_store_{name}_bucket{{le=\"+Inf\"}} {count}")?;
    writeln!(out, "vmft_store_{name}_sum {sum}\nvmft_store_{name}_count {count}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_the_ends_of_buckets() {
        let latency = LatencyHistogram::default();
        assert_eq!(latency.quantile_us(0.5), 0);
        (0..99).for_each(|_| latency.add(Duration::from_micros(60)));
        latency.add(Duration::from_micros(900));
        assert_eq!(
            (latency.quantile_us(0.5), latency.quantile_us(0.99), latency.quantile_us(1.0)),
            (71, 71, 1131)
        );
    }
}
