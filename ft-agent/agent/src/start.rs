//! The start of a pair (rules 1, 6 and 7): hello, open, start.

use logging_channel::message::{Hello, Message, Role};
use logging_channel::receiver::Receiver;
use logging_channel::sender::{Limits, Sender};
use logging_channel::stream::{MessageReader, Outbox};
use store_rule::names::{CopyId, DiskName, Generation, Incarnation, KeyId};
use store_rule::record::{Applied, HostId, Member, Members};

use crate::agent::Agent;
use crate::event::{Action, Outcome, PeerRefusal, Suspicion};
use crate::failure_detector::FailureDetector;
use crate::protection::RiskWatch;
use crate::rules::Rule;
use crate::state::{AgentState, LogSide, PeerReplica};
use crate::watch::StoreWatch;

/// How often the round trip is measured before a link is refused.
const ROUND_TRIPS_MAX: u32 = 4;

impl Agent {
    /// A connection to the peer has come up: this side says hello.
    pub(crate) fn say_hello(&mut self, now: u64, peer_key: Option<KeyId>) {
        if self.connected || self.state != AgentState::Waiting {
            return self.actions.push_back(Action::Close);
        }
        self.connected = true;
        self.peer_key = peer_key;
        (self.inbox, self.outbox) = (MessageReader::new(), Outbox::new());
        self.failure_detector = FailureDetector::new(self.config.timing, now);
        let me = &self.config.me;
        self.outbox.push(&Message::Hello(Box::new(Hello {
            versions: self.versions,
            vm: self.config.vm.as_str().into(),
            role: self.config.role,
            incarnation: me.incarnation.into(),
            disks: me.disks.iter().map(|(name, copy)| (name.as_str().into(), (*copy).into())).collect(),
            timeout_ns: self.config.timing.timeout_ns,
            buffer_bytes: self.config.buffers.buffer_bytes,
            identity: self.config.identity.clone(),
        })));
    }

    /// The peer said hello: it is the other half of this pair, or it is refused (rule 7).
    pub(crate) fn hello_received(&mut self, now: u64, hello: Hello) {
        if let Some(version) = self.inbox.version() {
            self.outbox.speak(version);
        }
        match self.check_hello(hello) {
            Ok(peer) => {
                self.log_side = Some(self.new_log_side(&peer));
                self.peer = Some(peer);
                self.next_beat_at = now;
                match self.config.role {
                    Role::Primary => self.state = AgentState::Measuring { best_ns: u64::MAX, samples: 0 },
                    Role::Backup => self.state = AgentState::Met,
                }
            }
            Err(refusal) => {
                self.outbox.push(&Message::Failed { reason: refusal.to_string() });
                self.refuse(refusal);
            }
        }
    }

    fn check_hello(&self, hello: Hello) -> Result<PeerReplica, PeerRefusal> {
        let ours = &self.config;
        if hello.vm != ours.vm.as_str() {
            return Err(PeerRefusal::Vm { theirs: hello.vm, ours: ours.vm.as_str().into() });
        }
        if hello.role == ours.role {
            return Err(PeerRefusal::Role(hello.role));
        }
        if hello.timeout_ns != ours.timing.timeout_ns {
            let (theirs, ours) = (hello.timeout_ns, ours.timing.timeout_ns);
            return Err(PeerRefusal::Timeout { theirs, ours });
        }
        ours.identity.check(&hello.identity)?;
        let incarnation = Incarnation::try_from(hello.incarnation).ok();
        let incarnation = incarnation.filter(|i| *i != ours.me.incarnation);
        let mut member = Member::new(incarnation.ok_or(PeerRefusal::Invalid("incarnation"))?);
        member.host = self.peer_key.map(HostId::Key);
        for (name, copy) in hello.disks {
            let name = DiskName::try_from(name).map_err(|_| PeerRefusal::Invalid("disk name"))?;
            let copy = CopyId::try_from(copy).map_err(|_| PeerRefusal::Invalid("disk copy id"))?;
            member.disks.insert(name, copy);
        }
        Ok(PeerReplica { member, identity: hello.identity, buffer_bytes: hello.buffer_bytes })
    }

    /// The sender or the receiver of the log, which begins with the primary's identity.
    fn new_log_side(&self, peer: &PeerReplica) -> LogSide {
        let buffers = self.config.buffers;
        match self.config.role {
            Role::Primary => {
                let limits = Limits {
                    unacked_bytes_max: buffers.buffer_bytes,
                    peer_buffer_bytes: peer.buffer_bytes,
                    lag_ns_max: buffers.lag_ns_max,
                    lag_ns_bound: buffers.lag_ns_limit,
                    batch_ns: buffers.batch_ns,
                    coalescing_ns: buffers.coalescing_ns,
                };
                LogSide::Primary(Box::new(Sender::new(&self.config.identity, limits)))
            }
            Role::Backup => LogSide::Backup(Box::new(Receiver::new(&peer.identity, buffers.buffer_bytes))),
        }
    }

    /// Lets go of this peer. Before the guest runs, peers may come and go.
    pub(crate) fn refuse(&mut self, refusal: PeerRefusal) {
        self.actions.push_back(Action::Refused(refusal));
        self.disconnect();
        self.peer = None;
        self.log_side = None;
        self.state = AgentState::Waiting;
    }

    /// Primary: the round trip to the backup was measured before the guest runs. A link over which no output could leave
    /// is refused (rule 12).
    pub(crate) fn round_trip_measured(&mut self, round_trip_ns: u64) {
        let limit_ns = self.config.timing.timeout_ns / 2;
        let AgentState::Measuring { best_ns, samples } = &mut self.state else { return };
        (*best_ns, *samples) = (round_trip_ns.min(*best_ns), *samples + 1);
        let (round_trip_ns, is_last) = (*best_ns, *samples == ROUND_TRIPS_MAX);
        if round_trip_ns < limit_ns {
            self.ask_to_open();
        } else if is_last {
            let refusal = PeerRefusal::RoundTrip { round_trip_ns, timeout_ns: 2 * limit_ns };
            self.outbox.push(&Message::Failed { reason: refusal.to_string() });
            self.refuse(refusal);
        }
    }

    /// Asks the store to open the generation for this pair, or for this side alone (rule 6).
    pub(crate) fn ask_to_open(&mut self) {
        let members = Members {
            primary: self.config.me.clone(),
            backup: self.peer.as_ref().map(|peer| peer.member.clone()),
        };
        let lost = match &mut self.state {
            AgentState::Opening { lost, .. } => lost.take(),
            _ => None,
        };
        self.state = AgentState::Opening { taking: false, lost };
        self.actions.push_back(Action::Open { generation: self.config.generation, members });
    }

    pub(crate) fn open_answered(&mut self, now: u64, opened: Option<Applied>) {
        let AgentState::Opening { taking: false, lost } = &mut self.state else { return };
        match opened {
            None => self.retry_later(now),
            Some(Applied::Stale) => self.give_up(Outcome::NotOpened),
            Some(Applied::Done) => {
                self.generation = Some(self.config.generation);
                if let Some(suspicion) = lost.take() {
                    // The guest has not run: the VM can be started again.
                    self.ask_to_record_end(Outcome::NotStarted(suspicion));
                } else if self.peer.is_none() {
                    self.state = AgentState::Opening { taking: true, lost: None };
                    self.ask_to_take(now);
                } else {
                    let generation = self.config.generation;
                    self.outbox.push(&Message::Start { generation: generation.0 });
                    self.pair_started(now, generation);
                }
            }
        }
    }

    pub(crate) fn open_refused(&mut self, reason: &str) {
        if matches!(self.state, AgentState::Opening { taking: false, .. }) {
            self.give_up(Outcome::OpenRefused(reason.into()));
        }
    }

    /// Ends before the guest has run, and tells the peer why.
    fn give_up(&mut self, outcome: Outcome) {
        self.outbox.push(&Message::Failed { reason: outcome.to_string() });
        self.halt(outcome);
    }

    /// The pair is protected: if the peer is lost from here on, the store decides.
    pub(crate) fn pair_started(&mut self, now: u64, generation: Generation) {
        self.generation = Some(generation);
        self.state = AgentState::Protected;
        self.failure_detector.start(now);
        self.watch = StoreWatch::new(self.config.timing, now);
        self.risks = RiskWatch::new(now);
        self.actions.push_back(Action::Start { generation });
        self.send_beat(now);
    }

    /// A process has said hello on a second connection. If it is this VM's other side with a new incarnation,
    /// then the peer was restarted, and what it knew is gone (rule 1). A hello is only a claim: it never beats
    /// a connection on which the peer is still heard, and only the peer can make it (rule 10).
    pub(crate) fn hello_from_stranger(&mut self, now: u64, hello: &Hello, same_certificate: bool) {
        let Some(peer) = &self.peer else { return };
        let is_other_side = hello.vm == self.config.vm.as_str() && hello.role != self.config.role;
        let is_new = hello.incarnation != u128::from(peer.member.incarnation);
        let believed = same_certificate && self.connected && self.failure_detector.is_peer_quiet(now);
        if is_other_side && is_new && (believed || !self.in_force(Rule::DoubtStrangers)) {
            self.peer_lost(now, Suspicion::Restarted);
        }
    }

    pub(crate) fn disconnect(&mut self) {
        if std::mem::take(&mut self.connected) {
            self.actions.push_back(Action::Close);
        }
    }
}
