//! What a host's process does around the agent.

use agent::{Action, Event, GuestPace, NextRecord, Outcome, PeerRefusal, Phase, Suspicion};
use entry::log::{DiskStatus, EndReason, Entry, LoggedInput, Record};
use entry::{End, Input};
use store_rule::record::Command;

use super::MS;
use super::checker::Emitter;
use super::guest::{GuestOutput, disk_done, logged};
use super::process::Process;
use super::sim_event::{SimEvent, SimResult, StoreQuestion};
use super::world::World;

impl World {
    /// Passes an event to the agent, and does what the agent wants.
    pub fn handle_event(&mut self, host: usize, event: Event<'_>) -> SimResult {
        let clock = self.clock(host);
        if let Some(process) = &mut self.hosts[host].process {
            process.agent.handle(clock, event);
        }
        self.do_actions(host)
    }

    /// Does the agent's actions, and writes its bytes.
    pub fn do_actions(&mut self, host: usize) -> SimResult {
        loop {
            let Some(process) = &mut self.hosts[host].process else { return Ok(()) };
            let Some(action) = process.agent.next_action() else { break };
            self.trace(host, &action);
            self.perform(host, action)?;
        }
        self.write(host);
        self.check_words(host)
    }

    /// What a side says of itself is true (rule 12).
    fn check_words(&mut self, host: usize) -> SimResult {
        let clock = self.clock(host);
        let Some(process) = &self.hosts[host].process else { return Ok(()) };
        let status = process.agent.status(clock);
        self.checker.words(status.is_protected(), host == 0, status.lag_ns)
    }

    fn perform(&mut self, host: usize, action: Action) -> SimResult {
        let Some(process) = &mut self.hosts[host].process else { return Ok(()) };
        let received = process.agent.status(0).cursors.outputs_recorded;
        match action {
            Action::Close => {
                self.write(host);
                self.close(host);
            }
            Action::Refused(PeerRefusal::Lost(Suspicion::Restarted)) => {
                self.checker.claim_believed(self.claims[host])?
            }
            Action::Refused(_) => {}
            Action::Open { generation, members } => self.change(host, Command::Open { generation, members }),
            Action::Take { generation, who } => self.change(host, Command::Take { generation, who }),
            Action::End { generation, who } => self.change(host, Command::End { generation, who }),
            Action::Look { generation, who } => self.ask_store(host, StoreQuestion::Look { generation, who }),
            Action::ProtectionChanged(_) => {}
            Action::Start { .. } => process.started = true,
            Action::Release => self.release(host)?,
            Action::Drop => while process.gate.release(process.agent.drop_limit()).is_some() {},
            Action::Suspected(suspicion) => self.suspected(host, &suspicion, received)?,
            Action::GoLive => self.go_live(host, received)?,
            Action::Pause => process.paused = true,
            Action::Resume => {
                process.paused = false;
                self.checker.counts.called_off += 1;
            }
            Action::HandoverReceived => {}
            Action::PeerKey(_) => {}
            Action::Halt(exit) => self.halt(host, exit),
        }
        Ok(())
    }

    fn suspected(&mut self, host: usize, suspicion: &Suspicion, received: u64) -> SimResult {
        self.checker.counts.suspicions += 1;
        if host == 1 {
            self.checker.backup_closed(self.now, Some(suspicion), received);
        }
        match suspicion {
            Suspicion::Restarted => self.checker.claim_believed(self.claims[host]),
            _ => Ok(()),
        }
    }

    fn go_live(&mut self, host: usize, received: u64) -> SimResult {
        if host == 1 {
            self.checker.backup_closed(self.now, None, received);
            self.checker.counts.won_by_backup += 1;
        } else {
            self.checker.counts.won_by_primary += 1;
        }
        let alone = |p: &Process| p.agent.status(0).phase == Phase::Alone;
        if self.hosts[1 - host].process.as_ref().is_some_and(alone) {
            return Err("both sides live".into());
        }
        let Some(process) = &mut self.hosts[host].process else { return Ok(()) };
        (process.live, process.paused) = (true, false);
        let id = process.id;
        // Unfinished disk requests are issued again (rule 9).
        if let (Some(request), 1) = (process.disk_request(), host) {
            self.schedule_after(MS, SimEvent::DiskDone { host, id, request });
        }
        self.release(host)
    }

    /// A process exits.
    fn halt(&mut self, host: usize, exit: Outcome) {
        self.write(host);
        self.close(host);
        let counts = &mut self.checker.counts;
        match exit {
            Outcome::Ended(_) => counts.ended += 1,
            Outcome::HandedOver => counts.handed_over += 1,
            Outcome::Yielded(_) => counts.lost_after_yield += 1,
            Outcome::Fenced(_) => counts.fenced += 1,
            Outcome::Forgotten | Outcome::Overtaken(_) => counts.stood_down += 1,
            Outcome::Failed(_) | Outcome::Stopped => counts.failed += 1,
            Outcome::NotOpened | Outcome::OpenRefused(_) | Outcome::NotStarted(_) => {}
        }
        self.hosts[host].process = None;
        self.hosts[host].is_lost |= matches!(
            exit,
            Outcome::Failed(_) | Outcome::Stopped | Outcome::NotStarted(_) | Outcome::Yielded(_)
        );
        self.hosts[host].exit = Some(exit);
    }

    /// Whether a process still runs just before an effect on the world. Faults may kill or stop it here.
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

    /// Writes the agent's bytes, as many as the socket takes.
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
            let event = SimEvent::Arrive { connection: *id, to: 1 - host };
            self.schedule_at(arrives, event);
        }
    }

    fn change(&mut self, host: usize, command: Command) {
        self.ask_store(host, StoreQuestion::Change(command));
    }

    fn ask_store(&mut self, host: usize, question: StoreQuestion) {
        if self.may_take_effect(host) || self.hosts[host].process.is_some() {
            let wait = self.hosts[host].paused_until.saturating_sub(self.now);
            let id = self.hosts[host].process.as_ref().map_or(0, |p| p.id);
            self.schedule_after(wait, SimEvent::Ask { host, id, question });
        }
    }

    /// Lets outputs out of the gate, asking the agent again before each.
    pub fn release(&mut self, host: usize) -> SimResult {
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

    /// Writes the output that was let out of the gate.
    pub fn emit(&mut self, host: usize) -> SimResult {
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
        process.agent.released(process.gate.released());
        let said = GuestOutput::of(&output);
        self.trace(host, &said);
        self.checker.emitted(said, emitter)?;
        self.check_copies(host)?;
        self.send_to_client(said);
        Ok(())
    }

    /// A turn of the guest's loop.
    pub fn guest_loop_turn(&mut self, host: usize) -> SimResult {
        let clock = self.clock(host);
        let Some(process) = &mut self.hosts[host].process else { return Ok(()) };
        process.turns += 1;
        process.agent.guest_loop_turned(clock, process.guest.position());
        if process.is_live(host) {
            self.run_live(host)?;
        } else if process.started {
            self.replay(host)?;
        }
        self.do_actions(host)
    }

    fn run_live(&mut self, host: usize) -> SimResult {
        let clock = self.clock(host);
        let (steps, share) = (self.rng.between(1, 12), self.rng.between(1, 999));
        let rests = self.rng.chance(500);
        let Some(process) = &mut self.hosts[host].process else { return Ok(()) };
        let may_run = match process.agent.pace(clock) {
            GuestPace::Free => true,
            GuestPace::Share(part) => share <= part,
            GuestPace::Stop => false,
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
                    process.agent.guest_loop_waits(clock);
                }
                self.write(host);
                self.do_actions(host)?;
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

    fn guest_ended(&mut self, host: usize) -> SimResult {
        let reason = EndReason::Guest(End::PowerOff);
        self.append(host, Entry::End(reason));
        let Some(process) = &mut self.hosts[host].process else { return Ok(()) };
        process.end_told = true;
        self.guest_is_off = true;
        self.handle_event(host, Event::GuestEnded(reason))
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
            self.schedule_after(delay, SimEvent::DiskDone { host, id, request });
        }
    }

    /// The disk of the side that runs the guest has done a request.
    pub fn disk_done(&mut self, host: usize, request: u64) {
        let Some(process) = &mut self.hosts[host].process else { return };
        let done = disk_done(request);
        if process.disk_request() == Some(request) && !process.inputs.contains(&done) {
            process.inputs.push_back(done);
        }
    }

    fn replay(&mut self, host: usize) -> SimResult {
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
                // The gate holds an output. It is compared when its record is the next.
                if let Some(output) = process.guest.step() {
                    process.gate.hold(output.clone());
                    process.made.push_back(output);
                }
                continue;
            }
            if let Err(what) = self.replay_record(host, &record) {
                return self.handle_event(host, Event::HostFailed(&what));
            }
            let Some(process) = &mut self.hosts[host].process else { return Ok(()) };
            process.front = None;
            process.applied += 1;
        }
        let Some(process) = &mut self.hosts[host].process else { return Ok(()) };
        let (records, position) = (process.applied, process.guest.position());
        self.handle_event(host, Event::Replayed { records, position })
    }

    /// Compares or applies a record at its position. An error is a divergence.
    fn replay_record(&mut self, host: usize, record: &Record) -> Result<(), String> {
        let Some(process) = &mut self.hosts[host].process else { return Ok(()) };
        match &record.entry {
            Entry::Input(LoggedInput::Frame { slot, bytes }) => {
                let input = Input::Frame { slot: *slot, bytes: bytes.clone() };
                self.apply(host, &input);
            }
            Entry::Input(LoggedInput::DiskDone { id, .. }) => {
                if process.disk_request() != Some(*id) {
                    return Err("divergence: no such disk request is open".into());
                }
                self.apply(host, &disk_done(*id));
            }
            Entry::Output(expected) => {
                let made = process.made.pop_front();
                if made.as_ref().map(logged) != Some(*expected) {
                    return Err(format!("divergence: the replay made another output: {made:?}"));
                }
            }
            Entry::State(digest) if *digest != process.guest.digest() => {
                return Err("divergence: the replay is in another state".into());
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
