//! An agent's configuration.

use entry::identity::Identity;
use logging_channel::message::Role;
use store_rule::names::{Generation, VmName};
use store_rule::record::Member;

/// An agent's configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// Which side this is.
    pub role: Role,
    /// Name of the VM.
    pub vm: VmName,
    /// This side's incarnation, which is created with the machine's state and kept only in RAM, and its
    /// copies of the disks.
    pub me: Member,
    /// What the machine must have in common with the peer's.
    pub identity: Identity,
    /// Primary: the generation that it opens. A backup learns it from its primary.
    pub generation: Generation,
    /// Primary: run without a backup.
    pub unprotected: bool,
    /// Timeouts and intervals.
    pub timing: PairTiming,
    /// Bounds on records and outputs that wait.
    pub buffers: Buffers,
}

/// Timeouts and intervals, in ns. The defaults are for a busy host with two cores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PairTiming {
    /// Silence after which the peer is lost; must be the same on both sides.
    pub timeout_ns: u64,
    /// Interval between heartbeats; at most a quarter of the timeout.
    pub beat_interval_ns: u64,
    /// Time without progress, while work is pending, after which the peer is lost; at least the timeout.
    pub progress_timeout_ns: u64,
    /// Delay before the store is asked again.
    pub retry_ns: u64,
    /// Time between two looks at the store's record while the guest runs; a tenth of it after a look without an
    /// answer. The pair is not protected when the store has been silent for three times as long.
    pub store_watch_ns: u64,
}

impl Default for PairTiming {
    fn default() -> PairTiming {
        PairTiming {
            timeout_ns: 1_000_000_000,
            beat_interval_ns: 50_000_000,
            progress_timeout_ns: 5_000_000_000,
            retry_ns: 50_000_000,
            store_watch_ns: 5_000_000_000,
        }
    }
}

/// Bounds on records and outputs that wait. Bytes are counted by [`logging_channel::weight`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffers {
    /// Primary: weight of the records that are not acknowledged. Backup: weight of those that wait for
    /// replay.
    pub buffer_bytes: u64,
    /// If the backup lags by this much or more, the guest gets only a twentieth of the time, and the VM is at risk.
    pub lag_ns_max: u64,
    /// If the backup lags by this much or more, the guest stops. At least `lag_ns_max`.
    pub lag_ns_limit: u64,
    /// What becomes of the backup then.
    pub at_lag_limit: LagLimitAction,
    /// How long a record that no output waits for may wait for others.
    pub batch_ns: u64,
    /// For how long after a departure the next outputs are held back, so that outputs in quick succession
    /// leave together.
    pub coalescing_ns: u64,
}

impl Default for Buffers {
    fn default() -> Buffers {
        Buffers {
            buffer_bytes: 32 << 20,
            lag_ns_max: 2_000_000_000,
            lag_ns_limit: 6_000_000_000,
            at_lag_limit: LagLimitAction::StopGuest,
            batch_ns: 5_000_000,
            coalescing_ns: 1_000_000,
        }
    }
}

/// What a primary does when its backup's lag has reached its limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LagLimitAction {
    /// The guest waits until the backup has caught up: it stays protected, and runs no faster than the backup.
    #[default]
    StopGuest,
    /// The backup counts as lost: the guest goes on at full speed, alone.
    GiveUpBackup,
}
