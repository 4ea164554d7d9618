//! Runs the conformance suite for every store. A store that is not installed is ignored, with the reason in the test's name.

mod support;

use std::sync::Arc;

use libtest_mimic::{Arguments, Failed, Trial};
use support::with_need;
use test_and_set::blocking::BlockingStore;
use test_and_set::conformance;
use test_and_set::fake::FakeStore;
use test_and_set::store::TestAndSet;

fn run(make: impl FnOnce() -> Arc<dyn TestAndSet>) -> Result<(), Failed> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async { conformance::run(make()).await });
    Ok(())
}

fn run_at(url: &str) -> Result<(), Failed> {
    run(|| support::client(url))
}

fn main() {
    let trials = vec![
        Trial::test("fake", || run(|| Arc::new(FakeStore::default()))),
        Trial::test("fake_from_a_plain_thread", || {
            let store = BlockingStore::over(Arc::new(FakeStore::default()))?;
            support::blocking_suite(&store);
            Ok(())
        }),
        Trial::test("raft_one_node", || run_at(&support::Cluster::start(1).url())),
        Trial::test("raft_three_nodes", || run_at(&support::Cluster::start(3).url())),
        Trial::test("raft_from_a_plain_thread", || {
            let cluster = support::Cluster::start(3);
            support::blocking_suite(&BlockingStore::connect(&cluster.url())?);
            Ok(())
        }),
        with_need("etcd", support::Etcd::missing(), || run_at(&support::Etcd::start(1).url())),
        with_need("etcd_with_mutual_tls", support::Etcd::missing(), || {
            run_at(&support::Etcd::start_with_tls(1).url())
        }),
        with_need("zookeeper", support::ZooKeeper::missing(), || run_at(&support::ZooKeeper::start().url)),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}
