//! Moves between XMM, MM and general registers and memory.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::{
    guard, load_aligned, load_source, load_unaligned, note_source, store_aligned, store_unaligned, xmm,
};
use crate::exec::mmx;
use crate::exit::CpuStop;
use crate::insn::{ADDR32, Handler, Insn, flag, threaded};
use crate::int::Int;
use crate::paging::is_canonical;
use crate::state::{Cpu, reg};

const LOW: u128 = u64::MAX as u128;

fn reg_reg(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    *xmm(cpu, i.dst) = *xmm(cpu, i.src);
    Ok(())
}

fn aligned_load(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    *xmm(cpu, i.dst) = load_aligned(cpu, ram, i)?;
    Ok(())
}

fn aligned_store(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let value = *xmm(cpu, i.src);
    store_aligned(cpu, ram, i, value)
}

fn unaligned_load(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    *xmm(cpu, i.dst) = load_unaligned(cpu, ram, i)?;
    Ok(())
}

fn unaligned_store(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let value = *xmm(cpu, i.src);
    store_unaligned(cpu, ram, i, value)
}

/// A scalar from memory; the rest of the register is cleared.
fn scalar_load<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    *xmm(cpu, i.dst) = cpu.load_operand::<T>(ram, i)?.to_u64().into();
    Ok(())
}

fn scalar_store<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let value = *xmm(cpu, i.src) as u64;
    cpu.store_operand(ram, i, T::from_u64(value))
}

/// A scalar from a register; the rest of the destination stays.
fn scalar_merge<T: Int>(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let mask = u128::MAX >> (128 - T::BITS);
    let b = *xmm(cpu, i.src);
    let a = xmm(cpu, i.dst);
    *a = *a & !mask | b & mask;
    Ok(())
}

/// MOVQ between registers clears the high half.
fn low_half(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    *xmm(cpu, i.dst) = *xmm(cpu, i.src) & LOW;
    Ok(())
}

fn from_general<T: Int>(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    *xmm(cpu, i.dst) = cpu.reg::<T>(i.src).to_u64().into();
    Ok(())
}

fn to_general<T: Int>(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let value = *xmm(cpu, i.src) as u64;
    cpu.set_reg(i.dst, T::from_u64(value));
    Ok(())
}

/// MOVLPS, MOVLPD.
fn low_load(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let value = cpu.load_operand::<u64>(ram, i)?;
    let a = xmm(cpu, i.dst);
    *a = *a & !LOW | u128::from(value);
    Ok(())
}

/// MOVHPS, MOVHPD.
fn high_load(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let value = cpu.load_operand::<u64>(ram, i)?;
    let a = xmm(cpu, i.dst);
    *a = *a & LOW | u128::from(value) << 64;
    Ok(())
}

fn high_store(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let value = (*xmm(cpu, i.src) >> 64) as u64;
    cpu.store_operand(ram, i, value)
}

fn movhlps(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let b = *xmm(cpu, i.src);
    let a = xmm(cpu, i.dst);
    *a = *a & !LOW | b >> 64;
    Ok(())
}

fn movlhps(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let b = *xmm(cpu, i.src);
    let a = xmm(cpu, i.dst);
    *a = *a & LOW | b << 64;
    Ok(())
}

/// MOVNTI: an ordinary store of a general register.
fn movnti<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let value = cpu.reg::<T>(i.src);
    cpu.store_operand(ram, i, value)
}

/// MASKMOVDQU: writes the bytes whose mask has its highest bit set.
fn maskmovdqu(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let (bytes, mask) = (*xmm(cpu, i.dst), *xmm(cpu, i.src));
    masked_store(cpu, ram, i, &bytes.to_le_bytes(), &mask.to_le_bytes())
}

fn maskmovq(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    mmx::guard(cpu)?;
    let (bytes, mask) = (mmx::get(cpu, i.dst), mmx::get(cpu, i.src));
    masked_store(cpu, ram, i, &bytes.to_le_bytes(), &mask.to_le_bytes())
}

/// Stores the bytes that the mask selects. Faults are as on Intel's CPUs: as for a store of eight bytes, or
/// two such with the higher first, to addresses that have to be canonical and writable whichever bytes are
/// selected; a 32-bit offset wraps between the two.
fn masked_store(cpu: &mut Cpu, ram: &mut [u8], i: &Insn, bytes: &[u8], mask: &[u8]) -> Result<(), CpuStop> {
    let addr = cpu.ea(i);
    cpu.check_alignment(addr, 8)?;
    let last = cpu.ea_at(i, mask.len() - 8).wrapping_add(7);
    if !is_canonical(addr) || !is_canonical(last) {
        return cpu.general_protection(0);
    }
    for start in (0..mask.len()).step_by(8).rev() {
        let half = cpu.ea_at(i, start);
        cpu.probe_write(ram, half, 8)?;
    }
    for k in (0..mask.len()).filter(|k| mask[*k] & 0x80 != 0) {
        let half = cpu.ea_at(i, k & !7);
        cpu.store(ram, half.wrapping_add(k as u64 & 7), bytes[k])?;
    }
    Ok(())
}

fn mm_from_mm(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    mmx::check(cpu)?;
    let value = if i.src < 8 { mmx::get(cpu, i.src) } else { load_source(cpu, ram, i)? as u64 };
    mmx::enter(cpu);
    mmx::set(cpu, i.dst, value);
    Ok(())
}

fn mm_store<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    mmx::check(cpu)?;
    let value = mmx::get(cpu, i.src);
    // If the store faults, TOP has changed, but the tags have not.
    cpu.x87.top = 0;
    cpu.store_operand(ram, i, T::from_u64(value))?;
    mmx::enter(cpu);
    Ok(())
}

fn mm_from_general<T: Int>(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    mmx::guard(cpu)?;
    let value = cpu.reg::<T>(i.src).to_u64();
    mmx::set(cpu, i.dst, value);
    Ok(())
}

fn mm_to_general<T: Int>(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    mmx::guard(cpu)?;
    let value = mmx::get(cpu, i.src);
    cpu.set_reg(i.dst, T::from_u64(value));
    Ok(())
}

fn movq2dq(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    mmx::guard(cpu)?;
    *xmm(cpu, i.dst) = mmx::get(cpu, i.src).into();
    Ok(())
}

fn movdq2q(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    mmx::guard(cpu)?;
    let value = *xmm(cpu, i.src) as u64;
    mmx::set(cpu, i.dst, value);
    Ok(())
}

/// MOVD and MOVQ, in all forms.
fn mov_dq(ins: &Instruction, insn: &mut Insn) -> Option<Handler> {
    use Code::*;
    Some(match ins.code() {
        Movd_xmm_rm32 if ins.op1_kind() == OpKind::Memory => threaded!(scalar_load::<u32>),
        Movd_xmm_rm32 => threaded!(from_general::<u32>),
        Movq_xmm_rm64 | Movq_xmm_xmmm64 if ins.op1_kind() == OpKind::Memory => threaded!(scalar_load::<u64>),
        Movq_xmm_rm64 => threaded!(from_general::<u64>),
        Movd_rm32_xmm if ins.op0_kind() == OpKind::Memory => threaded!(scalar_store::<u32>),
        Movd_rm32_xmm => threaded!(to_general::<u32>),
        Movq_rm64_xmm | Movq_xmmm64_xmm if ins.op0_kind() == OpKind::Memory => threaded!(scalar_store::<u64>),
        Movq_rm64_xmm => threaded!(to_general::<u64>),
        Movq_xmm_xmmm64 | Movq_xmmm64_xmm => threaded!(low_half),
        Movd_mm_rm32 | Movq_mm_rm64 | Movq_mm_mmm64 if ins.op1_kind() == OpKind::Memory => {
            note_source(ins, insn);
            threaded!(mm_from_mm)
        }
        Movd_mm_rm32 => threaded!(mm_from_general::<u32>),
        Movq_mm_rm64 => threaded!(mm_from_general::<u64>),
        Movd_rm32_mm if ins.op0_kind() == OpKind::Memory => threaded!(mm_store::<u32>),
        Movq_rm64_mm | Movq_mmm64_mm if ins.op0_kind() == OpKind::Memory => threaded!(mm_store::<u64>),
        Movd_rm32_mm => threaded!(mm_to_general::<u32>),
        Movq_rm64_mm => threaded!(mm_to_general::<u64>),
        Movq_mm_mmm64 | Movq_mmm64_mm => threaded!(mm_from_mm),
        _ => return None,
    })
}

/// Handlers of this family.
pub(super) fn select(ins: &Instruction, insn: &mut Insn) -> Option<()> {
    let loads = ins.op1_kind() == OpKind::Memory;
    let stores = ins.op0_kind() == OpKind::Memory;
    insn.exec = match ins.mnemonic() {
        Mnemonic::Movaps | Mnemonic::Movapd | Mnemonic::Movdqa | Mnemonic::Movntdqa if loads => {
            threaded!(aligned_load)
        }
        Mnemonic::Movaps | Mnemonic::Movapd | Mnemonic::Movdqa if stores => threaded!(aligned_store),
        Mnemonic::Movntps | Mnemonic::Movntpd | Mnemonic::Movntdq => threaded!(aligned_store),
        Mnemonic::Movups | Mnemonic::Movupd | Mnemonic::Movdqu | Mnemonic::Lddqu if loads => {
            threaded!(unaligned_load)
        }
        Mnemonic::Movups | Mnemonic::Movupd | Mnemonic::Movdqu if stores => threaded!(unaligned_store),
        Mnemonic::Movaps
        | Mnemonic::Movapd
        | Mnemonic::Movdqa
        | Mnemonic::Movups
        | Mnemonic::Movupd
        | Mnemonic::Movdqu => threaded!(reg_reg),
        Mnemonic::Movd | Mnemonic::Movq => mov_dq(ins, insn)?,
        // The string instruction MOVSD has the same mnemonic and other codes.
        Mnemonic::Movss if loads => threaded!(scalar_load::<u32>),
        Mnemonic::Movss if stores => threaded!(scalar_store::<u32>),
        Mnemonic::Movss => threaded!(scalar_merge::<u32>),
        Mnemonic::Movsd if ins.code() == Code::Movsd_xmm_xmmm64 && loads => threaded!(scalar_load::<u64>),
        Mnemonic::Movsd if ins.code() == Code::Movsd_xmmm64_xmm && stores => threaded!(scalar_store::<u64>),
        Mnemonic::Movsd if matches!(ins.code(), Code::Movsd_xmm_xmmm64 | Code::Movsd_xmmm64_xmm) => {
            threaded!(scalar_merge::<u64>)
        }
        Mnemonic::Movlps | Mnemonic::Movlpd if loads => threaded!(low_load),
        Mnemonic::Movhps | Mnemonic::Movhpd if loads => threaded!(high_load),
        Mnemonic::Movlps | Mnemonic::Movlpd => threaded!(scalar_store::<u64>),
        Mnemonic::Movhps | Mnemonic::Movhpd => threaded!(high_store),
        Mnemonic::Movhlps => threaded!(movhlps),
        Mnemonic::Movlhps => threaded!(movlhps),
        Mnemonic::Movnti if ins.code() == Code::Movnti_m64_r64 => threaded!(movnti::<u64>),
        Mnemonic::Movnti => threaded!(movnti::<u32>),
        Mnemonic::Movntq => threaded!(mm_store::<u64>),
        Mnemonic::Maskmovdqu | Mnemonic::Maskmovq => return maskmov(ins, insn),
        Mnemonic::Movq2dq => threaded!(movq2dq),
        Mnemonic::Movdq2q => threaded!(movdq2q),
        _ => return None,
    };
    Some(())
}

/// The memory operand is `[RDI]` and comes first, the registers after it.
fn maskmov(ins: &Instruction, insn: &mut Insn) -> Option<()> {
    insn.exec =
        if ins.mnemonic() == Mnemonic::Maskmovq { threaded!(maskmovq) } else { threaded!(maskmovdqu) };
    insn.dst = crate::insn::register_index(ins.op1_register());
    insn.src = crate::insn::register_index(ins.op2_register());
    insn.base = reg::RDI;
    if insn.flags & flag::ADDR32 != 0 {
        insn.scale |= ADDR32;
    }
    Some(())
}
