//! What the loss of a host would mean for the VM now: PROTECTED, AT RISK of what, or UNPROTECTED (rule 12).

use crate::watch::StoreProblem;

/// What the loss of a host would mean for the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// Both hosts run the guest and its outputs leave: the loss of either host is survived.
    Protected,
    /// Both hosts run the guest, but it is away from its clients, or would be for long if a host were lost: until what
    /// is named here is mended. Nothing would be lost.
    AtRisk(Risk),
    /// The loss of a host would be the loss of the VM.
    Unprotected(Exposure),
}

/// What a pair is at risk of, and why. Times are in ns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Risk {
    /// Primary: the other side's confirmations are too old when they come.
    #[error(
        "the guest's outputs do not leave: the other side's confirmations are {} ms old when they come, and may be {} \
         ms, half of --timeout-ms; mend the link, or start both sides again with --timeout-ms {} or more",
        ms(*.round_trip_ns), ms(*.limit_ns), ms(needed_timeout_ns(*.round_trip_ns))
    )]
    RoundTrip {
        /// How old the last confirmation was when it came.
        round_trip_ns: u64,
        /// How old it may be.
        limit_ns: u64,
    },
    /// Primary: nothing is confirmed, or this side's guest loop stands, although neither side suspects the other yet.
    #[error("the guest's outputs do not leave: they have been waiting for {} ms for this side's guest or for the other side", ms(*.0))]
    OutputsHeld(u64),
    /// The store does not answer this side.
    #[error("{}", StoreProblem::Silent(*.0))]
    StoreSilent(u64),
    /// The backup is far behind.
    #[error(
        "the backup is {} ms behind and may be {} ms: if the primary is lost, the VM is away until the backup has \
         caught up; its host or the link is too slow", ms(*.lag_ns), ms(*.max_ns)
    )]
    Behind {
        /// How far.
        lag_ns: u64,
        /// How far it may be ([`crate::Buffers::lag_ns_max`]).
        max_ns: u64,
    },
    /// The other side reports that the store does not answer it.
    #[error(
        "the store does not answer the other side: if this host is lost, the VM waits for the store; check the other host's way to it"
    )]
    StoreSilentToPeer,
    /// The primary reports that outputs do not leave.
    #[error("the guest's outputs do not leave the primary: its status says why")]
    PeerHoldsOutputs,
    /// The primary reports that this backup is far behind.
    #[error("this backup is {} ms behind, which is more than its primary's --lag-max-ms: this host or the link is too slow", ms(*.0))]
    PeerSaysBehind(u64),
}

/// Why the loss of a host would be the loss of the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Exposure {
    /// The store has lost its record of the pair, so that neither side could go on alone.
    #[error("{}", StoreProblem::Unknown)]
    StoreUnknown,
    /// The verdict is not there yet.
    #[error("the other side is lost")]
    PeerLost,
    /// There is no other side.
    #[error("this side runs the guest alone")]
    Alone,
    /// The VM starts or ends, or this side is out.
    #[error("this side is not part of a running pair")]
    NotPaired,
}

pub(crate) fn ms(ns: u64) -> u64 {
    ns / 1_000_000
}

/// A timeout with which outputs leave over a link with this round trip, with a quarter to spare.
pub(crate) fn needed_timeout_ns(round_trip_ns: u64) -> u64 {
    const STEP: u64 = 100_000_000;
    (round_trip_ns * 5 / 2).div_ceil(STEP) * STEP
}

impl Protection {
    /// Whether the loss of either host is survived.
    pub fn is_protected(&self) -> bool {
        *self == Protection::Protected
    }

    /// Why it is not [`Protection::Protected`], in words; `None` if it is.
    pub fn reason(&self) -> Option<String> {
        match self {
            Protection::Protected => None,
            Protection::AtRisk(risk) => Some(risk.to_string()),
            Protection::Unprotected(exposure) => Some(exposure.to_string()),
        }
    }

    /// Whether it is the same, but for figures.
    pub(crate) fn is_like(&self, other: &Protection) -> bool {
        use std::mem::discriminant;
        match (self, other) {
            (Protection::AtRisk(ours), Protection::AtRisk(theirs)) => {
                discriminant(ours) == discriminant(theirs)
            }
            _ => self == other,
        }
    }
}

/// What is remembered to judge the risks.
#[derive(Debug)]
pub(crate) struct RiskWatch {
    /// When outputs could leave, at the latest.
    pub(crate) could_leave_at: u64,
    pub(crate) reviewed_at: u64,
    /// The backup's lag has been beyond its maximum, and not below half of it since.
    pub(crate) is_behind: bool,
    /// What was told last.
    pub(crate) told: Protection,
}

impl RiskWatch {
    /// The pair starts.
    pub(crate) fn new(now: u64) -> RiskWatch {
        RiskWatch { could_leave_at: now, reviewed_at: now, is_behind: false, told: Protection::Protected }
    }
}
