//! Operand kinds as types, over which handlers are generic.

use iced_x86::{Instruction, OpKind};

use crate::exit::CpuStop;
use crate::flags::Flags;
use crate::insn::{ADDR32, Insn};
use crate::int::Int;
use crate::state::{Cpu, ZERO};

/// An operand that can be read.
pub(super) trait SourceOperand {
    fn load<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<T, CpuStop>;
}

/// An operand that can be written.
pub(super) trait DestinationOperand: SourceOperand {
    fn store<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn, value: T) -> Result<(), CpuStop>;

    /// Replaces the operand, and the flags, by what `f` returns for it. `f` must not change the CPU, as the
    /// write may still fail.
    fn modify<T: Int>(
        cpu: &mut Cpu,
        ram: &mut [u8],
        i: &Insn,
        f: impl FnOnce(&mut Cpu, T) -> (T, Flags),
    ) -> Result<(), CpuStop>;
}

/// Operand 0, a register.
pub(super) struct Dst;
/// Operand 1, a register.
pub(super) struct Src;
/// The memory operand.
pub(super) struct Mem;
/// The memory operand, in a quick handler: gives up unless the fast TLB allows the access.
pub(super) struct Quick;
/// As [`Quick`], for an operand with only a base register and a displacement: a shorter path for the most
/// frequent form.
pub(super) struct Near;
/// The immediate.
pub(super) struct Imm;
/// Memory at the 64-bit address in the immediate (MOV moffs).
pub(super) struct Moffs;

impl SourceOperand for Dst {
    #[inline(always)]
    fn load<T: Int>(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<T, CpuStop> {
        Ok(cpu.reg(i.dst))
    }
}

impl DestinationOperand for Dst {
    #[inline(always)]
    fn store<T: Int>(cpu: &mut Cpu, _: &mut [u8], i: &Insn, value: T) -> Result<(), CpuStop> {
        cpu.set_reg(i.dst, value);
        Ok(())
    }

    #[inline(always)]
    fn modify<T: Int>(
        cpu: &mut Cpu,
        _: &mut [u8],
        i: &Insn,
        f: impl FnOnce(&mut Cpu, T) -> (T, Flags),
    ) -> Result<(), CpuStop> {
        let old = cpu.reg(i.dst);
        let (new, flags) = f(cpu, old);
        cpu.set_reg(i.dst, new);
        cpu.flags = flags;
        Ok(())
    }
}

impl SourceOperand for Src {
    #[inline(always)]
    fn load<T: Int>(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<T, CpuStop> {
        Ok(cpu.reg(i.src))
    }
}

impl SourceOperand for Mem {
    #[inline(always)]
    fn load<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<T, CpuStop> {
        cpu.load_operand(ram, i)
    }
}

impl DestinationOperand for Mem {
    #[inline(always)]
    fn store<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn, value: T) -> Result<(), CpuStop> {
        cpu.store_operand(ram, i, value)
    }

    #[inline(always)]
    fn modify<T: Int>(
        cpu: &mut Cpu,
        ram: &mut [u8],
        i: &Insn,
        f: impl FnOnce(&mut Cpu, T) -> (T, Flags),
    ) -> Result<(), CpuStop> {
        cpu.modify_operand(ram, i, f)
    }
}

impl SourceOperand for Quick {
    #[inline(always)]
    fn load<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<T, CpuStop> {
        cpu.load_quick(ram, cpu.ea(i)).ok_or(CpuStop::Slow)
    }
}

impl DestinationOperand for Quick {
    #[inline(always)]
    fn store<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn, value: T) -> Result<(), CpuStop> {
        cpu.store_quick(ram, cpu.ea(i), value).ok_or(CpuStop::Slow)
    }

    #[inline(always)]
    fn modify<T: Int>(
        cpu: &mut Cpu,
        ram: &mut [u8],
        i: &Insn,
        f: impl FnOnce(&mut Cpu, T) -> (T, Flags),
    ) -> Result<(), CpuStop> {
        cpu.modify_quick(ram, cpu.ea(i), f).ok_or(CpuStop::Slow)
    }
}

impl SourceOperand for Near {
    #[inline(always)]
    fn load<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<T, CpuStop> {
        cpu.load_quick(ram, near(cpu, i)).ok_or(CpuStop::Slow)
    }
}

impl DestinationOperand for Near {
    #[inline(always)]
    fn store<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn, value: T) -> Result<(), CpuStop> {
        cpu.store_quick(ram, near(cpu, i), value).ok_or(CpuStop::Slow)
    }

    #[inline(always)]
    fn modify<T: Int>(
        cpu: &mut Cpu,
        ram: &mut [u8],
        i: &Insn,
        f: impl FnOnce(&mut Cpu, T) -> (T, Flags),
    ) -> Result<(), CpuStop> {
        cpu.modify_quick(ram, near(cpu, i), f).ok_or(CpuStop::Slow)
    }
}

/// Address of a [`Near`] operand.
#[inline(always)]
fn near(cpu: &Cpu, i: &Insn) -> u64 {
    cpu.reg::<u64>(i.base).wrapping_add(i.disp as i64 as u64)
}

/// Is the memory operand a [`Near`] one?
pub(super) fn is_near(i: &Insn) -> bool {
    i.index == ZERO && i.seg == ZERO && i.scale & ADDR32 == 0
}

impl SourceOperand for Imm {
    #[inline(always)]
    fn load<T: Int>(_: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<T, CpuStop> {
        Ok(T::from_u64(i.imm))
    }
}

impl SourceOperand for Moffs {
    #[inline(always)]
    fn load<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<T, CpuStop> {
        let addr = cpu.reg::<u64>(i.seg).wrapping_add(i.imm);
        cpu.load(ram, addr)
    }
}

/// Is operand `n` memory?
pub(super) fn is_memory(ins: &Instruction, n: u32) -> bool {
    ins.op_kind(n) == OpKind::Memory
}

/// Binary logarithm of the size in bytes of operand `n`, a register or memory.
pub(super) fn log_size(ins: &Instruction, n: u32) -> usize {
    let bytes = if is_memory(ins, n) { ins.memory_size().size() } else { ins.op_register(n).size() };
    bytes.trailing_zeros() as usize
}

/// A table of the instances of a handler for each width, indexed by [`log_size`]: `widths!(f, O)` is `[f::<O,
/// u8>, …]`. For quick handlers the exact one follows: `widths!(f, Quick; else Mem)`.
macro_rules! widths {
    ($f:ident $(, $t:ty)*) => {
        [
            $crate::insn::threaded!($f::<$($t,)* u8>) as $crate::insn::Handler,
            $crate::insn::threaded!($f::<$($t,)* u16>),
            $crate::insn::threaded!($f::<$($t,)* u32>),
            $crate::insn::threaded!($f::<$($t,)* u64>),
        ]
    };
    ($f:ident $(, $t:ty)*; else $($e:ty),*) => {
        [
            $crate::insn::quick!($f::<$($t,)* u8>, $f::<$($e,)* u8>) as $crate::insn::Handler,
            $crate::insn::quick!($f::<$($t,)* u16>, $f::<$($e,)* u16>),
            $crate::insn::quick!($f::<$($t,)* u32>, $f::<$($e,)* u32>),
            $crate::insn::quick!($f::<$($t,)* u64>, $f::<$($e,)* u64>),
        ]
    };
}
pub(super) use widths;

/// A table of the instances of a handler for each condition, indexed by [`condition`]: `conditions!(f, T)` is
/// `[f::<T, 0>, …]`.
macro_rules! conditions {
    ($f:ident $(, $t:ty)*) => {
        [
            $crate::insn::threaded!($f::<$($t,)* 0>) as $crate::insn::Handler,
            $crate::insn::threaded!($f::<$($t,)* 1>),
            $crate::insn::threaded!($f::<$($t,)* 2>),
            $crate::insn::threaded!($f::<$($t,)* 3>),
            $crate::insn::threaded!($f::<$($t,)* 4>),
            $crate::insn::threaded!($f::<$($t,)* 5>),
            $crate::insn::threaded!($f::<$($t,)* 6>),
            $crate::insn::threaded!($f::<$($t,)* 7>),
            $crate::insn::threaded!($f::<$($t,)* 8>),
            $crate::insn::threaded!($f::<$($t,)* 9>),
            $crate::insn::threaded!($f::<$($t,)* 10>),
            $crate::insn::threaded!($f::<$($t,)* 11>),
            $crate::insn::threaded!($f::<$($t,)* 12>),
            $crate::insn::threaded!($f::<$($t,)* 13>),
            $crate::insn::threaded!($f::<$($t,)* 14>),
            $crate::insn::threaded!($f::<$($t,)* 15>),
        ]
    };
    ($f:ident $(, $t:ty)*; else $($e:ty),*) => {
        [
            $crate::insn::quick!($f::<$($t,)* 0>, $f::<$($e,)* 0>) as $crate::insn::Handler,
            $crate::insn::quick!($f::<$($t,)* 1>, $f::<$($e,)* 1>),
            $crate::insn::quick!($f::<$($t,)* 2>, $f::<$($e,)* 2>),
            $crate::insn::quick!($f::<$($t,)* 3>, $f::<$($e,)* 3>),
            $crate::insn::quick!($f::<$($t,)* 4>, $f::<$($e,)* 4>),
            $crate::insn::quick!($f::<$($t,)* 5>, $f::<$($e,)* 5>),
            $crate::insn::quick!($f::<$($t,)* 6>, $f::<$($e,)* 6>),
            $crate::insn::quick!($f::<$($t,)* 7>, $f::<$($e,)* 7>),
            $crate::insn::quick!($f::<$($t,)* 8>, $f::<$($e,)* 8>),
            $crate::insn::quick!($f::<$($t,)* 9>, $f::<$($e,)* 9>),
            $crate::insn::quick!($f::<$($t,)* 10>, $f::<$($e,)* 10>),
            $crate::insn::quick!($f::<$($t,)* 11>, $f::<$($e,)* 11>),
            $crate::insn::quick!($f::<$($t,)* 12>, $f::<$($e,)* 12>),
            $crate::insn::quick!($f::<$($t,)* 13>, $f::<$($e,)* 13>),
            $crate::insn::quick!($f::<$($t,)* 14>, $f::<$($e,)* 14>),
            $crate::insn::quick!($f::<$($t,)* 15>, $f::<$($e,)* 15>),
        ]
    };
}
pub(super) use conditions;

/// The condition of a Jcc, SETcc or CMOVcc in its encoding (SDM 2, appendix B.1.4); `None` for others.
pub(super) fn condition(ins: &Instruction) -> Option<usize> {
    (ins.condition_code() as usize).checked_sub(1)
}
