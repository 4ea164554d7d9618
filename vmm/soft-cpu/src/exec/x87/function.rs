//! Functions of ST(0), and of ST(0) and ST(1).

use iced_x86::{Instruction, Mnemonic};

use super::{C0, C1, C2, C3, context, get, guard, is_empty, pop, push, set, signal, stack_fault};
use crate::exit::CpuStop;
use crate::float::{self, F80, FloatContext, transcendental};
use crate::insn::{Handler, Insn, threaded};
use crate::state::Cpu;

/// ST(0) = f(ST(0)).
#[inline(always)]
fn unary(cpu: &mut Cpu, f: fn(F80, &mut FloatContext) -> F80) -> Result<(), CpuStop> {
    guard(cpu)?;
    replace(cpu, 0, |cpu, cx| f(get(cpu, 0), cx));
    Ok(())
}

/// ST(0) = f(ST(0), ST(1)).
#[inline(always)]
fn binary(cpu: &mut Cpu, f: fn(F80, F80, &mut FloatContext) -> F80) -> Result<(), CpuStop> {
    guard(cpu)?;
    replace(cpu, 1, |cpu, cx| f(get(cpu, 0), get(cpu, 1), cx));
    Ok(())
}

/// Replaces ST(0) by a value that is computed from the registers up to ST(`last`).
fn replace(cpu: &mut Cpu, last: u8, f: impl FnOnce(&mut Cpu, &mut FloatContext) -> F80) {
    if (0..=last).any(|r| is_empty(cpu, r)) {
        if stack_fault(cpu, false) {
            set(cpu, 0, F80::DEFAULT_NAN);
        }
        return;
    }
    let mut cx = context(cpu);
    let value = f(cpu, &mut cx);
    if signal(cpu, &cx) {
        set(cpu, 0, value);
    }
}

/// ST(1) = f(ST(1), ST(0)), then pops.
#[inline(always)]
fn popping(cpu: &mut Cpu, f: fn(F80, F80, &mut FloatContext) -> F80) -> Result<(), CpuStop> {
    guard(cpu)?;
    let value = if is_empty(cpu, 0) || is_empty(cpu, 1) {
        if !stack_fault(cpu, false) {
            return Ok(());
        }
        F80::DEFAULT_NAN
    } else {
        let mut cx = context(cpu);
        let value = f(get(cpu, 1), get(cpu, 0), &mut cx);
        if !signal(cpu, &cx) {
            return Ok(());
        }
        value
    };
    set(cpu, 1, value);
    pop(cpu);
    Ok(())
}

/// FABS, FCHS: a change of the sign bit.
#[inline(always)]
fn sign(cpu: &mut Cpu, f: fn(u16) -> u16) -> Result<(), CpuStop> {
    guard(cpu)?;
    replace(cpu, 0, |cpu, _| {
        let x = get(cpu, 0);
        F80 { sign_exp: f(x.sign_exp), ..x }
    });
    Ok(())
}

/// FPREM, FPREM1: C0, C3 and C1 get the low bits of the quotient; C2 is set if the reduction is partial.
/// Without a quotient C0 and C3 stay.
fn remainder<const NEAREST: bool>(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    cpu.x87.status &= !C2;
    if is_empty(cpu, 0) || is_empty(cpu, 1) {
        if stack_fault(cpu, false) {
            set(cpu, 0, F80::DEFAULT_NAN);
        }
        return Ok(());
    }
    let mut cx = context(cpu);
    let r = float::remainder(get(cpu, 0), get(cpu, 1), NEAREST, &mut cx);
    if signal(cpu, &cx) {
        set(cpu, 0, r.value);
        let flag = |set: bool, bit| if set { bit } else { 0 };
        if let Some(q) = r.quotient {
            let bits = flag(q & 4 != 0, C0) | flag(q & 2 != 0, C3) | flag(q & 1 != 0, C1);
            cpu.x87.status = cpu.x87.status & !(C0 | C1 | C3) | bits | flag(r.incomplete, C2);
        }
    }
    Ok(())
}

/// FSIN, FCOS: if ST(0) is out of range it stays, and C2 is set.
#[inline(always)]
fn circular(cpu: &mut Cpu, f: fn(F80, &mut FloatContext) -> Option<F80>) -> Result<(), CpuStop> {
    guard(cpu)?;
    replace(cpu, 0, |cpu, cx| {
        let x = get(cpu, 0);
        let value = f(x, cx);
        note_range(cpu, value.is_some());
        value.unwrap_or(x)
    });
    Ok(())
}

/// Sets C2 if the operand was out of range.
fn note_range(cpu: &mut Cpu, in_range: bool) {
    cpu.x87.status = cpu.x87.status & !C2 | if in_range { 0 } else { C2 };
}

/// Computes the new ST(0) and the value to push, or `None` if ST(0) is out of range.
type PairFunction = fn(F80, &mut FloatContext) -> Option<(F80, F80)>;

/// FSINCOS, FPTAN, FXTRACT: replace ST(0) and push. For the first two (`has_range`) C2 is set if ST(0) is out
/// of range.
#[inline(always)]
fn pushing(cpu: &mut Cpu, has_range: bool, f: PairFunction) -> Result<(), CpuStop> {
    guard(cpu)?;
    let pair = if is_empty(cpu, 0) || !is_empty(cpu, 7) {
        let overflow = !is_empty(cpu, 0);
        if !stack_fault(cpu, overflow) {
            return Ok(());
        }
        Some((F80::DEFAULT_NAN, F80::DEFAULT_NAN))
    } else {
        let mut cx = context(cpu);
        let pair = f(get(cpu, 0), &mut cx);
        if !signal(cpu, &cx) {
            return Ok(());
        }
        if has_range {
            note_range(cpu, pair.is_some());
        }
        pair
    };
    if let Some((replaced, pushed)) = pair {
        set(cpu, 0, replaced);
        push(cpu, pushed);
    }
    Ok(())
}

fn sincos(x: F80, cx: &mut FloatContext) -> Option<(F80, F80)> {
    let sine = transcendental::fsin(x, cx)?;
    Some((sine, transcendental::fcos(x, cx)?))
}

fn ptan(x: F80, cx: &mut FloatContext) -> Option<(F80, F80)> {
    let tangent = transcendental::fptan(x, cx)?;
    let is_nan = tangent.operand().is_nan();
    Some((tangent, if is_nan { tangent } else { F80::ONE }))
}

fn xtract(x: F80, cx: &mut FloatContext) -> Option<(F80, F80)> {
    Some(float::extract(x, cx))
}

/// Handlers of this family.
pub(super) fn select(ins: &Instruction, insn: &mut Insn) -> Option<()> {
    let handler: Handler = match ins.mnemonic() {
        Mnemonic::Fabs => threaded!(|cpu, _, _| sign(cpu, |s| s & 0x7fff)),
        Mnemonic::Fchs => threaded!(|cpu, _, _| sign(cpu, |s| s ^ 0x8000)),
        Mnemonic::Fsqrt => threaded!(|cpu, _, _| unary(cpu, |x, cx| float::sqrt(x.operand(), cx))),
        Mnemonic::Frndint => {
            threaded!(|cpu, _, _| unary(cpu, |x, cx| float::round_to_integral(
                x.operand(),
                cx.rounding,
                true,
                cx
            )))
        }
        Mnemonic::F2xm1 => threaded!(|cpu, _, _| unary(cpu, transcendental::f2xm1)),
        Mnemonic::Fscale => threaded!(|cpu, _, _| binary(cpu, float::scale)),
        Mnemonic::Fprem => threaded!(remainder::<false>),
        Mnemonic::Fprem1 => threaded!(remainder::<true>),
        Mnemonic::Fyl2x => threaded!(|cpu, _, _| popping(cpu, transcendental::fyl2x)),
        Mnemonic::Fyl2xp1 => threaded!(|cpu, _, _| popping(cpu, transcendental::fyl2xp1)),
        Mnemonic::Fpatan => threaded!(|cpu, _, _| popping(cpu, transcendental::fpatan)),
        Mnemonic::Fsin => threaded!(|cpu, _, _| circular(cpu, transcendental::fsin)),
        Mnemonic::Fcos => threaded!(|cpu, _, _| circular(cpu, transcendental::fcos)),
        Mnemonic::Fsincos => threaded!(|cpu, _, _| pushing(cpu, true, sincos)),
        Mnemonic::Fptan => threaded!(|cpu, _, _| pushing(cpu, true, ptan)),
        Mnemonic::Fxtract => threaded!(|cpu, _, _| pushing(cpu, false, xtract)),
        _ => return None,
    };
    insn.exec = handler;
    Some(())
}
