//! Where an instruction's operands are, as types: handlers are generic over them.

use iced_x86::{Instruction, OpKind};

use crate::exit::Stop;
use crate::flags::Flags;
use crate::insn::{ADDR32, Insn, Int};
use crate::state::{Cpu, ZERO};

/// An operand that can be read.
pub(super) trait Source {
    fn load<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<T, Stop>;
}

/// An operand that can be written.
pub(super) trait Target: Source {
    fn store<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn, value: T) -> Result<(), Stop>;

    /// Replaces the operand by what `f` makes of it and the flags by what `f` gives. `f` must change nothing in
    /// the CPU: the write may still fail.
    fn modify<T: Int>(
        cpu: &mut Cpu,
        ram: &mut [u8],
        i: &Insn,
        f: impl FnOnce(&mut Cpu, T) -> (T, Flags),
    ) -> Result<(), Stop>;
}

/// Operand 0, a register.
pub(super) struct Dst;
/// Operand 1, a register.
pub(super) struct Src;
/// The memory operand.
pub(super) struct Mem;
/// The memory operand in a quick handler.
pub(super) struct Quick;
/// The same, where it is only a base register and a displacement: the most frequent form has the shortest way.
pub(super) struct Near;
/// The immediate.
pub(super) struct Imm;
/// Memory at the 64-bit address in the immediate (MOV moffs).
pub(super) struct Moffs;

impl Source for Dst {
    #[inline(always)]
    fn load<T: Int>(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<T, Stop> {
        Ok(cpu.reg(i.dst))
    }
}

impl Target for Dst {
    #[inline(always)]
    fn store<T: Int>(cpu: &mut Cpu, _: &mut [u8], i: &Insn, value: T) -> Result<(), Stop> {
        cpu.set_reg(i.dst, value);
        Ok(())
    }

    #[inline(always)]
    fn modify<T: Int>(
        cpu: &mut Cpu,
        _: &mut [u8],
        i: &Insn,
        f: impl FnOnce(&mut Cpu, T) -> (T, Flags),
    ) -> Result<(), Stop> {
        let old = cpu.reg(i.dst);
        let (new, flags) = f(cpu, old);
        cpu.set_reg(i.dst, new);
        cpu.flags = flags;
        Ok(())
    }
}

impl Source for Src {
    #[inline(always)]
    fn load<T: Int>(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<T, Stop> {
        Ok(cpu.reg(i.src))
    }
}

impl Source for Mem {
    #[inline(always)]
    fn load<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<T, Stop> {
        cpu.load_operand(ram, i)
    }
}

impl Target for Mem {
    #[inline(always)]
    fn store<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn, value: T) -> Result<(), Stop> {
        cpu.store_operand(ram, i, value)
    }

    #[inline(always)]
    fn modify<T: Int>(
        cpu: &mut Cpu,
        ram: &mut [u8],
        i: &Insn,
        f: impl FnOnce(&mut Cpu, T) -> (T, Flags),
    ) -> Result<(), Stop> {
        cpu.modify_operand(ram, i, f)
    }
}

impl Source for Quick {
    #[inline(always)]
    fn load<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<T, Stop> {
        cpu.load_quick(ram, cpu.ea(i)).ok_or(Stop::Slow)
    }
}

impl Target for Quick {
    #[inline(always)]
    fn store<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn, value: T) -> Result<(), Stop> {
        cpu.store_quick(ram, cpu.ea(i), value).ok_or(Stop::Slow)
    }

    #[inline(always)]
    fn modify<T: Int>(
        cpu: &mut Cpu,
        ram: &mut [u8],
        i: &Insn,
        f: impl FnOnce(&mut Cpu, T) -> (T, Flags),
    ) -> Result<(), Stop> {
        cpu.modify_quick(ram, cpu.ea(i), f).ok_or(Stop::Slow)
    }
}

impl Source for Near {
    #[inline(always)]
    fn load<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<T, Stop> {
        cpu.load_quick(ram, near(cpu, i)).ok_or(Stop::Slow)
    }
}

impl Target for Near {
    #[inline(always)]
    fn store<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn, value: T) -> Result<(), Stop> {
        cpu.store_quick(ram, near(cpu, i), value).ok_or(Stop::Slow)
    }

    #[inline(always)]
    fn modify<T: Int>(
        cpu: &mut Cpu,
        ram: &mut [u8],
        i: &Insn,
        f: impl FnOnce(&mut Cpu, T) -> (T, Flags),
    ) -> Result<(), Stop> {
        cpu.modify_quick(ram, near(cpu, i), f).ok_or(Stop::Slow)
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

impl Source for Imm {
    #[inline(always)]
    fn load<T: Int>(_: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<T, Stop> {
        Ok(T::from_u64(i.imm))
    }
}

impl Source for Moffs {
    #[inline(always)]
    fn load<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<T, Stop> {
        let addr = cpu.reg::<u64>(i.seg).wrapping_add(i.imm);
        cpu.load(ram, addr)
    }
}

/// Is operand `n` memory?
pub(super) fn is_memory(ins: &Instruction, n: u32) -> bool {
    ins.op_kind(n) == OpKind::Memory
}

/// Binary logarithm of the bytes of operand `n`, a register or memory.
pub(super) fn log_size(ins: &Instruction, n: u32) -> usize {
    let bytes = if is_memory(ins, n) { ins.memory_size().size() } else { ins.op_register(n).size() };
    bytes.trailing_zeros() as usize
}

/// The instance of a handler for each width, by [`log_size`]: `widths!(f, O)` is `[f::<O, u8>, …]`. Quick ones have
/// their exact ones behind them: `widths!(f, Quick; else Mem)`.
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

/// The instance of a handler for each condition: `conditions!(f, T)` is `[f::<T, 0>, …]`, to be indexed by
/// [`condition`].
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
