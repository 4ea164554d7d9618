//! What an operator asks of a replica, and what it tells of itself.

use std::sync::Arc;
use std::sync::mpsc::Receiver;

use agent::{Event, Exit, Phase, Role, Status};
use entry::Console;

use super::{Replica, now_ns};
use crate::outside::ConsoleOut;
use crate::pair::status::{Report, phase_name, role_name};

impl Replica {
    /// Ends this side before its guest has run, or at once when there is nothing to lose.
    pub fn leave(&self, exit: Exit) {
        let mut state = self.lock();
        self.close(&mut state);
        state.exit.get_or_insert(exit);
        state.finished = true;
        self.announce_change(&state);
        drop(state);
        self.wake_pump();
    }

    /// The user ends the VM's run.
    pub fn stop(&self) {
        let mut state = self.lock();
        state.stop = true;
        self.announce_change(&state);
    }

    /// A primary lets the backup go on, as soon as its guest's thread has said in the log how the guest stands; a backup
    /// leaves.
    pub fn hand_over(self: &Arc<Self>) {
        let mut state = self.lock();
        if state.agent.status(now_ns()).role == Role::Backup {
            drop(state);
            return self.handle(Event::HandOver);
        }
        state.hand_over = true;
        self.announce_change(&state);
    }

    /// What the agent tells of itself.
    pub fn status(&self) -> Status {
        self.lock().agent.status(now_ns())
    }

    /// What `vmft status` shows.
    pub fn report(&self) -> Report {
        let mut state = self.lock();
        let now = now_ns();
        let status = state.agent.status(now);
        let cursors = status.cursors;
        let log_bytes_per_s = state.story.log_rate(now);
        Report {
            name: self.vm.to_string(),
            role: role_name(status.role).into(),
            phase: phase_name(status.phase).into(),
            protected: status.phase == Phase::Protected,
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
            log_bytes: state.story.log_bytes,
            spent: self.spent.at(now, state.gate.recorded() - state.gate.released()),
            position: status.position.count,
            peer_position: status.peer_position.count,
            failovers: state.story.failovers,
            failover: state.story.failover.clone(),
        }
    }

    /// This side will do nothing any more.
    pub fn is_out(&self) -> bool {
        self.lock().exit.is_some()
    }

    /// What the guest prints from now on.
    pub fn read_console(&self) -> Receiver<Arc<[u8]>> {
        match self.lock().outlet.console() {
            ConsoleOut::Readers(readers) => readers.add(),
            ConsoleOut::Printer(_) => unreachable!("a replica's console has readers"),
        }
    }

    /// Types on the guest's console, if it runs here.
    pub fn type_text(&self, console: Console, text: &[u8]) {
        let guest = self.lock().guest.clone();
        if let Some(guest) = guest {
            // A guest whose run is over takes nothing.
            guest.type_text(console, text).ok();
        }
    }

    /// Nothing is decided yet: no peer, or none that fits.
    pub fn is_starting(&self) -> bool {
        let state = self.lock();
        state.exit.is_none() && state.started.is_none()
    }
}
