//! PCMPESTRI, PCMPESTRM, PCMPISTRI, PCMPISTRM (SDM 1, 10.3.4 and 2B, "SSE4.2 string comparisons").

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::{SOURCE_MEMORY, guard, load_unaligned, xmm};
use crate::exit::CpuStop;
use crate::flags::bits::{CF, OF, SF, ZF};
use crate::insn::{Insn, threaded};
use crate::state::{Cpu, reg};

/// `EXPLICIT`: the lengths are in RAX and RDX (with `WIDE`, all 64 bits of them). `MASK`: the result is a
/// mask.
fn compare<const EXPLICIT: bool, const WIDE: bool, const MASK: bool>(
    cpu: &mut Cpu,
    ram: &mut [u8],
    i: &Insn,
) -> Result<(), CpuStop> {
    guard(cpu)?;
    let a = *xmm(cpu, i.dst);
    let b = if i.src == SOURCE_MEMORY { load_unaligned(cpu, ram, i)? } else { *xmm(cpu, i.src) };
    let imm = i.imm as u8;
    let elements = if imm & 1 != 0 { 8 } else { 16 };
    let length = |cpu: &Cpu, r: u8| {
        let n = if WIDE { cpu.reg::<u64>(r) as i64 } else { (cpu.reg::<u32>(r) as i32).into() };
        n.unsigned_abs().min(elements as u64) as usize
    };
    let (x, y) = (split(a, imm), split(b, imm));
    let (len_a, len_b) = if EXPLICIT {
        (length(cpu, reg::RAX), length(cpu, reg::RDX))
    } else {
        (terminated(&x[..elements]), terminated(&y[..elements]))
    };
    let result = aggregate(&x[..elements], len_a, &y[..elements], len_b, imm);
    store(cpu, result, elements, imm, MASK);
    let flag = |set, bit| if set { bit } else { 0 };
    cpu.flags.set_status(
        flag(result != 0, CF)
            | flag(len_b < elements, ZF)
            | flag(len_a < elements, SF)
            | flag(result & 1 != 0, OF),
    );
    Ok(())
}

/// The elements, in the format that the immediate selects; words fill the first half.
fn split(x: u128, imm: u8) -> [i32; 16] {
    std::array::from_fn(|k| match imm & 3 {
        0 => i32::from((x >> (8 * k)) as u8),
        2 => i32::from((x >> (8 * k)) as i8),
        1 => i32::from(x.checked_shr(16 * k as u32).unwrap_or(0) as u16),
        _ => i32::from(x.checked_shr(16 * k as u32).unwrap_or(0) as i16),
    })
}

/// Elements before the first zero.
fn terminated(elements: &[i32]) -> usize {
    elements.iter().position(|e| *e == 0).unwrap_or(elements.len())
}

/// The result of the comparison, with the polarity applied: a bit for each element of the second string.
fn aggregate(a: &[i32], len_a: usize, b: &[i32], len_b: usize, imm: u8) -> u32 {
    let bits = |f: &dyn Fn(usize) -> bool| (0..b.len()).filter(|j| f(*j)).fold(0u32, |r, j| r | 1 << j);
    let a = &a[..len_a];
    let result = match imm >> 2 & 3 {
        // Equal any: the element is in the set.
        0 => bits(&|j| j < len_b && a.contains(&b[j])),
        // Ranges: the element is in one of the ranges.
        1 => bits(&|j| j < len_b && a.chunks_exact(2).any(|r| r[0] <= b[j] && b[j] <= r[1])),
        // Equal each: elements after the end of both strings are equal.
        2 => bits(&|j| if j < len_a && j < len_b { a[j] == b[j] } else { j >= len_a && j >= len_b }),
        // Equal ordered: the first string begins here, up to the end of the register.
        _ => bits(&|j| a.iter().zip(j..b.len()).all(|(e, k)| k < len_b && *e == b[k])),
    };
    let all = (1u32 << b.len()) - 1;
    match imm >> 4 & 3 {
        1 => !result & all,
        3 => result ^ ((1u32 << len_b) - 1),
        _ => result,
    }
}

/// Stores the index of the first or last set bit in ECX or, with `as_mask`, the bits in XMM0 (as bits or as
/// elements).
fn store(cpu: &mut Cpu, result: u32, elements: usize, imm: u8, as_mask: bool) {
    let last = imm & 0x40 != 0;
    if !as_mask {
        let index = match (result, last) {
            (0, _) => elements as u32,
            (_, false) => result.trailing_zeros(),
            (_, true) => 31 - result.leading_zeros(),
        };
        cpu.set_reg(reg::RCX, index);
        return;
    }
    let width = 128 / elements;
    let ones = u128::MAX >> (128 - width);
    cpu.xmm[0] = match last {
        false => result.into(),
        true => (0..elements).filter(|j| result >> j & 1 != 0).fold(0, |r, j| r | ones << (j * width)),
    };
}

/// Handlers of this family.
pub(super) fn select(ins: &Instruction, insn: &mut Insn) -> Option<()> {
    let wide = matches!(ins.code(), Code::Pcmpestri64_xmm_xmmm128_imm8 | Code::Pcmpestrm64_xmm_xmmm128_imm8);
    insn.exec = match ins.mnemonic() {
        Mnemonic::Pcmpestri | Mnemonic::Pcmpestri64 if wide => threaded!(compare::<true, true, false>),
        Mnemonic::Pcmpestri => threaded!(compare::<true, false, false>),
        Mnemonic::Pcmpestrm | Mnemonic::Pcmpestrm64 if wide => threaded!(compare::<true, true, true>),
        Mnemonic::Pcmpestrm => threaded!(compare::<true, false, true>),
        Mnemonic::Pcmpistri => threaded!(compare::<false, false, false>),
        Mnemonic::Pcmpistrm => threaded!(compare::<false, false, true>),
        _ => return None,
    };
    if ins.op1_kind() == OpKind::Memory {
        insn.src = SOURCE_MEMORY;
    }
    Some(())
}
