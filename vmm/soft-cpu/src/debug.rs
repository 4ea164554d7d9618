//! Debug exceptions: single stepping, instruction, data and port breakpoints (SDM 3B, chapter 18).
//!
//! Only instructions that run by `SoftCpu::careful_step` raise them; TF, RF and enabled breakpoints make the
//! run loop use it. Data breakpoints see the explicit and implicit data accesses of instructions, but not
//! those of event delivery. The debug trap of an instruction that loads SS is lost, not deferred.

use crate::exit::{CpuStop, Exception};
use crate::flags::bits;
use crate::paging::Access;
use crate::state::{Cpu, Shadow, WATCHED};

/// DR6.BD: a debug register was touched while DR7.GD was set.
pub(crate) const DEBUG_REGISTER: u64 = 1 << 13;
/// DR6.BS.
pub(crate) const SINGLE_STEP: u64 = 1 << 14;
/// DR7.GD.
pub(crate) const GENERAL_DETECT: u64 = 1 << 13;
/// CR0.AM.
const CR0_AM: u64 = 1 << 18;
/// CR4.DE.
const CR4_DE: u64 = 1 << 3;

/// Kinds of breakpoints: values of the R/W field of DR7.
const ON_EXECUTION: u64 = 0;
const ON_WRITE: u64 = 1;
const ON_PORT: u64 = 2;

impl Cpu {
    /// To be called before the instruction: raises #DB for an instruction breakpoint, notes what has to be
    /// checked while it runs, and clears what lasts for one instruction (the interrupt shadow, RF).
    pub(crate) fn debug_before(&mut self) -> Result<(), CpuStop> {
        let passed = self.flags.non_status() & bits::RF != 0 || self.shadow == Shadow::Everything;
        if !passed {
            let hits = self.breakpoints(|kind, addr, _| kind == ON_EXECUTION && addr == self.rip);
            if hits != 0 {
                return self.debug_exception(hits);
            }
        }
        self.shadow = Shadow::None;
        self.flags.update_non_status(bits::RF, 0);
        self.single_step = self.flags.non_status() & bits::TF != 0;
        self.breakpoints_met = 0;
        let watches = self.breakpoints(|kind, _, _| kind != ON_EXECUTION) != 0;
        self.mode = self.user() as usize | if watches || self.checks_alignment() { WATCHED } else { 0 };
        Ok(())
    }

    /// To be called after the instruction. Returns whether a #DB trap is due; it is then in `Cpu::exception`.
    pub(crate) fn debug_after(&mut self, retired: bool) -> bool {
        self.mode &= !WATCHED;
        let step = if self.single_step { SINGLE_STEP } else { 0 };
        let hits = self.breakpoints_met | step;
        // No trap between a load of SS and the next instruction.
        if !retired || hits == 0 || self.shadow == Shadow::Everything {
            return false;
        }
        self.set_debug_status(hits);
        self.exception = Exception { vector: 1, error: None };
        true
    }

    /// Whether each iteration of REP may trap.
    pub(crate) fn debugged(&self) -> bool {
        self.single_step || self.sys.dr7 & 0xff != 0
    }

    /// #DB with `status` in DR6.
    pub(crate) fn debug_exception<T>(&mut self, status: u64) -> Result<T, CpuStop> {
        self.set_debug_status(status);
        self.raise(1, None)
    }

    pub(crate) fn set_debug_status(&mut self, status: u64) {
        self.sys.dr6 = self.sys.dr6 & !0xf | status;
    }

    /// Notes the data breakpoints that an access of `len` bytes hits.
    #[inline]
    pub(crate) fn note_breakpoints(&mut self, addr: u64, len: usize, access: Access) {
        if self.mode & WATCHED != 0 {
            let last = addr.wrapping_add(len as u64 - 1);
            self.breakpoints_met |= self.breakpoints(|kind, start, size| {
                let wanted = matches!(kind, ON_WRITE | 3) && (kind != ON_WRITE || access == Access::Write);
                wanted && start <= last && addr <= start + (size - 1)
            });
        }
    }

    /// Notes the breakpoints on ports that an access of `len` bytes hits.
    pub(crate) fn note_port_breakpoints(&mut self, port: u16, len: u8) {
        if self.mode & WATCHED != 0 && self.sys.cr4 & CR4_DE != 0 {
            let (first, last) = (port as u64, port as u64 + len as u64 - 1);
            self.breakpoints_met |= self.breakpoints(|kind, start, size| {
                kind == ON_PORT && start <= last && first <= start + (size - 1)
            });
        }
    }

    /// A bit for each enabled breakpoint for which `is_hit(kind, address, bytes)` is true.
    fn breakpoints(&self, is_hit: impl Fn(u64, u64, u64) -> bool) -> u64 {
        let mut hits = 0;
        for n in 0..4 {
            let control = self.sys.dr7 >> (16 + 4 * n);
            let size = [1, 2, 8, 4][control as usize >> 2 & 3];
            let enabled = self.sys.dr7 >> (2 * n) & 3 != 0;
            if enabled && is_hit(control & 3, self.sys.dr[n] & !(size - 1), size) {
                hits |= 1 << n;
            }
        }
        hits
    }

    /// Whether alignment is checked (SDM 3A 6.15, vector 17).
    pub(crate) fn checks_alignment(&self) -> bool {
        self.user() && self.sys.cr0 & CR0_AM != 0 && self.flags.non_status() & bits::AC != 0
    }
}
