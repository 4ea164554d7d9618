//! XCHG, XADD, CMPXCHG, CMPXCHG8B, CMPXCHG16B.

use iced_x86::{Instruction, Mnemonic};

use super::alu;
use super::operand::{DestinationOperand, Dst, Mem, is_memory, log_size, widths};
use crate::exit::CpuStop;
use crate::flags::Flags;
use crate::insn::{Insn, PlaceInBlock, threaded};
use crate::int::Int;
use crate::state::{Cpu, reg};

fn xchg<D: DestinationOperand, T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let mut old = T::from_u64(0);
    D::modify::<T>(cpu, ram, i, |cpu, v| {
        old = v;
        (cpu.reg(i.src), cpu.flags)
    })?;
    cpu.set_reg(i.src, old);
    Ok(())
}

fn xadd_reg<T: Int>(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let (a, b) = (cpu.reg::<T>(i.dst), cpu.reg::<T>(i.src));
    let sum = alu::add(&mut cpu.flags, a, b);
    // The sum is written last, so that it remains if both operands are the same register.
    cpu.set_reg(i.src, a);
    cpu.set_reg(i.dst, sum);
    Ok(())
}

fn xadd_mem<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let mut old = T::from_u64(0);
    cpu.modify_operand::<T>(ram, i, |cpu, v| {
        old = v;
        let mut flags = cpu.flags;
        let sum = alu::add(&mut flags, v, cpu.reg(i.src));
        (sum, flags)
    })?;
    cpu.set_reg(i.src, old);
    Ok(())
}

/// Memory is always written; the accumulator only if the comparison fails.
fn cmpxchg_mem<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let accumulator = cpu.reg::<T>(reg::RAX);
    let mut old = accumulator;
    cpu.modify_operand::<T>(ram, i, |cpu, v| {
        old = v;
        let mut flags = cpu.flags;
        alu::sub(&mut flags, accumulator, v);
        (if v == accumulator { cpu.reg(i.src) } else { v }, flags)
    })?;
    if old != accumulator {
        cpu.set_reg(reg::RAX, old);
    }
    Ok(())
}

fn cmpxchg_reg<T: Int>(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let (accumulator, old) = (cpu.reg::<T>(reg::RAX), cpu.reg::<T>(i.dst));
    alu::sub(&mut cpu.flags, accumulator, old);
    if old == accumulator {
        let v = cpu.reg::<T>(i.src);
        cpu.set_reg(i.dst, v);
    } else {
        cpu.set_reg(reg::RAX, old);
    }
    Ok(())
}

/// The value of a register pair such as EDX:EAX or RDX:RAX.
fn pair<T: Int>(cpu: &Cpu, high: u8, low: u8) -> u128 {
    (cpu.reg::<T>(high).to_u64() as u128) << T::BITS | cpu.reg::<T>(low).to_u64() as u128
}

/// The new value of the memory operand, and the flags: ZF is set if the pairs are equal; no other flag
/// changes.
fn compare_pair<T: Int>(cpu: &mut Cpu, old: u128) -> (u128, Flags) {
    let equal = old == pair::<T>(cpu, reg::RDX, reg::RAX);
    let mut flags = cpu.flags;
    flags.set_zf(equal);
    (if equal { pair::<T>(cpu, reg::RCX, reg::RBX) } else { old }, flags)
}

/// If the pairs were not equal, loads the old value into the accumulator pair.
fn load_unless_equal<T: Int>(cpu: &mut Cpu, old: u128) {
    if !cpu.flags.zf() {
        cpu.set_reg(reg::RAX, T::from_u64(old as u64));
        cpu.set_reg(reg::RDX, T::from_u64((old >> T::BITS) as u64));
    }
}

fn cmpxchg8b(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let mut old = 0;
    cpu.modify_operand::<u64>(ram, i, |cpu, v| {
        old = v as u128;
        let (new, flags) = compare_pair::<u32>(cpu, old);
        (new as u64, flags)
    })?;
    load_unless_equal::<u32>(cpu, old);
    Ok(())
}

fn cmpxchg16b(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let addr = cpu.ea(i);
    if !addr.is_multiple_of(16) {
        return cpu.general_protection(0);
    }
    let probed = cpu.probe_write(ram, addr, 16);
    probed.map_err(|stop| cpu.operand_fault(i, stop))?;
    let old = cpu.load_u128(ram, addr)?;
    let (new, flags) = compare_pair::<u64>(cpu, old);
    cpu.store_u128(ram, addr, new)?;
    cpu.flags = flags;
    load_unless_equal::<u64>(cpu, old);
    Ok(())
}

/// Handlers of this family.
pub fn select(ins: &Instruction, insn: &mut Insn) -> Option<PlaceInBlock> {
    macro_rules! form {
        ($reg:ident, $mem:ident) => {
            (if is_memory(ins, 0) { widths!($mem) } else { widths!($reg) })[log_size(ins, 0)]
        };
    }
    insn.exec = match ins.mnemonic() {
        Mnemonic::Xchg if is_memory(ins, 1) => return None,
        Mnemonic::Xchg => {
            (if is_memory(ins, 0) { widths!(xchg, Mem) } else { widths!(xchg, Dst) })[log_size(ins, 0)]
        }
        Mnemonic::Xadd => form!(xadd_reg, xadd_mem),
        Mnemonic::Cmpxchg => form!(cmpxchg_reg, cmpxchg_mem),
        Mnemonic::Cmpxchg8b => threaded!(cmpxchg8b),
        Mnemonic::Cmpxchg16b => threaded!(cmpxchg16b),
        _ => return None,
    };
    Some(PlaceInBlock::Middle)
}
