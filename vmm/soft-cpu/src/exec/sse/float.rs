//! Arithmetic and comparison of singles and doubles, packed and scalar.

use std::cmp::Ordering;

use iced_x86::{Code, Instruction, Mnemonic};

use super::{guard, load_source, note_source, with_mxcsr, xmm};
use crate::exit::CpuStop;
use crate::flags::bits::{CF, PF, ZF};
use crate::float::{self, F32, F64, Float, FloatContext, PE, Predicate, Rounding, approx};
use crate::insn::{Handler, Insn, threaded};
use crate::state::Cpu;

/// A floating-point format whose values are lanes of an XMM register.
pub(super) trait Element: Float {
    /// Width in bits.
    const BITS: u32;
    /// Number of lanes in a register.
    const COUNT: u32 = 128 / Self::BITS;
    /// The value in the lowest bits of `x`.
    fn low(x: u128) -> Self;
    /// The value as the lowest bits of a register.
    fn bits(self) -> u128;
    /// The value in lane `k` of `x`.
    #[inline(always)]
    fn lane(x: u128, k: u32) -> Self {
        Self::low(x >> (k * Self::BITS))
    }
    /// The value as lane `k` of a register that is otherwise zero.
    #[inline(always)]
    fn at_lane(self, k: u32) -> u128 {
        self.bits() << (k * Self::BITS)
    }
    /// `x` with this value as its lowest lane.
    #[inline(always)]
    fn merged(self, x: u128) -> u128 {
        let mask = u128::MAX << Self::BITS;
        x & mask | self.bits()
    }
}

macro_rules! element {
    ($f:ident, $bits:ty) => {
        impl Element for $f {
            const BITS: u32 = <$bits>::BITS;
            #[inline(always)]
            fn low(x: u128) -> $f {
                $f(x as $bits)
            }
            #[inline(always)]
            fn bits(self) -> u128 {
                self.0.into()
            }
        }
    };
}
element!(F32, u32);
element!(F64, u64);

/// An operation on one lane, with the arguments destination, source, immediate.
trait FloatLaneOp {
    fn run<F: Element>(a: F, b: F, imm: u8, cx: &mut FloatContext) -> F;
}

macro_rules! ops {
    ($($name:ident = |$f:ident, $a:ident, $b:ident, $imm:ident, $cx:ident| $body:expr;)*) => {
        $(struct $name;
        impl FloatLaneOp for $name {
            #[inline(always)]
            fn run<$f: Element>($a: $f, $b: $f, $imm: u8, $cx: &mut FloatContext) -> $f {
                $body
            }
        })*
    };
}

ops! {
    Add = |F, a, b, _imm, cx| float::add(a.unpack(cx), b.unpack(cx), cx);
    Sub = |F, a, b, _imm, cx| float::sub(a.unpack(cx), b.unpack(cx), cx);
    Mul = |F, a, b, _imm, cx| float::mul(a.unpack(cx), b.unpack(cx), cx);
    Div = |F, a, b, _imm, cx| float::div(a.unpack(cx), b.unpack(cx), cx);
    Min = |F, a, b, _imm, cx| float::min(a, b, cx);
    Max = |F, a, b, _imm, cx| float::max(a, b, cx);
    Sqrt = |F, _a, b, _imm, cx| float::sqrt(b.unpack(cx), cx);
    Cmp = |F, a, b, imm, cx| {
        let holds = Predicate(imm).holds(a.unpack(cx), b.unpack(cx), cx);
        F::low(if holds { u128::MAX } else { 0 })
    };
    Round = |F, _a, b, imm, cx| {
        let rounding = if imm & 4 != 0 { cx.rounding } else { Rounding::from_bits(imm.into()) };
        let inexact = cx.flags & PE;
        let value = float::round_to_integral(b.unpack(cx), rounding, false, cx);
        if imm & 8 != 0 {
            cx.flags = cx.flags & !PE | inexact;
        }
        value
    };
}

fn packed<O: FloatLaneOp, F: Element>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let b = load_source(cpu, ram, i)?;
    let a = *xmm(cpu, i.dst);
    let value = with_mxcsr(cpu, |cx| {
        (0..F::COUNT).fold(0, |r, k| r | O::run(F::lane(a, k), F::lane(b, k), i.imm as u8, cx).at_lane(k))
    })?;
    *xmm(cpu, i.dst) = value;
    Ok(())
}

fn scalar<O: FloatLaneOp, F: Element>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let b = load_source(cpu, ram, i)?;
    let a = *xmm(cpu, i.dst);
    let value = with_mxcsr(cpu, |cx| O::run(F::low(a), F::low(b), i.imm as u8, cx))?;
    *xmm(cpu, i.dst) = value.merged(a);
    Ok(())
}

/// COMISS and (with `QUIET`) UCOMISS, and the same for doubles.
fn comi<F: Element, const QUIET: bool>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let b = load_source(cpu, ram, i)?;
    let a = *xmm(cpu, i.dst);
    let order = with_mxcsr(cpu, |cx| float::compare(F::low(a).unpack(cx), F::low(b).unpack(cx), QUIET, cx))?;
    cpu.flags.set_status(match order {
        None => ZF | PF | CF,
        Some(Ordering::Less) => CF,
        Some(Ordering::Equal) => ZF,
        Some(Ordering::Greater) => 0,
    });
    Ok(())
}

/// HADDPS, HSUBPS, and the same for doubles: on neighbours in the destination, then in the source.
fn horizontal<O: FloatLaneOp, F: Element>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let b = load_source(cpu, ram, i)?;
    let a = *xmm(cpu, i.dst);
    let half = F::COUNT / 2;
    let value = with_mxcsr(cpu, |cx| {
        (0..F::COUNT).fold(0, |r, k| {
            let x = if k < half { a } else { b };
            let first = 2 * (k % half);
            r | O::run(F::lane(x, first), F::lane(x, first + 1), 0, cx).at_lane(k)
        })
    })?;
    *xmm(cpu, i.dst) = value;
    Ok(())
}

/// ADDSUBPS, ADDSUBPD: even lanes are subtracted, odd ones added.
fn addsub<F: Element>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let b = load_source(cpu, ram, i)?;
    let a = *xmm(cpu, i.dst);
    let value = with_mxcsr(cpu, |cx| {
        (0..F::COUNT).fold(0, |r, k| {
            let (x, y) = (F::lane(a, k), F::lane(b, k));
            let lane = if k % 2 == 0 { Sub::run(x, y, 0, cx) } else { Add::run(x, y, 0, cx) };
            r | lane.at_lane(k)
        })
    })?;
    *xmm(cpu, i.dst) = value;
    Ok(())
}

/// DPPS, DPPD: the products that the high half of the immediate chooses are summed in pairs; the low half
/// chooses where the sum goes. Each stage has its own exceptions. Lanes differ in the order of their
/// additions, and so in which of several NaNs they get: this is the order of Intel's CPUs.
fn dot_product<F: Element>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let b = load_source(cpu, ram, i)?;
    let a = *xmm(cpu, i.dst);
    let imm = i.imm as u8;
    let products = with_mxcsr(cpu, |cx| {
        (0..F::COUNT)
            .filter(|k| imm >> (4 + k) & 1 != 0)
            .fold(0, |r, k| r | Mul::run(F::lane(a, k), F::lane(b, k), 0, cx).at_lane(k))
    })?;
    // Each stage adds to a lane the one whose number differs in this bit, as the first or the second operand.
    let stages: &[(u32, bool)] = if F::COUNT == 4 { &[(1, true), (2, false)] } else { &[(1, false)] };
    let mut sums = products;
    for &(bit, other_first) in stages {
        sums = with_mxcsr(cpu, |cx| {
            (0..F::COUNT).fold(0, |r, k| {
                let (own, other) = (F::lane(sums, k), F::lane(sums, k ^ bit));
                let (x, y) = if other_first { (other, own) } else { (own, other) };
                r | Add::run(x, y, 0, cx).at_lane(k)
            })
        })?;
    }
    *xmm(cpu, i.dst) =
        (0..F::COUNT).filter(|k| imm >> k & 1 != 0).fold(0, |r, k| r | F::lane(sums, k).at_lane(k));
    Ok(())
}

/// RCPPS, RSQRTPS: no exceptions.
fn approximate<const LANES: u32>(
    cpu: &mut Cpu,
    ram: &mut [u8],
    i: &Insn,
    f: fn(F32) -> F32,
) -> Result<(), CpuStop> {
    guard(cpu)?;
    let b = load_source(cpu, ram, i)?;
    let a = xmm(cpu, i.dst);
    let value = (0..LANES).fold(0, |r, k| r | f(F32::lane(b, k)).at_lane(k));
    *a = if LANES == 1 { F32::low(value).merged(*a) } else { value };
    Ok(())
}

/// Handlers of this family.
pub(super) fn select(ins: &Instruction, insn: &mut Insn) -> Option<()> {
    macro_rules! arithmetic {
        ($($ps:ident $pd:ident $ss:ident $sd:ident = $op:ident;)*) => {
            match ins.mnemonic() {
                // The string instruction CMPSD has the same name.
                Mnemonic::Cmpsd if ins.code() != Code::Cmpsd_xmm_xmmm64_imm8 => return None,
                $(Mnemonic::$ps => threaded!(packed::<$op, F32>),
                Mnemonic::$pd => threaded!(packed::<$op, F64>),
                Mnemonic::$ss => threaded!(scalar::<$op, F32>),
                Mnemonic::$sd => threaded!(scalar::<$op, F64>),)*
                _ => other(ins)?,
            }
        };
    }
    insn.exec = arithmetic! {
        Addps Addpd Addss Addsd = Add;
        Subps Subpd Subss Subsd = Sub;
        Mulps Mulpd Mulss Mulsd = Mul;
        Divps Divpd Divss Divsd = Div;
        Minps Minpd Minss Minsd = Min;
        Maxps Maxpd Maxss Maxsd = Max;
        Sqrtps Sqrtpd Sqrtss Sqrtsd = Sqrt;
        Cmpps Cmppd Cmpss Cmpsd = Cmp;
        Roundps Roundpd Roundss Roundsd = Round;
    };
    note_source(ins, insn);
    Some(())
}

fn other(ins: &Instruction) -> Option<Handler> {
    Some(match ins.mnemonic() {
        Mnemonic::Comiss => threaded!(comi::<F32, false>),
        Mnemonic::Comisd => threaded!(comi::<F64, false>),
        Mnemonic::Ucomiss => threaded!(comi::<F32, true>),
        Mnemonic::Ucomisd => threaded!(comi::<F64, true>),
        Mnemonic::Haddps => threaded!(horizontal::<Add, F32>),
        Mnemonic::Haddpd => threaded!(horizontal::<Add, F64>),
        Mnemonic::Hsubps => threaded!(horizontal::<Sub, F32>),
        Mnemonic::Hsubpd => threaded!(horizontal::<Sub, F64>),
        Mnemonic::Addsubps => threaded!(addsub::<F32>),
        Mnemonic::Addsubpd => threaded!(addsub::<F64>),
        Mnemonic::Dpps => threaded!(dot_product::<F32>),
        Mnemonic::Dppd => threaded!(dot_product::<F64>),
        Mnemonic::Rcpps => threaded!(|cpu, ram, i| approximate::<4>(cpu, ram, i, approx::reciprocal)),
        Mnemonic::Rcpss => threaded!(|cpu, ram, i| approximate::<1>(cpu, ram, i, approx::reciprocal)),
        Mnemonic::Rsqrtps => threaded!(|cpu, ram, i| approximate::<4>(cpu, ram, i, approx::reciprocal_sqrt)),
        Mnemonic::Rsqrtss => threaded!(|cpu, ram, i| approximate::<1>(cpu, ram, i, approx::reciprocal_sqrt)),
        _ => return None,
    })
}
