//! The software CPU as an engine: positions are exact counts of retired instructions.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use entry::Position;
use soft_cpu::state::{Registers, Segment, TableRegister, seg};
use soft_cpu::{CpuExit, CpuState, RunLimit, SoftCpu};

use super::{Exit, GeneralRegisters, Kick, Limit, Start, Vcpu, VcpuError, VcpuState, VcpuWarning};
use crate::ram::Ram;

/// How often a block has to run before it is translated: with fewer runs translation does not pay.
const RUNS_BEFORE_TRANSLATION: u8 = 60;

/// A vCPU that is the software CPU.
pub struct SoftVcpu {
    cpu: SoftCpu,
    kick: Arc<AtomicBool>,
    warning: Option<VcpuWarning>,
}

/// Kicks the software CPU by setting a flag that it polls.
pub(super) struct SoftKick(pub(super) Arc<AtomicBool>);

impl Kick for SoftKick {
    fn kick(&self) {
        self.0.store(true, Ordering::Release);
    }
}

impl SoftVcpu {
    /// An interpreting CPU for `ram_len` bytes of RAM. Its state has to be set by [`Vcpu::reset`] or [`Vcpu::restore`].
    pub fn new(ram_len: u64) -> SoftVcpu {
        let cpu = SoftCpu::new(ram_len);
        SoftVcpu { kick: cpu.kicker(), cpu, warning: None }
    }

    /// A CPU like that of [`SoftVcpu::new`], with translated code for blocks that run often. On a host that allows none,
    /// the interpreter executes everything, and [`Vcpu::warning`] says so.
    pub fn translating(ram_len: u64) -> SoftVcpu {
        let mut vcpu = SoftVcpu::new(ram_len);
        match translator::NativeTranslator::new() {
            Ok(native) => vcpu.cpu.set_translator(Box::new(native), RUNS_BEFORE_TRANSLATION),
            Err(e) => vcpu.warning = Some(VcpuWarning::NoTranslatedCode(e)),
        }
        vcpu
    }

    /// Takes from the host now what [`SoftVcpu::translating`] needs, for this many CPUs at the same time.
    pub(super) fn reserve(count: usize) -> std::io::Result<()> {
        translator::NativeTranslator::reserve(count)
    }

    /// The CPU itself, for a simulated engine that is made of it.
    pub(super) fn cpu(&self) -> &SoftCpu {
        &self.cpu
    }

    /// See [`SoftVcpu::cpu`].
    pub(super) fn cpu_mut(&mut self) -> &mut SoftCpu {
        &mut self.cpu
    }

    /// Prepares a run: drops what was derived from changed pages, and sets the guest's time.
    pub(super) fn prepare(&mut self, ram: &mut Ram, time_offset_ns: u64) {
        self.take_changed(ram);
        self.cpu.set_tsc_offset(time_offset_ns);
    }

    /// Drops what the CPU has derived from pages that were changed.
    fn take_changed(&mut self, ram: &mut Ram) {
        ram.take_changed(|page| self.cpu.ram_changed(page));
    }

    /// Runs a kicked guest on until its next instruction has retired. The delivery of a fault or interrupt does not move the
    /// position, so the kick may have stopped the guest at a position where it was before; after an instruction it is at a
    /// new one, at which a replay can stop.
    fn run_to_next_instruction(&mut self, ram: &mut Ram, window: bool) -> CpuExit {
        let limit = RunLimit { until: self.cpu.retired() + 1, interrupt_window: window };
        loop {
            match self.cpu.run(ram.as_mut_slice(), &limit) {
                CpuExit::Reached => return CpuExit::Kicked,
                // Kicked again before the instruction has retired: go on.
                CpuExit::Kicked => {}
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
            CpuExit::Kicked => self.run_to_next_instruction(ram, limit.interrupt_window),
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
        // The offset belongs to the machine's clock, which sets it for every run.
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

    fn change_registers(&mut self, change: &mut dyn FnMut(&mut GeneralRegisters)) -> Result<(), VcpuError> {
        let mut state = self.cpu.save();
        let mut general = GeneralRegisters { gpr: state.gpr, rip: state.rip, rflags: state.rflags };
        change(&mut general);
        GeneralRegisters { gpr: state.gpr, rip: state.rip, rflags: state.rflags } = general;
        self.cpu.restore(&state);
        Ok(())
    }

    fn warning(&self) -> Option<&VcpuWarning> {
        self.warning.as_ref()
    }

    fn report_written(&mut self, ram: &mut Ram) -> Result<(), VcpuError> {
        self.cpu.take_written(|page| ram.note_written(page));
        Ok(())
    }
}

impl From<CpuExit> for Exit {
    fn from(exit: CpuExit) -> Exit {
        match exit {
            CpuExit::Reached => Exit::Reached,
            CpuExit::Kicked => Exit::Kicked,
            CpuExit::InterruptWindow => Exit::InterruptWindow,
            CpuExit::Hlt => Exit::Halted,
            CpuExit::PioIn { port, size } => Exit::PioIn { port, size },
            CpuExit::PioOut { port, size, value } => Exit::PioOut { port, size, value },
            CpuExit::MmioRead { addr, size } => Exit::MmioRead { addr, size },
            CpuExit::MmioWrite { addr, size, value } => Exit::MmioWrite { addr, size, value },
            CpuExit::Shutdown => Exit::Shutdown,
        }
    }
}

/// The CPU's state at the 64-bit entry (Documentation/x86/boot.rst, "64-bit Boot Protocol").
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
        // All others are as after power-on.
        ..SoftCpu::new(crate::ram::PAGE as u64).save()
    }
}
