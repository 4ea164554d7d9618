//! BT, BTS, BTR, BTC, BSF, BSR, POPCNT.
//!
//! What the SDM leaves undefined behaves as on current Intel processors: the bit tests leave all flags except
//! CF unchanged; BSF and BSR of 0 leave the destination unchanged, set PF from the index found (0 if none)
//! and clear SF, AF, CF and OF. This CPU's CPUID does not have TZCNT and LZCNT, so their encodings are BSF
//! and BSR.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::operand::{DestinationOperand, Dst, Imm, Mem, SourceOperand, Src, is_memory, log_size, widths};
use crate::exit::CpuStop;
use crate::flags::Flags;
use crate::insn::{ADDR32, Handler, Insn, PlaceInBlock};
use crate::int::Int;
use crate::state::Cpu;

/// What the instruction does with the bit.
trait BitOp {
    const STORES: bool = true;
    fn run<T: Int>(v: T, mask: T) -> T;
}
struct Test;
struct Set;
struct Reset;
struct Complement;
impl BitOp for Test {
    const STORES: bool = false;
    fn run<T: Int>(v: T, _: T) -> T {
        v
    }
}
impl BitOp for Set {
    #[inline(always)]
    fn run<T: Int>(v: T, mask: T) -> T {
        v | mask
    }
}
impl BitOp for Reset {
    #[inline(always)]
    fn run<T: Int>(v: T, mask: T) -> T {
        v & !mask
    }
}
impl BitOp for Complement {
    #[inline(always)]
    fn run<T: Int>(v: T, mask: T) -> T {
        v ^ mask
    }
}

#[inline(always)]
fn apply<O: BitOp, T: Int>(flags: &mut Flags, v: T, bit: u64) -> T {
    let mask = T::from_u64(1 << (bit & (T::BITS as u64 - 1)));
    flags.set_cf(v & mask != T::from_u64(0));
    O::run(v, mask)
}

/// The forms whose bit is within the operand: all except a memory operand with the bit offset in a register.
fn bit_in_operand<O: BitOp, D: DestinationOperand, S: SourceOperand, T: Int>(
    cpu: &mut Cpu,
    ram: &mut [u8],
    i: &Insn,
) -> Result<(), CpuStop> {
    let bit = S::load::<T>(cpu, ram, i)?.to_u64();
    if !O::STORES {
        let v = D::load::<T>(cpu, ram, i)?;
        apply::<O, T>(&mut cpu.flags, v, bit);
        return Ok(());
    }
    D::modify::<T>(cpu, ram, i, |cpu, v| {
        let mut flags = cpu.flags;
        let r = apply::<O, T>(&mut flags, v, bit);
        (r, flags)
    })
}

/// The form with a memory operand and the bit offset in a register: a bit string, with a signed offset.
fn bit_string<O: BitOp, T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let bit = cpu.reg::<T>(i.src).sext();
    let unit = (bit as i64 >> T::BITS.trailing_zeros()) * T::SIZE as i64;
    let mut offset = cpu.ea_offset(i).wrapping_add(unit as u64);
    if i.scale & ADDR32 != 0 {
        offset = offset as u32 as u64;
    }
    let addr = cpu.reg::<u64>(i.seg).wrapping_add(offset);
    let done = if O::STORES {
        cpu.modify::<T>(ram, addr, |cpu, v| {
            let mut flags = cpu.flags;
            let r = apply::<O, T>(&mut flags, v, bit);
            (r, flags)
        })
    } else {
        cpu.load::<T>(ram, addr).map(|v| {
            apply::<O, T>(&mut cpu.flags, v, bit);
        })
    };
    done.map_err(|stop| cpu.operand_fault(i, stop))
}

#[inline(always)]
fn scan<S: SourceOperand, T: Int>(
    cpu: &mut Cpu,
    ram: &mut [u8],
    i: &Insn,
    position: impl Fn(u64) -> u32,
) -> Result<(), CpuStop> {
    let v = S::load::<T>(cpu, ram, i)?;
    let found = v != T::from_u64(0);
    let index = if found { position(v.to_u64()) } else { 0 };
    cpu.flags.set_logic(index);
    cpu.flags.set_zf(!found);
    if found {
        cpu.set_reg(i.dst, T::from_u64(index as u64));
    }
    Ok(())
}

fn bsf<S: SourceOperand, T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    scan::<S, T>(cpu, ram, i, u64::trailing_zeros)
}

fn bsr<S: SourceOperand, T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    scan::<S, T>(cpu, ram, i, |v| 63 - v.leading_zeros())
}

fn popcnt<S: SourceOperand, T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let v = S::load::<T>(cpu, ram, i)?;
    cpu.set_reg(i.dst, T::from_u64(v.to_u64().count_ones() as u64));
    cpu.flags.set_status(0);
    cpu.flags.set_zf(v == T::from_u64(0));
    Ok(())
}

fn form<O: BitOp>(ins: &Instruction) -> Handler {
    let by_register = ins.op1_kind() == OpKind::Register;
    let table = match (is_memory(ins, 0), by_register) {
        (false, true) => widths!(bit_in_operand, O, Dst, Src),
        (false, false) => widths!(bit_in_operand, O, Dst, Imm),
        (true, true) => widths!(bit_string, O),
        (true, false) => widths!(bit_in_operand, O, Mem, Imm),
    };
    table[log_size(ins, 0)]
}

/// Handlers of this family.
pub fn select(ins: &Instruction, insn: &mut Insn) -> Option<PlaceInBlock> {
    macro_rules! to_register {
        ($f:ident) => {
            (if is_memory(ins, 1) { widths!($f, Mem) } else { widths!($f, Src) })[log_size(ins, 0)]
        };
    }
    insn.exec = match ins.mnemonic() {
        Mnemonic::Bt => form::<Test>(ins),
        Mnemonic::Bts => form::<Set>(ins),
        Mnemonic::Btr => form::<Reset>(ins),
        Mnemonic::Btc => form::<Complement>(ins),
        Mnemonic::Bsf | Mnemonic::Tzcnt => to_register!(bsf),
        Mnemonic::Bsr | Mnemonic::Lzcnt => to_register!(bsr),
        Mnemonic::Popcnt => to_register!(popcnt),
        _ => return None,
    };
    Some(PlaceInBlock::Middle)
}
