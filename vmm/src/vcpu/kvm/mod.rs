//! The engine on `/dev/kvm`: the host's CPU executes the guest.
//!
//! Without counters an unpatched KVM cannot stop a guest after an exact number of instructions. So positions are synchronous
//! exits ([`KvmPositions::Exits`]): accesses to ports, device memory and MSRs, and HLT. They are the same in every run, and so
//! is the first interrupt window after each. A kick that comes between two exits is answered at the next one. What the guest
//! does in between is not lost, because a replay repeats it. [`KvmPositions::Steps`], with an exit after each instruction, is
//! for tests.
//!
//! KVM finishes an access at its next entry, which usually runs the guest on as well. Where the instruction has to be finished
//! first ([`Vcpu::finish_instruction`], a kick, a limit, an interrupt to deliver), KVM is entered with `immediate_exit` set,
//! which finishes the instruction and executes no other. Each access counts, so positions do not depend on when that is done.
//! An instruction with several accesses has no instruction boundary between them, and stops after the last.

mod cpuid;
mod fpu;
mod kick;
mod msr;
mod run_area;
mod state;
mod steerable;
mod step;
mod trace;
mod vm;

use std::sync::Arc;

use entry::Position;
use kvm_bindings::*;
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use soft_cpu::CpuState;

use super::{Exit, GeneralRegisters, Kick, Limit, Start, Vcpu, VcpuError, VcpuState, start_state};
use crate::ram::Ram;
use kick::VcpuKicks;
use run_area::PendingAccess;
pub use steerable::{counting_vcpu, step_counting_vcpu};
use trace::ExitTrace;
use vm::Vm;

/// What positions count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvmPositions {
    /// Synchronous exits.
    Exits,
    /// Single steps.
    Steps,
    /// Branches, which [`super::landing`] counts.
    Branches,
}

/// The saved state of a [`KvmVcpu`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvmState {
    /// Registers; `retired` is the position's count.
    pub cpu: CpuState,
    /// Digest of the guest's CPUID table and of the host's CPU model. The state can be restored only where it is equal.
    pub host: u64,
    /// The position's `within`.
    pub within: u64,
    /// Digest of all synchronous exits so far.
    pub trace: u64,
}

/// A vCPU on KVM.
pub struct KvmVcpu {
    /// Dropped before `vm`, to which it belongs.
    vcpu: VcpuFd,
    vm: Vm,
    positions: KvmPositions,
    /// Exits or steps so far: the position's count.
    count: u64,
    /// Interrupts delivered since the last exit or step: the position's `within`.
    within: u64,
    /// The guest has not run since `count` changed, so it is at a position.
    at_position: bool,
    halted: bool,
    /// Where the breakpoint is that is set in KVM.
    breakpoint: Option<u64>,
    /// The single-step flag is set in KVM.
    stepping: bool,
    /// The access that is not answered yet.
    access: Option<(PendingAccess, Exit)>,
    /// The last access is answered, but KVM was not entered since to finish its instruction.
    unfinished: bool,
    trace: ExitTrace,
    kicks: Arc<VcpuKicks>,
}

/// How KVM_RUN returned.
enum Returned {
    /// It was interrupted by a signal, or `immediate_exit` was set.
    Interrupted,
    /// With this exit reason; `kvm_run` has the details.
    Exit(u32),
}

/// Makes the error of a call of KVM that was to do `what`.
fn failed(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VcpuError {
    move |source| VcpuError::Kvm { what, source }
}

impl KvmVcpu {
    /// A vCPU for `ram`. Its state has to be set by [`Vcpu::reset`] or [`Vcpu::restore`].
    ///
    /// # Errors
    /// `/dev/kvm` cannot be opened, or lacks what the engine needs.
    pub fn new(ram: &Ram, positions: KvmPositions) -> Result<KvmVcpu, VcpuError> {
        kick::install();
        let (vm, mut vcpu) = Vm::new(ram)?;
        run_area::share_registers(&mut vcpu);
        Ok(KvmVcpu {
            vcpu,
            vm,
            positions,
            count: 0,
            within: 0,
            at_position: true,
            halted: false,
            breakpoint: None,
            stepping: false,
            access: None,
            unfinished: false,
            trace: ExitTrace::default(),
            kicks: Arc::default(),
        })
    }

    /// Sets the whole state of the CPU.
    fn load_state(&mut self, cpu: &CpuState) -> Result<(), VcpuError> {
        // A pending access is finished first, because it would still change registers.
        while self.access.take().is_some() || self.unfinished {
            self.finish_without_running()?;
        }
        state::restore(&mut self.vcpu, cpu)?;
        self.halted = cpu.halted;
        // KVM updates `ready_for_interrupt_injection` and the shared registers only when KVM_RUN returns.
        self.finish_without_running()?;
        Ok(())
    }

    /// Finishes the instruction of the last exit without executing another one. `Some`: the next access of the same
    /// instruction.
    fn finish_without_running(&mut self) -> Result<Option<Exit>, VcpuError> {
        self.unfinished = false;
        self.vcpu.set_kvm_immediate_exit(1);
        let returned = run(&mut self.vcpu);
        self.vcpu.set_kvm_immediate_exit(0);
        match returned? {
            Returned::Interrupted => Ok(None),
            // The instruction is finished, and KVM reports the single step over it at once.
            Returned::Exit(KVM_EXIT_DEBUG) if self.stepping => Ok(None),
            Returned::Exit(KVM_EXIT_IO | KVM_EXIT_MMIO) => self.begin_access().map(Some),
            Returned::Exit(KVM_EXIT_SHUTDOWN) => Ok(Some(Exit::Shutdown)),
            Returned::Exit(reason) => Err(self.unexpected(reason)),
        }
    }

    /// Whether the guest can take an interrupt now.
    fn takes_interrupts(&mut self) -> bool {
        let run = self.vcpu.get_kvm_run();
        run.ready_for_interrupt_injection != 0 && run.if_flag != 0
    }

    /// The exit that there is at this boundary without running the guest, if any.
    fn before_entry(&mut self, limit: &Limit) -> Result<Option<Exit>, VcpuError> {
        let reached = limit.until.is_some_and(|until| self.position() >= until);
        let kicked = self.at_position && !self.halted && self.kicks.pending();
        if self.unfinished
            && (reached || kicked || limit.interrupt_window)
            && let Some(more) = self.finish_without_running()?
        {
            return Ok(Some(more));
        }
        if reached {
            return Ok(Some(Exit::Reached));
        }
        if kicked && self.kicks.take() {
            return Ok(Some(Exit::Kicked));
        }
        if limit.interrupt_window && self.takes_interrupts() {
            return Ok(Some(self.open_window()));
        }
        Ok(self.halted.then_some(Exit::Halted))
    }

    /// The exit for an interrupt that the guest can take now.
    fn open_window(&mut self) -> Exit {
        self.at_position = false;
        self.within += 1;
        Exit::InterruptWindow
    }

    /// Runs the guest to its next synchronous exit, or until it is kicked.
    fn run_to_exit(&mut self, limit: &Limit) -> Result<Exit, VcpuError> {
        loop {
            if let Some(exit) = self.before_entry(limit)? {
                return Ok(exit);
            }
            if let Some(exit) = self.enter(limit)? {
                return Ok(exit);
            }
        }
    }

    /// Enters the guest once. `None`: it has to be run on.
    fn enter(&mut self, limit: &Limit) -> Result<Option<Exit>, VcpuError> {
        self.at_position = false;
        self.unfinished = false;
        self.vcpu.get_kvm_run().request_interrupt_window = limit.interrupt_window.into();
        match self.kicks.while_running(&mut self.vcpu, run)? {
            Returned::Interrupted => Ok(self.kicks.take_new().then_some(Exit::Between)),
            Returned::Exit(reason) => self.handle_exit(reason, limit),
        }
    }

    /// Handles an exit of KVM. `None`: the guest has to be run on.
    fn handle_exit(&mut self, reason: u32, limit: &Limit) -> Result<Option<Exit>, VcpuError> {
        match reason {
            KVM_EXIT_IO | KVM_EXIT_MMIO => self.begin_access().map(Some),
            KVM_EXIT_HLT => {
                self.halted = true;
                self.trace.add_halt(run_area::registers(&mut self.vcpu));
                self.count_position();
                Ok(Some(Exit::Halted))
            }
            KVM_EXIT_X86_RDMSR | KVM_EXIT_X86_WRMSR => {
                self.answer_msr(reason == KVM_EXIT_X86_WRMSR, limit.time_offset_ns)?;
                Ok(None)
            }
            KVM_EXIT_IRQ_WINDOW_OPEN if limit.interrupt_window => Ok(Some(self.open_window())),
            // The task priority has no effect, because there is no local APIC.
            KVM_EXIT_SET_TPR | KVM_EXIT_INTR => Ok(None),
            KVM_EXIT_DEBUG if self.stepping => {
                self.count_position();
                Ok(None)
            }
            KVM_EXIT_SHUTDOWN => Ok(Some(Exit::Shutdown)),
            other => Err(self.unexpected(other)),
        }
    }

    /// Begins the guest's access to a port or to device memory.
    fn begin_access(&mut self) -> Result<Exit, VcpuError> {
        let access = run_area::access(&mut self.vcpu);
        let access = access.unwrap_or_else(|| unreachable!("the caller has seen an access"));
        let exit = access.exit(&mut self.vcpu);
        self.access = Some((access, exit));
        Ok(exit)
    }

    /// Answers the guest's access to a model-specific register.
    fn answer_msr(&mut self, write: bool, time_ns: u64) -> Result<(), VcpuError> {
        let (number, value) = run_area::msr(&mut self.vcpu);
        let answer = if write { msr::write(number).then_some(value) } else { msr::read(number, time_ns) };
        run_area::answer_msr(&mut self.vcpu, answer);
        self.trace.add_msr(run_area::registers(&mut self.vcpu), write, number, answer);
        self.finish_without_running()?;
        // While #GP is being delivered there is no instruction boundary: the next exit counts for both.
        if answer.is_some() {
            self.count_position();
        }
        Ok(())
    }

    /// Counts the next position: an access was answered, the guest made another exit, or an instruction was stepped over.
    fn count_position(&mut self) {
        self.count += 1;
        self.within = 0;
        self.at_position = true;
        if self.positions == KvmPositions::Exits {
            self.trace.end_exit();
        }
    }

    /// The error for an exit that the engine cannot handle.
    fn unexpected(&mut self, reason: u32) -> VcpuError {
        let rip = run_area::registers(&mut self.vcpu).rip;
        match reason {
            KVM_EXIT_INTERNAL_ERROR => {
                let (suberror, bytes) = run_area::internal_error(&mut self.vcpu);
                VcpuError::CannotExecute { rip, suberror, bytes }
            }
            _ => VcpuError::UnknownExit { rip, reason },
        }
    }
}

/// Calls KVM_RUN.
fn run(vcpu: &mut VcpuFd) -> Result<Returned, VcpuError> {
    match vcpu.run() {
        Ok(_) => Ok(Returned::Exit(vcpu.get_kvm_run().exit_reason)),
        Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => Ok(Returned::Interrupted),
        Err(e) => Err(failed("KVM_RUN")(e)),
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self, ram: &mut Ram, limit: &Limit) -> Result<Exit, VcpuError> {
        assert!(self.vm.is_of(ram), "a vCPU must be used with the RAM that it was made for");
        // KVM itself notices changes of RAM, so nothing has to be dropped.
        ram.take_changed(|_| ());
        if let Some(target) = limit.until.filter(|until| self.count > until.count) {
            return Err(VcpuError::Overshot { engine: "kvm", target, now: self.position() });
        }
        match self.positions {
            KvmPositions::Exits | KvmPositions::Branches => self.run_to_exit(limit),
            KvmPositions::Steps => self.run_steps(ram, limit),
        }
    }

    fn complete(&mut self, ram: &mut Ram, value: u64) -> Result<Option<Exit>, VcpuError> {
        assert!(self.vm.is_of(ram), "a vCPU must be used with the RAM that it was made for");
        let Some((access, exit)) = self.access.take() else { return Ok(None) };
        self.trace.add_access(run_area::registers(&mut self.vcpu), &exit, value);
        if let Some(rest) = access.answer(&mut self.vcpu, value) {
            let exit = rest.exit(&mut self.vcpu);
            self.access = Some((rest, exit));
            return Ok(Some(exit));
        }
        self.unfinished = true;
        // A step counts when it is finished, and KVM would execute the next instruction along with it.
        let next = if self.positions == KvmPositions::Steps { self.finish_without_running()? } else { None };
        if next.is_none() {
            self.count_position();
        }
        Ok(next)
    }

    fn finish_instruction(&mut self, ram: &mut Ram) -> Result<Option<Exit>, VcpuError> {
        assert!(self.vm.is_of(ram), "a vCPU must be used with the RAM that it was made for");
        if self.unfinished { self.finish_without_running() } else { Ok(None) }
    }

    fn position(&self) -> Position {
        Position { within: self.within, ..Position::exact(self.count) }
    }

    fn inject(&mut self, vector: u8) -> Result<(), VcpuError> {
        self.halted = false;
        // KVM updates this flag only when KVM_RUN returns.
        self.vcpu.get_kvm_run().ready_for_interrupt_injection = 0;
        run_area::queue_interrupt(&self.vcpu, vector).map_err(failed("KVM_INTERRUPT"))
    }

    fn save(&self) -> Result<VcpuState, VcpuError> {
        assert!(!self.unfinished, "a vCPU is saved at an instruction boundary");
        let cpu = state::save(&self.vcpu, self.count, self.halted)?;
        Ok(VcpuState::Kvm(Box::new(KvmState {
            cpu,
            host: self.vm.cpu_digest,
            within: self.within,
            trace: self.trace.chain,
        })))
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), VcpuError> {
        let VcpuState::Kvm(state) = state else { return Err(VcpuError::OtherEngine("kvm")) };
        if state.host != self.vm.cpu_digest {
            return Err(VcpuError::OtherCpu);
        }
        self.load_state(&state.cpu)?;
        (self.count, self.within) = (state.cpu.retired, state.within);
        self.at_position = state.within == 0;
        self.trace = ExitTrace::resumed(state.trace);
        Ok(())
    }

    fn reset(&mut self, start: &Start) -> Result<(), VcpuError> {
        self.load_state(&start_state(start, self.count))?;
        self.at_position = true;
        Ok(())
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.kicks.clone()
    }

    fn change_registers(&mut self, change: &mut dyn FnMut(&mut GeneralRegisters)) -> Result<(), VcpuError> {
        assert!(!self.unfinished, "registers are changed at an instruction boundary");
        let mut regs = self.vcpu.get_regs().map_err(failed("reading registers"))?;
        let mut general = GeneralRegisters { gpr: state::general(&regs), rip: regs.rip, rflags: regs.rflags };
        change(&mut general);
        regs = state::general_registers(&general);
        self.vcpu.set_regs(&regs).map_err(failed("setting registers"))?;
        *run_area::registers(&mut self.vcpu) = regs;
        Ok(())
    }

    fn report_written(&mut self, ram: &mut Ram) -> Result<(), VcpuError> {
        self.vm.report_written(ram)
    }

    fn take_exit_checks(&mut self) -> Vec<u16> {
        self.trace.take_check_words()
    }
}
