//! A host and its process.

use std::collections::VecDeque;

use agent::{Agent, Buffers, Config, LagLimitAction, Outcome, PairTiming, Role, Rule};
use entry::identity::Identity;
use entry::log::Record;
use entry::{Input, Output, PositionUnit};
use logging_channel::versions::ChannelVersions;
use store_rule::names::{Generation, Incarnation};
use store_rule::record::Member;
use vmm::gate::Gate;

use super::MS;
use super::guest::Guest;

pub const TIMING: PairTiming = PairTiming {
    timeout_ns: 40 * MS,
    beat_interval_ns: 5 * MS,
    progress_timeout_ns: 120 * MS,
    retry_ns: 5 * MS,
    store_watch_ns: 30 * MS,
};

/// How far a backup may be behind.
pub const LAG_NS_MAX: u64 = 50 * MS;

/// A replica's process.
pub struct Process {
    pub id: u64,
    pub agent: Agent,
    pub gate: Gate,
    pub guest: Guest,
    pub inputs: VecDeque<Input>,
    /// The pair has started: a primary runs, a backup replays.
    pub started: bool,
    /// It is alone.
    pub live: bool,
    pub paused: bool,
    pub end_told: bool,
    /// The record to be replayed next, and how many have been.
    pub front: Option<Record>,
    pub applied: u64,
    /// Outputs of the replay that are not compared with their records yet.
    pub made: VecDeque<Output>,
    pub turns: u64,
    /// An output that was let out of the gate and is not written, because the process was stopped in between;
    /// and when.
    pub decided: Option<(Output, u64)>,
    /// Number of effects on the world until it is killed, or is paused for a time in ns.
    pub kill_in: Option<u64>,
    pub pause_in: Option<(u64, u64)>,
}

/// A host.
pub struct Host {
    pub process: Option<Process>,
    /// How far its clock is ahead, and its rate in parts per thousand.
    pub ahead_ns: u64,
    pub rate_per_mille: u64,
    pub paused_until: u64,
    pub wedged_until: u64,
    pub exit: Option<Outcome>,
    /// The machine state of the host's first process was lost with it, or the process gave up.
    pub is_lost: bool,
}

impl Host {
    pub fn clock(&self, now: u64) -> u64 {
        self.ahead_ns + now / 1000 * self.rate_per_mille
    }
}

impl Process {
    pub fn new(
        id: u64,
        host: usize,
        incarnation: u64,
        clock: u64,
        buffer: u64,
        without: Option<Rule>,
        versions: ChannelVersions,
    ) -> Process {
        let incarnation = Incarnation::try_from(incarnation as u128).expect("not zero");
        let config = Config {
            role: if host == 0 { Role::Primary } else { Role::Backup },
            vm: "simulated".parse().expect("a name"),
            me: Member::new(incarnation),
            identity: Identity::new(PositionUnit::Instructions).field("guest", "simulated"),
            generation: Generation::FIRST,
            unprotected: false,
            timing: TIMING,
            buffers: Buffers {
                buffer_bytes: buffer,
                lag_ns_max: LAG_NS_MAX,
                lag_ns_limit: 150 * MS,
                at_lag_limit: LagLimitAction::default(),
                batch_ns: MS,
                coalescing_ns: MS / 4,
            },
        };
        Process {
            id,
            agent: Agent::without(without, config, clock).speaking(versions),
            gate: Gate::default(),
            guest: Guest::default(),
            inputs: VecDeque::new(),
            started: false,
            live: false,
            paused: false,
            end_told: false,
            front: None,
            applied: 0,
            made: VecDeque::new(),
            turns: 0,
            decided: None,
            kill_in: None,
            pause_in: None,
        }
    }

    /// Whether it takes inputs from outside.
    pub fn is_live(&self, host: usize) -> bool {
        self.live || host == 0 && self.started
    }

    pub fn disk_request(&self) -> Option<u64> {
        self.guest.disk.map(|(_, id)| id)
    }
}
