//! Positions by single steps, for tests: each instruction is an exit.
//!
//! KVM steps by the guest's own trap flag, so what that flag cannot see is handled here:
//!
//! - KVM reports no boundary right after an access to a port or a device. The access is an exit of its own, completed
//!   before the next step, and counts then.
//! - An interrupt that is delivered while the flag is set would push it, and its handler would run unstepped. So it is
//!   delivered with the flag off, up to a hardware breakpoint at the handler's first instruction.
//! - A stepped HLT does not sleep. It is executed without the flag, for it is an exit of its own as well.
//! - A REP instruction is one step on a KVM that emulates, and one an iteration on hardware.
//! - The handler of a fault runs unstepped on hardware until it returns: programs for this engine should not fault.

use kvm_bindings::*;
use vm_memory::{Bytes, GuestAddress};

use super::super::{Exit, Limit, VcpuError};
use super::{KvmVcpu, Returned, failed, run, run_area};
use crate::ram::Ram;

/// Bytes of a gate in the IDT (SDM 3A, figure 7-8).
const GATE: u64 = 16;
/// HLT's only byte.
pub(super) const HLT: u8 = 0xf4;
/// DR7: breakpoint 0 is on and breaks execution.
const BREAK_ON_0: u64 = 2;

impl KvmVcpu {
    /// Steps the guest to its next exit or to the limit.
    pub(super) fn run_steps(&mut self, ram: &Ram, limit: &Limit) -> Result<Exit, VcpuError> {
        loop {
            if let Some(exit) = self.before_entry(limit)? {
                return Ok(exit);
            }
            self.deliver(ram)?;
            // A stepped HLT is reported as a step, and its sleep is lost.
            let halts = self.byte_at_rip(ram)? == Some(HLT);
            self.debug(None, !halts)?;
            // Each step is a position, so nobody has to be told between two.
            match self.enter(&Limit { interrupt_window: false, ..*limit })? {
                None | Some(Exit::Between) => {}
                Some(exit) => return Ok(exit),
            }
        }
    }

    /// Lets a queued interrupt in, up to its handler's first instruction.
    pub(super) fn deliver(&mut self, ram: &Ram) -> Result<(), VcpuError> {
        let events = self.vcpu.get_vcpu_events().map_err(failed("reading events"))?;
        if events.interrupt.injected == 0 {
            return Ok(());
        }
        let handler = self.handler(ram, events.interrupt.nr)?;
        self.debug(Some(handler), false)?;
        loop {
            match run(&mut self.vcpu)? {
                Returned::Interrupted => {}
                Returned::Exit(KVM_EXIT_DEBUG) => return Ok(()),
                Returned::Exit(other) => return Err(self.unexpected(other)),
            }
        }
    }

    /// Where an interrupt's gate leads.
    fn handler(&self, ram: &Ram, vector: u8) -> Result<u64, VcpuError> {
        let sregs = self.vcpu.get_sregs().map_err(failed("reading system registers"))?;
        let at = sregs.idt.base + u64::from(vector) * GATE;
        let place = self.vcpu.translate_gva(at).map_err(failed("translating the IDT's address"))?;
        let mut gate = [0; GATE as usize];
        let read = ram.memory().read_slice(&mut gate, GuestAddress(place.physical_address));
        if place.valid == 0 || read.is_err() {
            return Err(VcpuError::KvmLacks("an IDT in RAM, to step into an interrupt's handler"));
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
    pub(super) fn debug(&mut self, breakpoint: Option<u64>, step: bool) -> Result<(), VcpuError> {
        // KVM sets the trap flag where RIP is now; IRET and POPF end that, so each step asks for it anew.
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
        self.vcpu.set_guest_debug(&debug).map_err(failed("setting breakpoint and steps"))?;
        (self.breakpoint, self.stepping) = (breakpoint, step);
        Ok(())
    }
}
