//! Comparisons, with their result in the condition codes or in RFLAGS; FTST, FXAM.

use std::cmp::Ordering;

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::arith::{LoadOperand, double, dword, single, word};
use super::{C0, C1, C2, C3, context, get, guard, is_empty, pop, signal, stack_fault};
use crate::exit::CpuStop;
use crate::flags::bits::{CF, PF, ZF};
use crate::float::{self, FloatClass, Operand};
use crate::insn::{Handler, Insn, threaded};
use crate::state::Cpu;

/// Compares ST(0) with `b` (`None`: an empty register). Returns the order, and whether the stack may be
/// popped: an unmasked exception prevents that.
fn order(cpu: &mut Cpu, b: Option<Operand>, quiet: bool) -> (Option<Ordering>, bool) {
    match b {
        Some(b) if !is_empty(cpu, 0) => {
            let mut cx = context(cpu);
            let order = float::compare(get(cpu, 0).operand(), b, quiet, &mut cx);
            (order, signal(cpu, &cx))
        }
        _ => (None, stack_fault(cpu, false)),
    }
}

fn register(cpu: &Cpu, i: u8) -> Option<Operand> {
    (!is_empty(cpu, i)).then(|| get(cpu, i).operand())
}

/// Compares ST(0) with `b`, sets the condition codes, and pops.
fn to_codes(cpu: &mut Cpu, b: Option<Operand>, quiet: bool, pops: u8) {
    let (order, may_pop) = order(cpu, b, quiet);
    let codes = match order {
        None => C0 | C2 | C3,
        Some(Ordering::Less) => C0,
        Some(Ordering::Equal) => C3,
        Some(Ordering::Greater) => 0,
    };
    cpu.x87.status = cpu.x87.status & !(C0 | C2 | C3) | codes;
    for _ in 0..if may_pop { pops } else { 0 } {
        pop(cpu);
    }
}

fn registers<const QUIET: bool, const POPS: u8>(
    cpu: &mut Cpu,
    _: &mut [u8],
    i: &Insn,
) -> Result<(), CpuStop> {
    guard(cpu)?;
    let b = register(cpu, i.src);
    to_codes(cpu, b, QUIET, POPS);
    Ok(())
}

/// FCOMPP, FUCOMPP: compare with ST(1).
fn next<const QUIET: bool>(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let b = register(cpu, 1);
    to_codes(cpu, b, QUIET, 2);
    Ok(())
}

#[inline(always)]
fn memory(cpu: &mut Cpu, ram: &mut [u8], i: &Insn, load: LoadOperand, pops: u8) -> Result<(), CpuStop> {
    guard(cpu)?;
    let b = load(cpu, ram, i)?;
    to_codes(cpu, Some(b), false, pops);
    Ok(())
}

fn ftst(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    to_codes(cpu, Some(Operand::zero(false)), false, 0);
    Ok(())
}

/// FCOMI, FUCOMI and their popping forms. They leave C1 unchanged, except for a stack fault.
fn to_flags<const QUIET: bool, const POP: bool>(
    cpu: &mut Cpu,
    _: &mut [u8],
    i: &Insn,
) -> Result<(), CpuStop> {
    guard(cpu)?;
    let b = register(cpu, i.src);
    let c1 = if b.is_some() && !is_empty(cpu, 0) { cpu.x87.status & C1 } else { 0 };
    let (order, may_pop) = order(cpu, b, QUIET);
    cpu.x87.status |= c1;
    cpu.flags.set_status(match order {
        None => ZF | PF | CF,
        Some(Ordering::Less) => CF,
        Some(Ordering::Equal) => ZF,
        Some(Ordering::Greater) => 0,
    });
    if POP && may_pop {
        pop(cpu);
    }
    Ok(())
}

fn fxam(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let x = get(cpu, 0);
    let class = match x.operand().class {
        _ if is_empty(cpu, 0) => C0 | C3,
        FloatClass::Unsupported => 0,
        FloatClass::Quiet | FloatClass::Signaling => C0,
        FloatClass::Normal => C2,
        FloatClass::Infinity => C0 | C2,
        FloatClass::Zero => C3,
        FloatClass::Denormal => C2 | C3,
    };
    let sign = if x.sign_exp >> 15 != 0 { C1 } else { 0 };
    cpu.x87.status = cpu.x87.status & !(C0 | C1 | C2 | C3) | class | sign;
    Ok(())
}

/// Handlers of this family.
pub(super) fn select(ins: &Instruction, insn: &mut Insn) -> Option<()> {
    let memory_size = if ins.op0_kind() == OpKind::Memory { ins.memory_size().size() } else { 0 };
    let handler: Handler = match (ins.mnemonic(), memory_size) {
        (Mnemonic::Fcom, 0) => threaded!(registers::<false, 0>),
        (Mnemonic::Fcomp, 0) => threaded!(registers::<false, 1>),
        (Mnemonic::Fcompp, _) => threaded!(next::<false>),
        (Mnemonic::Fucom, _) => threaded!(registers::<true, 0>),
        (Mnemonic::Fucomp, _) => threaded!(registers::<true, 1>),
        (Mnemonic::Fucompp, _) => threaded!(next::<true>),
        (Mnemonic::Fcom, 4) => threaded!(|cpu, ram, i| memory(cpu, ram, i, single, 0)),
        (Mnemonic::Fcom, _) => threaded!(|cpu, ram, i| memory(cpu, ram, i, double, 0)),
        (Mnemonic::Fcomp, 4) => threaded!(|cpu, ram, i| memory(cpu, ram, i, single, 1)),
        (Mnemonic::Fcomp, _) => threaded!(|cpu, ram, i| memory(cpu, ram, i, double, 1)),
        (Mnemonic::Ficom, 2) => threaded!(|cpu, ram, i| memory(cpu, ram, i, word, 0)),
        (Mnemonic::Ficom, _) => threaded!(|cpu, ram, i| memory(cpu, ram, i, dword, 0)),
        (Mnemonic::Ficomp, 2) => threaded!(|cpu, ram, i| memory(cpu, ram, i, word, 1)),
        (Mnemonic::Ficomp, _) => threaded!(|cpu, ram, i| memory(cpu, ram, i, dword, 1)),
        (Mnemonic::Fcomi, _) => threaded!(to_flags::<false, false>),
        (Mnemonic::Fcomip, _) => threaded!(to_flags::<false, true>),
        (Mnemonic::Fucomi, _) => threaded!(to_flags::<true, false>),
        (Mnemonic::Fucomip, _) => threaded!(to_flags::<true, true>),
        (Mnemonic::Ftst, _) => threaded!(ftst),
        (Mnemonic::Fxam, _) => threaded!(fxam),
        _ => return None,
    };
    insn.exec = handler;
    Some(())
}
