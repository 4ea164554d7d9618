//! INC, DEC, NEG, NOT.

use iced_x86::{Instruction, Mnemonic};

use super::operand::{Dst, Mem, Quick, Target, is_memory, log_size, widths};
use crate::decode::Place;
use crate::exit::Stop;
use crate::flags::Flags;
use crate::insn::{Handler, Insn, Int};
use crate::state::Cpu;

trait Op {
    fn run<T: Int>(flags: &mut Flags, a: T) -> T;
}

struct Inc;
impl Op for Inc {
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
impl Op for Dec {
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
impl Op for Neg {
    #[inline(always)]
    fn run<T: Int>(flags: &mut Flags, a: T) -> T {
        let r = T::from_u64(0).sub(a);
        flags.set_arith(r, a | r);
        r
    }
}

struct Not;
impl Op for Not {
    #[inline(always)]
    fn run<T: Int>(_: &mut Flags, a: T) -> T {
        !a
    }
}

fn unary<O: Op, D: Target, T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), Stop> {
    D::modify::<T>(cpu, ram, i, |cpu, a| {
        let mut flags = cpu.flags;
        let r = O::run(&mut flags, a);
        (r, flags)
    })
}

fn form<O: Op>(ins: &Instruction) -> Handler {
    let table =
        if is_memory(ins, 0) { widths!(unary, O, Quick; else O, Mem) } else { widths!(unary, O, Dst) };
    table[log_size(ins, 0)]
}

/// Handlers of this family.
pub fn select(ins: &Instruction, insn: &mut Insn) -> Option<Place> {
    insn.exec = match ins.mnemonic() {
        Mnemonic::Inc => form::<Inc>(ins),
        Mnemonic::Dec => form::<Dec>(ins),
        Mnemonic::Neg => form::<Neg>(ins),
        Mnemonic::Not => form::<Not>(ins),
        _ => return None,
    };
    Some(Place::Middle)
}
