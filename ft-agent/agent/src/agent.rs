//! The agent's state, and where each event goes.

use std::collections::VecDeque;

use entry::Position;
use entry::log::Record;
use logging_channel::ChannelError;
use logging_channel::message::{Beat, Message, Role};
use logging_channel::receiver::{NextRecord, Receiver};
use logging_channel::sender::{Pace, Sender};
use logging_channel::stream::{Inbox, Outbox};
use store_rule::names::{Generation, Incarnation};

use crate::config::{Config, Rule};
use crate::event::{Action, Event, Exit, Suspicion};
use crate::start::Peer;
use crate::watch::Watch;

/// Where a replica is in its life. The module's documentation draws it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// No peer yet.
    Waiting,
    /// Primary: the store is asked to open, or (`taking`) an unprotected one to take.
    Opening { taking: bool, lost: Option<Suspicion> },
    /// Backup: knows its primary, the guest does not run yet.
    Met,
    /// Log and acknowledgements flow.
    Protected,
    /// Primary: the guest is paused; when everything is settled the backup is told to take.
    HandingOver { told: bool },
    /// Backup: told to take; the channel stays open.
    Succeeding,
    /// The VM has ended.
    Ending { reason: entry::log::EndReason, told: bool },
    /// The peer is lost, the channel closed; not yet able to take.
    Suspecting,
    /// The store is asked.
    Taking,
    /// The generation is this side's.
    Alone,
    /// The VM has ended and the store is asked to forget it.
    Forgetting(Exit),
    /// Nothing will happen any more.
    Out(Exit),
}

/// The side of the log.
#[derive(Debug)]
pub(crate) enum Side {
    Primary(Box<Sender>),
    Backup(Box<Receiver>),
}

/// A replica's agent: see the crate's documentation.
#[derive(Debug)]
pub struct Agent {
    pub(crate) config: Config,
    pub(crate) state: State,
    pub(crate) generation: Option<Generation>,
    pub(crate) peer: Option<Peer>,
    /// There is once the peers have met.
    pub(crate) side: Option<Side>,
    pub(crate) watch: Watch,
    pub(crate) inbox: Inbox,
    pub(crate) outbox: Outbox,
    pub(crate) connected: bool,
    pub(crate) next_beat: u64,
    /// The store did not answer, and is asked again at this time.
    pub(crate) ask_at: Option<u64>,
    /// Backup: tap and disks are ready.
    pub(crate) ready: bool,
    /// Where this side's guest is, as the beats tell.
    pub(crate) position: Position,
    pub(crate) peer_beat: Beat,
    /// The handover was asked for, so losing the verdict is what was wanted.
    pub(crate) handing_over: bool,
    /// The VM's end, which a winner still has to finish.
    pub(crate) ended: Option<entry::log::EndReason>,
    pub(crate) released: u64,
    /// The generation is this side's: what its guest says may leave.
    pub(crate) has_won: bool,
    pub(crate) actions: VecDeque<Action>,
}

impl Agent {
    /// An agent that waits for its peer; an unprotected primary asks the store at once.
    pub fn new(config: Config, now: u64) -> Agent {
        let mut agent = Agent {
            state: State::Waiting,
            generation: None,
            peer: None,
            side: None,
            watch: Watch::new(config.timing, now),
            inbox: Inbox::new(),
            outbox: Outbox::new(),
            connected: false,
            next_beat: now,
            ask_at: None,
            ready: false,
            position: Position::default(),
            peer_beat: Beat::default(),
            handing_over: false,
            ended: None,
            released: 0,
            has_won: false,
            actions: VecDeque::new(),
            config,
        };
        if agent.config.role == Role::Primary && agent.config.unprotected {
            agent.open();
        }
        agent
    }

    /// What has happened. Actions and bytes to write may be there afterwards.
    pub fn handle(&mut self, now: u64, event: Event<'_>) {
        match event {
            Event::Connected => self.connect(now),
            Event::Received(bytes) => self.received(now, bytes),
            Event::Disconnected => self.lost(now, Suspicion::Disconnected),
            Event::Stranger(hello) => self.stranger(now, hello),
            Event::Tick => self.tick(now),
            Event::Verdict(verdict) => self.verdict(now, verdict),
            Event::Opened(opened) => self.opened(now, opened),
            Event::Forgotten(done) => self.forgotten(now, done),
            Event::Ready => {
                self.ready = true;
                self.take_when_able(now);
            }
            Event::Replayed { records, position } => self.replayed(now, records, position),
            Event::HostFailed(reason) => self.host_failed(reason),
            Event::GuestEnded(reason) => self.guest_ended(now, reason),
            Event::HandOver => self.hand_over(now),
        }
        self.offer_release(now);
    }

    /// The next thing to do.
    pub fn next_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Bytes for the socket; empty when there is nothing to write.
    pub fn outgoing(&self) -> &[u8] {
        self.outbox.front()
    }

    /// The socket took `n` bytes of [`Agent::outgoing`].
    pub fn wrote(&mut self, n: usize) {
        self.outbox.wrote(n);
    }

    fn is_deciding(&self) -> bool {
        matches!(self.state, State::Suspecting | State::Taking)
    }

    /// When [`Event::Tick`] is due at the latest.
    pub fn deadline(&self) -> Option<u64> {
        // Without a peer it is this side's own loop that is looked at as often.
        let beat = (self.connected || self.is_deciding()).then_some(self.next_beat);
        let batch = match &self.side {
            Some(Side::Primary(sender)) => sender.deadline(),
            Some(Side::Backup(receiver)) => receiver.deadline().filter(|_| self.connected),
            None => None,
        };
        [self.ask_at, beat, batch].into_iter().flatten().min()
    }

    /// The guest's loop has made a turn, also when it only waits. Outputs may leave after it: see [`Action::Release`].
    pub fn turn(&mut self, now: u64, position: Position) {
        self.watch.turn(now);
        self.position = position;
        if let Some(Side::Primary(sender)) = &mut self.side {
            sender.turn(now, &mut self.outbox);
        }
        self.take_when_able(now);
        self.offer_release(now);
    }

    /// Primary: the guest's loop is about to wait, so that nothing is to follow for a while.
    pub fn rest(&mut self, now: u64) {
        if let Some(Side::Primary(sender)) = &mut self.side {
            sender.rest(now, &mut self.outbox);
        }
    }

    /// How fast the guest may run.
    pub fn pace(&self, now: u64) -> Pace {
        match (&self.state, &self.side) {
            (State::Alone, _) => Pace::Free,
            (State::Protected, Some(Side::Primary(sender))) => sender.pace(now),
            // A backup runs as far as its records go.
            (State::Protected | State::Succeeding | State::Suspecting, Some(Side::Backup(_))) => Pace::Free,
            _ => Pace::Stop,
        }
    }

    /// Primary: appends a record, before what it says takes effect. An output's leaves at [`Agent::turn`] or [`Agent::rest`].
    /// True: there is something to write or to do, or [`Agent::deadline`] has changed.
    pub fn append(&mut self, now: u64, record: &Record) -> bool {
        self.position = record.position;
        let Some(Side::Primary(sender)) = &mut self.side else { return false };
        let deadline = sender.deadline();
        if self.config.without == Some(Rule::LogOutputs)
            && matches!(record.entry, entry::log::Entry::Output(_))
        {
            sender.hold_unlogged();
        } else {
            sender.append(now, record, &mut self.outbox);
        }
        let moved = sender.deadline() != deadline;
        self.offer_release(now);
        moved || !self.outbox.front().is_empty() || !self.actions.is_empty()
    }

    /// Backup: the next record to replay. At [`NextRecord::End`] everything is replayed that may be; the guest's loop
    /// stops there, says [`Event::Replayed`], and waits for [`Action::GoLive`] or [`Action::Halt`].
    pub fn next_record(&mut self) -> NextRecord {
        match &mut self.side {
            Some(Side::Backup(receiver)) => receiver.next_record(),
            _ => NextRecord::Wait,
        }
    }

    /// How many outputs, since the log's start, may have left by now. Asked anew just before each is written (rule 5).
    pub fn release_limit(&self, now: u64) -> u64 {
        if self.has_won {
            return u64::MAX;
        }
        match (&self.state, &self.side) {
            (
                State::Protected | State::HandingOver { .. } | State::Ending { .. },
                Some(Side::Primary(sender)),
            ) => {
                if !self.config.has(Rule::HoldOutputs) {
                    return sender.cursors().outputs_recorded;
                }
                let fresh = self.watch.is_fresh(now) || !self.config.has(Rule::ReleaseOnlyWhenFresh);
                if fresh { sender.cursors().outputs_acked } else { self.released }
            }
            _ => self.released,
        }
    }

    /// Whether this side may tell the network that the guest is behind it. A loser's word would lead frames astray, so it
    /// comes under the same lease as an output.
    pub fn may_announce(&self, now: u64) -> bool {
        let leads = matches!((&self.state, &self.side), (State::Protected, Some(Side::Primary(_))));
        self.has_won || leads && self.watch.is_fresh(now)
    }

    /// So many outputs have left.
    pub fn released(&mut self, now: u64, outputs: u64) {
        self.released = outputs;
        if let Some(Side::Primary(sender)) = &mut self.side {
            sender.released(outputs);
        }
        self.settle(now);
    }

    /// Backup: how many outputs its gate may drop, since they have left at the primary.
    pub fn drop_limit(&self) -> u64 {
        match &self.side {
            Some(Side::Backup(receiver)) => receiver.outputs_released(),
            _ => 0,
        }
    }

    fn offer_release(&mut self, now: u64) {
        let held = match &self.side {
            Some(Side::Primary(sender)) => sender.cursors().outputs_recorded,
            _ => return,
        };
        let offered = matches!(self.actions.back(), Some(Action::Release));
        if !offered && self.release_limit(now).min(held) > self.released {
            self.actions.push_back(Action::Release);
        }
    }

    fn received(&mut self, now: u64, bytes: &[u8]) {
        if !self.connected {
            return;
        }
        self.inbox.push(bytes);
        self.watch.heard(now);
        self.resume_if_rule_is_off();
        while self.connected {
            let message = match self.inbox.message() {
                Ok(Some(message)) => message,
                Ok(None) => break,
                Err(e) => return self.lost(now, Suspicion::Protocol(e.into())),
            };
            if let Err(e) = self.message(now, message) {
                return self.lost(now, Suspicion::Protocol(e));
            }
        }
        self.acknowledge(now);
        self.settle(now);
    }

    fn message(&mut self, now: u64, message: Message) -> Result<(), ChannelError> {
        let name = message.name();
        match (message, &mut self.side) {
            (Message::Hello(hello), _) => self.meet(now, *hello),
            (Message::Failed { reason }, _) => self.lost(now, Suspicion::Failed(reason)),
            (Message::Beat(beat), Some(_)) => self.beat(now, beat),
            (Message::Ack(ack), Some(Side::Primary(sender))) => {
                sender.acked(&ack, &mut self.outbox)?;
                self.watch.echoed(ack.echo_ns);
            }
            (Message::Live, Some(Side::Primary(_))) if self.handing_over => self.halt(Exit::HandedOver),
            (Message::Ended, Some(Side::Primary(_))) => self.end_acknowledged(),
            (Message::Start { generation }, Some(Side::Backup(_))) if self.state == State::Met => {
                self.started(now, Generation(generation));
            }
            (Message::Log(block), Some(Side::Backup(receiver))) if self.generation.is_some() => {
                receiver.log(&block)?;
            }
            (Message::Released { outputs }, Some(Side::Backup(receiver))) => {
                receiver.released(outputs)?;
                self.actions.push_back(Action::Drop);
            }
            (Message::HandOver, Some(Side::Backup(_))) if self.state == State::Protected => self.succeed(now),
            (Message::End(reason), Some(Side::Backup(_))) if self.state == State::Protected => {
                self.peer_ended(reason);
            }
            _ => return Err(ChannelError::Unexpected(name)),
        }
        Ok(())
    }

    fn beat(&mut self, now: u64, beat: Beat) {
        self.watch.beat(now, &beat);
        self.peer_beat = beat;
        if let Some(Side::Primary(sender)) = &mut self.side {
            sender.replayed(beat.records, &mut self.outbox);
        }
    }

    /// Acknowledges what is due to be: what outputs wait for on receipt.
    pub(crate) fn acknowledge(&mut self, now: u64) {
        let echo = self.watch.echo();
        if let Some(Side::Backup(receiver)) = &mut self.side
            && self.connected
            && let Some(ack) = receiver.ack(now, echo)
        {
            self.outbox.push(&Message::Ack(ack));
        }
    }

    fn replayed(&mut self, now: u64, records: u64, position: Position) {
        self.position = position;
        if let Some(Side::Backup(receiver)) = &mut self.side {
            receiver.move_replayed(records);
        }
        self.acknowledge(now);
        self.take_when_able(now);
        self.finish_when_replayed();
    }

    fn tick(&mut self, now: u64) {
        if let Some(Side::Primary(sender)) = &mut self.side {
            sender.tick(now, &mut self.outbox);
            if sender.cursors().replayed == sender.cursors().acked {
                self.watch.idle(now);
            }
        }
        let suspicion = self.watch.tick(now).filter(|_| !self.is_deciding());
        if self.connected {
            if let Some(suspicion) = suspicion {
                self.lost(now, suspicion);
            } else if now >= self.next_beat && self.side.is_some() {
                self.send_beat(now);
            }
        } else if self.is_deciding() {
            self.next_beat = now + self.config.timing.beat_interval_ns;
            if self.watch.is_stuck(now) {
                self.host_failed("its guest's loop is stuck");
            }
        }
        self.acknowledge(now);
        self.ask_again(now);
        self.settle(now);
    }

    pub(crate) fn send_beat(&mut self, now: u64) {
        self.next_beat = now + self.config.timing.beat_interval_ns;
        if !matches!(self.state, State::Protected) {
            // The guest's loop rests, and is not stuck.
            self.watch.turn(now);
        }
        let records = match &self.side {
            Some(Side::Primary(sender)) => sender.cursors().recorded,
            Some(Side::Backup(receiver)) => receiver.replayed(),
            None => 0,
        };
        let (turns, echo_ns) = (self.watch.turns(), self.watch.echo());
        let beat = Beat { stamp_ns: now, echo_ns, turns, records, position: self.position.count };
        self.outbox.push(&Message::Beat(beat));
    }

    /// This side's incarnation.
    pub fn incarnation(&self) -> Incarnation {
        self.config.me.incarnation
    }

    pub(crate) fn halt(&mut self, exit: Exit) {
        self.state = State::Out(exit.clone());
        self.actions.push_back(Action::Halt(exit));
    }
}
