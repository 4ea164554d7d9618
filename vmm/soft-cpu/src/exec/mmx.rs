//! The MM registers, which are the significands of the x87 registers, and EMMS. Operations on them are in
//! [`super::sse`].
//!
//! Every MMX instruction except EMMS sets TOP to zero and marks all registers as in use; a register that is
//! written gets all ones as its sign and exponent (SDM 1, 9.5).

use iced_x86::{Instruction, Mnemonic};

use super::{CR0_EM, CR0_TS};
use crate::exit::CpuStop;
use crate::insn::{Insn, PlaceInBlock, threaded};
use crate::state::Cpu;

/// x87 status: an unmasked exception is pending.
const STATUS_ES: u16 = 1 << 7;

/// Raises #UD, #NM or #MF (SDM 3A, table 13-1); otherwise the x87 registers become MM registers.
#[inline]
pub(super) fn guard(cpu: &mut Cpu) -> Result<(), CpuStop> {
    check(cpu)?;
    enter(cpu);
    Ok(())
}

/// Raises #UD, #NM or #MF; does not change the x87 state.
#[inline]
pub(super) fn check(cpu: &mut Cpu) -> Result<(), CpuStop> {
    if cpu.sys.cr0 & CR0_EM != 0 {
        return cpu.undefined();
    }
    if cpu.sys.cr0 & CR0_TS != 0 {
        return cpu.raise(7, None);
    }
    if cpu.x87.status & STATUS_ES != 0 {
        return cpu.raise(16, None);
    }
    Ok(())
}

/// Does what every MMX instruction does to the x87 stack.
#[inline]
pub(super) fn enter(cpu: &mut Cpu) {
    cpu.x87.top = 0;
    cpu.x87.in_use = 0xff;
}

/// MM register `r`.
#[inline]
pub(super) fn get(cpu: &Cpu, r: u8) -> u64 {
    cpu.x87.significand[r as usize & 7]
}

/// Writes MM register `r`.
#[inline]
pub(super) fn set(cpu: &mut Cpu, r: u8, value: u64) {
    cpu.x87.significand[r as usize & 7] = value;
    cpu.x87.sign_exponent[r as usize & 7] = 0xffff;
}

fn emms(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    check(cpu)?;
    cpu.x87.top = 0;
    cpu.x87.in_use = 0;
    Ok(())
}

/// Handlers of this family.
pub fn select(ins: &Instruction, insn: &mut Insn) -> Option<PlaceInBlock> {
    if ins.mnemonic() != Mnemonic::Emms {
        return None;
    }
    insn.exec = threaded!(emms);
    Some(PlaceInBlock::Middle)
}
