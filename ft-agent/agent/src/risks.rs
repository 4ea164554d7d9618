//! What puts a running pair at risk, as far as this side knows (rule 12).

use logging_channel::message::{Role, risk};

use crate::agent::Agent;
use crate::config::LagLimitAction;
use crate::event::{Action, Suspicion};
use crate::protection::{Exposure, Protection, Risk, ms};
use crate::rules::Rule;
use crate::state::{AgentState, LogSide};
use crate::watch::StoreProblem;

impl Agent {
    /// What the loss of a host would mean now.
    pub(crate) fn protection(&self, now: u64) -> Protection {
        match &self.state {
            AgentState::Protected => self.pair_protection(now),
            AgentState::Suspecting | AgentState::Taking => Protection::Unprotected(Exposure::PeerLost),
            AgentState::Alone => Protection::Unprotected(Exposure::Alone),
            _ => Protection::Unprotected(Exposure::NotPaired),
        }
    }

    fn pair_protection(&self, now: u64) -> Protection {
        let (problem, peer) = (self.watch.problem(now), self.peer_beat);
        let peer_says = |what: u64| peer.risks & what != 0;
        if problem == Some(StoreProblem::Unknown) || peer_says(risk::STORE_UNKNOWN) {
            return Protection::Unprotected(Exposure::StoreUnknown);
        }
        let silent = match problem {
            Some(StoreProblem::Silent(ns)) => Some(Risk::StoreSilent(ns)),
            _ => None,
        };
        let from_primary = self.config.role == Role::Backup;
        let risk = (self.held_outputs(now))
            .or((from_primary && peer_says(risk::OUTPUTS_HELD)).then_some(Risk::PeerHoldsOutputs))
            .or(silent)
            .or(self.lag_risk(now))
            .or((from_primary && peer_says(risk::BEHIND)).then_some(Risk::PeerSaysBehind(peer.lag_ns)))
            .or(peer_says(risk::STORE_SILENT).then_some(Risk::StoreSilentToPeer));
        risk.map_or(Protection::Protected, Protection::AtRisk)
    }

    /// Primary: outputs have not been able to leave for the whole timeout, although the other side is heard.
    fn held_outputs(&self, now: u64) -> Option<Risk> {
        let is_primary = matches!(self.log_side, Some(LogSide::Primary(_)));
        let held = now.saturating_sub(self.risks.could_leave_at);
        let timeout = self.config.timing.timeout_ns;
        if !is_primary || held < timeout || !self.in_force(Rule::TellTheTruth) {
            return None;
        }
        let limit_ns = timeout / 2;
        let round_trip_ns = self.failure_detector.round_trip_ns().filter(|ns| *ns > limit_ns);
        Some(match round_trip_ns {
            Some(round_trip_ns) => Risk::RoundTrip { round_trip_ns, limit_ns },
            None => Risk::OutputsHeld(held),
        })
    }

    /// Primary: the backup is too far behind, or was a moment ago.
    fn lag_risk(&self, now: u64) -> Option<Risk> {
        let Some(LogSide::Primary(sender)) = &self.log_side else { return None };
        let (lag_ns, max_ns) = (sender.lag_ns(now), self.config.buffers.lag_ns_max);
        let is_behind = lag_ns > max_ns || self.risks.is_behind;
        (is_behind && self.in_force(Rule::TellTheTruth)).then_some(Risk::Behind { lag_ns, max_ns })
    }

    /// What this side knows that the other may not: see [`logging_channel::message::Beat::risks`].
    pub(crate) fn own_risks(&self, now: u64) -> u64 {
        if self.state != AgentState::Protected {
            return 0;
        }
        let store = match self.watch.problem(now) {
            Some(StoreProblem::Silent(_)) => risk::STORE_SILENT,
            Some(StoreProblem::Unknown) => risk::STORE_UNKNOWN,
            None => 0,
        };
        let held = if self.held_outputs(now).is_some() { risk::OUTPUTS_HELD } else { 0 };
        let behind = if self.lag_risk(now).is_some() { risk::BEHIND } else { 0 };
        store | held | behind
    }

    /// Looks at the risks again, and tells what has changed.
    pub(crate) fn review_risks(&mut self, now: u64) {
        if self.state != AgentState::Protected {
            return;
        }
        // This process itself was stopped: what arrived meanwhile has to be read first.
        let stopped = now.saturating_sub(self.risks.reviewed_at) > self.config.timing.timeout_ns / 4;
        self.risks.reviewed_at = now;
        if stopped || self.failure_detector.holds_lease(now) {
            self.risks.could_leave_at = now;
        }
        if let Some(LogSide::Primary(sender)) = &self.log_side {
            let (lag, max) = (sender.lag_ns(now), self.config.buffers.lag_ns_max);
            self.risks.is_behind = lag > max || self.risks.is_behind && lag >= max / 2;
        }
        let protection = self.protection(now);
        if !protection.is_like(&self.risks.told) {
            self.risks.told = protection;
            self.actions.push_back(Action::ProtectionChanged(protection));
        }
    }

    /// Primary: why the backup is given up for its lag, if the configuration says so.
    pub(crate) fn gives_up_backup(&self, now: u64) -> Option<Suspicion> {
        let buffers = &self.config.buffers;
        let Some(LogSide::Primary(sender)) = &self.log_side else { return None };
        let lag_ns = sender.lag_ns(now);
        let given_up = buffers.at_lag_limit == LagLimitAction::GiveUpBackup
            && self.state == AgentState::Protected
            && lag_ns >= buffers.lag_ns_limit
            && self.failure_detector.may_judge(now);
        given_up.then_some(Suspicion::Behind(ms(lag_ns)))
    }
}
