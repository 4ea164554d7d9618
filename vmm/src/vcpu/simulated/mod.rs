//! The software CPU behind a simulated performance counter: an engine that has all the troubles of hardware's, and has
//! them on demand. For tests of landing, and of what is built on it, on machines without counters.

use std::sync::Arc;

use entry::Position;

use super::landing::Lander;
use super::landing::policy::Margin;
use super::{Exit, Kick, Limit, Start, Vcpu, VcpuError, VcpuState};
use crate::ram::Ram;

mod counter;
mod host;

pub use counter::{Chance, SimulatedCounter, Skid};
pub use host::{Quirks, SimulatedHost};

/// See the module. Positions are those of [`entry::PositionUnit::Branches`].
pub struct SimulatedVcpu {
    pub(super) host: SimulatedHost,
    pub(super) lander: Lander,
}

impl SimulatedVcpu {
    /// A CPU for `ram_len` bytes of RAM and a lander with this margin.
    pub fn new(ram_len: u64, counter: SimulatedCounter, quirks: Quirks, margin: Margin) -> SimulatedVcpu {
        SimulatedVcpu { host: SimulatedHost::new(ram_len, counter, quirks), lander: Lander::new(margin) }
    }

    /// The CPU and its counter.
    pub fn host(&mut self) -> &mut SimulatedHost {
        &mut self.host
    }

    /// The lander.
    pub fn lander(&mut self) -> &mut Lander {
        &mut self.lander
    }

    /// Takes over a state that was saved where [`Vcpu::position`] was `at`.
    pub fn restore_at(&mut self, state: &VcpuState, at: Position) -> Result<(), VcpuError> {
        self.host.soft.restore(state)?;
        let halted = self.host.soft.cpu().is_halted();
        self.lander.restored(&mut self.host, at, halted)
    }
}

impl Vcpu for SimulatedVcpu {
    fn run(&mut self, ram: &mut Ram, limit: &Limit) -> Result<Exit, VcpuError> {
        self.host.set_time(ram, limit.time_offset_ns);
        self.lander.run(&mut self.host, ram, limit)
    }

    fn complete(&mut self, ram: &mut Ram, value: u64) -> Result<Option<Exit>, VcpuError> {
        let exit = self.host.soft.complete(ram, value)?;
        if exit.is_none() {
            self.lander.completed(&mut self.host)?;
        }
        Ok(exit)
    }

    fn position(&self) -> Position {
        self.lander.position()
    }

    fn inject(&mut self, vector: u8) -> Result<(), VcpuError> {
        self.lander.injected();
        self.host.soft.inject(vector)
    }

    fn save(&self) -> Result<VcpuState, VcpuError> {
        self.host.soft.save()
    }

    /// The position goes on from where it is: see [`SimulatedVcpu::restore_at`].
    fn restore(&mut self, state: &VcpuState) -> Result<(), VcpuError> {
        self.restore_at(state, self.position())
    }

    fn reset(&mut self, start: &Start) -> Result<(), VcpuError> {
        self.host.soft.reset(start)
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.host.kicker()
    }

    fn report_written(&mut self, ram: &mut Ram) -> Result<(), VcpuError> {
        self.host.soft.report_written(ram)
    }
}
