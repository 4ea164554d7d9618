//! Which instructions get translated code, and what that code does to the flags. For all others the handler
//! is called.

use iced_x86::{Code, ConditionCode, Instruction, Mnemonic, OpKind};
use soft_cpu::decode::is_immediate;
use soft_cpu::insn::Insn;

/// Operand widths as binary logarithms of their size in bytes.
pub(crate) const BYTE: usize = 0;
pub(crate) const WORD: usize = 1;
pub(crate) const DOUBLE: usize = 2;
pub(crate) const QUAD: usize = 3;

/// What an instruction's translated code does beyond writing its operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// There is no translated code: the handler is called.
    Handler,
    /// It works on registers only and does not touch the flags.
    Plain,
    /// It works on registers only and sets all status flags.
    SetsFlags,
    /// It sets all status flags, and leaves the host's flags as a following Jcc needs them (macro-fusion).
    Fusing,
    /// It works on registers only, and reads flags or leaves some unchanged.
    ReadsFlags,
    /// It may stop (a fault, a device access, a write to decoded code).
    Stops,
    /// A conditional jump.
    Jcc,
}

/// Classifies an instruction.
pub(crate) fn effect(ins: &Instruction, insn: &Insn) -> Effect {
    use Effect::*;
    use Mnemonic as M;
    let (a, b) = (kind(ins, 0), kind(ins, 1));
    let memory = a == OperandKind::Memory || b == OperandKind::Memory;
    let pure = |effect| if memory { Stops } else { effect };
    if ins.is_jcc_short_or_near() {
        return Jcc;
    }
    match ins.mnemonic() {
        M::Nop | M::Reservednop | M::Pause | M::Lfence | M::Mfence | M::Sfence => Plain,
        M::Mov => match (a, b) {
            (OperandKind::Other, _) | (_, OperandKind::Other) => Handler,
            _ if is_moffs(ins) => Handler,
            _ => pure(Plain),
        },
        M::Movzx | M::Movsx | M::Movsxd => pure(Plain),
        M::Lea if width(ins, 0) >= DOUBLE => Plain,
        M::Add | M::Sub | M::And | M::Or | M::Xor | M::Cmp | M::Test => Fusing,
        M::Inc | M::Dec => pure(ReadsFlags),
        M::Neg => pure(SetsFlags),
        M::Not => pure(Plain),
        M::Shl | M::Shr | M::Sar if a == OperandKind::Register && b == OperandKind::Immediate => {
            match (width(ins, 0), insn.imm & if width(ins, 0) == QUAD { 63 } else { 31 }) {
                (DOUBLE | QUAD, 1..) => SetsFlags,
                _ => Handler,
            }
        }
        M::Imul if ins.op_count() > 1 && width(ins, 0) >= DOUBLE => pure(SetsFlags),
        M::Cdqe | M::Cwde | M::Cqo | M::Cdq => Plain,
        M::Push
            if ins.stack_pointer_increment() == -8
                && matches!(a, OperandKind::Register | OperandKind::Immediate) =>
        {
            Stops
        }
        M::Pop if a == OperandKind::Register && width(ins, 0) == QUAD => Stops,
        M::Leave if ins.code() == Code::Leaveq => Stops,
        M::Call if ins.is_call_near() && (a == OperandKind::Branch || a == OperandKind::Register) => Stops,
        M::Call if ins.is_call_near_indirect() => Stops,
        M::Jmp if ins.is_jmp_short_or_near() || ins.is_jmp_near_indirect() => Stops,
        M::Ret if matches!(ins.code(), Code::Retnq | Code::Retnq_imm16) => Stops,
        _ if is_cmov(ins) && width(ins, 0) >= DOUBLE => {
            if memory {
                Stops
            } else {
                ReadsFlags
            }
        }
        _ if is_setcc(ins) && a == OperandKind::Register => ReadsFlags,
        _ => Handler,
    }
}

/// What operand `n` of an instruction is, as far as translated code is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OperandKind {
    /// A general register.
    Register,
    Memory,
    Immediate,
    /// The target of a near jump.
    Branch,
    Other,
    /// The instruction has fewer operands.
    Absent,
}

pub(crate) fn kind(ins: &Instruction, n: u32) -> OperandKind {
    if n >= ins.op_count() {
        return OperandKind::Absent;
    }
    match ins.op_kind(n) {
        OpKind::Register if ins.op_register(n).is_gpr() => OperandKind::Register,
        OpKind::Memory => OperandKind::Memory,
        kind if is_immediate(kind) => OperandKind::Immediate,
        OpKind::NearBranch64 => OperandKind::Branch,
        _ => OperandKind::Other,
    }
}

fn is_conditional(ins: &Instruction) -> bool {
    ins.condition_code() != ConditionCode::None
}

/// Is it SETcc? (LOOPcc has a jump target in place of the byte.)
pub(crate) fn is_setcc(ins: &Instruction) -> bool {
    is_conditional(ins) && ins.op_count() == 1 && width(ins, 0) == BYTE
}

/// Is it CMOVcc? (FCMOVcc has x87 registers.)
pub(crate) fn is_cmov(ins: &Instruction) -> bool {
    is_conditional(ins) && ins.op_count() == 2 && kind(ins, 0) == OperandKind::Register
}

/// Is it a MOV with a 64-bit absolute address?
fn is_moffs(ins: &Instruction) -> bool {
    use Code::*;
    matches!(
        ins.code(),
        Mov_AL_moffs8
            | Mov_AX_moffs16
            | Mov_EAX_moffs32
            | Mov_RAX_moffs64
            | Mov_moffs8_AL
            | Mov_moffs16_AX
            | Mov_moffs32_EAX
            | Mov_moffs64_RAX
    )
}

/// Binary logarithm of the size in bytes of operand `n`, a register or memory.
pub(crate) fn width(ins: &Instruction, n: u32) -> usize {
    let bytes = match ins.op_kind(n) {
        OpKind::Memory => ins.memory_size().size(),
        OpKind::Register => ins.op_register(n).size(),
        _ => 8,
    };
    bytes.trailing_zeros() as usize
}

/// For each instruction: are the flags live after it? They are if an instruction reads them, or may stop,
/// before another sets them all; and at the end of the block.
pub(crate) fn live_flags(decoded: &[Instruction], effects: &[Effect]) -> Vec<bool> {
    let mut live = vec![true; decoded.len()];
    for k in (1..decoded.len()).rev() {
        live[k - 1] = match effects[k] {
            Effect::Plain => live[k],
            Effect::SetsFlags => false,
            Effect::Fusing if !touches_memory(&decoded[k]) => false,
            _ => true,
        };
    }
    live
}

fn touches_memory(ins: &Instruction) -> bool {
    (0..ins.op_count()).any(|n| ins.op_kind(n) == OpKind::Memory)
}
