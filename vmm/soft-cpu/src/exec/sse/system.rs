//! MXCSR, prefetches, and CRC32.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::guard;
use crate::exit::CpuStop;
use crate::insn::{Handler, Insn, threaded};
use crate::int::Int;
use crate::state::Cpu;

/// The bits of MXCSR that exist (and MXCSR_MASK of FXSAVE).
pub(crate) const MXCSR_MASK: u32 = 0xffff;

fn ldmxcsr(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let value = cpu.load_operand::<u32>(ram, i)?;
    if value & !MXCSR_MASK != 0 {
        return cpu.general_protection(0);
    }
    cpu.mxcsr = value;
    Ok(())
}

fn stmxcsr(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let value = cpu.mxcsr;
    cpu.store_operand(ram, i, value)
}

/// Prefetches: there is no cache.
fn nothing(_: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    Ok(())
}

/// The polynomial of CRC-32C, reflected.
const CRC_POLYNOMIAL: u32 = 0x82f6_3b78;

const CRC_TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut n = 0;
    while n < 256 {
        let mut crc = n as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = crc >> 1 ^ if crc & 1 != 0 { CRC_POLYNOMIAL } else { 0 };
            bit += 1;
        }
        table[n] = crc;
        n += 1;
    }
    table
};

/// CRC32: `T` is the source's width. The destination's high half is cleared.
fn crc32<T: Int, const MEMORY: bool>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let value = if MEMORY { cpu.load_operand::<T>(ram, i)? } else { cpu.reg::<T>(i.src) };
    let bytes = value.to_u64().to_le_bytes();
    let crc = bytes[..T::SIZE]
        .iter()
        .fold(cpu.reg::<u32>(i.dst), |crc, byte| crc >> 8 ^ CRC_TABLE[(crc as u8 ^ byte) as usize]);
    cpu.set_reg(i.dst, crc);
    Ok(())
}

/// Handlers of this family.
pub(super) fn select(ins: &Instruction, insn: &mut Insn) -> Option<()> {
    let memory = ins.op1_kind() == OpKind::Memory;
    macro_rules! crc32 {
        ($t:ty) => {
            if memory { threaded!(crc32::<$t, true>) } else { threaded!(crc32::<$t, false>) }
        };
    }
    let handler: Handler = match ins.code() {
        Code::Crc32_r32_rm8 | Code::Crc32_r64_rm8 => crc32!(u8),
        Code::Crc32_r32_rm16 => crc32!(u16),
        Code::Crc32_r32_rm32 => crc32!(u32),
        Code::Crc32_r64_rm64 => crc32!(u64),
        _ => match ins.mnemonic() {
            Mnemonic::Ldmxcsr => threaded!(ldmxcsr),
            Mnemonic::Stmxcsr => threaded!(stmxcsr),
            Mnemonic::Prefetchnta
            | Mnemonic::Prefetcht0
            | Mnemonic::Prefetcht1
            | Mnemonic::Prefetcht2
            | Mnemonic::Prefetchw => threaded!(nothing),
            _ => return None,
        },
    };
    insn.exec = handler;
    Some(())
}
