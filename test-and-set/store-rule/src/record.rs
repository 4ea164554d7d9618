//! What a command does to a VM's record, and what the store replies.
//!
//! [`decide`] is the whole rule for one VM. Our own server applies it in log order to all records; the clients of etcd and
//! ZooKeeper apply it to the record that they read, and write the result back by compare-and-set. So all three stores give the same
//! verdicts.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::names::{CopyId, DISKS_MAX, DiskName, Generation, Incarnation, KeyId, PartyName};
pub use crate::party::{Asker, HostId};

/// One side of a pair: its incarnation, its host, and its copies of the VM's disks.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Member {
    /// The id with which this side takes a generation.
    pub incarnation: Incarnation,
    /// The host that may act for this side. `None` in a command means the host that asks; in a record it means that the store has
    /// no roles.
    pub host: Option<HostId>,
    /// This side's copy of each disk, at most [`DISKS_MAX`].
    pub disks: BTreeMap<DiskName, CopyId>,
}

impl Member {
    /// A member without disks, on the host that asks.
    pub fn new(incarnation: Incarnation) -> Self {
        Self { incarnation, host: None, disks: BTreeMap::new() }
    }

    /// Fails unless the host that asks, if there are roles, is this member's.
    fn check_host(&self, asks: Option<&PartyName>) -> Result<(), Refusal> {
        match (asks, &self.host) {
            (None, _) => Ok(()),
            (Some(asks), Some(HostId::Name(may))) if may == asks => Ok(()),
            (Some(_), may) => Err(Refusal::OtherHost(may.clone())),
        }
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

    /// The members, for changes.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Member> {
        std::iter::once(&mut self.primary).chain(&mut self.backup)
    }

    /// The same members; where no host is named, it is the one that asks.
    fn on_hosts(&self, asks: Option<&PartyName>) -> Members {
        let mut members = self.clone();
        for member in members.iter_mut() {
            member.host = member.host.take().or_else(|| asks.cloned().map(HostId::Name));
        }
        members
    }

    /// The key of a host without a name.
    fn unknown_key(&self) -> Option<KeyId> {
        self.iter().find_map(|member| match member.host {
            Some(HostId::Key(key)) => Some(key),
            Some(HostId::Name(_)) | None => None,
        })
    }

    fn hosts(&self) -> BTreeSet<PartyName> {
        let name = |member: &Member| match &member.host {
            Some(HostId::Name(name)) => Some(name.clone()),
            Some(HostId::Key(_)) | None => None,
        };
        self.iter().filter_map(name).collect()
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
    /// The VM has ended or was forgotten. Its generation number stays, so that no old generation can be won again.
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
    /// They survive [`Command::End`] and [`Command::Forget`], so that a start from an older copy can be refused.
    pub disks: BTreeMap<DiskName, BTreeSet<CopyId>>,
    /// The hosts of the last generation's members. After its end only they may open the next one; empty if any host may.
    pub hosts: BTreeSet<PartyName>,
    /// The host that opened the VM's first generation: the name counts as its. `None` in a store without roles.
    pub owner: Option<PartyName>,
    /// Whether this is from a backup of the store. What happened later is not known: whether the generation was taken, or another
    /// one opened. Until the next one is opened nobody wins by this record who had not won by the backup.
    pub restored: bool,
}

/// After a VM from a backup was ended or forgotten, its next generation has a number so far ahead that none of those that were
/// opened after the backup is used twice.
const RESTORED_GAP: u64 = 1 << 20;

impl VmRecord {
    /// The incarnation that holds the current generation, if it is taken.
    pub fn holder(&self) -> Option<Incarnation> {
        match &self.phase {
            VmPhase::Open { holder, .. } => *holder,
            VmPhase::Forgotten => None,
        }
    }

    /// What a store that was restored from a backup knows of a VM that is not in the backup.
    pub const NOT_IN_BACKUP: VmRecord = VmRecord {
        generation: Generation(0),
        phase: VmPhase::Forgotten,
        disks: BTreeMap::new(),
        hosts: BTreeSet::new(),
        owner: None,
        restored: true,
    };

    fn is_of_no_vm(&self) -> bool {
        self.generation < Generation::FIRST
    }

    /// The generation that is opened next; `None` if the number would overflow.
    pub fn next_generation(&self) -> Option<Generation> {
        match self.restored && self.phase == VmPhase::Forgotten {
            true => self.generation.0.checked_add(RESTORED_GAP).map(Generation),
            false => self.generation.next(),
        }
    }

    /// Fails unless the host that asks is one of those to which an ended VM is bound.
    fn check_bound(&self, asks: Option<&PartyName>) -> Result<(), Refusal> {
        let may = self.hosts.is_empty() || asks.is_none_or(|asks| self.hosts.contains(asks));
        if may { Ok(()) } else { Err(Refusal::Bound(self.hosts.clone())) }
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
    /// Test and set: take the generation for `who`. Only for the member's host.
    Take {
        /// The generation to take; only the current one can be taken.
        generation: Generation,
        /// The side that takes it; it must be a member.
        who: Incarnation,
    },
    /// Open a generation for a new pair, from the primary's host. A VM's first generation, and the first after [`Command::Forget`],
    /// can be opened by any host, and the first after [`Command::End`] by the last members' hosts; any other only by the holder of
    /// the previous generation, which becomes the primary.
    Open {
        /// One more than the last generation; [`Generation::FIRST`] for an unknown VM.
        generation: Generation,
        /// The new pair.
        members: Members,
    },
    /// The VM's run is over: end its generation for `who`. Only for the member's host, and not while the other member holds the
    /// generation. The VM's hosts stay, too.
    End {
        /// The current generation.
        generation: Generation,
        /// The side that knows of the end; it must be a member.
        who: Incarnation,
    },
    /// Forget the VM and its hosts, if this is still its current generation. Its number and newest disks stay. Only for operators.
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
    /// The generation is open with exactly these members, or the VM has ended or is forgotten.
    Done,
    /// The generation is not the current one, or the side that asked may not do this. Nothing was changed.
    Stale,
    /// The command is invalid, or not for the one that asks. Nothing was changed. It says nothing of who holds the generation.
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

/// Whether the record is now as [`Command::Open`], [`Command::End`] or [`Command::Forget`] wanted it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// It is.
    Done,
    /// It is not: the VM has another generation, or other members. Nothing was changed.
    Stale,
}

/// Fails with the reply if it does not answer a [`Command::Open`], [`Command::End`] or [`Command::Forget`], or refuses it.
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

/// Why a command is refused.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// Primary and backup have the same incarnation: give each machine state an id of its own.
    #[error("primary and backup have the same incarnation: give each machine state an id of its own")]
    OneIncarnationTwice,
    /// A member has more than 16 disks.
    #[error("a member has more than {DISKS_MAX} disks")]
    TooManyDisks,
    /// Only hosts run VMs: use a host's keys.
    #[error(
        "the certificate is no host's, and only hosts take, open and end generations: use the host's own keys"
    )]
    NotAHost,
    /// Only operators forget VMs: use an operator's keys.
    #[error("the certificate is no operator's, and only operators forget VMs: use an operator's keys")]
    NotAnOperator,
    /// A side of the pair is on a host that the store does not know: make its key known.
    #[error(
        "no host has the key {0}: put the certificate of the host that has it into hosts/ of every member of the store"
    )]
    UnknownKey(KeyId),
    /// The host has used up its names: use old names again, or allow more.
    #[error(
        "host {host} has opened {most} VM names already, which is the limit: use one of them again, or give every member of the \
         store a larger --names-per-host"
    )]
    TooManyNames {
        /// The host that asks.
        host: PartyName,
        /// How many it may have.
        most: u64,
    },
    /// This side of the VM is on another host: ask from there.
    #[error("this side of the VM is on {}: only that host may ask for it", match .0 { Some(host) => host.to_string(), None => "no known host".into() })]
    OtherHost(Option<HostId>),
    /// The VM is bound to other hosts: start it there, or forget it first.
    #[error("the VM is bound to {}: start it there, or have an operator forget it first (`vmft forget`)", named(.0))]
    Bound(BTreeSet<PartyName>),
    /// The store was restored from a backup, and does not know what happened later: stop the VM on its hosts, or forget it.
    #[error(
        "the store was restored from a backup and does not know what became of this VM since then: find out which side of it runs, \
         if any; then end it with `vmft stop`, or have an operator forget it (`vmft forget`) when both are dead; see docs/disasters.md"
    )]
    Restored,
}

fn named(hosts: &BTreeSet<PartyName>) -> String {
    let names: Vec<_> = hosts.iter().map(PartyName::as_str).collect();
    format!("{} {}", if names.len() == 1 { "host" } else { "hosts" }, names.join(" and "))
}

/// What a command does: the new record, or `None` if it stays as it is, and the reply. A refusal never changes the record.
type Decision = Result<(Option<VmRecord>, CommandReply), Refusal>;

const STALE: Decision = Ok((None, CommandReply::Stale));

/// The decision on a generation that is not the record's.
fn other_generation(record: Option<&VmRecord>, generation: Generation) -> Decision {
    match record {
        Some(record) if record.restored && generation > record.generation => Err(Refusal::Restored),
        _ => STALE,
    }
}

/// Applies a command to a VM's record (`None`: the VM is unknown). Returns the new record, or `None` if it stays as it is, and
/// the reply. Without an asker the store has no roles, and everybody may do everything.
pub fn decide(
    record: Option<&VmRecord>,
    command: &Command,
    asker: Option<&Asker>,
) -> (Option<VmRecord>, CommandReply) {
    let decision = match command {
        Command::Take { generation, who } => {
            host_of(asker).and_then(|asks| take(record, *generation, *who, asks))
        }
        Command::Open { generation, members } => {
            host_of(asker).and_then(|asks| open(record, *generation, members, asks))
        }
        Command::End { generation, who } => {
            host_of(asker).and_then(|asks| end(record, *generation, *who, asks))
        }
        Command::Forget { .. } if asker.is_some_and(|asker| asker.operator.is_none()) => {
            Err(Refusal::NotAnOperator)
        }
        Command::Forget { generation } => Ok(forget(record, *generation)),
    };
    decision.unwrap_or_else(|refusal| (None, CommandReply::Refused(refusal)))
}

/// The host that asks; `None` in a store without roles.
fn host_of(asker: Option<&Asker>) -> Result<Option<&PartyName>, Refusal> {
    asker.map(|asker| asker.host.as_ref().ok_or(Refusal::NotAHost)).transpose()
}

fn take(
    record: Option<&VmRecord>,
    generation: Generation,
    who: Incarnation,
    asks: Option<&PartyName>,
) -> Decision {
    let Some(record) = record.filter(|r| r.generation == generation) else {
        return other_generation(record, generation);
    };
    let VmPhase::Open { members, holder } = &record.phase else { return STALE };
    let Some(member) = members.find(who) else { return STALE };
    member.check_host(asks)?;
    Ok(match holder {
        Some(holder) if *holder == who => (None, CommandReply::Won),
        Some(holder) => (None, CommandReply::Lost(*holder)),
        None if record.restored => return Err(Refusal::Restored),
        None => {
            let phase = VmPhase::Open { members: members.clone(), holder: Some(who) };
            let mut taken = VmRecord { phase, ..record.clone() };
            taken.set_newest(std::iter::once(member));
            (Some(taken), CommandReply::Won)
        }
    })
}

fn open(
    record: Option<&VmRecord>,
    generation: Generation,
    members: &Members,
    asks: Option<&PartyName>,
) -> Decision {
    if let Some(fault) = members.refusal() {
        return Err(fault);
    }
    let members = members.on_hosts(asks);
    if let (Some(_), Some(key)) = (asks, members.unknown_key()) {
        return Err(Refusal::UnknownKey(key));
    }
    members.primary.check_host(asks)?;
    let follows = |record: &VmRecord| record.next_generation() == Some(generation);
    match record {
        None if generation == Generation::FIRST => {}
        None => return STALE,
        Some(record) => match &record.phase {
            VmPhase::Open { members: now, .. } if record.generation == generation => {
                let reply = if *now == members { CommandReply::Done } else { CommandReply::Stale };
                return Ok((None, reply));
            }
            VmPhase::Open { members: now, holder: Some(holder) }
                if follows(record) && *holder == members.primary.incarnation =>
            {
                now.find(*holder).map_or(Ok(()), |holder| holder.check_host(asks))?;
            }
            VmPhase::Forgotten if follows(record) => record.check_bound(asks)?,
            _ => return other_generation(Some(record), generation),
        },
    }
    let mut opened = VmRecord {
        generation,
        hosts: members.hosts(),
        owner: record.filter(|r| !r.is_of_no_vm()).map_or_else(|| asks.cloned(), |r| r.owner.clone()),
        restored: false,
        disks: BTreeMap::new(),
        phase: VmPhase::Open { members: members.clone(), holder: None },
    };
    opened.set_newest(members.iter());
    Ok((Some(opened), CommandReply::Done))
}

fn end(
    record: Option<&VmRecord>,
    generation: Generation,
    who: Incarnation,
    asks: Option<&PartyName>,
) -> Decision {
    let Some(record) = record.filter(|r| r.generation == generation) else {
        return other_generation(record, generation);
    };
    let VmPhase::Open { members, holder } = &record.phase else {
        record.check_bound(asks)?;
        return Ok((None, CommandReply::Done));
    };
    let Some(member) = members.find(who) else { return STALE };
    member.check_host(asks)?;
    if holder.is_some_and(|holder| holder != who) {
        return STALE;
    }
    Ok((Some(VmRecord { phase: VmPhase::Forgotten, ..record.clone() }), CommandReply::Done))
}

fn forget(record: Option<&VmRecord>, generation: Generation) -> (Option<VmRecord>, CommandReply) {
    let Some(record) = record.filter(|r| r.generation == generation) else {
        return (None, CommandReply::Stale);
    };
    let forgotten = VmRecord { phase: VmPhase::Forgotten, hosts: BTreeSet::new(), ..record.clone() };
    ((forgotten != *record).then_some(forgotten), CommandReply::Done)
}
