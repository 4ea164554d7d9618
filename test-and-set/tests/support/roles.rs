//! Who may do what in the store, and what its audit says of it.

use std::process::Command as Process;
use std::time::Duration;

use libtest_mimic::Failed;
use test_and_set::blocking::BlockingStore;
use test_and_set::keys::{Keys, key_id};
use test_and_set::names::{Generation, Incarnation, VmName};
use test_and_set::record::{Applied, HostId, Member, Members, Refusal, Verdict, VmPhase};
use test_and_set::store::{StoreError, chain};

use super::{Cluster, wait_for};

const PATIENCE: Duration = Duration::from_secs(15);
const FIRST: Generation = Generation::FIRST;

fn vm(name: &str) -> VmName {
    name.parse().expect("a name")
}

fn client(cluster: &Cluster, party: &str) -> BlockingStore {
    BlockingStore::connect(&cluster.url_as(party)).expect("a client")
}

/// A member on the host of a party, which is named by its key.
fn on(cluster: &Cluster, party: &str) -> Member {
    let keys = Keys::load(&cluster.keys(party)).expect("keys");
    Member { host: Some(HostId::Key(key_id(keys.own().certificate()))), ..Member::new(Incarnation::random()) }
}

/// Opens a pair on hosts a and b.
fn open_pair(cluster: &Cluster, name: &str) -> [Incarnation; 2] {
    let [a, b] = ["a", "b"].map(|party| on(cluster, party));
    let who = [a.incarnation, b.incarnation];
    let members = Members { primary: a, backup: Some(b) };
    let opened = client(cluster, "a").open(&vm(name), FIRST, &members, PATIENCE).expect("open");
    assert_eq!(opened, Applied::Done);
    who
}

fn refusal<T: std::fmt::Debug>(answer: Result<T, StoreError>) -> Refusal {
    match answer {
        Err(StoreError::Refused(refusal)) => refusal,
        other => panic!("{other:?} is no refusal"),
    }
}

fn refused_take(verdict: Verdict<StoreError>) -> Refusal {
    match verdict {
        Verdict::Unknown(error) => refusal::<()>(Err(error)),
        verdict => panic!("{verdict:?}"),
    }
}

/// Waits until every member's audit has a line with these words; returns that line, the same of all.
fn audited(cluster: &Cluster, words: &[&str]) -> String {
    let lines: Vec<_> = (1..=3)
        .map(|id| {
            wait_for(&format!("audit line with {words:?} on member {id}"), || {
                let log = std::fs::read_to_string(cluster.log(id)).ok()?;
                let mut lines = log.lines().filter(|line| line.starts_with("audit "));
                lines.find(|line| words.iter().all(|word| line.contains(word))).map(String::from)
            })
        })
        .collect();
    assert!(lines.iter().all(|line| *line == lines[0]), "{lines:#?}");
    lines[0].clone()
}

/// Another host takes, opens and ends for a pair that is not its own, and forgets it.
pub fn only_the_hosts_of_a_pair_act_for_it() -> Result<(), Failed> {
    let cluster = Cluster::start(3);
    let [a, b] = open_pair(&cluster, "web");
    let [host_b, host_c, admin] = ["b", "c", "admin"].map(|party| client(&cluster, party));
    let web = vm("web");
    for (stranger, who, may) in [(&host_c, a, "a"), (&host_b, a, "a"), (&host_c, b, "b")] {
        let refusal = refused_take(stranger.take(&web, FIRST, who, PATIENCE));
        assert_eq!(refusal, Refusal::OtherHost(Some(HostId::Name(may.parse().expect("a name")))));
    }
    assert_eq!(refused_take(admin.take(&web, FIRST, a, PATIENCE)), Refusal::NotAHost);
    assert!(matches!(host_b.take(&web, FIRST, b, PATIENCE), Verdict::Won));
    let second = Generation(2);
    let stolen = Members { primary: Member { host: None, ..Member::new(b) }, backup: None };
    refusal(host_c.open(&web, second, &stolen, PATIENCE));
    refusal(host_c.end(&web, FIRST, b, PATIENCE));
    assert_eq!(refusal(host_c.forget(&web, FIRST, PATIENCE)), Refusal::NotAnOperator);
    let record = host_b.get(&web, PATIENCE)?.expect("a record");
    assert_eq!((record.generation, record.holder()), (FIRST, Some(b)), "nothing has changed");
    // A key that no member knows is named, with what to do.
    let strange =
        Member { host: Some(HostId::Key(test_and_set::names::KeyId([7; 32]))), ..on(&cluster, "b") };
    let members = Members { primary: on(&cluster, "a"), backup: Some(strange) };
    let refused = client(&cluster, "a").open(&vm("other"), FIRST, &members, PATIENCE).expect_err("refused");
    let said = chain(&refused);
    assert!(said.contains(&"07".repeat(32)) && said.contains("hosts/ of every member"), "{said}");
    assert_eq!(admin.forget(&web, FIRST, PATIENCE)?, Applied::Done);
    audited(
        &cluster,
        &[
            "host c: take generation 1 of VM web for",
            &a.to_string(),
            "refused: this side of the VM is on host a",
        ],
    );
    audited(&cluster, &["host b: take generation 1 of VM web for", &b.to_string(), ": won"]);
    audited(&cluster, &["host a: open generation 1 of VM web for", "on host a and", "on host b: done"]);
    audited(&cluster, &["host c: open generation 2 of VM web", "refused"]);
    audited(&cluster, &["host c: end generation 1 of VM web", "refused"]);
    audited(&cluster, &["host c: forget generation 1 of VM web: refused: the certificate is no operator's"]);
    audited(&cluster, &["operator admin: forget generation 1 of VM web: done"]);
    Ok(())
}

pub fn only_operators_change_members() -> Result<(), Failed> {
    let mut cluster = Cluster::start(3);
    cluster.leader();
    cluster.start_node_as(4, &["--join"]);
    let address = cluster.address(4);
    let add = ["member", "add", "4", &address, "--patience", "20"];
    let remove = ["member", "remove", "1", "--patience", "20"];
    for args in [&add[..], &remove] {
        let output = cluster.tool_as("a", args);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains("use an operator's keys"), "{said}");
    }
    let status = cluster.status()[0]["answer"]["status"]["members"].clone();
    let members: Vec<_> = status.as_object().expect("members").keys().cloned().collect();
    assert_eq!(members, ["1", "2", "3"]);
    for args in [&add[..], &["member", "remove", "4", "--patience", "20"]] {
        let output = cluster.tool_as("admin", args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    audited(&cluster, &[&format!("host a: add member 4 at {address}: refused: only operators")]);
    audited(&cluster, &["host a: remove member 1: refused: only operators"]);
    audited(&cluster, &[&format!("operator admin: add member 4 at {address}: begun")]);
    audited(&cluster, &[&format!("operator admin: add member 4 at {address}: done")]);
    audited(&cluster, &["operator admin: remove member 4: done"]);
    Ok(())
}

/// A member's key, and that of a party that no member knows any more, are refused in words.
pub fn a_members_key_is_no_clients() -> Result<(), Failed> {
    let cluster = Cluster::start(1);
    cluster.leader();
    let take = |party: &str| {
        let verdict =
            client(&cluster, party).take(&vm("any"), FIRST, Incarnation::random(), Duration::from_secs(2));
        match verdict {
            Verdict::Unknown(error) => chain(&error),
            verdict => panic!("{verdict:?}"),
        }
    };
    for member in ["1", "2"] {
        let said = take(member);
        assert!(said.contains("only hosts and operators are clients"), "{said}");
    }
    Ok(())
}

/// After its end a VM can be started on its hosts only, until an operator forgets it.
pub fn an_ended_vm_is_bound_to_its_hosts() -> Result<(), Failed> {
    let cluster = Cluster::start(3);
    let [a, b] = open_pair(&cluster, "web");
    let (web, second) = (vm("web"), Generation(2));
    let [host_a, host_b, host_c, admin] = ["a", "b", "c", "admin"].map(|party| client(&cluster, party));
    assert_eq!(host_a.end(&web, FIRST, a, PATIENCE)?, Applied::Done);
    assert_eq!(host_b.end(&web, FIRST, b, PATIENCE)?, Applied::Done, "both sides may say so");
    let alone = Members { primary: Member::new(Incarnation::random()), backup: None };
    let refused = refusal(host_c.open(&web, second, &alone, PATIENCE)).to_string();
    assert!(refused.contains("bound to hosts a and b"), "{refused}");
    assert_eq!(host_b.open(&web, second, &alone, PATIENCE)?, Applied::Done);
    assert_eq!(host_b.end(&web, second, alone.primary.incarnation, PATIENCE)?, Applied::Done);
    assert_eq!(admin.forget(&web, second, PATIENCE)?, Applied::Done);
    let record = admin.get(&web, PATIENCE)?.expect("a record");
    assert!(record.phase == VmPhase::Forgotten && record.hosts.is_empty(), "{record:?}");
    assert_eq!(host_c.open(&web, Generation(3), &alone, PATIENCE)?, Applied::Done);
    // Hosts are found by their keys.
    let key = key_id(Keys::load(&cluster.keys("b"))?.own().certificate());
    assert_eq!(host_a.host_of(key, PATIENCE)?, Some("b".parse()?));
    assert_eq!(host_a.host_of(test_and_set::names::KeyId([7; 32]), PATIENCE)?, None);
    Ok(())
}

pub fn a_host_has_a_share_of_the_names() -> Result<(), Failed> {
    let mut cluster = Cluster::start_with(3, &["--names-per-host", "3", "--snapshot-every", "10"]);
    let [host_a, host_b] = ["a", "b"].map(|party| client(&cluster, party));
    let alone = || Members { primary: Member::new(Incarnation::random()), backup: None };
    let open = |host: &BlockingStore, name: &str| host.open(&vm(name), FIRST, &alone(), PATIENCE);
    for name in ["vm-1", "vm-2", "vm-3"] {
        assert_eq!(open(&host_a, name)?, Applied::Done);
    }
    // At once, so that no two get the last name.
    let refused: Vec<_> = std::thread::scope(|scope| {
        let tries: Vec<_> = (4..20)
            .map(|i| {
                scope.spawn({
                    let (open, host_a) = (&open, &host_a);
                    move || open(host_a, &format!("vm-{i}"))
                })
            })
            .collect();
        tries.into_iter().map(|one| refusal(one.join().expect("an answer")).to_string()).collect()
    });
    assert!(refused.iter().all(|said| said.contains("host a has opened 3 VM names already")), "{refused:?}");
    assert_eq!(open(&host_b, "vm-4")?, Applied::Done, "another host has its own share");
    // The count is that of the records, also after a start from a snapshot.
    (1..=3).for_each(|id| cluster.kill(id));
    (1..=3).for_each(|id| cluster.start_node(id));
    refusal(open(&host_a, "vm-5"));
    let who = host_a.get(&vm("vm-1"), PATIENCE)?.and_then(|record| match record.phase {
        VmPhase::Open { members, .. } => Some(members.primary.incarnation),
        VmPhase::Forgotten => None,
    });
    assert_eq!(host_a.end(&vm("vm-1"), FIRST, who.expect("its member"), PATIENCE)?, Applied::Done);
    assert_eq!(host_a.open(&vm("vm-1"), Generation(2), &alone(), PATIENCE)?, Applied::Done, "an old name");
    Ok(())
}

/// Nobody reads a member's standard output: it goes on, and its other messages are as before.
pub fn the_audit_does_not_hold_up_a_member() -> Result<(), Failed> {
    let cluster = Cluster::start(0);
    let mut command = Process::new(env!("CARGO_BIN_EXE_vmft-store"));
    command.args(["serve", "--id", "1", "--listen", &cluster.address(1)]);
    command.args(["--peers", &format!("1={}", cluster.address(1))]);
    command.arg("--data").arg(cluster.data(1)).arg("--keys").arg(cluster.keys("1"));
    let log = std::fs::File::create(cluster.log(1))?;
    let member = command.stdout(std::process::Stdio::piped()).stderr(log).spawn()?;
    let _member = super::Running(member);
    let url = format!("raft://{}?keys={}", cluster.address(1), cluster.keys("client").display());
    let store = BlockingStore::connect(&url)?;
    let alone = Members { primary: Member::new(Incarnation::random()), backup: None };
    assert_eq!(store.open(&vm("vm"), FIRST, &alone, PATIENCE)?, Applied::Done);
    // A pipe holds 64 KiB, which is fewer than a thousand lines.
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                for _ in 0..500 {
                    let verdict = store.take(&vm("vm"), FIRST, alone.primary.incarnation, PATIENCE);
                    assert!(matches!(verdict, Verdict::Won), "{verdict:?}");
                }
            });
        }
    });
    Ok(())
}
