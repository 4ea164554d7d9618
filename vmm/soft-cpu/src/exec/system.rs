//! System instructions: HLT, CLI, STI, CLTS, SMSW, LMSW, INVLPG, LGDT and its relatives, SWAPGS, RDTSC, cache
//! control.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::CR0_TS;
use crate::exit::CpuStop;
use crate::flags::bits;
use crate::insn::{Handler, Insn, PlaceInBlock, threaded};
use crate::int::Int;
use crate::paging::is_canonical;
use crate::state::{Cpu, GS_BASE, Shadow, TableRegister, reg};

/// CR4.TSD.
const CR4_TSD: u64 = 1 << 2;

impl Cpu {
    /// Raises #GP(0) outside ring 0.
    #[inline]
    pub(crate) fn privileged(&mut self) -> Result<(), CpuStop> {
        if self.cpl() != 0 { self.general_protection(0) } else { Ok(()) }
    }

    /// Whether CPL is at most IOPL, so that CLI, STI and ports are allowed.
    pub(crate) fn io_privileged(&self) -> bool {
        self.cpl() as u64 <= (self.flags.non_status() & bits::IOPL) >> 12
    }
}

fn hlt(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    cpu.privileged()?;
    Err(CpuStop::Halt)
}

fn cli(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    if !cpu.io_privileged() {
        return cpu.general_protection(0);
    }
    cpu.flags.update_non_status(bits::IF, 0);
    Ok(())
}

fn sti(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    if !cpu.io_privileged() {
        return cpu.general_protection(0);
    }
    if cpu.flags.non_status() & bits::IF == 0 {
        cpu.shadow = Shadow::Interrupts;
        cpu.flags.update_non_status(0, bits::IF);
    }
    Ok(())
}

fn clts(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    cpu.privileged()?;
    cpu.sys.cr0 &= !CR0_TS;
    Ok(())
}

fn smsw_reg<T: Int>(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let v = T::from_u64(cpu.sys.cr0);
    cpu.set_reg(i.dst, v);
    Ok(())
}

fn smsw_mem(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let v = cpu.sys.cr0 as u16;
    cpu.store_operand(ram, i, v)
}

/// LMSW can set PE, MP, EM and TS, and clear the last three; PE is set in 64-bit mode.
fn lmsw(cpu: &mut Cpu, ram: &mut [u8], i: &Insn, is_reg: bool) -> Result<(), CpuStop> {
    cpu.privileged()?;
    let v: u16 = if is_reg { cpu.reg(i.dst) } else { cpu.load_operand(ram, i)? };
    cpu.sys.cr0 = cpu.sys.cr0 & !0xe | v as u64 & 0xe;
    Ok(())
}

fn invlpg(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    cpu.privileged()?;
    let addr = cpu.ea(i);
    if is_canonical(addr) {
        cpu.invalidate_page(addr);
    }
    Ok(())
}

/// WBINVD, INVD: there are no caches.
fn flush_caches(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    cpu.privileged()
}

/// CLFLUSH: no effect except the checks of a load.
fn clflush(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let addr = cpu.ea(i);
    cpu.probe_read(ram, addr).map_err(|stop| cpu.operand_fault(i, stop))
}

fn load_table(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<TableRegister, CpuStop> {
    cpu.privileged()?;
    let addr = cpu.ea(i);
    let mut b = [0; 10];
    cpu.load_bytes(ram, addr, &mut b).map_err(|stop| cpu.operand_fault(i, stop))?;
    let limit = u16::from_le_bytes([b[0], b[1]]);
    let base = u64::from_le_bytes([b[2], b[3], b[4], b[5], b[6], b[7], b[8], b[9]]);
    if !is_canonical(base) {
        return cpu.general_protection(0);
    }
    Ok(TableRegister { base, limit })
}

fn lgdt(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    cpu.sys.gdtr = load_table(cpu, ram, i)?;
    Ok(())
}

fn lidt(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    cpu.sys.idtr = load_table(cpu, ram, i)?;
    Ok(())
}

fn store_table(cpu: &mut Cpu, ram: &mut [u8], i: &Insn, table: TableRegister) -> Result<(), CpuStop> {
    let mut b = [0; 10];
    b[..2].copy_from_slice(&table.limit.to_le_bytes());
    b[2..].copy_from_slice(&table.base.to_le_bytes());
    let addr = cpu.ea(i);
    cpu.store_bytes(ram, addr, &b).map_err(|stop| cpu.operand_fault(i, stop))
}

fn swapgs(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    cpu.privileged()?;
    std::mem::swap(&mut cpu.regs[GS_BASE as usize], &mut cpu.sys.kernel_gs_base);
    Ok(())
}

fn rdtsc(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    if cpu.sys.cr4 & CR4_TSD != 0 && cpu.cpl() != 0 {
        return cpu.general_protection(0);
    }
    let tsc = cpu.tsc();
    cpu.set_reg(reg::RAX, tsc as u32);
    cpu.set_reg(reg::RDX, (tsc >> 32) as u32);
    Ok(())
}

fn rdtscp(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    rdtsc(cpu, ram, i)?;
    let aux = cpu.sys.tsc_aux as u32;
    cpu.set_reg(reg::RCX, aux);
    Ok(())
}

/// Handlers of this family.
pub fn select(ins: &Instruction, insn: &mut Insn) -> Option<PlaceInBlock> {
    let is_reg = ins.op0_kind() == OpKind::Register;
    let (exec, place): (Handler, PlaceInBlock) = match ins.mnemonic() {
        Mnemonic::Hlt => (threaded!(hlt), PlaceInBlock::Last),
        Mnemonic::Cli => (threaded!(cli), PlaceInBlock::Middle),
        Mnemonic::Sti => (threaded!(sti), PlaceInBlock::Last),
        Mnemonic::Clts => (threaded!(clts), PlaceInBlock::Middle),
        Mnemonic::Smsw if !is_reg => (threaded!(smsw_mem), PlaceInBlock::Middle),
        Mnemonic::Smsw => match ins.op0_register().size() {
            2 => (threaded!(smsw_reg::<u16>), PlaceInBlock::Middle),
            4 => (threaded!(smsw_reg::<u32>), PlaceInBlock::Middle),
            _ => (threaded!(smsw_reg::<u64>), PlaceInBlock::Middle),
        },
        Mnemonic::Lmsw if is_reg => (threaded!(|cpu, ram, i| lmsw(cpu, ram, i, true)), PlaceInBlock::Last),
        Mnemonic::Lmsw => (threaded!(|cpu, ram, i| lmsw(cpu, ram, i, false)), PlaceInBlock::Last),
        Mnemonic::Invlpg => (threaded!(invlpg), PlaceInBlock::Last),
        Mnemonic::Wbinvd | Mnemonic::Invd => (threaded!(flush_caches), PlaceInBlock::Middle),
        Mnemonic::Clflush => (threaded!(clflush), PlaceInBlock::Middle),
        Mnemonic::Lgdt => (threaded!(lgdt), PlaceInBlock::Middle),
        Mnemonic::Lidt => (threaded!(lidt), PlaceInBlock::Middle),
        Mnemonic::Sgdt => {
            (threaded!(|cpu, ram, i| store_table(cpu, ram, i, cpu.sys.gdtr)), PlaceInBlock::Middle)
        }
        Mnemonic::Sidt => {
            (threaded!(|cpu, ram, i| store_table(cpu, ram, i, cpu.sys.idtr)), PlaceInBlock::Middle)
        }
        Mnemonic::Swapgs => (threaded!(swapgs), PlaceInBlock::Middle),
        Mnemonic::Rdtsc => (threaded!(rdtsc), PlaceInBlock::Alone),
        Mnemonic::Rdtscp => (threaded!(rdtscp), PlaceInBlock::Alone),
        // There are no performance counters.
        Mnemonic::Rdpmc => (threaded!(|cpu, _, _| cpu.general_protection(0)), PlaceInBlock::Last),
        _ => return None,
    };
    insn.exec = exec;
    Some(place)
}
