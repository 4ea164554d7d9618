//! What an operator can do with a replica, and what it reports.

use std::sync::Arc;
use std::sync::mpsc::Receiver;

use agent::{Event, Outcome, Phase, Role, Status, StoreProblem};
use entry::Console;

use super::{Replica, now_ns};
use crate::outside::ConsoleOut;
use crate::pair::report::{ReplicaReport, phase_name, protection_word, role_name};

/// How much may be typed for a guest that does not run here yet, bytes: far less than its inbox has room for.
const TYPED_MAX: usize = 4096;

impl Replica {
    /// Ends this side at once. Only for a side whose guest has not run.
    pub fn leave(&self, outcome: Outcome) {
        let mut state = self.lock();
        self.close_link(&mut state);
        state.outcome.get_or_insert(outcome);
        state.finished = true;
        self.notify_waiters(&state);
        drop(state);
        self.wake_pump();
    }

    /// Ends the VM's run, on both sides.
    pub fn stop(&self) {
        let mut state = self.lock();
        state.stop = true;
        self.notify_waiters(&state);
    }

    /// Hands over: a primary lets its backup go on, as soon as its guest's thread has appended the guest's
    /// state to the log; a backup leaves the pair.
    pub fn hand_over(self: &Arc<Self>) {
        let mut state = self.lock();
        if state.agent.status(now_ns()).role == Role::Backup {
            drop(state);
            return self.handle(Event::HandOver);
        }
        state.hand_over = true;
        self.notify_waiters(&state);
    }

    /// The agent's status.
    pub fn status(&self) -> Status {
        self.lock().agent.status(now_ns())
    }

    /// What `vmft status` shows.
    pub fn report(&self) -> ReplicaReport {
        let mut state = self.lock();
        let now = now_ns();
        let status = state.agent.status(now);
        let cursors = status.cursors;
        let log_bytes_per_s = state.history.log_rate(now);
        ReplicaReport {
            name: self.vm.to_string(),
            role: role_name(status.role).into(),
            phase: phase_name(status.phase).into(),
            protected: status.is_protected(),
            state: protection_word(&status.protection).into(),
            reason: status.protection.reason(),
            store_answered_ago_ms: status.store_answered_ago_ns.map(|ns| ns as f64 / 1e6),
            round_trip_ms: status.round_trip_ns.map(|ns| ns as f64 / 1e6),
            store_problem: status.store_problem.map(|problem| problem.to_string()),
            store_answers: !matches!(status.store_problem, Some(StoreProblem::Silent(_))),
            generation: status.generation.map(|g| g.0),
            incarnation: state.agent.incarnation().to_string(),
            peer: status.peer.map(|p| p.to_string()),
            recorded: cursors.recorded,
            sent: cursors.sent,
            acked: cursors.acked,
            replayed: cursors.replayed,
            outputs_recorded: state.gate.recorded(),
            outputs_released: state.gate.released(),
            outputs_held: state.gate.recorded() - state.gate.released(),
            lag_ms: status.lag_ns as f64 / 1e6,
            lag_bytes: status.lag_bytes,
            log_bytes_per_s,
            log_bytes: state.history.log_bytes,
            spent: self.times.totals(now, state.gate.recorded() - state.gate.released()),
            position: status.position.count,
            peer_position: status.peer_position.count,
            no_verdict: state.no_verdict.clone(),
            failovers: state.history.failovers,
            failover: state.history.failover.clone(),
        }
    }

    /// Whether this side has ended.
    pub fn is_out(&self) -> bool {
        self.lock().outcome.is_some()
    }

    /// Adds a reader of the guest's console, for what the guest prints from now on.
    pub fn read_console(&self) -> Receiver<Arc<[u8]>> {
        match self.lock().outlet.console() {
            ConsoleOut::Readers(readers) => readers.add(),
            ConsoleOut::Printer(_) => unreachable!("a replica's console has readers"),
        }
    }

    /// Types on the guest's console, if the guest runs on this side. What is typed while this side waits for the verdict, or
    /// goes live, reaches the guest when it does run here.
    pub fn type_text(&self, console: Console, text: &[u8]) {
        let mut state = self.lock();
        let guest = state.guest.clone();
        if guest.is_none() && (state.alone || state.agent.status(now_ns()).phase == Phase::Deciding) {
            let room = TYPED_MAX - state.typed.len();
            state.typed.extend(text.iter().take(room));
        }
        drop(state);
        if let Some(guest) = guest {
            // This fails if the guest's run is over.
            guest.type_text(console, text).ok();
        }
    }

    /// Whether the pair is not open yet: there is no peer, or none that fits.
    pub fn is_starting(&self) -> bool {
        let state = self.lock();
        state.outcome.is_none() && state.started.is_none()
    }
}
