//! A host's process: what a runtime does around the agent, and no more.

use std::collections::VecDeque;

use entry::identity::Identity;
use entry::log::{DiskStatus, EndReason, Entry, LoggedInput, Record};
use entry::{End, Input, Output, PositionUnit};
use store_rule::names::{Generation, Incarnation};
use store_rule::record::{Command, Member};
use vmft_agent::{
    Action, Agent, Buffers, Config, Event, Exit, NextRecord, Pace, Phase, Role, Rule, Suspicion, Timing,
};
use vmm::gate::Gate;

use super::checker::Emitter;
use super::guest::{Guest, Said, disk_done, logged};
use super::world::{Happening, MS, Result, World};

pub const TIMING: Timing =
    Timing { timeout_ns: 40 * MS, beat_interval_ns: 5 * MS, progress_timeout_ns: 120 * MS, retry_ns: 5 * MS };

/// A replica's process.
pub struct Process {
    pub id: u64,
    pub agent: Agent,
    pub gate: Gate,
    pub guest: Guest,
    pub inputs: VecDeque<Input>,
    /// The pair has started: a primary runs, a backup replays.
    started: bool,
    /// Alone.
    live: bool,
    paused: bool,
    end_told: bool,
    /// The record that is replayed next, and how many were.
    front: Option<Record>,
    applied: u64,
    /// Outputs of the replay that are not compared yet.
    made: VecDeque<Output>,
    turns: u64,
    /// Decided and not written: the process was stopped in between.
    decided: Option<(Output, u64)>,
    /// Effects on the world until it dies or stops.
    pub kill_in: Option<u64>,
    pub pause_in: Option<(u64, u64)>,
}

/// A host.
pub struct Host {
    pub process: Option<Process>,
    /// Its clock: so much ahead, so many parts in a thousand fast or slow.
    pub ahead_ns: u64,
    pub rate_per_mille: u64,
    pub paused_until: u64,
    pub wedged_until: u64,
    pub exit: Option<Exit>,
    /// The first process's own part in the pair was lost with it, or it gave up by itself.
    pub is_lost: bool,
}

impl Host {
    pub fn clock(&self, now: u64) -> u64 {
        self.ahead_ns + now / 1000 * self.rate_per_mille
    }
}

impl Process {
    pub fn new(
        id: u64,
        host: usize,
        incarnation: u64,
        clock: u64,
        buffer: u64,
        without: Option<Rule>,
    ) -> Process {
        let incarnation = Incarnation::try_from(incarnation as u128).expect("not zero");
        let config = Config {
            role: if host == 0 { Role::Primary } else { Role::Backup },
            vm: "simulated".parse().expect("a name"),
            me: Member::new(incarnation),
            identity: Identity::new(PositionUnit::Instructions).field("guest", "simulated"),
            generation: Generation::FIRST,
            unprotected: false,
            timing: TIMING,
            buffers: Buffers { buffer_bytes: buffer, lag_ns_max: 50 * MS, batch_ns: MS, spacing_ns: MS / 4 },
            without,
        };
        Process {
            id,
            agent: Agent::new(config, clock),
            gate: Gate::default(),
            guest: Guest::default(),
            inputs: VecDeque::new(),
            started: false,
            live: false,
            paused: false,
            end_told: false,
            front: None,
            applied: 0,
            made: VecDeque::new(),
            turns: 0,
            decided: None,
            kill_in: None,
            pause_in: None,
        }
    }

    /// Takes inputs from outside.
    pub fn is_live(&self, host: usize) -> bool {
        self.live || host == 0 && self.started
    }

    fn disk_request(&self) -> Option<u64> {
        self.guest.disk.map(|(_, id)| id)
    }
}

impl World {
    /// Tells the agent, and does what it wants.
    pub fn tell(&mut self, host: usize, event: Event<'_>) -> Result {
        let clock = self.clock(host);
        if let Some(process) = &mut self.hosts[host].process {
            process.agent.handle(clock, event);
        }
        self.act(host)
    }

    /// Does what the agent wants, and writes what it has.
    pub fn act(&mut self, host: usize) -> Result {
        loop {
            let Some(process) = &mut self.hosts[host].process else { return Ok(()) };
            let Some(action) = process.agent.next_action() else { break };
            self.trace(host, &action);
            self.perform(host, action)?;
        }
        self.write(host);
        Ok(())
    }

    fn perform(&mut self, host: usize, action: Action) -> Result {
        let Some(process) = &mut self.hosts[host].process else { return Ok(()) };
        let received = process.agent.status(0).cursors.outputs_recorded;
        match action {
            Action::Close => {
                self.write(host);
                self.close(host);
            }
            Action::Refused(_) => {}
            Action::Open { generation, members } => self.ask(host, Command::Open { generation, members }),
            Action::Take { generation, who } => self.ask(host, Command::Take { generation, who }),
            Action::Forget { generation } => self.ask(host, Command::Forget { generation }),
            Action::Start { .. } => process.started = true,
            Action::Release => self.release(host)?,
            Action::Drop => while process.gate.release(process.agent.drop_limit()).is_some() {},
            Action::Suspected(suspicion) => self.suspected(host, &suspicion, received),
            Action::GoLive => self.go_live(host, received)?,
            Action::Pause => process.paused = true,
            Action::Halt(exit) => self.halt(host, exit),
        }
        Ok(())
    }

    fn suspected(&mut self, host: usize, suspicion: &Suspicion, received: u64) {
        self.checker.counts.suspicions += 1;
        if host == 1 {
            self.checker.backup_closed(self.now, Some(suspicion), received);
        }
    }

    fn go_live(&mut self, host: usize, received: u64) -> Result {
        if host == 1 {
            self.checker.backup_closed(self.now, None, received);
            self.checker.counts.won_by_backup += 1;
        } else {
            self.checker.counts.won_by_primary += 1;
        }
        let alone = |p: &Process| p.agent.status(0).phase == Phase::Alone;
        if self.hosts[1 - host].process.as_ref().is_some_and(alone) {
            return Err("two live".into());
        }
        let Some(process) = &mut self.hosts[host].process else { return Ok(()) };
        (process.live, process.paused) = (true, false);
        let id = process.id;
        // Unfinished disk requests are issued again (rule 9).
        if let (Some(request), 1) = (process.disk_request(), host) {
            self.after(MS, Happening::DiskDone { host, id, request });
        }
        self.release(host)
    }

    /// A process ends by itself.
    fn halt(&mut self, host: usize, exit: Exit) {
        self.write(host);
        self.close(host);
        let counts = &mut self.checker.counts;
        match exit {
            Exit::Ended(_) => counts.ended += 1,
            Exit::HandedOver => counts.handed_over += 1,
            Exit::Fenced(_) => counts.fenced += 1,
            Exit::Failed(_) | Exit::Stopped => counts.failed += 1,
            Exit::NotOpened | Exit::NotStarted(_) => {}
        }
        self.hosts[host].process = None;
        self.hosts[host].is_lost |= matches!(exit, Exit::Failed(_) | Exit::Stopped | Exit::NotStarted(_));
        self.hosts[host].exit = Some(exit);
    }

    /// Whether a process still runs just before an effect on the world: faults may have it die or stop here.
    fn may_take_effect(&mut self, host: usize) -> bool {
        let now = self.now;
        let h = &mut self.hosts[host];
        let Some(process) = &mut h.process else { return false };
        if h.paused_until > now {
            return false;
        }
        if let Some(left) = &mut process.kill_in {
            *left -= 1;
            if *left == 0 {
                self.kill(host);
                return false;
            }
        }
        let h = &mut self.hosts[host];
        if let Some((left, ns)) = h.process.as_mut().and_then(|p| p.pause_in.as_mut()) {
            *left -= 1;
            if *left == 0 {
                let ns = *ns;
                if let Some(process) = &mut h.process {
                    process.pause_in = None;
                }
                self.pause(host, ns);
                return false;
            }
        }
        true
    }

    /// Writes to the socket what it takes.
    pub fn write(&mut self, host: usize) {
        loop {
            let waiting = self.hosts[host].process.as_ref().is_some_and(|p| !p.agent.outgoing().is_empty());
            let open = self.connection.as_ref().is_some_and(|(_, c)| c.open[host]);
            if !waiting || !open || !self.may_take_effect(host) {
                return;
            }
            let (Some(process), Some((id, connection))) =
                (&mut self.hosts[host].process, &mut self.connection)
            else {
                return;
            };
            let written = connection.write(host, process.agent.outgoing(), self.now, &mut self.rng);
            let Some((n, arrives)) = written else { return };
            process.agent.wrote(n);
            let happening = Happening::Arrive { connection: *id, to: 1 - host };
            self.at(arrives, happening);
        }
    }

    fn ask(&mut self, host: usize, command: Command) {
        if self.may_take_effect(host) || self.hosts[host].process.is_some() {
            let wait = self.hosts[host].paused_until.saturating_sub(self.now);
            let id = self.hosts[host].process.as_ref().map_or(0, |p| p.id);
            self.after(wait, Happening::Ask { host, id, command });
        }
    }

    /// Lets outputs out of the gate, each after a look at whether it may.
    pub fn release(&mut self, host: usize) -> Result {
        loop {
            let clock = self.clock(host);
            let Some(process) = &mut self.hosts[host].process else { return Ok(()) };
            if process.decided.is_some() {
                return Ok(());
            }
            let limit = process.agent.release_limit(clock);
            let Some(output) = process.gate.release(limit) else { return Ok(()) };
            process.decided = Some((output, self.now));
            if !self.may_take_effect(host) {
                return Ok(());
            }
            self.emit(host)?;
        }
    }

    /// Writes what was decided.
    pub fn emit(&mut self, host: usize) -> Result {
        let clock = self.clock(host);
        let Some(process) = &mut self.hosts[host].process else { return Ok(()) };
        let Some((output, decided_at)) = process.decided.take() else { return Ok(()) };
        let phase = process.agent.status(clock).phase;
        let emitter = Emitter {
            is_primary: host == 0,
            is_alone: process.live,
            is_protected: matches!(phase, Phase::Protected | Phase::Ending),
            decided_at,
        };
        process.agent.released(clock, process.gate.released());
        let said = Said::of(&output);
        self.trace(host, &said);
        self.checker.emitted(said, emitter)?;
        self.send_to_client(said);
        Ok(())
    }

    /// A turn of the guest's loop.
    pub fn turn(&mut self, host: usize) -> Result {
        let clock = self.clock(host);
        let Some(process) = &mut self.hosts[host].process else { return Ok(()) };
        process.turns += 1;
        process.agent.turn(clock, process.guest.position());
        if process.is_live(host) {
            self.run_live(host)?;
        } else if process.started {
            self.replay(host)?;
        }
        self.act(host)
    }

    fn run_live(&mut self, host: usize) -> Result {
        let clock = self.clock(host);
        let (steps, share) = (self.rng.between(1, 12), self.rng.between(1, 999));
        let rests = self.rng.chance(500);
        let Some(process) = &mut self.hosts[host].process else { return Ok(()) };
        let may_run = match process.agent.pace(clock) {
            Pace::Free => true,
            Pace::Share(part) => share <= part,
            Pace::Stop => false,
        };
        if !may_run || process.paused || process.end_told {
            return Ok(());
        }
        if process.turns.is_multiple_of(4) {
            let time_ns = process.guest.count;
            self.append(host, Entry::Mark { time_ns });
        }
        let Some(process) = &mut self.hosts[host].process else { return Ok(()) };
        if process.turns.is_multiple_of(16) {
            let digest = process.guest.digest();
            self.append(host, Entry::State(digest));
        }
        if let Some(input) = self.hosts[host].process.as_mut().and_then(|p| p.inputs.pop_front()) {
            self.append(host, Entry::Input(logged_input(&input)));
            self.apply(host, &input);
        }
        for _ in 0..steps {
            let Some(process) = &mut self.hosts[host].process else { return Ok(()) };
            if process.guest.is_off {
                return self.guest_ended(host);
            }
            if let Some(output) = process.guest.step() {
                self.append(host, Entry::Output(logged(&output)));
                let Some(process) = &mut self.hosts[host].process else { return Ok(()) };
                process.gate.hold(output);
                if rests {
                    process.agent.rest(clock);
                }
                self.write(host);
                self.act(host)?;
                if self.is_live_alone(host) {
                    self.release(host)?;
                }
            }
        }
        Ok(())
    }

    fn is_live_alone(&self, host: usize) -> bool {
        self.hosts[host].process.as_ref().is_some_and(|p| p.live)
    }

    fn guest_ended(&mut self, host: usize) -> Result {
        let reason = EndReason::Guest(End::PowerOff);
        self.append(host, Entry::End(reason));
        let Some(process) = &mut self.hosts[host].process else { return Ok(()) };
        process.end_told = true;
        self.guest_is_off = true;
        self.tell(host, Event::GuestEnded(reason))
    }

    fn append(&mut self, host: usize, entry: Entry) {
        let clock = self.clock(host);
        let Some(process) = &mut self.hosts[host].process else { return };
        let position = process.guest.position();
        process.agent.append(clock, &Record { position, entry });
        self.write(host);
    }

    fn apply(&mut self, host: usize, input: &Input) {
        let delay = self.rng.between(MS / 10, 3 * MS);
        let Some(process) = &mut self.hosts[host].process else { return };
        let before = process.disk_request();
        process.guest.apply(input);
        let (id, live) = (process.id, process.is_live(host));
        if let Some(request) = process.disk_request().filter(|r| Some(*r) != before && live) {
            self.after(delay, Happening::DiskDone { host, id, request });
        }
    }

    /// The disk has done a request, on the side that lives.
    pub fn disk_done(&mut self, host: usize, request: u64) {
        let Some(process) = &mut self.hosts[host].process else { return };
        let done = disk_done(request);
        if process.disk_request() == Some(request) && !process.inputs.contains(&done) {
            process.inputs.push_back(done);
        }
    }

    fn replay(&mut self, host: usize) -> Result {
        let mut budget =
            if self.now < self.slow_until { self.rng.between(0, 3) } else { self.rng.between(8, 60) };
        while budget > 0 {
            let Some(process) = &mut self.hosts[host].process else { return Ok(()) };
            if process.front.is_none() {
                match process.agent.next_record() {
                    NextRecord::Record(record) => process.front = Some(record),
                    NextRecord::Wait | NextRecord::End => break,
                }
            }
            let Some(record) = process.front.clone() else { break };
            budget -= 1;
            if process.guest.count < record.position.count {
                // An output is held by the gate, and compared when its record is in front.
                if let Some(output) = process.guest.step() {
                    process.gate.hold(output.clone());
                    process.made.push_back(output);
                }
                continue;
            }
            if let Err(what) = self.replay_record(host, &record) {
                return self.tell(host, Event::HostFailed(&what));
            }
            let Some(process) = &mut self.hosts[host].process else { return Ok(()) };
            process.front = None;
            process.applied += 1;
        }
        let Some(process) = &mut self.hosts[host].process else { return Ok(()) };
        let (records, position) = (process.applied, process.guest.position());
        self.tell(host, Event::Replayed { records, position })
    }

    /// Compares or applies a record at its position; an error is a divergence.
    fn replay_record(&mut self, host: usize, record: &Record) -> std::result::Result<(), String> {
        let Some(process) = &mut self.hosts[host].process else { return Ok(()) };
        match &record.entry {
            Entry::Input(LoggedInput::Frame { slot, bytes }) => {
                let input = Input::Frame { slot: *slot, bytes: bytes.clone() };
                self.apply(host, &input);
            }
            Entry::Input(LoggedInput::DiskDone { id, .. }) => {
                if process.disk_request() != Some(*id) {
                    return Err("divergence: there is no such disk request".into());
                }
                self.apply(host, &disk_done(*id));
            }
            Entry::Output(expected) => {
                let made = process.made.pop_front();
                if made.as_ref().map(logged) != Some(*expected) {
                    return Err(format!("divergence: another output: {made:?}"));
                }
            }
            Entry::State(digest) if *digest != process.guest.digest() => {
                return Err("divergence: another state".into());
            }
            _ => {}
        }
        Ok(())
    }
}

fn logged_input(input: &Input) -> LoggedInput {
    match input {
        Input::Frame { slot, bytes } => LoggedInput::Frame { slot: *slot, bytes: bytes.clone() },
        Input::DiskDone { slot, id, .. } => {
            LoggedInput::DiskDone { slot: *slot, id: *id, status: DiskStatus::Done }
        }
        Input::Console { console, bytes } => LoggedInput::Console { console: *console, bytes: bytes.clone() },
        Input::Clock { time_ns } => LoggedInput::Clock { time_ns: *time_ns },
    }
}
