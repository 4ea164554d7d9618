//! JMP, Jcc, CALL, RET (near), LOOP, LOOPE, LOOPNE, JRCXZ.
//!
//! While a branch other than Jcc runs, [`Cpu::rip`] is the address of its end. Targets must be canonical;
//! otherwise the branch faults and has changed nothing (except that CALL, as on Intel's processors, has
//! written to the stack).

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::operand::{Dst, Mem, Quick, SourceOperand, condition};
use super::stack::{ExactStack, Stack};
use crate::exit::CpuStop;
use crate::insn::{Handler, Insn, PlaceInBlock, quick, run, threaded};
use crate::int::Int;
use crate::paging::is_canonical;
use crate::state::{Cpu, RIP_BASE, reg};

const RSP: usize = reg::RSP as usize;

#[rustfmt::skip]
const JCC: [Handler; 16] = [
    jcc::<0>, jcc::<1>, jcc::<2>, jcc::<3>, jcc::<4>, jcc::<5>, jcc::<6>, jcc::<7>,
    jcc::<8>, jcc::<9>, jcc::<10>, jcc::<11>, jcc::<12>, jcc::<13>, jcc::<14>, jcc::<15>,
];

/// The target of a relative branch.
#[inline(always)]
fn relative(cpu: &mut Cpu, i: &Insn) -> Result<u64, CpuStop> {
    let target = cpu.rip.wrapping_add(i.imm);
    check_canonical(cpu, target)
}

/// The target itself, or #GP if it is not canonical.
#[inline(always)]
fn check_canonical(cpu: &mut Cpu, target: u64) -> Result<u64, CpuStop> {
    if is_canonical(target) { Ok(target) } else { cpu.general_protection(0) }
}

/// A handler that may end its block early: if the jump is taken, the rest of the block does not run. The
/// immediate counts from the start of the block.
fn jcc<const CC: u8>(cpu: &mut Cpu, ram: &mut [u8], insns: &[Insn]) -> Result<(), CpuStop> {
    let [i, rest @ ..] = insns else { return Ok(()) };
    if !cpu.flags.condition::<CC>() {
        return run(cpu, ram, rest);
    }
    cpu.left = rest.len();
    let target = cpu.regs[RIP_BASE as usize].wrapping_add(i.imm);
    cpu.rip = check_canonical(cpu, target)?;
    Ok(())
}

fn jmp(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    cpu.rip = relative(cpu, i)?;
    Ok(())
}

fn jmp_to<S: SourceOperand>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let target = S::load(cpu, ram, i)?;
    cpu.rip = check_canonical(cpu, target)?;
    Ok(())
}

fn call<K: Stack>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let target = relative(cpu, i)?;
    let return_address = cpu.rip;
    K::push(cpu, ram, return_address)?;
    cpu.rip = target;
    Ok(())
}

fn call_to<K: Stack, S: SourceOperand>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let target = S::load(cpu, ram, i)?;
    let sp = cpu.regs[RSP];
    let return_address = cpu.rip;
    K::push(cpu, ram, return_address)?;
    if !is_canonical(target) {
        cpu.regs[RSP] = sp;
        return cpu.general_protection(0);
    }
    cpu.rip = target;
    Ok(())
}

/// RET; the immediate is 0 in the form without one.
fn ret<K: Stack>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let at = cpu.regs[RSP];
    let target = K::load(cpu, ram, at)?;
    cpu.rip = check_canonical(cpu, target)?;
    cpu.regs[RSP] = at.wrapping_add(8).wrapping_add(i.imm & 0xffff);
    Ok(())
}

/// The condition of LOOP, besides a count that is not 0.
trait LoopCondition {
    fn holds(cpu: &Cpu) -> bool;
}
struct Always;
struct WhileZero;
struct WhileNotZero;
impl LoopCondition for Always {
    fn holds(_: &Cpu) -> bool {
        true
    }
}
impl LoopCondition for WhileZero {
    fn holds(cpu: &Cpu) -> bool {
        cpu.flags.zf()
    }
}
impl LoopCondition for WhileNotZero {
    fn holds(cpu: &Cpu) -> bool {
        !cpu.flags.zf()
    }
}

/// `T` is the address size: it chooses RCX or ECX.
fn loop_while<A: LoopCondition, T: Int>(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let count = cpu.reg::<T>(reg::RCX).sub(T::from_u64(1));
    if count != T::from_u64(0) && A::holds(cpu) {
        cpu.rip = relative(cpu, i)?;
    }
    cpu.set_reg(reg::RCX, count);
    Ok(())
}

fn jrcxz<T: Int>(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    if cpu.reg::<T>(reg::RCX) == T::from_u64(0) {
        cpu.rip = relative(cpu, i)?;
    }
    Ok(())
}

/// Handlers of this family.
pub fn select(ins: &Instruction, insn: &mut Insn) -> Option<PlaceInBlock> {
    insn.exec = match ins.code() {
        Code::Jmp_rel8_64 | Code::Jmp_rel32_64 => threaded!(jmp),
        Code::Jmp_rm64 if ins.op0_kind() == OpKind::Memory => quick!(jmp_to::<Quick>, jmp_to::<Mem>),
        Code::Jmp_rm64 => threaded!(jmp_to::<Dst>),
        Code::Call_rel32_64 => quick!(call::<Quick>, call::<ExactStack>),
        Code::Call_rm64 if ins.op0_kind() == OpKind::Memory => {
            quick!(call_to::<Quick, Quick>, call_to::<ExactStack, Mem>)
        }
        Code::Call_rm64 => quick!(call_to::<Quick, Dst>, call_to::<ExactStack, Dst>),
        Code::Retnq | Code::Retnq_imm16 => quick!(ret::<Quick>, ret::<ExactStack>),
        Code::Loop_rel8_64_RCX => threaded!(loop_while::<Always, u64>),
        Code::Loop_rel8_64_ECX => threaded!(loop_while::<Always, u32>),
        Code::Loope_rel8_64_RCX => threaded!(loop_while::<WhileZero, u64>),
        Code::Loope_rel8_64_ECX => threaded!(loop_while::<WhileZero, u32>),
        Code::Loopne_rel8_64_RCX => threaded!(loop_while::<WhileNotZero, u64>),
        Code::Loopne_rel8_64_ECX => threaded!(loop_while::<WhileNotZero, u32>),
        Code::Jrcxz_rel8_64 => threaded!(jrcxz::<u64>),
        Code::Jecxz_rel8_64 => threaded!(jrcxz::<u32>),
        _ => {
            insn.exec = select_jcc(ins)?;
            insn.imm = insn.imm.wrapping_add(insn.offset as u64 + insn.len as u64);
            return Some(PlaceInBlock::Middle);
        }
    };
    Some(PlaceInBlock::Last)
}

fn select_jcc(ins: &Instruction) -> Option<Handler> {
    use Mnemonic::*;
    let is_jcc = matches!(
        ins.mnemonic(),
        Ja | Jae | Jb | Jbe | Je | Jg | Jge | Jl | Jle | Jne | Jno | Jnp | Jns | Jo | Jp | Js
    );
    if is_jcc { Some(JCC[condition(ins)?]) } else { None }
}
