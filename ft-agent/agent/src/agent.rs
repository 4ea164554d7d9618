//! The agent, and where each event goes.

use std::collections::VecDeque;

use entry::Position;
use entry::log::{EndReason, Record};
use logging_channel::ChannelError;
use logging_channel::message::{Beat, KeyProof, Message, Role};
use logging_channel::receiver::NextRecord;
use logging_channel::sender::GuestPace;
use logging_channel::stream::{MessageReader, Outbox};
use logging_channel::versions::{ChannelVersions, OURS};
use store_rule::names::{Generation, Incarnation, KeyId};

use crate::config::Config;
use crate::event::{Action, Event, Outcome, Suspicion};
use crate::failure_detector::FailureDetector;
use crate::protection::RiskWatch;
use crate::rules::Rule;
use crate::state::{AgentState, LogSide, PeerReplica, Preparation};
use crate::watch::StoreWatch;

/// A replica's agent: see the crate's documentation.
#[derive(Debug)]
pub struct Agent {
    pub(crate) config: Config,
    pub(crate) state: AgentState,
    pub(crate) generation: Option<Generation>,
    pub(crate) peer: Option<PeerReplica>,
    /// Set once the peers have met.
    pub(crate) log_side: Option<LogSide>,
    pub(crate) failure_detector: FailureDetector,
    pub(crate) inbox: MessageReader,
    pub(crate) outbox: Outbox,
    pub(crate) connected: bool,
    /// The key that the process at the other end of the connection has shown.
    pub(crate) peer_key: Option<KeyId>,
    pub(crate) next_beat_at: u64,
    /// When the store is asked again, if it did not answer.
    pub(crate) retry_at: Option<u64>,
    /// What is known of the store's record while the guest runs.
    pub(crate) watch: StoreWatch,
    /// What is remembered to judge the risks of a running pair.
    pub(crate) risks: RiskWatch,
    /// Backup: its tap and disks are ready.
    pub(crate) ready: bool,
    /// Where this side's guest is; beats carry it to the peer.
    pub(crate) position: Position,
    pub(crate) peer_beat: Beat,
    /// A handover was requested, so that losing the verdict is what the user wanted.
    pub(crate) handover_requested: bool,
    /// Backup: the handover for which the primary has asked it to prepare.
    pub(crate) preparation: Preparation,
    /// Backup: the user asked it to leave during that, so that it leaves if the handover is called off.
    pub(crate) leave_requested: bool,
    /// This side lives because the primary has yielded, and the store has not been told yet.
    pub(crate) owes_take: bool,
    /// How the VM ended, if the winner of the verdict still has to have the store record it.
    pub(crate) pending_end: Option<EndReason>,
    /// Outputs that have left.
    pub(crate) released: u64,
    /// The generation belongs to this side: what its guest emits may leave.
    pub(crate) has_won: bool,
    pub(crate) actions: VecDeque<Action>,
    #[cfg(feature = "ablation")]
    pub(crate) without: Option<Rule>,
    /// The versions of the channel's protocol that this side claims to know.
    pub(crate) versions: ChannelVersions,
}

impl Agent {
    /// An agent that waits for its peer. An unprotected primary asks the store at once.
    pub fn new(config: Config, now: u64) -> Agent {
        let mut agent = Agent {
            state: AgentState::Waiting,
            generation: None,
            peer: None,
            log_side: None,
            failure_detector: FailureDetector::new(config.timing, now),
            inbox: MessageReader::new(),
            outbox: Outbox::new(),
            connected: false,
            peer_key: None,
            next_beat_at: now,
            retry_at: None,
            watch: StoreWatch::new(config.timing, now),
            risks: RiskWatch::new(now),
            ready: false,
            position: Position::default(),
            peer_beat: Beat::default(),
            handover_requested: false,
            preparation: Preparation::None,
            leave_requested: false,
            owes_take: false,
            pending_end: None,
            released: 0,
            has_won: false,
            actions: VecDeque::new(),
            #[cfg(feature = "ablation")]
            without: None,
            versions: OURS,
            config,
        };
        if agent.config.role == Role::Primary && agent.config.unprotected {
            agent.ask_to_open();
        }
        agent
    }

    /// Handles an event. Afterwards there may be actions to do and bytes to write.
    pub fn handle(&mut self, now: u64, event: Event<'_>) {
        match event {
            Event::Connected { peer_key } => self.say_hello(now, peer_key),
            Event::Received(bytes) => self.bytes_received(now, bytes),
            Event::Disconnected => self.peer_lost(now, Suspicion::Disconnected),
            Event::Stranger { hello, same_certificate } => {
                self.hello_from_stranger(now, hello, same_certificate)
            }
            Event::Tick => self.tick(now),
            Event::Verdict(verdict) => self.verdict_received(now, verdict),
            Event::Opened(opened) => self.open_answered(now, opened),
            Event::OpenRefused(reason) => self.open_refused(reason),
            Event::EndRecorded(done) => self.end_recorded(now, done),
            Event::Looked(view) => self.looked(now, view),
            Event::Ready => {
                self.ready = true;
                self.take_when_able(now);
            }
            Event::Replayed { records, position } => self.replayed(now, records, position),
            Event::HostFailed(reason) => self.host_failed(reason),
            Event::GuestEnded(reason) => self.guest_ended(reason),
            Event::HandOver => self.hand_over(now),
            Event::KeyReplaced(proof) => self.tell_new_key(proof),
        }
        self.review_risks(now);
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
        matches!(self.state, AgentState::Suspecting | AgentState::Taking)
    }

    /// The latest time at which [`Event::Tick`] is due.
    pub fn deadline(&self) -> Option<u64> {
        // Without a peer, this side checks its own guest loop as often as it would send beats.
        let beat = (self.connected || self.is_deciding()).then_some(self.next_beat_at);
        let batch = match &self.log_side {
            Some(LogSide::Primary(sender)) => sender.deadline(),
            Some(LogSide::Backup(receiver)) => receiver.deadline().filter(|_| self.connected),
            None => None,
        };
        let look = self.watch.deadline().filter(|_| self.watches_store());
        let handover = match self.state {
            AgentState::HandingOver { until, .. } => Some(until),
            _ => None,
        };
        [self.retry_at, beat, batch, look, handover].into_iter().flatten().min()
    }

    /// The guest loop has made a turn, even if it only waits. Outputs may leave afterwards: see
    /// [`Action::Release`].
    pub fn guest_loop_turned(&mut self, now: u64, position: Position) {
        self.failure_detector.guest_loop_turned(now);
        self.position = position;
        if let Some(LogSide::Primary(sender)) = &mut self.log_side {
            sender.guest_loop_turned(now, &mut self.outbox);
        }
        self.take_when_able(now);
        self.offer_release(now);
    }

    /// Primary: the guest loop is about to wait, so that no output is expected for a while.
    pub fn guest_loop_waits(&mut self, now: u64) {
        if let Some(LogSide::Primary(sender)) = &mut self.log_side {
            sender.guest_loop_waits(now, &mut self.outbox);
        }
    }

    /// How fast the guest may run.
    pub fn pace(&self, now: u64) -> GuestPace {
        match (&self.state, &self.log_side) {
            (AgentState::Alone, _) => GuestPace::Free,
            (AgentState::Protected, Some(LogSide::Primary(sender))) => sender.pace(now),
            // A backup runs as far as its records go.
            (
                AgentState::Protected | AgentState::ReceivingHandover | AgentState::Suspecting,
                Some(LogSide::Backup(_)),
            ) => GuestPace::Free,
            _ => GuestPace::Stop,
        }
    }

    /// Primary: appends a record before what it records takes effect. An output's record is sent at
    /// [`Agent::guest_loop_turned`] or [`Agent::guest_loop_waits`]. Returns true if there is something to
    /// write or to do, or if [`Agent::deadline`] has changed.
    pub fn append(&mut self, now: u64, record: &Record) -> bool {
        self.position = record.position;
        #[cfg(feature = "ablation")]
        if self.holds_unlogged(now, record) {
            return true;
        }
        let Some(LogSide::Primary(sender)) = &mut self.log_side else { return false };
        let deadline = sender.deadline();
        sender.append(now, record, &mut self.outbox);
        let moved = sender.deadline() != deadline;
        self.offer_release(now);
        moved || !self.outbox.front().is_empty() || !self.actions.is_empty()
    }

    /// Backup: the next record to replay. At [`NextRecord::End`] everything that may be replayed has been:
    /// the guest loop stops there, sends [`Event::Replayed`], and waits for [`Action::GoLive`] or
    /// [`Action::Halt`].
    pub fn next_record(&mut self) -> NextRecord {
        match &mut self.log_side {
            Some(LogSide::Backup(receiver)) => receiver.next_record(),
            _ => NextRecord::Wait,
        }
    }

    /// How many outputs, counted from the log's start, may have left by now. To be asked again just before
    /// each output is written (rule 5).
    pub fn release_limit(&self, now: u64) -> u64 {
        if self.has_won {
            return u64::MAX;
        }
        match (&self.state, &self.log_side) {
            (
                AgentState::Protected | AgentState::HandingOver { .. } | AgentState::Ending { .. },
                Some(LogSide::Primary(sender)),
            ) => {
                if !self.in_force(Rule::HoldOutputs) {
                    return sender.cursors().outputs_recorded;
                }
                let may_release =
                    self.failure_detector.holds_lease(now) || !self.in_force(Rule::ReleaseOnlyWhenFresh);
                if may_release { sender.cursors().outputs_acked } else { self.released }
            }
            _ => self.released,
        }
    }

    /// Whether this side may announce to the network that the guest is reached through it. The announcement
    /// of a loser would lead frames astray, so it needs the same lease as an output.
    pub fn may_announce(&self, now: u64) -> bool {
        let leads =
            matches!((&self.state, &self.log_side), (AgentState::Protected, Some(LogSide::Primary(_))));
        self.has_won || leads && self.failure_detector.holds_lease(now)
    }

    /// This many outputs have left, counted from the log's start.
    pub fn released(&mut self, outputs: u64) {
        self.released = outputs;
        if let Some(LogSide::Primary(sender)) = &mut self.log_side {
            sender.released(outputs);
        }
        self.tell_backup_when_flushed();
    }

    /// Backup: how many outputs its gate may drop because they have left at the primary.
    pub fn drop_limit(&self) -> u64 {
        match &self.log_side {
            Some(LogSide::Backup(receiver)) => receiver.outputs_released(),
            _ => 0,
        }
    }

    pub(crate) fn offer_release(&mut self, now: u64) {
        let held = match &self.log_side {
            Some(LogSide::Primary(sender)) => sender.cursors().outputs_recorded,
            _ => return,
        };
        let offered = matches!(self.actions.back(), Some(Action::Release));
        if !offered && self.release_limit(now).min(held) > self.released {
            self.actions.push_back(Action::Release);
        }
    }

    fn bytes_received(&mut self, now: u64, bytes: &[u8]) {
        if !self.connected {
            return;
        }
        self.inbox.push(bytes);
        self.failure_detector.peer_heard(now);
        #[cfg(feature = "ablation")]
        self.resume_suspected_peer();
        while self.connected {
            let message = match self.inbox.next_message() {
                Ok(Some(message)) => message,
                Ok(None) => break,
                Err(e) => return self.peer_lost(now, Suspicion::Protocol(e.into())),
            };
            if let Err(e) = self.message_received(now, message) {
                return self.peer_lost(now, Suspicion::Protocol(e));
            }
        }
        self.acknowledge(now);
        self.tell_backup_when_flushed();
    }

    fn message_received(&mut self, now: u64, message: Message) -> Result<(), ChannelError> {
        let name = message.name();
        match (message, &mut self.log_side) {
            (Message::Hello(hello), _) => self.hello_received(now, *hello),
            (Message::Key(proof), _) => self.actions.push_back(Action::PeerKey(proof)),
            (Message::Failed { reason }, _) => self.peer_lost(now, Suspicion::Failed(reason)),
            (Message::Beat(beat), Some(_)) => self.beat_received(now, beat),
            (Message::Ack(ack), Some(LogSide::Primary(sender))) => {
                sender.acked(&ack, &mut self.outbox)?;
                self.failure_detector.stamp_echoed(now, ack.echo_ns);
            }
            (Message::Live, Some(LogSide::Primary(_))) if self.handover_requested => {
                self.halt(Outcome::HandedOver)
            }
            (Message::Prepared { records }, Some(LogSide::Primary(_))) => self.backup_prepared(records),
            (Message::Prepare, Some(LogSide::Backup(_))) if self.state == AgentState::Protected => {
                self.preparation = Preparation::Asked;
                self.tell_primary_when_prepared();
            }
            (Message::Yield, Some(LogSide::Backup(receiver)))
                if self.state == AgentState::Protected
                    && self.preparation == Preparation::Told
                    && receiver.is_drained() =>
            {
                self.primary_yielded(now)
            }
            (Message::Ended, Some(LogSide::Primary(_))) => self.end_acknowledged(),
            (Message::Start { generation }, Some(LogSide::Backup(_))) if self.state == AgentState::Met => {
                self.pair_started(now, Generation(generation));
            }
            (Message::Log(block), Some(LogSide::Backup(receiver))) if self.generation.is_some() => {
                receiver.receive_block(&block)?;
                self.handover_called_off();
            }
            (Message::Released { outputs }, Some(LogSide::Backup(receiver))) => {
                receiver.released(outputs)?;
                self.actions.push_back(Action::Drop);
            }
            (Message::HandOver, Some(LogSide::Backup(_))) if self.state == AgentState::Protected => {
                self.handover_received(now)
            }
            (Message::End(reason), Some(LogSide::Backup(_))) if self.state == AgentState::Protected => {
                self.end_received(reason);
            }
            _ => return Err(ChannelError::Unexpected(name)),
        }
        Ok(())
    }

    fn beat_received(&mut self, now: u64, beat: Beat) {
        let turns_count = !matches!(self.state, AgentState::HandingOver { .. } | AgentState::Yielded);
        let confirmed = self.failure_detector.beat_received(now, &beat, turns_count);
        self.peer_beat = beat;
        if let Some(round_trip_ns) = confirmed {
            self.round_trip_measured(round_trip_ns);
        }
        if let Some(LogSide::Primary(sender)) = &mut self.log_side {
            sender.replayed(beat.records, &mut self.outbox);
        }
    }

    /// Backup: acknowledges what was received, if an acknowledgement is due.
    fn acknowledge(&mut self, now: u64) {
        let echo = self.failure_detector.peer_stamp();
        if let Some(LogSide::Backup(receiver)) = &mut self.log_side
            && self.connected
            && let Some(ack) = receiver.ack_if_due(now, echo)
        {
            self.outbox.push(&Message::Ack(ack));
        }
    }

    fn replayed(&mut self, now: u64, records: u64, position: Position) {
        self.position = position;
        if let Some(LogSide::Backup(receiver)) = &mut self.log_side {
            receiver.move_replayed(records);
        }
        self.acknowledge(now);
        self.take_when_able(now);
        self.finish_when_replayed();
        self.tell_primary_when_prepared();
    }

    fn tick(&mut self, now: u64) {
        if let Some(LogSide::Primary(sender)) = &mut self.log_side {
            sender.tick(now, &mut self.outbox);
            // A backup that is to go on has something to do until it has said that it does: otherwise one that the
            // store does not answer, or refuses, would leave the guest paused for ever.
            let handing_over = matches!(self.state, AgentState::HandingOver { .. } | AgentState::Yielded);
            if sender.cursors().replayed == sender.cursors().acked && !handing_over {
                self.failure_detector.peer_idle(now);
            }
        }
        let suspicion = self.failure_detector.check_peer(now).filter(|_| !self.is_deciding());
        let suspicion = suspicion.or(self.gives_up_backup(now));
        if self.connected {
            if let Some(suspicion) = suspicion {
                self.peer_lost(now, suspicion);
            } else if now >= self.next_beat_at && self.log_side.is_some() {
                self.send_beat(now);
            }
        } else if self.is_deciding() {
            self.next_beat_at = now + self.config.timing.beat_interval_ns;
            if self.failure_detector.is_guest_loop_stuck(now) {
                self.host_failed("the guest loop is stuck");
            }
        }
        self.acknowledge(now);
        self.retry_when_due(now);
        self.look_when_due(now);
        self.tell_backup_when_flushed();
        self.go_back_when_due(now);
    }

    pub(crate) fn send_beat(&mut self, now: u64) {
        self.next_beat_at = now + self.config.timing.beat_interval_ns;
        if !matches!(self.state, AgentState::Protected) {
            // The guest loop waits; it is not stuck.
            self.failure_detector.guest_loop_turned(now);
        }
        let records = match &self.log_side {
            Some(LogSide::Primary(sender)) => sender.cursors().recorded,
            Some(LogSide::Backup(receiver)) => receiver.replayed(),
            None => 0,
        };
        let (turns, echo_ns) = (self.failure_detector.turns(), self.failure_detector.peer_stamp());
        let lag_ns = match &self.log_side {
            Some(LogSide::Primary(sender)) => sender.lag_ns(now),
            _ => 0,
        };
        let (position, risks) = (self.position.count, self.own_risks(now));
        let beat = Beat { stamp_ns: now, echo_ns, turns, records, position, risks, lag_ns };
        self.outbox.push(&Message::Beat(beat));
    }

    /// What a key proof says is between the owners of the connection's two ends.
    fn tell_new_key(&mut self, proof: &KeyProof) {
        if self.connected {
            self.outbox.push(&Message::Key(proof.clone()));
        }
    }

    /// Whether a rule is in force.
    #[cfg(not(feature = "ablation"))]
    pub(crate) const fn in_force(&self, _: Rule) -> bool {
        true
    }

    /// Whether a rule is in force.
    #[cfg(feature = "ablation")]
    pub(crate) fn in_force(&self, rule: Rule) -> bool {
        self.without != Some(rule)
    }

    /// This side's incarnation.
    pub fn incarnation(&self) -> Incarnation {
        self.config.me.incarnation
    }

    pub(crate) fn halt(&mut self, exit: Outcome) {
        self.has_won = false;
        self.state = AgentState::Out(exit.clone());
        self.actions.push_back(Action::Halt(exit));
    }
}
