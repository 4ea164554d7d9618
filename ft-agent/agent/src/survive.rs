//! Losing the peer, asking the store, and living or not (rules 2 to 6).

use logging_channel::message::Message;

use crate::agent::{Agent, Side, State};
use crate::config::Rule;
use crate::event::{Action, Exit, Refusal, Suspicion, Verdict};

impl Agent {
    /// The peer is lost. Before anything runs it is only refused; afterwards this is one-way (rule 3).
    pub(crate) fn lost(&mut self, now: u64, suspicion: Suspicion) {
        match &mut self.state {
            State::Waiting | State::Met => self.refuse(match suspicion {
                Suspicion::Failed(reason) => Refusal::Told(reason),
                Suspicion::Protocol(e) => Refusal::Protocol(e),
                suspicion => Refusal::Lost(suspicion),
            }),
            State::Opening { lost, .. } => {
                *lost = Some(suspicion);
                self.disconnect();
            }
            State::Protected | State::HandingOver { .. } | State::Succeeding => self.suspect(now, suspicion),
            State::Ending { .. } => match self.config.role {
                crate::Role::Primary => self.suspect(now, suspicion),
                // It knows of the end, and the other side knows that or will ask the store.
                crate::Role::Backup => self.disconnect(),
            },
            State::Suspecting | State::Taking | State::Alone => self.disconnect(),
            State::Forgetting(_) | State::Out(_) => self.disconnect(),
        }
    }

    /// Closes the channel before anything else: what is acknowledged from here on is nothing, and what was acknowledged is
    /// received and will be replayed.
    fn suspect(&mut self, now: u64, suspicion: Suspicion) {
        if let State::Ending { reason, .. } = &self.state {
            self.ended = Some(*reason);
        }
        self.actions.push_back(Action::Suspected(suspicion));
        self.state = State::Suspecting;
        if self.has(Rule::CloseBeforeTake) && self.has(Rule::OneWaySuspicion) {
            self.close_channel();
        }
        self.take_when_able(now);
    }

    fn close_channel(&mut self) {
        self.outbox.clear();
        self.disconnect();
        match &mut self.side {
            Some(Side::Primary(sender)) => sender.detach(),
            Some(Side::Backup(receiver)) => receiver.close(),
            None => {}
        }
    }

    /// Takes once it could live: a primary while its guest's loop turns, a backup when all that it received is replayed and
    /// its tap and disks are ready (rule 4).
    pub(crate) fn take_when_able(&mut self, now: u64) {
        let handed_over = self.state == State::Succeeding;
        if self.state != State::Suspecting && !handed_over {
            return;
        }
        let able = match &self.side {
            Some(Side::Backup(receiver)) => {
                self.ready && (receiver.is_drained() || !self.has(Rule::ReplayBeforeTake))
            }
            _ => self.watch.is_turning(now),
        };
        if able {
            self.state = State::Taking;
            self.ask();
        }
    }

    pub(crate) fn ask(&mut self) {
        let Some(generation) = self.generation else { return };
        if !self.has(Rule::AskTheStore) {
            return self.won();
        }
        self.actions.push_back(Action::Take { generation, who: self.incarnation() });
    }

    /// The store has answered. Only here does a suspicion end; no answer means silence, and asking again.
    pub(crate) fn verdict(&mut self, now: u64, verdict: Verdict) {
        if !matches!(self.state, State::Taking | State::Opening { taking: true, .. }) {
            // An answer to a question that was asked twice.
            return;
        }
        match verdict {
            Verdict::Unknown => self.ask_later(now),
            Verdict::Won => self.won(),
            Verdict::Lost(holder) => self.fenced(Some(holder)),
            Verdict::Stale => self.fenced(None),
        }
    }

    fn won(&mut self) {
        let at_start = matches!(self.state, State::Opening { .. });
        if self.connected && self.handing_over {
            self.outbox.push(&Message::Live);
        }
        if self.connected && !self.handing_over {
            self.close_channel();
        }
        self.state = State::Alone;
        self.has_won = true;
        if at_start {
            self.actions.push_back(Action::Start { generation: self.config.generation });
        }
        self.actions.push_back(Action::GoLive);
        if let Some(reason) = self.ended {
            self.forget(Exit::Ended(reason));
        }
    }

    fn fenced(&mut self, holder: Option<store_rule::names::Incarnation>) {
        self.disconnect();
        let exit = match (self.ended, holder) {
            (Some(reason), None) => Exit::Ended(reason),
            _ if self.handing_over && self.config.role == crate::Role::Primary => Exit::HandedOver,
            _ => Exit::Fenced(holder),
        };
        self.halt(exit);
    }

    /// This host cannot run the guest: it says so, and never takes (rule 4).
    pub(crate) fn host_failed(&mut self, reason: &str) {
        if matches!(self.state, State::Out(_)) {
            return;
        }
        if self.connected {
            self.outbox.push(&Message::Failed { reason: reason.into() });
        }
        self.halt(Exit::Failed(reason.into()));
    }

    pub(crate) fn ask_later(&mut self, now: u64) {
        self.ask_at = Some(now + self.config.timing.retry_ns);
    }

    /// Asks again what was not answered.
    pub(crate) fn ask_again(&mut self, now: u64) {
        if self.ask_at.take_if(|at| *at <= now).is_none() {
            return;
        }
        match &self.state {
            State::Taking | State::Opening { taking: true, .. } => self.ask(),
            State::Opening { taking: false, .. } => self.open(),
            State::Forgetting(exit) => self.forget(exit.clone()),
            _ => {}
        }
    }

    /// Going back to a peer that was suspected: what rule 3 forbids.
    pub(crate) fn resume_if_rule_is_off(&mut self) {
        if !self.has(Rule::OneWaySuspicion) && matches!(self.state, State::Suspecting | State::Taking) {
            self.state = State::Protected;
        }
    }
}
