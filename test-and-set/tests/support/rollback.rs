//! Members that are restored from old copies of their data.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use libtest_mimic::Failed;
use test_and_set::blocking::BlockingStore;
use test_and_set::names::{Generation, Incarnation};
use test_and_set::record::{Applied, Member, Members, Verdict};
use test_and_set::store::StoreError;

use super::{Cluster, SmallDisk, wait_for};

const PATIENCE: Duration = Duration::from_secs(15);
const WORDS: [&str; 4] = [" remembers change ", "old copy", "vmft-store member remove", "--join"];

/// Copies a member's data, which must not run.
fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-a").arg(from).arg(to).status().expect("cp");
    assert!(copied.success());
}

/// Puts an old copy in the place of a member's data.
fn restore(cluster: &Cluster, id: usize, from: &Path) {
    std::fs::remove_dir_all(cluster.data(id)).expect("to remove the newer data");
    copy(from, &cluster.data(id));
}

/// Waits until a member has ended, and returns what it said last.
fn last_words(cluster: &mut Cluster, id: usize) -> String {
    wait_for("the end of the member", || {
        cluster.nodes[id - 1].as_mut().expect("a member").0.try_wait().expect("its state")
    });
    cluster.nodes[id - 1] = None;
    let log = std::fs::read_to_string(cluster.log(id)).expect("its log");
    log.lines().last().unwrap_or_default().into()
}

/// Waits until a member has applied all that another one has.
fn wait_until_caught_up(cluster: &Cluster, id: usize, other: usize) {
    wait_for("a member that has caught up", || {
        let status = cluster.status();
        let applied = |id: usize| status[id - 1]["answer"]["status"]["applied_index"].as_u64();
        (applied(id).is_some() && applied(id) == applied(other)).then_some(())
    });
}

fn open_pair(store: &BlockingStore, name: &str) -> Result<[Incarnation; 2], StoreError> {
    let [a, b] = [Incarnation::random(), Incarnation::random()];
    let members = Members { primary: Member::new(a), backup: Some(Member::new(b)) };
    let vm = name.parse().expect("a name");
    assert_eq!(store.open(&vm, Generation::FIRST, &members, PATIENCE)?, Applied::Done);
    Ok([a, b])
}

pub fn an_old_copy_is_told_and_ends() -> Result<(), Failed> {
    let mut cluster = Cluster::start(3);
    let store = BlockingStore::connect(&cluster.url())?;
    open_pair(&store, "before")?;
    cluster.kill(3);
    let old = cluster.dir.path().join("old");
    copy(&cluster.data(3), &old);
    cluster.start_node(3);
    for n in 0..5 {
        open_pair(&store, &format!("vm-{n}"))?;
    }
    wait_until_caught_up(&cluster, 3, cluster.leader());
    // A restart with all that it had is no reason.
    cluster.kill(3);
    cluster.start_node(3);
    wait_until_caught_up(&cluster, 3, cluster.leader());
    cluster.kill(3);
    restore(&cluster, 3, &old);
    // It is told by the others, and later by its own data, also when nobody else runs.
    cluster.start_node(3);
    let told = last_words(&mut cluster, 3);
    (1..=2).for_each(|id| cluster.kill(id));
    cluster.start_node(3);
    let again = last_words(&mut cluster, 3);
    for words in WORDS {
        assert!(
            told.contains(words) && again.contains(words),
            "{words:?} is not in {told:?} and in {again:?}"
        );
    }
    // Without the mark, the others remember it after their restart.
    (1..=2).for_each(|id| cluster.start_node(id));
    cluster.leader();
    restore(&cluster, 3, &old);
    cluster.start_node(3);
    assert!(last_words(&mut cluster, 3).contains(WORDS[0]));
    // It comes back as a new member.
    let run = |cluster: &Cluster, args: &[&str]| {
        let output = cluster.tool(&[args, &["--patience", "20"]].concat());
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    run(&cluster, &["member", "remove", "3"]);
    std::fs::remove_dir_all(cluster.data(3))?;
    cluster.start_node_as(3, &["--join"]);
    run(&cluster, &["member", "add", "3", &cluster.address(3)]);
    wait_until_caught_up(&cluster, 3, cluster.leader());
    Ok(())
}

/// The answers to the takes of both sides of a pair. Of three members one stores nothing, because its disk is full, while the other
/// two give the verdict to A. Then one of these two is down, and the other one is an old copy of itself, when B asks.
fn takes_around_an_old_copy(left_out: Option<&'static str>) -> Result<[Verdict<StoreError>; 2], Failed> {
    for _ in 0..5 {
        if let Some(verdicts) = try_takes_around_an_old_copy(left_out)? {
            return Ok(verdicts);
        }
    }
    Err("the member with the full disk was elected each time".into())
}

/// `None` if the member with the full disk was elected meanwhile, as happens on a busy machine.
fn try_takes_around_an_old_copy(
    left_out: Option<&'static str>,
) -> Result<Option<[Verdict<StoreError>; 2]>, Failed> {
    let mut cluster = Cluster::prepare(3, &[]);
    cluster.left_out = left_out;
    let small = SmallDisk::mount(&cluster.data(2))?;
    (1..=3).for_each(|id| cluster.start_node(id));
    let store = BlockingStore::connect(&cluster.url())?;
    let [a, b] = open_pair(&store, "vm")?;
    let mut leader = cluster.leader();
    if leader == 2 {
        // The leader must not be the one whose disk is small. It is away until the others have elected one.
        cluster.kill(2);
        leader = cluster.leader();
        cluster.start_node(2);
    }
    let restored = 4 - leader;
    wait_until_caught_up(&cluster, restored, leader);
    cluster.kill(restored);
    let old = cluster.dir.path().join("old");
    copy(&cluster.data(restored), &old);
    cluster.start_node(restored);
    wait_until_caught_up(&cluster, restored, leader);
    wait_until_caught_up(&cluster, 2, leader);
    small.fill()?;
    let vm = "vm".parse().expect("a name");
    let first = store.take(&vm, Generation::FIRST, a, PATIENCE);
    if matches!(first, Verdict::Unknown(StoreError::DiskFull(_))) {
        return Ok(None);
    }
    wait_for("what the full member hears of the other one", || {
        let status = cluster.status();
        let of = |id: usize| status[id - 1]["answer"]["status"].clone();
        let remembered = of(2)["members"][restored.to_string()]["remembered_change"].as_u64();
        (remembered.is_some() && remembered == of(restored)["change"].as_u64()).then_some(())
    });
    cluster.kill(leader);
    cluster.kill(restored);
    small.empty()?;
    restore(&cluster, restored, &old);
    cluster.start_node(restored);
    if left_out.is_none() {
        let said = last_words(&mut cluster, restored);
        assert!(said.contains("member 2 remembers change"), "{said}");
    }
    let patience = if left_out.is_none() { Duration::from_secs(3) } else { PATIENCE };
    let second = store.take(&vm, Generation::FIRST, b, patience);
    // The verdict holds when the member is back that knows it.
    if left_out.is_none() {
        cluster.start_node(leader);
        let third = store.take(&vm, Generation::FIRST, b, PATIENCE);
        assert!(matches!(third, Verdict::Lost(holder) if holder == a), "{third:?}");
    }
    Ok(Some([first, second]))
}

pub fn an_old_copy_does_not_vote_a_verdict_away() -> Result<(), Failed> {
    let verdicts = takes_around_an_old_copy(None)?;
    assert!(matches!(verdicts, [Verdict::Won, Verdict::Unknown(_)]), "{verdicts:?}");
    Ok(())
}

/// The rule is what prevents it.
pub fn without_the_rule_an_old_copy_makes_two_winners() -> Result<(), Failed> {
    let verdicts = takes_around_an_old_copy(Some("rollback"))?;
    assert!(matches!(verdicts, [Verdict::Won, Verdict::Won]), "{verdicts:?}");
    Ok(())
}
