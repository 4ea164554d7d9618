//! The simulated time, and the queue of events.

use std::collections::BTreeMap;

use agent::{Event, Phase, Rule};
use logging_channel::versions::{ChannelVersions, OURS};
use store_rule::names::VmName;

use super::MS;
use super::checker::{Checker, Claim, Counts, Failure};
use super::faults::{PlannedFault, plan_faults};
use super::link::Connection;
use super::process::{Host, Process};
use super::rng::Rng;
use super::sim_event::{SimEvent, SimResult};
use super::store_members::StoreMembers;

/// How long a run goes on after its last fault, so that the client gets its answers.
const PATIENCE: u64 = 800 * MS;
/// Number of answers after the last fault that show that the guest lives.
const ANSWERS: u64 = 3;

/// Who no longer accepts a host's key.
#[derive(Clone, Copy, Debug, Default)]
pub struct RevokedBy {
    pub peer: bool,
    pub store: bool,
}

/// The whole simulation.
pub struct World {
    pub now: u64,
    pub rng: Rng,
    pub queue: BTreeMap<(u64, u64), SimEvent>,
    pub scheduled: u64,
    pub hosts: [Host; 2],
    pub connection: Option<(u64, Connection)>,
    pub processes: u64,
    /// Until when bytes to each host wait.
    pub cut_until: [u64; 2],
    pub store: StoreMembers,
    pub vm: VmName,
    pub store_cut_until: [u64; 2],
    pub no_quorum_until: u64,
    pub slow_until: u64,
    pub flood_until: u64,
    pub buffers: [u64; 2],
    /// The versions of the channel's protocol that both hosts know: those of the release before this one in one run of
    /// four.
    pub versions: ChannelVersions,
    /// When the last fault is over.
    pub quiet: u64,
    /// When the operator had the VM forgotten and started it on a third host.
    pub elsewhere_since: Option<u64>,
    /// Whose keys each host's peer, and the store, accept no longer.
    pub revoked: [RevokedBy; 2],
    /// The client's request that is not answered yet.
    pub asked: u64,
    pub guest_is_off: bool,
    pub checker: Checker,
    /// When each host last read something from its peer, by its own clock.
    pub heard_at: [u64; 2],
    /// The last claim that a stranger made to each host.
    pub claims: [Option<Claim>; 2],
    pub without: Option<Rule>,
    pub tracing: bool,
}

/// Runs a seed.
pub fn run(seed: u64, without: Option<Rule>, tracing: bool) -> Result<Counts, Failure> {
    let mut world = World::new(seed, without, tracing);
    match world.run() {
        Ok(()) => Ok(world.checker.counts),
        Err(what) => Err(Failure { seed, without, at_ns: world.now, what }),
    }
}

impl World {
    fn new(seed: u64, without: Option<Rule>, tracing: bool) -> World {
        let mut rng = Rng::new(seed);
        let hosts = [0, 1].map(|_| Host {
            process: None,
            ahead_ns: rng.between(0, 1 << 40),
            rate_per_mille: rng.between(980, 1020),
            paused_until: 0,
            wedged_until: 0,
            exit: None,
            is_lost: false,
        });
        let buffers = [0, 1].map(|_| 1 << rng.between(11, 18));
        World {
            now: 0,
            queue: BTreeMap::new(),
            scheduled: 0,
            hosts,
            connection: None,
            processes: 0,
            cut_until: [0; 2],
            store: StoreMembers::new(without),
            vm: "simulated".parse().expect("a name"),
            store_cut_until: [0; 2],
            no_quorum_until: 0,
            slow_until: 0,
            flood_until: 0,
            buffers,
            versions: if seed.is_multiple_of(4) { ChannelVersions { newest: 3, ..OURS } } else { OURS },
            quiet: 0,
            elsewhere_since: None,
            revoked: Default::default(),
            asked: 1,
            guest_is_off: false,
            checker: Checker::default(),
            heard_at: [0; 2],
            claims: [None; 2],
            without,
            tracing,
            rng,
        }
    }

    pub fn schedule_at(&mut self, time: u64, event: SimEvent) {
        self.scheduled += 1;
        self.queue.insert((time.max(self.now), self.scheduled), event);
    }

    pub fn schedule_after(&mut self, ns: u64, event: SimEvent) {
        self.schedule_at(self.now + ns, event);
    }

    pub fn schedule_between(&mut self, low: u64, high: u64, event: SimEvent) {
        let ns = self.rng.between(low, high);
        self.schedule_after(ns, event);
    }

    pub fn clock(&self, host: usize) -> u64 {
        self.hosts[host].clock(self.now)
    }

    pub fn trace(&self, host: usize, what: &dyn std::fmt::Debug) {
        if self.tracing {
            println!("{:>9} us  {}  {what:?}", self.now / 1000, ["A", "B"][host]);
        }
    }

    fn run(&mut self) -> SimResult {
        let mut plan_rng = Rng::new(self.rng.next());
        let faults = plan_faults(&mut plan_rng);
        self.quiet = faults.iter().map(|(at, fault): &PlannedFault| at + fault.lasts_ns()).max().unwrap_or(0);
        for (at, fault) in faults {
            self.schedule_at(at, SimEvent::Fault(fault));
        }
        self.spawn(0);
        self.spawn(1);
        self.schedule_after(MS, SimEvent::Client);
        let mut answered_when_quiet = None;
        while let Some(((time, _), event)) = self.queue.pop_first() {
            self.now = time;
            if time > self.quiet + PATIENCE {
                break;
            }
            if time > self.quiet {
                let before = *answered_when_quiet.get_or_insert(self.asked);
                // The loser has to learn of it too, so some runs go on to their end.
                if self.asked >= before + ANSWERS && !self.scheduled.is_multiple_of(8) && self.is_settled() {
                    break;
                }
            }
            self.dispatch(event)?;
        }
        self.checker.counts.runs = 1;
        self.checker.counts.replies = self.asked - 1;
        self.check_outcome(self.asked > answered_when_quiet.unwrap_or(self.asked))
    }

    /// Whether one side lives and the other is out, or both are protected.
    fn is_settled(&self) -> bool {
        let phase = |h: &Host| h.process.as_ref().map_or(Phase::Out, |p| p.agent.status(0).phase);
        let phases = [phase(&self.hosts[0]), phase(&self.hosts[1])];
        if self.elsewhere_since.is_some() {
            return phases == [Phase::Out; 2];
        }
        matches!(
            phases,
            [Phase::Protected, Phase::Protected] | [Phase::Alone, Phase::Out] | [Phase::Out, Phase::Alone]
        )
    }

    fn dispatch(&mut self, event: SimEvent) -> SimResult {
        if let Some((host, id)) = event.process() {
            match &self.hosts[host].process {
                Some(process) if process.id == id => {}
                _ => return Ok(()),
            }
            // Events for a paused process wait.
            let paused_until = self.hosts[host].paused_until;
            if paused_until > self.now {
                let at = paused_until + self.rng.between(1, MS / 2);
                self.schedule_at(at, event);
                return Ok(());
            }
        }
        match event {
            SimEvent::Turn { host, id } => {
                self.schedule_between(MS / 4, 2 * MS, SimEvent::Turn { host, id });
                if self.hosts[host].wedged_until > self.now { Ok(()) } else { self.guest_loop_turn(host) }
            }
            SimEvent::Tick { host, id } => {
                self.schedule_between(MS / 2, 2 * MS, SimEvent::Tick { host, id });
                self.read(host, usize::MAX)?;
                self.handle_event(host, Event::Tick)
            }
            SimEvent::Read { host, .. } => {
                let max = 1 << self.rng.between(0, 14);
                self.read(host, max)
            }
            SimEvent::Resume { host, .. } => {
                self.emit(host)?;
                self.release(host)?;
                self.do_actions(host)
            }
            SimEvent::Connect { host, id } => self.connect(host, id),
            SimEvent::Arrive { connection, to } => self.arrive(connection, to),
            SimEvent::Ask { host, id, question } => {
                self.send_to_store(host, id, question);
                Ok(())
            }
            SimEvent::Reach { host, question, reply_to } => self.reach_store(host, question, reply_to),
            SimEvent::Answer { host, question, answer, .. } => self.answer(host, &question, answer),
            SimEvent::DiskDone { host, request, .. } => {
                self.disk_done(host, request);
                Ok(())
            }
            SimEvent::Client => {
                self.ask_guest(self.asked);
                let (low, high) =
                    if self.now < self.flood_until { (MS / 20, MS / 5) } else { (3 * MS, 6 * MS) };
                self.schedule_between(low, high, SimEvent::Client);
                Ok(())
            }
            SimEvent::Request { host, number, filler } => {
                self.deliver_request(host, number, filler);
                Ok(())
            }
            SimEvent::Reply(said) => self.replied(said),
            SimEvent::Fault(fault) => self.inject(fault),
            SimEvent::Spawn { host } => {
                self.spawn(host);
                Ok(())
            }
        }
    }

    fn spawn(&mut self, host: usize) {
        if self.hosts[host].process.is_some() {
            return;
        }
        self.processes += 1;
        let id = self.processes;
        // An incarnation is created with the state. Without that rule, a host keeps the same one for ever.
        let incarnation = if self.without == Some(Rule::Incarnations) { host as u64 + 1 } else { id };
        self.checker.counts.strangers += (id > 2) as u64;
        let (clock, buffer) = (self.clock(host), self.buffers[host]);
        let process = Process::new(id, host, incarnation, clock, buffer, self.without, self.versions);
        self.hosts[host].process = Some(process);
        self.schedule_after(0, SimEvent::Turn { host, id });
        self.schedule_after(0, SimEvent::Tick { host, id });
        self.schedule_between(0, 2 * MS, SimEvent::Connect { host, id });
        let clock = self.clock(host);
        if let Some(process) = self.hosts[1].process.as_mut().filter(|_| host == 1) {
            process.agent.handle(clock, Event::Ready);
        }
    }

    /// Checks, when the faults are over, that the side that should live does, and the other does not.
    fn check_outcome(&mut self, progress: bool) -> SimResult {
        let holder = self.store.answered().get(&self.vm).and_then(|record| record.holder());
        let alive = |h: &Host| h.process.as_ref().filter(|p| p.id <= 2).map(|p| p.agent.incarnation());
        let alive = [alive(&self.hosts[0]), alive(&self.hosts[1])];
        if self.guest_is_off {
            return Ok(());
        }
        for (host, process) in
            self.hosts.iter().enumerate().filter_map(|(n, h)| Some((n, h.process.as_ref()?)))
        {
            // A process that has not met its peer, or was not told to start, never takes. The store tells
            // nothing to a host whose key is revoked: it is silent, unless the generation was its own before.
            let has_run = process.agent.status(0).phase != Phase::Starting && !self.revoked[host].store;
            if has_run && holder.is_some_and(|holder| holder != process.agent.incarnation()) {
                return Err(format!("a loser is not fenced: incarnation {}", process.agent.incarnation()));
            }
        }
        if progress {
            return Ok(());
        }
        self.checker.counts.dead = 1;
        match holder {
            Some(holder) if alive.contains(&Some(holder)) => {
                let host = (alive[1] == Some(holder)) as usize;
                // A verdict that a host has not heard before its key is revoked, it never hears.
                if self.revoked[host].store {
                    return Ok(());
                }
                Err("the holder's process lives but does not answer the client".into())
            }
            // The holder died after it had won.
            Some(_) => Ok(()),
            None if !self.checker.saw_something() => Ok(()),
            None => match (0..2).find(|n| {
                let h = &self.hosts[*n];
                !h.is_lost && h.process.is_some() && !self.revoked[*n].store
            }) {
                Some(host) => Err(format!("no side lives, but {} could", ["A", "B"][host])),
                None => Ok(()),
            },
        }
    }
}
