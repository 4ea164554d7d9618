//! The software CPU behind a simulated performance counter: an engine that has all the troubles of hardware's, and has
//! them on demand. For tests of landing, and of what is built on it, on machines without counters.

use super::landing::policy::Margin;
use super::landing::{Counted, Lander};

mod counter;
mod host;

pub use counter::{Chance, SimulatedCounter, Skid};
pub use host::{Quirks, SimulatedHost};

/// See the module. Positions are those of [`entry::PositionUnit::Branches`].
pub type SimulatedVcpu = Counted<SimulatedHost>;

/// Overflows of the counter that engines for tests have: most are as late as its lander expects, some later.
pub(super) const SKID: Skid = Skid { late_max: 60, early_one_in: 7, lost_one_in: 400, twice_one_in: 9 };

/// A lander for [`SKID`].
pub(super) fn lander() -> Lander {
    Lander::new(Margin::new(50, 1 << 20))
}

impl SimulatedVcpu {
    /// A CPU for `ram_len` bytes of RAM, as an engine for tests.
    pub(super) fn for_tests(ram_len: u64) -> SimulatedVcpu {
        let counter = SimulatedCounter::new(SKID, ram_len);
        let quirks = Quirks { leaves_resume_flag_one_in: 3, ..Quirks::default() };
        Counted::new(SimulatedHost::new(ram_len, counter, quirks), lander())
    }
}
