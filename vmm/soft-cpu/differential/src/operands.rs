//! Draws the operands of instructions.

use iced_x86::{Instruction, MemorySize, Mnemonic, OpCodeOperandKind as Kind, OpKind, Register};

use crate::draft::{Draft, location};
use crate::layout::{self, FS_BASE, GS_BASE};
use crate::values::{self, LaneType};

/// Draws operand `n` of `ins`, of this kind. `None` if that is not possible (perhaps only this time).
pub(crate) fn draw(d: &mut Draft, ins: &mut Instruction, n: u32, kind: Kind) -> Option<()> {
    let memory_or = |d: &mut Draft| d.rng.chance(55);
    match kind {
        Kind::mem => memory(d, ins, n),
        Kind::mem_offs => absolute(d, ins, n),
        Kind::r8_or_mem if memory_or(d) => memory(d, ins, n),
        Kind::r16_or_mem if memory_or(d) => memory(d, ins, n),
        Kind::r32_or_mem if memory_or(d) => memory(d, ins, n),
        Kind::r64_or_mem if memory_or(d) => memory(d, ins, n),
        Kind::mm_or_mem if memory_or(d) => memory(d, ins, n),
        Kind::xmm_or_mem if memory_or(d) => memory(d, ins, n),
        Kind::r8_reg | Kind::r8_opcode | Kind::r8_or_mem => {
            let r = match d.rng.below(10) {
                0..2 => Register::AH + d.rng.below(4) as u32,
                _ => low_byte(general(d)),
            };
            register(ins, n, r)
        }
        Kind::r16_reg | Kind::r16_rm | Kind::r16_opcode | Kind::r16_or_mem => {
            let r = Register::AX + general(d);
            register(ins, n, r)
        }
        Kind::r32_reg | Kind::r32_rm | Kind::r32_opcode | Kind::r32_or_mem => {
            let r = Register::EAX + general(d);
            register(ins, n, r)
        }
        Kind::r64_reg | Kind::r64_rm | Kind::r64_opcode | Kind::r64_or_mem => {
            let r = Register::RAX + general(d);
            register(ins, n, r)
        }
        Kind::mm_reg | Kind::mm_rm | Kind::mm_or_mem => {
            let r = Register::MM0 + vector(d) % 8;
            register(ins, n, r)
        }
        Kind::xmm_reg | Kind::xmm_rm | Kind::xmm_or_mem => {
            let r = Register::XMM0 + vector(d);
            register(ins, n, r)
        }
        Kind::sti_opcode => {
            let r = Register::ST0 + vector(d) % 8;
            register(ins, n, r)
        }
        Kind::seg_reg => {
            let r = Register::ES + d.rng.below(6) as u32;
            register(ins, n, r)
        }
        Kind::cr_reg => {
            let r = d.rng.pick(&[Register::CR0, Register::CR2, Register::CR3, Register::CR4, Register::CR8]);
            register(ins, n, r)
        }
        Kind::dr_reg => {
            let r = Register::DR0 + d.rng.below(8) as u32;
            register(ins, n, r)
        }
        _ => fixed(ins, n, kind).or_else(|| string(d, ins, n, kind)).or_else(|| immediate(d, ins, n, kind)),
    }
}

fn register(ins: &mut Instruction, n: u32, r: Register) -> Option<()> {
    ins.set_op_kind(n, OpKind::Register);
    ins.set_op_register(n, r);
    Some(())
}

/// Number of a general register, usually one that holds no pointer.
fn general(d: &mut Draft) -> u32 {
    if d.rng.chance(88) { d.rng.pick(&d.values) as u32 } else { d.rng.below(16) as u32 }
}

fn low_byte(n: u32) -> Register {
    // AL, CL, DL, BL, AH … BH, SPL … R15L.
    if n < 4 { Register::AL + n } else { Register::SPL + (n - 4) }
}

fn vector(d: &mut Draft) -> u32 {
    if d.rng.chance(75) { d.rng.pick(&d.favourites) } else { d.rng.below(16) as u32 }
}

fn fixed(ins: &mut Instruction, n: u32, kind: Kind) -> Option<()> {
    let r = match kind {
        Kind::es => Register::ES,
        Kind::cs => Register::CS,
        Kind::ss => Register::SS,
        Kind::ds => Register::DS,
        Kind::fs => Register::FS,
        Kind::gs => Register::GS,
        Kind::al => Register::AL,
        Kind::cl => Register::CL,
        Kind::ax => Register::AX,
        Kind::dx => Register::DX,
        Kind::eax => Register::EAX,
        Kind::rax => Register::RAX,
        Kind::st0 => Register::ST0,
        _ => return None,
    };
    register(ins, n, r)
}

/// The implicit operands of string instructions, with 64-bit or 32-bit addresses (the same for all operands
/// of one).
fn string(d: &mut Draft, ins: &mut Instruction, n: u32, kind: Kind) -> Option<()> {
    let narrow = match n {
        0 => d.rng.chance(15),
        _ => matches!(ins.op0_kind(), OpKind::MemoryESEDI | OpKind::MemorySegESI | OpKind::MemorySegEDI),
    };
    let (wide, short) = match kind {
        Kind::seg_rSI => (OpKind::MemorySegRSI, OpKind::MemorySegESI),
        Kind::es_rDI => (OpKind::MemoryESRDI, OpKind::MemoryESEDI),
        Kind::seg_rDI => (OpKind::MemorySegRDI, OpKind::MemorySegEDI),
        Kind::seg_rBX_al => {
            ins.set_op_kind(n, OpKind::Memory);
            ins.set_memory_base(Register::RBX);
            ins.set_memory_index(Register::AL);
            return Some(());
        }
        _ => return None,
    };
    ins.set_op_kind(n, if narrow { short } else { wide });
    if kind != Kind::es_rDI && d.rng.chance(5) {
        ins.set_segment_prefix(d.rng.pick(&[Register::FS, Register::GS]));
    }
    Some(())
}

fn immediate(d: &mut Draft, ins: &mut Instruction, n: u32, kind: Kind) -> Option<()> {
    let byte = values::int(d.rng, 8) as u8;
    let long = values::int(d.rng, 32) as u32;
    match kind {
        Kind::imm8 if (0..n).any(|o| ins.op_kind(o) == OpKind::Immediate16) => {
            ins.set_op_kind(n, OpKind::Immediate8_2nd);
            // ENTER's nesting level.
            ins.set_immediate8_2nd(byte % 8);
        }
        Kind::imm8 => {
            ins.set_op_kind(n, OpKind::Immediate8);
            ins.set_immediate8(byte);
        }
        Kind::imm8_const_1 => {
            ins.set_op_kind(n, OpKind::Immediate8);
            ins.set_immediate8(1);
        }
        Kind::imm8sex16 => {
            ins.set_op_kind(n, OpKind::Immediate8to16);
            ins.set_immediate8to16(byte as i8 as i16);
        }
        Kind::imm8sex32 => {
            ins.set_op_kind(n, OpKind::Immediate8to32);
            ins.set_immediate8to32(byte as i8 as i32);
        }
        Kind::imm8sex64 => {
            ins.set_op_kind(n, OpKind::Immediate8to64);
            ins.set_immediate8to64(byte as i8 as i64);
        }
        Kind::imm16 => {
            ins.set_op_kind(n, OpKind::Immediate16);
            ins.set_immediate16(if d.rng.chance(50) { byte as u16 } else { long as u16 });
        }
        Kind::imm32 => {
            ins.set_op_kind(n, OpKind::Immediate32);
            ins.set_immediate32(long);
        }
        Kind::imm32sex64 => {
            ins.set_op_kind(n, OpKind::Immediate32to64);
            ins.set_immediate32to64(long as i32 as i64);
        }
        Kind::imm64 => {
            ins.set_op_kind(n, OpKind::Immediate64);
            ins.set_immediate64(values::int(d.rng, 64));
        }
        Kind::br64_1 | Kind::br64_4 => ins.set_op_kind(n, OpKind::NearBranch64),
        _ => return None,
    }
    Some(())
}

/// MOV between the accumulator and a 64-bit address.
fn absolute(d: &mut Draft, ins: &mut Instruction, n: u32) -> Option<()> {
    ins.set_op_kind(n, OpKind::Memory);
    let at = location(d.rng, 8, true);
    plant(d, ins, at);
    let mut offset = at;
    if d.rng.chance(10) {
        ins.set_segment_prefix(Register::GS);
        offset = at.wrapping_sub(GS_BASE);
    }
    ins.set_memory_displ_size(8);
    ins.set_memory_displacement64(offset);
    Some(())
}

fn plant(d: &mut Draft, ins: &Instruction, at: u64) {
    let size = ins.memory_size();
    let lane = match size.element_type() {
        MemorySize::Float32 => LaneType::Single,
        MemorySize::Float64 => LaneType::Double,
        MemorySize::Float80 => LaneType::Extended,
        MemorySize::Bcd => LaneType::Bcd,
        e => LaneType::Int((e.size() as u32 * 8).clamp(8, 64)),
    };
    if d.rng.chance(80) {
        let len = size.size().clamp(1, 16) as u8;
        let mut bytes = values::lanes(d.rng, lane);
        if ins.mnemonic() == Mnemonic::Ldmxcsr && d.rng.chance(85) {
            bytes[2] = 0;
            bytes[3] = 0;
        }
        d.plant(at, len, bytes);
    }
    if matches!(ins.mnemonic(), Mnemonic::Fxrstor | Mnemonic::Fxrstor64) && d.rng.chance(85) {
        // Reserved bits of MXCSR, which is at offset 24, would raise #GP.
        let mxcsr = d.rng.below(1 << 16);
        d.plant(at.wrapping_add(24), 8, (mxcsr as u128).to_le_bytes());
    }
}

/// A memory operand of some form, whose address is the one that [`location`] returns, as long as the
/// registers in it still have their start values.
fn memory(d: &mut Draft, ins: &mut Instruction, n: u32) -> Option<()> {
    ins.set_op_kind(n, OpKind::Memory);
    let size = ins.memory_size().size().max(1) as u64;
    let shape = d.rng.below(100);
    let at = location(d.rng, size, shape < 70);
    plant(d, ins, at);
    let segment = match d.rng.below(100) {
        0..3 => Register::FS,
        3..6 => Register::GS,
        6 => d.rng.pick(&[Register::CS, Register::SS, Register::DS, Register::ES]),
        _ => Register::None,
    };
    let base = match segment {
        Register::FS => FS_BASE,
        Register::GS => GS_BASE,
        _ => 0,
    };
    ins.set_segment_prefix(segment);
    let offset = at.wrapping_sub(base);
    match shape {
        0..80 => based(d, ins, offset),
        80..88 => narrow(d, ins, offset),
        88..95 => {
            ins.set_memory_base(Register::RIP);
            ins.set_memory_displ_size(8);
            ins.set_memory_displacement64(offset);
            i32::try_from(offset.wrapping_sub(layout::CODE) as i64).ok().map(|_| ())
        }
        _ => {
            ins.set_memory_displ_size(8);
            ins.set_memory_displacement64(offset);
            i32::try_from(offset as i64).ok().map(|_| ins.set_memory_displ_size(4))
        }
    }
}

/// 64-bit base, index and displacement: tries a few choices until the displacement fits.
fn based(d: &mut Draft, ins: &mut Instruction, offset: u64) -> Option<()> {
    for _ in 0..12 {
        let base = d.rng.below(16) as usize;
        let with_base = d.rng.chance(90);
        let index = d.rng.below(16) as usize;
        let with_index = index != 4 && d.rng.chance(35);
        let scale = 1 << d.rng.below(4);
        let mut sum = if with_base { d.start.gpr[base] } else { 0 };
        if with_index {
            sum = sum.wrapping_add(d.start.gpr[index].wrapping_mul(scale));
        }
        let displacement = offset.wrapping_sub(sum);
        if i32::try_from(displacement as i64).is_err() || !with_base && !with_index {
            continue;
        }
        if with_base {
            ins.set_memory_base(Register::RAX + base as u32);
        }
        if with_index {
            ins.set_memory_index(Register::RAX + index as u32);
            ins.set_memory_index_scale(scale as u32);
        }
        displace(d, ins, displacement);
        return Some(());
    }
    None
}

/// The same with 32-bit registers. The sum is truncated to 32 bits, so that every displacement fits.
fn narrow(d: &mut Draft, ins: &mut Instruction, offset: u64) -> Option<()> {
    let base = d.rng.below(16) as usize;
    let index = d.rng.below(16) as usize;
    let mut sum = d.start.gpr[base];
    ins.set_memory_base(Register::EAX + base as u32);
    if index != 4 && d.rng.chance(50) {
        let scale = 1 << d.rng.below(4);
        ins.set_memory_index(Register::EAX + index as u32);
        ins.set_memory_index_scale(scale as u32);
        sum = sum.wrapping_add(d.start.gpr[index].wrapping_mul(scale));
    }
    displace(d, ins, offset.wrapping_sub(sum) as i32 as i64 as u64);
    Some(())
}

fn displace(d: &mut Draft, ins: &mut Instruction, displacement: u64) {
    let v = displacement as i64;
    let size = match v {
        0 if d.rng.chance(70) => 0,
        -128..128 if d.rng.chance(80) => 1,
        _ if ins.memory_base().is_gpr32() || ins.memory_index().is_gpr32() => 4,
        _ => 8,
    };
    ins.set_memory_displ_size(size);
    ins.set_memory_displacement64(if size == 4 { displacement as u32 as u64 } else { displacement });
}
