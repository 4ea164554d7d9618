//! An agent's status.

use entry::Position;
use logging_channel::message::Role;
use logging_channel::sender::Cursors;
use store_rule::names::{Generation, Incarnation};

use crate::agent::Agent;
use crate::protection::Protection;
use crate::state::{AgentState, LogSide};
use crate::watch::StoreProblem;

/// Where a replica is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// No peer yet, or the pair is being opened.
    Starting,
    /// Both sides run the guest. [`Status::protection`] says whether the loss of either is survived.
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
    /// How far the backup lags, as the age of the oldest record that it has not replayed. The backup has it from the
    /// primary's last beat.
    pub lag_ns: u64,
    /// Primary only: weight of the records that the backup has not replayed.
    pub lag_bytes: u64,
    /// What the loss of a host would mean.
    pub protection: Protection,
    /// Why the store could not decide which side lives.
    pub store_problem: Option<StoreProblem>,
    /// How long ago the store answered last, if this side asks it now and then, in ns.
    pub store_answered_ago_ns: Option<u64>,
    /// How old the peer's last confirmation was when it came, in ns: the link's round trip, and up to a beat's
    /// interval.
    pub round_trip_ns: Option<u64>,
    /// Where this side's guest is.
    pub position: Position,
    /// Where the other side's guest was at its last beat.
    pub peer_position: Position,
}

impl Status {
    /// Whether the VM survives the loss of either host.
    pub fn is_protected(&self) -> bool {
        self.protection.is_protected()
    }
}

impl Agent {
    /// This agent's status.
    pub fn status(&self, now: u64) -> Status {
        let phase = match &self.state {
            AgentState::Waiting
            | AgentState::Measuring { .. }
            | AgentState::Opening { .. }
            | AgentState::Met => Phase::Starting,
            AgentState::Protected => Phase::Protected,
            AgentState::Suspecting | AgentState::Taking => Phase::Deciding,
            AgentState::Alone => Phase::Alone,
            AgentState::HandingOver { .. }
            | AgentState::Yielded
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
            protection: self.protection(now),
            store_answered_ago_ns: self.watches_store().then(|| self.watch.answered_ago(now)),
            round_trip_ns: self.failure_detector.round_trip_ns().filter(|_| self.connected),
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
                status.lag_ns = if phase == Phase::Protected { self.peer_beat.lag_ns } else { 0 };
            }
            None => {}
        }
        status
    }
}
