//! A vCPU whose positions are counted branches, made of an engine that can be steered.

use std::sync::Arc;

use entry::Position;
use serde::{Deserialize, Serialize};

use super::lander::Mark;
use super::{Lander, Landings, Steered};
use crate::ram::Ram;
use crate::vcpu::{Exit, General, Kick, Limit, Start, Vcpu, VcpuError, VcpuState};

/// A saved vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CountedState {
    /// The engine's.
    pub engine: VcpuState,
    /// The position: exits, branches, RIP and digest of the registers.
    pub at: [u64; 4],
}

/// See the module.
pub struct Counted<H> {
    pub(super) host: H,
    pub(super) lander: Lander,
}

/// Where a way began that may have to be gone again.
struct Began {
    engine: VcpuState,
    mark: Mark,
}

impl<H: Steered> Counted<H> {
    /// A vCPU for an engine that stands at its start.
    pub fn new(host: H, lander: Lander) -> Counted<H> {
        Counted { host, lander }
    }

    /// Notes the state before a way that may miss its end.
    fn note(&mut self, ram: &mut Ram) -> Result<Began, VcpuError> {
        self.host.engine_mut().report_written(ram)?;
        ram.keep();
        Ok(Began { engine: self.host.engine().save()?, mark: self.lander.mark() })
    }

    /// The end was missed: back to the start of the way, with more care.
    fn go_back(&mut self, ram: &mut Ram, began: &Began, missed: VcpuError) -> Result<(), VcpuError> {
        self.host.engine_mut().report_written(ram)?;
        ram.go_back();
        self.host.engine_mut().restore(&began.engine)?;
        self.lander.back(&mut self.host, began.mark, missed)
    }

    /// Takes over an engine's state that was saved at `at`.
    pub(super) fn restore_at(&mut self, state: &VcpuState, at: Position) -> Result<(), VcpuError> {
        self.host.engine_mut().restore(state)?;
        self.lander.restored(&mut self.host, at, state.cpu().halted)
    }
}

impl<H: Steered> Vcpu for Counted<H> {
    fn run(&mut self, ram: &mut Ram, limit: &Limit) -> Result<Exit, VcpuError> {
        self.host.prepare(ram, limit.time_offset_ns);
        if let Some(more) = self.lander.settle(&mut self.host, ram, limit)? {
            return Ok(more);
        }
        if !self.lander.may_miss(limit) {
            return self.lander.run(&mut self.host, ram, limit);
        }
        let began = self.note(ram)?;
        loop {
            match self.lander.run(&mut self.host, ram, limit) {
                Err(missed @ VcpuError::Overshot { .. }) => self.go_back(ram, &began, missed)?,
                result => return result,
            }
            self.host.prepare(ram, limit.time_offset_ns);
        }
    }

    fn complete(&mut self, ram: &mut Ram, value: u64) -> Result<Option<Exit>, VcpuError> {
        let next = self.host.engine_mut().complete(ram, value)?;
        if next.is_none() {
            self.lander.completed(&mut self.host)?;
        }
        Ok(next)
    }

    fn settle(&mut self, ram: &mut Ram) -> Result<Option<Exit>, VcpuError> {
        self.host.engine_mut().settle(ram)
    }

    fn position(&self) -> Position {
        self.lander.position()
    }

    fn inject(&mut self, vector: u8) -> Result<(), VcpuError> {
        self.lander.injected();
        self.host.engine_mut().inject(vector)
    }

    fn save(&self) -> Result<VcpuState, VcpuError> {
        let Position { count, within, rip, registers } = self.position();
        let engine = self.host.engine().save()?;
        Ok(VcpuState::Counted(Box::new(CountedState { engine, at: [count, within, rip, registers] })))
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), VcpuError> {
        let VcpuState::Counted(state) = state else { return Err(VcpuError::OtherEngine("counting")) };
        let [count, within, rip, registers] = state.at;
        self.restore_at(&state.engine, Position { count, within, rip, registers })
    }

    fn reset(&mut self, start: &Start) -> Result<(), VcpuError> {
        self.host.engine_mut().reset(start)?;
        self.lander.reset(&mut self.host)
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.host.kicker()
    }

    fn report_written(&mut self, ram: &mut Ram) -> Result<(), VcpuError> {
        self.host.engine_mut().report_written(ram)
    }

    fn change_registers(&mut self, change: &mut dyn FnMut(&mut General)) -> Result<(), VcpuError> {
        self.host.engine_mut().change_registers(change)
    }

    fn landings(&self) -> Landings {
        self.lander.stats()
    }
}
