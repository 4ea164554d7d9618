//! Concurrent clients of three members, and a nemesis that kills, pauses and restarts members, damages their files, restores
//! old copies of their data and cuts links. What the clients observed is checked.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command as Process;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use rustix::process::{Pid, Signal, kill_process};
use test_and_set::checker::{self, Call, Observed, Operation};
use test_and_set::keys;
use test_and_set::names::{Generation, Incarnation, PartyName, VmName};
use test_and_set::record::{Asker, Command, CommandReply, HostId, Member, Members, VmPhase, VmRecord};
use test_and_set::store::TestAndSet;

use super::net::Net;
use super::{Running, client};

const MEMBERS: [u8; 3] = [1, 2, 3];
const CLIENT: u8 = 100;
const PORT: u16 = 7000;
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

/// Three members, each in a network namespace of its own.
struct Members3<'n> {
    net: &'n Net,
    dir: PathBuf,
    nodes: BTreeMap<u8, Running>,
    /// The members of whose data there is an old copy.
    copied: BTreeSet<u8>,
}

impl Members3<'_> {
    fn start(&mut self, id: u8) {
        let peers: Vec<_> = MEMBERS.iter().map(|i| format!("{i}={}:{PORT}", Net::address(*i))).collect();
        self.start_as(id, &["--peers", &peers.join(",")]);
    }

    fn start_as(&mut self, id: u8, how: &[&str]) {
        let mut command = Process::new("ip");
        command.args(["netns", "exec", &self.net.namespace(id), env!("CARGO_BIN_EXE_vmft-store"), "serve"]);
        command.args(["--id", &id.to_string(), "--listen", &format!("{}:{PORT}", Net::address(id))]);
        // Few commands between snapshots, so that snapshots and purges are tried, too.
        command.args(how).args(["--snapshot-every", "500", "--names-per-host", "1000000"]);
        command.arg("--data").arg(self.data(id)).arg("--keys").arg(self.dir.join(format!("keys/{id}")));
        self.nodes.insert(id, Running::start(&mut command, &self.dir.join(format!("{id}.log"))));
    }

    fn data(&self, id: u8) -> PathBuf {
        self.dir.join(format!("data{id}"))
    }

    fn url(&self, party: &str) -> String {
        let nodes: Vec<_> = MEMBERS.iter().map(|id| format!("{}:{PORT}", Net::address(*id))).collect();
        format!("raft://{}?keys={}", nodes.join(","), self.dir.join("keys").join(party).display())
    }

    /// Runs `vmft-store member` where the clients are.
    fn change_members(&self, args: &[&str]) {
        let mut command = Process::new("ip");
        command.args([
            "netns",
            "exec",
            &self.net.namespace(CLIENT),
            env!("CARGO_BIN_EXE_vmft-store"),
            "member",
        ]);
        command.args(args).args(["--patience", "30", "--store", &self.url(PARTIES[OPERATOR])]);
        let output = command.output().expect("vmft-store");
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Damages a file of a member that is down, and starts the member. If it refuses its data, it is added anew.
    fn damage_for(
        &mut self,
        id: u8,
        random: &mut StdRng,
        hold: Duration,
        wait: impl Fn(Duration),
    ) -> &'static str {
        self.kill(id);
        let file = ["log.redb", "snapshot.redb", "journal"].choose(random).expect("files");
        super::damage::damage(&self.data(id).join(file), random).expect("to damage a file");
        wait(hold);
        self.start(id);
        match self.added_anew_if_refused(id, "is damaged", wait) {
            true => "damage one, which refuses",
            false => "damage one, which has everything",
        }
    }

    /// Waits until a member that was just started has refused its data, with these words; then removes it and adds it anew. Returns
    /// whether it did.
    fn added_anew_if_refused(&mut self, id: u8, words: &str, wait: impl Fn(Duration)) -> bool {
        for _ in 0..20 {
            wait(Duration::from_millis(100));
            let member = &mut self.nodes.get_mut(&id).expect("a member").0;
            if member.try_wait().expect("its state").is_some() {
                let log = std::fs::read_to_string(self.dir.join(format!("{id}.log"))).expect("its log");
                assert!(log.lines().last().is_some_and(|line| line.contains(words)), "{log}");
                self.change_members(&["remove", &id.to_string()]);
                std::fs::remove_dir_all(self.data(id)).expect("to remove its data");
                self.copied.remove(&id);
                self.start_as(id, &["--join"]);
                self.change_members(&["add", &id.to_string(), &format!("{}:{PORT}", Net::address(id))]);
                return true;
            }
        }
        false
    }

    fn copy(&self, from: &Path, to: &Path) {
        std::fs::remove_dir_all(to).ok();
        let copied = Process::new("cp").arg("-a").arg(from).arg(to).status().expect("cp");
        assert!(copied.success());
    }

    /// Stops a member and starts it with an old copy of its data; the others tell it, and it is added anew. Without a copy, takes
    /// one for a later round.
    fn restore_for(&mut self, id: u8, hold: Duration, wait: impl Fn(Duration)) -> &'static str {
        self.kill(id);
        let copy = self.dir.join(format!("copy{id}"));
        if self.copied.insert(id) {
            self.copy(&self.data(id), &copy);
            wait(hold);
            self.start(id);
            return "copy one";
        }
        self.copy(&copy, &self.data(id));
        wait(hold);
        self.start(id);
        match self.added_anew_if_refused(id, " remembers change ", wait) {
            true => "restore one, which is told and ends",
            false => "restore one, of which nobody remembers more",
        }
    }

    fn signal(&self, id: u8, signal: Signal) {
        let pid = Pid::from_child(&self.nodes[&id].0);
        kill_process(pid, signal).expect("to signal a member");
    }

    fn kill(&mut self, id: u8) {
        self.nodes.remove(&id).expect("a running member").kill();
    }

    /// Causes a random fault, waits, and repairs it; returns its name.
    fn round(&mut self, random: &mut StdRng, wait: impl Fn(Duration)) -> &'static str {
        let hold = Duration::from_millis(random.random_range(200..1500));
        let mut order = MEMBERS;
        rand::seq::SliceRandom::shuffle(&mut order[..], random);
        let [a, b, c] = order;
        let cut_both = |x, y| {
            self.net.cut(x, y);
            self.net.cut(y, x);
        };
        match random.random_range(0..15) {
            0 => self.kill_for(&[a], hold, wait, "kill one"),
            1 => self.kill_for(&[a, b], hold, wait, "kill two"),
            2 => self.kill_for(&[a, b, c], hold, wait, "kill all"),
            3 => self.pause_for(&[a], hold, wait, "pause one"),
            4 => self.pause_for(&[a, b], hold, wait, "pause two"),
            5 => {
                self.signal(a, Signal::STOP);
                self.kill_for(&[b], hold, wait, "");
                self.signal(a, Signal::CONT);
                "pause one, kill another"
            }
            6 => {
                [b, c].into_iter().for_each(|other| cut_both(a, other));
                self.healed_after(hold, wait, "one from the others")
            }
            7 => {
                self.net.cut(a, b);
                self.healed_after(hold, wait, "one link one way")
            }
            8 => {
                // It receives nothing but can send, or the other way round.
                let deaf = random.random_bool(0.5);
                [b, c]
                    .into_iter()
                    .for_each(|other| if deaf { self.net.cut(other, a) } else { self.net.cut(a, other) });
                self.healed_after(hold, wait, "one from the others, one way")
            }
            12..15 => self.restore_for(a, hold, wait),
            9 | 10 => self.damage_for(a, random, hold, wait),
            _ => {
                // The client reaches only one member, which the others do not reach, and one more link is cut in one direction.
                [(a, b), (a, c), (b, CLIENT)].into_iter().for_each(|(x, y)| cut_both(x, y));
                self.net.cut(c, CLIENT);
                self.healed_after(hold, wait, "client and leader apart")
            }
        }
    }

    fn kill_for(
        &mut self,
        ids: &[u8],
        hold: Duration,
        wait: impl Fn(Duration),
        name: &'static str,
    ) -> &'static str {
        ids.iter().for_each(|id| self.kill(*id));
        wait(hold);
        ids.iter().for_each(|id| self.start(*id));
        name
    }

    fn pause_for(
        &self,
        ids: &[u8],
        hold: Duration,
        wait: impl Fn(Duration),
        name: &'static str,
    ) -> &'static str {
        ids.iter().for_each(|id| self.signal(*id, Signal::STOP));
        wait(hold);
        ids.iter().for_each(|id| self.signal(*id, Signal::CONT));
        name
    }

    fn healed_after(&self, hold: Duration, wait: impl Fn(Duration), name: &'static str) -> &'static str {
        wait(hold);
        self.net.heal();
        name
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
