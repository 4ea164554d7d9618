//! JMP, Jcc, CALL, RET (near), LOOP, LOOPE, LOOPNE, JRCXZ.
//!
//! While a branch other than Jcc runs, [`Cpu::rip`] is the address behind it. Targets must be canonical; the branch faults
//! where they are not, and has then changed nothing (but CALL, as on Intel's processors, the stack's memory).

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::operand::{Dst, Mem, Quick, Source, condition};
use super::stack::{Exact, Stack};
use crate::decode::Place;
use crate::exit::Stop;
use crate::insn::{Handler, Insn, Int, quick, run, threaded};
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
fn relative(cpu: &mut Cpu, i: &Insn) -> Result<u64, Stop> {
    let target = cpu.rip.wrapping_add(i.imm);
    check(cpu, target)
}

#[inline(always)]
fn check(cpu: &mut Cpu, target: u64) -> Result<u64, Stop> {
    if is_canonical(target) { Ok(target) } else { cpu.general_protection(0) }
}

/// A handler of its own kind: when it is not taken its block goes on behind it, when it is the rest is left. The
/// immediate counts from the start of the block.
fn jcc<const CC: u8>(cpu: &mut Cpu, ram: &mut [u8], insns: &[Insn]) -> Result<(), Stop> {
    let [i, rest @ ..] = insns else { return Ok(()) };
    if !cpu.flags.condition::<CC>() {
        return run(cpu, ram, rest);
    }
    cpu.left = rest.len();
    let target = cpu.regs[RIP_BASE as usize].wrapping_add(i.imm);
    cpu.rip = check(cpu, target)?;
    Ok(())
}

fn jmp(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), Stop> {
    cpu.rip = relative(cpu, i)?;
    Ok(())
}

fn jmp_to<S: Source>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), Stop> {
    let target = S::load(cpu, ram, i)?;
    cpu.rip = check(cpu, target)?;
    Ok(())
}

fn call<K: Stack>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), Stop> {
    let target = relative(cpu, i)?;
    let behind = cpu.rip;
    K::push(cpu, ram, behind)?;
    cpu.rip = target;
    Ok(())
}

fn call_to<K: Stack, S: Source>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), Stop> {
    let target = S::load(cpu, ram, i)?;
    let sp = cpu.regs[RSP];
    let behind = cpu.rip;
    K::push(cpu, ram, behind)?;
    if !is_canonical(target) {
        cpu.regs[RSP] = sp;
        return cpu.general_protection(0);
    }
    cpu.rip = target;
    Ok(())
}

/// The immediate is 0 in the form without one.
fn ret<K: Stack>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), Stop> {
    let at = cpu.regs[RSP];
    let target = K::load(cpu, ram, at)?;
    cpu.rip = check(cpu, target)?;
    cpu.regs[RSP] = at.wrapping_add(8).wrapping_add(i.imm & 0xffff);
    Ok(())
}

/// How LOOP goes on beyond a count that is not 0.
trait Also {
    fn holds(cpu: &Cpu) -> bool;
}
struct Always;
struct WhileZero;
struct WhileNotZero;
impl Also for Always {
    fn holds(_: &Cpu) -> bool {
        true
    }
}
impl Also for WhileZero {
    fn holds(cpu: &Cpu) -> bool {
        cpu.flags.zf()
    }
}
impl Also for WhileNotZero {
    fn holds(cpu: &Cpu) -> bool {
        !cpu.flags.zf()
    }
}

/// `T` is the address size: it chooses RCX or ECX.
fn loop_while<A: Also, T: Int>(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), Stop> {
    let count = cpu.reg::<T>(reg::RCX).sub(T::from_u64(1));
    if count != T::from_u64(0) && A::holds(cpu) {
        cpu.rip = relative(cpu, i)?;
    }
    cpu.set_reg(reg::RCX, count);
    Ok(())
}

fn jrcxz<T: Int>(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), Stop> {
    if cpu.reg::<T>(reg::RCX) == T::from_u64(0) {
        cpu.rip = relative(cpu, i)?;
    }
    Ok(())
}

/// Handlers of this family.
pub fn select(ins: &Instruction, insn: &mut Insn) -> Option<Place> {
    insn.exec = match ins.code() {
        Code::Jmp_rel8_64 | Code::Jmp_rel32_64 => threaded!(jmp),
        Code::Jmp_rm64 if ins.op0_kind() == OpKind::Memory => quick!(jmp_to::<Quick>, jmp_to::<Mem>),
        Code::Jmp_rm64 => threaded!(jmp_to::<Dst>),
        Code::Call_rel32_64 => quick!(call::<Quick>, call::<Exact>),
        Code::Call_rm64 if ins.op0_kind() == OpKind::Memory => {
            quick!(call_to::<Quick, Quick>, call_to::<Exact, Mem>)
        }
        Code::Call_rm64 => quick!(call_to::<Quick, Dst>, call_to::<Exact, Dst>),
        Code::Retnq | Code::Retnq_imm16 => quick!(ret::<Quick>, ret::<Exact>),
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
            return Some(Place::Middle);
        }
    };
    Some(Place::Last)
}

fn select_jcc(ins: &Instruction) -> Option<Handler> {
    use Mnemonic::*;
    let is_jcc = matches!(
        ins.mnemonic(),
        Ja | Jae | Jb | Jbe | Je | Jg | Jge | Jl | Jle | Jne | Jno | Jnp | Jns | Jo | Jp | Js
    );
    if is_jcc { Some(JCC[condition(ins)?]) } else { None }
}
