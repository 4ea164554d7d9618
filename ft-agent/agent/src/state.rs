//! An agent's states, its side of the log, and what it knows about its peer.

use entry::identity::Identity;
use entry::log::EndReason;
use logging_channel::receiver::Receiver;
use logging_channel::sender::Sender;
use store_rule::record::Member;

use crate::event::{Outcome, Suspicion};

/// Where a replica is in its life. The crate's documentation draws the transitions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum AgentState {
    /// No peer yet.
    Waiting,
    /// Primary: it measures how old the backup's confirmations are when they come, before the guest runs.
    Measuring { best_ns: u64, samples: u32 },
    /// Primary: the store has been asked to open the generation or, if `taking`, an unprotected primary has
    /// asked to take it.
    Opening { taking: bool, lost: Option<Suspicion> },
    /// Backup: it knows its primary; the guest does not run yet.
    Met,
    /// The log and its acknowledgements flow.
    Protected,
    /// Primary: the guest is paused; the backup is `told` to prepare once all records are acknowledged and all
    /// outputs have left. Without its answer the guest goes on here at `until`. A backup that speaks version 3 is told
    /// to take in place of that, and there is no way back but a suspicion.
    HandingOver { told: bool, until: u64 },
    /// Primary: it has told the backup to go live, and will never take.
    Yielded,
    /// Backup, in version 3: the primary has told it to take; the channel stays open.
    ReceivingHandover,
    /// The VM has ended.
    Ending { reason: EndReason, told: bool },
    /// The peer is lost and the channel is closed; this side is not yet able to take.
    Suspecting,
    /// The store has been asked for a verdict.
    Taking,
    /// The generation belongs to this side.
    Alone,
    /// The VM has ended and the store has been asked to record that.
    RecordingEnd(Outcome),
    /// Final: nothing happens any more.
    Out(Outcome),
}

/// Backup: how far a handover has got that the primary has asked it to prepare for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Preparation {
    /// There is none.
    #[default]
    None,
    /// Not everything is replayed yet.
    Asked,
    /// The primary is told that this side is ready.
    Told,
}

/// This side's end of the log.
#[derive(Debug)]
pub(crate) enum LogSide {
    Primary(Box<Sender>),
    Backup(Box<Receiver>),
}

/// The other replica, as its hello describes it.
#[derive(Debug)]
pub(crate) struct PeerReplica {
    pub(crate) member: Member,
    pub(crate) identity: Identity,
    pub(crate) buffer_bytes: u64,
}
