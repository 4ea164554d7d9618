//! Control-flow analysis of a case: finds every instruction that can be reached along any path, checks that
//! it is compared, and computes the flags that are undefined before it.

use std::collections::BTreeMap;

use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register,
    RflagsBits,
};
use soft_cpu::decode::LENGTH_MAX;

use crate::catalogue::{self, Excluded};
use crate::layout::{CODE, CODE_LEN};
use crate::state::CaseStart;

/// The status flags in RFLAGS.
pub const STATUS: u64 = 0x8d5;
/// A bit beside undefined flags: an x87 instruction has run. Which of them update the instruction, opcode and
/// data pointers, and when, differs between CPU models; the soft CPU never updates them. So no instruction
/// may show these pointers.
const POINTERS: u64 = 1 << 63;

/// An instruction that can be reached.
#[derive(Clone, Debug)]
pub struct FlowNode {
    /// The instruction.
    pub ins: Instruction,
    /// Bits of RFLAGS that are undefined before it; bit 63 stands for the x87's pointers.
    pub undefined: u64,
}

/// All instructions that can be reached, by address.
#[derive(Clone, Debug, Default)]
pub struct Flow {
    /// The instructions, by address.
    pub nodes: BTreeMap<u64, FlowNode>,
}

/// Why a case cannot be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reject {
    /// It contains an instruction that is not compared.
    Excluded(Excluded),
    /// An instruction depends on an undefined flag, or on the x87's pointers.
    UndefinedUsed,
    /// An undefined instruction reaches the end of all code. How many of its bytes are fetched before #UD
    /// depends on the CPU, so that a page fault is allowed as well.
    UndefinedAtTheEnd,
    /// It has no encoding (an operand out of reach, too many bytes).
    NotEncodable,
}

/// Converts iced's flag bits to those of RFLAGS.
fn status_bits(iced: u32) -> u64 {
    const PAIRS: [(u32, u64); 6] = [
        (RflagsBits::CF, 1),
        (RflagsBits::PF, 4),
        (RflagsBits::AF, 0x10),
        (RflagsBits::ZF, 0x40),
        (RflagsBits::SF, 0x80),
        (RflagsBits::OF, 0x800),
    ];
    PAIRS.iter().filter(|(bit, _)| iced & bit != 0).map(|(_, bit)| bit).sum()
}

/// Flags that an instruction leaves undefined, at least for some values of its operands.
pub fn undefined_flags(ins: &Instruction) -> u64 {
    let iced = status_bits(ins.rflags_undefined()) | if leaves_pointers(ins) { POINTERS } else { 0 };
    let by_cl =
        (0..ins.op_count()).any(|n| ins.op_kind(n) == OpKind::Register && ins.op_register(n) == Register::CL);
    match ins.mnemonic() {
        // OF is defined for a count of 1, AF never (SDM 2).
        Mnemonic::Shl | Mnemonic::Sal | Mnemonic::Shr | Mnemonic::Sar if by_cl => iced | 0x810,
        Mnemonic::Rol | Mnemonic::Ror | Mnemonic::Rcl | Mnemonic::Rcr if by_cl => iced | 0x800,
        // A count above the operand's size leaves everything undefined.
        Mnemonic::Shld | Mnemonic::Shrd => iced | if ins.op0_register().size() == 2 { STATUS } else { 0x810 },
        _ => iced,
    }
}

/// Is it an x87 instruction?
pub(crate) fn is_x87(ins: &Instruction) -> bool {
    use CpuidFeature::{FPU, FPU287, FPU387};
    ins.cpuid_features().iter().any(|f| matches!(f, FPU | FPU287 | FPU387))
}

/// Does it update the x87's pointers? x87 instructions do, except control instructions (SDM 1, 8.1.8).
fn leaves_pointers(ins: &Instruction) -> bool {
    let control = shows_pointers(ins)
        || matches!(
            ins.mnemonic(),
            Mnemonic::Fninit
                | Mnemonic::Fnclex
                | Mnemonic::Fldcw
                | Mnemonic::Fnstcw
                | Mnemonic::Fnstsw
                | Mnemonic::Fldenv
                | Mnemonic::Frstor
                | Mnemonic::Wait
        );
    // The pointers that FXRSTOR64 loads are made canonical, with 48 or 57 bits depending on the CPU.
    is_x87(ins) && !control || ins.mnemonic() == Mnemonic::Fxrstor64
}

/// Does it store the x87's pointers?
pub(crate) fn shows_pointers(ins: &Instruction) -> bool {
    use Mnemonic::{Fnsave, Fnstenv, Fxsave, Fxsave64};
    matches!(ins.mnemonic(), Fnsave | Fnstenv | Fxsave | Fxsave64)
}

/// Flags that an instruction defines for all values of its operands.
fn defined_flags(ins: &Instruction) -> u64 {
    let iced = ins.rflags_written() | ins.rflags_cleared() | ins.rflags_set();
    let may_do_nothing = ins.has_rep_prefix()
        || ins.has_repne_prefix()
        || matches!(
            ins.mnemonic(),
            Mnemonic::Shl
                | Mnemonic::Sal
                | Mnemonic::Shr
                | Mnemonic::Sar
                | Mnemonic::Shld
                | Mnemonic::Shrd
                | Mnemonic::Rol
                | Mnemonic::Ror
                | Mnemonic::Rcl
                | Mnemonic::Rcr
        );
    if may_do_nothing { 0 } else { status_bits(iced) & !undefined_flags(ins) }
}

/// Flags that are undefined after a fault in the middle of an instruction. According to the SDM REPE and
/// REPNE restore the flags from before the first iteration, but after an interrupt between iterations they
/// are those of the last one. The soft CPU always leaves those of the last one, because it must not matter
/// where a run was stopped.
fn flags_lost_by_fault(ins: &Instruction) -> u64 {
    let compares = ins.is_string_instruction() && ins.rflags_written() != 0;
    if compares && (ins.has_rep_prefix() || ins.has_repne_prefix()) { STATUS } else { 0 }
}

/// Is it a prefix byte (including REX)?
pub(crate) fn is_prefix(byte: &u8) -> bool {
    matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3)
}

/// Are these bytes, which do not decode, perhaps an instruction of an extension that the host may have (VEX,
/// EVEX, XOP, REX2)?
fn may_be_an_extension(bytes: &[u8]) -> bool {
    matches!(bytes.iter().find(|b| !is_prefix(b)), Some(0x62 | 0x8f | 0xc4 | 0xc5 | 0xd5))
}

/// Are these bytes, which do not decode, cut off, and an undefined instruction whatever follows?
fn is_cut_and_undefined(bytes: &[u8]) -> bool {
    let mut longer = bytes.to_vec();
    longer.resize(bytes.len().max(LENGTH_MAX), 0);
    let whole = bytes.len() >= LENGTH_MAX;
    !whole && Decoder::new(64, &longer, DecoderOptions::NONE).decode().code() == Code::INVALID
}

/// Follows all paths from `roots` through `code`, which lies at address `at` and is followed by INT3s. The
/// `roots` are also the possible targets of indirect branches.
pub fn analyse(code: &[u8], at: u64, roots: &[u64]) -> Result<Flow, Reject> {
    let mut bytes = code.to_vec();
    let room = (CODE + CODE_LEN - at) as usize;
    bytes.resize((code.len() + 16).min(room), 0xcc);
    let mut flow = Flow::default();
    let mut work: Vec<(u64, u64)> = roots.iter().map(|r| (*r, 0)).collect();
    while let Some((ip, undefined)) = work.pop() {
        let Some(rest) = ip.checked_sub(at).and_then(|o| bytes.get(o as usize..)).filter(|r| !r.is_empty())
        else {
            continue;
        };
        let before = match flow.nodes.get(&ip) {
            Some(node) if node.undefined | undefined == node.undefined => continue,
            Some(node) => node.undefined | undefined,
            None => undefined,
        };
        let ins = Decoder::with_ip(64, rest, ip, DecoderOptions::NONE).decode();
        flow.nodes.insert(ip, FlowNode { ins, undefined: before });
        if ins.code() == Code::INVALID {
            if may_be_an_extension(rest) {
                return Err(Reject::Excluded(Excluded::NotOffered));
            }
            if is_cut_and_undefined(rest) {
                return Err(Reject::UndefinedAtTheEnd);
            }
            continue;
        }
        catalogue::vet(&ins).map_err(Reject::Excluded)?;
        let uses = status_bits(ins.rflags_read()) | if shows_pointers(&ins) { POINTERS } else { 0 };
        if uses & before != 0 {
            return Err(Reject::UndefinedUsed);
        }
        let after = before & !defined_flags(&ins) | undefined_flags(&ins);
        let next = ins.next_ip();
        match ins.flow_control() {
            FlowControl::Next => work.push((next, after)),
            FlowControl::UnconditionalBranch => work.push((ins.near_branch_target(), after)),
            FlowControl::ConditionalBranch | FlowControl::Call => {
                work.extend([(ins.near_branch_target(), after), (next, after)]);
            }
            FlowControl::IndirectBranch | FlowControl::Return | FlowControl::IndirectCall => {
                work.push((next, after));
                work.extend(roots.iter().map(|r| (*r, after)));
            }
            FlowControl::Interrupt | FlowControl::Exception | FlowControl::XbeginXabortXend => {}
        }
    }
    Ok(flow)
}

impl Flow {
    /// Whether the instruction at `rip` is one that the soft CPU does not have and that the analysis has not
    /// seen: an indirect branch, by a register that had changed, has led into the middle of another
    /// instruction.
    pub fn strayed(&self, start: &CaseStart, rip: u64) -> bool {
        let Some(bytes) = rip.checked_sub(start.rip).and_then(|o| start.code.get(o as usize..)) else {
            return false;
        };
        let ins = Decoder::with_ip(64, bytes, rip, DecoderOptions::NONE).decode();
        !self.nodes.contains_key(&rip) && catalogue::vet(&ins) == Err(Excluded::NotOffered)
    }

    /// Flags that are undefined when the case ends at `rip`; if the analysis has no instruction there, all
    /// that are undefined anywhere. The RIP of a trap is the end of its instruction, which has one or two
    /// bytes.
    pub fn undefined_at(&self, rip: u64, trap: bool) -> u64 {
        let at = if trap { [rip.wrapping_sub(1), rip.wrapping_sub(2)] } else { [rip, rip] };
        let found: Vec<_> = at.iter().filter_map(|a| self.nodes.get(a)).collect();
        if found.is_empty() {
            return self.nodes.values().fold(0, |u, n| u | n.undefined | undefined_flags(&n.ins));
        }
        found.iter().fold(0, |u, n| u | n.undefined | if trap { 0 } else { flags_lost_by_fault(&n.ins) })
    }
}
