//! What an agent is told, and what it wants done.

use entry::Position;
use entry::identity::Mismatch;
use entry::log::EndReason;
use logging_channel::ChannelError;
use logging_channel::message::{Hello, Role};
use store_rule::names::{Generation, Incarnation};
use store_rule::record::Members;

/// What has happened.
#[derive(Debug)]
pub enum Event<'a> {
    /// A connection to the peer is there, certificates checked. Only while there is no other.
    Connected,
    /// Bytes came on it.
    Received(&'a [u8]),
    /// It has ended, or failed.
    Disconnected,
    /// Somebody else said hello on another connection, which is closed whatever comes of this.
    Stranger(&'a Hello),
    /// Time has passed, and there was nothing to read.
    Tick,
    /// The store's answer to [`Action::Take`].
    Verdict(Verdict),
    /// The store's answer to [`Action::Open`].
    Opened(Opened),
    /// The store's answer to [`Action::Forget`]: whether it is done (or was another's to do).
    Forgotten(bool),
    /// Backup: its tap and disks are ready to go live.
    Ready,
    /// Backup: so many records are replayed, all digests equal.
    Replayed {
        /// Records since the log's start.
        records: u64,
        /// Where the guest is.
        position: Position,
    },
    /// This host cannot run the guest: its disk failed, or the replay diverged.
    HostFailed(&'a str),
    /// The guest's run is over for good, or the user stops the VM; the log has the end.
    GuestEnded(EndReason),
    /// A primary is asked to let the backup go on in its place; a backup is asked to leave.
    HandOver,
}

/// The store's answer to a take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// This incarnation holds the generation.
    Won,
    /// Another one does.
    Lost(Incarnation),
    /// Not a member, or not the current generation.
    Stale,
    /// No answer.
    Unknown,
}

/// The store's answer to an open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opened {
    /// The generation is open with these members.
    Done,
    /// It is not to be had: the VM has another generation, or other members.
    Stale,
    /// No answer.
    Unknown,
}

/// What is to be done, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Close the connection. What is in [`crate::Agent::outgoing`] may still be written first, but nothing is read.
    Close,
    /// The peer on this connection is refused; log it. [`Action::Close`] follows.
    Refused(Refusal),
    /// Ask the store to open a generation; answer with [`Event::Opened`].
    Open {
        /// Which.
        generation: Generation,
        /// For whom.
        members: Members,
    },
    /// The pair is protected. Primary: the guest may run, and records. Backup: replay.
    Start {
        /// The pair's generation.
        generation: Generation,
    },
    /// Outputs may leave now: look at [`crate::Agent::release_limit`].
    Release,
    /// Backup: outputs up to [`crate::Agent::drop_limit`] have left over there, drop them.
    Drop,
    /// The peer is lost; log it. Nothing is to be done yet: the guest's loop sees [`crate::Pace::Stop`], or the end of
    /// the records.
    Suspected(Suspicion),
    /// Ask the store; answer with [`Event::Verdict`].
    Take {
        /// Which generation.
        generation: Generation,
        /// For whom.
        who: Incarnation,
    },
    /// This replica is alone from now on. Primary: the guest goes on, without a log. Backup: put the live source around
    /// the machine and issue unfinished disk requests again. Both: release the gate's tail, then announce the guest's MAC,
    /// repeatedly.
    GoLive,
    /// Primary: stop the guest at a whole boundary, flush; its end is handed over. [`Action::GoLive`] may still follow.
    Pause,
    /// Ask the store to forget the VM: its run is over. Answer with [`Event::Forgotten`].
    Forget {
        /// The last generation.
        generation: Generation,
    },
    /// Never output again. Write what is in [`crate::Agent::outgoing`] if the connection takes it, then exit.
    Halt(Exit),
}

/// Why the peer is lost (rule 2).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Suspicion {
    /// Nothing was heard for the timeout.
    #[error("nothing was heard for {0} ms")]
    Silent(u64),
    /// It is heard, but its guest makes no progress.
    #[error("no progress for {0} ms")]
    NoProgress(u64),
    /// The connection has ended.
    #[error("the connection has ended")]
    Disconnected,
    /// It says that it cannot go on.
    #[error("it has failed: {0}")]
    Failed(String),
    /// It was started anew: what it knew is gone.
    #[error("it was started anew")]
    Restarted,
    /// It does not keep to the protocol.
    #[error(transparent)]
    Protocol(ChannelError),
}

/// Why a peer is refused before anything runs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It is not a peer of this version: look at the offset.
    #[error(transparent)]
    Protocol(#[from] ChannelError),
    /// It was lost before anything ran.
    #[error("it was lost: {0}")]
    Lost(Suspicion),
    /// Another VM: correct the name or the address.
    #[error("vm: {theirs:?} there, {ours:?} here")]
    Vm {
        /// Its name.
        theirs: String,
        /// Ours.
        ours: String,
    },
    /// Both sides have the same role: start one as the other.
    #[error("role: both are {0:?}")]
    Role(Role),
    /// Its incarnation or the name of a disk is none.
    #[error("its {0} is invalid")]
    Invalid(&'static str),
    /// The timeouts differ: set the same on both.
    #[error("timeout: {theirs} ns there, {ours} ns here")]
    Timeout {
        /// Its timeout.
        theirs: u64,
        /// Ours.
        ours: u64,
    },
    /// The machines differ.
    #[error("identity: {0}")]
    Identity(#[from] Mismatch),
    /// It refused us, or gave up.
    #[error("the other side says: {0}")]
    Told(String),
}

/// How a replica ends.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Exit {
    /// The VM's run is over.
    #[error("the VM has ended: {0:?}")]
    Ended(EndReason),
    /// The other side lives, as was asked for.
    #[error("handed over")]
    HandedOver,
    /// The other side lives.
    #[error("fenced: the other side lives{}", .0.map(|id| format!(" ({id})")).unwrap_or_default())]
    Fenced(Option<Incarnation>),
    /// This host cannot run the guest.
    #[error("this host has failed: {0}")]
    Failed(String),
    /// A backup was asked to leave.
    #[error("stopped")]
    Stopped,
    /// The generation is not to be had: somebody runs this VM, or its record has to be forgotten first.
    #[error(
        "the store has another generation, or other members: the VM runs elsewhere, or has to be forgotten first"
    )]
    NotOpened,
    /// The peer was lost before the guest ran.
    #[error("the peer was lost before the guest ran: {0}")]
    NotStarted(Suspicion),
}
