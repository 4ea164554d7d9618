//! Two agents, a connection and a store, driven step by step.
#![allow(dead_code, reason = "each test binary uses only a part")]

use agent::{Action, Agent, Buffers, Config, Event, NextRecord, PairTiming, Phase, Role};
use entry::identity::Identity;
use entry::log::{Entry, LoggedOutput, OutputTo, Record};
use entry::{Digest, Position, PositionUnit};
use logging_channel::message::{Message, encode};
use logging_channel::versions::{ChannelVersions, OURS};
use store_rule::names::{Generation, Incarnation, KeyId};
use store_rule::record::{Applied, Command, CommandReply, Member};
use store_rule::state::StoreState;

pub const MS: u64 = 1_000_000;
pub const BACKUP_KEY: KeyId = KeyId([2; 32]);
pub const TIMING: PairTiming = PairTiming {
    timeout_ns: 1000 * MS,
    beat_interval_ns: 50 * MS,
    progress_timeout_ns: 5000 * MS,
    retry_ns: 50 * MS,
    store_watch_ns: 60_000 * MS,
};

pub fn config(role: Role, incarnation: u128) -> Config {
    Config {
        role,
        vm: "trial".parse().unwrap(),
        me: Member::new(Incarnation::try_from(incarnation).unwrap()),
        identity: Identity::new(PositionUnit::Instructions).field("kernel", "k1"),
        generation: Generation::FIRST,
        unprotected: false,
        timing: TIMING,
        buffers: Buffers::default(),
    }
}

/// Two agents, a connection without delay, and a store.
pub struct Pair {
    pub now: u64,
    pub primary: Agent,
    pub backup: Agent,
    pub store: StoreState,
    pub position: u64,
    /// Whether bytes reach the primary and the backup.
    pub reachable: [bool; 2],
}

impl Pair {
    pub fn new(primary: Config, backup: Config) -> Pair {
        Pair::speaking(primary, backup, OURS)
    }

    /// Both know these versions of the channel's protocol.
    fn speaking(primary: Config, backup: Config, versions: ChannelVersions) -> Pair {
        let agent = |config| Agent::new(config, 0).speaking(versions);
        let (primary, backup) = (agent(primary), agent(backup));
        Pair { now: 0, primary, backup, store: StoreState::default(), position: 0, reachable: [true; 2] }
    }

    /// A pair that is protected.
    pub fn protected() -> Pair {
        Pair::protected_with(config(Role::Primary, 1), config(Role::Backup, 2))
    }

    /// A pair with these configurations that is protected.
    pub fn protected_with(primary: Config, backup: Config) -> Pair {
        Pair::new(primary, backup).open()
    }

    /// The same, of sides that know these versions of the channel's protocol.
    pub fn protected_speaking(versions: ChannelVersions) -> Pair {
        Pair::speaking(config(Role::Primary, 1), config(Role::Backup, 2), versions).open()
    }

    /// Connects the sides, and opens the pair in the store.
    fn open(self) -> Pair {
        let mut pair = self;
        pair.backup.handle(0, Event::Ready);
        pair.connect();
        let actions = pair.primary_actions();
        let [Action::Open { generation, members }] = &actions[..] else { panic!("{actions:?}") };
        let open = Command::Open { generation: *generation, members: members.clone() };
        assert_eq!(pair.ask_store(&open), CommandReply::Done);
        pair.primary.handle(pair.now, Event::Opened(Some(Applied::Done)));
        pair.exchange();
        assert_eq!(pair.primary_actions(), [Action::Start { generation: Generation::FIRST }]);
        assert_eq!(pair.backup_actions(), [Action::Start { generation: Generation::FIRST }]);
        pair
    }

    /// Brings the connection up, and lets the primary measure its round trip.
    pub fn connect(&mut self) {
        self.primary.handle(self.now, Event::Connected { peer_key: Some(BACKUP_KEY) });
        self.backup.handle(self.now, Event::Connected { peer_key: None });
        self.exchange();
        self.pass_time(100 * MS);
    }

    pub fn ask_store(&mut self, command: &Command) -> CommandReply {
        self.store.apply(&"trial".parse().unwrap(), command, None)
    }

    /// Passes bytes both ways until neither side has more to send.
    pub fn exchange(&mut self) {
        loop {
            let to_backup = take_bytes(&mut self.primary);
            let to_primary = take_bytes(&mut self.backup);
            if to_backup.is_empty() && to_primary.is_empty() {
                return;
            }
            if self.reachable[1] && !to_backup.is_empty() {
                self.backup.handle(self.now, Event::Received(&to_backup));
            }
            if self.reachable[0] && !to_primary.is_empty() {
                self.primary.handle(self.now, Event::Received(&to_primary));
            }
        }
    }

    /// The primary hears this message in place of what the backup really says.
    pub fn primary_hears(&mut self, message: &Message) {
        let mut bytes = Vec::new();
        encode(OURS.newest, message, &mut bytes);
        self.primary.handle(self.now, Event::Received(&bytes));
    }

    /// Lets time pass, while both guest loops make turns.
    pub fn pass_time(&mut self, ns: u64) {
        let end = self.now + ns;
        while self.now < end {
            self.now = (self.now + 10 * MS).min(end);
            self.primary.guest_loop_turned(self.now, Position::exact(self.position));
            self.backup.guest_loop_turned(self.now, Position::exact(self.position));
            self.primary.handle(self.now, Event::Tick);
            self.backup.handle(self.now, Event::Tick);
            self.exchange();
        }
    }

    /// The primary's guest emits an output, which is now in the gate.
    pub fn emit_output(&mut self) {
        self.position += 1;
        let output = LoggedOutput { to: OutputTo::Net(0), len: 60, digest: Digest(1) };
        let record = Record { position: Position::exact(self.position), entry: Entry::Output(output) };
        self.primary.append(self.now, &record);
        self.primary.guest_loop_waits(self.now);
    }

    /// The primary's gate releases outputs, up to this number.
    pub fn release(&mut self, outputs: u64) {
        assert_eq!(self.primary.release_limit(self.now).min(outputs), outputs);
        self.primary.released(outputs);
    }

    /// The backup replays all records that it has.
    pub fn replay(&mut self) {
        let mut records = self.backup.status(self.now).cursors.replayed;
        while let NextRecord::Record(_) = self.backup.next_record() {
            records += 1;
        }
        let position = Position::exact(self.position);
        self.backup.handle(self.now, Event::Replayed { records, position });
    }

    pub fn primary_actions(&mut self) -> Vec<Action> {
        actions(&mut self.primary)
    }

    pub fn backup_actions(&mut self) -> Vec<Action> {
        actions(&mut self.backup)
    }
}

pub fn take_bytes(agent: &mut Agent) -> Vec<u8> {
    let mut bytes = Vec::new();
    while !agent.outgoing().is_empty() {
        let n = agent.outgoing().len();
        bytes.extend(agent.outgoing());
        agent.wrote(n);
    }
    bytes
}

pub fn actions(agent: &mut Agent) -> Vec<Action> {
    std::iter::from_fn(|| agent.next_action()).collect()
}

pub fn take(who: u128) -> Action {
    Action::Take { generation: Generation::FIRST, who: Incarnation::try_from(who).unwrap() }
}

pub fn phase(agent: &Agent) -> Phase {
    agent.status(0).phase
}
