//! MOV between registers and memory, MOVZX, MOVSX, MOVSXD, LEA, CMOVcc, SETcc, BSWAP, XLAT, and the sign
//! extensions of the accumulator (CBW, CWD and so on).

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::operand::{
    DestinationOperand, Dst, Imm, Mem, Moffs, Near, Quick, SourceOperand, Src, condition, conditions,
    is_memory, is_near, log_size, widths,
};
use crate::exit::CpuStop;
use crate::insn::{ADDR32, Handler, Insn, PlaceInBlock, threaded};
use crate::int::Int;
use crate::state::{Cpu, ZERO, reg};

fn mov<D: DestinationOperand, S: SourceOperand, T: Int>(
    cpu: &mut Cpu,
    ram: &mut [u8],
    i: &Insn,
) -> Result<(), CpuStop> {
    let v = S::load::<T>(cpu, ram, i)?;
    D::store(cpu, ram, i, v)
}

fn store_moffs<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let addr = cpu.reg::<u64>(i.seg).wrapping_add(i.imm);
    let v = cpu.reg::<T>(reg::RAX);
    cpu.store(ram, addr, v)
}

fn zero_extend<S: SourceOperand, F: Int, T: Int>(
    cpu: &mut Cpu,
    ram: &mut [u8],
    i: &Insn,
) -> Result<(), CpuStop> {
    let v = S::load::<F>(cpu, ram, i)?;
    cpu.set_reg(i.dst, T::from_u64(v.to_u64()));
    Ok(())
}

fn sign_extend<S: SourceOperand, F: Int, T: Int>(
    cpu: &mut Cpu,
    ram: &mut [u8],
    i: &Insn,
) -> Result<(), CpuStop> {
    let v = S::load::<F>(cpu, ram, i)?;
    cpu.set_reg(i.dst, T::from_u64(v.sext()));
    Ok(())
}

fn lea<T: Int>(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let v = T::from_u64(cpu.ea_offset(i));
    cpu.set_reg(i.dst, v);
    Ok(())
}

/// The source is read, and a 32-bit destination zero-extended, whether the condition holds or not.
fn cmov<S: SourceOperand, T: Int, const CC: u8>(
    cpu: &mut Cpu,
    ram: &mut [u8],
    i: &Insn,
) -> Result<(), CpuStop> {
    let new = S::load::<T>(cpu, ram, i)?;
    let old = cpu.reg::<T>(i.dst);
    let v = if cpu.flags.condition::<CC>() { new } else { old };
    cpu.set_reg(i.dst, v);
    Ok(())
}

fn set<D: DestinationOperand, const CC: u8>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let v = cpu.flags.condition::<CC>() as u8;
    D::store(cpu, ram, i, v)
}

/// For 16 bits, which the SDM leaves undefined, the result is 0, as on current processors.
fn bswap<T: Int>(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let v = cpu.reg::<T>(i.dst).to_u64();
    let swapped = if T::BITS == 16 { 0 } else { v.swap_bytes() >> (64 - T::BITS) };
    cpu.set_reg(i.dst, T::from_u64(swapped));
    Ok(())
}

fn xlat(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let mut offset = cpu.reg::<u64>(reg::RBX).wrapping_add(cpu.reg::<u8>(reg::RAX) as u64);
    if i.scale & ADDR32 != 0 {
        offset = offset as u32 as u64;
    }
    let addr = cpu.reg::<u64>(i.seg).wrapping_add(offset);
    let v = cpu.load::<u8>(ram, addr)?;
    cpu.set_reg(reg::RAX, v);
    Ok(())
}

/// CBW, CWDE, CDQE: sign-extends the lower half of the accumulator.
fn widen<F: Int, T: Int>(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    let v = cpu.reg::<F>(reg::RAX).sext();
    cpu.set_reg(reg::RAX, T::from_u64(v));
    Ok(())
}

/// CWD, CDQ, CQO: fills RDX with the sign of the accumulator.
fn sign_to_rdx<T: Int>(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    let v = (cpu.reg::<T>(reg::RAX).sext() as i64 >> 63) as u64;
    cpu.set_reg(reg::RDX, T::from_u64(v));
    Ok(())
}

fn select_mov(ins: &Instruction, insn: &Insn) -> Option<Handler> {
    use OpKind::{Memory as M, Register as R};
    let (a, b) = (ins.op0_kind(), ins.op1_kind());
    // Segment, control and debug registers belong to other families.
    for (n, kind) in [(0, a), (1, b)] {
        if kind == R && !ins.op_register(n).is_gpr() {
            return None;
        }
    }
    // The general rule for memory operands also fits moffs with 32-bit addresses.
    let long = ins.memory_displ_size() == 8;
    let table = match ins.code() {
        Code::Mov_AL_moffs8 | Code::Mov_AX_moffs16 | Code::Mov_EAX_moffs32 | Code::Mov_RAX_moffs64
            if long =>
        {
            widths!(mov, Dst, Moffs)
        }
        Code::Mov_moffs8_AL | Code::Mov_moffs16_AX | Code::Mov_moffs32_EAX | Code::Mov_moffs64_RAX
            if long =>
        {
            widths!(store_moffs)
        }
        _ => match (a, b) {
            (R, R) => widths!(mov, Dst, Src),
            (R, M) if is_near(insn) => widths!(mov, Dst, Near; else Dst, Mem),
            (R, M) => widths!(mov, Dst, Quick; else Dst, Mem),
            (M, R) if is_near(insn) => widths!(mov, Near, Src; else Mem, Src),
            (M, R) => widths!(mov, Quick, Src; else Mem, Src),
            (R, _) => widths!(mov, Dst, Imm),
            (M, _) if is_near(insn) => widths!(mov, Near, Imm; else Mem, Imm),
            (M, _) => widths!(mov, Quick, Imm; else Mem, Imm),
            _ => return None,
        },
    };
    Some(table[log_size(ins, 0)])
}

fn select_extend(ins: &Instruction, signed: bool) -> Handler {
    macro_rules! by_source {
        ($f:ident) => {{
            let table = match (log_size(ins, 1), is_memory(ins, 1)) {
                (0, false) => widths!($f, Src, u8),
                (0, true) => widths!($f, Quick, u8; else Mem, u8),
                (1, false) => widths!($f, Src, u16),
                (1, true) => widths!($f, Quick, u16; else Mem, u16),
                (_, false) => widths!($f, Src, u32),
                (_, true) => widths!($f, Quick, u32; else Mem, u32),
            };
            table[log_size(ins, 0)]
        }};
    }
    if signed { by_source!(sign_extend) } else { by_source!(zero_extend) }
}

fn select_conditional(ins: &Instruction) -> Option<Handler> {
    let cc = condition(ins)?;
    let table = match (ins.op_count(), log_size(ins, 0), is_memory(ins, ins.op_count() - 1)) {
        (1, _, false) => conditions!(set, Dst),
        (1, _, true) => conditions!(set, Mem),
        (_, 1, false) => conditions!(cmov, Src, u16),
        (_, 2, false) => conditions!(cmov, Src, u32),
        (_, _, false) => conditions!(cmov, Src, u64),
        (_, 1, true) => conditions!(cmov, Quick, u16; else Mem, u16),
        (_, 2, true) => conditions!(cmov, Quick, u32; else Mem, u32),
        (_, _, true) => conditions!(cmov, Quick, u64; else Mem, u64),
    };
    Some(table[cc])
}

/// Handlers of this family.
pub fn select(ins: &Instruction, insn: &mut Insn) -> Option<PlaceInBlock> {
    insn.exec = match ins.mnemonic() {
        Mnemonic::Mov => select_mov(ins, insn)?,
        Mnemonic::Movzx => select_extend(ins, false),
        Mnemonic::Movsx | Mnemonic::Movsxd => select_extend(ins, true),
        Mnemonic::Lea => widths!(lea)[log_size(ins, 0)],
        Mnemonic::Bswap => widths!(bswap)[log_size(ins, 0)],
        Mnemonic::Xlatb => {
            insn.index = ZERO;
            threaded!(xlat)
        }
        Mnemonic::Cbw => threaded!(widen::<u8, u16>),
        Mnemonic::Cwde => threaded!(widen::<u16, u32>),
        Mnemonic::Cdqe => threaded!(widen::<u32, u64>),
        Mnemonic::Cwd => threaded!(sign_to_rdx::<u16>),
        Mnemonic::Cdq => threaded!(sign_to_rdx::<u32>),
        Mnemonic::Cqo => threaded!(sign_to_rdx::<u64>),
        m if is_conditional(m) => select_conditional(ins)?,
        _ => return None,
    };
    Some(PlaceInBlock::Middle)
}

fn is_conditional(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        m,
        Cmova
            | Cmovae
            | Cmovb
            | Cmovbe
            | Cmove
            | Cmovg
            | Cmovge
            | Cmovl
            | Cmovle
            | Cmovne
            | Cmovno
            | Cmovnp
            | Cmovns
            | Cmovo
            | Cmovp
            | Cmovs
            | Seta
            | Setae
            | Setb
            | Setbe
            | Sete
            | Setg
            | Setge
            | Setl
            | Setle
            | Setne
            | Setno
            | Setnp
            | Setns
            | Seto
            | Setp
            | Sets
    )
}
