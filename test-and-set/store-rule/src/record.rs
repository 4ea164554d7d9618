//! What a command does to a VM's record, and what the store replies.
//!
//! [`decide`] is the whole rule for one VM. Our own server applies it in log order to a [`StoreState`]; the clients of etcd and
//! ZooKeeper apply it to the record that they read, and write the result back by compare-and-set. So all three stores give the same
//! verdicts.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::names::{CopyId, DISKS_MAX, DiskName, Generation, Incarnation, VmName};

/// One side of a pair: its incarnation and its copies of the VM's disks.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Member {
    /// The id with which this side takes a generation.
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

/// The members of a generation, which may take it: the primary, which opens it, and its backup, if it has one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Members {
    /// The side that opens the generation. From the second generation on it must hold the previous one.
    pub primary: Member,
    /// `None` if the primary runs unprotected.
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

    /// Why these members cannot form a generation; `None` if they can.
    fn refusal(&self) -> Option<Refusal> {
        if self.backup.as_ref().is_some_and(|b| b.incarnation == self.primary.incarnation) {
            return Some(Refusal::OneIncarnationTwice);
        }
        self.iter().any(|m| m.disks.len() > DISKS_MAX).then_some(Refusal::TooManyDisks)
    }
}

/// The state of a VM's current generation.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum VmPhase {
    /// The pair exists; the first member that takes the generation holds it.
    Open {
        /// The sides that may take it.
        members: Members,
        /// The side that has taken it.
        holder: Option<Incarnation>,
    },
    /// The VM was forgotten. Its generation number stays, so that no old generation can be won again.
    Forgotten,
}

/// Everything the store knows about one VM.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct VmRecord {
    /// The current generation, the last that was opened.
    pub generation: Generation,
    /// Whether the generation is open, and who holds it.
    pub phase: VmPhase,
    /// The newest copies of each disk: those of all members until a side has taken the generation, then the holder's only.
    /// They survive [`Command::Forget`], so that a start from an older copy can be refused.
    pub disks: BTreeMap<DiskName, BTreeSet<CopyId>>,
}

impl VmRecord {
    /// The incarnation that holds the current generation, if it is taken.
    pub fn holder(&self) -> Option<Incarnation> {
        match &self.phase {
            VmPhase::Open { holder, .. } => *holder,
            VmPhase::Forgotten => None,
        }
    }

    fn set_newest<'m>(&mut self, newest: impl Iterator<Item = &'m Member>) {
        self.disks.clear();
        for (disk, copy) in newest.flat_map(|m| &m.disks) {
            self.disks.entry(disk.clone()).or_default().insert(*copy);
        }
    }
}

/// A change to a VM's record. A command may be repeated: until another command has changed the record, the repetition
/// changes nothing and gets the same reply.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Command {
    /// Test and set: take the generation for `who`.
    Take {
        /// The generation to take; only the current one can be taken.
        generation: Generation,
        /// The side that takes it; it must be a member.
        who: Incarnation,
    },
    /// Open a generation for a new pair. A VM's first generation, and the first after [`Command::Forget`], can be opened by
    /// anybody; any other only by the holder of the previous generation, which becomes the primary.
    Open {
        /// One more than the last generation; [`Generation::FIRST`] for an unknown VM.
        generation: Generation,
        /// The new pair.
        members: Members,
    },
    /// Forget the VM, if this is still its current generation. Its number and newest disks stay.
    Forget {
        /// The current generation.
        generation: Generation,
    },
}

/// The store's reply to a command.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum CommandReply {
    /// The generation is taken by the side that asked, now or earlier.
    Won,
    /// The generation is taken by the other side, with this incarnation.
    Lost(Incarnation),
    /// The generation is open with exactly these members, or the VM is forgotten.
    Done,
    /// The generation is not the current one, or the side that asked may not do this. Nothing was changed.
    Stale,
    /// The command is invalid, now and later. Nothing was changed.
    Refused(Refusal),
}

/// Which side of a pair lives: the store's answer to [`Command::Take`]. `E` is what is known of an answer that did not come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict<E = ()> {
    /// The side that asked holds the generation.
    Won,
    /// The other side, with this incarnation, holds it: halt, and never output again.
    Lost(Incarnation),
    /// The generation is not the current one, or the side that asked is not a member of it. Nothing was changed.
    Stale,
    /// There was no answer: the take may or may not have been applied. Stay silent and ask again.
    Unknown(E),
}

impl<E> Verdict<E> {
    /// The same verdict, with another value in place of what is known of an answer that did not come.
    pub fn map_unknown<F>(self, f: impl FnOnce(E) -> F) -> Verdict<F> {
        match self {
            Verdict::Won => Verdict::Won,
            Verdict::Lost(holder) => Verdict::Lost(holder),
            Verdict::Stale => Verdict::Stale,
            Verdict::Unknown(e) => Verdict::Unknown(f(e)),
        }
    }
}

/// Fails with the reply if it does not answer a [`Command::Take`].
impl<E> TryFrom<CommandReply> for Verdict<E> {
    type Error = CommandReply;

    fn try_from(reply: CommandReply) -> Result<Self, CommandReply> {
        match reply {
            CommandReply::Won => Ok(Verdict::Won),
            CommandReply::Lost(holder) => Ok(Verdict::Lost(holder)),
            CommandReply::Stale => Ok(Verdict::Stale),
            CommandReply::Done | CommandReply::Refused(_) => Err(reply),
        }
    }
}

/// Whether the record is now as [`Command::Open`] or [`Command::Forget`] wanted it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// It is.
    Done,
    /// It is not: the VM has another generation, or other members. Nothing was changed.
    Stale,
}

/// Fails with the reply if it does not answer a [`Command::Open`] or [`Command::Forget`], or refuses it.
impl TryFrom<CommandReply> for Applied {
    type Error = CommandReply;

    fn try_from(reply: CommandReply) -> Result<Self, CommandReply> {
        match reply {
            CommandReply::Done => Ok(Applied::Done),
            CommandReply::Stale => Ok(Applied::Stale),
            CommandReply::Won | CommandReply::Lost(_) | CommandReply::Refused(_) => Err(reply),
        }
    }
}

/// Why a command is invalid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// Primary and backup have the same incarnation: give each machine state an id of its own.
    #[error("primary and backup have the same incarnation: give each machine state an id of its own")]
    OneIncarnationTwice,
    /// A member has more than 16 disks.
    #[error("a member has more than {DISKS_MAX} disks")]
    TooManyDisks,
}

/// Applies a command to a VM's record (`None`: the VM is unknown). Returns the new record, or `None` if it stays as it is, and
/// the reply.
pub fn decide(record: Option<&VmRecord>, command: &Command) -> (Option<VmRecord>, CommandReply) {
    match command {
        Command::Take { generation, who } => take(record, *generation, *who),
        Command::Open { generation, members } => open(record, *generation, members),
        Command::Forget { generation } => forget(record, *generation),
    }
}

fn take(
    record: Option<&VmRecord>,
    generation: Generation,
    who: Incarnation,
) -> (Option<VmRecord>, CommandReply) {
    let Some(record) = record.filter(|r| r.generation == generation) else {
        return (None, CommandReply::Stale);
    };
    let VmPhase::Open { members, holder } = &record.phase else { return (None, CommandReply::Stale) };
    let Some(member) = members.find(who) else { return (None, CommandReply::Stale) };
    match holder {
        Some(holder) if *holder == who => (None, CommandReply::Won),
        Some(holder) => (None, CommandReply::Lost(*holder)),
        None => {
            let phase = VmPhase::Open { members: members.clone(), holder: Some(who) };
            let mut taken = VmRecord { phase, ..record.clone() };
            taken.set_newest(std::iter::once(member));
            (Some(taken), CommandReply::Won)
        }
    }
}

fn open(
    record: Option<&VmRecord>,
    generation: Generation,
    members: &Members,
) -> (Option<VmRecord>, CommandReply) {
    if let Some(fault) = members.refusal() {
        return (None, CommandReply::Refused(fault));
    }
    let allowed = match record {
        None => generation == Generation::FIRST,
        Some(record) => match &record.phase {
            VmPhase::Open { members: now, .. } if record.generation == generation => {
                return (None, if now == members { CommandReply::Done } else { CommandReply::Stale });
            }
            VmPhase::Open { holder, .. } => {
                record.generation.next() == Some(generation) && *holder == Some(members.primary.incarnation)
            }
            VmPhase::Forgotten => record.generation.next() == Some(generation),
        },
    };
    if !allowed {
        return (None, CommandReply::Stale);
    }
    let phase = VmPhase::Open { members: members.clone(), holder: None };
    let mut opened = VmRecord { generation, phase, disks: BTreeMap::new() };
    opened.set_newest(members.iter());
    (Some(opened), CommandReply::Done)
}

fn forget(record: Option<&VmRecord>, generation: Generation) -> (Option<VmRecord>, CommandReply) {
    match record {
        Some(record) if record.generation == generation => match record.phase {
            VmPhase::Forgotten => (None, CommandReply::Done),
            VmPhase::Open { .. } => {
                (Some(VmRecord { phase: VmPhase::Forgotten, ..record.clone() }), CommandReply::Done)
            }
        },
        _ => (None, CommandReply::Stale),
    }
}

/// The records of all VMs that the store knows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreState {
    vms: BTreeMap<VmName, VmRecord>,
}

impl StoreState {
    /// Applies a command. Commands must be applied in log order.
    pub fn apply(&mut self, vm: &VmName, command: &Command) -> CommandReply {
        let (changed, reply) = decide(self.vms.get(vm), command);
        if let Some(record) = changed {
            self.vms.insert(vm.clone(), record);
        }
        reply
    }

    /// The record of a VM, forgotten or not.
    pub fn get(&self, vm: &VmName) -> Option<&VmRecord> {
        self.vms.get(vm)
    }

    /// The VMs that are not forgotten, in the order of their names, starting after `after`.
    pub fn list(&self, after: Option<&VmName>) -> impl Iterator<Item = (&VmName, &VmRecord)> {
        use std::ops::Bound::{Excluded, Unbounded};
        let from = after.map_or(Unbounded, Excluded);
        self.vms.range::<VmName, _>((from, Unbounded)).filter(|(_, r)| r.phase != VmPhase::Forgotten)
    }

    /// The number of known VMs, including forgotten ones.
    pub fn len(&self) -> usize {
        self.vms.len()
    }

    /// Whether the store knows no VM.
    pub fn is_empty(&self) -> bool {
        self.vms.is_empty()
    }
}
