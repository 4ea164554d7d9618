//! The rules that the simulator can switch off one at a time, to show that its checker notices. It builds
//! this crate with the feature `ablation` for that; in a program all rules are in force.

/// A rule that the simulator can switch off.
#[derive(Clone, Copy)]
#[cfg_attr(feature = "ablation", derive(Debug, PartialEq, Eq))]
pub enum Rule {
    /// An output waits in the gate until its record is acknowledged.
    HoldOutputs,
    /// Every output has a record of its own.
    #[cfg(feature = "ablation")]
    LogOutputs,
    /// Only the store's verdict makes a replica go on alone.
    AskTheStore,
    /// A suspicion is never taken back.
    OneWaySuspicion,
    /// A process that is started again has a new incarnation. The simulator's hosts apply this rule, not the
    /// agent.
    #[cfg(feature = "ablation")]
    Incarnations,
    /// The channel is closed before the store is asked.
    CloseBeforeTake,
    /// Outputs leave only under a lease.
    ReleaseOnlyWhenFresh,
    /// A backup replays everything that it received before it takes.
    ReplayBeforeTake,
    /// A hello on a second connection counts only with the peer's certificate, and while the peer is quiet.
    DoubtStrangers,
    /// A primary that has yielded never takes.
    YieldForGood,
    /// A side that runs the guest looks at the store's record of its VM.
    WatchTheStore,
    /// A pair whose outputs do not leave, or whose backup is too far behind, is not called protected.
    TellTheTruth,
    /// A key that is revoked ends its connections and is believed no longer, neither by the peer nor by the
    /// store. The simulator's hosts and its store apply this rule, not the agent.
    #[cfg(feature = "ablation")]
    RefuseRevokedKeys,
    /// A member of the store that comes back with less than another remembers of it does not vote. The
    /// simulator's store applies this rule.
    #[cfg(feature = "ablation")]
    DoubtRolledBackMembers,
}

#[cfg(feature = "ablation")]
impl Rule {
    /// All of them.
    pub const ALL: [Rule; 14] = [
        Rule::HoldOutputs,
        Rule::LogOutputs,
        Rule::AskTheStore,
        Rule::OneWaySuspicion,
        Rule::Incarnations,
        Rule::CloseBeforeTake,
        Rule::ReleaseOnlyWhenFresh,
        Rule::ReplayBeforeTake,
        Rule::DoubtStrangers,
        Rule::YieldForGood,
        Rule::WatchTheStore,
        Rule::TellTheTruth,
        Rule::RefuseRevokedKeys,
        Rule::DoubtRolledBackMembers,
    ];
}
