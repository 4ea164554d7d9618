//! Checks that a store behaves as every store must: [`run`] panics at the first difference.
//!
//! For tests. It uses new random VM names, so it may run against a store in use. The client must be a host and an operator, if the
//! store has roles.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::names::{CopyId, DiskName, Generation, Incarnation, VmName};
use crate::record::{Applied, Member, Members, Verdict, VmPhase, VmRecord};
use crate::store::{StoreError, TestAndSet};

const PATIENCE: Duration = Duration::from_secs(20);

fn soon() -> Instant {
    Instant::now() + PATIENCE
}

fn new_vm(what: &str) -> VmName {
    format!("{what}-{}", &Incarnation::random().to_string()[..16]).parse().expect("a valid name")
}

fn pair(primary: Incarnation, backup: Incarnation) -> Members {
    Members { primary: Member::new(primary), backup: Some(Member::new(backup)) }
}

/// A VM with a new name, and the store that holds its record.
struct TestVm {
    store: Arc<dyn TestAndSet>,
    vm: VmName,
}

impl TestVm {
    fn new(store: &Arc<dyn TestAndSet>, what: &str) -> Self {
        Self { store: store.clone(), vm: new_vm(what) }
    }

    async fn take(&self, generation: u64, who: Incarnation) -> Verdict<StoreError> {
        self.store.take(&self.vm, Generation(generation), who, soon()).await
    }

    async fn open(&self, generation: u64, members: &Members) -> Applied {
        self.store.open(&self.vm, Generation(generation), members, soon()).await.expect("open")
    }

    async fn end(&self, generation: u64, who: Incarnation) -> Applied {
        self.store.end(&self.vm, Generation(generation), who, soon()).await.expect("end")
    }

    async fn forget(&self, generation: u64) -> Applied {
        self.store.forget(&self.vm, Generation(generation), soon()).await.expect("forget")
    }

    async fn get(&self) -> Option<VmRecord> {
        self.store.get(&self.vm, soon()).await.expect("get")
    }
}

macro_rules! expect {
    ($got:expr, $want:pat $(if $guard:expr)?) => {
        let got = $got;
        assert!(matches!(got, $want $(if $guard)?), "{} is {got:?}, not {}", stringify!($got), stringify!($want));
    };
}

/// Runs the whole suite.
pub async fn run(store: Arc<dyn TestAndSet>) {
    first_take_wins(&TestVm::new(&store, "first")).await;
    strangers_and_old_generations_are_stale(&TestVm::new(&store, "stale")).await;
    only_the_holder_opens_the_next(&TestVm::new(&store, "next")).await;
    generations_survive_forgetting(&TestVm::new(&store, "forget")).await;
    an_ended_vm_is_opened_again(&TestVm::new(&store, "end")).await;
    newest_disks_follow_the_holder(&TestVm::new(&store, "disks")).await;
    impossible_members_are_refused(&TestVm::new(&store, "refuse")).await;
    lists_in_order(&store).await;
    one_of_many_wins(&store).await;
    an_elapsed_deadline_is_unknown(&TestVm::new(&store, "late")).await;
}

async fn first_take_wins(case: &TestVm) {
    let [a, b] = [Incarnation::random(), Incarnation::random()];
    assert_eq!(case.get().await, None);
    assert_eq!(case.open(1, &pair(a, b)).await, Applied::Done);
    assert_eq!(case.get().await.and_then(|r| r.holder()), None);
    expect!(case.take(1, b).await, Verdict::Won);
    expect!(case.take(1, a).await, Verdict::Lost(holder) if holder == b);
    // Repetitions get the same answers.
    expect!(case.take(1, b).await, Verdict::Won);
    expect!(case.take(1, a).await, Verdict::Lost(holder) if holder == b);
    assert_eq!(case.open(1, &pair(a, b)).await, Applied::Done);
    let record = case.get().await.expect("a record");
    assert_eq!((record.generation, record.holder()), (Generation(1), Some(b)));
}

async fn strangers_and_old_generations_are_stale(case: &TestVm) {
    let [a, b, c] = [Incarnation::random(), Incarnation::random(), Incarnation::random()];
    expect!(case.take(1, a).await, Verdict::Stale);
    assert_eq!(case.get().await, None, "a stale take must create nothing");
    assert_eq!(case.open(2, &pair(a, b)).await, Applied::Stale);
    assert_eq!(case.open(0, &pair(a, b)).await, Applied::Stale);
    assert_eq!(case.forget(1).await, Applied::Stale);
    assert_eq!(case.get().await, None, "a stale open must create nothing");
    assert_eq!(case.open(1, &pair(a, b)).await, Applied::Done);
    let opened = case.get().await;
    expect!(case.take(1, c).await, Verdict::Stale);
    expect!(case.take(0, a).await, Verdict::Stale);
    expect!(case.take(2, a).await, Verdict::Stale);
    assert_eq!(case.open(1, &pair(a, c)).await, Applied::Stale);
    assert_eq!(case.get().await, opened, "a stale command must change nothing");
}

async fn only_the_holder_opens_the_next(case: &TestVm) {
    let [a, b, c, d] = [(); 4].map(|()| Incarnation::random());
    assert_eq!(case.open(1, &pair(a, b)).await, Applied::Done);
    assert_eq!(case.open(2, &pair(a, c)).await, Applied::Stale, "nobody holds generation 1 yet");
    expect!(case.take(1, a).await, Verdict::Won);
    assert_eq!(case.open(2, &pair(b, c)).await, Applied::Stale, "b does not hold it");
    assert_eq!(case.open(3, &pair(a, c)).await, Applied::Stale, "3 does not follow 1");
    assert_eq!(case.open(2, &pair(a, c)).await, Applied::Done);
    assert_eq!(case.open(2, &pair(a, c)).await, Applied::Done);
    assert_eq!(case.open(2, &pair(a, d)).await, Applied::Stale);
    expect!(case.take(1, a).await, Verdict::Stale);
    expect!(case.take(1, b).await, Verdict::Stale);
    expect!(case.take(2, b).await, Verdict::Stale);
    expect!(case.take(2, c).await, Verdict::Won);
    // A generation without a backup.
    let alone = Members { primary: Member::new(c), backup: None };
    assert_eq!(case.open(3, &alone).await, Applied::Done);
    expect!(case.take(3, c).await, Verdict::Won);
}

async fn generations_survive_forgetting(case: &TestVm) {
    let [a, b, c, d] = [(); 4].map(|()| Incarnation::random());
    assert_eq!(case.open(1, &pair(a, b)).await, Applied::Done);
    assert_eq!(case.forget(2).await, Applied::Stale);
    assert_eq!(case.forget(1).await, Applied::Done);
    assert_eq!(case.forget(1).await, Applied::Done);
    expect!(case.take(1, a).await, Verdict::Stale);
    assert_eq!(case.open(1, &pair(a, b)).await, Applied::Stale);
    let record = case.get().await.expect("the number of a forgotten VM");
    assert_eq!((record.generation, &record.phase), (Generation(1), &VmPhase::Forgotten));
    // A forgotten VM is opened like a new one, by whoever is first, but with the next number.
    assert_eq!(case.open(2, &pair(c, d)).await, Applied::Done);
    assert_eq!(case.open(2, &pair(d, c)).await, Applied::Stale);
    assert_eq!(case.forget(1).await, Applied::Stale);
    expect!(case.take(2, d).await, Verdict::Won);
}

async fn an_ended_vm_is_opened_again(case: &TestVm) {
    let [a, b, c, d] = [(); 4].map(|()| Incarnation::random());
    assert_eq!(case.end(1, a).await, Applied::Stale);
    assert_eq!(case.open(1, &pair(a, b)).await, Applied::Done);
    assert_eq!(case.end(1, c).await, Applied::Stale, "c is no member");
    assert_eq!(case.end(1, a).await, Applied::Done);
    assert_eq!(case.end(1, b).await, Applied::Done, "both sides may say so");
    expect!(case.take(1, a).await, Verdict::Stale);
    assert_eq!(case.open(2, &pair(c, d)).await, Applied::Done);
    expect!(case.take(2, d).await, Verdict::Won);
    assert_eq!(case.end(2, c).await, Applied::Stale, "c has lost, and does not end d's run");
    assert_eq!(case.end(2, d).await, Applied::Done);
    assert_eq!(case.open(3, &pair(a, b)).await, Applied::Done);
}

async fn newest_disks_follow_the_holder(case: &TestVm) {
    let disk: DiskName = "root".parse().expect("a valid name");
    let with_disk = || {
        let mut member = Member::new(Incarnation::random());
        member.disks.insert(disk.clone(), CopyId::random());
        member
    };
    let [a, b, c] = [(); 3].map(|()| with_disk());
    let newest = |members: &[&Member]| members.iter().map(|m| m.disks[&disk]).collect();
    let disks = async || case.get().await.expect("a record").disks.remove(&disk).expect("its disk");
    assert_eq!(case.open(1, &Members { primary: a.clone(), backup: Some(b.clone()) }).await, Applied::Done);
    assert_eq!(disks().await, newest(&[&a, &b]));
    expect!(case.take(1, b.incarnation).await, Verdict::Won);
    assert_eq!(disks().await, newest(&[&b]));
    assert_eq!(case.open(2, &Members { primary: b.clone(), backup: Some(c.clone()) }).await, Applied::Done);
    assert_eq!(disks().await, newest(&[&b, &c]));
    expect!(case.take(2, c.incarnation).await, Verdict::Won);
    assert_eq!(case.forget(2).await, Applied::Done);
    assert_eq!(disks().await, newest(&[&c]), "the newest disks must survive forgetting");
}

async fn impossible_members_are_refused(case: &TestVm) {
    let a = Incarnation::random();
    let refused = case.store.open(&case.vm, Generation(1), &pair(a, a), soon()).await;
    expect!(refused, Err(crate::store::StoreError::Refused(_)));
    let mut many = Member::new(a);
    for i in 0..=crate::names::DISKS_MAX {
        many.disks.insert(format!("d{i}").parse().expect("a valid name"), CopyId::random());
    }
    let members = Members { primary: many, backup: None };
    expect!(
        case.store.open(&case.vm, Generation(1), &members, soon()).await,
        Err(crate::store::StoreError::Refused(_))
    );
    assert_eq!(case.get().await, None);
}

async fn lists_in_order(store: &Arc<dyn TestAndSet>) {
    let cases: Vec<_> = (0..5).map(|i| TestVm::new(store, &format!("list{i}"))).collect();
    for case in &cases {
        let members = pair(Incarnation::random(), Incarnation::random());
        assert_eq!(case.open(1, &members).await, Applied::Done);
    }
    assert_eq!(cases[3].forget(1).await, Applied::Done);
    let mut seen = vec![];
    loop {
        let page = store.list(seen.last(), soon()).await.expect("list");
        if page.is_empty() {
            break;
        }
        seen.extend(page.into_iter().map(|(vm, _)| vm));
    }
    assert!(seen.is_sorted(), "the list must be in the order of the names");
    for (i, case) in cases.iter().enumerate() {
        assert_eq!(seen.contains(&case.vm), i != 3, "{} in the list", case.vm);
    }
}

async fn one_of_many_wins(store: &Arc<dyn TestAndSet>) {
    for round in 0..20 {
        let case = Arc::new(TestVm::new(store, "race"));
        let [a, b] = [Incarnation::random(), Incarnation::random()];
        assert_eq!(case.open(1, &pair(a, b)).await, Applied::Done);
        let tasks = [a, b, a, b].map(|who| {
            let case = case.clone();
            tokio::spawn(async move { (who, case.take(1, who).await) })
        });
        let mut winners = vec![];
        for task in tasks {
            match task.await.expect("the task") {
                (who, Verdict::Won) => winners.push(who),
                (who, Verdict::Lost(holder)) => assert_ne!(who, holder),
                (_, other) => panic!("round {round}: {other:?}"),
            }
        }
        winners.dedup();
        assert_eq!(winners.len(), 1, "round {round}: the winners are {winners:?}");
        assert_eq!(case.get().await.and_then(|r| r.holder()), Some(winners[0]));
    }
}

async fn an_elapsed_deadline_is_unknown(case: &TestVm) {
    let [a, b] = [Incarnation::random(), Incarnation::random()];
    assert_eq!(case.open(1, &pair(a, b)).await, Applied::Done);
    let begun = Instant::now();
    let verdict = case.store.take(&case.vm, Generation(1), a, Instant::now()).await;
    assert!(matches!(verdict, Verdict::Won | Verdict::Unknown(_)), "{verdict:?}");
    assert!(begun.elapsed() < Duration::from_secs(5), "a call must end at its deadline");
    expect!(case.take(1, a).await, Verdict::Won);
}
