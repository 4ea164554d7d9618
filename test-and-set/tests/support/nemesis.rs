//! Concurrent clients of three members, and a nemesis that kills, pauses and restarts members, damages their files, restores
//! old copies of their data and cuts links. What the clients observed is checked.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use test_and_set::checker::{self, Call, Observed, Operation};
use test_and_set::keys;
use test_and_set::names::{Generation, Incarnation, PartyName, VmName};
use test_and_set::record::{Asker, Command, CommandReply, HostId, Member, Members, VmPhase, VmRecord};
use test_and_set::store::TestAndSet;

use super::client;
use super::disturbed::{CLIENT, MEMBERS, Members3};
use super::net::Net;

/// Who calls: three hosts and an operator.
const PARTIES: [&str; 4] = ["a", "b", "c", "admin"];
const OPERATOR: usize = 3;
/// The number of VMs in use at once. After [`CALLS_PER_VM`] calls each is replaced by a new one, because the time to check a history
/// grows fast with its length.
const VMS: usize = 6;
const CALLS_PER_VM: usize = 30;
/// How long a call may take before its outcome is unknown.
const PATIENCE: Duration = Duration::from_millis(700);

/// The parameters of a trial.
pub struct Plan {
    pub rounds: usize,
    pub workers: usize,
    /// The average pause between two calls of a worker.
    pub pause: Duration,
    pub seed: u64,
}

/// The result of a trial.
pub struct NemesisReport {
    pub calls: usize,
    pub unknown: usize,
    pub vms: usize,
    pub won: usize,
    pub faults: BTreeMap<&'static str, usize>,
    pub took: Duration,
}

impl std::fmt::Display for NemesisReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { calls, unknown, vms, won, took, .. } = self;
        writeln!(
            f,
            "{calls} calls on {vms} VMs in {took:.0?}, {unknown} without an answer, {won} answered Won; linearizable"
        )?;
        write!(f, "{} rounds: {:?}", self.faults.values().sum::<usize>(), self.faults)
    }
}

/// What the workers know about a VM, from the answers so far.
#[derive(Clone)]
struct Known {
    vm: VmName,
    record: Option<VmRecord>,
    calls: usize,
}

impl Known {
    fn new(number: usize) -> Self {
        Self { vm: format!("vm-{number}").parse().expect("a name"), record: None, calls: 0 }
    }
}

/// A host, or the operator.
struct Caller {
    asker: Asker,
    store: Arc<dyn TestAndSet>,
}

impl Caller {
    /// The party with this number; must be called in a runtime.
    fn new(party: usize, url: &str) -> Self {
        let name = Some(PARTIES[party].parse().expect("a name"));
        let asker = match party {
            OPERATOR => Asker { host: None, operator: name },
            _ => Asker { host: name, operator: None },
        };
        Self { asker, store: client(url) }
    }
}

/// The number of the party on whose host a member is.
fn host_of(member: &Member) -> usize {
    let host = |name: &PartyName| PARTIES.iter().position(|party| *party == name.as_str());
    match &member.host {
        Some(HostId::Name(name)) => host(name).expect("one of the hosts"),
        other => panic!("the host is {other:?}"),
    }
}

struct Workload {
    callers: Vec<Caller>,
    known: Mutex<(Vec<Known>, usize)>,
    history: Mutex<BTreeMap<VmName, Vec<Operation>>>,
    begun: Instant,
    stop: AtomicBool,
}

impl Workload {
    fn now(&self) -> u64 {
        self.begun.elapsed().as_nanos() as u64
    }

    /// Makes a call, and records its answer and times.
    async fn call(&self, party: usize, vm: &VmName, call: Call) -> Option<Observed> {
        let Caller { asker, store } = &self.callers[party];
        let deadline = Instant::now() + PATIENCE;
        let begun = self.now();
        let seen = match &call {
            Call::Command(command) => store.command(vm, command, deadline).await.ok().map(Observed::Reply),
            Call::Get => store.get(vm, deadline).await.ok().map(Observed::Record),
        };
        let ended = seen.clone().map(|seen| (self.now(), seen));
        // A get without an answer proves nothing.
        if ended.is_some() || call != Call::Get {
            let mut history = self.history.lock().expect("the history");
            history.entry(vm.clone()).or_default().push(Operation {
                begun,
                ended,
                asker: Some(asker.clone()),
                call,
            });
        }
        seen
    }

    /// Makes a call that makes sense after what is known about a random VM. Never takes a generation that is not open yet: the
    /// client's repetition of a take that was answered Stale may be applied later, when it is open, and no agent makes such calls.
    async fn step(&self, random: &mut StdRng) {
        let at = random.random_range(0..VMS);
        let Known { vm, record, .. } = self.use_vm(at);
        let fresh = Incarnation::random;
        let on = |who, host: usize| {
            let name = PARTIES[host].parse().expect("a name");
            Member { host: Some(HostId::Name(name)), ..Member::new(who) }
        };
        let (at_host, other_host) = (random.random_range(0..OPERATOR), random.random_range(0..OPERATOR));
        let opening = |generation, primary| {
            let members = Members { primary, backup: Some(on(fresh(), other_host)) };
            Call::Command(Command::Open { generation, members })
        };
        let mut party = at_host;
        let call = match &record {
            None => opening(Generation::FIRST, on(fresh(), at_host)),
            Some(VmRecord { generation, phase: VmPhase::Forgotten, .. }) => {
                opening(generation.next().expect("a next generation"), on(fresh(), at_host))
            }
            Some(VmRecord { generation, phase: VmPhase::Open { members, holder }, .. }) => {
                let side = [&members.primary, members.backup.as_ref().expect("a backup")];
                let side = *side.choose(random).expect("two");
                let member = side.incarnation;
                party = host_of(side);
                match random.random_range(0..100) {
                    0..45 => Call::Command(Command::Take { generation: *generation, who: member }),
                    45..52 => Call::Command(Command::Take { generation: *generation, who: fresh() }),
                    52..58 => {
                        Call::Command(Command::Take { generation: Generation(generation.0 - 1), who: member })
                    }
                    58..60 => {
                        party = OPERATOR;
                        Call::Command(Command::Forget { generation: *generation })
                    }
                    60..62 => Call::Command(Command::End { generation: *generation, who: member }),
                    62..85 => match holder.and_then(|holder| members.find(holder)) {
                        // By the holder, or by the member that lost.
                        Some(holder) => {
                            let primary = if random.random_bool(0.8) { holder } else { side };
                            party = host_of(primary);
                            opening(generation.next().expect("a next generation"), primary.clone())
                        }
                        None => Call::Get,
                    },
                    _ => Call::Get,
                }
            }
        };
        // Now and then somebody asks who may not.
        if random.random_bool(0.1) {
            party = random.random_range(0..PARTIES.len());
        }
        let seen = self.call(party, &vm, call).await;
        let record = match seen {
            Some(Observed::Record(record)) => record,
            // After any other answer the record is read.
            _ => match self.call(party, &vm, Call::Get).await {
                Some(Observed::Record(record)) => record,
                _ => return,
            },
        };
        self.learn(at, &vm, record);
    }

    fn use_vm(&self, at: usize) -> Known {
        let mut known = self.known.lock().expect("what is known");
        let (vms, next) = &mut *known;
        vms[at].calls += 1;
        if vms[at].calls > CALLS_PER_VM {
            *next += 1;
            vms[at] = Known::new(*next);
        }
        vms[at].clone()
    }

    fn learn(&self, at: usize, vm: &VmName, record: Option<VmRecord>) {
        let mut known = self.known.lock().expect("what is known");
        let known = &mut known.0[at];
        let age = |record: &Option<VmRecord>| {
            let record = record.as_ref()?;
            Some((record.generation, record.phase == VmPhase::Forgotten, record.holder().is_some()))
        };
        if known.vm == *vm && age(&record) > age(&known.record) {
            known.record = record;
        }
    }
}

/// Runs a trial and checks it. Panics with the seed if no store can have given these answers.
pub fn run(plan: &Plan) -> NemesisReport {
    let begun = Instant::now();
    let net = Net::new(&[MEMBERS[0], MEMBERS[1], MEMBERS[2], CLIENT]);
    let dir = tempfile::tempdir().expect("a directory");
    let (hosts, operators) = PARTIES.split_at(OPERATOR);
    let [hosts, operators] =
        [hosts, operators].map(|names| names.iter().map(|n| n.to_string()).collect::<Vec<_>>());
    keys::make_set(&dir.path().join("keys"), &MEMBERS.map(u64::from), &hosts, &operators).expect("keys");
    let mut members =
        Members3 { net: &net, dir: dir.path().into(), nodes: BTreeMap::new(), copied: BTreeSet::new() };
    MEMBERS.iter().for_each(|id| members.start(*id));
    let urls = PARTIES.map(|party| members.url(party));
    let mut faults = BTreeMap::new();
    let history = std::thread::scope(|scope| {
        let (ready, workload) = std::sync::mpsc::channel();
        let net = &net;
        let clients = scope.spawn(move || {
            net.enter(CLIENT);
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let known = Mutex::new(((0..VMS).map(Known::new).collect(), VMS));
                let history = Mutex::default();
                let (begun, stop) = (Instant::now(), AtomicBool::new(false));
                let callers = urls.iter().enumerate().map(|(party, url)| Caller::new(party, url)).collect();
                let workload = Arc::new(Workload { callers, known, history, begun, stop });
                ready.send(workload.clone()).expect("the nemesis");
                work(workload, plan).await
            })
        });
        let workload: Arc<Workload> = workload.recv().expect("the workload");
        let mut random = StdRng::seed_from_u64(plan.seed);
        for _ in 0..plan.rounds {
            std::thread::sleep(Duration::from_millis(random.random_range(300..1200)));
            let fault = members.round(&mut random, std::thread::sleep);
            *faults.entry(fault).or_default() += 1;
        }
        // At the end there are no faults, and every VM is read once more.
        std::thread::sleep(Duration::from_secs(3));
        workload.stop.store(true, Relaxed);
        clients.join().expect("the clients")
    });
    let calls: Vec<_> = history.values().flatten().collect();
    let outcome = NemesisReport {
        calls: calls.len(),
        unknown: calls.iter().filter(|c| c.ended.is_none()).count(),
        vms: history.len(),
        won: calls
            .iter()
            .filter(|c| matches!(c.ended, Some((_, Observed::Reply(CommandReply::Won)))))
            .count(),
        faults,
        took: begun.elapsed(),
    };
    if let Err(violation) = checker::check(&history) {
        let mut calls = history[&violation.vm].clone();
        calls.sort_by_key(|call| call.begun);
        calls.iter().for_each(|call| eprintln!("{call:?}"));
        panic!("seed {}: {violation}", plan.seed);
    }
    one_winner_of_each_generation(&history);
    outcome
}

async fn work(workload: Arc<Workload>, plan: &Plan) -> BTreeMap<VmName, Vec<Operation>> {
    let mut workers = vec![];
    for worker in 0..plan.workers {
        let (workload, pause) = (workload.clone(), plan.pause);
        let mut random = StdRng::seed_from_u64(plan.seed ^ (worker as u64 + 1) << 32);
        workers.push(tokio::spawn(async move {
            while !workload.stop.load(Relaxed) {
                workload.step(&mut random).await;
                tokio::time::sleep(pause.mul_f64(random.random_range(0.0..2.0))).await;
            }
        }));
    }
    for worker in workers {
        worker.await.expect("a worker");
    }
    let vms: Vec<_> = workload.history.lock().expect("the history").keys().cloned().collect();
    for vm in vms {
        assert!(
            workload.call(OPERATOR, &vm, Call::Get).await.is_some(),
            "{vm} cannot be read after all faults were repaired"
        );
    }
    std::mem::take(&mut *workload.history.lock().expect("the history"))
}

/// Checks the main property without the checker: no generation has two winners.
fn one_winner_of_each_generation(history: &BTreeMap<VmName, Vec<Operation>>) {
    let mut winners: BTreeMap<(&VmName, Generation), BTreeSet<Incarnation>> = BTreeMap::new();
    for (vm, calls) in history {
        for call in calls {
            if let (
                Call::Command(Command::Take { generation, who }),
                Some((_, Observed::Reply(CommandReply::Won))),
            ) = (&call.call, &call.ended)
            {
                winners.entry((vm, *generation)).or_default().insert(*who);
            }
        }
    }
    for (generation, winners) in winners {
        assert!(winners.len() == 1, "{generation:?} has the winners {winners:?}");
    }
}
