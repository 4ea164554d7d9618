//! Conversions between singles, doubles and integers in XMM, MM and general registers.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::float::Element;
use super::{guard, load_source, note_source, with_mxcsr, xmm};
use crate::exec::mmx;
use crate::exit::CpuStop;
use crate::float::{self, F32, F64, Float, FloatContext, Rounding};
use crate::insn::{Handler, Insn, threaded};
use crate::int::Int;
use crate::state::Cpu;

/// CVTSS2SI and its variants; `T` is the width of the general register.
fn to_general<F: Element, T: Int, const TRUNCATE: bool>(
    cpu: &mut Cpu,
    ram: &mut [u8],
    i: &Insn,
) -> Result<(), CpuStop> {
    guard(cpu)?;
    let b = F::low(load_source(cpu, ram, i)?);
    let value = with_mxcsr(cpu, |cx| to_int::<F, TRUNCATE>(b, T::BITS, cx))?;
    cpu.set_reg(i.dst, T::from_u64(value as u64));
    Ok(())
}

#[inline(always)]
fn to_int<F: Element, const TRUNCATE: bool>(x: F, bits: u32, cx: &mut FloatContext) -> i64 {
    let rounding = if TRUNCATE { Rounding::Zero } else { cx.rounding };
    float::to_int(x.unpack(cx), bits, rounding, cx)
}

/// CVTSI2SS, CVTSI2SD.
fn from_general<F: Element, T: Int, const MEMORY: bool>(
    cpu: &mut Cpu,
    ram: &mut [u8],
    i: &Insn,
) -> Result<(), CpuStop> {
    guard(cpu)?;
    let n = if MEMORY { cpu.load_operand::<T>(ram, i)? } else { cpu.reg::<T>(i.src) };
    let value = with_mxcsr(cpu, |cx| float::from_int::<F>(n.sext() as i64, cx))?;
    let a = xmm(cpu, i.dst);
    *a = value.merged(*a);
    Ok(())
}

/// CVTSS2SD, CVTSD2SS.
fn scalar<F: Element, R: Element>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let b = F::low(load_source(cpu, ram, i)?);
    let value = with_mxcsr(cpu, |cx| float::convert::<R>(b.unpack(cx), true, cx))?;
    let a = xmm(cpu, i.dst);
    *a = value.merged(*a);
    Ok(())
}

/// Converts a lane: returns its bits in the result.
type LaneOp = fn(u128, u32, &mut FloatContext) -> u128;

fn single_to_double(x: u128, k: u32, cx: &mut FloatContext) -> u128 {
    float::convert::<F64>(F32::lane(x, k).unpack(cx), true, cx).at_lane(k)
}

fn double_to_single(x: u128, k: u32, cx: &mut FloatContext) -> u128 {
    float::convert::<F32>(F64::lane(x, k).unpack(cx), true, cx).at_lane(k)
}

fn int_to<F: Element>(x: u128, k: u32, cx: &mut FloatContext) -> u128 {
    float::from_int::<F>(((x >> (32 * k)) as i32).into(), cx).at_lane(k)
}

fn int_from<F: Element, const TRUNCATE: bool>(x: u128, k: u32, cx: &mut FloatContext) -> u128 {
    let value = to_int::<F, TRUNCATE>(F::lane(x, k), 32, cx);
    u128::from(value as u32) << (32 * k)
}

/// Converts the first `lanes` lanes of the source.
#[inline(always)]
fn packed(cpu: &mut Cpu, ram: &mut [u8], i: &Insn, lanes: u32, f: LaneOp) -> Result<(), CpuStop> {
    guard(cpu)?;
    let b = load_source(cpu, ram, i)?;
    let value = with_mxcsr(cpu, |cx| (0..lanes).fold(0, |r, k| r | f(b, k, cx)))?;
    *xmm(cpu, i.dst) = value;
    Ok(())
}

/// CVTPS2PI and its variants: two lanes into an MM register.
#[inline(always)]
fn to_mm(cpu: &mut Cpu, ram: &mut [u8], i: &Insn, f: LaneOp) -> Result<(), CpuStop> {
    guard(cpu)?;
    mmx::check(cpu)?;
    let b = load_source(cpu, ram, i)?;
    mmx::enter(cpu);
    let value = with_mxcsr(cpu, |cx| f(b, 0, cx) | f(b, 1, cx))?;
    mmx::set(cpu, i.dst, value as u64);
    Ok(())
}

/// Reads the source of CVTPI2PS and CVTPI2PD. If it is in memory, these instructions do not switch to MM
/// registers.
#[inline(always)]
fn load_mm(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<u128, CpuStop> {
    guard(cpu)?;
    if i.src >= 8 {
        return load_source(cpu, ram, i);
    }
    mmx::guard(cpu)?;
    Ok(mmx::get(cpu, i.src).into())
}

/// CVTPI2PS: the high half of the destination stays.
fn cvtpi2ps(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let b = load_mm(cpu, ram, i)?;
    let value = with_mxcsr(cpu, |cx| int_to::<F32>(b, 0, cx) | int_to::<F32>(b, 1, cx))?;
    let a = xmm(cpu, i.dst);
    *a = F64::low(value).merged(*a);
    Ok(())
}

fn cvtpi2pd(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let b = load_mm(cpu, ram, i)?;
    *xmm(cpu, i.dst) = with_mxcsr(cpu, |cx| int_to::<F64>(b, 0, cx) | int_to::<F64>(b, 1, cx))?;
    Ok(())
}

/// Handlers of this family.
pub(super) fn select(ins: &Instruction, insn: &mut Insn) -> Option<()> {
    insn.exec = vector(ins).or_else(|| general(ins))?;
    note_source(ins, insn);
    Some(())
}

fn vector(ins: &Instruction) -> Option<Handler> {
    Some(match ins.mnemonic() {
        Mnemonic::Cvtss2sd => threaded!(scalar::<F32, F64>),
        Mnemonic::Cvtsd2ss => threaded!(scalar::<F64, F32>),
        Mnemonic::Cvtps2pd => threaded!(|cpu, ram, i| packed(cpu, ram, i, 2, single_to_double)),
        Mnemonic::Cvtpd2ps => threaded!(|cpu, ram, i| packed(cpu, ram, i, 2, double_to_single)),
        Mnemonic::Cvtdq2ps => threaded!(|cpu, ram, i| packed(cpu, ram, i, 4, int_to::<F32>)),
        Mnemonic::Cvtdq2pd => threaded!(|cpu, ram, i| packed(cpu, ram, i, 2, int_to::<F64>)),
        Mnemonic::Cvtps2dq => threaded!(|cpu, ram, i| packed(cpu, ram, i, 4, int_from::<F32, false>)),
        Mnemonic::Cvttps2dq => threaded!(|cpu, ram, i| packed(cpu, ram, i, 4, int_from::<F32, true>)),
        Mnemonic::Cvtpd2dq => threaded!(|cpu, ram, i| packed(cpu, ram, i, 2, int_from::<F64, false>)),
        Mnemonic::Cvttpd2dq => threaded!(|cpu, ram, i| packed(cpu, ram, i, 2, int_from::<F64, true>)),
        Mnemonic::Cvtps2pi => threaded!(|cpu, ram, i| to_mm(cpu, ram, i, int_from::<F32, false>)),
        Mnemonic::Cvttps2pi => threaded!(|cpu, ram, i| to_mm(cpu, ram, i, int_from::<F32, true>)),
        Mnemonic::Cvtpd2pi => threaded!(|cpu, ram, i| to_mm(cpu, ram, i, int_from::<F64, false>)),
        Mnemonic::Cvttpd2pi => threaded!(|cpu, ram, i| to_mm(cpu, ram, i, int_from::<F64, true>)),
        Mnemonic::Cvtpi2ps => threaded!(cvtpi2ps),
        Mnemonic::Cvtpi2pd => threaded!(cvtpi2pd),
        _ => return None,
    })
}

fn general(ins: &Instruction) -> Option<Handler> {
    let memory = ins.op1_kind() == OpKind::Memory;
    Some(match ins.code() {
        Code::Cvtss2si_r32_xmmm32 => threaded!(to_general::<F32, u32, false>),
        Code::Cvtss2si_r64_xmmm32 => threaded!(to_general::<F32, u64, false>),
        Code::Cvttss2si_r32_xmmm32 => threaded!(to_general::<F32, u32, true>),
        Code::Cvttss2si_r64_xmmm32 => threaded!(to_general::<F32, u64, true>),
        Code::Cvtsd2si_r32_xmmm64 => threaded!(to_general::<F64, u32, false>),
        Code::Cvtsd2si_r64_xmmm64 => threaded!(to_general::<F64, u64, false>),
        Code::Cvttsd2si_r32_xmmm64 => threaded!(to_general::<F64, u32, true>),
        Code::Cvttsd2si_r64_xmmm64 => threaded!(to_general::<F64, u64, true>),
        Code::Cvtsi2ss_xmm_rm32 if memory => threaded!(from_general::<F32, u32, true>),
        Code::Cvtsi2ss_xmm_rm64 if memory => threaded!(from_general::<F32, u64, true>),
        Code::Cvtsi2sd_xmm_rm32 if memory => threaded!(from_general::<F64, u32, true>),
        Code::Cvtsi2sd_xmm_rm64 if memory => threaded!(from_general::<F64, u64, true>),
        Code::Cvtsi2ss_xmm_rm32 => threaded!(from_general::<F32, u32, false>),
        Code::Cvtsi2ss_xmm_rm64 => threaded!(from_general::<F32, u64, false>),
        Code::Cvtsi2sd_xmm_rm32 => threaded!(from_general::<F64, u32, false>),
        Code::Cvtsi2sd_xmm_rm64 => threaded!(from_general::<F64, u64, false>),
        _ => return None,
    })
}
