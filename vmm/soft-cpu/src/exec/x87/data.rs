//! Loads, stores, constants, exchanges and conditional moves.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::arith::{LoadOperand, double, dword, qword, single, word};
use super::{clear_c1, context, free, get, guard, is_empty, pop, push, rotate, set, signal, stack_fault};
use crate::exit::CpuStop;
use crate::float::transcendental::Constant;
use crate::float::{self, F32, F64, F80, FloatContext, IE, PE, Rounding};
use crate::insn::{Handler, Insn, threaded};
use crate::state::Cpu;

/// Reads a ten-byte memory operand.
fn load_ten(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<u128, CpuStop> {
    // The low part is read first, which matters if only the rest is not canonical.
    cpu.load_operand::<u64>(ram, i)?;
    let mut bytes = [0; 16];
    let addr = cpu.ea(i);
    cpu.load_bytes(ram, addr, &mut bytes[..10]).map_err(|stop| cpu.operand_fault(i, stop))?;
    Ok(u128::from_le_bytes(bytes))
}

/// Writes a ten-byte memory operand: eight bytes, then two. If the latter fault, the former have been
/// written, as on hardware.
fn store_ten(cpu: &mut Cpu, ram: &mut [u8], i: &Insn, value: u128) -> Result<(), CpuStop> {
    let high = cpu.ea(i).wrapping_add(8);
    cpu.store_operand(ram, i, value as u64)?;
    cpu.store(ram, high, (value >> 64) as u16).map_err(|stop| cpu.operand_fault(i, stop))
}

/// Pushes a value whose load has raised no exception.
fn push_value(cpu: &mut Cpu, value: F80) {
    if is_empty(cpu, 7) {
        clear_c1(cpu);
        push(cpu, value);
    } else if stack_fault(cpu, true) {
        push(cpu, F80::DEFAULT_NAN);
    }
}

#[inline(always)]
fn load(cpu: &mut Cpu, ram: &mut [u8], i: &Insn, load: LoadOperand) -> Result<(), CpuStop> {
    guard(cpu)?;
    let operand = load(cpu, ram, i)?;
    if !is_empty(cpu, 7) {
        push_value(cpu, F80::DEFAULT_NAN);
        return Ok(());
    }
    let mut cx = context(cpu);
    let value = float::load(operand, &mut cx);
    signal(cpu, &cx);
    if cx.unmasked() & IE == 0 {
        push(cpu, value);
    }
    Ok(())
}

fn load_extended(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let bits = load_ten(cpu, ram, i)?;
    push_value(cpu, F80 { significand: bits as u64, sign_exp: (bits >> 64) as u16 });
    Ok(())
}

fn load_bcd(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let bits = load_ten(cpu, ram, i)?;
    push_value(cpu, float::from_bcd(bits));
    Ok(())
}

fn load_register(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    if is_empty(cpu, i.dst) {
        if stack_fault(cpu, false) {
            push(cpu, F80::DEFAULT_NAN);
        }
        return Ok(());
    }
    let value = get(cpu, i.dst);
    push_value(cpu, value);
    Ok(())
}

#[inline(always)]
fn load_constant(cpu: &mut Cpu, value: impl Fn(&FloatContext) -> F80) -> Result<(), CpuStop> {
    guard(cpu)?;
    let value = value(&context(cpu));
    push_value(cpu, value);
    Ok(())
}

/// The format that a store converts to: its width in bits, the conversion, and what is stored for an empty
/// register.
struct StoreFormat {
    bits: u32,
    convert: fn(F80, &mut FloatContext) -> u128,
    indefinite: u128,
}

const SINGLE: StoreFormat =
    StoreFormat { bits: 32, convert: |x, cx| float::store::<F32>(x, cx).0.into(), indefinite: 0xffc0_0000 };
const DOUBLE: StoreFormat =
    StoreFormat { bits: 64, convert: |x, cx| float::store::<F64>(x, cx).0.into(), indefinite: 0xfff8 << 48 };
const EXTENDED: StoreFormat =
    StoreFormat { bits: 80, convert: |x, _| bits(x), indefinite: bits(F80::DEFAULT_NAN) };
const BCD: StoreFormat = StoreFormat { bits: 80, convert: float::to_bcd, indefinite: 0xffff_c000 << 48 };

const fn bits(x: F80) -> u128 {
    (x.sign_exp as u128) << 64 | x.significand as u128
}

/// The format of a signed integer of this width; FISTTP truncates.
const fn integer<const BITS: u32, const TRUNCATE: bool>() -> StoreFormat {
    StoreFormat {
        bits: BITS,
        convert: |x, cx| {
            let rounding = if TRUNCATE { Rounding::Zero } else { cx.rounding };
            float::to_int(x.operand(), BITS, rounding, cx) as u64 as u128
        },
        indefinite: 1 << (BITS - 1),
    }
}

#[inline(always)]
fn store(cpu: &mut Cpu, ram: &mut [u8], i: &Insn, pops: bool, format: StoreFormat) -> Result<(), CpuStop> {
    guard(cpu)?;
    let mut cx = context(cpu);
    let empty = is_empty(cpu, 0);
    let value = if empty {
        cx.flags |= IE;
        format.indefinite
    } else {
        (format.convert)(get(cpu, 0), &mut cx)
    };
    // With an unmasked exception other than an inexact result nothing is stored or popped.
    let stores = cx.unmasked() & !PE == 0;
    if stores {
        match format.bits {
            16 => cpu.store_operand(ram, i, value as u16)?,
            32 => cpu.store_operand(ram, i, value as u32)?,
            64 => cpu.store_operand(ram, i, value as u64)?,
            _ => store_ten(cpu, ram, i, value)?,
        }
    }
    if empty {
        stack_fault(cpu, false);
    } else {
        signal(cpu, &cx);
    }
    if stores && pops {
        pop(cpu);
    }
    Ok(())
}

/// FST ST(i), FSTP ST(i): a copy, bit for bit.
fn store_register<const POP: bool>(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let mut value = get(cpu, 0);
    if is_empty(cpu, 0) {
        if !stack_fault(cpu, false) {
            return Ok(());
        }
        value = F80::DEFAULT_NAN;
    } else {
        clear_c1(cpu);
    }
    set(cpu, i.dst, value);
    if POP {
        pop(cpu);
    }
    Ok(())
}

/// FSTPNCE: FSTP that raises no stack fault for an empty ST(0), and then copies nothing.
fn store_register_quiet(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    clear_c1(cpu);
    if !is_empty(cpu, 0) {
        let value = get(cpu, 0);
        set(cpu, i.dst, value);
    }
    pop(cpu);
    Ok(())
}

fn exchange(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    clear_c1(cpu);
    if (is_empty(cpu, 0) || is_empty(cpu, i.src)) && !stack_fault(cpu, false) {
        return Ok(());
    }
    let value = |r: u8| if is_empty(cpu, r) { F80::DEFAULT_NAN } else { get(cpu, r) };
    let (a, b) = (value(0), value(i.src));
    set(cpu, 0, b);
    set(cpu, i.src, a);
    Ok(())
}

fn conditional_move<const CC: u8>(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    if is_empty(cpu, 0) || is_empty(cpu, i.src) {
        if stack_fault(cpu, false) {
            set(cpu, 0, F80::DEFAULT_NAN);
        }
        return Ok(());
    }
    if cpu.flags.condition::<CC>() {
        let value = get(cpu, i.src);
        set(cpu, 0, value);
    }
    Ok(())
}

fn fincstp(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    rotate(cpu, 1);
    clear_c1(cpu);
    Ok(())
}

fn fdecstp(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    rotate(cpu, 7);
    clear_c1(cpu);
    Ok(())
}

/// FFREE, FFREEP.
fn ffree<const POP: bool>(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    clear_c1(cpu);
    free(cpu, i.dst);
    if POP {
        pop(cpu);
    }
    Ok(())
}

/// Handlers of this family.
pub(super) fn select(ins: &Instruction, insn: &mut Insn) -> Option<()> {
    let memory = ins.op_count() > 0 && ins.op0_kind() == OpKind::Memory
        || ins.op_count() > 1 && ins.op1_kind() == OpKind::Memory;
    let size = if memory { ins.memory_size().size() } else { 0 };
    insn.exec = match ins.mnemonic() {
        Mnemonic::Fld | Mnemonic::Fild | Mnemonic::Fbld => load_form(ins.mnemonic(), size)?,
        Mnemonic::Fldl2t => threaded!(|cpu, _, _| load_constant(cpu, |cx| Constant::Log2Ten.value(cx))),
        Mnemonic::Fldl2e => threaded!(|cpu, _, _| load_constant(cpu, |cx| Constant::Log2E.value(cx))),
        Mnemonic::Fldpi => threaded!(|cpu, _, _| load_constant(cpu, |cx| Constant::Pi.value(cx))),
        Mnemonic::Fldlg2 => threaded!(|cpu, _, _| load_constant(cpu, |cx| Constant::Log10Two.value(cx))),
        Mnemonic::Fldln2 => threaded!(|cpu, _, _| load_constant(cpu, |cx| Constant::LnTwo.value(cx))),
        Mnemonic::Fld1 => threaded!(|cpu, _, _| load_constant(cpu, |_| F80::ONE)),
        Mnemonic::Fldz => threaded!(|cpu, _, _| load_constant(cpu, |_| F80::default())),
        Mnemonic::Fxch => threaded!(exchange),
        Mnemonic::Fcmovb => threaded!(conditional_move::<2>),
        Mnemonic::Fcmovnb => threaded!(conditional_move::<3>),
        Mnemonic::Fcmove => threaded!(conditional_move::<4>),
        Mnemonic::Fcmovne => threaded!(conditional_move::<5>),
        Mnemonic::Fcmovbe => threaded!(conditional_move::<6>),
        Mnemonic::Fcmovnbe => threaded!(conditional_move::<7>),
        Mnemonic::Fcmovu => threaded!(conditional_move::<10>),
        Mnemonic::Fcmovnu => threaded!(conditional_move::<11>),
        Mnemonic::Fincstp => threaded!(fincstp),
        Mnemonic::Fdecstp => threaded!(fdecstp),
        Mnemonic::Ffree => threaded!(ffree::<false>),
        Mnemonic::Ffreep => threaded!(ffree::<true>),
        mnemonic => store_form(mnemonic, size)?,
    };
    Some(())
}

fn load_form(mnemonic: Mnemonic, size: usize) -> Option<Handler> {
    Some(match (mnemonic, size) {
        (Mnemonic::Fld, 0) => threaded!(load_register),
        (Mnemonic::Fld, 4) => threaded!(|cpu, ram, i| load(cpu, ram, i, single)),
        (Mnemonic::Fld, 8) => threaded!(|cpu, ram, i| load(cpu, ram, i, double)),
        (Mnemonic::Fld, _) => threaded!(load_extended),
        (Mnemonic::Fild, 2) => threaded!(|cpu, ram, i| load(cpu, ram, i, word)),
        (Mnemonic::Fild, 4) => threaded!(|cpu, ram, i| load(cpu, ram, i, dword)),
        (Mnemonic::Fild, _) => threaded!(|cpu, ram, i| load(cpu, ram, i, qword)),
        (Mnemonic::Fbld, _) => threaded!(load_bcd),
        _ => return None,
    })
}

fn store_form(mnemonic: Mnemonic, size: usize) -> Option<Handler> {
    macro_rules! store {
        ($pops:expr, $format:expr) => {
            threaded!(|cpu, ram, i| store(cpu, ram, i, $pops, $format))
        };
    }
    Some(match (mnemonic, size) {
        (Mnemonic::Fst, 0) => threaded!(store_register::<false>),
        (Mnemonic::Fstp, 0) => threaded!(store_register::<true>),
        (Mnemonic::Fstpnce, _) => threaded!(store_register_quiet),
        (Mnemonic::Fst, 4) => store!(false, SINGLE),
        (Mnemonic::Fst, _) => store!(false, DOUBLE),
        (Mnemonic::Fstp, 4) => store!(true, SINGLE),
        (Mnemonic::Fstp, 8) => store!(true, DOUBLE),
        (Mnemonic::Fstp, _) => store!(true, EXTENDED),
        (Mnemonic::Fist, 2) => store!(false, integer::<16, false>()),
        (Mnemonic::Fist, _) => store!(false, integer::<32, false>()),
        (Mnemonic::Fistp, 2) => store!(true, integer::<16, false>()),
        (Mnemonic::Fistp, 4) => store!(true, integer::<32, false>()),
        (Mnemonic::Fistp, _) => store!(true, integer::<64, false>()),
        (Mnemonic::Fisttp, 2) => store!(true, integer::<16, true>()),
        (Mnemonic::Fisttp, 4) => store!(true, integer::<32, true>()),
        (Mnemonic::Fisttp, _) => store!(true, integer::<64, true>()),
        (Mnemonic::Fbstp, _) => store!(true, BCD),
        _ => return None,
    })
}
