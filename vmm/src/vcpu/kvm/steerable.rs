//! KVM as a steerable engine: it can run the guest to a breakpoint, a single step or a signal, and count its branches.
//!
//! The counter is the host CPU's, or a simulated one. With the simulated one KVM single-steps the guest, and each conditional
//! branch that was stepped over counts. Everything else is the same.

use std::sync::Arc;
use std::time::Duration;

use kvm_bindings::*;
use vm_memory::{Bytes, GuestAddress};

use super::super::landing::policy::Margin;
use super::super::landing::{
    CountingVcpu, Lander, LandingStop, RunRequest, SteerableEngine, StopPoint, TickCounter, anchor,
    registers_digest,
};
use super::super::perf::events::{Core, CpuModel, branch_event};
use super::super::perf::{CounterConfig, ThreadCounter};
use super::super::simulated::{self, SimulatedCounter};
use super::super::{Exit, Kick, Limit, Vcpu, VcpuError};
use super::kick::{self, VcpuKicks};
use super::{KvmPositions, KvmVcpu, Returned, failed, run, run_area, state};
use crate::ram::Ram;

/// How long a kicked guest may run on: most make an exit by themselves, and a replay stops at an exit at no cost.
const GRACE: Duration = Duration::from_millis(1);
/// The widest margin, in branches: a position that is missed by more was not missed because of skid.
const MARGIN_MAX: u64 = 1 << 26;
/// DR6 of a debug exit: breakpoint 0 was hit.
const HIT_0: u64 = 1;
/// Page-table entries (SDM 3A, 4.5): present, a large page, never executed, the address.
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// The counter of the guest's branches.
enum KvmTickCounter {
    /// The host CPU's.
    Host(ThreadCounter),
    /// A simulated one, which counts the branches that are stepped over.
    Stepped(SimulatedCounter),
}

/// KVM and its counter.
pub struct SteerableKvm {
    kvm: KvmVcpu,
    counter: KvmTickCounter,
    time_offset_ns: u64,
}

/// A vCPU whose positions are counted by the host CPU's performance counter.
pub fn counting_vcpu(ram: &Ram) -> Result<Box<dyn Vcpu>, VcpuError> {
    let model = CpuModel::host();
    let event =
        branch_event(&model, Core::Big).ok_or_else(|| VcpuError::UnknownCounter(model.to_string()))?;
    let counter =
        KvmTickCounter::Host(ThreadCounter::new(CounterConfig::guest(event.config), kick::signal()));
    let lander = Lander::new(Margin::new(2 * event.skid, MARGIN_MAX));
    Ok(Box::new(CountingVcpu::new(SteerableKvm::new(ram, counter)?, lander)))
}

/// A vCPU whose positions are counted by single steps. For tests, with programs that [`KvmPositions::Steps`] can run.
pub fn step_counting_vcpu(ram: &Ram) -> Result<Box<dyn Vcpu>, VcpuError> {
    let counter = KvmTickCounter::Stepped(SimulatedCounter::new(simulated::SKID, 0));
    Ok(Box::new(CountingVcpu::new(SteerableKvm::new(ram, counter)?, simulated::lander())))
}

impl SteerableKvm {
    fn new(ram: &Ram, counter: KvmTickCounter) -> Result<SteerableKvm, VcpuError> {
        let mut kvm = KvmVcpu::new(ram, KvmPositions::Branches)?;
        kvm.kicks = Arc::new(VcpuKicks::with_grace_period(GRACE));
        Ok(SteerableKvm { kvm, counter, time_offset_ns: 0 })
    }

    /// The stop that there is without entering the guest, if any.
    fn before_entry(&mut self, request: &RunRequest) -> Result<Option<LandingStop>, VcpuError> {
        let stepped = matches!(self.counter, KvmTickCounter::Stepped(_));
        if self.kvm.unfinished
            && (request.window || stepped)
            && let Some(more) = self.kvm.finish_without_running()?
        {
            return Ok(Some(LandingStop::Exit(more)));
        }
        if request.window && self.kvm.takes_interrupts() {
            return Ok(Some(LandingStop::Exit(Exit::InterruptWindow)));
        }
        Ok(self.kvm.halted.then_some(LandingStop::Exit(Exit::Halted)))
    }

    /// Enters the guest once. `None`: it has to be run on.
    fn enter(&mut self, ram: &mut Ram, request: &RunRequest) -> Result<Option<LandingStop>, VcpuError> {
        let stepped = matches!(self.counter, KvmTickCounter::Stepped(_));
        let mut step = request.step;
        let mut branch = false;
        if stepped {
            self.kvm.deliver_interrupt(ram)?;
            // HLT is not stepped: KVM would report a step, and the guest would not halt.
            step |= self.kvm.byte_at_rip(ram)? != Some(super::step::HLT);
            let rip = run_area::registers(&mut self.kvm.vcpu).rip;
            let next = anchor::decode(&mut |at, bytes| self.fetch_code(ram, at, bytes), rip);
            branch = next.is_some_and(|i| anchor::is_conditional_branch(&i));
        }
        self.kvm.set_debug(request.breakpoint, step)?;
        self.kvm.unfinished = false;
        // Between two steps the guest's flags tell whether it can take an interrupt.
        self.kvm.vcpu.get_kvm_run().request_interrupt_window = (request.window && !stepped).into();
        let kicks = self.kvm.kicks.clone();
        let returned = kicks.while_running(&mut self.kvm.vcpu, run)?;
        let limit =
            Limit { until: None, interrupt_window: request.window, time_offset_ns: self.time_offset_ns };
        Ok(match returned {
            Returned::Interrupted => {
                Some(if kicks.take() { LandingStop::Kicked } else { LandingStop::Signal })
            }
            Returned::Exit(KVM_EXIT_DEBUG) if run_area::debug_status(&mut self.kvm.vcpu) & HIT_0 != 0 => {
                Some(LandingStop::Breakpoint)
            }
            Returned::Exit(KVM_EXIT_DEBUG) => {
                let signal = self.counter.stepped_over(branch);
                let signal = signal.then_some(LandingStop::Signal);
                if request.step { Some(LandingStop::Stepped) } else { signal }
            }
            Returned::Exit(KVM_EXIT_IRQ_WINDOW_OPEN) => {
                request.window.then_some(LandingStop::Exit(Exit::InterruptWindow))
            }
            Returned::Exit(reason) => self.kvm.handle_exit(reason, &limit)?.map(LandingStop::Exit),
        })
    }

    /// The guest-physical address from which the guest would fetch the code at `at`. Walks the page tables itself, because
    /// KVM_TRANSLATE would set accessed bits in them.
    fn guest_physical(&self, ram: &Ram, cr3: u64, at: u64) -> Option<u64> {
        let mut table = cr3 & ADDRESS;
        for level in (0..4u32).rev() {
            let entry = table + (at >> (12 + 9 * level) & 511) * 8;
            let entry: u64 = ram.memory().read_obj(GuestAddress(entry)).ok()?;
            if entry & (PRESENT | NO_EXECUTE) != PRESENT {
                return None;
            }
            if level == 0 || entry & LARGE != 0 {
                let inside = (1u64 << (12 + 9 * level)) - 1;
                return Some(entry & ADDRESS & !inside | at & inside);
            }
            table = entry & ADDRESS;
        }
        None
    }
}

impl KvmTickCounter {
    /// To be called after a step, over a branch if `branch`. `true`: the simulated counter signals an overflow.
    fn stepped_over(&mut self, branch: bool) -> bool {
        let KvmTickCounter::Stepped(counter) = self else { return false };
        if branch {
            counter.tick();
        }
        counter.take_signal()
    }
}

impl SteerableEngine for SteerableKvm {
    fn vcpu(&self) -> &dyn Vcpu {
        &self.kvm
    }

    fn vcpu_mut(&mut self) -> &mut dyn Vcpu {
        &mut self.kvm
    }

    fn prepare(&mut self, ram: &mut Ram, time_offset_ns: u64) {
        assert!(self.kvm.vm.is_of(ram), "a vCPU must be used with the RAM that it was made for");
        // KVM itself notices changes of RAM, so nothing has to be dropped.
        ram.take_changed(|_| ());
        self.time_offset_ns = time_offset_ns;
    }

    fn run_until_stop(&mut self, ram: &mut Ram, request: RunRequest) -> Result<LandingStop, VcpuError> {
        if request.resume {
            self.kvm.change_registers(&mut |r| r.rflags |= state::RF)?;
        }
        loop {
            if let Some(stop) = self.before_entry(&request)? {
                return Ok(stop);
            }
            if let Some(stop) = self.enter(ram, &request)? {
                return Ok(stop);
            }
        }
    }

    fn stop_point(&mut self) -> Result<StopPoint, VcpuError> {
        let vcpu = &self.kvm.vcpu;
        let regs = vcpu.get_regs().map_err(failed("reading registers"))?;
        let sregs = vcpu.get_sregs().map_err(failed("reading system registers"))?;
        let debug = vcpu.get_debug_regs().map_err(failed("reading debug registers"))?;
        let events = vcpu.get_vcpu_events().map_err(failed("reading events"))?;
        // `exception.injected` is ignored: a KVM that delivers exceptions by emulation leaves it set.
        let in_flight = events.exception.pending != 0 || events.interrupt.injected != 0;
        Ok(StopPoint {
            rip: regs.rip,
            registers: registers_digest(&state::general(&regs), regs.rflags, sregs.cr3),
            shadow: events.interrupt.shadow != 0,
            in_flight,
            debugs_itself: regs.rflags & state::TF != 0 || debug.dr7 & 0xff != 0,
        })
    }

    fn fetch_code(&mut self, ram: &mut Ram, at: u64, bytes: &mut anchor::CodeBytes) -> usize {
        let Ok(sregs) = self.kvm.vcpu.get_sregs() else { return 0 };
        let first = (4096 - (at as usize & 4095)).min(bytes.len());
        let read = |at: u64, to: &mut [u8]| {
            let place = self.guest_physical(ram, sregs.cr3, at);
            place.is_some_and(|place| ram.memory().read_slice(to, GuestAddress(place)).is_ok())
        };
        let (here, next_page) = bytes.split_at_mut(first);
        match read(at, here) {
            false => 0,
            true if !next_page.is_empty() && read(at.wrapping_add(first as u64), next_page) => bytes.len(),
            true => first,
        }
    }

    fn clear_resume_flag(&mut self) -> Result<(), VcpuError> {
        self.kvm.change_registers(&mut |r| r.rflags &= !state::RF)
    }

    fn counter(&mut self) -> &mut dyn TickCounter {
        match &mut self.counter {
            KvmTickCounter::Host(counter) => counter,
            KvmTickCounter::Stepped(counter) => counter,
        }
    }

    fn take_kick(&mut self) -> bool {
        self.kvm.kicks.take()
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.kvm.kicker()
    }
}
