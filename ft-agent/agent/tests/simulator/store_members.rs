//! The store's three members, as far as rolling one of them back goes: each has a copy of the log, a leader
//! needs a majority, and an election or a replication happens at once. The production server is tested against
//! real faults in `test-and-set/tests`; this shows which rule keeps it from giving two verdicts.
//!
//! A member remembers up to which entry each other one holds the log. One that comes back with less is told by
//! those that remember, and does not vote. **What three members cannot know**: if none that remembers is
//! reachable, the old copy and a member that was away cannot tell, and vote. So the faults here roll back one
//! member, and only while another is there that remembers more of it; and they never roll back two.

use agent::Rule;
use store_rule::names::VmName;
use store_rule::record::{Command, CommandReply};
use store_rule::state::StoreState;

/// How many earlier copies of a member's directory are kept.
const COPIES: usize = 4;
const MAJORITY: usize = 2;

/// An entry of the log: its term, and a command; a leader begins its term without one.
type LogEntry = (u64, Option<(VmName, Command)>);

/// A member's directory.
#[derive(Clone, Default)]
struct Directory {
    log: Vec<LogEntry>,
    /// How many entries each member has, as far as this one knows.
    remembers: [usize; 3],
}

impl Directory {
    /// What an election compares.
    fn age(&self) -> (u64, usize) {
        (self.log.last().map_or(0, |(term, _)| *term), self.log.len())
    }
}

#[derive(Clone, Default)]
struct StoreMember {
    directory: Directory,
    earlier: Vec<Directory>,
    down_until: u64,
    /// It has come back with less than another member remembers.
    is_doubted: bool,
}

/// The members, and what they have answered.
pub struct StoreMembers {
    members: [StoreMember; 3],
    /// The last leader, and whether it still leads.
    leader: usize,
    is_led: bool,
    term: u64,
    answered: StoreState,
    doubts: bool,
}

impl StoreMembers {
    pub fn new(without: Option<Rule>) -> StoreMembers {
        StoreMembers {
            members: Default::default(),
            leader: 0,
            is_led: false,
            term: 0,
            answered: StoreState::default(),
            doubts: without != Some(Rule::DoubtRolledBackMembers),
        }
    }

    /// The state by the last answer.
    pub fn answered(&self) -> &StoreState {
        &self.answered
    }

    /// A change: `None` if a majority does not have it now. It may be in the log anyway.
    pub fn change(&mut self, now: u64, vm: &VmName, command: Command) -> Option<CommandReply> {
        self.read(now)?;
        self.append(Some((vm.clone(), command.clone())));
        let mut before = self.answered.clone();
        self.replicate(now).then(|| before.apply(vm, &command, None))
    }

    /// The state, confirmed by a majority.
    pub fn read(&mut self, now: u64) -> Option<&StoreState> {
        let led = self.is_led && self.votes(now, self.leader) || self.elect(now);
        (led && self.replicate(now)).then_some(&self.answered)
    }

    /// Whether a member is there, and its vote counts.
    fn votes(&self, now: u64, member: usize) -> bool {
        self.members[member].down_until <= now && !self.members[member].is_doubted
    }

    fn elect(&mut self, now: u64) -> bool {
        let voters: Vec<_> = (0..3).filter(|m| self.votes(now, *m)).collect();
        let age = |m: usize| self.members[m].directory.age();
        let wins = |c: usize| voters.iter().filter(|v| age(**v) <= age(c)).count() >= MAJORITY;
        let Some(leader) = voters.iter().copied().find(|c| wins(*c)) else { return false };
        (self.leader, self.is_led, self.term) = (leader, true, self.term + 1);
        self.append(None);
        true
    }

    fn append(&mut self, command: Option<(VmName, Command)>) {
        let mut directory = self.members[self.leader].directory.clone();
        directory.log.push((self.term, command));
        directory.remembers[self.leader] = directory.log.len();
        self.write(self.leader, directory);
    }

    fn write(&mut self, member: usize, directory: Directory) {
        let member = &mut self.members[member];
        member.earlier.push(std::mem::replace(&mut member.directory, directory));
        if member.earlier.len() > COPIES {
            member.earlier.remove(0);
        }
    }

    /// Gives the leader's log to those that are there. Whether a majority has it.
    fn replicate(&mut self, now: u64) -> bool {
        let leader = self.leader;
        let followers: Vec<_> = (0..3).filter(|m| *m != leader && self.votes(now, *m)).collect();
        let log = self.members[leader].directory.log.clone();
        for follower in &followers {
            if self.members[*follower].directory.age() != self.members[leader].directory.age() {
                let mut directory = self.members[*follower].directory.clone();
                directory.log.clone_from(&log);
                directory.remembers[leader] = log.len();
                directory.remembers[*follower] = log.len();
                self.write(*follower, directory);
            }
            self.members[leader].directory.remembers[*follower] = log.len();
        }
        if followers.len() + 1 < MAJORITY {
            return false;
        }
        self.answered = StoreState::default();
        for (vm, command) in log.iter().filter_map(|(_, command)| command.as_ref()) {
            self.answered.apply(vm, command, None);
        }
        true
    }

    /// A member is away for a time: the leader, or the first that follows it.
    pub fn stop_member(&mut self, leader: bool, until: u64) {
        let member = if leader { self.leader } else { (self.leader + 1) % 3 };
        self.members[member].down_until = self.members[member].down_until.max(until);
    }

    /// The leader, or a follower that is there, comes back with an earlier directory, while another member is there
    /// that remembers more of it. False: none does.
    pub fn roll_back_member(&mut self, leader: bool, changes: usize, now: u64) -> bool {
        let offsets: &[usize] = if leader { &[0] } else { &[2, 1] };
        let places = offsets.iter().map(|n| (self.leader + n) % 3);
        let Some(member) = places.into_iter().find(|m| self.votes(now, *m)) else { return false };
        let Some(earlier) = self.members[member].earlier.iter().rev().nth(changes - 1) else { return false };
        let has = earlier.log.len();
        let mut others = (0..3).filter(|o| *o != member && self.votes(now, *o));
        let is_told = others.any(|o| self.members[o].directory.remembers[member] > has);
        if !is_told || self.members.iter().any(|m| m.is_doubted) {
            return false;
        }
        self.members[member].directory = earlier.clone();
        self.members[member].is_doubted = self.doubts;
        self.is_led &= member != self.leader;
        true
    }
}
