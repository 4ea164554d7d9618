//! Finds the first position at which two replays of one log differ. Both run side by side to the same positions; the
//! interval at whose end they are no longer equal is divided and replayed by another pair, until it is one position
//! long.
//!
//! This is for a divergence that does not occur every time, because a host sometimes computes wrong results, or an engine's
//! result depends on where it is stopped. (An ordinary replay finds a divergence that occurs every time.)

use std::fmt;

use entry::Position;

use crate::guest_loop::{GuestLoop, LoopError};
use crate::machine::{Machine, MachineError};
use crate::ram::PAGE;
use crate::replay::{Divergence, Records, ReplayError, Replayer, Standby};

/// Number of parts into which an interval is divided for the next pair.
const PARTS: u64 = 256;
/// How often the same interval is replayed before its difference counts as intermittent.
const TRIES: u32 = 4;
/// Number of differing pages in which the first differing byte is shown.
const PAGES_SHOWN: usize = 16;

/// One of the replays.
pub trait BisectReplay {
    /// Why a replay cannot go on, other than a divergence.
    type Error;

    /// Runs to a position, or to the end of the log if that comes first.
    fn run_to(&mut self, at: Position) -> Result<Reached, Self::Error>;

    /// The machine at its present position.
    fn machine(&mut self) -> &mut Machine;
}

/// How far a replay has run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reached {
    /// To the position that was asked for.
    There,
    /// To the end of the log.
    End,
    /// To a position at which machine and log differ.
    Diverged(Box<Divergence>),
}

/// A replay that stops after every few instructions, as a recording does when it is kicked.
pub struct PiecewiseReplay<L, D> {
    /// The replay.
    pub guest: GuestLoop<Replayer<L, D>>,
    /// The most instructions between two stops.
    pub piece: u64,
}

impl<L: Records, D: Standby> BisectReplay for PiecewiseReplay<L, D> {
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

/// The result of comparing pairs of replays.
#[derive(Debug)]
pub enum Bisection {
    /// Both replays did the same, to the end or to the same divergence from the log.
    Equal(Option<Box<Divergence>>),
    /// The first difference between them.
    Different(Box<FirstDifference>),
    /// They differed once between these positions, and were equal whenever that interval was replayed again.
    Intermittent {
        /// The replays were equal here.
        equal_at: u64,
        /// The replays differed here, once.
        differs_at: u64,
    },
}

/// The first position at which two replays differ, and what differs. Values are those of the first and the second replay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FirstDifference {
    /// The replays differ here and were equal one position before.
    pub position: u64,
    /// Registers that differ, with their values.
    pub registers: Vec<(&'static str, u128, u128)>,
    /// Other parts of the machine that differ, except for RAM.
    pub devices: Vec<&'static str>,
    /// Number of pages of RAM that differ.
    pub pages: usize,
    /// The first byte that differs in each of the first of these pages: its offset in RAM, and its values.
    pub bytes: Vec<(u64, u8, u8)>,
    /// The divergence of each replay from the log, if it had one.
    pub divergences: [Option<Box<Divergence>>; 2],
}

/// Compares pairs of replays that `pair` makes: first at the positions `stops`, which ascend, then at ever closer ones.
///
/// # Errors
/// Those of the replays.
pub fn bisect<R: BisectReplay>(
    mut pair: impl FnMut() -> Result<[R; 2], R::Error>,
    stops: &[u64],
) -> Result<Bisection, R::Error>
where
    R::Error: From<MachineError>,
{
    let (mut equal_at, mut found) = match compare(pair()?, stops.iter().copied(), 0)? {
        Compared::Equal(diverged) => return Ok(Bisection::Equal(diverged)),
        Compared::Different { equal_at, difference } => (equal_at, difference),
    };
    let mut tries = 1;
    while found.position - equal_at > 1 {
        let (from, to) = (equal_at, found.position);
        let step = (to - from).div_ceil(PARTS);
        let stops = (1..).map(|n| from + n * step).take_while(|stop| *stop < to).chain([to]);
        match compare(pair()?, stops, from)? {
            Compared::Different { equal_at: before, difference } => {
                (equal_at, found, tries) = (before, difference, 1);
            }
            Compared::Equal(_) if tries == TRIES => {
                return Ok(Bisection::Intermittent { equal_at: from, differs_at: to });
            }
            Compared::Equal(_) => tries += 1,
        }
    }
    Ok(Bisection::Different(found))
}

/// The result of comparing one pair.
enum Compared {
    Equal(Option<Box<Divergence>>),
    Different { equal_at: u64, difference: Box<FirstDifference> },
}

/// Runs a pair of replays, which are equal at `from`, to the first of `stops` at which they differ.
fn compare<R: BisectReplay>(
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
            let difference = FirstDifference::between(stop, [one.machine(), other.machine()], [&a, &b])?;
            return Ok(Compared::Different { equal_at, difference: Box::new(difference) });
        }
        match a {
            Reached::There => equal_at = stop,
            Reached::End => break,
            Reached::Diverged(divergence) => return Ok(Compared::Equal(Some(divergence))),
        }
    }
    Ok(Compared::Equal(None))
}

impl FirstDifference {
    /// What differs between two machines whose digests were taken just now.
    fn between(
        position: u64,
        [one, other]: [&mut Machine; 2],
        reached: [&Reached; 2],
    ) -> Result<FirstDifference, MachineError> {
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
        Ok(FirstDifference { position, registers, devices, pages: pages.len(), bytes, divergences })
    }
}

impl fmt::Display for FirstDifference {
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
            write!(f, "\n  {} pages of RAM differ in all", self.pages)?;
        }
        for (which, divergence) in ["first", "second"].iter().zip(&self.divergences) {
            if let Some(divergence) = divergence {
                write!(f, "\n  the {which} replay differs from the log: {divergence}")?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for FirstDifference {}
