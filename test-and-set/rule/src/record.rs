//! The rule of the store, without I/O: what a command does to a VM's record, and what it answers.
//!
//! [`decide`] is the whole rule for one VM. Our own server applies it in log order to a [`State`]; the clients of etcd and
//! ZooKeeper apply it to the record they read and write the result back by compare-and-set. All three so give the same verdicts.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::names::{CopyId, DISKS_MAX, DiskName, Generation, Incarnation, VmName};

/// One side of a pair: its incarnation and its copies of the VM's disks.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Member {
    /// The id that may take.
    pub incarnation: Incarnation,
    /// This side's copy of each disk, at most [`DISKS_MAX`].
    pub disks: BTreeMap<DiskName, CopyId>,
}

impl Member {
    /// A member without disks.
    pub fn new(incarnation: Incarnation) -> Self {
        Self { incarnation, disks: BTreeMap::new() }
    }
}

/// Who may take a generation: the primary, who opens it, and its backup if there is one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Members {
    /// Opens the generation. For every generation after the first it is the holder of the one before.
    pub primary: Member,
    /// Absent when the primary runs unprotected.
    pub backup: Option<Member>,
}

impl Members {
    /// The member with this incarnation.
    pub fn find(&self, who: Incarnation) -> Option<&Member> {
        self.iter().find(|m| m.incarnation == who)
    }

    fn iter(&self) -> impl Iterator<Item = &Member> {
        std::iter::once(&self.primary).chain(&self.backup)
    }

    /// Why these members cannot form a generation, if they cannot.
    fn fault(&self) -> Option<Refusal> {
        if self.backup.as_ref().is_some_and(|b| b.incarnation == self.primary.incarnation) {
            return Some(Refusal::OneIncarnationTwice);
        }
        self.iter().any(|m| m.disks.len() > DISKS_MAX).then_some(Refusal::TooManyDisks)
    }
}

/// What is known of a VM's current generation.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Phase {
    /// The pair exists; whoever takes first holds the generation.
    Open {
        /// Who may take.
        members: Members,
        /// Who took.
        holder: Option<Incarnation>,
    },
    /// The VM is gone. Its generation number stays, so that nobody wins an old one again.
    Forgotten,
}

/// All that the store knows of one VM.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Record {
    /// The current generation: of all that were opened, the last.
    pub generation: Generation,
    /// Whether it is open, and who holds it.
    pub phase: Phase,
    /// The newest copies of each disk: of all members while the pair runs, of the holder alone once there is one.
    /// They survive [`Command::Forget`], so that a start from an older copy can be refused.
    pub disks: BTreeMap<DiskName, BTreeSet<CopyId>>,
}

impl Record {
    /// Who holds the current generation.
    pub fn holder(&self) -> Option<Incarnation> {
        match &self.phase {
            Phase::Open { holder, .. } => *holder,
            Phase::Forgotten => None,
        }
    }

    fn set_newest<'m>(&mut self, newest: impl Iterator<Item = &'m Member>) {
        self.disks.clear();
        for (disk, copy) in newest.flat_map(|m| &m.disks) {
            self.disks.entry(disk.clone()).or_default().insert(*copy);
        }
    }
}

/// A change that is asked for. Every command may be repeated: the repeat changes nothing and has the same answer,
/// until another command moves the record on.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Command {
    /// Test and set: take the generation for `who`.
    Take {
        /// Only the current generation can be taken.
        generation: Generation,
        /// Only a member can take.
        who: Incarnation,
    },
    /// Open a generation for a new pair. The first for a VM, or the first after [`Command::Forget`], is create-if-absent;
    /// a later one is for the holder of the last generation only, as its primary.
    Open {
        /// One more than the last generation; [`Generation::FIRST`] for an unknown VM.
        generation: Generation,
        /// The new pair.
        members: Members,
    },
    /// Forget the VM, if this is still its current generation. Its number and newest disks stay.
    Forget {
        /// The generation that is to be the last.
        generation: Generation,
    },
}

/// The store's answer to a command.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Reply {
    /// Taken by the one who asked, now or before.
    Won,
    /// Taken by this other one.
    Lost(Incarnation),
    /// The generation is open with just these members, or the VM is forgotten.
    Done,
    /// Not for this generation, or not for the one who asked. Nothing was changed.
    Stale,
    /// The command can never be done. Nothing was changed.
    Refused(Refusal),
}

/// Why a command can never be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// Primary and backup have the same incarnation: give each machine state an id of its own.
    #[error("primary and backup have the same incarnation: give each machine state an id of its own")]
    OneIncarnationTwice,
    /// A member has more than 16 disks.
    #[error("a member has more than {DISKS_MAX} disks")]
    TooManyDisks,
}

/// What a command does to a VM's record (`None`: the VM is unknown) and what is answered.
/// The first value is the new record, or `None` when nothing changes.
pub fn decide(record: Option<&Record>, command: &Command) -> (Option<Record>, Reply) {
    match command {
        Command::Take { generation, who } => take(record, *generation, *who),
        Command::Open { generation, members } => open(record, *generation, members),
        Command::Forget { generation } => forget(record, *generation),
    }
}

fn take(record: Option<&Record>, generation: Generation, who: Incarnation) -> (Option<Record>, Reply) {
    let Some(record) = record.filter(|r| r.generation == generation) else { return (None, Reply::Stale) };
    let Phase::Open { members, holder } = &record.phase else { return (None, Reply::Stale) };
    let Some(member) = members.find(who) else { return (None, Reply::Stale) };
    match holder {
        Some(holder) if *holder == who => (None, Reply::Won),
        Some(holder) => (None, Reply::Lost(*holder)),
        None => {
            let phase = Phase::Open { members: members.clone(), holder: Some(who) };
            let mut taken = Record { phase, ..record.clone() };
            taken.set_newest(std::iter::once(member));
            (Some(taken), Reply::Won)
        }
    }
}

fn open(record: Option<&Record>, generation: Generation, members: &Members) -> (Option<Record>, Reply) {
    if let Some(fault) = members.fault() {
        return (None, Reply::Refused(fault));
    }
    let allowed = match record {
        None => generation == Generation::FIRST,
        Some(record) => match &record.phase {
            Phase::Open { members: now, .. } if record.generation == generation => {
                return (None, if now == members { Reply::Done } else { Reply::Stale });
            }
            Phase::Open { holder, .. } => {
                record.generation.next() == Some(generation) && *holder == Some(members.primary.incarnation)
            }
            Phase::Forgotten => record.generation.next() == Some(generation),
        },
    };
    if !allowed {
        return (None, Reply::Stale);
    }
    let phase = Phase::Open { members: members.clone(), holder: None };
    let mut opened = Record { generation, phase, disks: BTreeMap::new() };
    opened.set_newest(members.iter());
    (Some(opened), Reply::Done)
}

fn forget(record: Option<&Record>, generation: Generation) -> (Option<Record>, Reply) {
    match record {
        Some(record) if record.generation == generation => match record.phase {
            Phase::Forgotten => (None, Reply::Done),
            Phase::Open { .. } => (Some(Record { phase: Phase::Forgotten, ..record.clone() }), Reply::Done),
        },
        _ => (None, Reply::Stale),
    }
}

/// Every VM that the store knows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    vms: BTreeMap<VmName, Record>,
}

impl State {
    /// Applies a command in log order.
    pub fn apply(&mut self, vm: &VmName, command: &Command) -> Reply {
        let (changed, reply) = decide(self.vms.get(vm), command);
        if let Some(record) = changed {
            self.vms.insert(vm.clone(), record);
        }
        reply
    }

    /// The record of a VM, forgotten or not.
    pub fn get(&self, vm: &VmName) -> Option<&Record> {
        self.vms.get(vm)
    }

    /// The VMs that are not forgotten, in the order of their names, from behind `after` on.
    pub fn list(&self, after: Option<&VmName>) -> impl Iterator<Item = (&VmName, &Record)> {
        use std::ops::Bound::{Excluded, Unbounded};
        let from = after.map_or(Unbounded, Excluded);
        self.vms.range::<VmName, _>((from, Unbounded)).filter(|(_, r)| r.phase != Phase::Forgotten)
    }

    /// How many VMs are known, the forgotten ones included.
    pub fn len(&self) -> usize {
        self.vms.len()
    }

    /// Whether no VM is known.
    pub fn is_empty(&self) -> bool {
        self.vms.is_empty()
    }
}
