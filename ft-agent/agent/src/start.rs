//! The start of a pair (rules 1, 6 and 7): hello, open, start.

use entry::identity::Identity;
use logging_channel::message::{Hello, Message, Role};
use logging_channel::receiver::Receiver;
use logging_channel::sender::{Limits, Sender};
use logging_channel::stream::{Inbox, Outbox};
use store_rule::names::{CopyId, DiskName, Generation, Incarnation};
use store_rule::record::{Member, Members};

use crate::agent::{Agent, Side, State};
use crate::config::Rule;
use crate::event::{Action, Exit, Opened, Refusal, Suspicion};
use crate::watch::Watch;

/// The other side, from its hello.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) member: Member,
    identity: Identity,
    buffer_bytes: u64,
}

impl Agent {
    /// A connection is there: both sides say hello.
    pub(crate) fn connect(&mut self, now: u64) {
        if self.connected || self.state != State::Waiting {
            return self.actions.push_back(Action::Close);
        }
        self.connected = true;
        (self.inbox, self.outbox) = (Inbox::new(), Outbox::new());
        self.watch = Watch::new(self.config.timing, now);
        let me = &self.config.me;
        self.outbox.push(&Message::Hello(Box::new(Hello {
            vm: self.config.vm.as_str().into(),
            role: self.config.role,
            incarnation: me.incarnation.into(),
            disks: me.disks.iter().map(|(name, copy)| (name.as_str().into(), (*copy).into())).collect(),
            timeout_ns: self.config.timing.timeout_ns,
            buffer_bytes: self.config.buffers.buffer_bytes,
            identity: self.config.identity.clone(),
        })));
    }

    /// The peer said hello: it is the other half of this pair, or refused (rule 7).
    pub(crate) fn meet(&mut self, now: u64, hello: Hello) {
        match self.examine(hello) {
            Ok(peer) => {
                self.peer = Some(peer);
                self.next_beat = now;
                match self.config.role {
                    Role::Primary => self.open(),
                    Role::Backup => self.state = State::Met,
                }
                self.take_sides();
            }
            Err(refusal) => {
                self.outbox.push(&Message::Failed { reason: refusal.to_string() });
                self.refuse(refusal);
            }
        }
    }

    fn examine(&self, hello: Hello) -> Result<Peer, Refusal> {
        let ours = &self.config;
        if hello.vm != ours.vm.as_str() {
            return Err(Refusal::Vm { theirs: hello.vm, ours: ours.vm.as_str().into() });
        }
        if hello.role == ours.role {
            return Err(Refusal::Role(hello.role));
        }
        if hello.timeout_ns != ours.timing.timeout_ns {
            let (theirs, ours) = (hello.timeout_ns, ours.timing.timeout_ns);
            return Err(Refusal::Timeout { theirs, ours });
        }
        ours.identity.check(&hello.identity)?;
        let incarnation = Incarnation::try_from(hello.incarnation).ok();
        let incarnation = incarnation.filter(|i| *i != ours.me.incarnation);
        let mut member = Member::new(incarnation.ok_or(Refusal::Invalid("incarnation"))?);
        for (name, copy) in hello.disks {
            let name = DiskName::try_from(name).map_err(|_| Refusal::Invalid("disk's name"))?;
            let copy = CopyId::try_from(copy).map_err(|_| Refusal::Invalid("disk's copy"))?;
            member.disks.insert(name, copy);
        }
        Ok(Peer { member, identity: hello.identity, buffer_bytes: hello.buffer_bytes })
    }

    /// Sender or receiver of the log, which begins with the primary's identity.
    fn take_sides(&mut self) {
        let Some(peer) = &self.peer else { return };
        let buffers = self.config.buffers;
        self.side = Some(match self.config.role {
            Role::Primary => {
                let limits = Limits {
                    unacked_bytes_max: buffers.buffer_bytes,
                    peer_buffer_bytes: peer.buffer_bytes,
                    lag_ns_max: buffers.lag_ns_max,
                    batch_ns: buffers.batch_ns,
                    spacing_ns: buffers.spacing_ns,
                };
                Side::Primary(Box::new(Sender::new(&self.config.identity, limits)))
            }
            Role::Backup => Side::Backup(Box::new(Receiver::new(&peer.identity, buffers.buffer_bytes))),
        });
    }

    /// Before anything runs a peer may come and go: this one goes.
    pub(crate) fn refuse(&mut self, refusal: Refusal) {
        self.actions.push_back(Action::Refused(refusal));
        self.disconnect();
        self.peer = None;
        self.side = None;
        self.state = State::Waiting;
    }

    /// Asks the store to open the generation for this pair, or for this side alone (rule 6).
    pub(crate) fn open(&mut self) {
        let members = Members {
            primary: self.config.me.clone(),
            backup: self.peer.as_ref().map(|peer| peer.member.clone()),
        };
        let lost = match &mut self.state {
            State::Opening { lost, .. } => lost.take(),
            _ => None,
        };
        self.state = State::Opening { taking: false, lost };
        self.actions.push_back(Action::Open { generation: self.config.generation, members });
    }

    pub(crate) fn opened(&mut self, now: u64, opened: Opened) {
        let State::Opening { taking: false, lost } = &mut self.state else { return };
        match opened {
            Opened::Unknown => self.ask_later(now),
            Opened::Stale => {
                let reason = Exit::NotOpened.to_string();
                self.outbox.push(&Message::Failed { reason });
                self.halt(Exit::NotOpened);
            }
            Opened::Done => {
                self.generation = Some(self.config.generation);
                if let Some(suspicion) = lost.take() {
                    // Nothing has run: the VM can be started again.
                    self.forget(Exit::NotStarted(suspicion));
                } else if self.peer.is_none() {
                    self.state = State::Opening { taking: true, lost: None };
                    self.ask();
                } else {
                    let generation = self.config.generation;
                    self.outbox.push(&Message::Start { generation: generation.0 });
                    self.started(now, generation);
                }
            }
        }
    }

    /// The pair is protected: from here on a lost peer is a matter for the store.
    pub(crate) fn started(&mut self, now: u64, generation: Generation) {
        self.generation = Some(generation);
        self.state = State::Protected;
        self.watch.start(now);
        self.actions.push_back(Action::Start { generation });
        self.send_beat(now);
    }

    /// Somebody says hello beside the connection that there is. If that is this VM's other side with another incarnation,
    /// then it was started anew, and the peer that was known is no more (rule 1).
    pub(crate) fn stranger(&mut self, now: u64, hello: &Hello) {
        let Some(peer) = &self.peer else { return };
        let is_other_side = hello.vm == self.config.vm.as_str() && hello.role != self.config.role;
        if is_other_side && hello.incarnation != u128::from(peer.member.incarnation) {
            self.lost(now, Suspicion::Restarted);
        }
    }

    pub(crate) fn disconnect(&mut self) {
        if std::mem::take(&mut self.connected) {
            self.actions.push_back(Action::Close);
        }
    }

    /// Whether a rule is in force.
    pub(crate) fn has(&self, rule: Rule) -> bool {
        self.config.has(rule)
    }
}
