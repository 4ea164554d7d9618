//! The engine as one that can be steered: run to a breakpoint, a step or a signal, with a counter of branches beside it.
//!
//! The counter is the host's, or one that is simulated: then KVM steps the guest, and each conditional branch that was
//! stepped over counts. All else is the same.

use std::sync::Arc;
use std::time::Duration;

use kvm_bindings::*;
use vm_memory::{Bytes, GuestAddress};

use super::super::landing::policy::Margin;
use super::super::landing::{
    Counted, Go, Lander, Place, Steered, Stop, TickCounter, anchor, registers_digest,
};
use super::super::perf::events::{Core, CpuModel, event};
use super::super::perf::{Counting, ThreadCounter};
use super::super::simulated::{self, SimulatedCounter};
use super::super::{Exit, Kick, Limit, Vcpu, VcpuError};
use super::kick::{self, Kicks};
use super::{KvmVcpu, Positions, Returned, failed, run, run_area, state};
use crate::ram::Ram;

/// A kicked guest is left alone so long: most leave by themselves, and a position at an exit costs a replay nothing.
const GRACE: Duration = Duration::from_millis(1);
/// A margin, in branches, beyond which a miss is not the counter's skid.
const MARGIN_MAX: u64 = 1 << 26;
/// Status of a debug exit: breakpoint 0 was met.
const MET_0: u64 = 1;
/// Page-table entries (SDM 3A, 4.5): present, a large page, never executed, the address.
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

enum Ticks {
    Host(ThreadCounter),
    /// Counts what is stepped over.
    Stepped(SimulatedCounter),
}

/// See the module.
pub struct KvmHost {
    kvm: KvmVcpu,
    ticks: Ticks,
    time_offset_ns: u64,
}

/// A vCPU whose positions are counted by the host's performance counter.
pub fn counted(ram: &Ram) -> Result<Box<dyn Vcpu>, VcpuError> {
    let model = CpuModel::host();
    let event = event(&model, Core::Big).ok_or_else(|| VcpuError::UnknownCounter(model.to_string()))?;
    let ticks = Ticks::Host(ThreadCounter::new(Counting::guest(event.config), kick::signal()));
    let lander = Lander::new(Margin::new(2 * event.skid, MARGIN_MAX));
    Ok(Box::new(Counted::new(KvmHost::new(ram, ticks)?, lander)))
}

/// A vCPU whose positions are counted by stepping. For tests, of programs that step engines can run.
pub fn counted_by_steps(ram: &Ram) -> Result<Box<dyn Vcpu>, VcpuError> {
    let ticks = Ticks::Stepped(SimulatedCounter::new(simulated::SKID, 0));
    Ok(Box::new(Counted::new(KvmHost::new(ram, ticks)?, simulated::lander())))
}

impl KvmHost {
    fn new(ram: &Ram, ticks: Ticks) -> Result<KvmHost, VcpuError> {
        let mut kvm = KvmVcpu::new(ram, Positions::Branches)?;
        kvm.kicks = Arc::new(Kicks::after(GRACE));
        Ok(KvmHost { kvm, ticks, time_offset_ns: 0 })
    }

    /// What can be told without entering the guest.
    fn before_entry(&mut self, go: &Go) -> Result<Option<Stop>, VcpuError> {
        let stepped = matches!(self.ticks, Ticks::Stepped(_));
        if self.kvm.unfinished
            && (go.window || stepped)
            && let Some(more) = self.kvm.finish()?
        {
            return Ok(Some(Stop::Exit(more)));
        }
        if go.window && self.kvm.takes_interrupts() {
            return Ok(Some(Stop::Exit(Exit::InterruptWindow)));
        }
        Ok(self.kvm.halted.then_some(Stop::Exit(Exit::Halted)))
    }

    /// Enters the guest once. `None`: nothing has happened that anybody asked for.
    fn enter(&mut self, ram: &mut Ram, go: &Go) -> Result<Option<Stop>, VcpuError> {
        let stepped = matches!(self.ticks, Ticks::Stepped(_));
        let mut step = go.step;
        let mut branch = false;
        if stepped {
            self.kvm.deliver(ram)?;
            // A stepped HLT is reported as a step, and its sleep is lost.
            step |= self.kvm.byte_at_rip(ram)? != Some(super::step::HLT);
            let rip = run_area::registers(&mut self.kvm.vcpu).rip;
            let next = anchor::decode(&mut |at, bytes| self.code(ram, at, bytes), rip);
            branch = next.is_some_and(|i| anchor::is_conditional_branch(&i));
        }
        self.kvm.debug(go.breakpoint, step)?;
        self.kvm.unfinished = false;
        // Between two steps the flags say whether the guest takes interrupts.
        self.kvm.vcpu.get_kvm_run().request_interrupt_window = (go.window && !stepped).into();
        let kicks = self.kvm.kicks.clone();
        let returned = kicks.while_running(&mut self.kvm.vcpu, run)?;
        let limit = Limit { until: None, interrupt_window: go.window, time_offset_ns: self.time_offset_ns };
        Ok(match returned {
            Returned::Interrupted => Some(if kicks.take() { Stop::Kicked } else { Stop::Signal }),
            Returned::Exit(KVM_EXIT_DEBUG) if run_area::debug_status(&mut self.kvm.vcpu) & MET_0 != 0 => {
                Some(Stop::Breakpoint)
            }
            Returned::Exit(KVM_EXIT_DEBUG) => {
                let signal = self.ticks.stepped_over(branch);
                let signal = signal.then_some(Stop::Signal);
                if go.step { Some(Stop::Stepped) } else { signal }
            }
            Returned::Exit(KVM_EXIT_IRQ_WINDOW_OPEN) => {
                go.window.then_some(Stop::Exit(Exit::InterruptWindow))
            }
            Returned::Exit(reason) => self.kvm.handle(reason, &limit)?.map(Stop::Exit),
        })
    }

    /// Where the code at `at` lies in guest-physical memory, as a fetch would find it. It leaves no trace: KVM_TRANSLATE would
    /// set accessed bits.
    fn physical(&self, ram: &Ram, cr3: u64, at: u64) -> Option<u64> {
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

impl Ticks {
    /// The guest was stepped. `true`: the counter signals.
    fn stepped_over(&mut self, branch: bool) -> bool {
        let Ticks::Stepped(counter) = self else { return false };
        if branch {
            counter.tick();
        }
        counter.take_signal()
    }
}

impl Steered for KvmHost {
    fn engine(&self) -> &dyn Vcpu {
        &self.kvm
    }

    fn engine_mut(&mut self) -> &mut dyn Vcpu {
        &mut self.kvm
    }

    fn prepare(&mut self, ram: &mut Ram, time_offset_ns: u64) {
        assert!(self.kvm.vm.is_of(ram), "a vCPU runs with the RAM that it was made for");
        // KVM derives nothing from RAM that it does not follow by itself.
        ram.take_changed(|_| ());
        self.time_offset_ns = time_offset_ns;
    }

    fn go(&mut self, ram: &mut Ram, go: Go) -> Result<Stop, VcpuError> {
        if go.resume {
            self.kvm.change_registers(&mut |r| r.rflags |= state::RF)?;
        }
        loop {
            if let Some(stop) = self.before_entry(&go)? {
                return Ok(stop);
            }
            if let Some(stop) = self.enter(ram, &go)? {
                return Ok(stop);
            }
        }
    }

    fn place(&mut self) -> Result<Place, VcpuError> {
        let vcpu = &self.kvm.vcpu;
        let regs = vcpu.get_regs().map_err(failed("reading registers"))?;
        let sregs = vcpu.get_sregs().map_err(failed("reading system registers"))?;
        let debug = vcpu.get_debug_regs().map_err(failed("reading debug registers"))?;
        let events = vcpu.get_vcpu_events().map_err(failed("reading events"))?;
        // `exception.injected` stays behind on a KVM that delivers by emulation.
        let in_flight = events.exception.pending != 0 || events.interrupt.injected != 0;
        Ok(Place {
            rip: regs.rip,
            registers: registers_digest(&state::general(&regs), regs.rflags, sregs.cr3),
            shadow: events.interrupt.shadow != 0,
            in_flight,
            debugs_itself: regs.rflags & state::TF != 0 || debug.dr7 & 0xff != 0,
        })
    }

    fn code(&mut self, ram: &mut Ram, at: u64, bytes: &mut anchor::Code) -> usize {
        let Ok(sregs) = self.kvm.vcpu.get_sregs() else { return 0 };
        let first = (4096 - (at as usize & 4095)).min(bytes.len());
        let read = |at: u64, to: &mut [u8]| {
            let place = self.physical(ram, sregs.cr3, at);
            place.is_some_and(|place| ram.memory().read_slice(to, GuestAddress(place)).is_ok())
        };
        let (here, behind) = bytes.split_at_mut(first);
        match read(at, here) {
            false => 0,
            true if !behind.is_empty() && read(at.wrapping_add(first as u64), behind) => bytes.len(),
            true => first,
        }
    }

    fn clear_resume_flag(&mut self) -> Result<(), VcpuError> {
        self.kvm.change_registers(&mut |r| r.rflags &= !state::RF)
    }

    fn counter(&mut self) -> &mut dyn TickCounter {
        match &mut self.ticks {
            Ticks::Host(counter) => counter,
            Ticks::Stepped(counter) => counter,
        }
    }

    fn take_kick(&mut self) -> bool {
        self.kvm.kicks.take()
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.kvm.kicker()
    }
}
