//! PEXTR, PINSR, EXTRACTPS: moves of single elements to and from general registers and memory.

use iced_x86::{Code, Instruction, OpKind};

use super::{guard, xmm};
use crate::exec::mmx;
use crate::exit::CpuStop;
use crate::insn::{Handler, Insn, threaded};
use crate::int::Int;
use crate::state::Cpu;

/// The element that the immediate selects.
#[inline(always)]
fn element<T: Int>(x: u128, imm: u64) -> T {
    let count = 128 / T::BITS;
    T::from_u64((x >> (imm as u32 % count * T::BITS)) as u64)
}

/// Into a general register, zero-extended to all of it.
fn extract<T: Int>(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let value = element::<T>(*xmm(cpu, i.src), i.imm).to_u64();
    cpu.set_reg::<u64>(i.dst, value);
    Ok(())
}

fn extract_store<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let value = element::<T>(*xmm(cpu, i.src), i.imm);
    cpu.store_operand(ram, i, value)
}

fn insert<T: Int, const MEMORY: bool>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let value = if MEMORY { cpu.load_operand::<T>(ram, i)? } else { T::from_u64(cpu.reg::<u64>(i.src)) };
    let at = i.imm as u32 % (128 / T::BITS) * T::BITS;
    let mask = (u128::MAX >> (128 - T::BITS)) << at;
    let a = xmm(cpu, i.dst);
    *a = *a & !mask | u128::from(value.to_u64()) << at;
    Ok(())
}

fn extract_mm(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    mmx::guard(cpu)?;
    let value = mmx::get(cpu, i.src) >> (16 * (i.imm & 3)) & 0xffff;
    cpu.set_reg::<u64>(i.dst, value);
    Ok(())
}

fn insert_mm<const MEMORY: bool>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    mmx::check(cpu)?;
    let value = if MEMORY { cpu.load_operand::<u16>(ram, i)? } else { cpu.reg::<u64>(i.src) as u16 };
    let at = 16 * (i.imm & 3);
    let inserted = mmx::get(cpu, i.dst) & !(0xffff << at) | u64::from(value) << at;
    mmx::enter(cpu);
    mmx::set(cpu, i.dst, inserted);
    Ok(())
}

/// Handlers of this family.
pub(super) fn select(ins: &Instruction, insn: &mut Insn) -> Option<()> {
    use Code::*;
    let stores = ins.op0_kind() == OpKind::Memory;
    let loads = ins.op1_kind() == OpKind::Memory;
    let handler: Handler = match ins.code() {
        Pextrw_r32_mm_imm8 | Pextrw_r64_mm_imm8 => threaded!(extract_mm),
        Pinsrw_mm_r32m16_imm8 | Pinsrw_mm_r64m16_imm8 if loads => threaded!(insert_mm::<true>),
        Pinsrw_mm_r32m16_imm8 | Pinsrw_mm_r64m16_imm8 => threaded!(insert_mm::<false>),
        Pextrb_r32m8_xmm_imm8 | Pextrb_r64m8_xmm_imm8 if stores => threaded!(extract_store::<u8>),
        Pextrb_r32m8_xmm_imm8 | Pextrb_r64m8_xmm_imm8 => threaded!(extract::<u8>),
        Pextrw_r32m16_xmm_imm8 | Pextrw_r64m16_xmm_imm8 if stores => threaded!(extract_store::<u16>),
        Pextrw_r32m16_xmm_imm8 | Pextrw_r64m16_xmm_imm8 => threaded!(extract::<u16>),
        Pextrw_r32_xmm_imm8 | Pextrw_r64_xmm_imm8 => threaded!(extract::<u16>),
        Pextrd_rm32_xmm_imm8 | Extractps_rm32_xmm_imm8 | Extractps_r64m32_xmm_imm8 if stores => {
            threaded!(extract_store::<u32>)
        }
        Pextrd_rm32_xmm_imm8 | Extractps_rm32_xmm_imm8 | Extractps_r64m32_xmm_imm8 => {
            threaded!(extract::<u32>)
        }
        Pextrq_rm64_xmm_imm8 if stores => threaded!(extract_store::<u64>),
        Pextrq_rm64_xmm_imm8 => threaded!(extract::<u64>),
        Pinsrb_xmm_r32m8_imm8 | Pinsrb_xmm_r64m8_imm8 if loads => threaded!(insert::<u8, true>),
        Pinsrb_xmm_r32m8_imm8 | Pinsrb_xmm_r64m8_imm8 => threaded!(insert::<u8, false>),
        Pinsrw_xmm_r32m16_imm8 | Pinsrw_xmm_r64m16_imm8 if loads => threaded!(insert::<u16, true>),
        Pinsrw_xmm_r32m16_imm8 | Pinsrw_xmm_r64m16_imm8 => threaded!(insert::<u16, false>),
        Pinsrd_xmm_rm32_imm8 if loads => threaded!(insert::<u32, true>),
        Pinsrd_xmm_rm32_imm8 => threaded!(insert::<u32, false>),
        Pinsrq_xmm_rm64_imm8 if loads => threaded!(insert::<u64, true>),
        Pinsrq_xmm_rm64_imm8 => threaded!(insert::<u64, false>),
        _ => return None,
    };
    insn.exec = handler;
    Some(())
}
