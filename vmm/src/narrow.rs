//! Where two replays of one log part. Both run side by side to the same positions; the stretch at whose end they are no
//! longer equal is divided, in another pair of replays, until it is one position long.
//!
//! For a divergence that does not come each time: a host that computes wrongly now and then, or an engine whose
//! result depends on where it is stopped. (A divergence that comes each time alike shows in every replay.)

use std::fmt;

use entry::Position;

use crate::guest_loop::{GuestLoop, LoopError};
use crate::machine::{Machine, MachineError};
use crate::ram::PAGE;
use crate::replay::{Divergence, Records, ReplayError, Replayer, Standby};

/// Into how many parts a stretch is divided for the next pair.
const PARTS: u64 = 256;
/// How often the same stretch is replayed before the difference counts as gone.
const TRIES: u32 = 4;
/// How many differing pages are looked at closely.
const PAGES_SHOWN: usize = 16;

/// One of the replays.
pub trait Replay {
    /// What it cannot go on after, but for a divergence.
    type Error;

    /// Runs to a position, or to the log's end when that comes first.
    fn run_to(&mut self, at: Position) -> Result<Reached, Self::Error>;

    /// The machine where it is now.
    fn machine(&mut self) -> &mut Machine;
}

/// How far a replay has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reached {
    /// As far as it should.
    There,
    /// To the end of the log.
    End,
    /// To where the machine and the log differ.
    Diverged(Box<Divergence>),
}

/// A replay that runs in pieces of so many instructions at most, as a recording does when it is kicked.
pub struct Pieces<L, D> {
    /// The replay.
    pub guest: GuestLoop<Replayer<L, D>>,
    /// Instructions.
    pub piece: u64,
}

impl<L: Records, D: Standby> Replay for Pieces<L, D> {
    type Error = LoopError<ReplayError<L::Error, D::Error>>;

    fn run_to(&mut self, at: Position) -> Result<Reached, Self::Error> {
        loop {
            let now = self.guest.machine.position();
            let pause = at.min(Position::exact(now.count.saturating_add(self.piece)));
            self.guest.source.pause_at(Some(pause));
            match self.guest.run() {
                Err(LoopError::Source(ReplayError::Divergence(d))) => return Ok(Reached::Diverged(d)),
                Err(e) => return Err(e),
                Ok(_) if self.guest.machine.position() >= at => return Ok(Reached::There),
                Ok(_) if self.guest.source.is_done() => return Ok(Reached::End),
                Ok(_) => {}
            }
        }
    }

    fn machine(&mut self) -> &mut Machine {
        &mut self.guest.machine
    }
}

/// What came of it.
#[derive(Debug)]
pub enum Narrowed {
    /// The two did the same all along: to the end, or to where both differ from the log.
    Equal(Option<Box<Divergence>>),
    /// Here they part.
    Parted(Box<Parting>),
    /// They were different once, between these positions, and equal whenever they were replayed again.
    Once {
        /// Equal here.
        equal_at: u64,
        /// Different here, once.
        differs_at: u64,
    },
}

/// The first position at which two replays differ, and in what. Values are those of the first and of the second.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parting {
    /// They differ here and are equal one position before.
    pub position: u64,
    /// Registers.
    pub registers: Vec<(&'static str, u128, u128)>,
    /// Parts of the machine that are neither registers nor RAM.
    pub devices: Vec<&'static str>,
    /// How many pages of RAM differ.
    pub pages: usize,
    /// Of the first of them, the first byte that differs: its offset in RAM.
    pub bytes: Vec<(u64, u8, u8)>,
    /// What each has against the log.
    pub divergences: [Option<Box<Divergence>>; 2],
}

/// Compares pairs of replays that `pair` makes: first at `stops`, ascending, then closer and closer.
///
/// # Errors
/// A replay's.
pub fn narrow<R: Replay>(
    mut pair: impl FnMut() -> Result<[R; 2], R::Error>,
    stops: &[u64],
) -> Result<Narrowed, R::Error>
where
    R::Error: From<MachineError>,
{
    let (mut equal_at, mut found) = match compare(pair()?, stops.iter().copied(), 0)? {
        Compared::Equal(diverged) => return Ok(Narrowed::Equal(diverged)),
        Compared::Parted { equal_at, parting } => (equal_at, parting),
    };
    let mut tries = 1;
    while found.position - equal_at > 1 {
        let (from, to) = (equal_at, found.position);
        let step = (to - from).div_ceil(PARTS);
        let stops = (1..).map(|n| from + n * step).take_while(|stop| *stop < to).chain([to]);
        match compare(pair()?, stops, from)? {
            Compared::Parted { equal_at: before, parting } => {
                (equal_at, found, tries) = (before, parting, 1);
            }
            Compared::Equal(_) if tries == TRIES => {
                return Ok(Narrowed::Once { equal_at: from, differs_at: to });
            }
            Compared::Equal(_) => tries += 1,
        }
    }
    Ok(Narrowed::Parted(found))
}

enum Compared {
    Equal(Option<Box<Divergence>>),
    Parted { equal_at: u64, parting: Box<Parting> },
}

/// Runs a pair to the first of `stops` at which it differs.
fn compare<R: Replay>(
    mut pair: [R; 2],
    stops: impl Iterator<Item = u64>,
    from: u64,
) -> Result<Compared, R::Error>
where
    R::Error: From<MachineError>,
{
    let mut equal_at = from;
    for stop in stops {
        let [one, other] = &mut pair;
        let (a, b) = (one.run_to(Position::exact(stop))?, other.run_to(Position::exact(stop))?);
        let digests = (one.machine().digest()?, other.machine().digest()?);
        if a != b || digests.0 != digests.1 {
            let parting = Parting::between(stop, [one.machine(), other.machine()], [&a, &b])?;
            return Ok(Compared::Parted { equal_at, parting: Box::new(parting) });
        }
        match a {
            Reached::There => equal_at = stop,
            Reached::End => break,
            Reached::Diverged(divergence) => return Ok(Compared::Equal(Some(divergence))),
        }
    }
    Ok(Compared::Equal(None))
}

impl Parting {
    /// What differs between two machines whose digests were just taken.
    fn between(
        position: u64,
        [one, other]: [&mut Machine; 2],
        reached: [&Reached; 2],
    ) -> Result<Parting, MachineError> {
        let registers = one.vcpu_state()?.registers().into_iter().zip(other.vcpu_state()?.registers());
        let registers = registers.filter(|(a, b)| a != b).map(|((name, a), (_, b))| (name, a, b)).collect();
        let mut devices = one.digest()?.differences(&other.digest()?);
        devices.retain(|part| !matches!(*part, "vcpu" | "ram"));
        let pages: Vec<u32> = (0..one.ram().pages())
            .filter(|page| one.ram().page_digest(*page) != other.ram().page_digest(*page))
            .collect();
        let first_byte = |page: &u32| {
            let bytes = one.ram().page(*page).iter().zip(other.ram().page(*page).iter());
            let (at, (a, b)) = bytes.enumerate().find(|(_, (a, b))| a != b)?;
            Some((u64::from(*page) * PAGE as u64 + at as u64, *a, *b))
        };
        let bytes = pages.iter().take(PAGES_SHOWN).filter_map(first_byte).collect();
        let divergences = reached.map(|reached| match reached {
            Reached::Diverged(divergence) => Some(divergence.clone()),
            _ => None,
        });
        Ok(Parting { position, registers, devices, pages: pages.len(), bytes, divergences })
    }
}

impl fmt::Display for Parting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "two replays of the log differ first at position {}", self.position)?;
        for (name, a, b) in &self.registers {
            write!(f, "\n  register {name}: {a:#x} and {b:#x}")?;
        }
        for part in &self.devices {
            write!(f, "\n  device {part}")?;
        }
        for (at, a, b) in &self.bytes {
            write!(f, "\n  RAM page {:#x}, first at {at:#x}: {a:#04x} and {b:#04x}", at / PAGE as u64)?;
        }
        if self.pages > self.bytes.len() {
            write!(f, "\n  {} pages of RAM in all", self.pages)?;
        }
        for (which, divergence) in ["first", "second"].iter().zip(&self.divergences) {
            if let Some(divergence) = divergence {
                write!(f, "\n  the {which} against the log: {divergence}")?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for Parting {}
