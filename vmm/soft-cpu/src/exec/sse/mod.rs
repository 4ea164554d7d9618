//! SSE to SSE4.2: what their instructions share.
//!
//! A 16-byte memory operand has to be aligned (else #GP), except for a few instructions. Register forms and
//! memory forms have separate handlers; operands narrower than 16 bytes are loaded zero-extended.

mod convert;
mod element;
mod float;
mod integer;
mod lanes;
mod moves;
mod shuffle;
mod string;
mod system;

use iced_x86::{Instruction, OpKind};

use super::{CR0_EM, CR0_TS};
use crate::exit::CpuStop;
use crate::float::FloatContext;
use crate::insn::{Insn, PlaceInBlock};
use crate::state::Cpu;

pub(super) use system::MXCSR_MASK;

/// CR4.OSFXSR.
const CR4_OSFXSR: u64 = 1 << 9;
/// CR4.OSXMMEXCPT.
const CR4_OSXMMEXCPT: u64 = 1 << 10;

/// Handlers of SSE and, as most of it is the same, of MMX.
pub fn select(ins: &Instruction, insn: &mut Insn) -> Option<PlaceInBlock> {
    let families =
        [moves::select, integer::select, shuffle::select, float::select, convert::select, element::select];
    let rare = [string::select, system::select];
    families.iter().chain(&rare).find_map(|select| select(ins, insn))?;
    Some(PlaceInBlock::Middle)
}

/// Raises #UD or #NM if the guest's kernel has SSE switched off (SDM 3A, table 15-3).
#[inline(always)]
fn guard(cpu: &mut Cpu) -> Result<(), CpuStop> {
    if cpu.sys.cr0 & (CR0_EM | CR0_TS) | !cpu.sys.cr4 & CR4_OSFXSR != 0 { refuse(cpu) } else { Ok(()) }
}

#[cold]
#[inline(never)]
fn refuse(cpu: &mut Cpu) -> Result<(), CpuStop> {
    if cpu.sys.cr0 & CR0_EM != 0 || cpu.sys.cr4 & CR4_OSFXSR == 0 {
        return cpu.undefined();
    }
    cpu.raise(7, None)
}

#[inline(always)]
fn xmm(cpu: &mut Cpu, r: u8) -> &mut u128 {
    &mut cpu.xmm[r as usize & 15]
}

/// Reads a 16-byte memory operand that has to be aligned.
#[inline(always)]
fn load_aligned(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<u128, CpuStop> {
    let addr = cpu.ea(i);
    if addr & 15 != 0 {
        return cpu.general_protection(0);
    }
    cpu.load_u128(ram, addr).map_err(|stop| cpu.operand_fault(i, stop))
}

/// Reads a 16-byte memory operand.
#[inline(always)]
fn load_unaligned(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<u128, CpuStop> {
    let addr = cpu.ea(i);
    cpu.load_u128(ram, addr).map_err(|stop| cpu.operand_fault(i, stop))
}

/// Writes a 16-byte memory operand that has to be aligned.
#[inline(always)]
fn store_aligned(cpu: &mut Cpu, ram: &mut [u8], i: &Insn, value: u128) -> Result<(), CpuStop> {
    let addr = cpu.ea(i);
    if addr & 15 != 0 {
        return cpu.general_protection(0);
    }
    cpu.store_u128(ram, addr, value).map_err(|stop| cpu.operand_fault(i, stop))
}

/// Writes a 16-byte memory operand.
#[inline(always)]
fn store_unaligned(cpu: &mut Cpu, ram: &mut [u8], i: &Insn, value: u128) -> Result<(), CpuStop> {
    let addr = cpu.ea(i);
    cpu.store_u128(ram, addr, value).map_err(|stop| cpu.operand_fault(i, stop))
}

/// In [`Insn::src`]: [`load_source`] reads memory, of the width in the other bits.
const SOURCE_MEMORY: u8 = 0x80;

/// Notes the width of the memory operand, if there is one, for [`load_source`].
fn note_source(ins: &Instruction, insn: &mut Insn) {
    if (0..ins.op_count()).any(|n| ins.op_kind(n) == OpKind::Memory) {
        insn.src = SOURCE_MEMORY | ins.memory_size().size() as u8;
    }
}

/// Reads an XMM register, or memory of the width that [`note_source`] noted, zero-extended.
#[inline]
fn load_source(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<u128, CpuStop> {
    Ok(match i.src {
        0..=0x7f => *xmm(cpu, i.src),
        0x81 => cpu.load_operand::<u8>(ram, i)?.into(),
        0x82 => cpu.load_operand::<u16>(ram, i)?.into(),
        0x84 => cpu.load_operand::<u32>(ram, i)?.into(),
        0x88 => cpu.load_operand::<u64>(ram, i)?.into(),
        _ => load_aligned(cpu, ram, i)?,
    })
}

/// Runs `f` with the settings in MXCSR, and sets the flags in it that `f` raises. An unmasked exception is
/// #XM, or #UD if the guest's kernel does not support #XM (SDM 1, 11.5.2); then the caller stores no result.
#[inline(always)]
fn with_mxcsr<T>(cpu: &mut Cpu, f: impl FnOnce(&mut FloatContext) -> T) -> Result<T, CpuStop> {
    let mut cx = FloatContext::from_mxcsr(cpu.mxcsr);
    let value = f(&mut cx);
    cpu.mxcsr |= u32::from(cx.raised());
    if cx.unmasked() != 0 {
        if cpu.sys.cr4 & CR4_OSXMMEXCPT == 0 {
            return cpu.undefined();
        }
        return cpu.raise(19, None);
    }
    Ok(value)
}
