//! From guest bytes to [`Insn`]s: iced-x86 decodes, [`crate::exec`] chooses the handler.

use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, Instruction, OpKind, Register};

use crate::exec;
use crate::insn::{ADDR32, HIGH_BYTE, Handler, Insn, flag, threaded};
use crate::state::{FS_BASE, GS_BASE, MINUS_2G, PLUS_2G, RIP_BASE, ZERO};

/// Longest instruction, bytes (SDM 2, 2.3.11).
pub const LENGTH_MAX: usize = 15;

/// Where in a block an instruction may stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Anywhere.
    Middle,
    /// Last: it may change RIP.
    Last,
    /// Alone: its handler needs the exact count of retired instructions, may leave the CPU as a matter of
    /// course, or changes how what follows is to be fetched.
    Alone,
}

/// A decoded instruction and where it may stand, or that more bytes are needed to say.
pub enum Decoded {
    /// An instruction (an undefined one decodes to a handler that raises #UD).
    Insn(Insn, Place),
    /// The bytes end within the instruction.
    Cut,
}

/// Decodes one instruction after another, the first of a block first.
pub struct BlockDecoder<'a> {
    decoder: Decoder<'a>,
    bytes: &'a [u8],
}

/// Hints of extensions that we do not have (CET, MPX, CLDEMOTE) are NOPs.
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

/// What begins `bytes` and is no instruction.
fn undefined(bytes: &[u8], offset: u16) -> Decoded {
    let longest = &bytes[..bytes.len().min(LENGTH_MAX)];
    // A LOCK where none may be takes nothing from the length.
    let mut decoder = Decoder::new(64, longest, OPTIONS | DecoderOptions::NO_INVALID_CHECK);
    let ins = decoder.decode();
    if decoder.last_error() == DecoderError::NoMoreBytes {
        // Undefined whatever its immediates are: they are not fetched, and so cannot fault.
        return match lacks_immediates_of_sse4a(longest) {
            true => faulting(offset, longest.len(), threaded!(|cpu, _, _| cpu.undefined())),
            false => Decoded::Cut,
        };
    }
    // An instruction that is longer than one can be is #GP(0).
    if ins.code() == Code::INVALID && ins.len() >= LENGTH_MAX {
        return faulting(offset, LENGTH_MAX, threaded!(|cpu, _, _| cpu.general_protection(0)));
    }
    faulting(offset, ins.len(), threaded!(|cpu, _, _| cpu.undefined()))
}

/// SSE4a's EXTRQ and INSERTQ have two immediates; we have no SSE4a.
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
    Decoded::Insn(insn, Place::Last)
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
            OpKind::Register if n == 0 => i.dst = register(ins.op_register(0)),
            OpKind::Register if n == 1 => i.src = register(ins.op_register(1)),
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

/// An operand that [`Insn::imm`] holds. The second immediate of ENTER is none of these.
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
        i.index = register(ins.memory_index());
    }
    i.base = match base {
        Register::None => ZERO,
        Register::RIP | Register::EIP => RIP_BASE,
        r => register(r),
    };
    if base == Register::RIP {
        // Counted from the block's start, the displacement may leave 32 bits by a block's length.
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
    // Overrides but for FS and GS are ignored; the default segment remains.
    let on_stack = matches!(base, Register::RSP | Register::RBP | Register::ESP | Register::EBP);
    if on_stack && i.seg == ZERO {
        i.flags |= flag::STACK;
    }
    // `MOV moffs` has a 64-bit address and no room for it in `disp`; its handler takes it from `imm`.
    if ins.memory_displ_size() == 8 && base == Register::None && i.index == ZERO {
        i.imm = disp;
    }
}

fn is_32_bit(r: Register) -> bool {
    r.is_gpr32() || r == Register::EIP
}

/// An address that is nothing but a displacement, with the 67 prefix.
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

/// Index of a register in its file.
pub fn register(r: Register) -> u8 {
    match r {
        Register::AH | Register::CH | Register::DH | Register::BH => r.number() as u8 - 4 | HIGH_BYTE,
        // iced numbers SPL to R15L behind AH to BH.
        r if r.is_gpr8() => r.full_register().number() as u8,
        r => r.number() as u8,
    }
}
