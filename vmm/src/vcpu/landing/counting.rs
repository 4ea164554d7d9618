//! A vCPU whose positions are counted branches, made of a steerable engine.

use std::sync::Arc;

use entry::Position;
use serde::{Deserialize, Serialize};

use super::lander::LandingProgress;
use super::{Lander, Landings, SteerableEngine};
use crate::ram::Ram;
use crate::vcpu::{Exit, GeneralRegisters, Kick, Limit, Start, Vcpu, VcpuError, VcpuState};

/// The saved state of a [`CountingVcpu`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CountingState {
    /// The engine's state.
    pub engine: VcpuState,
    /// The position: exits, branches, RIP and a digest of the registers.
    pub position: [u64; 4],
}

/// A vCPU that counts branches.
pub struct CountingVcpu<E> {
    pub(super) engine: E,
    pub(super) lander: Lander,
}

/// The state to go back to if the next position is missed.
struct Checkpoint {
    engine: VcpuState,
    progress: LandingProgress,
}

impl<E: SteerableEngine> CountingVcpu<E> {
    /// A vCPU of an engine that is at its start.
    pub fn new(engine: E, lander: Lander) -> CountingVcpu<E> {
        CountingVcpu { engine, lander }
    }

    /// Keeps the state before a run that may miss its position. RAM keeps its own part.
    fn take_checkpoint(&mut self, ram: &mut Ram) -> Result<Checkpoint, VcpuError> {
        self.engine.vcpu_mut().report_written(ram)?;
        ram.take_snapshot();
        Ok(Checkpoint { engine: self.engine.vcpu().save()?, progress: self.lander.progress() })
    }

    /// Goes back to the checkpoint after a position was missed, to try again with a wider margin.
    fn retry_from(
        &mut self,
        ram: &mut Ram,
        checkpoint: &Checkpoint,
        missed: VcpuError,
    ) -> Result<(), VcpuError> {
        self.engine.vcpu_mut().report_written(ram)?;
        ram.restore_snapshot();
        self.engine.vcpu_mut().restore(&checkpoint.engine)?;
        self.lander.retry_from(&mut self.engine, checkpoint.progress, missed)
    }

    /// Restores an engine's state that was saved at `at`.
    pub(super) fn restore_at(&mut self, state: &VcpuState, at: Position) -> Result<(), VcpuError> {
        self.engine.vcpu_mut().restore(state)?;
        self.lander.state_restored(&mut self.engine, at, state.cpu().halted)
    }
}

impl<E: SteerableEngine> Vcpu for CountingVcpu<E> {
    fn run(&mut self, ram: &mut Ram, limit: &Limit) -> Result<Exit, VcpuError> {
        self.engine.prepare(ram, limit.time_offset_ns);
        if let Some(more) = self.lander.finish_instruction_if_stopping(&mut self.engine, ram, limit)? {
            return Ok(more);
        }
        if !self.lander.may_miss(limit) {
            return self.lander.run(&mut self.engine, ram, limit);
        }
        let checkpoint = self.take_checkpoint(ram)?;
        loop {
            match self.lander.run(&mut self.engine, ram, limit) {
                Err(missed @ VcpuError::Overshot { .. }) => self.retry_from(ram, &checkpoint, missed)?,
                result => return result,
            }
            self.engine.prepare(ram, limit.time_offset_ns);
        }
    }

    fn complete(&mut self, ram: &mut Ram, value: u64) -> Result<Option<Exit>, VcpuError> {
        let next = self.engine.vcpu_mut().complete(ram, value)?;
        if next.is_none() {
            self.lander.access_completed(&mut self.engine)?;
        }
        Ok(next)
    }

    fn finish_instruction(&mut self, ram: &mut Ram) -> Result<Option<Exit>, VcpuError> {
        self.engine.vcpu_mut().finish_instruction(ram)
    }

    fn position(&self) -> Position {
        self.lander.position()
    }

    fn inject(&mut self, vector: u8) -> Result<(), VcpuError> {
        self.lander.interrupt_injected();
        self.engine.vcpu_mut().inject(vector)
    }

    fn save(&self) -> Result<VcpuState, VcpuError> {
        let Position { count, within, rip, registers } = self.position();
        let engine = self.engine.vcpu().save()?;
        Ok(VcpuState::Counting(Box::new(CountingState { engine, position: [count, within, rip, registers] })))
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), VcpuError> {
        let VcpuState::Counting(state) = state else {
            return Err(VcpuError::OtherEngine("one that counts branches"));
        };
        let [count, within, rip, registers] = state.position;
        self.restore_at(&state.engine, Position { count, within, rip, registers })
    }

    fn reset(&mut self, start: &Start) -> Result<(), VcpuError> {
        self.engine.vcpu_mut().reset(start)?;
        self.lander.reset(&mut self.engine)
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.engine.kicker()
    }

    fn report_written(&mut self, ram: &mut Ram) -> Result<(), VcpuError> {
        self.engine.vcpu_mut().report_written(ram)
    }

    fn change_registers(&mut self, change: &mut dyn FnMut(&mut GeneralRegisters)) -> Result<(), VcpuError> {
        self.engine.vcpu_mut().change_registers(change)
    }

    fn landings(&self) -> Landings {
        self.lander.stats()
    }
}
