//! Our own store under wrong configuration, changes of members, and failures. `benches/store.rs` has long versions of some tests.

mod support;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Failed, Trial};
use support::membership::{
    a_member_that_is_not_there_gets_no_vote, a_new_member_votes_only_with_all_of_the_log,
    a_removal_leaves_a_quorum_that_answers, a_removed_member_comes_back_with_new_data_only,
};
use support::restoring::all_members_are_lost_and_restored;
use support::roles::{
    a_host_has_a_share_of_the_names, a_members_key_is_no_clients, an_ended_vm_is_bound_to_its_hosts,
    only_operators_change_members, only_the_hosts_of_a_pair_act_for_it, the_audit_does_not_hold_up_a_member,
};
use support::rollback::{
    an_old_copy_does_not_vote_a_verdict_away, an_old_copy_is_told_and_ends,
    without_the_rule_an_old_copy_makes_two_winners,
};
use support::{Cluster, SmallDisk, latency, wait_for, with_need};
use test_and_set::blocking::BlockingStore;
use test_and_set::keys::{self, Keys};
use test_and_set::names::{Generation, Incarnation, VmName};
use test_and_set::record::{Applied, Member, Members, Verdict};
use test_and_set::store::StoreError;

const PATIENCE: Duration = Duration::from_secs(15);

fn vm(name: &str) -> VmName {
    name.parse().expect("a name")
}

/// Opens a VM for one incarnation.
fn open(store: &BlockingStore, name: &str) -> Result<Incarnation, StoreError> {
    let who = Incarnation::random();
    let members = Members { primary: Member::new(who), backup: None };
    assert_eq!(store.open(&vm(name), Generation::FIRST, &members, PATIENCE)?, Applied::Done);
    Ok(who)
}

/// Opens a VM and wins it.
fn win(store: &BlockingStore, name: &str) -> Incarnation {
    let who = open(store, name).expect("open");
    let verdict = store.take(&vm(name), Generation::FIRST, who, PATIENCE);
    assert!(matches!(verdict, Verdict::Won), "{verdict:?}");
    who
}

fn holder(store: &BlockingStore, name: &str) -> Option<Incarnation> {
    store.get(&vm(name), PATIENCE).expect("get").expect("a record").holder()
}

/// The error of a client of a store that cannot be used.
fn complaint(url: &str, patience: Duration) -> String {
    let store = BlockingStore::connect(url).expect("a client");
    let asked = Instant::now();
    match store.take(&vm("any"), Generation::FIRST, Incarnation::random(), patience) {
        Verdict::Unknown(error) => {
            assert!(asked.elapsed() < patience + Duration::from_secs(2), "it must keep its deadline");
            error.to_string()
        }
        verdict => panic!("{verdict:?}"),
    }
}

fn expect_complaint(url: &str, words: &[&str]) {
    let said = complaint(url, Duration::from_secs(2));
    words.iter().for_each(|word| assert!(said.contains(word), "{said:?} does not say {word:?}"));
}

fn wrong_store_is_named() -> Result<(), Failed> {
    let cluster = Cluster::start(1);
    win(&BlockingStore::connect(&cluster.url())?, "vm");
    expect_complaint(&format!("{}&cluster=other", cluster.url()), &["cluster vmft", &cluster.address(1)]);
    // An address at which nobody listens.
    let nowhere = format!("raft://{}?keys={}", support::free_address(), cluster.keys("client").display());
    expect_complaint(&nowhere, &["cannot connect", "refused"]);
    // A server whose certificate we do not have, then one that does not have ours.
    let others = tempfile::tempdir()?;
    keys::make_set(others.path(), &[1], &["client".into()], &[])?;
    let strange = format!("raft://{}?keys={}", cluster.address(1), others.path().join("client").display());
    expect_complaint(&strange, &["does not accept the other's certificate"]);
    std::fs::copy(cluster.keys("client").join("members/1.crt"), others.path().join("client/members/1.crt"))?;
    expect_complaint(&strange, &["does not accept the other's certificate"]);
    Ok(())
}

/// A server that greets like one of a later version.
fn wrong_version_is_named() -> Result<(), Failed> {
    let dir = tempfile::tempdir()?;
    keys::make_set(dir.path(), &[1], &["client".into()], &[])?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let tls = test_and_set::tls::acceptor(&Arc::new(Keys::load(&dir.path().join("1"))?))?;
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))?;
    let address = listener.local_addr()?;
    runtime.spawn(async move {
        use tokio::io::AsyncWriteExt;
        while let Ok((tcp, _)) = listener.accept().await {
            if let Ok(mut stream) = tls.accept(tcp).await {
                stream.write_all(b"VMTS\x0b\x00\x0a\x00\x00\x00").await.ok();
                stream.shutdown().await.ok();
            }
        }
    });
    let url = format!("raft://{address}?keys={}", dir.path().join("client").display());
    expect_complaint(&url, &["versions 10 to 11", "replace the older"]);
    Ok(())
}

fn no_majority_is_unknown() -> Result<(), Failed> {
    let mut cluster = Cluster::start(3);
    let store = BlockingStore::connect(&cluster.url())?;
    let who = open(&store, "vm")?;
    let leader = cluster.leader();
    (1..=3).filter(|id| *id != leader).for_each(|id| cluster.kill(id));
    let verdict = store.take(&vm("vm"), Generation::FIRST, who, Duration::from_secs(2));
    assert!(matches!(verdict, Verdict::Unknown(StoreError::NoAnswer { .. })), "{verdict:?}");
    (1..=3).filter(|id| *id != leader).for_each(|id| cluster.start_node(id));
    let verdict = store.take(&vm("vm"), Generation::FIRST, who, PATIENCE);
    assert!(matches!(verdict, Verdict::Won), "{verdict:?}");
    Ok(())
}

fn members_come_and_go() -> Result<(), Failed> {
    let mut cluster = Cluster::start(3);
    let store = BlockingStore::connect(&cluster.url())?;
    let who = win(&store, "before");
    cluster.start_node_as(4, &["--join"]);
    let run = |cluster: &Cluster, args: &[&str]| {
        let output = cluster.tool(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    run(&cluster, &["member", "add", "4", &cluster.address(4), "--patience", "20"]);
    win(&store, "between");
    run(&cluster, &["member", "remove", "1", "--patience", "20"]);
    cluster.kill(1);
    // Two of the three remaining members run, one of them new.
    cluster.kill(2);
    win(&store, "after");
    assert_eq!(holder(&store, "before"), Some(who));
    let status = cluster.status();
    let members = status[2]["answer"]["status"]["members"].as_object().expect("members").keys().cloned();
    assert_eq!(members.collect::<Vec<_>>(), ["2", "3", "4"]);
    Ok(())
}

/// A member that has lost its data has lost its vote, too: the others must not accept it as before.
fn replaced_data_is_refused() -> Result<(), Failed> {
    let mut cluster = Cluster::start(3);
    let store = BlockingStore::connect(&cluster.url())?;
    win(&store, "before");
    cluster.kill(3);
    std::fs::remove_dir_all(cluster.data(3))?;
    cluster.start_node(3);
    std::thread::sleep(Duration::from_secs(1));
    let status = cluster.status()[2]["answer"]["status"].clone();
    assert_eq!((&status["vms"], &status["leader"]), (&0.into(), &serde_json::Value::Null), "{status}");
    // After it was removed and added again it is accepted.
    let run = |args: &[&str]| assert!(cluster.tool(args).status.success(), "{args:?}");
    run(&["member", "remove", "3", "--patience", "20"]);
    cluster.kill(3);
    std::fs::remove_dir_all(cluster.data(3))?;
    cluster.start_node_as(3, &["--join"]);
    let output = cluster.tool(&["member", "add", "3", &cluster.address(3), "--patience", "20"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    wait_for("data on the new member", || {
        (cluster.status()[2]["answer"]["status"]["vms"] == serde_json::json!(1)).then_some(())
    });
    Ok(())
}

/// The log does not grow for ever: snapshots are taken, the log is purged, and a member that lags gets the snapshot.
fn disk_stays_bounded() -> Result<(), Failed> {
    let mut cluster = Cluster::start_with(3, &["--snapshot-every", "50"]);
    let store = BlockingStore::connect(&cluster.url())?;
    cluster.leader();
    cluster.kill(3);
    for i in 0..200 {
        win(&store, &format!("vm-{i}"));
    }
    cluster.start_node(3);
    wait_for("a snapshot on the late member", || {
        let status = cluster.status()[2]["answer"]["status"].clone();
        (status["vms"] == serde_json::json!(200) && status["purged_index"].as_u64()? > 200).then_some(())
    });
    let status = cluster.status();
    for row in status.as_array().expect("rows") {
        let status = &row["answer"]["status"];
        let log = status["last_log_index"].as_u64().zip(status["purged_index"].as_u64());
        let (last, purged) = log.expect("indexes");
        assert!(last - purged <= 250, "{status}");
        assert!(status["data_bytes"].as_u64().expect("bytes") < 8 << 20, "{status}");
    }
    Ok(())
}

fn full_disk_is_named_and_loses_nothing() -> Result<(), Failed> {
    let mut cluster = Cluster::prepare(1, &[]);
    let small = SmallDisk::mount(&cluster.data(1))?;
    cluster.start_node(1);
    let store = BlockingStore::connect(&cluster.url())?;
    let who = win(&store, "before");
    let waiting = open(&store, "waiting")?;
    small.fill_completely()?;
    let verdict = store.take(&vm("waiting"), Generation::FIRST, waiting, Duration::from_secs(2));
    let Verdict::Unknown(StoreError::DiskFull(node)) = verdict else { panic!("{verdict:?}") };
    assert_eq!(node, cluster.address(1));
    assert_eq!(holder(&store, "before"), Some(who));
    cluster.kill(1);
    small.empty()?;
    cluster.start_node(1);
    assert_eq!(holder(&store, "before"), Some(who));
    let verdict = store.take(&vm("waiting"), Generation::FIRST, waiting, PATIENCE);
    assert!(matches!(verdict, Verdict::Won), "{verdict:?}");
    Ok(())
}

fn status_and_metrics_show_the_cluster() -> Result<(), Failed> {
    let at = support::free_address().to_string();
    let cluster = Cluster::start_with(1, &["--metrics", &at]);
    win(&BlockingStore::connect(&cluster.url())?, "vm");
    let text = String::from_utf8(cluster.tool(&["status"]).stdout)?;
    for words in ["member 1 of vmft: leader", "1 VMs; 2 commands", "votes"] {
        assert!(text.contains(words), "{words:?} is not in\n{text}");
    }
    let mut http = TcpStream::connect(&at)?;
    http.write_all(b"GET /metrics HTTP/1.1\r\n\r\n")?;
    let mut page = String::new();
    http.read_to_string(&mut page)?;
    for line in ["vmft_store_is_leader 1", "vmft_store_vms 1", "vmft_store_command_seconds_count 2"] {
        assert!(page.lines().any(|l| l == line), "{line:?} is not in\n{page}");
    }
    Ok(())
}

/// Without its majority the store says so, and the member that is left calls itself no leader.
fn a_store_without_a_quorum_says_so() -> Result<(), Failed> {
    let mut cluster = Cluster::start(3);
    let leader = cluster.leader();
    assert!(cluster.tool(&["status"]).status.success());
    for id in (1..=3).filter(|id| *id != leader) {
        cluster.kill(id);
    }
    wait_for("the leader to notice", || {
        let status = cluster.status()[leader - 1]["answer"]["status"].clone();
        let lost = status["role"] == "leader without a majority" && status["leader"].is_null();
        lost.then_some(())
    });
    let output = cluster.tool(&["status"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && said.contains("the store has no quorum"), "{said}");
    (1..=3).filter(|id| *id != leader).for_each(|id| cluster.start_node(id));
    wait_for("a quorum", || cluster.tool(&["status"]).status.success().then_some(()));
    Ok(())
}

/// A member's data cannot be used by another member.
fn data_has_one_owner() -> Result<(), Failed> {
    let mut cluster = Cluster::start(1);
    win(&BlockingStore::connect(&cluster.url())?, "vm");
    cluster.kill(1);
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_vmft-store"))
        .args(["serve", "--id", "2", "--listen", &cluster.address(2), "--peers", "2=127.0.0.1:1"])
        .arg("--data")
        .arg(cluster.data(1))
        .arg("--keys")
        .arg(cluster.keys("2"))
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("belongs to node 1 of cluster vmft"), "{said}");
    Ok(())
}

fn zookeeper_that_dies_is_unknown() -> Result<(), Failed> {
    let mut zookeeper = support::ZooKeeper::start();
    let store = BlockingStore::connect(&zookeeper.url())?;
    let who = open(&store, "vm")?;
    zookeeper.kill();
    let verdict = store.take(&vm("vm"), Generation::FIRST, who, Duration::from_secs(2));
    assert!(matches!(verdict, Verdict::Unknown(_)), "{verdict:?}");
    Ok(())
}

fn etcd_that_is_not_there_is_named() -> Result<(), Failed> {
    // A port on which nobody answers in etcd's protocol.
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let said = complaint(&format!("etcd://{}", taken.local_addr()?), Duration::from_secs(2));
    assert!(said.contains("no answer from the store"), "{said}");
    expect_complaint(&format!("etcd://{}", support::free_address()), &["etcd"]);
    Ok(())
}

fn next_verdict_after_the_leader_is_killed() -> Result<(), Failed> {
    let took = latency::failover(3);
    // The bench measures the times; here only their order of magnitude is checked, since the machine may be busy.
    assert!(took.quantile(1.0) < Duration::from_secs(5), "{took}");
    Ok(())
}

fn nemesis() -> Result<(), Failed> {
    let seed = rand::random();
    let plan = support::nemesis::Plan { rounds: 6, workers: 8, pause: Duration::from_millis(20), seed };
    let outcome = support::nemesis::run(&plan);
    println!("seed {seed}: {outcome}");
    assert!(outcome.won > 20, "{outcome}");
    Ok(())
}

fn hostile_clients() -> Result<(), Failed> {
    let outcome = support::hostile::run(450);
    println!("{outcome}");
    let (before, most) = outcome.memory_kib;
    assert!(most < before + 64 * 1024, "{outcome}");
    Ok(())
}

/// One certificate opens as many connections as it can, and strangers are silent; another certificate is served meanwhile.
fn one_certificate_cannot_use_up_a_member() -> Result<(), Failed> {
    let cluster = Cluster::start(1);
    cluster.leader();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let held = runtime.block_on(support::hostile::hold(&cluster, &cluster.keys("b"), 600));
    assert_eq!(held.iter().filter(|(_, admitted)| *admitted).count(), 128);
    let silent: Vec<_> =
        (0..400).map(|_| TcpStream::connect(cluster.address(1))).collect::<Result<_, _>>()?;
    win(&BlockingStore::connect(&cluster.url())?, "vm");
    drop(silent);
    let log = std::fs::read_to_string(cluster.log(1))?;
    let refusals = log.lines().filter(|line| line.contains("closed")).count();
    assert!((1..=30).contains(&refusals), "{log}");
    Ok(())
}

/// Clients that send a byte now and then do not blind the metrics.
fn slow_scrapes_do_not_keep_others_out() -> Result<(), Failed> {
    let at = support::free_address().to_string();
    let cluster = Cluster::start_with(1, &["--metrics", &at]);
    cluster.leader();
    let mut slow: Vec<_> = (0..20).map(|_| TcpStream::connect(&at)).collect::<Result<_, _>>()?;
    // An error is an evicted scrape.
    slow.iter_mut().for_each(|tcp| drop(tcp.write(b"G")));
    let mut http = TcpStream::connect(&at)?;
    http.set_read_timeout(Some(Duration::from_secs(2)))?;
    http.write_all(b"GET /metrics HTTP/1.1\r\n\r\n")?;
    let mut page = String::new();
    http.read_to_string(&mut page)?;
    assert!(page.contains("vmft_store_is_leader 1"), "{page}");
    Ok(())
}

/// Each file of a member is damaged in turn: it says what is damaged and what to do, or has all that it acknowledged.
fn damaged_data_is_refused_in_words() -> Result<(), Failed> {
    let mut cluster = Cluster::start(1);
    let who = win(&BlockingStore::connect(&cluster.url())?, "vm");
    cluster.kill(1);
    let file = cluster.data(1).join("log.redb");
    let whole = std::fs::read(&file)?;
    let mut damaged = whole.clone();
    damaged[..4096].fill(0);
    std::fs::write(&file, damaged)?;
    cluster.start_node(1);
    let said = wait_for("a refusal", || {
        let log = std::fs::read_to_string(cluster.log(1)).ok()?;
        log.contains("damaged").then_some(log)
    });
    for words in ["log.redb", "its first page is empty", "vmft-store member remove", "--join"] {
        assert!(said.contains(words), "{words:?} is not in {said}");
    }
    cluster.kill(1);
    std::fs::write(&file, whole)?;
    cluster.start_node(1);
    assert_eq!(holder(&BlockingStore::connect(&cluster.url())?, "vm"), Some(who));
    Ok(())
}

fn many_vms() -> Result<(), Failed> {
    let outcome = support::scale::run(2000);
    println!("{outcome}");
    assert!(outcome.restarted_in < Duration::from_secs(10), "{outcome}");
    Ok(())
}

fn main() {
    let net = support::net::Net::missing();
    let trials = vec![
        Trial::test("wrong_store_is_named", wrong_store_is_named),
        Trial::test("wrong_version_is_named", wrong_version_is_named),
        Trial::test("no_majority_is_unknown", no_majority_is_unknown),
        Trial::test("members_come_and_go", members_come_and_go),
        Trial::test("replaced_data_is_refused", replaced_data_is_refused),
        Trial::test("disk_stays_bounded", disk_stays_bounded),
        with_need(
            "full_disk_is_named_and_loses_nothing",
            SmallDisk::missing(),
            full_disk_is_named_and_loses_nothing,
        ),
        Trial::test("status_and_metrics_show_the_cluster", status_and_metrics_show_the_cluster),
        Trial::test("a_store_without_a_quorum_says_so", a_store_without_a_quorum_says_so),
        Trial::test("data_has_one_owner", data_has_one_owner),
        with_need(
            "zookeeper_that_dies_is_unknown",
            support::ZooKeeper::missing(),
            zookeeper_that_dies_is_unknown,
        ),
        Trial::test("etcd_that_is_not_there_is_named", etcd_that_is_not_there_is_named),
        Trial::test("next_verdict_after_the_leader_is_killed", next_verdict_after_the_leader_is_killed),
        with_need("nemesis", net, nemesis),
        with_need(
            "members_are_upgraded_one_at_a_time_and_back",
            support::upgrade::missing(),
            support::upgrade::one_member_at_a_time_and_back,
        ),
        Trial::test("hostile_clients", hostile_clients),
        Trial::test("many_vms", many_vms),
        Trial::test("one_certificate_cannot_use_up_a_member", one_certificate_cannot_use_up_a_member),
        Trial::test("slow_scrapes_do_not_keep_others_out", slow_scrapes_do_not_keep_others_out),
        Trial::test("damaged_data_is_refused_in_words", damaged_data_is_refused_in_words),
        Trial::test("only_the_hosts_of_a_pair_act_for_it", only_the_hosts_of_a_pair_act_for_it),
        Trial::test("only_operators_change_members", only_operators_change_members),
        Trial::test("a_members_key_is_no_clients", a_members_key_is_no_clients),
        Trial::test("an_ended_vm_is_bound_to_its_hosts", an_ended_vm_is_bound_to_its_hosts),
        Trial::test("a_host_has_a_share_of_the_names", a_host_has_a_share_of_the_names),
        Trial::test("the_audit_does_not_hold_up_a_member", the_audit_does_not_hold_up_a_member),
        Trial::test("a_member_that_is_not_there_gets_no_vote", a_member_that_is_not_there_gets_no_vote),
        Trial::test(
            "a_new_member_votes_only_with_all_of_the_log",
            a_new_member_votes_only_with_all_of_the_log,
        ),
        Trial::test("all_members_are_lost_and_restored", all_members_are_lost_and_restored),
        Trial::test("an_old_copy_is_told_and_ends", an_old_copy_is_told_and_ends),
        with_need(
            "an_old_copy_does_not_vote_a_verdict_away",
            SmallDisk::missing(),
            an_old_copy_does_not_vote_a_verdict_away,
        ),
        with_need(
            "without_the_rule_an_old_copy_makes_two_winners",
            SmallDisk::missing()
                .or((!cfg!(debug_assertions)).then_some("a release build leaves no rule out")),
            without_the_rule_an_old_copy_makes_two_winners,
        ),
        Trial::test("a_removal_leaves_a_quorum_that_answers", a_removal_leaves_a_quorum_that_answers),
        Trial::test(
            "a_removed_member_comes_back_with_new_data_only",
            a_removed_member_comes_back_with_new_data_only,
        ),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}
