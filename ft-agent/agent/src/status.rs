//! An agent's status.

use entry::Position;
use logging_channel::message::Role;
use logging_channel::sender::Cursors;
use store_rule::names::{Generation, Incarnation};

use crate::agent::Agent;
use crate::state::{AgentState, LogSide};
use crate::watch::StoreProblem;

/// Where a replica is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// No peer yet, or the pair is being opened.
    Starting,
    /// Both sides run the guest: it survives the loss of either.
    Protected,
    /// The peer is lost; this side waits for the store's verdict.
    Deciding,
    /// This side runs the guest, and nobody else does.
    Alone,
    /// The VM ends, or is handed over.
    Ending,
    /// This side is out.
    Out,
}

/// An agent's status. Cursors count from the log's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// The role in which this side was started.
    pub role: Role,
    /// Where it is in its life.
    pub phase: Phase,
    /// The pair's generation, once it is known.
    pub generation: Option<Generation>,
    /// The other side.
    pub peer: Option<Incarnation>,
    /// The log's cursors. A backup's `acked` counts the records that it has received.
    pub cursors: Cursors,
    /// Primary only: how far the backup lags, as the age of the oldest record that it has not replayed.
    pub lag_ns: u64,
    /// Primary only: weight of the records that the backup has not replayed.
    pub lag_bytes: u64,
    /// Why the store could not decide which side lives. The VM is not protected then.
    pub store_problem: Option<StoreProblem>,
    /// Where this side's guest is.
    pub position: Position,
    /// Where the other side's guest was at its last beat.
    pub peer_position: Position,
}

impl Status {
    /// Whether the VM survives the loss of either host.
    pub fn is_protected(&self) -> bool {
        self.phase == Phase::Protected && self.store_problem.is_none()
    }
}

impl Agent {
    /// This agent's status.
    pub fn status(&self, now: u64) -> Status {
        let phase = match &self.state {
            AgentState::Waiting | AgentState::Opening { .. } | AgentState::Met => Phase::Starting,
            AgentState::Protected => Phase::Protected,
            AgentState::Suspecting | AgentState::Taking => Phase::Deciding,
            AgentState::Alone => Phase::Alone,
            AgentState::HandingOver { .. }
            | AgentState::ReceivingHandover
            | AgentState::Ending { .. }
            | AgentState::RecordingEnd(_) => Phase::Ending,
            AgentState::Out(_) => Phase::Out,
        };
        let mut status = Status {
            role: self.config.role,
            phase,
            generation: self.generation,
            peer: self.peer.as_ref().map(|p| p.member.incarnation),
            cursors: Cursors::default(),
            lag_ns: 0,
            lag_bytes: 0,
            store_problem: self.watch.problem(now).filter(|_| self.watches_store()),
            position: self.position,
            peer_position: Position::exact(self.peer_beat.position),
        };
        match &self.log_side {
            Some(LogSide::Primary(sender)) if phase == Phase::Protected => {
                status.cursors = sender.cursors();
                status.lag_ns = sender.lag_ns(now);
                status.lag_bytes = sender.lag_bytes();
            }
            Some(LogSide::Primary(sender)) => status.cursors = sender.cursors(),
            Some(LogSide::Backup(receiver)) => {
                status.cursors.recorded = receiver.received();
                status.cursors.acked = receiver.received();
                status.cursors.replayed = receiver.replayed();
                status.cursors.outputs_recorded = receiver.outputs_received();
                status.cursors.outputs_released = receiver.outputs_released();
            }
            None => {}
        }
        status
    }
}
