//! MUL, IMUL, DIV, IDIV.
//!
//! What the SDM leaves undefined behaves as on current Intel processors: a multiplication sets SF and PF from
//! the lower half of the product and clears ZF and AF; a division leaves all flags unchanged.

use iced_x86::{Instruction, Mnemonic};

use super::operand::{Dst, Imm, Mem, SourceOperand, Src, is_memory, log_size, widths};
use crate::exit::CpuStop;
use crate::flags::Flags;
use crate::insn::{Handler, Insn, PlaceInBlock};
use crate::int::{HIGH_BYTE, Int};
use crate::state::{Cpu, reg};

const DIVIDE_ERROR: u8 = 0;
const AH: u8 = reg::RAX | HIGH_BYTE;

/// The register that has the upper half of a double-width value: AH for bytes, else RDX.
#[inline(always)]
fn upper<T: Int>() -> u8 {
    if T::BITS == 8 { AH } else { reg::RDX }
}

/// Sets the flags after a multiplication.
#[inline(always)]
fn set_product_flags<T: Int>(flags: &mut Flags, low: T, overflow: bool) {
    flags.set_result(low);
    flags.set_zf(false);
    flags.set_carries(overflow, overflow, false);
}

fn mul<S: SourceOperand, T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let b = S::load::<T>(cpu, ram, i)?;
    let product = cpu.reg::<T>(reg::RAX).to_u64() as u128 * b.to_u64() as u128;
    let (low, high) = (T::from_u64(product as u64), T::from_u64((product >> T::BITS) as u64));
    cpu.set_reg(reg::RAX, low);
    cpu.set_reg(upper::<T>(), high);
    set_product_flags(&mut cpu.flags, low, high != T::from_u64(0));
    Ok(())
}

/// The signed product, and whether it needs more bits than `T` has.
#[inline(always)]
fn signed_product<T: Int>(a: T, b: T) -> (i128, bool) {
    let product = a.sext() as i64 as i128 * b.sext() as i64 as i128;
    (product, product != T::from_u64(product as u64).sext() as i64 as i128)
}

fn imul<S: SourceOperand, T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let b = S::load::<T>(cpu, ram, i)?;
    let (product, overflow) = signed_product(cpu.reg::<T>(reg::RAX), b);
    let low = T::from_u64(product as u64);
    cpu.set_reg(reg::RAX, low);
    cpu.set_reg(upper::<T>(), T::from_u64((product >> T::BITS) as u64));
    set_product_flags(&mut cpu.flags, low, overflow);
    Ok(())
}

/// The forms with two and three operands; `A` and `B` are the factors.
fn imul_to<A: SourceOperand, B: SourceOperand, T: Int>(
    cpu: &mut Cpu,
    ram: &mut [u8],
    i: &Insn,
) -> Result<(), CpuStop> {
    let a = A::load::<T>(cpu, ram, i)?;
    let b = B::load::<T>(cpu, ram, i)?;
    let (product, overflow) = signed_product(a, b);
    let low = T::from_u64(product as u64);
    cpu.set_reg(i.dst, low);
    set_product_flags(&mut cpu.flags, low, overflow);
    Ok(())
}

/// Quotient and remainder of `high:low / d`; `None` when `d` is 0 or the quotient needs more bits than `T`
/// has.
#[inline(always)]
fn divide<T: Int>(high: T, low: T, d: T) -> Option<(T, T)> {
    let (h, l, d) = (high.to_u64(), low.to_u64(), d.to_u64());
    if h >= d {
        return None;
    }
    if T::BITS < 64 || h == 0 {
        // Below 64 bits both halves fit into one word.
        let n = if T::BITS < 64 { h << (T::BITS & 63) | l } else { l };
        return Some((T::from_u64(n / d), T::from_u64(n % d)));
    }
    let (n, d) = ((h as u128) << 64 | l as u128, d as u128);
    Some((T::from_u64((n / d) as u64), T::from_u64((n % d) as u64)))
}

/// As [`divide`], but signed: the quotient is truncated towards zero, the remainder has the sign of the
/// dividend.
#[inline(always)]
fn divide_signed<T: Int>(high: T, low: T, d: T) -> Option<(T, T)> {
    let d = d.sext() as i64;
    let (q, r) = if T::BITS < 64 || high.sext() as i64 == low.sext() as i64 >> 63 {
        let n = if T::BITS < 64 { high.sext() << (T::BITS & 63) | low.to_u64() } else { low.sext() } as i64;
        (n.checked_div(d)?, n.checked_rem(d)?)
    } else {
        let n = (high.to_u64() as u128) << 64 | low.to_u64() as u128;
        let (n, d) = (n as i128, d as i128);
        (i64::try_from(n.checked_div(d)?).ok()?, n.checked_rem(d)? as i64)
    };
    let quotient = T::from_u64(q as u64);
    (quotient.sext() as i64 == q).then_some((quotient, T::from_u64(r as u64)))
}

/// Writes quotient and remainder, or raises #DE.
#[inline(always)]
fn finish_division<T: Int>(cpu: &mut Cpu, result: Option<(T, T)>) -> Result<(), CpuStop> {
    let Some((quotient, remainder)) = result else {
        return cpu.raise(DIVIDE_ERROR, None);
    };
    cpu.set_reg(reg::RAX, quotient);
    cpu.set_reg(upper::<T>(), remainder);
    Ok(())
}

fn div<S: SourceOperand, T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let d = S::load::<T>(cpu, ram, i)?;
    let result = divide(cpu.reg(upper::<T>()), cpu.reg(reg::RAX), d);
    finish_division(cpu, result)
}

fn idiv<S: SourceOperand, T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let d = S::load::<T>(cpu, ram, i)?;
    let result = divide_signed(cpu.reg(upper::<T>()), cpu.reg(reg::RAX), d);
    finish_division(cpu, result)
}

fn select_imul(ins: &Instruction) -> Handler {
    let table = match (ins.op_count(), is_memory(ins, ins.op_count().min(2) - 1)) {
        (1, false) => widths!(imul, Dst),
        (1, true) => widths!(imul, Mem),
        (2, false) => widths!(imul_to, Dst, Src),
        (2, true) => widths!(imul_to, Dst, Mem),
        (_, false) => widths!(imul_to, Src, Imm),
        (_, true) => widths!(imul_to, Mem, Imm),
    };
    table[log_size(ins, 0)]
}

/// Handlers of this family.
pub fn select(ins: &Instruction, insn: &mut Insn) -> Option<PlaceInBlock> {
    macro_rules! one_operand {
        ($f:ident) => {
            (if is_memory(ins, 0) { widths!($f, Mem) } else { widths!($f, Dst) })[log_size(ins, 0)]
        };
    }
    insn.exec = match ins.mnemonic() {
        Mnemonic::Mul => one_operand!(mul),
        Mnemonic::Imul => select_imul(ins),
        Mnemonic::Div => one_operand!(div),
        Mnemonic::Idiv => one_operand!(idiv),
        _ => return None,
    };
    Some(PlaceInBlock::Middle)
}
