//! The engine on `/dev/kvm`: the host's CPU executes the guest.
//!
//! A stock KVM cannot stop a guest after an exact number of instructions without counters. So positions are
//! synchronous exits ([`Positions::Exits`]): the places where the guest itself leaves, by a port, device memory, an MSR or
//! HLT. They are the same in every run, as are the first interrupt windows after them. A kick that comes between two is
//! answered at the next; what the guest did in between is not lost, for a replay does it again.
//! [`Positions::Steps`] is for tests: an exit after each instruction.
//!
//! KVM finishes an access when it is entered again. Mostly that is to run the guest on; where somebody has to be sure that an
//! instruction is done ([`Vcpu::settle`], a kick, a limit, an interrupt to deliver), it is entered with `immediate_exit` set,
//! which finishes the instruction and executes no other. Each access counts, so that positions do not depend on it; an
//! instruction with several has no whole boundary between them, and stops behind them all.

mod cpuid;
mod fpu;
mod host;
mod kick;
mod msr;
mod run_area;
mod state;
mod steered;
mod step;
mod trace;

use std::sync::Arc;

use entry::Position;
use kvm_bindings::*;
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use soft_cpu::CpuState;

use super::{Exit, General, Kick, Limit, Start, Vcpu, VcpuError, VcpuState, start_state};
use crate::ram::Ram;
use host::Vm;
use kick::Kicks;
use run_area::Access;
pub use steered::{counted, counted_by_steps};
use trace::Trace;

/// What the engine counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Positions {
    /// Synchronous exits.
    Exits,
    /// Single steps.
    Steps,
    /// Branches, which somebody else counts.
    Branches,
}

/// A saved vCPU of this engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvmState {
    /// Registers; `retired` is the position's count.
    pub cpu: CpuState,
    /// Digest of CPUID and of the host's model: only on an equal one does the guest go on as it would have.
    pub host: u64,
    /// The position's `within`.
    pub within: u64,
    /// Digest of all synchronous exits so far.
    pub trace: u64,
}

/// See the module.
pub struct KvmVcpu {
    /// Before `vm`, as it was made from it.
    vcpu: VcpuFd,
    vm: Vm,
    positions: Positions,
    /// Exits or steps so far.
    count: u64,
    /// Interrupts delivered since the last of them.
    within: u64,
    /// The guest was not run on since `count` changed: this is a position.
    at_position: bool,
    halted: bool,
    /// KVM breaks here.
    breakpoint: Option<u64>,
    /// The single-step flag is set in KVM.
    stepping: bool,
    access: Option<(Access, Exit)>,
    /// The last access is answered, and KVM was not entered since.
    unfinished: bool,
    trace: Trace,
    kicks: Arc<Kicks>,
}

/// What KVM_RUN came to.
enum Returned {
    /// It was interrupted by a signal, or `immediate_exit` was set.
    Interrupted,
    /// `kvm_run` says why.
    Exit(u32),
}

/// A call of KVM failed.
fn failed(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VcpuError {
    move |source| VcpuError::Kvm { what, source }
}

impl KvmVcpu {
    /// A vCPU for `ram`, to be given a state by [`Vcpu::reset`] or [`Vcpu::restore`].
    ///
    /// # Errors
    /// There is no usable `/dev/kvm`, or it lacks what the engine needs.
    pub fn new(ram: &Ram, positions: Positions) -> Result<KvmVcpu, VcpuError> {
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
            trace: Trace::default(),
            kicks: Arc::default(),
        })
    }

    fn load(&mut self, cpu: &CpuState) -> Result<(), VcpuError> {
        // What an access would still do to the registers is over before they are set.
        while self.access.take().is_some() || self.unfinished {
            self.finish()?;
        }
        state::restore(&mut self.vcpu, cpu)?;
        self.halted = cpu.halted;
        // `ready_for_interrupt_injection` and the shared registers are of the last return of KVM_RUN.
        self.finish()?;
        Ok(())
    }

    /// Finishes what the last exit left unfinished, without executing another instruction. What the same instruction
    /// asks next, if it does.
    fn finish(&mut self) -> Result<Option<Exit>, VcpuError> {
        self.unfinished = false;
        self.vcpu.set_kvm_immediate_exit(1);
        let returned = run(&mut self.vcpu);
        self.vcpu.set_kvm_immediate_exit(0);
        match returned? {
            Returned::Interrupted => Ok(None),
            // The instruction is done, and KVM reports the step at once.
            Returned::Exit(KVM_EXIT_DEBUG) if self.stepping => Ok(None),
            Returned::Exit(KVM_EXIT_IO | KVM_EXIT_MMIO) => self.asked().map(Some),
            Returned::Exit(KVM_EXIT_SHUTDOWN) => Ok(Some(Exit::Shutdown)),
            Returned::Exit(reason) => Err(self.unexpected(reason)),
        }
    }

    /// The guest takes interrupts now.
    fn takes_interrupts(&mut self) -> bool {
        let run = self.vcpu.get_kvm_run();
        run.ready_for_interrupt_injection != 0 && run.if_flag != 0
    }

    /// What can be told at this boundary without running the guest.
    fn before_entry(&mut self, limit: &Limit) -> Result<Option<Exit>, VcpuError> {
        let reached = limit.until.is_some_and(|until| self.position() >= until);
        let kicked = self.at_position && !self.halted && self.kicks.pending();
        if self.unfinished
            && (reached || kicked || limit.interrupt_window)
            && let Some(more) = self.finish()?
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
            return Ok(Some(self.window()));
        }
        Ok(self.halted.then_some(Exit::Halted))
    }

    fn window(&mut self) -> Exit {
        self.at_position = false;
        self.within += 1;
        Exit::InterruptWindow
    }

    /// Runs the guest to its next synchronous exit, or until somebody kicks.
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

    /// Enters the guest once. `None`: there is nothing to tell yet.
    fn enter(&mut self, limit: &Limit) -> Result<Option<Exit>, VcpuError> {
        self.at_position = false;
        self.unfinished = false;
        self.vcpu.get_kvm_run().request_interrupt_window = limit.interrupt_window.into();
        match self.kicks.while_running(&mut self.vcpu, run)? {
            Returned::Interrupted => Ok(self.kicks.take_news().then_some(Exit::Between)),
            Returned::Exit(reason) => self.handle(reason, limit),
        }
    }

    fn handle(&mut self, reason: u32, limit: &Limit) -> Result<Option<Exit>, VcpuError> {
        match reason {
            KVM_EXIT_IO | KVM_EXIT_MMIO => self.asked().map(Some),
            KVM_EXIT_HLT => {
                self.halted = true;
                self.trace.halt(run_area::registers(&mut self.vcpu));
                self.arrive();
                Ok(Some(Exit::Halted))
            }
            KVM_EXIT_X86_RDMSR | KVM_EXIT_X86_WRMSR => {
                self.msr(reason == KVM_EXIT_X86_WRMSR, limit.time_offset_ns)?;
                Ok(None)
            }
            KVM_EXIT_IRQ_WINDOW_OPEN if limit.interrupt_window => Ok(Some(self.window())),
            // The task priority has no effect without a local APIC.
            KVM_EXIT_SET_TPR | KVM_EXIT_INTR => Ok(None),
            KVM_EXIT_DEBUG if self.stepping => {
                self.arrive();
                Ok(None)
            }
            KVM_EXIT_SHUTDOWN => Ok(Some(Exit::Shutdown)),
            other => Err(self.unexpected(other)),
        }
    }

    /// The guest asks something of a port or of memory.
    fn asked(&mut self) -> Result<Exit, VcpuError> {
        let access = run_area::access(&mut self.vcpu);
        let access = access.unwrap_or_else(|| unreachable!("the caller has seen an access"));
        let exit = access.exit(&mut self.vcpu);
        self.access = Some((access, exit));
        Ok(exit)
    }

    fn msr(&mut self, write: bool, time_ns: u64) -> Result<(), VcpuError> {
        let (number, value) = run_area::msr(&mut self.vcpu);
        let answer = if write { msr::write(number).then_some(value) } else { msr::read(number, time_ns) };
        run_area::answer_msr(&mut self.vcpu, answer);
        self.trace.msr(run_area::registers(&mut self.vcpu), write, number, answer);
        self.finish()?;
        // With #GP on its way this is no boundary: the next exit counts for both.
        if answer.is_some() {
            self.arrive();
        }
        Ok(())
    }

    /// An access is answered, or an instruction has left otherwise or was stepped over: this is the next position.
    fn arrive(&mut self) {
        self.count += 1;
        self.within = 0;
        self.at_position = true;
        if self.positions == Positions::Exits {
            self.trace.complete();
        }
    }

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

/// KVM_RUN.
fn run(vcpu: &mut VcpuFd) -> Result<Returned, VcpuError> {
    match vcpu.run() {
        Ok(_) => Ok(Returned::Exit(vcpu.get_kvm_run().exit_reason)),
        Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => Ok(Returned::Interrupted),
        Err(e) => Err(failed("KVM_RUN")(e)),
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self, ram: &mut Ram, limit: &Limit) -> Result<Exit, VcpuError> {
        assert!(self.vm.is_of(ram), "a vCPU runs with the RAM that it was made for");
        // KVM derives nothing from RAM that it does not follow by itself.
        ram.take_changed(|_| ());
        if let Some(target) = limit.until.filter(|until| self.count > until.count) {
            return Err(VcpuError::Overshot { engine: "kvm", target, now: self.position() });
        }
        match self.positions {
            Positions::Exits | Positions::Branches => self.run_to_exit(limit),
            Positions::Steps => self.run_steps(ram, limit),
        }
    }

    fn complete(&mut self, ram: &mut Ram, value: u64) -> Result<Option<Exit>, VcpuError> {
        assert!(self.vm.is_of(ram), "a vCPU runs with the RAM that it was made for");
        let Some((access, exit)) = self.access.take() else { return Ok(None) };
        self.trace.access(run_area::registers(&mut self.vcpu), &exit, value);
        if let Some(rest) = access.answer(&mut self.vcpu, value) {
            let exit = rest.exit(&mut self.vcpu);
            self.access = Some((rest, exit));
            return Ok(Some(exit));
        }
        self.unfinished = true;
        // A step counts when it is done, and KVM would do the next instruction along with it.
        let next = if self.positions == Positions::Steps { self.finish()? } else { None };
        if next.is_none() {
            self.arrive();
        }
        Ok(next)
    }

    fn settle(&mut self, ram: &mut Ram) -> Result<Option<Exit>, VcpuError> {
        assert!(self.vm.is_of(ram), "a vCPU runs with the RAM that it was made for");
        if self.unfinished { self.finish() } else { Ok(None) }
    }

    fn position(&self) -> Position {
        Position { within: self.within, ..Position::exact(self.count) }
    }

    fn inject(&mut self, vector: u8) -> Result<(), VcpuError> {
        self.halted = false;
        // KVM says it anew at its next return only.
        self.vcpu.get_kvm_run().ready_for_interrupt_injection = 0;
        run_area::interrupt(&self.vcpu, vector).map_err(failed("KVM_INTERRUPT"))
    }

    fn save(&self) -> Result<VcpuState, VcpuError> {
        assert!(!self.unfinished, "a vCPU is saved at a whole boundary");
        let cpu = state::save(&self.vcpu, self.count, self.halted)?;
        Ok(VcpuState::Kvm(Box::new(KvmState {
            cpu,
            host: self.vm.cpu,
            within: self.within,
            trace: self.trace.chain,
        })))
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), VcpuError> {
        let VcpuState::Kvm(state) = state else { return Err(VcpuError::OtherEngine("kvm")) };
        if state.host != self.vm.cpu {
            return Err(VcpuError::OtherCpu);
        }
        self.load(&state.cpu)?;
        (self.count, self.within) = (state.cpu.retired, state.within);
        self.at_position = state.within == 0;
        self.trace = Trace::from(state.trace);
        Ok(())
    }

    fn reset(&mut self, start: &Start) -> Result<(), VcpuError> {
        self.load(&start_state(start, self.count))?;
        self.at_position = true;
        Ok(())
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.kicks.clone()
    }

    fn change_registers(&mut self, change: &mut dyn FnMut(&mut General)) -> Result<(), VcpuError> {
        assert!(!self.unfinished, "registers are changed at a whole boundary");
        let mut regs = self.vcpu.get_regs().map_err(failed("reading registers"))?;
        let mut general = General { gpr: state::general(&regs), rip: regs.rip, rflags: regs.rflags };
        change(&mut general);
        regs = state::general_registers(&general);
        self.vcpu.set_regs(&regs).map_err(failed("setting registers"))?;
        *run_area::registers(&mut self.vcpu) = regs;
        Ok(())
    }

    fn report_written(&mut self, ram: &mut Ram) -> Result<(), VcpuError> {
        self.vm.report_written(ram)
    }

    fn take_exits(&mut self) -> Vec<u16> {
        self.trace.take()
    }
}
