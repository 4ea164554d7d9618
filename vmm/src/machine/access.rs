//! What the machine does when an instruction of the guest accesses a device.

use entry::End;

use super::{Machine, MachineError, Stop};
use crate::boot::rewrite;
use crate::bus::BusTarget;
use crate::devices::{DeviceContext, PowerRequest};
use crate::vcpu::Exit;

impl Machine {
    /// Serves an access of the guest to a device, up to the end of its instruction.
    pub(super) fn serve_access(&mut self, mut exit: Exit) -> Result<Option<Stop>, MachineError> {
        loop {
            if matches!(exit, Exit::PioOut { port, .. } if port == u16::from(rewrite::PORT)) {
                match self.rewritten_exit()? {
                    (Some(next), _) => exit = next,
                    (None, stop) => return Ok(stop.or_else(|| self.after_access())),
                }
                continue;
            }
            let value = self.dispatch(exit);
            if let Some(question) = &self.effects.question {
                self.unfinished = Some(value);
                return Ok(Some(Stop::Question(question.clone())));
            }
            match self.complete(value)? {
                None => return Ok(self.after_access()),
                Some(Exit::Shutdown) => return Ok(Some(Stop::End(End::TripleFault))),
                Some(next) => exit = next,
            }
        }
    }

    /// Answers an access of the guest. If there is something to report, the instruction is finished first: reports are made at
    /// instruction boundaries.
    fn complete(&mut self, value: u64) -> Result<Option<Exit>, MachineError> {
        let next = self.vcpu.complete(&mut self.ram, value)?;
        if next.is_some() || !(self.has_outputs() || self.effects.request.is_some()) {
            return Ok(next);
        }
        Ok(self.vcpu.finish_instruction(&mut self.ram)?)
    }

    /// Finishes the present instruction, so that the machine is at an instruction boundary.
    pub(super) fn reach_boundary(&mut self) -> Result<Option<Stop>, MachineError> {
        while let Some(exit) = self.vcpu.finish_instruction(&mut self.ram)? {
            let stop = match exit {
                Exit::Shutdown => Some(Stop::End(End::TripleFault)),
                exit => self.serve_access(exit)?,
            };
            if stop.is_some() {
                return Ok(stop);
            }
        }
        Ok(None)
    }

    /// Finishes the instruction whose question was answered, so that the machine is at an instruction boundary. Returns `None`
    /// if there is nothing more to report.
    ///
    /// # Errors
    /// Those of the engine.
    pub fn finish_instruction(&mut self) -> Result<Option<Stop>, MachineError> {
        if let Some(question) = &self.effects.question {
            return Ok(Some(Stop::Question(question.clone())));
        }
        let Some(value) = self.unfinished.take() else { return Ok(None) };
        let mut stop = match self.complete(value)? {
            None => self.after_access(),
            Some(Exit::Shutdown) => Some(Stop::End(End::TripleFault)),
            Some(next) => self.serve_access(next)?,
        };
        if stop.is_none() {
            stop = self.reach_boundary()?;
        }
        self.fire_timers();
        Ok(stop)
    }

    fn after_access(&mut self) -> Option<Stop> {
        match self.effects.request.take() {
            None => self.has_outputs().then_some(Stop::Outputs),
            Some(request) => {
                self.flush_console();
                Some(Stop::End(match request {
                    PowerRequest::PowerOff => End::PowerOff,
                    PowerRequest::Reset => End::Reboot,
                }))
            }
        }
    }

    /// The one dispatch of all accesses to devices. An address without a device reads as ones.
    fn dispatch(&mut self, exit: Exit) -> u64 {
        let now_ns = self.clock.time_ns(self.vcpu.position());
        let mut cx = DeviceContext { now_ns, memory: self.ram.memory(), effects: &mut self.effects };
        match exit {
            Exit::PioIn { port, size } => {
                self.counts.pio += 1;
                (0..size).fold(0, |value, i| {
                    let port = port.wrapping_add(i as u16);
                    let byte = match self.ports.find(port.into(), 1) {
                        Some((target, offset)) => self.devices.read_port(target, port, offset, &mut cx),
                        None => 0xff,
                    };
                    value | (byte as u64) << (8 * i)
                })
            }
            Exit::PioOut { port, size, value } => {
                self.counts.pio += 1;
                for i in 0..size {
                    let port = port.wrapping_add(i as u16);
                    if let Some((target, offset)) = self.ports.find(port.into(), 1) {
                        let byte = (value >> (8 * i)) as u8;
                        self.devices.write_port(target, port, offset, byte, &mut cx);
                    }
                }
                0
            }
            Exit::MmioRead { addr, size } => {
                self.counts.mmio += 1;
                match self.memory.find(addr, size.into()) {
                    Some((BusTarget::Virtio(slot), offset)) => self.devices.read_virtio(slot, offset, size),
                    _ => u64::MAX >> (64 - 8 * size as u32),
                }
            }
            Exit::MmioWrite { addr, size, value } => {
                self.counts.mmio += 1;
                if let Some((BusTarget::Virtio(slot), offset)) = self.memory.find(addr, size.into()) {
                    self.devices.write_virtio(slot, offset, size, value, &mut cx);
                }
                0
            }
            other => unreachable!("{other:?} is not an access to a device"),
        }
    }
}
