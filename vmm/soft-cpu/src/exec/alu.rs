//! ADD, OR, ADC, SBB, AND, SUB, XOR, CMP, TEST.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::operand::{DestinationOperand, Mem, Near, Quick, is_near, log_size, widths};
use crate::exit::CpuStop;
use crate::flags::Flags;
use crate::insn::{Handler, Insn, PlaceInBlock};
use crate::int::Int;
use crate::state::Cpu;

/// A two-operand operation: sets the flags and returns the result. `STORES` is false for CMP and TEST.
trait AluOp {
    const STORES: bool = true;
    fn run<T: Int>(flags: &mut Flags, a: T, b: T) -> T;
}

/// Carry out of each bit of `a + b = r`.
#[inline(always)]
fn carries<T: Int>(a: T, b: T, r: T) -> T {
    a & b | (a | b) & !r
}

/// Borrow into each bit of `a - b = r`.
#[inline(always)]
fn borrows<T: Int>(a: T, b: T, r: T) -> T {
    !a & b | !(a ^ b) & r
}

macro_rules! op {
    ($name:ident, $stores:expr, |$f:ident, $a:ident, $b:ident| $body:expr) => {
        struct $name;
        impl AluOp for $name {
            const STORES: bool = $stores;
            #[inline(always)]
            fn run<T: Int>($f: &mut Flags, $a: T, $b: T) -> T {
                $body
            }
        }
    };
}

op!(Add, true, |f, a, b| {
    let r = a.add(b);
    f.set_arith(r, carries(a, b, r));
    r
});
op!(Adc, true, |f, a, b| {
    let r = a.add(b).add(T::from_u64(f.cf() as u64));
    f.set_arith(r, carries(a, b, r));
    r
});
op!(Sub, true, |f, a, b| {
    let r = a.sub(b);
    f.set_arith(r, borrows(a, b, r));
    r
});
op!(Sbb, true, |f, a, b| {
    let r = a.sub(b).sub(T::from_u64(f.cf() as u64));
    f.set_arith(r, borrows(a, b, r));
    r
});
op!(Cmp, false, |f, a, b| Sub::run(f, a, b));
op!(And, true, |f, a, b| {
    let r = a & b;
    f.set_logic(r);
    r
});
op!(Or, true, |f, a, b| {
    let r = a | b;
    f.set_logic(r);
    r
});
op!(Xor, true, |f, a, b| {
    let r = a ^ b;
    f.set_logic(r);
    r
});
op!(Test, false, |f, a, b| And::run(f, a, b));

/// Returns `a + b` and sets the flags.
#[inline(always)]
pub(super) fn add<T: Int>(flags: &mut Flags, a: T, b: T) -> T {
    Add::run(flags, a, b)
}

/// Returns `a - b` and sets the flags.
#[inline(always)]
pub(super) fn sub<T: Int>(flags: &mut Flags, a: T, b: T) -> T {
    Sub::run(flags, a, b)
}

fn reg_reg<O: AluOp, T: Int>(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let (a, b) = (cpu.reg::<T>(i.dst), cpu.reg::<T>(i.src));
    let r = O::run(&mut cpu.flags, a, b);
    if O::STORES {
        cpu.set_reg(i.dst, r);
    }
    Ok(())
}

fn reg_imm<O: AluOp, T: Int>(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let a = cpu.reg::<T>(i.dst);
    let r = O::run(&mut cpu.flags, a, T::from_u64(i.imm));
    if O::STORES {
        cpu.set_reg(i.dst, r);
    }
    Ok(())
}

fn reg_mem<O: AluOp, M: DestinationOperand, T: Int>(
    cpu: &mut Cpu,
    ram: &mut [u8],
    i: &Insn,
) -> Result<(), CpuStop> {
    let b = M::load::<T>(cpu, ram, i)?;
    let a = cpu.reg::<T>(i.dst);
    let r = O::run(&mut cpu.flags, a, b);
    if O::STORES {
        cpu.set_reg(i.dst, r);
    }
    Ok(())
}

fn mem_reg<O: AluOp, M: DestinationOperand, T: Int>(
    cpu: &mut Cpu,
    ram: &mut [u8],
    i: &Insn,
) -> Result<(), CpuStop> {
    let b = cpu.reg::<T>(i.src);
    mem_value::<O, M, T>(cpu, ram, i, b)
}

fn mem_imm<O: AluOp, M: DestinationOperand, T: Int>(
    cpu: &mut Cpu,
    ram: &mut [u8],
    i: &Insn,
) -> Result<(), CpuStop> {
    mem_value::<O, M, T>(cpu, ram, i, T::from_u64(i.imm))
}

#[inline(always)]
fn mem_value<O: AluOp, M: DestinationOperand, T: Int>(
    cpu: &mut Cpu,
    ram: &mut [u8],
    i: &Insn,
    b: T,
) -> Result<(), CpuStop> {
    if !O::STORES {
        let a = M::load::<T>(cpu, ram, i)?;
        O::run(&mut cpu.flags, a, b);
        return Ok(());
    }
    M::modify::<T>(cpu, ram, i, |cpu, a| {
        let mut flags = cpu.flags;
        let r = O::run(&mut flags, a, b);
        (r, flags)
    })
}

/// The handler of `O` for the operand kinds and width of `ins`.
fn form<O: AluOp>(ins: &Instruction, insn: &Insn) -> Option<Handler> {
    use OpKind::{Memory as M, Register as R};
    let near = is_near(insn);
    let table = match (ins.op0_kind(), ins.op1_kind()) {
        (R, R) => widths!(reg_reg, O),
        (R, M) if near => widths!(reg_mem, O, Near; else O, Mem),
        (R, M) => widths!(reg_mem, O, Quick; else O, Mem),
        (M, R) if near => widths!(mem_reg, O, Near; else O, Mem),
        (M, R) => widths!(mem_reg, O, Quick; else O, Mem),
        (R, _) => widths!(reg_imm, O),
        (M, _) if near => widths!(mem_imm, O, Near; else O, Mem),
        (M, _) => widths!(mem_imm, O, Quick; else O, Mem),
        _ => return None,
    };
    Some(table[log_size(ins, 0)])
}

/// Handlers of this family.
pub fn select(ins: &Instruction, insn: &mut Insn) -> Option<PlaceInBlock> {
    insn.exec = match ins.mnemonic() {
        Mnemonic::Add => form::<Add>(ins, insn)?,
        Mnemonic::Or => form::<Or>(ins, insn)?,
        Mnemonic::Adc => form::<Adc>(ins, insn)?,
        Mnemonic::Sbb => form::<Sbb>(ins, insn)?,
        Mnemonic::And => form::<And>(ins, insn)?,
        Mnemonic::Sub => form::<Sub>(ins, insn)?,
        Mnemonic::Xor => form::<Xor>(ins, insn)?,
        Mnemonic::Cmp => form::<Cmp>(ins, insn)?,
        Mnemonic::Test => form::<Test>(ins, insn)?,
        _ => return None,
    };
    Some(PlaceInBlock::Middle)
}
