//! A planned handover (rule 13): everything is acknowledged, replayed and compared before the primary gives the VM up.
//! Until then the primary can go on; afterwards it never can, so the backup needs no verdict to go live.

use logging_channel::message::{Message, Role};
use logging_channel::versions::YIELDS_FROM;

use crate::agent::Agent;
use crate::event::{Action, Outcome, Suspicion};
use crate::rules::Rule;
use crate::state::{AgentState, LogSide, Preparation};
use crate::watch::StoreWatch;

impl Agent {
    /// The user asks for a handover. A primary lets the backup go on in its place. A backup leaves the pair: it says
    /// so, and never takes. A backup that is to go on itself does not leave: its primary may have yielded already.
    pub(crate) fn hand_over(&mut self, now: u64) {
        match (self.config.role, &self.state) {
            (Role::Primary, AgentState::Protected) => {
                let until = match self.can_yield() {
                    true => now + self.config.timing.timeout_ns,
                    false => u64::MAX,
                };
                self.state = AgentState::HandingOver { told: false, until };
                self.handover_requested = true;
                self.actions.push_back(Action::Pause);
                self.flush();
                self.tell_backup_when_flushed();
            }
            (Role::Backup, AgentState::Protected) if self.preparation != Preparation::None => {
                self.leave_requested = true;
            }
            (Role::Backup, AgentState::Protected | AgentState::Waiting | AgentState::Met) => {
                if self.connected {
                    self.outbox.push(&Message::Failed { reason: Outcome::Stopped.to_string() });
                }
                self.halt(Outcome::Stopped);
            }
            _ => {}
        }
    }

    /// Primary: whether its backup lives without a verdict once this side has yielded.
    pub fn can_yield(&self) -> bool {
        self.outbox.version() >= YIELDS_FROM
    }

    /// Primary: the backup does not get ready in time, so the guest goes on here, protected as before.
    pub(crate) fn go_back_when_due(&mut self, now: u64) {
        if matches!(self.state, AgentState::HandingOver { until, .. } if until <= now) {
            self.state = AgentState::Protected;
            self.handover_requested = false;
            self.failure_detector.peer_idle(now);
            self.actions.push_back(Action::Resume);
        }
    }

    /// Primary: the backup is ready to go live. If it says so of all records, then this side gives the VM up for good.
    pub(crate) fn backup_prepared(&mut self, records: u64) {
        let (AgentState::HandingOver { told: true, .. }, Some(LogSide::Primary(sender))) =
            (&self.state, &self.log_side)
        else {
            // The answer comes too late: the guest has gone on here.
            return;
        };
        if records == sender.cursors().recorded {
            self.state = AgentState::Yielded;
            self.outbox.push(&Message::Yield);
        }
    }

    /// Primary: the backup was lost after this side had yielded. Whether it runs the VM cannot be known here; this
    /// side never will.
    pub(crate) fn lost_after_yield(&mut self, suspicion: Suspicion) {
        self.disconnect();
        self.halt(Outcome::Yielded(suspicion));
    }

    /// Backup: tells the primary that everything is replayed, once it is.
    pub(crate) fn tell_primary_when_prepared(&mut self) {
        if let Some(LogSide::Backup(receiver)) = &self.log_side
            && self.preparation == Preparation::Asked
            && self.state == AgentState::Protected
            && self.ready
            && receiver.is_drained()
        {
            self.preparation = Preparation::Told;
            self.outbox.push(&Message::Prepared { records: receiver.replayed() });
        }
    }

    /// Backup: the log goes on, so the primary goes on.
    pub(crate) fn handover_called_off(&mut self) {
        if std::mem::take(&mut self.preparation) != Preparation::None
            && std::mem::take(&mut self.leave_requested)
        {
            self.outbox.push(&Message::Failed { reason: Outcome::Stopped.to_string() });
            self.halt(Outcome::Stopped);
        }
    }

    /// Backup: the primary never takes and never emits again, so this side lives. The store is told, as soon as it
    /// answers.
    pub(crate) fn primary_yielded(&mut self, now: u64) {
        if let Some(LogSide::Backup(receiver)) = &mut self.log_side {
            receiver.close();
        }
        self.handover_requested = true;
        self.outbox.push(&Message::Live);
        self.state = AgentState::Alone;
        self.has_won = true;
        self.owes_take = true;
        self.watch = StoreWatch::new(self.config.timing, now);
        self.actions.push_back(Action::HandoverReceived);
        self.actions.push_back(Action::GoLive);
        self.tell_store_of_handover();
    }

    /// Backup that lives because its primary has yielded: has the store record it.
    pub(crate) fn tell_store_of_handover(&mut self) {
        if let Some(generation) =
            self.generation.filter(|_| self.owes_take && self.in_force(Rule::AskTheStore))
        {
            self.actions.push_back(Action::Take { generation, who: self.incarnation() });
        }
    }

    /// Backup, in version 3: the primary has stopped its guest and wants it to go on here.
    pub(crate) fn handover_received(&mut self, now: u64) {
        self.state = AgentState::ReceivingHandover;
        self.handover_requested = true;
        self.actions.push_back(Action::HandoverReceived);
        if let Some(LogSide::Backup(receiver)) = &mut self.log_side {
            receiver.close();
        }
        self.take_when_able(now);
    }
}
