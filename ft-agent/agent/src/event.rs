//! What an agent is told, and what it wants done.

use entry::End;
use entry::Position;
use entry::identity::Mismatch;
use entry::log::EndReason;
use logging_channel::ChannelError;
use logging_channel::message::{Hello, KeyProof, Role};
use store_rule::names::{Generation, Incarnation, KeyId};
use store_rule::record::{Applied, Members, Verdict};

use crate::protection::{Protection, needed_timeout_ns};
use crate::watch::StoreView;

/// Something that has happened.
#[derive(Debug)]
pub enum Event<'a> {
    /// A connection to the peer has come up and its certificate is checked. Only while there is no other
    /// connection. A primary tells the store this key, so that only the peer's host can act for the peer.
    Connected {
        /// The key that the peer has shown.
        peer_key: Option<KeyId>,
    },
    /// Bytes arrived on the connection.
    Received(&'a [u8]),
    /// The connection has ended, or failed.
    Disconnected,
    /// Another process said hello on a second connection, after what had arrived on the peer's own connection
    /// was read. The second connection is closed in any case.
    Stranger {
        /// What it said.
        hello: &'a Hello,
        /// Whether it has the very certificate of the peer on the connection that is up.
        same_certificate: bool,
    },
    /// Time has passed, and there was nothing to read.
    Tick,
    /// The store's answer to [`Action::Take`].
    Verdict(Verdict),
    /// The store's answer to [`Action::Open`]; `None` if there was no answer.
    Opened(Option<Applied>),
    /// The store's answer to [`Action::Open`]: it is refused, for this reason.
    OpenRefused(&'a str),
    /// The store's answer to [`Action::End`]: true if the end is recorded, or if the other replica has to see
    /// to it.
    EndRecorded(bool),
    /// The store's answer to [`Action::Look`]; `None` if there was no answer.
    Looked(Option<StoreView>),
    /// Backup: its tap and disks are ready to go live.
    Ready,
    /// Backup: records have been replayed, and all their digests were equal.
    Replayed {
        /// Records since the log's start.
        records: u64,
        /// Where the guest is.
        position: Position,
    },
    /// This host cannot run the guest: its disk failed, or the replay diverged.
    HostFailed(&'a str),
    /// The guest's run is over for good, or the user stops the VM. The end is in the log.
    GuestEnded(EndReason),
    /// The user asks a primary to let the backup go on in its place, or a backup to leave the pair.
    HandOver,
    /// This side has a new key: the peer is to be shown it on the connection that is up.
    KeyReplaced(&'a KeyProof),
}

/// Something to do. Actions are to be done in their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Close the connection. The bytes of [`crate::Agent::outgoing`] may still be written first, but nothing
    /// is read.
    Close,
    /// Log that the peer on this connection is refused. [`Action::Close`] follows.
    Refused(PeerRefusal),
    /// Ask the store to open a generation; answer with [`Event::Opened`].
    Open {
        /// Which generation.
        generation: Generation,
        /// For which replicas.
        members: Members,
    },
    /// The pair is protected. Primary: run the guest and record. Backup: replay.
    Start {
        /// The pair's generation.
        generation: Generation,
    },
    /// Let outputs leave, up to [`crate::Agent::release_limit`].
    Release,
    /// Backup: drop the outputs up to [`crate::Agent::drop_limit`]; they have left at the primary.
    Drop,
    /// Log that the peer is lost. There is nothing to do yet: the guest loop sees [`crate::GuestPace::Stop`],
    /// or the end of the records.
    Suspected(Suspicion),
    /// Ask the store for a verdict; answer with [`Event::Verdict`].
    Take {
        /// Which generation.
        generation: Generation,
        /// For which replica.
        who: Incarnation,
    },
    /// Read the VM's record at the store, and answer with [`Event::Looked`]. It must not delay a
    /// [`Action::Take`].
    Look {
        /// This side's generation.
        generation: Generation,
        /// This side.
        who: Incarnation,
    },
    /// While both sides run the guest: log that the VM is at risk or not protected, and why; or that it is protected
    /// again.
    ProtectionChanged(Protection),
    /// This replica is alone from now on. Primary: let the guest go on, without a log. Backup: put the live
    /// source around the machine and issue unfinished disk requests again. Both: release the outputs left in
    /// the gate, then announce the guest's MAC address, repeatedly.
    GoLive,
    /// Primary: stop the guest at an instruction boundary and append its final records, for a handover.
    /// [`Action::GoLive`] may still follow.
    Pause,
    /// Primary: the handover is called off, since the backup does not get ready: the guest goes on here.
    Resume,
    /// Backup: log that the primary hands the VM over to this side.
    HandoverReceived,
    /// Ask the store to record that the VM's run is over; answer with [`Event::EndRecorded`].
    End {
        /// The last generation.
        generation: Generation,
        /// For which replica.
        who: Incarnation,
    },
    /// The peer shows a new key on the connection: check it, and know the peer by it from then on.
    PeerKey(KeyProof),
    /// Never emit an output again. Write the bytes of [`crate::Agent::outgoing`] if the connection takes
    /// them, then exit.
    Halt(Outcome),
}

/// Why the peer is lost (rule 2).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Suspicion {
    /// Nothing was heard from it for the timeout.
    #[error("nothing was heard from it for {0} ms")]
    Silent(u64),
    /// It is heard, but its guest makes no progress.
    #[error("its guest made no progress for {0} ms")]
    NoProgress(u64),
    /// It is further behind than it may be, and the configuration says that it is given up then.
    #[error("it is {0} ms behind, and is given up for that (--at-lag-limit give-up)")]
    Behind(u64),
    /// The connection has ended.
    #[error("the connection has ended")]
    Disconnected,
    /// It reports that it cannot go on.
    #[error("it has failed: {0}")]
    Failed(String),
    /// Its process was restarted, so that its machine's state is gone.
    #[error("it was restarted and has lost the guest's state")]
    Restarted,
    /// It violates the protocol.
    #[error(transparent)]
    Protocol(ChannelError),
}

/// Why a peer is refused before the guest runs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerRefusal {
    /// It does not speak this version of the protocol: look at the offset.
    #[error(transparent)]
    Protocol(#[from] ChannelError),
    /// It was lost before the guest ran.
    #[error("it was lost before the guest ran: {0}")]
    Lost(Suspicion),
    /// It runs another VM: correct the name or the address.
    #[error("it runs VM {theirs:?}, and this side runs VM {ours:?}; correct --name or the peer's address")]
    Vm {
        /// Its name.
        theirs: String,
        /// Ours.
        ours: String,
    },
    /// Both sides have the same role.
    #[error("both sides are started as {}: start one of them in the other role", format!("{:?}", .0).to_lowercase())]
    Role(Role),
    /// Its incarnation or the name of one of its disks is invalid.
    #[error("its hello has an invalid {0}")]
    Invalid(&'static str),
    /// The timeouts differ.
    #[error("its timeout is {theirs} ns, and this side's is {ours} ns; give both the same --timeout-ms")]
    Timeout {
        /// Its timeout.
        theirs: u64,
        /// Ours.
        ours: u64,
    },
    /// No output could leave over this link.
    #[error(
        "its confirmations are {} ms old when they come, and no output leaves if they are older than {} ms, half of \
         --timeout-ms: mend the link, or give both sides --timeout-ms {} or more",
        .round_trip_ns / 1_000_000, .timeout_ns / 2_000_000, needed_timeout_ns(*.round_trip_ns) / 1_000_000
    )]
    RoundTrip {
        /// The shortest that was measured, ns.
        round_trip_ns: u64,
        /// The timeout of both sides, ns.
        timeout_ns: u64,
    },
    /// The machines differ.
    #[error("{}", describe_mismatch(.0))]
    Identity(#[from] Mismatch),
    /// It refused us, or gave up.
    #[error("the other side reports: {0}")]
    Told(String),
}

impl PeerRefusal {
    /// Whether it is for something that stays as it is until somebody changes the options of a side.
    pub fn is_permanent(&self) -> bool {
        match self {
            PeerRefusal::Vm { .. }
            | PeerRefusal::Role(_)
            | PeerRefusal::Timeout { .. }
            | PeerRefusal::Identity(_)
            | PeerRefusal::Told(_) => true,
            PeerRefusal::Protocol(_)
            | PeerRefusal::Lost(_)
            | PeerRefusal::Invalid(_)
            | PeerRefusal::RoundTrip { .. } => false,
        }
    }
}

/// How a replica ends.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Outcome {
    /// The VM's run is over.
    #[error("the VM has ended: {}", describe_end(*.0))]
    Ended(EndReason),
    /// The other side lives, as requested.
    #[error("handed over")]
    HandedOver,
    /// The VM was handed over, but the other side was lost before it said that it runs it.
    #[error(
        "handed over, but the backup was lost before it said that it runs the VM: {0}; this side will not run it \
         again, so look there (`vmft status`)"
    )]
    Yielded(Suspicion),
    /// The other side lives or, with `None`, the store knows this side's generation no longer.
    #[error("fenced: {}", describe_fence(*.0))]
    Fenced(Option<Incarnation>),
    /// The operator had the store forget the VM while this side ran it.
    #[error(
        "fenced: the VM was forgotten at the store while it ran here (`vmft forget`), so it may run elsewhere; \
         if it does not, start it again"
    )]
    Forgotten,
    /// The VM was opened again without this side.
    #[error("fenced: the VM was started elsewhere, as generation {0}, while this side ran it")]
    Overtaken(Generation),
    /// This host cannot run the guest.
    #[error("this host has failed: {0}")]
    Failed(String),
    /// A backup was asked to leave.
    #[error("stopped")]
    Stopped,
    /// The generation cannot be opened: the VM runs elsewhere, or its record has to be forgotten first.
    #[error(
        "the store has another generation of this VM, or other members: the VM runs elsewhere, or has to be \
         forgotten first (`vmft forget`)"
    )]
    NotOpened,
    /// The store refuses to open the generation: this host may not run the VM, or the store has to learn a key.
    #[error("the store refuses to open the pair: {0}")]
    OpenRefused(String),
    /// The peer was lost before the guest ran.
    #[error("the peer was lost before the guest ran: {0}")]
    NotStarted(Suspicion),
}

/// A disk's value is a digest of its content, which tells nobody anything.
fn describe_mismatch(mismatch: &Mismatch) -> String {
    match mismatch.field.strip_prefix("disk-") {
        Some(_) => format!(
            "its copy of {} differs from this side's: copy the image from the host on which the VM ran last (`vmft \
             primary` refuses to start from an older one) to the other, and start the backup there again",
            mismatch.field
        ),
        None => format!(
            "its machine differs in {mismatch}; give both sides the same guest, disk images and engine, and releases of \
             vmft with the same machine-version"
        ),
    }
}

fn describe_fence(holder: Option<Incarnation>) -> String {
    match holder {
        Some(holder) => format!("the other side lives ({holder})"),
        None => "the store knows this pair no longer: the VM was forgotten or started elsewhere, or the store has \
                 lost its data; if it runs nowhere, start it again"
            .into(),
    }
}

fn describe_end(reason: EndReason) -> &'static str {
    match reason {
        EndReason::Stopped => "it was stopped",
        EndReason::Guest(End::PowerOff) => "the guest powered off",
        EndReason::Guest(End::Reboot) => "the guest asked for a reset",
        EndReason::Guest(End::TripleFault) => "the guest crashed (triple fault)",
    }
}
