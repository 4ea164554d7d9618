//! Operations that rearrange lanes as an immediate or a mask selects.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::integer::{VectorOp, form};
use super::lanes::Lane;
use super::{guard, load_source, note_source, xmm};
use crate::exec::mmx;
use crate::exit::CpuStop;
use crate::insn::{Handler, Insn, threaded};
use crate::state::Cpu;

macro_rules! ops {
    ($($name:ident = |$a:ident, $b:ident, $imm:ident| $body:expr;)*) => {
        $(struct $name;
        impl VectorOp for $name {
            #[inline(always)]
            fn run($a: u128, $b: u128, $imm: u8) -> u128 {
                $body
            }
        })*
        fn handler(ins: &Instruction, insn: &mut Insn) -> Option<Handler> {
            match ins.mnemonic() {
                $(Mnemonic::$name => form::<$name>(ins, insn),)*
                _ => None,
            }
        }
    };
}

/// Two 32-bit lanes of `a` and two of `b`, each selected by two bits of `imm`.
#[inline(always)]
fn choose_four(a: u128, b: u128, imm: u8) -> u128 {
    let (a, b) = (u32::split(a), u32::split(b));
    let lane = |i: u8| (imm >> (2 * i) & 3) as usize;
    u32::join([a[lane(0)], a[lane(1)], b[lane(2)], b[lane(3)]])
}

/// Four 16-bit lanes, each selected by two bits of `imm`.
#[inline(always)]
fn choose_words(x: u64, imm: u8) -> u64 {
    (0..4).fold(0, |r, i| r | (x >> (16 * (imm >> (2 * i) & 3)) & 0xffff) << (16 * i))
}

/// All ones in each lane, `bits` wide, whose bit of `imm` is set.
#[inline(always)]
fn lane_mask(imm: u8, bits: u32) -> u128 {
    let ones = (1u128 << bits) - 1;
    (0..128 / bits).filter(|i| imm >> i & 1 != 0).fold(0, |r, i| r | ones << (i * bits))
}

#[inline(always)]
fn blend(a: u128, b: u128, mask: u128) -> u128 {
    a & !mask | b & mask
}

#[inline(always)]
fn half(low: u64, high: u64) -> u128 {
    u128::from(low) | u128::from(high) << 64
}

ops! {
    Pshufd = |_a, b, imm| choose_four(b, b, imm);
    Shufps = |a, b, imm| choose_four(a, b, imm);
    Shufpd = |a, b, imm| half((a >> (64 * (imm & 1))) as u64, (b >> (64 * (imm >> 1 & 1))) as u64);
    Pshuflw = |_a, b, imm| half(choose_words(b as u64, imm), (b >> 64) as u64);
    Pshufhw = |_a, b, imm| half(b as u64, choose_words((b >> 64) as u64, imm));
    Pshufw = |_a, b, imm| choose_words(b as u64, imm).into();
    Pblendw = |a, b, imm| blend(a, b, lane_mask(imm, 16));
    Blendps = |a, b, imm| blend(a, b, lane_mask(imm & 15, 32));
    Blendpd = |a, b, imm| blend(a, b, lane_mask(imm & 3, 64));
    Movshdup = |_a, b, _imm| choose_four(b, b, 0xf5);
    Movsldup = |_a, b, _imm| choose_four(b, b, 0xa0);
    Movddup = |_a, b, _imm| half(b as u64, b as u64);
    Mpsadbw = |a, b, imm| {
        let (a, b) = (u8::split(a >> (32 * (imm >> 2 & 1))), u8::split(b >> (32 * (imm & 3))));
        u16::join(std::array::from_fn(|i| (0..4).map(|k| u16::from(a[i + k].abs_diff(b[k]))).sum()))
    };
    Insertps = |a, b, imm| {
        let lane = b >> (32 * (imm >> 6)) & 0xffff_ffff;
        let place = 32 * (imm >> 4 & 3);
        let inserted = a & !(0xffff_ffff << place) | lane << place;
        inserted & !lane_mask(imm & 15, 32)
    };
}

struct Pshufb;
impl VectorOp for Pshufb {
    #[inline(always)]
    fn run(a: u128, b: u128, _: u8) -> u128 {
        let a = u8::split(a);
        u8::join(u8::split(b).map(|i| if i & 0x80 != 0 { 0 } else { a[i as usize & 15] }))
    }
    #[inline(always)]
    fn run_mmx(a: u64, b: u64, imm: u8) -> u64 {
        Self::run(a.into(), (b & 0x8787_8787_8787_8787).into(), imm) as u64
    }
}

struct Palignr;
impl VectorOp for Palignr {
    #[inline(always)]
    fn run(a: u128, b: u128, imm: u8) -> u128 {
        let by = 8 * u32::from(imm);
        match by {
            0 => b,
            1..128 => b >> by | a << (128 - by),
            _ => a.checked_shr(by - 128).unwrap_or(0),
        }
    }
    #[inline(always)]
    fn run_mmx(a: u64, b: u64, imm: u8) -> u64 {
        half(b, a).checked_shr(8 * u32::from(imm)).unwrap_or(0) as u64
    }
}

/// Blends by the highest bit of each lane of XMM0.
fn blend_variable<T: Lane + Sign>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let b = load_source(cpu, ram, i)?;
    let mask = super::lanes::map(cpu.xmm[0], T::spread);
    let a = xmm(cpu, i.dst);
    *a = blend(*a, b, mask);
    Ok(())
}

/// Lanes whose sign bit selects.
trait Sign {
    /// The sign bit in every bit.
    fn spread(self) -> Self;
}

macro_rules! sign {
    ($($t:ty)*) => {
        $(impl Sign for $t {
            fn spread(self) -> $t {
                self >> (<$t>::BITS - 1)
            }
        })*
    };
}
sign!(i8 i32 i64);

/// PTEST: ZF is set if the operands have no bit in common, CF if the source has only bits of the destination.
fn ptest(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    use crate::flags::bits::{CF, ZF};
    guard(cpu)?;
    let b = load_source(cpu, ram, i)?;
    let a = *xmm(cpu, i.dst);
    cpu.flags.set_status(mask(a & b == 0, ZF) | mask(!a & b == 0, CF));
    Ok(())
}

fn mask(condition: bool, bits: u64) -> u64 {
    if condition { bits } else { 0 }
}

/// PMOVMSKB: the highest bit of each byte.
fn pmovmskb(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let x = *xmm(cpu, i.src);
    cpu.set_reg::<u64>(i.dst, byte_signs(x as u64) | byte_signs((x >> 64) as u64) << 8);
    Ok(())
}

fn pmovmskb_mm(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    mmx::guard(cpu)?;
    let signs = byte_signs(mmx::get(cpu, i.src));
    cpu.set_reg::<u64>(i.dst, signs);
    Ok(())
}

/// The highest bits of eight bytes, gathered by a multiplication.
#[inline(always)]
fn byte_signs(x: u64) -> u64 {
    ((x >> 7 & 0x0101_0101_0101_0101).wrapping_mul(0x0102_0408_1020_4080)) >> 56
}

fn movmskps(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let x = u32::split(*xmm(cpu, i.src));
    cpu.set_reg::<u64>(i.dst, (0..4).fold(0, |r, k| r | u64::from(x[k] >> 31) << k));
    Ok(())
}

fn movmskpd(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let x = u64::split(*xmm(cpu, i.src));
    cpu.set_reg::<u64>(i.dst, x[0] >> 63 | x[1] >> 63 << 1);
    Ok(())
}

/// Handlers of this family.
pub(super) fn select(ins: &Instruction, insn: &mut Insn) -> Option<()> {
    insn.exec = match ins.mnemonic() {
        Mnemonic::Pshufb => form::<Pshufb>(ins, insn)?,
        Mnemonic::Palignr => form::<Palignr>(ins, insn)?,
        Mnemonic::Pblendvb => threaded!(blend_variable::<i8>),
        Mnemonic::Blendvps => threaded!(blend_variable::<i32>),
        Mnemonic::Blendvpd => threaded!(blend_variable::<i64>),
        Mnemonic::Ptest => threaded!(ptest),
        Mnemonic::Pmovmskb if ins.op1_register().is_mm() => threaded!(pmovmskb_mm),
        Mnemonic::Pmovmskb => threaded!(pmovmskb),
        Mnemonic::Movmskps => threaded!(movmskps),
        Mnemonic::Movmskpd => threaded!(movmskpd),
        _ => handler(ins, insn)?,
    };
    note_source(ins, insn);
    if ins.mnemonic() == Mnemonic::Insertps && ins.op1_kind() == OpKind::Memory {
        // In memory there is only one lane.
        insn.imm &= 0x3f;
    }
    Some(())
}
