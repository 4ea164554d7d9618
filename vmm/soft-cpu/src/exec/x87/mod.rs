//! The x87: its register stack, its status word, and how an instruction reports exceptions.
//!
//! An unmasked exception sets ES; the next waiting instruction raises #MF, whatever CR0.NE is (there is no
//! external interrupt controller for FERR#). FIP, FDP and FOP are set by FNINIT, FLDENV, FRSTOR and FXRSTOR
//! only, as on a CPU that saves them only for pending exceptions. Condition codes that the architecture
//! leaves undefined keep their values, except that C1 is cleared.

mod arith;
mod compare;
mod control;
mod data;
mod function;
mod save;

use iced_x86::Instruction;

use super::{CR0_EM, CR0_TS};
use crate::exit::CpuStop;
use crate::float::{F80, FloatContext, IE, PE};
use crate::insn::{Insn, PlaceInBlock};
use crate::state::Cpu;

/// Status: stack fault.
const SF: u16 = 1 << 6;
/// Status: an unmasked exception is pending.
const ES: u16 = 1 << 7;
/// Status: the busy bit of the 8087, now a copy of ES.
const BUSY: u16 = 1 << 15;
const C0: u16 = 1 << 8;
const C1: u16 = 1 << 9;
const C2: u16 = 1 << 10;
const C3: u16 = 1 << 14;
/// The exception flags of the status word, and the masks of the control word.
const EXCEPTIONS: u16 = 0x3f;

/// Handlers of this family.
pub fn select(ins: &Instruction, insn: &mut Insn) -> Option<PlaceInBlock> {
    let families =
        [data::select, arith::select, compare::select, function::select, control::select, save::select];
    families.iter().find_map(|select| select(ins, insn))?;
    Some(PlaceInBlock::Middle)
}

/// Raises #NM, or #MF for an exception that an earlier instruction left pending.
#[inline]
fn guard(cpu: &mut Cpu) -> Result<(), CpuStop> {
    guard_no_wait(cpu)?;
    if cpu.x87.status & ES != 0 { cpu.raise(16, None) } else { Ok(()) }
}

/// Raises #NM only: for the instructions that do not wait.
#[inline]
fn guard_no_wait(cpu: &mut Cpu) -> Result<(), CpuStop> {
    if cpu.sys.cr0 & (CR0_EM | CR0_TS) != 0 { cpu.raise(7, None) } else { Ok(()) }
}

/// The physical register that is ST(`i`).
#[inline(always)]
fn physical(cpu: &Cpu, i: u8) -> usize {
    (cpu.x87.top + i) as usize & 7
}

fn is_empty(cpu: &Cpu, i: u8) -> bool {
    cpu.x87.in_use >> physical(cpu, i) & 1 == 0
}

/// ST(`i`), whether in use or not.
fn get(cpu: &Cpu, i: u8) -> F80 {
    let r = physical(cpu, i);
    F80 { significand: cpu.x87.significand[r], sign_exp: cpu.x87.sign_exponent[r] }
}

/// Writes ST(`i`) and marks it as in use.
fn set(cpu: &mut Cpu, i: u8, value: F80) {
    let r = physical(cpu, i);
    cpu.x87.significand[r] = value.significand;
    cpu.x87.sign_exponent[r] = value.sign_exp;
    cpu.x87.in_use |= 1 << r;
}

fn free(cpu: &mut Cpu, i: u8) {
    cpu.x87.in_use &= !(1 << physical(cpu, i));
}

fn rotate(cpu: &mut Cpu, by: u8) {
    cpu.x87.top = cpu.x87.top.wrapping_add(by) & 7;
}

fn pop(cpu: &mut Cpu) {
    free(cpu, 0);
    rotate(cpu, 1);
}

fn push(cpu: &mut Cpu, value: F80) {
    rotate(cpu, 7);
    set(cpu, 0, value);
}

fn context(cpu: &Cpu) -> FloatContext {
    FloatContext::from_control_word(cpu.x87.control)
}

/// Adds exceptions to the status word, sets C1, and marks an unmasked exception as pending.
fn report(cpu: &mut Cpu, exceptions: u16, c1: bool) {
    let x87 = &mut cpu.x87;
    x87.status = x87.status & !C1 | exceptions | if c1 { C1 } else { 0 };
    summarise(cpu);
}

/// Derives ES and the busy bit from flags and masks.
fn summarise(cpu: &mut Cpu) {
    let x87 = &mut cpu.x87;
    x87.status &= !(ES | BUSY);
    if x87.status & !x87.control & EXCEPTIONS != 0 {
        x87.status |= ES | BUSY;
    }
}

/// Reports the exceptions of a computation. Returns false if there is no result to store because of an
/// unmasked one.
fn signal(cpu: &mut Cpu, cx: &FloatContext) -> bool {
    let result = !cx.no_result();
    report(cpu, cx.raised().into(), result && cx.rounded_up && cx.flags & PE != 0);
    result
}

/// Reports a stack overflow or underflow. Returns true if it is masked; then the result is the real
/// indefinite.
fn stack_fault(cpu: &mut Cpu, overflow: bool) -> bool {
    report(cpu, SF | u16::from(IE), overflow);
    cpu.x87.control & u16::from(IE) != 0
}

fn clear_c1(cpu: &mut Cpu) {
    cpu.x87.status &= !C1;
}
