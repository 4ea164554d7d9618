//! The software CPU with a simulated performance counter: an engine that shows all the defects of hardware counters, on
//! demand. For tests of landing, and of what is built on it, on hosts without counters.

use super::landing::policy::Margin;
use super::landing::{CountingVcpu, Lander};

mod counter;
mod engine;

pub use counter::{Chance, SimulatedCounter, Skid};
pub use engine::{Quirks, SimulatedEngine};

/// The simulated engine as a vCPU. Its positions are [`entry::PositionUnit::Branches`].
pub type SimulatedVcpu = CountingVcpu<SimulatedEngine>;

/// Skid of the counter in engines for tests: most overflows are no later than the lander expects, and some are.
pub(super) const SKID: Skid = Skid { late_max: 60, early_one_in: 7, lost_one_in: 400, twice_one_in: 9 };

/// A lander for [`SKID`].
pub(super) fn lander() -> Lander {
    Lander::new(Margin::new(50, 1 << 20))
}

impl SimulatedVcpu {
    /// An engine for tests, for `ram_len` bytes of RAM.
    pub(super) fn for_tests(ram_len: u64) -> SimulatedVcpu {
        let counter = SimulatedCounter::new(SKID, ram_len);
        let quirks = Quirks { leaves_resume_flag_one_in: 3, ..Quirks::default() };
        CountingVcpu::new(SimulatedEngine::new(ram_len, counter, quirks), lander())
    }
}
