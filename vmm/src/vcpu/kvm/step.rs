//! Positions by single steps, for tests: the guest exits after each instruction.
//!
//! KVM steps by the guest's own trap flag, so the cases that the flag does not cover are handled here:
//!
//! - KVM does not stop right after an access to a port or a device. The access itself is an exit, is completed before the
//!   next step, and counts as one.
//! - The delivery of an interrupt would push the flag if it is set, and the handler would run without steps. So an interrupt is
//!   delivered with the flag off, and a hardware breakpoint stops the guest at the handler's first instruction.
//! - A stepped HLT does not halt the guest. It is executed without the flag, and is an exit anyway.
//! - A REP instruction is one step on a KVM that emulates it, and one step for each iteration on hardware.
//! - On hardware the handler of a fault runs without steps until it returns. Programs for this engine should not fault.

use kvm_bindings::*;
use vm_memory::{Bytes, GuestAddress};

use super::super::{Exit, Limit, VcpuError};
use super::{KvmVcpu, Returned, failed, run, run_area};
use crate::ram::Ram;

/// Size of a gate in the IDT in bytes (SDM 3A, figure 7-8).
const GATE: u64 = 16;
/// The only byte of HLT.
pub(super) const HLT: u8 = 0xf4;
/// DR7: breakpoint 0 is enabled, for execution.
const BREAK_ON_0: u64 = 2;

impl KvmVcpu {
    /// Single-steps the guest to its next exit or to the limit.
    pub(super) fn run_steps(&mut self, ram: &Ram, limit: &Limit) -> Result<Exit, VcpuError> {
        loop {
            if let Some(exit) = self.before_entry(limit)? {
                return Ok(exit);
            }
            self.deliver_interrupt(ram)?;
            // HLT is not stepped: KVM would report a step, and the guest would not halt.
            let halts = self.byte_at_rip(ram)? == Some(HLT);
            self.set_debug(None, !halts)?;
            // Each step is a position, so exits between two positions are not reported.
            match self.enter(&Limit { interrupt_window: false, ..*limit })? {
                None | Some(Exit::Between) => {}
                Some(exit) => return Ok(exit),
            }
        }
    }

    /// Delivers a queued interrupt: runs the guest to the first instruction of its handler.
    pub(super) fn deliver_interrupt(&mut self, ram: &Ram) -> Result<(), VcpuError> {
        let events = self.vcpu.get_vcpu_events().map_err(failed("reading events"))?;
        if events.interrupt.injected == 0 {
            return Ok(());
        }
        let handler = self.handler_address(ram, events.interrupt.nr)?;
        self.set_debug(Some(handler), false)?;
        loop {
            match run(&mut self.vcpu)? {
                Returned::Interrupted => {}
                Returned::Exit(KVM_EXIT_DEBUG) => return Ok(()),
                Returned::Exit(other) => return Err(self.unexpected(other)),
            }
        }
    }

    /// The address of an interrupt's handler.
    fn handler_address(&self, ram: &Ram, vector: u8) -> Result<u64, VcpuError> {
        let sregs = self.vcpu.get_sregs().map_err(failed("reading system registers"))?;
        let at = sregs.idt.base + u64::from(vector) * GATE;
        let place = self.vcpu.translate_gva(at).map_err(failed("translating the IDT's address"))?;
        let mut gate = [0; GATE as usize];
        let read = ram.memory().read_slice(&mut gate, GuestAddress(place.physical_address));
        if place.valid == 0 || read.is_err() {
            return Err(VcpuError::KvmLacks(
                "a way to step into an interrupt's handler, as the guest's IDT is not in RAM",
            ));
        }
        let gate = u128::from_le_bytes(gate);
        Ok((gate & 0xffff | gate >> 32 & 0xffff_0000 | (gate >> 64 & 0xffff_ffff) << 32) as u64)
    }

    /// The first byte of the next instruction, if it is in RAM.
    pub(super) fn byte_at_rip(&mut self, ram: &Ram) -> Result<Option<u8>, VcpuError> {
        let rip = run_area::registers(&mut self.vcpu).rip;
        let place = self.vcpu.translate_gva(rip).map_err(failed("translating RIP"))?;
        Ok(ram.memory().read_obj(GuestAddress(place.physical_address)).ok().filter(|_| place.valid != 0))
    }

    /// Sets the breakpoint, or none, and turns stepping on or off.
    pub(super) fn set_debug(&mut self, breakpoint: Option<u64>, step: bool) -> Result<(), VcpuError> {
        // KVM sets the trap flag for the instruction at RIP. IRET and POPF clear it, so it is set again for each step.
        if !step && (self.breakpoint, self.stepping) == (breakpoint, step) {
            return Ok(());
        }
        let mut debug = kvm_guest_debug::default();
        for (on, control) in [
            (breakpoint.is_some() || step, KVM_GUESTDBG_ENABLE),
            (step, KVM_GUESTDBG_SINGLESTEP),
            (breakpoint.is_some(), KVM_GUESTDBG_USE_HW_BP),
        ] {
            debug.control |= if on { control } else { 0 };
        }
        debug.arch.debugreg[0] = breakpoint.unwrap_or(0);
        debug.arch.debugreg[7] = breakpoint.map_or(0, |_| BREAK_ON_0);
        self.vcpu.set_guest_debug(&debug).map_err(failed("setting a breakpoint or a single step"))?;
        (self.breakpoint, self.stepping) = (breakpoint, step);
        Ok(())
    }
}
