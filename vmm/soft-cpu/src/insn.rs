//! A decoded instruction and the helpers its handlers use.

use crate::exit::Stop;
use crate::state::{Cpu, REGS};

/// Executes the first of some instructions and, by a tail call, those that follow in its block: each handler has an
/// indirect jump of its own to the next, which processors predict better than one for all, and between two there is no
/// loop. [`threaded!`] and [`quick!`] make one of functions that execute one instruction. See [`Stop`] for what an error
/// promises.
///
/// Nothing depends on the tail call: blocks are short enough to be recursed through.
pub type Handler = fn(&mut Cpu, &mut [u8], &[Insn]) -> Result<(), Stop>;

/// Executes one instruction.
pub type Single = fn(&mut Cpu, &mut [u8], &Insn) -> Result<(), Stop>;

/// The [`Handler`] of a [`Single`], which is named and no variable.
macro_rules! threaded {
    ($f:expr) => {
        |cpu: &mut $crate::state::Cpu, ram: &mut [u8], insns: &[$crate::insn::Insn]| {
            let f: $crate::insn::Single = $f;
            let [insn, rest @ ..] = insns else { return Ok(()) };
            match f(cpu, ram, insn) {
                Ok(()) => $crate::insn::run(cpu, ram, rest),
                Err(stop) => cpu.stop_before(rest, stop),
            }
        }
    };
}
pub(crate) use threaded;

/// The [`Handler`] of two [`Single`]s: a quick one, which gives up where it has not all at hand and so needs no calls,
/// and the exact one that then does it from the start.
macro_rules! quick {
    ($quick:expr, $exact:expr) => {
        |cpu: &mut $crate::state::Cpu, ram: &mut [u8], insns: &[$crate::insn::Insn]| {
            let quick: $crate::insn::Single = $quick;
            let [insn, rest @ ..] = insns else { return Ok(()) };
            match quick(cpu, ram, insn) {
                Ok(()) => $crate::insn::run(cpu, ram, rest),
                Err(_) => {
                    cpu.exact = $exact;
                    $crate::insn::retry(cpu, ram, insns)
                }
            }
        }
    };
}
pub(crate) use quick;

/// Does with [`Cpu::exact`] what a quick handler gave up, and goes on.
#[cold]
#[inline(never)]
pub fn retry(cpu: &mut Cpu, ram: &mut [u8], insns: &[Insn]) -> Result<(), Stop> {
    let [insn, rest @ ..] = insns else { return Ok(()) };
    match (cpu.exact)(cpu, ram, insn) {
        Ok(()) => run(cpu, ram, rest),
        Err(stop) => cpu.stop_before(rest, stop),
    }
}

/// Executes the instructions of a block, or what is left of them.
#[inline(always)]
pub fn run(cpu: &mut Cpu, ram: &mut [u8], insns: &[Insn]) -> Result<(), Stop> {
    match insns.first() {
        Some(insn) => (insn.exec)(cpu, ram, insns),
        None => Ok(()),
    }
}

/// A decoded instruction: what to run, and its operands in a form that needs no further looking.
///
/// Register operands are indexes into [`Cpu::regs`] (or an XMM, MMX or x87 register number, as the handler
/// knows); 8-bit operands that name AH, CH, DH or BH have [`HIGH_BYTE`] set in the index of the register they
/// are part of. `dst` is operand 0 and `src` operand 1 when these are registers. A memory operand is
/// `regs[base] + (regs[index] << scale) + regs[seg] + disp`; absent parts name the register that is always 0,
/// a RIP-relative one has [`crate::state::RIP_BASE`] as base and a displacement from the start of its block.
#[derive(Clone, Copy)]
pub struct Insn {
    /// Its handler.
    pub exec: Handler,
    /// Immediate, sign-extended to 64 bits; branch displacement; or the 64-bit address of `MOV moffs`.
    pub imm: u64,
    /// Displacement of the memory operand.
    pub disp: i32,
    /// Base register of the memory operand.
    pub base: u8,
    /// Index register of the memory operand.
    pub index: u8,
    /// Scale as a shift (0 to 3), with [`ADDR32`] where the address is cut to 32 bits.
    pub scale: u8,
    /// Register that holds the segment base.
    pub seg: u8,
    /// Operand 0, when it is a register.
    pub dst: u8,
    /// Operand 1, when it is a register.
    pub src: u8,
    /// Offset of the instruction from the start of its block, bytes.
    pub offset: u16,
    /// Length, bytes.
    pub len: u8,
    /// See [`flag`].
    pub flags: u8,
}

/// Bits of [`Insn::flags`].
pub mod flag {
    /// REP or REPE prefix (F3).
    pub const REP: u8 = 1;
    /// REPNE prefix (F2).
    pub const REPNE: u8 = 2;
    /// The memory operand is in the stack segment: a non-canonical address is #SS, not #GP.
    pub const STACK: u8 = 4;
    /// LOCK prefix.
    pub const LOCK: u8 = 8;
    /// The string instruction has 32-bit addresses (67 prefix): ECX, ESI, EDI.
    pub const ADDR32: u8 = 16;
}

/// In [`Insn::scale`]: the address is truncated to 32 bits (67 prefix).
pub const ADDR32: u8 = 0x80;
/// In an 8-bit register operand: bits 15 to 8 of the register.
pub const HIGH_BYTE: u8 = 0x20;

/// An operand width of the integer set.
pub trait Int:
    Copy
    + Eq
    + Ord
    + std::ops::BitAnd<Output = Self>
    + std::ops::BitOr<Output = Self>
    + std::ops::BitXor<Output = Self>
    + std::ops::Not<Output = Self>
{
    /// Width in bits.
    const BITS: u32;
    /// Width in bytes.
    const SIZE: usize;
    /// The low bits of `v`.
    fn from_u64(v: u64) -> Self;
    /// Zero-extended.
    fn to_u64(self) -> u64;
    /// Sign-extended.
    fn sext(self) -> u64;
    /// Wrapping sum.
    fn add(self, o: Self) -> Self;
    /// Wrapping difference.
    fn sub(self, o: Self) -> Self;
    /// Reads the first `SIZE` bytes, little-endian; `None` when there are fewer.
    fn read(b: &[u8]) -> Option<Self>;
    /// Writes the first `SIZE` bytes; `None` when there are fewer.
    fn write(self, b: &mut [u8]) -> Option<()>;
    /// Value of register operand `r`.
    fn get(regs: &[u64; REGS], r: u8) -> Self;
    /// Writes register operand `r`: 32 bits clear the upper half, 8 and 16 leave the rest.
    fn set(self, regs: &mut [u64; REGS], r: u8);
}

macro_rules! int {
    ($t:ty, $s:ty, $get:expr, $set:expr) => {
        impl Int for $t {
            const BITS: u32 = <$t>::BITS;
            const SIZE: usize = size_of::<$t>();
            #[inline(always)]
            fn from_u64(v: u64) -> Self {
                v as $t
            }
            #[inline(always)]
            fn to_u64(self) -> u64 {
                self as u64
            }
            #[inline(always)]
            fn sext(self) -> u64 {
                self as $s as i64 as u64
            }
            #[inline(always)]
            fn add(self, o: Self) -> Self {
                self.wrapping_add(o)
            }
            #[inline(always)]
            fn sub(self, o: Self) -> Self {
                self.wrapping_sub(o)
            }
            #[inline(always)]
            fn read(b: &[u8]) -> Option<Self> {
                Some(<$t>::from_le_bytes(*b.first_chunk()?))
            }
            #[inline(always)]
            fn write(self, b: &mut [u8]) -> Option<()> {
                *b.first_chunk_mut()? = self.to_le_bytes();
                Some(())
            }
            #[inline(always)]
            fn get(regs: &[u64; REGS], r: u8) -> Self {
                let get: fn(&[u64; REGS], u8) -> Self = $get;
                get(regs, r)
            }
            #[inline(always)]
            fn set(self, regs: &mut [u64; REGS], r: u8) {
                let set: fn(&mut [u64; REGS], u8, Self) = $set;
                set(regs, r, self)
            }
        }
    };
}

int!(
    u8,
    i8,
    |regs, r| {
        let v = regs[slot(r)];
        if r & HIGH_BYTE != 0 { (v >> 8) as u8 } else { v as u8 }
    },
    |regs, r, v| {
        let x = &mut regs[slot(r)];
        if r & HIGH_BYTE != 0 {
            *x = *x & !0xff00 | (v as u64) << 8;
        } else {
            *x = *x & !0xff | v as u64;
        }
    }
);
int!(u16, i16, |regs, r| regs[slot(r)] as u16, |regs, r, v| {
    let x = &mut regs[slot(r)];
    *x = *x & !0xffff | v as u64;
});
int!(u32, i32, |regs, r| regs[slot(r)] as u32, |regs, r, v| regs[slot(r)] = v as u64);
int!(u64, i64, |regs, r| regs[slot(r)], |regs, r, v| regs[slot(r)] = v);

/// Index into the register file; the mask spares the bounds check.
#[inline(always)]
fn slot(r: u8) -> usize {
    r as usize & (REGS - 1)
}

impl Cpu {
    /// Value of register operand `r`.
    #[inline(always)]
    pub fn reg<T: Int>(&self, r: u8) -> T {
        T::get(&self.regs, r)
    }

    /// Writes register operand `r`.
    #[inline(always)]
    pub fn set_reg<T: Int>(&mut self, r: u8, v: T) {
        v.set(&mut self.regs, r);
    }

    /// The instruction before `rest` in its block has stopped.
    #[cold]
    #[inline(never)]
    pub(crate) fn stop_before(&mut self, rest: &[Insn], stop: Stop) -> Result<(), Stop> {
        self.left = rest.len();
        Err(stop)
    }

    /// Linear address of the memory operand.
    #[inline(always)]
    pub fn ea(&self, i: &Insn) -> u64 {
        self.ea_offset(i).wrapping_add(self.regs[slot(i.seg)])
    }

    /// Linear address `n` bytes into the memory operand, where a part of it is accessed on its own: a 32-bit offset
    /// wraps in between.
    pub fn ea_at(&self, i: &Insn, n: usize) -> u64 {
        let offset = self.ea_offset(i).wrapping_add(n as u64);
        let offset = if i.scale & ADDR32 != 0 { offset as u32 as u64 } else { offset };
        offset.wrapping_add(self.regs[slot(i.seg)])
    }

    /// The memory operand's offset in its segment: what LEA gives.
    #[inline(always)]
    pub fn ea_offset(&self, i: &Insn) -> u64 {
        let a = self.regs[slot(i.base)]
            .wrapping_add(self.regs[slot(i.index)] << (i.scale & 3))
            .wrapping_add(i.disp as i64 as u64);
        if i.scale & ADDR32 != 0 { a as u32 as u64 } else { a }
    }
}
