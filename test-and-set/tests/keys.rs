//! Keys of the store's parties that are removed, cannot be read, or are replaced while members and clients run.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use support::{Cluster, wait_for};
use test_and_set::blocking::BlockingStore;
use test_and_set::connection::Dialer;
use test_and_set::keys::Keys;
use test_and_set::keys::manage::{self, AcceptedAs};
use test_and_set::names::{Generation, Incarnation, VmName};
use test_and_set::record::{Member, Members, Verdict};
use test_and_set::tls::connector;

const PATIENCE: Duration = Duration::from_secs(15);
/// A connection ends at most this long after its certificate was removed; the machine may be busy.
const END: Duration = Duration::from_secs(4);

/// A VM that was opened, and its holder.
struct OpenVm {
    store: BlockingStore,
    name: VmName,
    who: Incarnation,
}

impl OpenVm {
    fn new(url: &str) -> Self {
        let (store, who) = (BlockingStore::connect(url).expect("a client"), Incarnation::random());
        let name: VmName = "vm".parse().expect("a name");
        let members = Members { primary: Member::new(who), backup: None };
        store.open(&name, Generation::FIRST, &members, PATIENCE).expect("open");
        Self { store, name, who }
    }

    /// Whether the store gives the verdict within this time.
    fn wins(&self, patience: Duration) -> bool {
        match self.store.take(&self.name, Generation::FIRST, self.who, patience) {
            Verdict::Won => true,
            Verdict::Unknown(_) => false,
            verdict => panic!("{verdict:?}"),
        }
    }
}

/// Waits until the store gives the verdict again: a member reads its list anew after a moment, and a client that it refuses
/// says so at once.
fn verdicts_again(vm: &OpenVm) {
    wait_for("a verdict", || vm.wins(Duration::from_secs(1)).then_some(()));
}

/// The files of the client's certificates in a member's directory.
fn client_files(cluster: &Cluster, member: usize) -> [PathBuf; 2] {
    ["hosts/client.crt", "operators/client.crt"].map(|file| cluster.keys(&member.to_string()).join(file))
}

/// Takes again and again until there is no verdict; checks that this is soon, and stays so.
fn no_more_verdicts(vm: &OpenVm, within: Duration) {
    let removed = Instant::now();
    while vm.wins(Duration::from_millis(500)) {
        assert!(removed.elapsed() < within, "verdicts {:?} after the removal", removed.elapsed());
    }
    assert!(!vm.wins(Duration::from_millis(500)));
}

/// A connection of the client that sends nothing of itself.
fn idle_connection(
    cluster: &Cluster,
    runtime: &tokio::runtime::Runtime,
) -> test_and_set::connection::NodeConnection {
    let keys = Arc::new(Keys::load(&cluster.keys("client")).expect("keys"));
    let dialer =
        Dialer { tls: connector(&keys).expect("TLS"), keys, cluster: "vmft".parse().expect("a name") };
    let address = cluster.address(1);
    runtime.block_on(dialer.connect(&address, None, PATIENCE)).expect("a connection").0
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime")
}

#[test]
fn a_removed_host_gets_no_verdict_and_its_connections_end() {
    let (cluster, runtime) = (Cluster::start(1), runtime());
    let vm = OpenVm::new(&cluster.url());
    assert!(vm.wins(PATIENCE));
    let idle = idle_connection(&cluster, &runtime);
    let kept: Vec<_> = client_files(&cluster, 1).iter().map(|file| fs::read(file).expect("a file")).collect();
    client_files(&cluster, 1).iter().for_each(|file| fs::remove_file(file).expect("to remove"));
    let removed = Instant::now();
    no_more_verdicts(&vm, END);
    wait_for("the end of the idle connection", || (!idle.is_open()).then_some(()));
    assert!(removed.elapsed() < END + Duration::from_secs(1), "{:?}", removed.elapsed());
    let log = fs::read_to_string(cluster.log(1)).expect("the log");
    assert!(log.contains("its certificate is no longer accepted"), "{log}");
    // It is let in again when its certificate is there again.
    client_files(&cluster, 1)
        .iter()
        .zip(kept)
        .for_each(|(file, kept)| fs::write(file, kept).expect("to write"));
    verdicts_again(&vm);
}

#[test]
fn a_role_that_is_taken_away_ends_the_connection() {
    let (cluster, runtime) = (Cluster::start(1), runtime());
    cluster.leader();
    let idle = idle_connection(&cluster, &runtime);
    fs::remove_file(&client_files(&cluster, 1)[1]).expect("to remove");
    let removed = Instant::now();
    wait_for("the end of the connection", || (!idle.is_open()).then_some(()));
    assert!(removed.elapsed() < END, "{:?}", removed.elapsed());
}

#[test]
fn a_removed_member_is_left_by_clients_and_by_the_other_member() {
    let (cluster, runtime) = (Cluster::start(2), runtime());
    let vm = OpenVm::new(&cluster.url());
    assert!(vm.wins(PATIENCE));
    // A client that no longer accepts the member.
    let idle = idle_connection(&cluster, &runtime);
    let pinned = cluster.keys("client").join("members/1.crt");
    let kept = fs::read(&pinned).expect("a file");
    fs::remove_file(&pinned).expect("to remove");
    wait_for("the end of the idle connection", || (!idle.is_open()).then_some(()));
    fs::write(&pinned, &kept).expect("to write");
    // Two members are a majority only together.
    let (leader, other) = if cluster.leader() == 1 { ("1", "2") } else { ("2", "1") };
    let pinned = cluster.keys(other).join(format!("members/{leader}.crt"));
    let kept = fs::read(&pinned).expect("a file");
    fs::remove_file(&pinned).expect("to remove");
    no_more_verdicts(&vm, END);
    fs::write(&pinned, &kept).expect("to write");
    verdicts_again(&vm);
}

#[test]
fn a_directory_that_cannot_be_read_keeps_nobody_in() {
    let cluster = Cluster::start(1);
    let vm = OpenVm::new(&cluster.url());
    assert!(vm.wins(PATIENCE));
    let directories = ["hosts", "operators"].map(|kind| cluster.keys("1").join(kind));
    let away = |dir: &Path| dir.with_extension("away");
    // Root may read every directory, so a file takes its place.
    for dir in &directories {
        fs::rename(dir, away(dir)).and_then(|()| fs::write(dir, "")).expect("to move");
    }
    let moved = Instant::now();
    wait_for("a complaint", || {
        let log = fs::read_to_string(cluster.log(1)).ok()?;
        log.contains("stay accepted for 5s at most").then_some(())
    });
    let still = vm.wins(Duration::from_secs(1));
    assert!(still || moved.elapsed() > Duration::from_secs(5), "files are replaced in steps");
    no_more_verdicts(&vm, Duration::from_secs(5) + END);
    let log = fs::read_to_string(cluster.log(1)).expect("the log");
    assert!(log.lines().filter(|line| line.contains("operators")).count() <= 4, "{log}");
    for dir in &directories {
        fs::remove_file(dir).and_then(|()| fs::rename(away(dir), dir)).expect("to move");
    }
    verdicts_again(&vm);
}

#[test]
fn a_host_replaces_its_key_and_every_take_is_answered() {
    let cluster = Cluster::start(3);
    let vm = OpenVm::new(&cluster.url());
    assert!(vm.wins(PATIENCE));
    let stop = AtomicBool::new(false);
    let (calls, slowest) = std::thread::scope(|scope| {
        let stream = scope.spawn(|| {
            let (mut calls, mut slowest) = (0, Duration::ZERO);
            while !stop.load(Relaxed) {
                let asked = Instant::now();
                assert!(vm.wins(Duration::from_secs(5)), "call {calls} has no answer");
                slowest = slowest.max(asked.elapsed());
                calls += 1;
            }
            (calls, slowest)
        });
        replace_client_key(&cluster);
        stop.store(true, Relaxed);
        stream.join().expect("the stream")
    });
    println!("{calls} calls while the key was replaced, the slowest took {slowest:?}");
    assert!(calls > 50, "{calls}");
    assert!(slowest < Duration::from_secs(3), "{slowest:?}");
}

fn replace_client_key(cluster: &Cluster) {
    let own = cluster.keys("client");
    let old = Keys::load(&own).expect("keys").own().id();
    manage::renew(&own).expect("a new key");
    let name = || "client".parse().expect("a name");
    let parties = [AcceptedAs::Host(name()), AcceptedAs::Operator(name())];
    let members = || (1..=3).map(|id: usize| cluster.keys(&id.to_string()));
    for (member, party) in
        members().flat_map(|member| parties.each_ref().map(|party| (member.clone(), party)))
    {
        manage::accept(&member, party, &own.join("own.new.crt")).expect("to accept");
    }
    manage::use_new(&own).expect("the new key in use");
    std::thread::sleep(Duration::from_secs(3));
    for (member, party) in
        members().flat_map(|member| parties.each_ref().map(|party| (member.clone(), party)))
    {
        manage::remove(&member, party, Some(&old)).expect("to remove");
    }
    // As long as a connection of the old key could last.
    std::thread::sleep(END);
}
