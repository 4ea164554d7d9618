//! The control and status words, and instructions that do nothing.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::{BUSY, ES, EXCEPTIONS, SF, guard, guard_no_wait, summarise};
use crate::exit::CpuStop;
use crate::insn::{Handler, Insn, threaded};
use crate::state::{Cpu, X87, reg};

/// CR0.MP.
const CR0_MP: u64 = 1 << 1;

/// Loads a control word: bit 6 is always set, reserved bits are always clear.
pub(super) fn set_control(cpu: &mut Cpu, value: u16) {
    cpu.x87.control = value & 0x1f3f | 0x40;
}

/// The status word with TOP.
pub(super) fn status(cpu: &Cpu) -> u16 {
    cpu.x87.status | u16::from(cpu.x87.top) << 11
}

/// Loads a status word; ES is derived from the flags in it.
pub(super) fn set_status(cpu: &mut Cpu, value: u16) {
    cpu.x87.top = (value >> 11 & 7) as u8;
    cpu.x87.status = value & !(7 << 11);
    summarise(cpu);
}

fn fldcw(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let value = cpu.load_operand::<u16>(ram, i)?;
    set_control(cpu, value);
    summarise(cpu);
    Ok(())
}

fn fnstcw(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard_no_wait(cpu)?;
    let value = cpu.x87.control;
    cpu.store_operand(ram, i, value)
}

fn fnstsw(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard_no_wait(cpu)?;
    let value = status(cpu);
    cpu.store_operand(ram, i, value)
}

fn fnstsw_ax(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    guard_no_wait(cpu)?;
    let value = status(cpu);
    cpu.set_reg(reg::RAX, value);
    Ok(())
}

fn fnclex(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    guard_no_wait(cpu)?;
    cpu.x87.status &= !(EXCEPTIONS | SF | ES | BUSY);
    Ok(())
}

/// Initialises the x87, for FNINIT, and for FNSAVE after storing: the registers keep their contents and are
/// marked empty.
pub(super) fn initialise(cpu: &mut Cpu) {
    let X87 { significand, sign_exponent, .. } = cpu.x87;
    cpu.x87 = X87 { significand, sign_exponent, ..X87::default() };
}

fn fninit(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    guard_no_wait(cpu)?;
    initialise(cpu);
    Ok(())
}

fn fnop(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    guard(cpu)
}

/// FNENI, FNDISI and FNSETPM, which only had a meaning for the 8087 and 80287.
fn nothing(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    guard_no_wait(cpu)
}

/// FWAIT: CR0.TS raises #NM only together with CR0.MP.
fn wait(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    let both = CR0_MP | super::CR0_TS;
    if cpu.sys.cr0 & both == both {
        return cpu.raise(7, None);
    }
    if cpu.x87.status & ES != 0 { cpu.raise(16, None) } else { Ok(()) }
}

/// Handlers of this family.
pub(super) fn select(ins: &Instruction, insn: &mut Insn) -> Option<()> {
    let memory = ins.op_count() > 0 && ins.op0_kind() == OpKind::Memory;
    let handler: Handler = match ins.mnemonic() {
        Mnemonic::Fldcw => threaded!(fldcw),
        Mnemonic::Fnstcw => threaded!(fnstcw),
        Mnemonic::Fnstsw if memory => threaded!(fnstsw),
        Mnemonic::Fnstsw => threaded!(fnstsw_ax),
        Mnemonic::Fnclex => threaded!(fnclex),
        Mnemonic::Fninit => threaded!(fninit),
        Mnemonic::Fnop => threaded!(fnop),
        Mnemonic::Fneni | Mnemonic::Fndisi | Mnemonic::Fnsetpm => threaded!(nothing),
        Mnemonic::Wait => threaded!(wait),
        _ => return None,
    };
    insn.exec = handler;
    Some(())
}
