//! MOV to and from control and debug registers.
//!
//! The guest cannot leave 64-bit mode: clearing CR0.PG or CR4.PAE raises #GP, as on hardware (SDM 3A 2.5,
//! 4.1.1).

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use crate::debug::{DEBUG_REGISTER, GENERAL_DETECT};
use crate::exit::CpuStop;
use crate::flags::bits;
use crate::insn::{Handler, Insn, PlaceInBlock, threaded};
use crate::paging::PHYSICAL_BITS;
use crate::state::Cpu;

mod cr0 {
    pub const PE: u64 = 1 << 0;
    pub const ET: u64 = 1 << 4;
    pub const WP: u64 = 1 << 16;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
    /// PE, MP, EM, TS, ET, NE, WP, AM, NW, CD, PG.
    pub const DEFINED: u64 = 0xe005_003f;
}

mod cr4 {
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const PGE: u64 = 1 << 7;
    /// TSD, DE, PSE, PAE, PGE, PCE, OSFXSR, OSXMMEXCPT: the bits whose features are in CPUID (PCE has no
    /// effect).
    pub const DEFINED: u64 = 1 << 2 | 1 << 3 | PSE | PAE | PGE | 1 << 8 | 1 << 9 | 1 << 10;
}

impl Cpu {
    fn set_cr0(&mut self, v: u64) -> Result<(), CpuStop> {
        let has = |bit| v & bit != 0;
        if v >> 32 != 0 || !has(cr0::PG) || !has(cr0::PE) || has(cr0::NW) && !has(cr0::CD) {
            return self.general_protection(0);
        }
        let v = v & cr0::DEFINED | cr0::ET;
        if (v ^ self.sys.cr0) & (cr0::WP | cr0::PG) != 0 {
            self.flush_tlb(false);
        }
        self.sys.cr0 = v;
        Ok(())
    }

    fn set_cr3(&mut self, v: u64) -> Result<(), CpuStop> {
        if v >> PHYSICAL_BITS != 0 {
            return self.general_protection(0);
        }
        self.sys.cr3 = v;
        self.flush_tlb(self.sys.cr4 & cr4::PGE != 0);
        Ok(())
    }

    fn set_cr4(&mut self, v: u64) -> Result<(), CpuStop> {
        if v & !cr4::DEFINED != 0 || v & cr4::PAE == 0 {
            return self.general_protection(0);
        }
        if (v ^ self.sys.cr4) & (cr4::PGE | cr4::PSE | cr4::PAE) != 0 {
            self.flush_tlb(false);
        }
        self.sys.cr4 = v;
        Ok(())
    }

    fn set_cr8(&mut self, v: u64) -> Result<(), CpuStop> {
        if v > 15 {
            return self.general_protection(0);
        }
        self.sys.cr8 = v;
        Ok(())
    }
}

fn write_cr(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    cpu.privileged()?;
    let v = cpu.reg(i.src);
    match i.dst {
        0 => cpu.set_cr0(v),
        2 => {
            cpu.sys.cr2 = v;
            Ok(())
        }
        3 => cpu.set_cr3(v),
        4 => cpu.set_cr4(v),
        _ => cpu.set_cr8(v),
    }
}

fn read_cr(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    cpu.privileged()?;
    let s = &cpu.sys;
    let v = match i.src {
        0 => s.cr0,
        2 => s.cr2,
        3 => s.cr3,
        4 => s.cr4,
        _ => s.cr8,
    };
    cpu.set_reg(i.dst, v);
    Ok(())
}

/// DR6 and DR7: bits that read as one (SDM 3B, figure 18-1).
const DR6_ONES: u64 = 0xffff_0ff0;
const DR7_ONES: u64 = 1 << 10;
/// B0 to B3, BD, BS, BT.
const DR6_DEFINED: u64 = 0xe00f;
/// Everything but bits 10 to 12, 14 and 15.
const DR7_DEFINED: u64 = 0xffff_23ff;

/// The checks of reads and writes. Returns the number of the register; DR4 and DR5 are aliases of DR6 and
/// DR7.
fn debug_register(cpu: &mut Cpu, n: u8) -> Result<u8, CpuStop> {
    let aliased = n == 4 || n == 5;
    if aliased && cpu.sys.cr4 & 1 << 3 != 0 {
        return cpu.undefined();
    }
    cpu.privileged()?;
    if cpu.sys.dr7 & GENERAL_DETECT != 0 {
        // A fault other than an instruction breakpoint pushes RF=1.
        cpu.flags.update_non_status(0, bits::RF);
        return cpu.debug_exception(DEBUG_REGISTER);
    }
    Ok(if aliased { n + 2 } else { n })
}

fn write_dr(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let n = debug_register(cpu, i.dst)?;
    let v: u64 = cpu.reg(i.src);
    match n {
        0..4 => cpu.sys.dr[n as usize] = v,
        _ if v >> 32 != 0 => return cpu.general_protection(0),
        6 => cpu.sys.dr6 = v & DR6_DEFINED | DR6_ONES,
        _ => cpu.sys.dr7 = v & DR7_DEFINED | DR7_ONES,
    }
    Ok(())
}

fn read_dr(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let n = debug_register(cpu, i.src)?;
    let v = match n {
        0..4 => cpu.sys.dr[n as usize],
        6 => cpu.sys.dr6,
        _ => cpu.sys.dr7,
    };
    cpu.set_reg(i.dst, v);
    Ok(())
}

/// Handlers of this family.
pub fn select(ins: &Instruction, insn: &mut Insn) -> Option<PlaceInBlock> {
    if ins.mnemonic() != Mnemonic::Mov || ins.op1_kind() != OpKind::Register {
        return None;
    }
    let exists = |r: Register| matches!(r.number(), 0 | 2 | 3 | 4 | 8) || r.is_dr() && r.number() < 8;
    let (to, from) = (ins.op0_register(), ins.op1_register());
    let exec: Handler = match () {
        _ if to.is_cr() && exists(to) => threaded!(write_cr),
        _ if from.is_cr() && exists(from) => threaded!(read_cr),
        _ if to.is_dr() && exists(to) => threaded!(write_dr),
        _ if from.is_dr() && exists(from) => threaded!(read_dr),
        _ => return None,
    };
    insn.exec = exec;
    Some(PlaceInBlock::Last)
}
