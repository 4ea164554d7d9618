//! Losing the peer, asking the store, and going on alone or being fenced (rules 2 to 6).

use logging_channel::message::{Message, Role};
use store_rule::names::Incarnation;
use store_rule::record::Verdict;

use crate::agent::Agent;
use crate::event::{Action, Outcome, PeerRefusal, Suspicion};
use crate::rules::Rule;
use crate::state::{AgentState, LogSide};
use crate::watch::StoreWatch;

impl Agent {
    /// The peer is lost. Before the guest runs, the peer is only refused; afterwards this is one-way (rule
    /// 3).
    pub(crate) fn peer_lost(&mut self, now: u64, suspicion: Suspicion) {
        match &mut self.state {
            AgentState::Waiting | AgentState::Met | AgentState::Measuring { .. } => {
                let refusal = match suspicion {
                    Suspicion::Failed(reason) => PeerRefusal::Told(reason),
                    Suspicion::Protocol(e) => PeerRefusal::Protocol(e),
                    suspicion => PeerRefusal::Lost(suspicion),
                };
                if let PeerRefusal::Protocol(e) = &refusal {
                    self.outbox.push(&Message::Failed { reason: e.to_string() });
                }
                self.refuse(refusal)
            }
            AgentState::Opening { lost, .. } => {
                *lost = Some(suspicion);
                self.disconnect();
            }
            AgentState::Protected | AgentState::HandingOver { .. } | AgentState::ReceivingHandover => {
                self.suspect(now, suspicion)
            }
            AgentState::Yielded => match self.in_force(Rule::YieldForGood) {
                true => self.lost_after_yield(suspicion),
                false => self.suspect(now, suspicion),
            },
            AgentState::Ending { .. } => match self.config.role {
                Role::Primary => self.suspect(now, suspicion),
                // The backup knows of the end. The primary knows that it does, or will ask the store.
                Role::Backup => self.disconnect(),
            },
            AgentState::Suspecting | AgentState::Taking | AgentState::Alone => self.disconnect(),
            AgentState::RecordingEnd(_) | AgentState::Out(_) => self.disconnect(),
        }
    }

    /// Closes the channel before anything else: acknowledgements that arrive from here on do not count, and
    /// what this side itself has acknowledged has been received and will be replayed.
    fn suspect(&mut self, now: u64, suspicion: Suspicion) {
        if let AgentState::Ending { reason, .. } = &self.state {
            self.pending_end = Some(*reason);
        }
        self.actions.push_back(Action::Suspected(suspicion));
        self.state = AgentState::Suspecting;
        if self.in_force(Rule::CloseBeforeTake) && self.in_force(Rule::OneWaySuspicion) {
            self.close_channel();
        }
        self.take_when_able(now);
    }

    fn close_channel(&mut self) {
        self.outbox.clear();
        self.disconnect();
        match &mut self.log_side {
            Some(LogSide::Primary(sender)) => sender.detach(),
            Some(LogSide::Backup(receiver)) => receiver.close(),
            None => {}
        }
    }

    /// Asks the store once this side would be able to live: a primary while its guest loop makes turns, a
    /// backup when it has replayed all that it received and its tap and disks are ready (rule 4).
    pub(crate) fn take_when_able(&mut self, now: u64) {
        let handed_over = self.state == AgentState::ReceivingHandover;
        if self.state != AgentState::Suspecting && !handed_over {
            return;
        }
        let able = match &self.log_side {
            Some(LogSide::Backup(receiver)) => {
                self.ready && (receiver.is_drained() || !self.in_force(Rule::ReplayBeforeTake))
            }
            _ => self.failure_detector.is_guest_loop_alive(now),
        };
        if able {
            self.state = AgentState::Taking;
            self.ask_to_take(now);
        }
    }

    /// Asks the store for a verdict.
    pub(crate) fn ask_to_take(&mut self, now: u64) {
        let Some(generation) = self.generation else { return };
        if !self.in_force(Rule::AskTheStore) {
            return self.won(now);
        }
        self.actions.push_back(Action::Take { generation, who: self.incarnation() });
    }

    /// The store has answered. Only this ends a suspicion; without an answer this side stays silent and asks
    /// again.
    pub(crate) fn verdict_received(&mut self, now: u64, verdict: Verdict) {
        if self.owes_take && self.state == AgentState::Alone {
            return self.handover_recorded(now, verdict);
        }
        if !matches!(self.state, AgentState::Taking | AgentState::Opening { taking: true, .. }) {
            // The second answer to a question that was asked twice.
            return;
        }
        match verdict {
            Verdict::Unknown(()) => self.retry_later(now),
            Verdict::Won => self.won(now),
            Verdict::Lost(holder) => self.fenced(Some(holder)),
            Verdict::Stale => self.fenced(None),
        }
    }

    /// The store has answered a backup whose primary has yielded. The primary has not taken: if this side cannot, then
    /// the VM was forgotten or opened again.
    fn handover_recorded(&mut self, now: u64, verdict: Verdict) {
        match verdict {
            Verdict::Unknown(()) => self.retry_later(now),
            Verdict::Won => self.owes_take = false,
            Verdict::Lost(holder) => self.halt(Outcome::Fenced(Some(holder))),
            Verdict::Stale => self.halt(Outcome::Fenced(None)),
        }
    }

    fn won(&mut self, now: u64) {
        let at_start = matches!(self.state, AgentState::Opening { .. });
        if self.connected && self.handover_requested {
            self.outbox.push(&Message::Live);
        }
        if self.connected && !self.handover_requested {
            self.close_channel();
        }
        self.state = AgentState::Alone;
        self.has_won = true;
        self.watch = StoreWatch::new(self.config.timing, now);
        if at_start {
            self.actions.push_back(Action::Start { generation: self.config.generation });
        }
        self.actions.push_back(Action::GoLive);
        if let Some(reason) = self.pending_end {
            self.ask_to_record_end(Outcome::Ended(reason));
        }
    }

    fn fenced(&mut self, holder: Option<Incarnation>) {
        self.disconnect();
        let outcome = match (self.pending_end, holder) {
            (Some(reason), None) => Outcome::Ended(reason),
            _ if self.handover_requested && self.config.role == Role::Primary => Outcome::HandedOver,
            _ => Outcome::Fenced(holder),
        };
        self.halt(outcome);
    }

    /// This host cannot run the guest: the agent says so to its peer, and never takes (rule 4).
    pub(crate) fn host_failed(&mut self, reason: &str) {
        if matches!(self.state, AgentState::Out(_)) {
            return;
        }
        if self.connected {
            self.outbox.push(&Message::Failed { reason: reason.into() });
        }
        self.halt(Outcome::Failed(reason.into()));
    }

    /// The store did not answer: asks again after a while.
    pub(crate) fn retry_later(&mut self, now: u64) {
        self.retry_at = Some(now + self.config.timing.retry_ns);
    }

    /// Repeats the question that the store has not answered, when its time has come.
    pub(crate) fn retry_when_due(&mut self, now: u64) {
        if self.retry_at.take_if(|at| *at <= now).is_none() {
            return;
        }
        match &self.state {
            AgentState::Taking | AgentState::Opening { taking: true, .. } => self.ask_to_take(now),
            AgentState::Opening { taking: false, .. } => self.ask_to_open(),
            AgentState::Alone => self.tell_store_of_handover(),
            AgentState::RecordingEnd(outcome) => self.ask_to_record_end(outcome.clone()),
            _ => {}
        }
    }
}
