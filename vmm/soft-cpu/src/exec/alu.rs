//! ADD, OR, ADC, SBB, AND, SUB, XOR, CMP.

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::decode::Place;
use crate::exit::Stop;
use crate::flags::Flags;
use crate::insn::{Handler, Insn, Int};
use crate::state::Cpu;

/// A two-operand operation: its result, after setting the flags. `STORES` is false for CMP and TEST.
trait Op {
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
        impl Op for $name {
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

/// `a + b`, with its flags.
#[inline(always)]
pub(super) fn add<T: Int>(flags: &mut Flags, a: T, b: T) -> T {
    Add::run(flags, a, b)
}

/// `a - b`, with its flags.
#[inline(always)]
pub(super) fn sub<T: Int>(flags: &mut Flags, a: T, b: T) -> T {
    Sub::run(flags, a, b)
}

fn reg_reg<O: Op, T: Int>(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), Stop> {
    let (a, b) = (cpu.reg::<T>(i.dst), cpu.reg::<T>(i.src));
    let r = O::run(&mut cpu.flags, a, b);
    if O::STORES {
        cpu.set_reg(i.dst, r);
    }
    Ok(())
}

fn reg_imm<O: Op, T: Int>(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), Stop> {
    let a = cpu.reg::<T>(i.dst);
    let r = O::run(&mut cpu.flags, a, T::from_u64(i.imm));
    if O::STORES {
        cpu.set_reg(i.dst, r);
    }
    Ok(())
}

fn reg_mem<O: Op, T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), Stop> {
    let b = cpu.load_operand::<T>(ram, i)?;
    let a = cpu.reg::<T>(i.dst);
    let r = O::run(&mut cpu.flags, a, b);
    if O::STORES {
        cpu.set_reg(i.dst, r);
    }
    Ok(())
}

fn mem_reg<O: Op, T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), Stop> {
    let b = cpu.reg::<T>(i.src);
    mem_value::<O, T>(cpu, ram, i, b)
}

fn mem_imm<O: Op, T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), Stop> {
    mem_value::<O, T>(cpu, ram, i, T::from_u64(i.imm))
}

#[inline(always)]
fn mem_value<O: Op, T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn, b: T) -> Result<(), Stop> {
    if !O::STORES {
        let a = cpu.load_operand::<T>(ram, i)?;
        O::run(&mut cpu.flags, a, b);
        return Ok(());
    }
    cpu.modify_operand::<T>(ram, i, |cpu, a| {
        let mut flags = cpu.flags;
        let r = O::run(&mut flags, a, b);
        (r, flags)
    })
}

/// The handler of `O` for the operand kinds and width of `ins`.
fn form<O: Op>(ins: &Instruction) -> Option<Handler> {
    use OpKind::{Memory as M, Register as R};
    macro_rules! widths {
        ($f:ident) => {
            [$f::<O, u8>, $f::<O, u16>, $f::<O, u32>, $f::<O, u64>]
        };
    }
    let (a, b) = (ins.op0_kind(), ins.op1_kind());
    let table: [Handler; 4] = match (a, b) {
        (R, R) => widths!(reg_reg),
        (R, M) => widths!(reg_mem),
        (M, R) => widths!(mem_reg),
        (R, _) => widths!(reg_imm),
        (M, _) => widths!(mem_imm),
        _ => return None,
    };
    let bytes = if a == R { ins.op0_register().size() } else { ins.memory_size().size() };
    Some(table[bytes.trailing_zeros() as usize])
}

/// Handlers of this family.
pub fn select(ins: &Instruction, insn: &mut Insn) -> Option<Place> {
    insn.exec = match ins.mnemonic() {
        Mnemonic::Add => form::<Add>(ins)?,
        Mnemonic::Or => form::<Or>(ins)?,
        Mnemonic::Adc => form::<Adc>(ins)?,
        Mnemonic::Sbb => form::<Sbb>(ins)?,
        Mnemonic::And => form::<And>(ins)?,
        Mnemonic::Sub => form::<Sub>(ins)?,
        Mnemonic::Xor => form::<Xor>(ins)?,
        Mnemonic::Cmp => form::<Cmp>(ins)?,
        Mnemonic::Test => form::<Test>(ins)?,
        _ => return None,
    };
    Some(Place::Middle)
}
