//! A simulated branch counter whose counts are exact, but whose overflows are not.

use crate::vcpu::landing::{LandingError, TickCounter};

/// A generator of pseudo-random numbers, which are the same for the same seed (xorshift64*).
#[derive(Clone, Copy, Debug)]
pub struct Chance(u64);

impl Chance {
    /// The generator for this seed.
    pub fn new(seed: u64) -> Chance {
        // Mixed, so that similar seeds give different numbers (splitmix64); a state of zero would stay zero.
        let mixed = (seed.wrapping_add(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        Chance(mixed ^ mixed >> 31 | 1)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// The next number, below `end`; 0 if `end` is 0.
    pub fn below(&mut self, end: u64) -> u64 {
        ((u128::from(self.number()) * u128::from(end)) >> 64) as u64
    }

    /// `true` in one of `n` cases on average; never if `n` is 0.
    pub fn one_in(&mut self, n: u64) -> bool {
        n != 0 && self.below(n) == 0
    }
}

/// When the counter's overflows come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Skid {
    /// The most ticks that one is late; each number up to that is equally likely.
    pub late_max: u64,
    /// One in this many is early, by up to the whole period.
    pub early_one_in: u64,
    /// One in this many never comes.
    pub lost_one_in: u64,
    /// One in this many comes a second time, up to 100 ticks later, even if the counter was disarmed or armed again since.
    pub twice_one_in: u64,
}

/// The simulated counter.
#[derive(Clone, Debug)]
pub struct SimulatedCounter {
    /// When its overflows come.
    pub skid: Skid,
    /// One branch in this many is counted twice, as by a counter that cannot be used.
    pub miscounts_one_in: u64,
    /// Reads fail, as for a counter that had to share its hardware.
    pub broken: bool,
    ticks: u64,
    chance: Chance,
    armed_for: Option<u64>,
    /// When an overflow will come that is not armed.
    stray_overflow: Option<u64>,
    signal: bool,
}

impl SimulatedCounter {
    /// A counter that starts at an arbitrary count.
    pub fn new(skid: Skid, seed: u64) -> SimulatedCounter {
        let mut chance = Chance::new(seed);
        SimulatedCounter {
            skid,
            miscounts_one_in: 0,
            broken: false,
            ticks: chance.below(1 << 40),
            chance,
            armed_for: None,
            stray_overflow: None,
            signal: false,
        }
    }

    /// Counts a retired branch.
    pub fn tick(&mut self) {
        self.ticks += 1 + u64::from(self.chance.one_in(self.miscounts_one_in));
        for due in [&mut self.armed_for, &mut self.stray_overflow] {
            if due.is_some_and(|at| self.ticks >= at) {
                *due = None;
                self.signal = true;
            }
        }
    }

    /// Whether an overflow has signalled since the last call.
    pub fn take_signal(&mut self) -> bool {
        std::mem::take(&mut self.signal)
    }
}

impl TickCounter for SimulatedCounter {
    fn read(&mut self) -> Result<u64, LandingError> {
        if self.broken {
            return Err(LandingError::Counter("did not count all the time"));
        }
        Ok(self.ticks)
    }

    fn arm(&mut self, ticks: u64) -> Result<(), LandingError> {
        let skid = self.skid;
        let early = self.chance.one_in(skid.early_one_in);
        let after =
            if early { self.chance.below(ticks) } else { ticks + self.chance.below(skid.late_max + 1) };
        let at = self.ticks + after.max(1);
        self.armed_for = (!self.chance.one_in(skid.lost_one_in)).then_some(at);
        if self.chance.one_in(skid.twice_one_in) {
            self.stray_overflow = Some(at + self.chance.below(100));
        }
        Ok(())
    }

    fn disarm(&mut self) -> Result<(), LandingError> {
        self.armed_for = None;
        Ok(())
    }
}
