//! Floating point with integer arithmetic only.
//!
//! Every function here is a pure function of bit patterns and of a [`FloatContext`]. None uses the host's
//! floating-point unit, so that two hosts never differ. The formats are [`F32`], [`F64`] and the x87's
//! [`F80`], each unpacked into an [`Operand`]; results are rounded once, from an exact (or sticky) 128-bit
//! significand.
//!
//! What the architecture defines is implemented as defined: rounding modes, precision control, tininess after
//! rounding, the NaN rules of SSE (first operand) and of the x87 (larger significand), DAZ, FTZ, and the
//! order of exceptions.
//!
//! What differs between vendors is defined here as follows:
//!
//! - **RCPSS, RCPPS, RSQRTSS, RSQRTPS**: `1/x` and `1/√x` rounded to nearest even at 12 significant bits
//!   ([`approx`]). A denormal operand counts as zero, a denormal result becomes zero, no flag is set.
//! - **F2XM1, FYL2X, FYL2XP1, FPATAN, FPTAN, FSIN, FCOS, FSINCOS**: the mathematical function with about 120
//!   correct bits, rounded in the current mode to 64 bits whatever the precision control is
//!   ([`transcendental`]). Arguments of FSIN, FCOS, FSINCOS and FPTAN are reduced by the exact π, not by its
//!   first 66 bits. F2XM1 with |x| > 1 returns x; FYL2XP1 with x ≤ -1 is an invalid operation.
//! - **FPREM, FPREM1**: a partial step reduces the difference of exponents `d` by `32 + d % 32` and clears
//!   C0, C1, C3.

pub mod approx;
mod arith;
mod compare;
mod convert;
mod format;
pub mod transcendental;
mod wide;
mod x87;

pub use arith::{add, div, mul, sqrt, sub};
pub use compare::{Predicate, compare, max, min};
pub use convert::{convert, from_int, round_to_integral, to_int};
pub use format::{F32, F64, F80, Float, FloatClass, Operand};
pub use x87::{Remainder, extract, from_bcd, load, remainder, scale, store, to_bcd};

/// Invalid operation; the bit of MXCSR and of the x87 status word, like those that follow.
pub const IE: u8 = 0x01;
/// A denormal operand.
pub const DE: u8 = 0x02;
/// Division of a finite number by zero.
pub const ZE: u8 = 0x04;
/// Overflow.
pub const OE: u8 = 0x08;
/// Underflow.
pub const UE: u8 = 0x10;
/// Inexact result ("precision").
pub const PE: u8 = 0x20;

/// The exceptions that are detected before a result is computed: if one of them is unmasked there is no
/// result.
pub const PRE_COMPUTATION: u8 = IE | DE | ZE;

/// Rounding mode, encoded as in MXCSR.RC, the x87's RC and the immediate of ROUNDSS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// To nearest, ties to even.
    Nearest,
    /// Towards minus infinity.
    Down,
    /// Towards plus infinity.
    Up,
    /// Towards zero.
    Zero,
}

impl Rounding {
    /// From the low two bits of `rc`.
    pub const fn from_bits(rc: u32) -> Rounding {
        match rc & 3 {
            0 => Rounding::Nearest,
            1 => Rounding::Down,
            2 => Rounding::Up,
            _ => Rounding::Zero,
        }
    }
}

/// How to compute, and the exceptions that computing has raised.
#[derive(Clone, Copy, Debug)]
pub struct FloatContext {
    /// Rounding mode.
    pub rounding: Rounding,
    /// Bits of an x87 result's significand: 24, 53 or 64. SSE formats have their own.
    pub precision: u32,
    /// The exceptions that are masked.
    pub masked: u8,
    /// Whether denormal operands count as zeros.
    pub daz: bool,
    /// Whether tiny results become zero while underflow is masked.
    pub ftz: bool,
    /// Exceptions detected since the context was made; [`FloatContext::raised`] gives those that count.
    pub flags: u8,
    /// Whether the last rounding increased the magnitude (C1 of the x87).
    pub rounded_up: bool,
}

impl FloatContext {
    /// The context that MXCSR asks for, with no flags yet.
    pub const fn from_mxcsr(mxcsr: u32) -> FloatContext {
        FloatContext {
            rounding: Rounding::from_bits(mxcsr >> 13),
            precision: 64,
            masked: (mxcsr >> 7) as u8 & 0x3f,
            daz: mxcsr & 0x40 != 0,
            ftz: mxcsr & 0x8000 != 0,
            flags: 0,
            rounded_up: false,
        }
    }

    /// The context that an x87 control word asks for, with no flags yet. The reserved precision 01 counts as
    /// 64 bits.
    pub const fn from_control_word(fcw: u16) -> FloatContext {
        FloatContext {
            rounding: Rounding::from_bits(fcw as u32 >> 10),
            precision: match fcw >> 8 & 3 {
                0 => 24,
                2 => 53,
                _ => 64,
            },
            masked: fcw as u8 & 0x3f,
            daz: false,
            ftz: false,
            flags: 0,
            rounded_up: false,
        }
    }

    /// The exceptions to report: with an unmasked pre-computation exception, only exceptions of that kind.
    pub const fn raised(&self) -> u8 {
        if self.no_result() { self.flags & PRE_COMPUTATION } else { self.flags }
    }

    /// The raised exceptions that are not masked: non-zero means #XM, or a pending #MF.
    pub const fn unmasked(&self) -> u8 {
        self.raised() & !self.masked
    }

    /// Whether there is an unmasked pre-computation exception, so that the returned value must not be stored.
    pub const fn no_result(&self) -> bool {
        self.flags & !self.masked & PRE_COMPUTATION != 0
    }
}
