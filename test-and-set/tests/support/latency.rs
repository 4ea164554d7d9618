//! The latency of verdicts: beside etcd's transactions, and after the leader was killed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use test_and_set::etcd::EtcdStore;
use test_and_set::names::{Generation, Incarnation, VmName};
use test_and_set::record::{Member, Members, Verdict};
use test_and_set::store::TestAndSet;

use super::{Cluster, Etcd, client};

/// Sorted durations.
pub struct Sample(Vec<Duration>);

impl Sample {
    pub fn new(mut took: Vec<Duration>) -> Self {
        took.sort();
        Self(took)
    }

    pub fn quantile(&self, part: f64) -> Duration {
        self.0[((self.0.len() - 1) as f64 * part).round() as usize]
    }
}

impl std::fmt::Display for Sample {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let us = |part| self.quantile(part).as_micros();
        write!(f, "p50 {} us, p99 {} us, max {} us of {}", us(0.5), us(0.99), us(1.0), self.0.len())
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

/// Three members that let a host open as many names as a measurement has verdicts.
fn many_names() -> Cluster {
    Cluster::start_with(3, &["--names-per-host", "1000000"])
}

/// Opens a VM, so that it can be taken.
pub async fn open(store: &dyn TestAndSet, vm: &VmName) -> Incarnation {
    let who = Incarnation::random();
    let members = Members { primary: Member::new(who), backup: Some(Member::new(Incarnation::random())) };
    store.open(vm, Generation::FIRST, &members, soon()).await.expect("open");
    who
}

/// Takes a generation; returns how long the verdict took.
async fn timed_take(store: &dyn TestAndSet, vm: &VmName, who: Incarnation) -> Duration {
    let asked = Instant::now();
    let verdict = store.take(vm, Generation::FIRST, who, soon()).await;
    assert!(matches!(verdict, Verdict::Won), "{verdict:?}");
    asked.elapsed()
}

/// Sets a new key of etcd, in one transaction, to as many bytes as a record has; returns how long that took.
async fn timed_transaction(etcd: &EtcdStore, vm: &VmName) -> Duration {
    let asked = Instant::now();
    // `false` is possible: a repeated transaction may find what it wrote before.
    etcd.compare_and_put(vm, vec![7; 60], 0, soon()).await.expect("a transaction");
    asked.elapsed()
}

/// A client of the etcd node that answers fastest, usually the leader.
async fn fastest(etcd: &Etcd) -> EtcdStore {
    let mut best: Option<(Duration, EtcdStore)> = None;
    for i in 0..etcd.clients.len() {
        let store = etcd.client_of(i);
        let mut took = vec![];
        for n in 0..300 {
            took.push(timed_transaction(&store, &format!("warm-{i}-{n}").parse().expect("a name")).await);
        }
        let median = Sample::new(took).quantile(0.5);
        if best.as_ref().is_none_or(|(least, _)| median < *least) {
            best = Some((median, store));
        }
    }
    best.expect("a node").1
}

/// A busy thread for each CPU, at the caller's priority, until this is dropped.
struct Load(Arc<AtomicBool>);

impl Load {
    fn start() -> Self {
        let load = Self(Arc::new(AtomicBool::new(true)));
        for _ in 0..std::thread::available_parallelism().map_or(1, |cpus| cpus.get()) {
            let lasts = load.0.clone();
            std::thread::spawn(move || while lasts.load(Relaxed) {});
        }
        load
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.0.store(false, Relaxed);
    }
}

/// The result of [`beside_etcd`].
pub struct Beside {
    /// Verdicts of three of our members, with mutual TLS.
    pub ours: Sample,
    /// Transactions of three of etcd's members, without TLS.
    pub plain: Sample,
    /// Transactions of three of etcd's members with mutual TLS.
    pub with_tls: Sample,
}

/// Measures verdicts and etcd's transactions, alternately 100 of each, from one thread on one machine, with a load if wanted.
pub fn beside_etcd(verdicts: usize, is_loaded: bool) -> Beside {
    let (cluster, plain, with_tls) = (many_names(), Etcd::start(3), Etcd::start_with_tls(3));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let ours = client(&cluster.url());
        let etcd = [fastest(&plain).await, fastest(&with_tls).await];
        let (mut took, mut beside) = (vec![], [vec![], vec![]]);
        let _load = is_loaded.then(Load::start);
        for turn in 0..verdicts.div_ceil(100) {
            let vms: Vec<VmName> =
                (0..100).map(|i| format!("vm-{turn}-{i}").parse().expect("a name")).collect();
            let mut opened = vec![];
            for vm in &vms {
                opened.push(open(&*ours, vm).await);
            }
            for (vm, who) in vms.iter().zip(opened) {
                took.push(timed_take(&*ours, vm, who).await);
            }
            for (etcd, beside) in etcd.iter().zip(&mut beside) {
                for vm in &vms {
                    beside.push(timed_transaction(etcd, vm).await);
                }
            }
        }
        let [plain, with_tls] = beside.map(Sample::new);
        Beside { ours: Sample::new(took), plain, with_tls }
    })
}

/// Kills the leader again and again; returns how long the next verdict took, requested at once on an open connection.
pub fn failover(kills: usize) -> Sample {
    let mut cluster = many_names();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    let store = runtime.block_on(async { client(&cluster.url()) });
    let mut took = vec![];
    for kill in 0..kills {
        let vm: VmName = format!("vm-{kill}").parse().expect("a name");
        let who = runtime.block_on(open(&*store, &vm));
        let leader = cluster.leader();
        cluster.kill(leader);
        took.push(runtime.block_on(timed_take(&*store, &vm, who)));
        cluster.start_node(leader);
        // Another kill before the member is back would leave no majority.
        super::wait_for("caught up member", || {
            let status = cluster.status();
            let all: Vec<_> = status
                .as_array()?
                .iter()
                .map(|row| row["answer"]["status"]["applied_index"].as_u64())
                .collect();
            (all[0].is_some() && all.iter().all(|index| *index == all[0])).then_some(())
        });
    }
    Sample::new(took)
}
