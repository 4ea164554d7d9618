//! A decoded instruction and the helpers its handlers use.

use iced_x86::Register;

use crate::exit::CpuStop;
use crate::int::{HIGH_BYTE, Int, slot};
use crate::state::Cpu;

/// Executes the first of the given instructions and, by a tail call, those that follow in its block (threaded
/// code): each handler has its own indirect jump to the next, which processors predict better than one jump
/// in a loop. `threaded!` and `quick!` make a handler from functions that execute one instruction. See
/// [`CpuStop`] for what holds after an error.
///
/// Nothing depends on the tail call being one: blocks are short enough for real recursion.
pub type Handler = fn(&mut Cpu, &mut [u8], &[Insn]) -> Result<(), CpuStop>;

/// Executes one instruction.
pub type Single = fn(&mut Cpu, &mut [u8], &Insn) -> Result<(), CpuStop>;

/// Makes a [`Handler`] of a [`Single`], which must be a path or a closure without captures.
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

/// Makes a [`Handler`] of two [`Single`]s: a quick one, which makes no calls and gives up if the fast TLB
/// does not allow an access, and an exact one, which then executes the instruction from its start.
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

/// Executes with `Cpu::exact` the instruction that a quick handler gave up, and continues with the rest of
/// the block.
#[cold]
#[inline(never)]
pub fn retry(cpu: &mut Cpu, ram: &mut [u8], insns: &[Insn]) -> Result<(), CpuStop> {
    let [insn, rest @ ..] = insns else { return Ok(()) };
    match (cpu.exact)(cpu, ram, insn) {
        Ok(()) => run(cpu, ram, rest),
        Err(stop) => cpu.stop_before(rest, stop),
    }
}

/// Executes the instructions of a block, or the rest of them.
#[inline(always)]
pub fn run(cpu: &mut Cpu, ram: &mut [u8], insns: &[Insn]) -> Result<(), CpuStop> {
    match insns.first() {
        Some(insn) => (insn.exec)(cpu, ram, insns),
        None => Ok(()),
    }
}

/// A decoded instruction: its handler, and its operands in a form that needs no further decoding.
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
    /// Scale as a shift count (0 to 3), with [`ADDR32`] if the address is truncated to 32 bits.
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

/// At which place in a block an instruction may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlaceInBlock {
    /// Anywhere.
    Middle,
    /// Only last: it may change RIP or what the run loop checks between blocks.
    Last,
    /// Only alone in its block: its handler needs the exact count of retired instructions, usually leaves the
    /// CPU, or changes how the following instructions are fetched.
    Alone,
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

    /// The instruction before `rest` in its block has stopped: notes how many did not run.
    #[cold]
    #[inline(never)]
    pub(crate) fn stop_before(&mut self, rest: &[Insn], stop: CpuStop) -> Result<(), CpuStop> {
        self.left = rest.len();
        Err(stop)
    }

    /// Linear address of the memory operand.
    #[inline(always)]
    pub fn ea(&self, i: &Insn) -> u64 {
        self.ea_offset(i).wrapping_add(self.regs[slot(i.seg)])
    }

    /// Linear address `n` bytes into the memory operand, for a part that is accessed on its own: a 32-bit
    /// offset may wrap in between.
    pub fn ea_at(&self, i: &Insn, n: usize) -> u64 {
        let offset = self.ea_offset(i).wrapping_add(n as u64);
        let offset = if i.scale & ADDR32 != 0 { offset as u32 as u64 } else { offset };
        offset.wrapping_add(self.regs[slot(i.seg)])
    }

    /// Effective address of the memory operand, that is its offset in its segment (what LEA computes).
    #[inline(always)]
    pub fn ea_offset(&self, i: &Insn) -> u64 {
        let a = self.regs[slot(i.base)]
            .wrapping_add(self.regs[slot(i.index)] << (i.scale & 3))
            .wrapping_add(i.disp as i64 as u64);
        if i.scale & ADDR32 != 0 { a as u32 as u64 } else { a }
    }
}

/// Index of a register in its file, as register operands have it.
pub(crate) fn register_index(r: Register) -> u8 {
    match r {
        Register::AH | Register::CH | Register::DH | Register::BH => r.number() as u8 - 4 | HIGH_BYTE,
        // iced numbers SPL to R15L after AH to BH.
        r if r.is_gpr8() => r.full_register().number() as u8,
        r => r.number() as u8,
    }
}
