//! What an operator can do with a replica, and what it reports.

use std::sync::mpsc::Receiver;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use agent::{Event, Outcome, PeerRefusal, Phase, Role, Status, StoreProblem};
use entry::Console;
use test_and_set::names::Incarnation;
use test_and_set::record::VmRecord;
use test_and_set::store::StoreError;

use super::{Replica, STORE_PATIENCE, now_ns};
use crate::outside::ConsoleOut;
use crate::pair::report::{ReplicaReport, phase_name, protection_word, role_name};
use crate::service;

/// How much may be typed for a guest that does not run here yet, bytes: far less than its inbox has room for.
const TYPED_MAX: usize = 4096;

/// How long whoever asked for something may take to read how it went.
const ASKER_PATIENCE: Duration = Duration::from_secs(2);

/// What has become of a handover or an end that was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RequestProgress {
    /// This side has ended.
    Out(Outcome),
    /// The other side was lost, and this one runs the VM alone.
    Alone,
    /// The handover is called off: the VM goes on here, protected.
    CalledOff,
    /// Nothing yet.
    None,
}

/// Somebody who has asked for something; dropped once told how it went.
pub struct AskerGuard(Arc<Replica>);

impl Drop for AskerGuard {
    fn drop(&mut self) {
        self.0.lock().askers -= 1;
        self.0.changed.notify_all();
    }
}

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
    /// state to the log; a backup leaves the pair. Returns how many handovers were called off before.
    pub fn hand_over(self: &Arc<Self>) -> u64 {
        let mut state = self.lock();
        let called_off = state.called_off;
        if state.agent.status(now_ns()).role == Role::Backup {
            drop(state);
            self.handle(Event::HandOver);
        } else {
            // While one is under way, whoever asks for another waits for that.
            state.hand_over |= !state.paused;
            self.notify_waiters(&state);
        }
        called_off
    }

    /// What has become of a handover that was asked for (`handover`: what [`Replica::hand_over`] returned) or of an end,
    /// once it is known; [`RequestProgress::None`] if it is not within `patience`.
    pub fn wait_for_progress(&self, handover: Option<u64>, patience: Duration) -> RequestProgress {
        let deadline = Instant::now() + patience;
        let mut state = self.lock();
        loop {
            if let Some(outcome) = &state.outcome {
                return RequestProgress::Out(outcome.clone());
            }
            if handover.is_some_and(|before| state.called_off > before) {
                return RequestProgress::CalledOff;
            }
            if state.alone && handover.is_some() {
                return RequestProgress::Alone;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return RequestProgress::None;
            }
            state = self.wait_for_change(state, left);
        }
    }

    /// Somebody asks for something, and has to be told how it went before this process ends.
    pub fn asker(self: &Arc<Self>) -> AskerGuard {
        self.lock().askers += 1;
        AskerGuard(self.clone())
    }

    /// Waits until those who asked for something are told how it went.
    pub fn wait_for_askers(&self) {
        let waiting = self.changed.wait_timeout_while(self.lock(), ASKER_PATIENCE, |state| state.askers > 0);
        drop(waiting.unwrap_or_else(PoisonError::into_inner));
    }

    /// The VM's record at the store.
    ///
    /// # Errors
    /// The store does not answer.
    pub fn look_at_store(&self) -> Result<Option<VmRecord>, StoreError> {
        self.store.get(&self.vm, STORE_PATIENCE)
    }

    /// This side's incarnation.
    pub fn incarnation(&self) -> Incarnation {
        self.lock().agent.incarnation()
    }

    /// Whether the backup lives without a verdict once this side has yielded.
    pub fn can_yield(&self) -> bool {
        self.lock().agent.can_yield()
    }

    /// The other side, for people: `the backup at 10.0.1.2:7500`.
    pub fn peer_name(&self) -> String {
        self.lock().peer_name()
    }

    /// Whether the last peer was refused, or refused this side, for something in the options.
    pub fn is_refused(&self) -> bool {
        self.lock().refused.as_ref().is_some_and(PeerRefusal::is_permanent)
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
            peer_address: state.peer_address.map(|address| address.to_string()),
            failed_threads: service::failures(),
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
