//! RDMSR and WRMSR. Registers that are not listed here raise #GP, for reads and writes.

use iced_x86::{Instruction, Mnemonic};

use crate::exit::CpuStop;
use crate::insn::{Handler, Insn, PlaceInBlock, threaded};
use crate::paging::is_canonical;
use crate::state::{Cpu, FS_BASE, GS_BASE, reg};

/// Numbers of the registers (SDM 4, chapter 2).
mod number {
    pub const TSC: u32 = 0x10;
    pub const PLATFORM_ID: u32 = 0x17;
    pub const TSC_ADJUST: u32 = 0x3b;
    pub const UCODE_REV: u32 = 0x8b;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const MISC_ENABLE: u32 = 0x1a0;
    pub const PAT: u32 = 0x277;
    pub const EFER: u32 = 0xc000_0080;
    pub const STAR: u32 = 0xc000_0081;
    pub const LSTAR: u32 = 0xc000_0082;
    pub const CSTAR: u32 = 0xc000_0083;
    pub const FMASK: u32 = 0xc000_0084;
    pub const FS_BASE: u32 = 0xc000_0100;
    pub const GS_BASE: u32 = 0xc000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub const TSC_AUX: u32 = 0xc000_0103;
}

/// IA32_EFER (SDM 3A 2.2.1).
#[allow(missing_docs)]
pub(crate) mod efer {
    pub const SCE: u64 = 1 << 0;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
}

/// IA32_MISC_ENABLE: fast strings on, no branch trace store, no PEBS. Writes are ignored.
const MISC_ENABLE: u64 = 1 << 0 | 1 << 11 | 1 << 12;

impl Cpu {
    /// The value of a register, or `None` if it does not exist.
    fn read_msr(&self, n: u32) -> Option<u64> {
        let s = &self.sys;
        Some(match n {
            number::TSC => self.tsc(),
            number::PLATFORM_ID | number::UCODE_REV => 0,
            number::TSC_ADJUST => s.tsc_adjust,
            number::SYSENTER_CS..=number::SYSENTER_EIP => s.sysenter[(n - number::SYSENTER_CS) as usize],
            number::MISC_ENABLE => MISC_ENABLE,
            number::PAT => s.pat,
            number::EFER => s.efer,
            number::STAR => s.star,
            number::LSTAR => s.lstar,
            number::CSTAR => s.cstar,
            number::FMASK => s.fmask,
            number::FS_BASE => self.regs[FS_BASE as usize],
            number::GS_BASE => self.regs[GS_BASE as usize],
            number::KERNEL_GS_BASE => s.kernel_gs_base,
            number::TSC_AUX => s.tsc_aux,
            _ => return None,
        })
    }

    /// Writes a register; `None` if it does not exist or cannot have the value.
    fn write_msr(&mut self, n: u32, v: u64) -> Option<()> {
        let address = || is_canonical(v).then_some(v);
        let low = || (v >> 32 == 0).then_some(v);
        let now = self.tsc();
        let s = &mut self.sys;
        match n {
            number::TSC => s.tsc_adjust = s.tsc_adjust.wrapping_add(v.wrapping_sub(now)),
            number::TSC_ADJUST => s.tsc_adjust = v,
            number::UCODE_REV | number::MISC_ENABLE => {}
            number::SYSENTER_CS => s.sysenter[0] = v as u32 as u64,
            number::SYSENTER_ESP => s.sysenter[1] = address()?,
            number::SYSENTER_EIP => s.sysenter[2] = address()?,
            number::PAT => {
                let valid = v.to_le_bytes().iter().all(|kind| matches!(kind, 0 | 1 | 4..=7));
                s.pat = valid.then_some(v)?;
            }
            number::EFER => return self.write_efer(v),
            number::STAR => s.star = v,
            number::LSTAR => s.lstar = address()?,
            number::CSTAR => s.cstar = address()?,
            number::FMASK => s.fmask = low()?,
            number::FS_BASE => self.regs[FS_BASE as usize] = address()?,
            number::GS_BASE => self.regs[GS_BASE as usize] = address()?,
            number::KERNEL_GS_BASE => s.kernel_gs_base = address()?,
            number::TSC_AUX => s.tsc_aux = low()?,
            _ => return None,
        }
        Some(())
    }

    /// LME cannot change while paging is on; a write never changes LMA.
    fn write_efer(&mut self, v: u64) -> Option<()> {
        let old = self.sys.efer;
        if v & !(efer::SCE | efer::LME | efer::LMA | efer::NXE) != 0 || (v ^ old) & efer::LME != 0 {
            return None;
        }
        if (v ^ old) & efer::NXE != 0 {
            self.flush_tlb(false);
        }
        self.sys.efer = v & !efer::LMA | old & efer::LMA;
        Some(())
    }
}

fn rdmsr(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    cpu.privileged()?;
    let n = cpu.reg(reg::RCX);
    let Some(v) = cpu.read_msr(n) else { return cpu.general_protection(0) };
    cpu.set_reg(reg::RAX, v as u32);
    cpu.set_reg(reg::RDX, (v >> 32) as u32);
    Ok(())
}

fn wrmsr(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    cpu.privileged()?;
    let v = cpu.reg::<u32>(reg::RAX) as u64 | (cpu.reg::<u32>(reg::RDX) as u64) << 32;
    let n = cpu.reg(reg::RCX);
    if cpu.write_msr(n, v).is_none() {
        return cpu.general_protection(0);
    }
    Ok(())
}

/// Handlers of this family.
pub fn select(ins: &Instruction, insn: &mut Insn) -> Option<PlaceInBlock> {
    let exec: Handler = match ins.mnemonic() {
        Mnemonic::Rdmsr => threaded!(rdmsr),
        Mnemonic::Wrmsr => threaded!(wrmsr),
        _ => return None,
    };
    insn.exec = exec;
    Some(PlaceInBlock::Alone)
}
