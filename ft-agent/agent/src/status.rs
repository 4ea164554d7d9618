//! What an agent tells of itself.

use entry::Position;
use logging_channel::message::Role;
use logging_channel::sender::Cursors;
use store_rule::names::{Generation, Incarnation};

use crate::agent::{Agent, Side, State};

/// Where a replica is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// No peer yet, or the pair is being opened.
    Starting,
    /// Both sides run the guest: the loss of either is survived.
    Protected,
    /// The peer is lost and the store's verdict is awaited.
    Deciding,
    /// This side runs the guest, and nobody else does.
    Alone,
    /// The VM ends, or is handed over.
    Ending,
    /// This side is out.
    Out,
}

/// What an agent tells of itself. Cursors count since the log's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// Which side it started as.
    pub role: Role,
    /// Where it is in its life.
    pub phase: Phase,
    /// The pair's generation, once it is known.
    pub generation: Option<Generation>,
    /// The other side.
    pub peer: Option<Incarnation>,
    /// The log's cursors; a backup's `acked` is what it received.
    pub cursors: Cursors,
    /// How far the backup is behind: age of the oldest record not replayed. Primary only.
    pub lag_ns: u64,
    /// Weight of the records that it has not replayed. Primary only.
    pub lag_bytes: u64,
    /// Where this side's guest is.
    pub position: Position,
    /// Where the other side's guest was at its last beat.
    pub peer_position: Position,
}

impl Agent {
    /// What an agent tells of itself.
    pub fn status(&self, now: u64) -> Status {
        let phase = match &self.state {
            State::Waiting | State::Opening { .. } | State::Met => Phase::Starting,
            State::Protected => Phase::Protected,
            State::Suspecting | State::Taking => Phase::Deciding,
            State::Alone => Phase::Alone,
            State::HandingOver { .. } | State::Succeeding | State::Ending { .. } | State::Forgetting(_) => {
                Phase::Ending
            }
            State::Out(_) => Phase::Out,
        };
        let mut status = Status {
            role: self.config.role,
            phase,
            generation: self.generation,
            peer: self.peer.as_ref().map(|p| p.member.incarnation),
            cursors: Cursors::default(),
            lag_ns: 0,
            lag_bytes: 0,
            position: self.position,
            peer_position: Position::exact(self.peer_beat.position),
        };
        match &self.side {
            Some(Side::Primary(sender)) if phase == Phase::Protected => {
                status.cursors = sender.cursors();
                status.lag_ns = sender.lag_ns(now);
                status.lag_bytes = sender.lag_bytes();
            }
            Some(Side::Primary(sender)) => status.cursors = sender.cursors(),
            Some(Side::Backup(receiver)) => {
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
