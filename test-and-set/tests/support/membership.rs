//! What the store's members do when one is added that does not answer, or removed at the wrong time.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;

use super::{Cluster, wait_for};

/// What `vmft-store member` says; whether it succeeds is checked.
fn member(cluster: &Cluster, args: &[&str], succeeds: bool) -> String {
    let output = cluster.tool(&[&["member"], args, &["--patience", "20"]].concat());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.success(), succeeds, "{args:?}: {said}");
    said
}

/// The members that vote, or do not, as the leader sees them.
fn members(cluster: &Cluster, votes: bool) -> Vec<String> {
    let leader = cluster.leader();
    let members = cluster.status()[leader - 1]["answer"]["status"]["members"].clone();
    let members = members.as_object().expect("members");
    members.iter().filter(|(_, member)| member["votes"] == votes).map(|(id, _)| id.clone()).collect()
}

pub fn a_member_that_is_not_there_gets_no_vote() -> Result<(), Failed> {
    let cluster = Cluster::start(3);
    cluster.leader();
    // Nobody listens, then somebody who never says a word.
    let said = member(&cluster, &["add", "4", &cluster.address(4)], false);
    assert!(said.contains("member 4 does not answer at"), "{said}");
    let silent = TcpListener::bind("127.0.0.1:0")?;
    let said = member(&cluster, &["add", "4", &silent.local_addr()?.to_string()], false);
    assert!(said.contains("member 4 does not answer at"), "{said}");
    // Another member listens there.
    let said = member(&cluster, &["add", "4", &cluster.address(1)], false);
    assert!(said.contains("calls itself member 1"), "{said}");
    assert_eq!(members(&cluster, true), ["1", "2", "3"]);
    assert_eq!(members(&cluster, false), [""; 0]);
    // A member's address is not changed in passing.
    let said = member(&cluster, &["add", "2", &cluster.address(4)], false);
    assert!(said.contains("remove it before you add it"), "{said}");
    Ok(())
}

/// A member that ends while it is added, before it has the log.
pub fn a_new_member_votes_only_with_all_of_the_log() -> Result<(), Failed> {
    let mut cluster = Cluster::start(3);
    cluster.leader();
    cluster.start_node_as(4, &["--join"]);
    // It answers, but cannot store anything.
    wait_for("the new member's data", || cluster.data(4).join("log.redb").exists().then_some(()));
    std::thread::sleep(Duration::from_millis(300));
    let pid = rustix::process::Pid::from_child(&cluster.nodes[3].as_ref().expect("member 4").0);
    let limit = rustix::process::Rlimit { current: Some(0), maximum: None };
    rustix::process::prlimit(Some(pid), rustix::process::Resource::Fsize, limit)?;
    let output = cluster.tool(&["member", "add", "4", &cluster.address(4), "--patience", "5"]);
    assert!(!output.status.success(), "it must not be added");
    assert_eq!(members(&cluster, true), ["1", "2", "3"]);
    // It is a learner until the leader gives up. When it works again, adding it again gives it its vote.
    cluster.start_node_as(4, &["--join"]);
    member(&cluster, &["add", "4", &cluster.address(4)], true);
    assert_eq!(members(&cluster, true), ["1", "2", "3", "4"]);
    Ok(())
}

pub fn a_removal_leaves_a_quorum_that_answers() -> Result<(), Failed> {
    let mut cluster = Cluster::start(3);
    let leader = cluster.leader();
    let [dead, other] = *(1..=3).filter(|id| *id != leader).collect::<Vec<_>>() else {
        panic!("three members")
    };
    cluster.kill(dead);
    std::thread::sleep(Duration::from_millis(500));
    // Without either of the two that answer, the other one would be alone.
    let asked = Instant::now();
    for id in [other, leader] {
        let said = member(&cluster, &["remove", &id.to_string()], false);
        assert!(said.contains(&format!("member {dead} does not answer")), "{said}");
    }
    assert!(asked.elapsed() < Duration::from_secs(5), "a refusal took {:?}", asked.elapsed());
    assert_eq!(members(&cluster, true), ["1", "2", "3"]);
    member(&cluster, &["remove", &dead.to_string()], true);
    member(&cluster, &["remove", &other.to_string()], true);
    let said = member(&cluster, &["remove", &leader.to_string()], false);
    assert!(said.contains("last member"), "{said}");
    Ok(())
}

/// A member that did not hear of its removal and comes back with its old data must not make that known to the others again: then they
/// would refuse it with new data.
pub fn a_removed_member_comes_back_with_new_data_only() -> Result<(), Failed> {
    let mut cluster = Cluster::start(3);
    let leader = cluster.leader();
    let removed = leader % 3 + 1;
    cluster.kill(removed);
    std::thread::sleep(Duration::from_millis(500));
    member(&cluster, &["remove", &removed.to_string()], true);
    cluster.start_node(removed);
    wait_for("a refusal of the removed member", || {
        let others = (1..=3).filter(|id| *id != removed);
        let logs: String = others.filter_map(|id| std::fs::read_to_string(cluster.log(id)).ok()).collect();
        logs.contains("NotAMember").then_some(())
    });
    assert_eq!(members(&cluster, true).len(), 2);
    cluster.kill(removed);
    std::fs::remove_dir_all(cluster.data(removed))?;
    cluster.start_node_as(removed, &["--join"]);
    member(&cluster, &["add", &removed.to_string(), &cluster.address(removed)], true);
    assert_eq!(members(&cluster, true), ["1", "2", "3"]);
    Ok(())
}
