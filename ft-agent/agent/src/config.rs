//! What an agent is told at its start.

use entry::identity::Identity;
use logging_channel::message::Role;
use store_rule::names::{Generation, VmName};
use store_rule::record::Member;

/// What an agent is told at its start.
#[derive(Clone, Debug)]
pub struct Config {
    /// Which side it is.
    pub role: Role,
    /// Name of the VM.
    pub vm: VmName,
    /// Its incarnation, born with the machine's state and kept only in RAM, and its copies of the disks.
    pub me: Member,
    /// The machine.
    pub identity: Identity,
    /// Primary: the generation that it opens. A backup learns it.
    pub generation: Generation,
    /// Primary: run without a backup.
    pub unprotected: bool,
    /// When somebody is late.
    pub timing: Timing,
    /// Bounds of what is kept.
    pub buffers: Buffers,
    /// Rules that are switched off, to show that the simulator finds out.
    #[doc(hidden)]
    pub without: Option<Rule>,
}

impl Config {
    pub(crate) fn has(&self, rule: Rule) -> bool {
        self.without != Some(rule)
    }
}

/// When somebody is late, in ns. The defaults are for a busy machine of two cores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Silence after which the peer is lost; both sides must have the same.
    pub timeout_ns: u64,
    /// Between two heartbeats; at most a quarter of the timeout.
    pub beat_interval_ns: u64,
    /// Time without progress, while work is pending, after which the peer is lost. At least the timeout.
    pub progress_timeout_ns: u64,
    /// Before the store is asked again.
    pub retry_ns: u64,
}

impl Default for Timing {
    fn default() -> Timing {
        Timing {
            timeout_ns: 1_000_000_000,
            beat_interval_ns: 50_000_000,
            progress_timeout_ns: 5_000_000_000,
            retry_ns: 50_000_000,
        }
    }
}

/// Bounds of what is kept, by [`logging_channel::weight`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffers {
    /// Primary: records that are not acknowledged. Backup: records that wait for replay.
    pub buffer_bytes: u64,
    /// How far the backup may be behind before the guest has only a twentieth of the time.
    pub lag_ns_max: u64,
    /// How long a record that no output waits for may wait for others.
    pub batch_ns: u64,
    /// For how long after outputs have left the next wait for each other, where many follow close upon one another.
    pub spacing_ns: u64,
}

impl Default for Buffers {
    fn default() -> Buffers {
        Buffers {
            buffer_bytes: 32 << 20,
            lag_ns_max: 2_000_000_000,
            batch_ns: 5_000_000,
            spacing_ns: 1_000_000,
        }
    }
}

/// A rule that the simulator can switch off. No program does.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Rule {
    HoldOutputs,
    LogOutputs,
    AskTheStore,
    OneWaySuspicion,
    Incarnations,
    CloseBeforeTake,
    ReleaseOnlyWhenFresh,
    ReplayBeforeTake,
}

impl Rule {
    /// All of them.
    pub const ALL: [Rule; 8] = [
        Rule::HoldOutputs,
        Rule::LogOutputs,
        Rule::AskTheStore,
        Rule::OneWaySuspicion,
        Rule::Incarnations,
        Rule::CloseBeforeTake,
        Rule::ReleaseOnlyWhenFresh,
        Rule::ReplayBeforeTake,
    ];
}
