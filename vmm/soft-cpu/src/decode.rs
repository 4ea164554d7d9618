//! From guest bytes to [`Insn`]s: iced-x86 decodes, [`crate::exec`] chooses the handler.

use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, Instruction, OpKind, Register};

use crate::exec;
use crate::insn::{ADDR32, Handler, Insn, PlaceInBlock, flag, register_index, threaded};
use crate::state::{FS_BASE, GS_BASE, MINUS_2G, PLUS_2G, RIP_BASE, ZERO};

/// Longest instruction, bytes (SDM 2, 2.3.11).
pub const LENGTH_MAX: usize = 15;

/// What [`BlockDecoder::decode`] has found.
pub enum Decoded {
    /// An instruction and its place (an undefined one has a handler that raises #UD).
    Insn(Insn, PlaceInBlock),
    /// The bytes end before the instruction does.
    Cut,
}

/// Decodes the instructions of a block one after the other.
pub struct BlockDecoder<'a> {
    decoder: Decoder<'a>,
    bytes: &'a [u8],
}

/// Hint instructions of extensions that this CPU does not have (CET, MPX, CLDEMOTE) are NOPs.
const OPTIONS: u32 = DecoderOptions::FORCE_RESERVED_NOP;

impl<'a> BlockDecoder<'a> {
    /// A decoder of the block that starts with `bytes`.
    pub fn new(bytes: &'a [u8]) -> BlockDecoder<'a> {
        BlockDecoder { decoder: Decoder::with_ip(64, bytes, 0, OPTIONS), bytes }
    }

    /// The next instruction.
    pub fn decode(&mut self) -> Decoded {
        let at = self.decoder.position();
        let offset = at as u16;
        let ins = self.decoder.decode();
        if ins.code() == Code::INVALID {
            return undefined(&self.bytes[at..], offset);
        }
        let mut insn = operands(&ins, offset);
        match exec::select(&ins, &mut insn) {
            Some(place) => Decoded::Insn(insn, place),
            None => faulting(offset, ins.len(), threaded!(|cpu, _, _| cpu.undefined())),
        }
    }
}

/// Handles `bytes` that do not begin with a valid instruction.
fn undefined(bytes: &[u8], offset: u16) -> Decoded {
    let longest = &bytes[..bytes.len().min(LENGTH_MAX)];
    // An invalid LOCK prefix does not change the length.
    let mut decoder = Decoder::new(64, longest, OPTIONS | DecoderOptions::NO_INVALID_CHECK);
    let ins = decoder.decode();
    if decoder.last_error() == DecoderError::NoMoreBytes {
        // It is undefined whatever its immediates are: they are not fetched, and so cannot fault.
        return match lacks_immediates_of_sse4a(longest) {
            true => faulting(offset, longest.len(), threaded!(|cpu, _, _| cpu.undefined())),
            false => Decoded::Cut,
        };
    }
    // An instruction of more than 15 bytes is #GP(0).
    if ins.code() == Code::INVALID && ins.len() >= LENGTH_MAX {
        return faulting(offset, LENGTH_MAX, threaded!(|cpu, _, _| cpu.general_protection(0)));
    }
    faulting(offset, ins.len(), threaded!(|cpu, _, _| cpu.undefined()))
}

/// Is it EXTRQ or INSERTQ of SSE4a, which this CPU does not have, without its two immediates?
fn lacks_immediates_of_sse4a(bytes: &[u8]) -> bool {
    let mut whole = [0; LENGTH_MAX];
    whole[..bytes.len()].copy_from_slice(bytes);
    let ins = Decoder::new(64, &whole, OPTIONS | DecoderOptions::NO_INVALID_CHECK).decode();
    let has_two = matches!(ins.code(), Code::Extrq_xmm_imm8_imm8 | Code::Insertq_xmm_xmm_imm8_imm8);
    has_two && ins.len() <= bytes.len() + 2
}

fn faulting(offset: u16, len: usize, exec: Handler) -> Decoded {
    let mut insn = blank(offset);
    insn.len = len as u8;
    insn.exec = exec;
    Decoded::Insn(insn, PlaceInBlock::Last)
}

fn blank(offset: u16) -> Insn {
    Insn {
        exec: threaded!(|cpu, _, _| cpu.undefined()),
        imm: 0,
        disp: 0,
        base: ZERO,
        index: ZERO,
        scale: 0,
        seg: ZERO,
        dst: 0,
        src: 0,
        offset,
        len: 0,
        flags: 0,
    }
}

fn operands(ins: &Instruction, offset: u16) -> Insn {
    let mut i = blank(offset);
    i.len = ins.len() as u8;
    i.seg = segment_base(ins.segment_prefix());
    if ins.has_rep_prefix() {
        i.flags |= flag::REP;
    }
    if ins.has_repne_prefix() {
        i.flags |= flag::REPNE;
    }
    if ins.has_lock_prefix() {
        i.flags |= flag::LOCK;
    }
    for n in 0..ins.op_count() {
        match ins.op_kind(n) {
            OpKind::Register if n == 0 => i.dst = register_index(ins.op_register(0)),
            OpKind::Register if n == 1 => i.src = register_index(ins.op_register(1)),
            OpKind::Memory => memory(ins, &mut i),
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                i.imm = ins.near_branch_target().wrapping_sub(ins.next_ip());
            }
            OpKind::MemorySegESI | OpKind::MemoryESEDI | OpKind::MemorySegEDI => i.flags |= flag::ADDR32,
            kind if is_immediate(kind) => i.imm = ins.immediate(n),
            _ => {}
        }
    }
    i
}

/// Is it an operand that [`Insn::imm`] holds? (Not the second immediate of ENTER.)
pub fn is_immediate(kind: OpKind) -> bool {
    use OpKind::*;
    matches!(
        kind,
        Immediate8
            | Immediate16
            | Immediate32
            | Immediate64
            | Immediate8to16
            | Immediate8to32
            | Immediate8to64
            | Immediate32to64
    )
}

fn memory(ins: &Instruction, i: &mut Insn) {
    let base = ins.memory_base();
    let disp = ins.memory_displacement64();
    i.disp = disp as i32;
    i.scale = ins.memory_index_scale().trailing_zeros() as u8;
    if ins.memory_index() != Register::None {
        i.index = register_index(ins.memory_index());
    }
    i.base = match base {
        Register::None => ZERO,
        Register::RIP | Register::EIP => RIP_BASE,
        r => register_index(r),
    };
    if base == Register::RIP {
        // The displacement counts from the block's start, and so may exceed 32 bits by the block's length.
        let exact = disp as i64;
        if exact > i32::MAX as i64 {
            i.index = PLUS_2G;
            i.disp = (exact - (1 << 31)) as i32;
        } else if exact < i32::MIN as i64 {
            i.index = MINUS_2G;
            i.disp = (exact + (1 << 31)) as i32;
        }
    }
    if is_32_bit(base) || is_32_bit(ins.memory_index()) || absolute_32_bit(ins) {
        i.scale |= ADDR32;
    }
    // Segment overrides other than FS and GS are ignored; the default segment remains.
    let on_stack = matches!(base, Register::RSP | Register::RBP | Register::ESP | Register::EBP);
    if on_stack && i.seg == ZERO {
        i.flags |= flag::STACK;
    }
    // `MOV moffs` has a 64-bit address, which does not fit into `disp`; its handler takes it from `imm`.
    if ins.memory_displ_size() == 8 && base == Register::None && i.index == ZERO {
        i.imm = disp;
    }
}

fn is_32_bit(r: Register) -> bool {
    r.is_gpr32() || r == Register::EIP
}

/// Is the address only a displacement, with the 67 prefix?
fn absolute_32_bit(ins: &Instruction) -> bool {
    ins.memory_base() == Register::None
        && ins.memory_index() == Register::None
        && ins.memory_displ_size() == 4
}

fn segment_base(r: Register) -> u8 {
    match r {
        Register::FS => FS_BASE,
        Register::GS => GS_BASE,
        _ => ZERO,
    }
}
