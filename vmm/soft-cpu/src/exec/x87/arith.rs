//! FADD, FSUB, FMUL, FDIV, in all forms.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::{context, get, guard, is_empty, pop, set, signal, stack_fault};
use crate::exit::CpuStop;
use crate::float::{self, F32, F64, F80, Float, FloatContext, Operand};
use crate::insn::{Handler, Insn, threaded};
use crate::state::Cpu;

/// An operation on destination and source.
type X87Op = fn(Operand, Operand, &mut FloatContext) -> F80;

const ADD: X87Op = float::add;
const SUB: X87Op = float::sub;
const MUL: X87Op = float::mul;
const DIV: X87Op = float::div;
const SUB_REVERSED: X87Op = |a, b, cx| float::sub(b, a, cx);
const DIV_REVERSED: X87Op = |a, b, cx| float::div(b, a, cx);

/// Reads a memory operand as a number.
pub(super) type LoadOperand = fn(&mut Cpu, &mut [u8], &Insn) -> Result<Operand, CpuStop>;

pub(super) fn single(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<Operand, CpuStop> {
    let bits = cpu.load_operand::<u32>(ram, i)?;
    Ok(F32(bits).unpack(&context(cpu)))
}

pub(super) fn double(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<Operand, CpuStop> {
    let bits = cpu.load_operand::<u64>(ram, i)?;
    Ok(F64(bits).unpack(&context(cpu)))
}

pub(super) fn word(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<Operand, CpuStop> {
    Ok(Operand::from_i64((cpu.load_operand::<u16>(ram, i)? as i16).into()))
}

pub(super) fn dword(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<Operand, CpuStop> {
    Ok(Operand::from_i64((cpu.load_operand::<u32>(ram, i)? as i32).into()))
}

pub(super) fn qword(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<Operand, CpuStop> {
    Ok(Operand::from_i64(cpu.load_operand::<u64>(ram, i)? as i64))
}

#[inline(always)]
fn registers(cpu: &mut Cpu, i: &Insn, pops: bool, op: X87Op) -> Result<(), CpuStop> {
    guard(cpu)?;
    if is_empty(cpu, i.dst) || is_empty(cpu, i.src) {
        if !stack_fault(cpu, false) {
            return Ok(());
        }
        set(cpu, i.dst, F80::DEFAULT_NAN);
    } else {
        let mut cx = context(cpu);
        let value = op(get(cpu, i.dst).operand(), get(cpu, i.src).operand(), &mut cx);
        if !signal(cpu, &cx) {
            return Ok(());
        }
        set(cpu, i.dst, value);
    }
    if pops {
        pop(cpu);
    }
    Ok(())
}

#[inline(always)]
fn memory(cpu: &mut Cpu, ram: &mut [u8], i: &Insn, load: LoadOperand, op: X87Op) -> Result<(), CpuStop> {
    guard(cpu)?;
    let b = load(cpu, ram, i)?;
    if is_empty(cpu, 0) {
        if stack_fault(cpu, false) {
            set(cpu, 0, F80::DEFAULT_NAN);
        }
        return Ok(());
    }
    let mut cx = context(cpu);
    let value = op(get(cpu, 0).operand(), b, &mut cx);
    if signal(cpu, &cx) {
        set(cpu, 0, value);
    }
    Ok(())
}

/// Handlers of this family.
pub(super) fn select(ins: &Instruction, insn: &mut Insn) -> Option<()> {
    let memory_size = if ins.op0_kind() == OpKind::Memory { ins.memory_size().size() } else { 0 };
    macro_rules! table {
        ($($name:ident $popping:ident $integer:ident = $op:expr;)*) => {
            match (ins.mnemonic(), memory_size) {
                $((Mnemonic::$name, 0) => threaded!(|cpu, _, i| registers(cpu, i, false, $op)),
                (Mnemonic::$popping, _) => threaded!(|cpu, _, i| registers(cpu, i, true, $op)),
                (Mnemonic::$name, 4) => threaded!(|cpu, ram, i| memory(cpu, ram, i, single, $op)),
                (Mnemonic::$name, _) => threaded!(|cpu, ram, i| memory(cpu, ram, i, double, $op)),
                (Mnemonic::$integer, 2) => threaded!(|cpu, ram, i| memory(cpu, ram, i, word, $op)),
                (Mnemonic::$integer, _) => threaded!(|cpu, ram, i| memory(cpu, ram, i, dword, $op)),)*
                _ => return None,
            }
        };
    }
    let handler: Handler = table! {
        Fadd Faddp Fiadd = ADD;
        Fsub Fsubp Fisub = SUB;
        Fsubr Fsubrp Fisubr = SUB_REVERSED;
        Fmul Fmulp Fimul = MUL;
        Fdiv Fdivp Fidiv = DIV;
        Fdivr Fdivrp Fidivr = DIV_REVERSED;
    };
    insn.exec = handler;
    Some(())
}
