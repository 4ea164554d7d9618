//! A store that is restored from a backup after all of its members were lost.

use std::time::Duration;

use libtest_mimic::Failed;
use test_and_set::blocking::BlockingStore;
use test_and_set::names::{Generation, Incarnation, VmName};
use test_and_set::record::{Applied, Member, Members, Refusal, Verdict, VmPhase};
use test_and_set::store::StoreError;

use super::Cluster;

const PATIENCE: Duration = Duration::from_secs(15);

fn vm(name: &str) -> VmName {
    name.parse().expect("a name")
}

fn open(store: &BlockingStore, name: &str, generation: Generation) -> Result<[Incarnation; 2], StoreError> {
    let [a, b] = [Incarnation::random(), Incarnation::random()];
    let members = Members { primary: Member::new(a), backup: Some(Member::new(b)) };
    assert_eq!(store.open(&vm(name), generation, &members, PATIENCE)?, Applied::Done);
    Ok([a, b])
}

fn succeeds(cluster: &Cluster, args: &[&str]) -> String {
    let output = cluster.tool(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// What a restore says; whether it succeeds is checked.
fn restore(cluster: &Cluster, args: &[&str], does: bool) -> String {
    let (file, peer) = (cluster.dir.path().join("backup"), format!("1={}", cluster.address(1)));
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_vmft-store"));
    command.arg("restore").arg(file).args(["--id", "1", "--peers", &peer]).args(args);
    let output = command.arg("--data").arg(cluster.data(1)).output().expect("vmft-store");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.success(), does, "{said}");
    said
}

pub fn all_members_are_lost_and_restored() -> Result<(), Failed> {
    let mut cluster = Cluster::start(3);
    let store = BlockingStore::connect(&cluster.url())?;
    let first = Generation::FIRST;
    // A pair that runs; one that fails over before the backup, one after it; one that has ended; one that starts after it.
    let [running, _] = open(&store, "running", first)?;
    let [before, lost] = open(&store, "before", first)?;
    assert!(matches!(store.take(&vm("before"), first, before, PATIENCE), Verdict::Won));
    let [after, its_peer] = open(&store, "after", first)?;
    let [ended, _] = open(&store, "ended", first)?;
    assert_eq!(store.end(&vm("ended"), first, ended, PATIENCE)?, Applied::Done);
    let file = cluster.dir.path().join("backup");
    let file = file.to_str().expect("a path");
    assert!(succeeds(&cluster, &["backup", file]).starts_with("4 VMs of cluster vmft"));
    assert!(!cluster.tool(&["backup", file]).status.success(), "a backup replaces nothing");
    assert!(matches!(store.take(&vm("after"), first, after, PATIENCE), Verdict::Won));
    let [late, _] = open(&store, "late", first)?;
    (1..=3).for_each(|id| cluster.kill(id));
    assert!(restore(&cluster, &["--force-new-cluster"], false).contains("is not empty"));
    for id in 1..=3 {
        std::fs::remove_dir_all(cluster.data(id))?;
    }
    assert!(restore(&cluster, &[], false).contains("--force-new-cluster"));
    restore(&cluster, &["--force-new-cluster"], true);
    let one = format!("1={}", cluster.address(1));
    cluster.start_node_as(1, &["--peers", &one]);
    for id in [2, 3] {
        cluster.start_node_as(id, &["--join"]);
        let address = cluster.address(id);
        succeeds(&cluster, &["member", "add", &id.to_string(), &address, "--patience", "20"]);
    }
    // Any member may die now.
    let leader = cluster.leader();
    cluster.kill(leader);
    let store = BlockingStore::connect(&cluster.url())?;
    // Who had won by the backup has won. Nobody else wins: the other side may have won since.
    assert!(matches!(store.take(&vm("before"), first, before, PATIENCE), Verdict::Won));
    assert!(matches!(store.take(&vm("before"), first, lost, PATIENCE), Verdict::Lost(_)));
    for (name, who) in [("after", its_peer), ("after", after), ("running", running), ("late", late)] {
        let verdict = store.take(&vm(name), first, who, PATIENCE);
        assert!(
            matches!(verdict, Verdict::Unknown(StoreError::Refused(Refusal::Restored))),
            "{name}: {verdict:?}"
        );
    }
    // The pair ends, or an operator forgets it: then the VM starts again. A VM that had ended starts at once.
    assert_eq!(store.end(&vm("running"), first, running, PATIENCE)?, Applied::Done);
    assert_eq!(store.forget(&vm("after"), first, PATIENCE)?, Applied::Done);
    for name in ["running", "after", "ended", "late"] {
        let record = store.get(&vm(name), PATIENCE)?.expect("a record");
        assert_eq!(record.phase, VmPhase::Forgotten);
        let next = record.next_generation().expect("a generation");
        let [who, _] = open(&store, name, next)?;
        assert!(matches!(store.take(&vm(name), next, who, PATIENCE), Verdict::Won), "{name}");
    }
    assert!(matches!(store.take(&vm("after"), first, its_peer, PATIENCE), Verdict::Stale));
    Ok(())
}
