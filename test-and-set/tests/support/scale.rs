//! Memory, disk and restart with many VMs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use test_and_set::names::{Generation, Incarnation, VmName};
use test_and_set::record::Verdict;

use super::latency::open;
use super::{Cluster, client};

/// What many VMs cost one member.
pub struct ScaleReport {
    pub vms: usize,
    pub memory_kib: u64,
    pub data_kib: u64,
    pub registered_in: Duration,
    /// From the start of the process to its first verdict.
    pub restarted_in: Duration,
}

impl std::fmt::Display for ScaleReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { vms, memory_kib, data_kib, registered_in, restarted_in } = self;
        write!(
            f,
            "{vms} VMs registered in {registered_in:.1?}: memory {memory_kib} KiB, disk {data_kib} KiB, "
        )?;
        write!(f, "killed and restarted to the first verdict in {restarted_in:.2?}")
    }
}

/// Registers `vms` VMs with three members, then kills and restarts all members.
pub fn run(vms: usize) -> ScaleReport {
    let mut cluster = Cluster::start_with(3, &["--names-per-host", "1000000"]);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    let name =
        |i: usize| -> VmName { format!("tenant-{:03}.machine-{i:06}", i % 1000).parse().expect("a name") };
    let store = runtime.block_on(async { client(&cluster.url()) });
    let begun = Instant::now();
    let last: Incarnation = runtime.block_on(async {
        let mut workers = vec![];
        const WORKERS: usize = 64;
        for worker in 0..WORKERS {
            let store = store.clone();
            workers.push(tokio::spawn(async move {
                for i in (worker..vms - 1).step_by(WORKERS) {
                    open(&*store, &name(i)).await;
                }
            }));
        }
        for worker in workers {
            worker.await.expect("a worker");
        }
        open(&*store, &name(vms - 1)).await
    });
    let registered_in = begun.elapsed();
    let leader = cluster.leader();
    let pid = cluster.nodes[leader - 1].as_ref().expect("the leader").0.id();
    let memory_kib = super::hostile::memory_kib(pid, "VmRSS:");
    let row = cluster.status()[leader - 1]["answer"]["status"].clone();
    assert_eq!(row["vms"].as_u64(), Some(vms as u64));
    let data_kib = row["data_bytes"].as_u64().expect("a number") / 1024;
    (1..=3).for_each(|id| cluster.kill(id));
    let begun = Instant::now();
    (1..=3).for_each(|id| cluster.start_node(id));
    let store: Arc<_> = runtime.block_on(async { client(&cluster.url()) });
    let deadline = Instant::now() + Duration::from_secs(60);
    let verdict = runtime.block_on(store.take(&name(vms - 1), Generation::FIRST, last, deadline));
    assert!(matches!(verdict, Verdict::Won), "{verdict:?}");
    ScaleReport { vms, memory_kib, data_kib, registered_in, restarted_in: begun.elapsed() }
}
