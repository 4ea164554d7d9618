//! LAHF, SAHF, CLC, STC, CMC, CLD, STD, and instructions that do nothing: NOP, PAUSE, fences.

use iced_x86::{Instruction, Mnemonic};

use crate::exit::CpuStop;
use crate::flags::bits;
use crate::insn::{Insn, PlaceInBlock, threaded};
use crate::int::HIGH_BYTE;
use crate::state::{Cpu, reg};

const AH: u8 = reg::RAX | HIGH_BYTE;

fn lahf(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    let v = (cpu.flags.status() & !bits::OF | bits::FIXED) as u8;
    cpu.set_reg(AH, v);
    Ok(())
}

fn sahf(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    let of = if cpu.flags.of() { bits::OF } else { 0 };
    let v = cpu.reg::<u8>(AH) as u64;
    cpu.flags.set_status(v | of);
    Ok(())
}

fn clc(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    cpu.flags.set_cf(false);
    Ok(())
}

fn stc(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    cpu.flags.set_cf(true);
    Ok(())
}

fn cmc(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    let cf = cpu.flags.cf();
    cpu.flags.set_cf(!cf);
    Ok(())
}

fn cld(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    cpu.flags.update_non_status(bits::DF, 0);
    Ok(())
}

fn std(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    cpu.flags.update_non_status(0, bits::DF);
    Ok(())
}

fn nop(_: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    Ok(())
}

/// Handlers of this family.
pub fn select(ins: &Instruction, insn: &mut Insn) -> Option<PlaceInBlock> {
    insn.exec = match ins.mnemonic() {
        Mnemonic::Lahf => threaded!(lahf),
        Mnemonic::Sahf => threaded!(sahf),
        Mnemonic::Clc => threaded!(clc),
        Mnemonic::Stc => threaded!(stc),
        Mnemonic::Cmc => threaded!(cmc),
        Mnemonic::Cld => threaded!(cld),
        Mnemonic::Std => threaded!(std),
        // With one thread and a memory that is always up to date there is nothing to order.
        Mnemonic::Nop
        | Mnemonic::Reservednop
        | Mnemonic::Pause
        | Mnemonic::Lfence
        | Mnemonic::Mfence
        | Mnemonic::Sfence => threaded!(nop),
        _ => return None,
    };
    Some(PlaceInBlock::Middle)
}
