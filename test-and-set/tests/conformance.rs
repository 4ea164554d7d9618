//! Runs the conformance suite for every store. A store that is not installed is ignored, with the reason in the test's name.

mod support;

use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Failed, Trial};
use support::with_need;
use test_and_set::blocking::BlockingStore;
use test_and_set::conformance;
use test_and_set::fake::FakeStore;
use test_and_set::names::{Generation, Incarnation};
use test_and_set::record::{Applied, Member, Members, VmRecord};
use test_and_set::store::{TestAndSet, chain};

fn run(make: impl FnOnce() -> Arc<dyn TestAndSet>) -> Result<(), Failed> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async { conformance::run(make()).await });
    Ok(())
}

fn run_at(url: &str) -> Result<(), Failed> {
    run(|| support::client(url))
}

/// What a client at this URL is told when it asks for a VM's record.
fn refusal(url: &str, vm: &str) -> String {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let deadline = Instant::now() + Duration::from_secs(20);
        let got = support::client(url).get(&vm.parse().expect("a name"), deadline).await;
        chain(&got.expect_err("a client that must be refused"))
    })
}

/// Opens a VM, and returns its record.
fn opened(url: &str, vm: &str) -> VmRecord {
    let store = BlockingStore::connect(url).expect("a client");
    let (vm, patience) = (vm.parse().expect("a name"), Duration::from_secs(20));
    let members = Members { primary: Member::new(Incarnation::random()), backup: None };
    assert_eq!(store.open(&vm, Generation::FIRST, &members, patience).expect("open"), Applied::Done);
    store.get(&vm, patience).expect("get").expect("a record")
}

fn record(url: &str, vm: &str) -> Option<VmRecord> {
    let store = BlockingStore::connect(url).expect("a client");
    store.get(&vm.parse().expect("a name"), Duration::from_secs(20)).expect("get")
}

fn etcd_with_users() -> Result<(), Failed> {
    let mut etcd = support::Etcd::start_with_tls(1);
    etcd.enable_users("a:b");
    let url = etcd.url_as("vmft", "a:b");
    run_at(&url)?;
    let before = opened(&url, "kept");
    // The certificate is not enough, and neither is another password.
    let said = refusal(&etcd.url(), "kept");
    assert!(said.contains("no node of the store can serve this client"), "{said}");
    let said = refusal(&etcd.url_as("vmft", "wrong"), "kept");
    assert!(said.contains("invalid user ID or password"), "{said}");
    for command in ["get /vmft/vm/kept", "put /vmft/vm/kept x", "del /vmft --prefix", "auth disable"] {
        let (done, said) = etcd.tool(&command.split(' ').collect::<Vec<_>>());
        assert!(!done && !said.contains("kept"), "{command}: {said}");
    }
    // A client keeps its token as long as etcd does.
    let store = BlockingStore::connect(&url)?;
    let get = || store.get(&"kept".parse().expect("a name"), Duration::from_secs(20)).expect("get");
    assert_eq!(get().as_ref(), Some(&before));
    etcd.restart();
    assert_eq!(get().as_ref(), Some(&before));
    Ok(())
}

/// A user whose certificate has its name needs no password.
fn etcd_knows_a_user_by_its_certificate() -> Result<(), Failed> {
    let etcd = support::Etcd::start_with_certificate(1, "vmft");
    etcd.enable_users("never-given");
    run_at(&etcd.url())?;
    let before = opened(&etcd.url(), "kept");
    assert_eq!(record(&etcd.url(), "kept").as_ref(), Some(&before));
    let (done, said) = etcd.tool(&["put", "/other", "x"]);
    assert!(!done && said.contains("permission denied"), "{said}");
    Ok(())
}

/// There is TLS, but every client with a certificate of the authority may do everything, of which each is warned.
fn zookeeper_with_a_certificate_alone() -> Result<(), Failed> {
    let zookeeper = support::ZooKeeper::start();
    run_at(&zookeeper.url_with_certificate())
}

fn a_certificate_without_its_key_is_refused() -> Result<(), Failed> {
    let keys = tempfile::tempdir()?;
    support::etcd::make_keys(keys.path(), "somebody");
    std::fs::remove_file(keys.path().join("own.key"))?;
    for store in ["etcd", "zookeeper"] {
        let url = format!("{store}://127.0.0.1:1?keys={}", keys.path().display());
        let error = BlockingStore::connect(&url).err().expect("a refusal");
        assert!(chain(&error).contains("own.key"), "{store}: {}", chain(&error));
    }
    Ok(())
}

fn etcd_without_users_refuses_a_user() -> Result<(), Failed> {
    let etcd = support::Etcd::start_with_tls(1);
    let said = refusal(&etcd.url_as("vmft", "secret"), "any");
    assert!(said.contains("authentication is not enabled"), "{said}");
    Ok(())
}

fn zookeeper_with_tls_and_a_user() -> Result<(), Failed> {
    let zookeeper = support::ZooKeeper::start();
    let url = zookeeper.url_as("vmft", "a:b");
    run_at(&url)?;
    let before = opened(&url, "kept");
    let said = refusal(&zookeeper.url(), "kept");
    assert!(said.contains("it denies access"), "{said}");
    let said = refusal(&zookeeper.url_as("vmft", "wrong"), "kept");
    assert!(said.contains("it denies access"), "{said}");
    // Without a certificate of the authority there is no session.
    let attacks = [
        "addauth digest vmft:wrong",
        "get /vmft/vm/kept",
        "ls /vmft/vm",
        "set /vmft/vm/kept x",
        "set /vmft/barrier x",
        "delete /vmft/vm/kept",
        "create /vmft/vm/new x",
        "create /vmft/new x",
        "setAcl /vmft/vm/kept world:anyone:cdrwa",
        "setAcl /vmft/vm world:anyone:cdrwa",
        "deleteall /vmft",
    ];
    let said = zookeeper.shell(&attacks.map(String::from));
    assert_eq!(said.matches("Insufficient permission").count(), attacks.len() - 1, "{said}");
    assert_eq!(record(&url, "kept").as_ref(), Some(&before));
    assert_eq!(record(&url, "new"), None);
    Ok(())
}

fn zookeepers_open_znodes_are_refused_to_a_user() -> Result<(), Failed> {
    let zookeeper = support::ZooKeeper::start();
    opened(&zookeeper.url(), "old");
    let url = zookeeper.url_as("vmft", "secret");
    let said = refusal(&url, "old");
    assert!(said.contains("/vmft belongs to world:anyone") && said.contains("setAcl -R /vmft"), "{said}");
    // As the message says.
    let own = ["addauth digest vmft:secret", "setAcl -R /vmft auth::cdrwa"].map(String::from);
    zookeeper.shell(&own);
    assert!(record(&url, "old").is_some());
    // A single record, and a parent.
    for path in ["/vmft/vm/old", "/vmft/vm", "/vmft/barrier"] {
        let open = [own[0].clone(), format!("setAcl {path} world:anyone:r,auth::cdrwa")];
        zookeeper.shell(&open);
        let said = refusal(&url, "old");
        assert!(said.contains(&format!("{path} belongs to world:anyone")), "{said}");
        zookeeper.shell(&own);
    }
    assert!(record(&url, "old").is_some());
    Ok(())
}

/// In a process of its own: makes two clients, which connect with their first request only.
const CONNECT_TWICE: &str = "VMFT_TEST_CONNECT_TWICE";

fn an_open_store_is_warned_of_once() -> Result<(), Failed> {
    let keys = tempfile::tempdir()?;
    support::etcd::make_keys(keys.path(), "somebody");
    for (url, words) in [
        ("etcd://127.0.0.1:1".into(), "without TLS and without authentication"),
        ("zookeeper://127.0.0.1:1".into(), "without TLS and without authentication"),
        (
            format!("zookeeper://127.0.0.1:1?keys={}", keys.path().display()),
            "can read, change and delete every VM's record",
        ),
    ] {
        let output = Command::new(std::env::current_exe()?).env(CONNECT_TWICE, &url).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.matches("WARNING: ").count() == 1, "{url}: {said}");
        assert!(said.contains(words) && said.contains("make two of a VM run, or none"), "{url}: {said}");
    }
    Ok(())
}

fn main() {
    if let Ok(url) = std::env::var(CONNECT_TWICE) {
        host_log::init();
        for _ in 0..2 {
            BlockingStore::connect(&url).expect("a client");
        }
        return;
    }
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
        with_need("etcd_with_tls_and_users", support::Etcd::missing(), etcd_with_users),
        with_need(
            "etcd_knows_a_user_by_its_certificate",
            support::Etcd::missing(),
            etcd_knows_a_user_by_its_certificate,
        ),
        with_need(
            "zookeeper_with_a_certificate_alone",
            support::ZooKeeper::missing(),
            zookeeper_with_a_certificate_alone,
        ),
        Trial::test("a_certificate_without_its_key_is_refused", a_certificate_without_its_key_is_refused),
        with_need(
            "etcd_without_users_refuses_a_user",
            support::Etcd::missing(),
            etcd_without_users_refuses_a_user,
        ),
        with_need("zookeeper", support::ZooKeeper::missing(), || run_at(&support::ZooKeeper::start().url())),
        with_need(
            "zookeeper_with_tls_and_a_user",
            support::ZooKeeper::missing(),
            zookeeper_with_tls_and_a_user,
        ),
        with_need(
            "zookeepers_open_znodes_are_refused_to_a_user",
            support::ZooKeeper::missing(),
            zookeepers_open_znodes_are_refused_to_a_user,
        ),
        Trial::test("an_open_store_is_warned_of_once", an_open_store_is_warned_of_once),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}
