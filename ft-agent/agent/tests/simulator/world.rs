//! Time, and what happens when.

use std::collections::BTreeMap;

use logging_channel::message::Message;
use logging_channel::stream::Inbox;
use store_rule::names::VmName;
use store_rule::record::{Command, Reply, State};
use vmft_agent::{Event, Opened, Phase, Rule, Verdict};

use super::checker::{Checker, Counts, Failure};
use super::faults::{Fault, Planned, plan};
use super::guest::{POWER_OFF, Said, request};
use super::host::{Host, Process};
use super::link::Connection;
use super::rng::Rng;

/// A millisecond.
pub const MS: u64 = 1_000_000;
/// How long a run goes on after its last fault for the client to get its answers.
const PATIENCE: u64 = 800 * MS;
/// Answers that show that the guest lives after the last fault.
const ANSWERS: u64 = 3;

pub type Result = std::result::Result<(), String>;

/// What happens at a time.
#[derive(Clone, Debug)]
pub enum Happening {
    /// A turn of a process's guest loop.
    Turn { host: usize, id: u64 },
    /// Its timer.
    Tick { host: usize, id: u64 },
    /// It looks at its socket.
    Read { host: usize, id: u64 },
    /// It goes on after a pause.
    Resume { host: usize, id: u64 },
    /// It looks for its peer.
    Connect { host: usize, id: u64 },
    /// A packet arrives.
    Arrive { connection: u64, to: usize },
    /// A question leaves for the store.
    Ask { host: usize, id: u64, command: Command },
    /// It reaches the store; nobody may wait for the answer.
    Apply { command: Command, reply_to: Option<(usize, u64)> },
    /// An answer, or that there was none.
    Answer { host: usize, id: u64, command: Command, reply: Option<Reply> },
    /// A disk request is done.
    DiskDone { host: usize, id: u64, request: u64 },
    /// The client's timer.
    Client,
    /// A frame of the client's arrives.
    Request { host: usize, number: u64, filler: usize },
    /// A frame arrives at the client.
    Reply(Said),
    /// Something goes wrong.
    Fault(Fault),
    /// A supervisor starts a process.
    Spawn { host: usize },
}

/// Everything there is.
pub struct World {
    pub now: u64,
    pub rng: Rng,
    queue: BTreeMap<(u64, u64), Happening>,
    scheduled: u64,
    pub hosts: [Host; 2],
    pub connection: Option<(u64, Connection)>,
    processes: u64,
    /// Bytes to these hosts wait until then.
    cut_until: [u64; 2],
    store: State,
    vm: VmName,
    store_cut_until: [u64; 2],
    no_quorum_until: u64,
    pub slow_until: u64,
    flood_until: u64,
    buffers: [u64; 2],
    /// The client's request that is not answered.
    asked: u64,
    pub guest_is_off: bool,
    pub checker: Checker,
    without: Option<Rule>,
    tracing: bool,
}

/// Runs a seed.
pub fn run(seed: u64, without: Option<Rule>, tracing: bool) -> std::result::Result<Counts, Failure> {
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
            store: State::default(),
            vm: "simulated".parse().expect("a name"),
            store_cut_until: [0; 2],
            no_quorum_until: 0,
            slow_until: 0,
            flood_until: 0,
            buffers,
            asked: 1,
            guest_is_off: false,
            checker: Checker::default(),
            without,
            tracing,
            rng,
        }
    }

    pub fn at(&mut self, time: u64, happening: Happening) {
        self.scheduled += 1;
        self.queue.insert((time.max(self.now), self.scheduled), happening);
    }

    pub fn after(&mut self, ns: u64, happening: Happening) {
        self.at(self.now + ns, happening);
    }

    fn soon(&mut self, low: u64, high: u64, happening: Happening) {
        let ns = self.rng.between(low, high);
        self.after(ns, happening);
    }

    pub fn clock(&self, host: usize) -> u64 {
        self.hosts[host].clock(self.now)
    }

    pub fn trace(&self, host: usize, what: &dyn std::fmt::Debug) {
        if self.tracing {
            println!("{:>9} us  {}  {what:?}", self.now / 1000, ["A", "B"][host]);
        }
    }

    fn run(&mut self) -> Result {
        let mut plan_rng = Rng::new(self.rng.next());
        let faults = plan(&mut plan_rng);
        let quiet = faults.iter().map(|(at, fault): &Planned| at + fault.lasts_ns()).max().unwrap_or(0);
        for (at, fault) in faults {
            self.at(at, Happening::Fault(fault));
        }
        self.spawn(0);
        self.spawn(1);
        self.after(MS, Happening::Client);
        let end = quiet + PATIENCE;
        let mut answered_when_quiet = None;
        while let Some(((time, _), happening)) = self.queue.pop_first() {
            self.now = time;
            if time > end {
                break;
            }
            if time > quiet {
                let before = *answered_when_quiet.get_or_insert(self.asked);
                // A loser, too, has to find out; so some runs go on to their end.
                if self.asked >= before + ANSWERS && !self.scheduled.is_multiple_of(8) && self.is_settled() {
                    break;
                }
            }
            self.happen(happening)?;
        }
        self.checker.counts.runs = 1;
        self.checker.counts.replies = self.asked - 1;
        self.judge(self.asked > answered_when_quiet.unwrap_or(self.asked))
    }

    /// One side lives and the other is out, or both protect each other.
    fn is_settled(&self) -> bool {
        let phase = |h: &Host| h.process.as_ref().map_or(Phase::Out, |p| p.agent.status(0).phase);
        let phases = [phase(&self.hosts[0]), phase(&self.hosts[1])];
        matches!(
            phases,
            [Phase::Protected, Phase::Protected] | [Phase::Alone, Phase::Out] | [Phase::Out, Phase::Alone]
        )
    }

    fn happen(&mut self, happening: Happening) -> Result {
        if let Some((host, id)) = happening.process() {
            match &self.hosts[host].process {
                Some(process) if process.id == id => {}
                _ => return Ok(()),
            }
            // What comes to a stopped process waits.
            let paused_until = self.hosts[host].paused_until;
            if paused_until > self.now {
                let at = paused_until + self.rng.between(1, MS / 2);
                self.at(at, happening);
                return Ok(());
            }
        }
        match happening {
            Happening::Turn { host, id } => {
                self.soon(MS / 4, 2 * MS, Happening::Turn { host, id });
                if self.hosts[host].wedged_until > self.now { Ok(()) } else { self.turn(host) }
            }
            Happening::Tick { host, id } => {
                self.soon(MS / 2, 2 * MS, Happening::Tick { host, id });
                self.read(host, usize::MAX)?;
                self.tell(host, Event::Tick)
            }
            Happening::Read { host, .. } => {
                let max = 1 << self.rng.between(0, 14);
                self.read(host, max)
            }
            Happening::Resume { host, .. } => {
                self.emit(host)?;
                self.release(host)?;
                self.act(host)
            }
            Happening::Connect { host, id } => self.connect(host, id),
            Happening::Arrive { connection, to } => self.arrive(connection, to),
            Happening::Ask { host, id, command } => {
                self.send_to_store(host, id, command);
                Ok(())
            }
            Happening::Apply { command, reply_to } => {
                self.apply_command(command, reply_to);
                Ok(())
            }
            Happening::Answer { host, command, reply, .. } => self.answer(host, &command, reply),
            Happening::DiskDone { host, request, .. } => {
                self.disk_done(host, request);
                Ok(())
            }
            Happening::Client => {
                self.ask_guest(self.asked);
                let (low, high) =
                    if self.now < self.flood_until { (MS / 20, MS / 5) } else { (3 * MS, 6 * MS) };
                self.soon(low, high, Happening::Client);
                Ok(())
            }
            Happening::Request { host, number, filler } => {
                self.deliver_request(host, number, filler);
                Ok(())
            }
            Happening::Reply(said) => self.replied(said),
            Happening::Fault(fault) => self.inject(fault),
            Happening::Spawn { host } => {
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
        // An id born with the state; without that rule a host has one for ever.
        let incarnation = if self.without == Some(Rule::Incarnations) { host as u64 + 1 } else { id };
        self.checker.counts.strangers += (id > 2) as u64;
        let process = Process::new(id, host, incarnation, self.clock(host), self.buffers[host], self.without);
        self.hosts[host].process = Some(process);
        self.after(0, Happening::Turn { host, id });
        self.after(0, Happening::Tick { host, id });
        self.soon(0, 2 * MS, Happening::Connect { host, id });
        let clock = self.clock(host);
        if let Some(process) = self.hosts[1].process.as_mut().filter(|_| host == 1) {
            process.agent.handle(clock, Event::Ready);
        }
    }

    /// A process looks for its peer, until it has met it.
    fn connect(&mut self, host: usize, id: u64) -> Result {
        let Some(process) = &self.hosts[host].process else { return Ok(()) };
        let connected = self.connection.as_ref().is_some_and(|(_, c)| c.open[host]);
        if process.agent.status(0).phase != Phase::Starting {
            return Ok(());
        }
        self.soon(3 * MS, 15 * MS, Happening::Connect { host, id });
        let reachable = self.cut_until.iter().all(|until| *until <= self.now);
        let peer = 1 - host;
        if connected
            || !reachable
            || self.hosts[peer].process.is_none()
            || self.hosts[peer].paused_until > self.now
        {
            return Ok(());
        }
        if self.connection.as_ref().is_some_and(|(_, c)| c.open[peer]) {
            return self.say_hello_as_stranger(host);
        }
        let connection = self.processes << 32 | self.scheduled;
        self.connection = Some((connection, Connection::new()));
        self.tell(host, Event::Connected)?;
        self.tell(peer, Event::Connected)
    }

    /// The peer has a connection already: it reads the hello of this one and closes it.
    fn say_hello_as_stranger(&mut self, host: usize) -> Result {
        let clock = self.clock(host);
        let Some(process) = &mut self.hosts[host].process else { return Ok(()) };
        process.agent.handle(clock, Event::Connected);
        let mut inbox = Inbox::new();
        while !process.agent.outgoing().is_empty() {
            let bytes = process.agent.outgoing().to_vec();
            inbox.push(&bytes);
            process.agent.wrote(bytes.len());
        }
        process.agent.handle(clock, Event::Disconnected);
        let Ok(Some(Message::Hello(hello))) = inbox.message() else {
            // It is no longer looking for a peer.
            return self.act(host);
        };
        self.act(host)?;
        self.trace(1 - host, &"a stranger says hello");
        self.tell(1 - host, Event::Stranger(&hello))
    }

    fn arrive(&mut self, connection: u64, to: usize) -> Result {
        let cut_until = self.cut_until[to];
        if cut_until > self.now {
            self.at(cut_until + MS / 10, Happening::Arrive { connection, to });
            return Ok(());
        }
        if let Some((id, c)) = &mut self.connection
            && *id == connection
        {
            c.arrive(to);
        }
        if let Some(process) = &self.hosts[to].process {
            let id = process.id;
            self.soon(0, MS / 20, Happening::Read { host: to, id });
        }
        Ok(())
    }

    fn read(&mut self, host: usize, max: usize) -> Result {
        let Some((_, connection)) = &mut self.connection else { return Ok(()) };
        let Some(process) = &self.hosts[host].process else { return Ok(()) };
        if !connection.open[host] {
            return Ok(());
        }
        let id = process.id;
        let read = connection.read(host, max);
        if !read.bytes.is_empty() {
            self.tell(host, Event::Received(&read.bytes))?;
            self.soon(0, MS / 20, Happening::Read { host, id });
            // The other side's socket has room again.
            self.write(1 - host);
        } else if read.ended {
            self.close(host);
            self.tell(host, Event::Disconnected)?;
        }
        Ok(())
    }

    /// A host closes its side of the connection.
    pub fn close(&mut self, host: usize) {
        let Some((id, connection)) = &mut self.connection else { return };
        if connection.open[host] {
            let happening = Happening::Arrive { connection: *id, to: 1 - host };
            let arrives = connection.close(host, self.now, &mut self.rng);
            self.at(arrives, happening);
        }
    }

    fn send_to_store(&mut self, host: usize, id: u64, command: Command) {
        let away = self.rng.between(MS / 5, 2 * MS);
        let nothing = Happening::Answer { host, id, command: command.clone(), reply: None };
        let reachable = self.store_cut_until[host] <= self.now && !self.rng.chance(30);
        if !reachable {
            return self.after(15 * MS, nothing);
        }
        let at = self.now + away;
        if at < self.no_quorum_until {
            // It may be in a log that a quorum accepts later.
            if self.rng.chance(300) {
                let later = self.no_quorum_until + away;
                self.at(later, Happening::Apply { command, reply_to: None });
            }
            return self.after(15 * MS, nothing);
        }
        if self.rng.chance(50) {
            self.after(away + 40 * MS, Happening::Apply { command: command.clone(), reply_to: None });
        }
        let reply_to = Some((host, id));
        if self.rng.chance(50) {
            // The answer is lost.
            self.at(at, Happening::Apply { command, reply_to: None });
            return self.after(15 * MS, nothing);
        }
        self.at(at, Happening::Apply { command: command.clone(), reply_to });
        if self.rng.chance(30) {
            // An answer that comes twice.
            self.at(at + MS, Happening::Apply { command, reply_to });
        }
    }

    fn apply_command(&mut self, command: Command, reply_to: Option<(usize, u64)>) {
        let reply = self.store.apply(&self.vm, &command);
        if let Some((host, id)) = reply_to {
            self.soon(MS / 5, 2 * MS, Happening::Answer { host, id, command, reply: Some(reply) });
        }
    }

    fn answer(&mut self, host: usize, command: &Command, reply: Option<Reply>) -> Result {
        self.trace(host, &reply);
        match command {
            Command::Take { .. } => {
                let verdict = match &reply {
                    Some(Reply::Won) => Verdict::Won,
                    Some(Reply::Lost(holder)) => Verdict::Lost(*holder),
                    Some(Reply::Stale) => Verdict::Stale,
                    _ => Verdict::Unknown,
                };
                self.checker.counts.unknown_verdicts += (verdict == Verdict::Unknown) as u64;
                self.tell(host, Event::Verdict(verdict))?;
                let phase = self.hosts[host].process.as_ref().map(|p| p.agent.status(0).phase);
                if verdict == Verdict::Won
                    && matches!(phase, Some(Phase::Starting | Phase::Protected | Phase::Deciding))
                {
                    return Err(format!("{} has won and does not live: {phase:?}", ["A", "B"][host]));
                }
                Ok(())
            }
            Command::Open { .. } => {
                let opened = match reply {
                    Some(Reply::Done) => Opened::Done,
                    Some(Reply::Stale) => Opened::Stale,
                    _ => Opened::Unknown,
                };
                self.tell(host, Event::Opened(opened))
            }
            Command::Forget { .. } => self.tell(host, Event::Forgotten(reply.is_some())),
        }
    }

    /// The client sends a request, to whoever may answer.
    fn ask_guest(&mut self, number: u64) {
        let flooding = self.now < self.flood_until;
        for host in 0..2 {
            let filler = if flooding { self.rng.between(0, 1400) as usize } else { 0 };
            if !self.rng.chance(50) {
                self.soon(MS / 10, 2 * MS, Happening::Request { host, number, filler });
            }
            if self.rng.chance(30) {
                self.soon(MS / 10, 4 * MS, Happening::Request { host, number, filler });
            }
        }
    }

    fn deliver_request(&mut self, host: usize, number: u64, filler: usize) {
        let Some(process) = &mut self.hosts[host].process else { return };
        if process.is_live(host) && process.inputs.len() < 32 {
            process.inputs.push_back(request(number, filler));
        }
    }

    /// An output is on its way to the client.
    pub fn send_to_client(&mut self, said: Said) {
        if said.answers != 0 && !self.rng.chance(50) {
            self.soon(MS / 10, 2 * MS, Happening::Reply(said));
        }
    }

    fn replied(&mut self, said: Said) -> Result {
        if said.answers > self.asked && said.answers != POWER_OFF {
            return Err(format!("{said:?} answers what was never asked"));
        }
        if said.answers == self.asked {
            self.asked += 1;
            self.ask_guest(self.asked);
        }
        Ok(())
    }

    fn inject(&mut self, fault: Fault) -> Result {
        self.trace(0, &fault);
        let until = self.now + fault.lasts_ns();
        match fault {
            Fault::Kill { host } => self.kill(host),
            Fault::PowerLoss { host } => self.lose_power(host),
            Fault::KillAtEffect { host, effects } => {
                if let Some(process) = &mut self.hosts[host].process {
                    process.kill_in = Some(effects);
                }
            }
            Fault::Pause { host, ns } => self.pause(host, ns),
            Fault::PauseAtEffect { host, effects, ns } => {
                if let Some(process) = &mut self.hosts[host].process {
                    process.pause_in = Some((effects, ns));
                }
            }
            Fault::Restart { host, after_ns } => {
                self.kill(host);
                self.after(after_ns, Happening::Spawn { host });
            }
            Fault::Cut { to, .. } => {
                for host in (0..2).filter(|h| to[*h]) {
                    self.cut_until[host] = self.cut_until[host].max(until);
                }
            }
            Fault::Reset { told } => self.reset(told),
            Fault::CutStore { host, .. } => self.store_cut_until[host] = until,
            Fault::NoQuorum { .. } => self.no_quorum_until = until,
            Fault::ClockJump { host, ns } => self.hosts[host].ahead_ns += ns,
            Fault::Wedge { host, .. } => self.hosts[host].wedged_until = until,
            Fault::SlowReplay { .. } => self.slow_until = until,
            Fault::Diverge => {
                if let Some(process) = &mut self.hosts[1].process
                    && !process.is_live(1)
                {
                    process.guest.hash ^= 1;
                }
            }
            Fault::DiskFails { host } => return self.tell(host, Event::HostFailed("its disk")),
            Fault::PowerOff => self.ask_guest(POWER_OFF),
            Fault::HandOver { host } => return self.tell(host, Event::HandOver),
            Fault::Flood { .. } => self.flood_until = until,
        }
        Ok(())
    }

    pub fn kill(&mut self, host: usize) {
        self.trace(host, &"killed");
        self.hosts[host].process = None;
        self.hosts[host].is_lost = true;
        self.hosts[host].paused_until = 0;
        self.close(host);
    }

    fn lose_power(&mut self, host: usize) {
        self.trace(host, &"lost its power");
        self.hosts[host].process = None;
        self.hosts[host].is_lost = true;
        if let Some((_, connection)) = &mut self.connection {
            connection.open[host] = false;
            let keep = self.rng.between(0, 3) as usize;
            connection.lose(1 - host, keep);
        }
    }

    pub fn pause(&mut self, host: usize, ns: u64) {
        let until = self.now + ns;
        let h = &mut self.hosts[host];
        h.paused_until = h.paused_until.max(until);
        if let Some(process) = &h.process {
            let (at, id) = (h.paused_until, process.id);
            self.trace(host, &"paused");
            self.at(at, Happening::Resume { host, id });
        }
    }

    fn reset(&mut self, told: [bool; 2]) {
        let Some((_, connection)) = &mut self.connection else { return };
        for (host, told) in told.into_iter().enumerate() {
            connection.lose(host, 0);
            if told {
                connection.reset(host);
            }
        }
        let ids = [0, 1].map(|h| self.hosts[h].process.as_ref().map(|p| p.id));
        for (host, id) in ids.into_iter().enumerate() {
            if let Some(id) = id.filter(|_| told[host]) {
                self.soon(0, MS, Happening::Read { host, id });
            }
        }
    }

    /// The faults are over: whoever should live does, and nobody else.
    fn judge(&mut self, progress: bool) -> Result {
        let holder = self.store.get(&self.vm).and_then(|record| record.holder());
        let alive = |h: &Host| h.process.as_ref().filter(|p| p.id <= 2).map(|p| p.agent.incarnation());
        let alive = [alive(&self.hosts[0]), alive(&self.hosts[1])];
        if self.guest_is_off {
            return Ok(());
        }
        for process in self.hosts.iter().filter_map(|h| h.process.as_ref()) {
            // One that has not met its peer, or was not told to start, knows nothing and takes nothing.
            let has_run = process.agent.status(0).phase != Phase::Starting;
            if has_run && holder.is_some_and(|holder| holder != process.agent.incarnation()) {
                return Err(format!("a loser is not fenced: {}", process.agent.incarnation()));
            }
        }
        if progress {
            return Ok(());
        }
        self.checker.counts.dead = 1;
        match holder {
            Some(holder) if alive.contains(&Some(holder)) => {
                Err("the holder lives and does not answer".into())
            }
            // It died after it had won.
            Some(_) => Ok(()),
            None if !self.checker.saw_something() => Ok(()),
            None => match self.hosts.iter().position(|h| !h.is_lost && h.process.is_some()) {
                Some(host) => Err(format!("nobody lives, but {} could", ["A", "B"][host])),
                None => Ok(()),
            },
        }
    }
}

impl Happening {
    /// The process that it happens to.
    fn process(&self) -> Option<(usize, u64)> {
        match self {
            Happening::Turn { host, id }
            | Happening::Tick { host, id }
            | Happening::Read { host, id }
            | Happening::Resume { host, id }
            | Happening::Connect { host, id }
            | Happening::Answer { host, id, .. }
            | Happening::Ask { host, id, .. }
            | Happening::DiskDone { host, id, .. } => Some((*host, *id)),
            _ => None,
        }
    }
}
