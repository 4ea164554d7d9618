//! Packed integer operations on two operands, for XMM and MM registers.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::lanes::{
    equal, halves, horizontal, interleave, less, map, narrow, select as choose, sums, widen,
    wrapping_differences, zip,
};
use super::{guard, load_aligned, load_source, note_source, xmm};
use crate::exec::mmx;
use crate::exit::CpuStop;
use crate::insn::{Handler, Insn, threaded};
use crate::state::Cpu;

/// An operation on 128 bits, with the arguments destination, source, immediate. For a shift by an immediate,
/// that is the source.
pub(super) trait VectorOp {
    fn run(a: u128, b: u128, imm: u8) -> u128;
    /// The same on MM registers. If each lane of the result depends only on lanes in the same place, this is
    /// the low half of the 128-bit result.
    #[inline(always)]
    fn run_mmx(a: u64, b: u64, imm: u8) -> u64 {
        Self::run(a.into(), b.into(), imm) as u64
    }
}

fn xmm_xmm<O: VectorOp>(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let b = *xmm(cpu, i.src);
    let a = xmm(cpu, i.dst);
    *a = O::run(*a, b, i.imm as u8);
    Ok(())
}

fn xmm_mem<O: VectorOp>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let b = load_aligned(cpu, ram, i)?;
    let a = xmm(cpu, i.dst);
    *a = O::run(*a, b, i.imm as u8);
    Ok(())
}

/// The form with a memory operand of fewer than 16 bytes.
fn xmm_narrow<O: VectorOp>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let b = load_source(cpu, ram, i)?;
    let a = xmm(cpu, i.dst);
    *a = O::run(*a, b, i.imm as u8);
    Ok(())
}

fn xmm_imm<O: VectorOp>(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let a = xmm(cpu, i.dst);
    *a = O::run(*a, (i.imm as u8).into(), 0);
    Ok(())
}

fn mm_mm<O: VectorOp>(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    mmx::guard(cpu)?;
    let r = O::run_mmx(mmx::get(cpu, i.dst), mmx::get(cpu, i.src), i.imm as u8);
    mmx::set(cpu, i.dst, r);
    Ok(())
}

fn mm_mem<O: VectorOp>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    mmx::check(cpu)?;
    let b = load_source(cpu, ram, i)? as u64;
    mmx::enter(cpu);
    let r = O::run_mmx(mmx::get(cpu, i.dst), b, i.imm as u8);
    mmx::set(cpu, i.dst, r);
    Ok(())
}

fn mm_imm<O: VectorOp>(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    mmx::guard(cpu)?;
    let r = O::run_mmx(mmx::get(cpu, i.dst), (i.imm as u8).into(), 0);
    mmx::set(cpu, i.dst, r);
    Ok(())
}

/// The handler of `O` for the operands of `ins`.
pub(super) fn form<O: VectorOp>(ins: &Instruction, insn: &mut Insn) -> Option<Handler> {
    let memory = ins.op1_kind() == OpKind::Memory;
    if memory {
        note_source(ins, insn);
    }
    Some(match (ins.op0_register().is_mm(), ins.op1_kind()) {
        (true, OpKind::Register) => threaded!(mm_mm::<O>),
        (true, OpKind::Memory) => threaded!(mm_mem::<O>),
        (true, _) => threaded!(mm_imm::<O>),
        (false, OpKind::Register) => threaded!(xmm_xmm::<O>),
        (false, OpKind::Memory) if ins.memory_size().size() == 16 => threaded!(xmm_mem::<O>),
        (false, OpKind::Memory) => threaded!(xmm_narrow::<O>),
        (false, _) => threaded!(xmm_imm::<O>),
    })
}

/// Defines operations named like their mnemonics (several mnemonics may have one operation), and the function
/// that returns the handler of a mnemonic.
macro_rules! ops {
    ($($name:ident $(| $alias:ident)* = |$a:ident, $b:ident| $body:expr;)*) => {
        ops!(@names $($name $(| $alias)*;)*);
        $(impl VectorOp for $name {
            #[inline(always)]
            fn run($a: u128, $b: u128, _: u8) -> u128 {
                $body
            }
        })*
    };
    (@names $($name:ident $(| $alias:ident)*;)*) => {
        $(struct $name;)*
        fn handler(ins: &Instruction, insn: &mut Insn) -> Option<Handler> {
            match ins.mnemonic() {
                $(Mnemonic::$name $(| Mnemonic::$alias)* => form::<$name>(ins, insn),)*
                _ => rearranging(ins, insn),
            }
        }
    };
}

/// The same for operations whose result lanes depend on lanes in other places. The last argument is the
/// function that does the operation on MM registers by means of the 128-bit one.
macro_rules! rearranging_ops {
    ($($name:ident = |$a:ident, $b:ident| $body:expr, $mmx:ident;)*) => {
        $(struct $name;
        impl VectorOp for $name {
            #[inline(always)]
            fn run($a: u128, $b: u128, _: u8) -> u128 {
                $body
            }
            #[inline(always)]
            fn run_mmx(a: u64, b: u64, imm: u8) -> u64 {
                $mmx(a, b, |a, b| Self::run(a, b, imm))
            }
        })*
        fn rearranging(ins: &Instruction, insn: &mut Insn) -> Option<Handler> {
            match ins.mnemonic() {
                $(Mnemonic::$name => form::<$name>(ins, insn),)*
                _ => None,
            }
        }
    };
}

/// The MM operation: both operands side by side are the first operand of the 128-bit operation.
#[inline(always)]
fn joined(a: u64, b: u64, f: impl Fn(u128, u128) -> u128) -> u64 {
    f(u128::from(a) | u128::from(b) << 64, 0) as u64
}

/// The MM operation: interleaves the low halves.
#[inline(always)]
fn low(a: u64, b: u64, f: impl Fn(u128, u128) -> u128) -> u64 {
    f(a.into(), b.into()) as u64
}

/// The MM operation: interleaves the high halves.
#[inline(always)]
fn high(a: u64, b: u64, f: impl Fn(u128, u128) -> u128) -> u64 {
    f(u128::from(a) << 32, u128::from(b) << 32) as u64
}

#[inline(always)]
fn mask<T>(condition: bool, ones: T, zero: T) -> T {
    if condition { ones } else { zero }
}

/// The sign bits of bytes: with these inverted, signed bytes have the order of unsigned ones.
const SIGNS: u128 = u128::MAX / 255 * 128;

/// The shift count, which is in the low 64 bits, limited to a count that shifts everything out.
#[inline(always)]
fn count(b: u128) -> u32 {
    (b as u64).min(255) as u32
}

ops! {
    Pand | Andps | Andpd = |a, b| a & b;
    Pandn | Andnps | Andnpd = |a, b| !a & b;
    Por | Orps | Orpd = |a, b| a | b;
    Pxor | Xorps | Xorpd = |a, b| a ^ b;

    Paddb = |a, b| halves(a, b, sums::<8>);
    Paddw = |a, b| halves(a, b, sums::<16>);
    Paddd = |a, b| halves(a, b, sums::<32>);
    Paddq = |a, b| zip(a, b, u64::wrapping_add);
    Psubb = |a, b| halves(a, b, wrapping_differences::<8>);
    Psubw = |a, b| halves(a, b, wrapping_differences::<16>);
    Psubd = |a, b| halves(a, b, wrapping_differences::<32>);
    Psubq = |a, b| zip(a, b, u64::wrapping_sub);
    Paddsb = |a, b| zip(a, b, i8::saturating_add);
    Paddsw = |a, b| zip(a, b, i16::saturating_add);
    Paddusb = |a, b| zip(a, b, u8::saturating_add);
    Paddusw = |a, b| zip(a, b, u16::saturating_add);
    Psubsb = |a, b| zip(a, b, i8::saturating_sub);
    Psubsw = |a, b| zip(a, b, i16::saturating_sub);
    Psubusb = |a, b| zip(a, b, u8::saturating_sub);
    Psubusw = |a, b| zip(a, b, u16::saturating_sub);

    Pmullw = |a, b| zip(a, b, u16::wrapping_mul);
    Pmulld = |a, b| zip(a, b, u32::wrapping_mul);
    Pmulhw = |a, b| zip(a, b, |x: i16, y| ((i32::from(x) * i32::from(y)) >> 16) as i16);
    Pmulhuw = |a, b| zip(a, b, |x: u16, y| ((u32::from(x) * u32::from(y)) >> 16) as u16);
    Pmulhrsw = |a, b| zip(a, b, |x: i16, y| (((i32::from(x) * i32::from(y)) >> 14) + 1 >> 1) as i16);
    Pmuludq = |a, b| zip(a, b, |x: u64, y| u64::from(x as u32) * u64::from(y as u32));
    Pmuldq = |a, b| zip(a, b, |x: i64, y| i64::from(x as i32) * i64::from(y as i32));
    Pmaddwd = |a, b| zip(a, b, |x: i32, y| {
        let low = i32::from(x as i16) * i32::from(y as i16);
        low.wrapping_add((x >> 16) * (y >> 16))
    });
    Pmaddubsw = |a, b| zip(a, b, |x: i16, y| {
        let low = i32::from(x as u8) * i32::from(y as i8);
        let high = i32::from((x >> 8) as u8) * i32::from((y >> 8) as i8);
        (low + high).clamp(i16::MIN.into(), i16::MAX.into()) as i16
    });
    Psadbw = |a, b| zip(a, b, |x: u64, y| {
        x.to_le_bytes().iter().zip(y.to_le_bytes()).map(|(x, y)| u64::from(x.abs_diff(y))).sum()
    });
    Pavgb = |a, b| zip(a, b, |x: u8, y| ((u16::from(x) + u16::from(y) + 1) >> 1) as u8);
    Pavgw = |a, b| zip(a, b, |x: u16, y| ((u32::from(x) + u32::from(y) + 1) >> 1) as u16);

    Pminub = |a, b| halves(a, b, |a, b| choose(less::<8>(a, b), a, b));
    Pminuw = |a, b| zip(a, b, u16::min);
    Pminud = |a, b| zip(a, b, u32::min);
    Pminsb = |a, b| zip(a, b, i8::min);
    Pminsw = |a, b| zip(a, b, i16::min);
    Pminsd = |a, b| zip(a, b, i32::min);
    Pmaxub = |a, b| halves(a, b, |a, b| choose(less::<8>(a, b), b, a));
    Pmaxuw = |a, b| zip(a, b, u16::max);
    Pmaxud = |a, b| zip(a, b, u32::max);
    Pmaxsb = |a, b| zip(a, b, i8::max);
    Pmaxsw = |a, b| zip(a, b, i16::max);
    Pmaxsd = |a, b| zip(a, b, i32::max);
    Pcmpeqb = |a, b| halves(a, b, equal::<8>);
    Pcmpeqw = |a, b| halves(a, b, equal::<16>);
    Pcmpeqd = |a, b| halves(a, b, equal::<32>);
    Pcmpeqq = |a, b| zip(a, b, |x: u64, y| mask(x == y, u64::MAX, 0));
    Pcmpgtb = |a, b| halves(a ^ SIGNS, b ^ SIGNS, |a, b| less::<8>(b, a));
    Pcmpgtw = |a, b| zip(a, b, |x: i16, y| mask(x > y, -1, 0));
    Pcmpgtd = |a, b| zip(a, b, |x: i32, y| mask(x > y, -1, 0));
    Pcmpgtq = |a, b| zip(a, b, |x: i64, y| mask(x > y, -1, 0));

    Psllw = |a, b| map(a, |x: u16| x.checked_shl(count(b)).unwrap_or(0));
    Pslld = |a, b| map(a, |x: u32| x.checked_shl(count(b)).unwrap_or(0));
    Psllq = |a, b| map(a, |x: u64| x.checked_shl(count(b)).unwrap_or(0));
    Psrlw = |a, b| map(a, |x: u16| x.checked_shr(count(b)).unwrap_or(0));
    Psrld = |a, b| map(a, |x: u32| x.checked_shr(count(b)).unwrap_or(0));
    Psrlq = |a, b| map(a, |x: u64| x.checked_shr(count(b)).unwrap_or(0));
    Psraw = |a, b| map(a, |x: i16| x >> count(b).min(15));
    Psrad = |a, b| map(a, |x: i32| x >> count(b).min(31));
    Pslldq = |a, b| a.checked_shl(8 * count(b)).unwrap_or(0);
    Psrldq = |a, b| a.checked_shr(8 * count(b)).unwrap_or(0);

    Psignb = |a, b| zip(a, b, |x: i8, y| x.wrapping_mul(y.signum()));
    Psignw = |a, b| zip(a, b, |x: i16, y| x.wrapping_mul(y.signum()));
    Psignd = |a, b| zip(a, b, |x: i32, y| x.wrapping_mul(y.signum()));
    Pabsb = |_a, b| map(b, i8::wrapping_abs);
    Pabsw = |_a, b| map(b, i16::wrapping_abs);
    Pabsd = |_a, b| map(b, i32::wrapping_abs);

    Pmovsxbw = |_a, b| widen(b, |x: i8| i16::from(x));
    Pmovsxbd = |_a, b| widen(b, |x: i8| i32::from(x));
    Pmovsxbq = |_a, b| widen(b, |x: i8| i64::from(x));
    Pmovsxwd = |_a, b| widen(b, |x: i16| i32::from(x));
    Pmovsxwq = |_a, b| widen(b, |x: i16| i64::from(x));
    Pmovsxdq = |_a, b| widen(b, |x: i32| i64::from(x));
    Pmovzxbw = |_a, b| widen(b, |x: u8| u16::from(x));
    Pmovzxbd = |_a, b| widen(b, |x: u8| u32::from(x));
    Pmovzxbq = |_a, b| widen(b, |x: u8| u64::from(x));
    Pmovzxwd = |_a, b| widen(b, |x: u16| u32::from(x));
    Pmovzxwq = |_a, b| widen(b, |x: u16| u64::from(x));
    Pmovzxdq = |_a, b| widen(b, |x: u32| u64::from(x));
    Phminposuw = |_a, b| {
        let lanes = <u16 as super::lanes::Lane>::split(b);
        let least = lanes.iter().zip(0u32..).min().map_or(0, |(x, i)| u32::from(*x) | i << 16);
        least.into()
    };
}

rearranging_ops! {
    Packsswb = |a, b| narrow(a, b, |x: i16| x.clamp(-128, 127) as i8), joined;
    Packuswb = |a, b| narrow(a, b, |x: i16| x.clamp(0, 255) as u8), joined;
    Packssdw = |a, b| narrow(a, b, |x: i32| x.clamp(-0x8000, 0x7fff) as i16), joined;
    Packusdw = |a, b| narrow(a, b, |x: i32| x.clamp(0, 0xffff) as u16), joined;
    Phaddw = |a, b| horizontal(a, b, u16::wrapping_add), joined;
    Phaddd = |a, b| horizontal(a, b, u32::wrapping_add), joined;
    Phaddsw = |a, b| horizontal(a, b, i16::saturating_add), joined;
    Phsubw = |a, b| horizontal(a, b, u16::wrapping_sub), joined;
    Phsubd = |a, b| horizontal(a, b, u32::wrapping_sub), joined;
    Phsubsw = |a, b| horizontal(a, b, i16::saturating_sub), joined;
    Punpcklbw = |a, b| interleave::<u8>(a, b), low;
    Punpcklwd = |a, b| interleave::<u16>(a, b), low;
    Punpckldq = |a, b| interleave::<u32>(a, b), low;
    Punpcklqdq = |a, b| interleave::<u64>(a, b), low;
    Unpcklps = |a, b| interleave::<u32>(a, b), low;
    Unpcklpd = |a, b| interleave::<u64>(a, b), low;
    Punpckhbw = |a, b| interleave::<u8>(a >> 64, b >> 64), high;
    Punpckhwd = |a, b| interleave::<u16>(a >> 64, b >> 64), high;
    Punpckhdq = |a, b| interleave::<u32>(a >> 64, b >> 64), high;
    Punpckhqdq = |a, b| interleave::<u64>(a >> 64, b >> 64), high;
    Unpckhps = |a, b| interleave::<u32>(a >> 64, b >> 64), high;
    Unpckhpd = |a, b| interleave::<u64>(a >> 64, b >> 64), high;
}

/// Handlers of this family.
pub(super) fn select(ins: &Instruction, insn: &mut Insn) -> Option<()> {
    insn.exec = handler(ins, insn)?;
    Some(())
}
