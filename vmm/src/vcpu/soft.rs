//! The software CPU as an engine: positions are exact counts of retired instructions.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use entry::Position;
use soft_cpu::state::{Registers, Segment, TableRegister, seg};
use soft_cpu::{CpuState, Exit as SoftExit, RunLimit, SoftCpu};

use super::{Exit, General, Kick, Limit, Start, Vcpu, VcpuError, VcpuState};
use crate::ram::Ram;

/// Runs of a block before it is translated: what runs less often is not worth the time.
const HOT: u8 = 60;

/// See the module.
pub struct SoftVcpu {
    cpu: SoftCpu,
    kick: Arc<AtomicBool>,
}

pub(super) struct SoftKick(pub(super) Arc<AtomicBool>);

impl Kick for SoftKick {
    fn kick(&self) {
        self.0.store(true, Ordering::Release);
    }
}

impl SoftVcpu {
    /// A CPU that interprets, for `ram_len` bytes of RAM, to be given a state by [`Vcpu::reset`] or [`Vcpu::restore`].
    pub fn new(ram_len: u64) -> SoftVcpu {
        let cpu = SoftCpu::new(ram_len);
        SoftVcpu { kick: cpu.kicker(), cpu }
    }

    /// The same, with translated code for what runs often. A host that allows none has the interpreter do it all, and says so.
    pub fn translating(ram_len: u64) -> SoftVcpu {
        let mut vcpu = SoftVcpu::new(ram_len);
        match translator::Native::new() {
            Ok(native) => vcpu.cpu.set_translator(Box::new(native), HOT),
            Err(e) => {
                eprintln!("no memory for translated code ({e}): the software CPU interprets, which is slower")
            }
        }
        vcpu
    }

    /// The CPU itself, for who simulates an engine with it.
    pub(super) fn cpu(&self) -> &SoftCpu {
        &self.cpu
    }

    /// See [`SoftVcpu::cpu`].
    pub(super) fn cpu_mut(&mut self) -> &mut SoftCpu {
        &mut self.cpu
    }

    /// What precedes a run.
    pub(super) fn prepare(&mut self, ram: &mut Ram, time_offset_ns: u64) {
        self.take_changed(ram);
        self.cpu.set_tsc_offset(time_offset_ns);
    }

    fn take_changed(&mut self, ram: &mut Ram) {
        ram.take_changed(|page| self.cpu.ram_changed(page));
    }

    /// After a kick: a fault or interrupt that is delivered does not move the position, so a kick may stop where
    /// the position was reached before. Going on to the next retired instruction makes it one that can be landed on.
    fn land(&mut self, ram: &mut Ram, window: bool) -> SoftExit {
        let limit = RunLimit { until: self.cpu.retired() + 1, interrupt_window: window };
        loop {
            match self.cpu.run(ram.as_mut_slice(), &limit) {
                SoftExit::Reached => return SoftExit::Kicked,
                // Kicked once more before the instruction: still no place to stop.
                SoftExit::Kicked => {}
                other => {
                    self.kick.store(true, Ordering::Release);
                    return other;
                }
            }
        }
    }
}

impl Vcpu for SoftVcpu {
    fn run(&mut self, ram: &mut Ram, limit: &Limit) -> Result<Exit, VcpuError> {
        self.prepare(ram, limit.time_offset_ns);
        let until = limit.until.map_or(u64::MAX, |position| position.count);
        if self.cpu.retired() > until {
            let target = Position::exact(until);
            return Err(VcpuError::Overshot { engine: "soft", target, now: self.position() });
        }
        if limit.interrupt_window && self.cpu.interruptible() && self.cpu.retired() < until {
            return Ok(Exit::InterruptWindow);
        }
        let limit = RunLimit { until, interrupt_window: limit.interrupt_window };
        let exit = match self.cpu.run(ram.as_mut_slice(), &limit) {
            SoftExit::Kicked => self.land(ram, limit.interrupt_window),
            exit => exit,
        };
        Ok(exit.into())
    }

    fn complete(&mut self, ram: &mut Ram, value: u64) -> Result<Option<Exit>, VcpuError> {
        self.take_changed(ram);
        Ok(self.cpu.complete(ram.as_mut_slice(), value).map(Exit::from))
    }

    fn position(&self) -> Position {
        Position::exact(self.cpu.retired())
    }

    fn inject(&mut self, vector: u8) -> Result<(), VcpuError> {
        self.cpu.inject(vector);
        Ok(())
    }

    fn save(&self) -> Result<VcpuState, VcpuError> {
        // The offset belongs to the machine's clock, which sets it anew for every run.
        let state = CpuState { tsc_offset: 0, ..self.cpu.save() };
        Ok(VcpuState::Soft(Box::new(state)))
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), VcpuError> {
        let VcpuState::Soft(state) = state else { return Err(VcpuError::OtherEngine("soft")) };
        self.cpu.restore(state);
        Ok(())
    }

    fn reset(&mut self, start: &Start) -> Result<(), VcpuError> {
        self.cpu.restore(&start_state(start, self.cpu.retired()));
        Ok(())
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::new(SoftKick(self.kick.clone()))
    }

    fn change_registers(&mut self, change: &mut dyn FnMut(&mut General)) -> Result<(), VcpuError> {
        let mut state = self.cpu.save();
        let mut general = General { gpr: state.gpr, rip: state.rip, rflags: state.rflags };
        change(&mut general);
        General { gpr: state.gpr, rip: state.rip, rflags: state.rflags } = general;
        self.cpu.restore(&state);
        Ok(())
    }

    fn report_written(&mut self, ram: &mut Ram) -> Result<(), VcpuError> {
        self.cpu.take_written(|page| ram.note_written(page));
        Ok(())
    }
}

impl From<SoftExit> for Exit {
    fn from(exit: SoftExit) -> Exit {
        match exit {
            SoftExit::Reached => Exit::Reached,
            SoftExit::Kicked => Exit::Kicked,
            SoftExit::InterruptWindow => Exit::InterruptWindow,
            SoftExit::Hlt => Exit::Halted,
            SoftExit::PioIn { port, size } => Exit::PioIn { port, size },
            SoftExit::PioOut { port, size, value } => Exit::PioOut { port, size, value },
            SoftExit::MmioRead { addr, size } => Exit::MmioRead { addr, size },
            SoftExit::MmioWrite { addr, size, value } => Exit::MmioWrite { addr, size, value },
            SoftExit::Shutdown => Exit::Shutdown,
        }
    }
}

/// Registers at the 64-bit entry (Documentation/x86/boot.rst, "64-bit Boot Protocol").
pub fn start_state(start: &Start, retired: u64) -> CpuState {
    // Access rights as in SDM 3C table 24-2: present, DPL 0, accessed; code is 64-bit, data 32-bit; 4 KiB units.
    let code = Segment { selector: 0x10, attr: 0xa09b, limit: u32::MAX, base: 0 };
    let data = Segment { selector: 0x18, attr: 0xc093, limit: u32::MAX, base: 0 };
    let unusable = Segment { selector: 0, attr: 0, limit: 0, base: 0 };
    let mut segments = [data; 6];
    segments[seg::CS] = code;
    let mut gpr = [0; 16];
    gpr[soft_cpu::state::reg::RSI as usize] = start.boot_params;
    CpuState {
        gpr,
        rip: start.entry,
        rflags: 2,
        sys: Registers {
            seg: segments,
            ldtr: unusable,
            tr: Segment { selector: 0, attr: 0x8b, limit: 0xffff, base: 0 },
            gdtr: TableRegister { base: start.gdt, limit: 4 * 8 - 1 },
            cr0: 0x8005_0033,
            cr3: start.page_tables,
            cr4: 0x20,
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            efer: 0x500,
            pat: 0x0007_0406_0007_0406,
            ..Registers::default()
        },
        retired,
        // What is left is as after power-on.
        ..SoftCpu::new(crate::ram::PAGE as u64).save()
    }
}
