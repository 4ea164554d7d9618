//! INC, DEC, NEG, NOT.

use iced_x86::{Instruction, Mnemonic};

use super::operand::{DestinationOperand, Dst, Mem, Quick, is_memory, log_size, widths};
use crate::exit::CpuStop;
use crate::flags::Flags;
use crate::insn::{Handler, Insn, PlaceInBlock};
use crate::int::Int;
use crate::state::Cpu;

/// A one-operand operation: sets the flags and returns the result.
trait UnaryOp {
    fn run<T: Int>(flags: &mut Flags, a: T) -> T;
}

struct Inc;
impl UnaryOp for Inc {
    #[inline(always)]
    fn run<T: Int>(flags: &mut Flags, a: T) -> T {
        let r = a.add(T::from_u64(1));
        let cf = flags.cf();
        flags.set_arith(r, a & !r);
        flags.set_cf(cf);
        r
    }
}

struct Dec;
impl UnaryOp for Dec {
    #[inline(always)]
    fn run<T: Int>(flags: &mut Flags, a: T) -> T {
        let r = a.sub(T::from_u64(1));
        let cf = flags.cf();
        flags.set_arith(r, !a & r);
        flags.set_cf(cf);
        r
    }
}

struct Neg;
impl UnaryOp for Neg {
    #[inline(always)]
    fn run<T: Int>(flags: &mut Flags, a: T) -> T {
        let r = T::from_u64(0).sub(a);
        flags.set_arith(r, a | r);
        r
    }
}

struct Not;
impl UnaryOp for Not {
    #[inline(always)]
    fn run<T: Int>(_: &mut Flags, a: T) -> T {
        !a
    }
}

fn unary<O: UnaryOp, D: DestinationOperand, T: Int>(
    cpu: &mut Cpu,
    ram: &mut [u8],
    i: &Insn,
) -> Result<(), CpuStop> {
    D::modify::<T>(cpu, ram, i, |cpu, a| {
        let mut flags = cpu.flags;
        let r = O::run(&mut flags, a);
        (r, flags)
    })
}

fn form<O: UnaryOp>(ins: &Instruction) -> Handler {
    let table =
        if is_memory(ins, 0) { widths!(unary, O, Quick; else O, Mem) } else { widths!(unary, O, Dst) };
    table[log_size(ins, 0)]
}

/// Handlers of this family.
pub fn select(ins: &Instruction, insn: &mut Insn) -> Option<PlaceInBlock> {
    insn.exec = match ins.mnemonic() {
        Mnemonic::Inc => form::<Inc>(ins),
        Mnemonic::Dec => form::<Dec>(ins),
        Mnemonic::Neg => form::<Neg>(ins),
        Mnemonic::Not => form::<Not>(ins),
        _ => return None,
    };
    Some(PlaceInBlock::Middle)
}
