//! For callers that follow a CPU step by step, as a debugger or a simulated performance counter does: reading
//! the code at RIP, and setting the flags and registers of debugging. A guest that just runs uses nothing of
//! this.

use crate::decode::LENGTH_MAX;
use crate::flags::bits;
use crate::run::SoftCpu;
use crate::state::Cpu;

impl SoftCpu {
    /// The registers. RIP and counts are exact between instructions, so for every caller.
    pub fn cpu(&self) -> &Cpu {
        &self.cpu
    }

    /// Sets or clears RFLAGS.RF: with it the next instruction passes an instruction breakpoint (SDM 3B
    /// 18.3.1.1).
    pub fn set_resume_flag(&mut self, on: bool) {
        self.cpu.flags.update_non_status(bits::RF, if on { bits::RF } else { 0 });
    }

    /// Clears RFLAGS.TF behind the guest's back.
    pub fn clear_trap_flag(&mut self) {
        self.cpu.flags.update_non_status(bits::TF, 0);
    }

    /// Forgets an interrupt that was injected and is not delivered yet.
    pub fn drop_interrupt(&mut self) {
        self.cpu.interrupt = None;
    }

    /// Sets DR7 behind the guest's back and returns its old value, for a debugger that uses the breakpoint
    /// registers itself and hides the guest's.
    pub fn swap_dr7(&mut self, dr7: u64) -> u64 {
        std::mem::replace(&mut self.cpu.sys.dr7, dr7)
    }

    /// Reads the bytes at linear address `addr` as a fetch would, without changing any state. Returns how
    /// many: the longest length of an instruction, or fewer if the next page cannot be fetched from.
    pub fn peek(&self, ram: &[u8], addr: u64, bytes: &mut [u8; LENGTH_MAX]) -> usize {
        let first = (4096 - (addr as usize & 4095)).min(LENGTH_MAX);
        let mut copy = |at: u64, to: std::ops::Range<usize>| {
            let Some(offset) = self.cpu.peek_code(ram, at) else { return false };
            let code = ram.get(offset..offset + to.len());
            code.map(|code| bytes[to].copy_from_slice(code)).is_some()
        };
        if !copy(addr, 0..first) {
            return 0;
        }
        if first < LENGTH_MAX && copy(addr.wrapping_add(first as u64), first..LENGTH_MAX) {
            return LENGTH_MAX;
        }
        first
    }
}
