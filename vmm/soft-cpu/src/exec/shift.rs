//! SHL, SHR, SAR, ROL, ROR, RCL, RCR, SHLD, SHRD.
//!
//! What the SDM leaves undefined behaves as on current Intel processors: OF is set as for a shift by one bit
//! whatever the count is, AF is cleared, and a 16-bit double shift by more than 16 bits shifts the 48 bits
//! destination, source, destination.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::operand::{DestinationOperand, Dst, Imm, Mem, SourceOperand, is_memory, log_size, widths};
use crate::exit::CpuStop;
use crate::flags::Flags;
use crate::insn::{Handler, Insn, PlaceInBlock};
use crate::int::Int;
use crate::state::{Cpu, reg};

/// A shift of `a` by `count`, which is at least 1 and below 32 (below 64 for 64-bit operands).
trait Shift {
    fn run<T: Int>(flags: &mut Flags, a: T, count: u32) -> T;
}

/// A shift of `a` that takes its new bits from `b`.
trait DoubleShift {
    fn run<T: Int>(flags: &mut Flags, a: T, b: T, count: u32) -> T;
}

/// CL as the count.
struct Cl;
impl SourceOperand for Cl {
    #[inline(always)]
    fn load<T: Int>(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<T, CpuStop> {
        Ok(cpu.reg(reg::RCX))
    }
}

/// Bit `n` of `v`.
#[inline(always)]
fn bit<T: Int>(v: T, n: u32) -> bool {
    v.to_u64() >> n & 1 != 0
}

#[inline(always)]
fn msb<T: Int>(v: T) -> bool {
    bit(v, T::BITS - 1)
}

/// Do the top two bits differ, so that a shift to the left changes the sign?
#[inline(always)]
fn top_two_differ<T: Int>(v: T) -> bool {
    msb(v) != bit(v, T::BITS - 2)
}

/// Sets the flags after a shift; returns its result.
#[inline(always)]
fn shifted<T: Int>(flags: &mut Flags, r: T, cf: bool, of: bool) -> T {
    flags.set_result(r);
    flags.set_carries(cf, of, false);
    r
}

struct Shl;
impl Shift for Shl {
    #[inline(always)]
    fn run<T: Int>(flags: &mut Flags, a: T, count: u32) -> T {
        let before_last = a.to_u64() << (count - 1);
        let cf = before_last >> (T::BITS - 1) & 1 != 0;
        shifted(flags, T::from_u64(before_last << 1), cf, top_two_differ(a))
    }
}

struct Shr;
impl Shift for Shr {
    #[inline(always)]
    fn run<T: Int>(flags: &mut Flags, a: T, count: u32) -> T {
        let before_last = a.to_u64() >> (count - 1);
        shifted(flags, T::from_u64(before_last >> 1), before_last & 1 != 0, msb(a))
    }
}

struct Sar;
impl Shift for Sar {
    #[inline(always)]
    fn run<T: Int>(flags: &mut Flags, a: T, count: u32) -> T {
        let before_last = a.sext() as i64 >> (count - 1);
        shifted(flags, T::from_u64((before_last >> 1) as u64), before_last & 1 != 0, false)
    }
}

/// Rotates left by `count` modulo the width.
#[inline(always)]
fn rotated<T: Int>(a: T, count: u32) -> T {
    let v = a.to_u64();
    let count = count % T::BITS;
    // If the count is 0, the shift right is by the full width, which Rust allows only as two shifts.
    T::from_u64(v << count | v >> 1 >> (T::BITS - 1 - count))
}

struct Rol;
impl Shift for Rol {
    #[inline(always)]
    fn run<T: Int>(flags: &mut Flags, a: T, count: u32) -> T {
        let r = rotated(a, count);
        flags.set_cf_of(bit(r, 0), top_two_differ(a));
        r
    }
}

struct Ror;
impl Shift for Ror {
    #[inline(always)]
    fn run<T: Int>(flags: &mut Flags, a: T, count: u32) -> T {
        let r = rotated(a, T::BITS - count % T::BITS);
        flags.set_cf_of(msb(r), msb(a) != bit(a, 0));
        r
    }
}

/// Rotates CF:`a` left by `count`, which is at most the width. Returns the result and the new CF.
#[inline(always)]
fn rotated_through_carry<T: Int>(cf: bool, a: T, count: u32) -> (T, bool) {
    let v = (cf as u128) << T::BITS | a.to_u64() as u128;
    let r = v << count | v >> (T::BITS + 1 - count);
    (T::from_u64(r as u64), r >> T::BITS & 1 != 0)
}

struct Rcl;
impl Shift for Rcl {
    #[inline(always)]
    fn run<T: Int>(flags: &mut Flags, a: T, count: u32) -> T {
        let count = count % (T::BITS + 1);
        if count == 0 {
            return a;
        }
        let (r, cf) = rotated_through_carry(flags.cf(), a, count);
        flags.set_cf_of(cf, top_two_differ(a));
        r
    }
}

struct Rcr;
impl Shift for Rcr {
    #[inline(always)]
    fn run<T: Int>(flags: &mut Flags, a: T, count: u32) -> T {
        let count = count % (T::BITS + 1);
        if count == 0 {
            return a;
        }
        let of = flags.cf() != msb(a);
        let (r, cf) = rotated_through_carry(flags.cf(), a, T::BITS + 1 - count);
        flags.set_cf_of(cf, of);
        r
    }
}

struct Shld;
impl DoubleShift for Shld {
    #[inline(always)]
    fn run<T: Int>(flags: &mut Flags, a: T, b: T, count: u32) -> T {
        let (r, cf) = if T::BITS == 16 {
            let v = ((a.to_u64() << 32 | b.to_u64() << 16 | a.to_u64()) as u128) << count;
            (T::from_u64((v >> 32) as u64), v >> 48 & 1 != 0)
        } else {
            let r = a.to_u64() << count | b.to_u64() >> (T::BITS - count);
            (T::from_u64(r), bit(a, T::BITS - count))
        };
        shifted(flags, r, cf, top_two_differ(a))
    }
}

struct Shrd;
impl DoubleShift for Shrd {
    #[inline(always)]
    fn run<T: Int>(flags: &mut Flags, a: T, b: T, count: u32) -> T {
        let (r, cf) = if T::BITS == 16 {
            let v = a.to_u64() << 32 | b.to_u64() << 16 | a.to_u64();
            (T::from_u64(v >> count), v >> (count - 1) & 1 != 0)
        } else {
            let r = a.to_u64() >> count | b.to_u64() << (T::BITS - count);
            (T::from_u64(r), bit(a, count - 1))
        };
        shifted(flags, r, cf, msb(a) != bit(b, 0))
    }
}

#[inline(always)]
fn masked<T: Int>(count: u8) -> u32 {
    count as u32 & if T::BITS == 64 { 63 } else { 31 }
}

/// A count of 0 changes no flag, but memory is still written, and a 32-bit register zero-extended.
fn shift<O: Shift, D: DestinationOperand, C: SourceOperand, T: Int>(
    cpu: &mut Cpu,
    ram: &mut [u8],
    i: &Insn,
) -> Result<(), CpuStop> {
    let count = masked::<T>(C::load::<u8>(cpu, ram, i)?);
    D::modify::<T>(cpu, ram, i, |cpu, a| {
        let mut flags = cpu.flags;
        let r = if count == 0 { a } else { O::run(&mut flags, a, count) };
        (r, flags)
    })
}

fn double_shift<O: DoubleShift, D: DestinationOperand, C: SourceOperand, T: Int>(
    cpu: &mut Cpu,
    ram: &mut [u8],
    i: &Insn,
) -> Result<(), CpuStop> {
    let count = masked::<T>(C::load::<u8>(cpu, ram, i)?);
    let b = cpu.reg::<T>(i.src);
    D::modify::<T>(cpu, ram, i, |cpu, a| {
        let mut flags = cpu.flags;
        let r = if count == 0 { a } else { O::run(&mut flags, a, b, count) };
        (r, flags)
    })
}

fn form<O: Shift>(ins: &Instruction) -> Handler {
    let by_cl = ins.op1_kind() == OpKind::Register;
    let table = match (is_memory(ins, 0), by_cl) {
        (false, false) => widths!(shift, O, Dst, Imm),
        (false, true) => widths!(shift, O, Dst, Cl),
        (true, false) => widths!(shift, O, Mem, Imm),
        (true, true) => widths!(shift, O, Mem, Cl),
    };
    table[log_size(ins, 0)]
}

fn double_form<O: DoubleShift>(ins: &Instruction) -> Handler {
    let by_cl = ins.op2_kind() == OpKind::Register;
    let table = match (is_memory(ins, 0), by_cl) {
        (false, false) => widths!(double_shift, O, Dst, Imm),
        (false, true) => widths!(double_shift, O, Dst, Cl),
        (true, false) => widths!(double_shift, O, Mem, Imm),
        (true, true) => widths!(double_shift, O, Mem, Cl),
    };
    table[log_size(ins, 0)]
}

/// Handlers of this family.
pub fn select(ins: &Instruction, insn: &mut Insn) -> Option<PlaceInBlock> {
    insn.exec = match ins.mnemonic() {
        Mnemonic::Shl | Mnemonic::Sal => form::<Shl>(ins),
        Mnemonic::Shr => form::<Shr>(ins),
        Mnemonic::Sar => form::<Sar>(ins),
        Mnemonic::Rol => form::<Rol>(ins),
        Mnemonic::Ror => form::<Ror>(ins),
        Mnemonic::Rcl => form::<Rcl>(ins),
        Mnemonic::Rcr => form::<Rcr>(ins),
        Mnemonic::Shld => double_form::<Shld>(ins),
        Mnemonic::Shrd => double_form::<Shrd>(ins),
        _ => return None,
    };
    Some(PlaceInBlock::Middle)
}
