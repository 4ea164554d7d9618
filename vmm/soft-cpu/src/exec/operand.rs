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
/// The memory operand, where it is only a base register and a displacement: the most frequent form has the
/// shortest way.
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

impl Source for Near {
    #[inline(always)]
    fn load<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<T, Stop> {
        match cpu.load(ram, near(cpu, i)) {
            Ok(v) => Ok(v),
            Err(stop) => Err(cpu.operand_fault(i, stop)),
        }
    }
}

impl Target for Near {
    #[inline(always)]
    fn store<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn, value: T) -> Result<(), Stop> {
        match cpu.store(ram, near(cpu, i), value) {
            Ok(()) => Ok(()),
            Err(stop) => Err(cpu.operand_fault(i, stop)),
        }
    }

    #[inline(always)]
    fn modify<T: Int>(
        cpu: &mut Cpu,
        ram: &mut [u8],
        i: &Insn,
        f: impl FnOnce(&mut Cpu, T) -> (T, Flags),
    ) -> Result<(), Stop> {
        match cpu.modify(ram, near(cpu, i), f) {
            Ok(()) => Ok(()),
            Err(stop) => Err(cpu.operand_fault(i, stop)),
        }
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

/// The instance of a handler for each width, by [`log_size`]: `widths!(f, O)` is `[f::<O, u8>, …]`.
macro_rules! widths {
    ($f:ident $(, $t:ty)*) => {
        [$f::<$($t,)* u8> as $crate::insn::Handler, $f::<$($t,)* u16>, $f::<$($t,)* u32>, $f::<$($t,)* u64>]
    };
}
pub(super) use widths;

/// The instance of a handler for each condition: `conditions!(f, T)` is `[f::<T, 0>, …]`, to be indexed by
/// [`condition`].
macro_rules! conditions {
    ($f:ident $(, $t:ty)*) => {
        [
            $f::<$($t,)* 0> as $crate::insn::Handler, $f::<$($t,)* 1>, $f::<$($t,)* 2>, $f::<$($t,)* 3>,
            $f::<$($t,)* 4>, $f::<$($t,)* 5>, $f::<$($t,)* 6>, $f::<$($t,)* 7>,
            $f::<$($t,)* 8>, $f::<$($t,)* 9>, $f::<$($t,)* 10>, $f::<$($t,)* 11>,
            $f::<$($t,)* 12>, $f::<$($t,)* 13>, $f::<$($t,)* 14>, $f::<$($t,)* 15>,
        ]
    };
}
pub(super) use conditions;

/// The condition of a Jcc, SETcc or CMOVcc in its encoding (SDM 2, appendix B.1.4); `None` for others.
pub(super) fn condition(ins: &Instruction) -> Option<usize> {
    (ins.condition_code() as usize).checked_sub(1)
}
