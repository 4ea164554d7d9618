//! What can run in a case: every instruction that its bytes can be decoded to along all paths, checked to be one
//! that is compared, with the flags that are undefined before it.

use std::collections::BTreeMap;

use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register,
    RflagsBits,
};
use soft_cpu::decode::LENGTH_MAX;

use crate::catalogue::{self, Excluded};
use crate::layout::{CODE, CODE_LEN};
use crate::state::Start;

/// The status flags in RFLAGS.
pub const STATUS: u64 = 0x8d5;
/// Together with undefined flags: an x87 instruction has run. Which of them leave their address, opcode and
/// operand behind, and when, differs between models of CPU; ours leave nothing. So nothing may show it.
const POINTERS: u64 = 1 << 63;

/// An instruction that can be reached.
#[derive(Clone, Debug)]
pub struct Node {
    /// The instruction.
    pub ins: Instruction,
    /// Bits of RFLAGS that are undefined before it; bit 63 stands for the x87's pointers.
    pub undefined: u64,
}

/// All instructions that can be reached, by address.
#[derive(Clone, Debug, Default)]
pub struct Flow {
    /// By address.
    pub nodes: BTreeMap<u64, Node>,
}

/// Why a case is not fit to be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reject {
    /// It contains an instruction that is not compared.
    Excluded(Excluded),
    /// An undefined flag, or the x87's pointers, reach an instruction that depends on them.
    UndefinedUsed,
    /// An undefined instruction reaches the end of all code: how many of its bytes a CPU fetches before #UD is
    /// its own business, so that it may as well be a page fault.
    UndefinedAtTheEnd,
    /// It has no encoding (an operand out of reach, too many bytes).
    NotEncodable,
}

/// RFLAGS' bits of iced's.
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

/// Flags that an instruction leaves undefined, for some of its operands' values at least.
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

/// An x87 instruction.
pub(crate) fn is_x87(ins: &Instruction) -> bool {
    use CpuidFeature::{FPU, FPU287, FPU387};
    ins.cpuid_features().iter().any(|f| matches!(f, FPU | FPU287 | FPU387))
}

/// x87 instructions but those that control it (SDM 1, 8.1.8).
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
    // The pointers that FXRSTOR64 loads are made canonical, in 48 or in 57 bits.
    is_x87(ins) && !control || ins.mnemonic() == Mnemonic::Fxrstor64
}

/// Stores the x87's pointers.
pub(crate) fn shows_pointers(ins: &Instruction) -> bool {
    use Mnemonic::{Fnsave, Fnstenv, Fxsave, Fxsave64};
    matches!(ins.mnemonic(), Fnsave | Fnstenv | Fxsave | Fxsave64)
}

/// Flags that an instruction defines whatever its operands are.
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

/// Flags that are undefined after a fault in the middle of an instruction: the SDM has REPE and REPNE restore
/// them to what they were before the first iteration, but an interrupt between iterations leaves the last
/// one's, which is also what the soft CPU does, for it must not matter where a run was stopped.
fn flags_lost_by_fault(ins: &Instruction) -> u64 {
    let compares = ins.is_string_instruction() && ins.rflags_written() != 0;
    if compares && (ins.has_rep_prefix() || ins.has_repne_prefix()) { STATUS } else { 0 }
}

/// A prefix byte, REX included.
pub(crate) fn is_prefix(byte: &u8) -> bool {
    matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3)
}

/// Is what does not decode a prefix or an opcode of extensions that a host may have (VEX, EVEX, XOP, REX2)?
fn may_be_an_extension(bytes: &[u8]) -> bool {
    matches!(bytes.iter().find(|b| !is_prefix(b)), Some(0x62 | 0x8f | 0xc4 | 0xc5 | 0xd5))
}

/// Would what does not decode, and is cut off, still not decode with more bytes?
fn is_cut_and_undefined(bytes: &[u8]) -> bool {
    let mut longer = bytes.to_vec();
    longer.resize(bytes.len().max(LENGTH_MAX), 0);
    let whole = bytes.len() >= LENGTH_MAX;
    !whole && Decoder::new(64, &longer, DecoderOptions::NONE).decode().code() == Code::INVALID
}

/// Follows all paths from `roots` through `code`, which lies at `at` and is followed by INT3s. `roots` are also
/// where indirect branches may lead.
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
        flow.nodes.insert(ip, Node { ins, undefined: before });
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
    /// Whether there is at `rip` an instruction that the soft CPU does not offer, and that the analysis has not seen:
    /// a branch led into the middle of another one, by a register that had changed.
    pub fn strayed(&self, start: &Start, rip: u64) -> bool {
        let Some(bytes) = rip.checked_sub(start.rip).and_then(|o| start.code.get(o as usize..)) else {
            return false;
        };
        let ins = Decoder::with_ip(64, bytes, rip, DecoderOptions::NONE).decode();
        !self.nodes.contains_key(&rip) && catalogue::vet(&ins) == Err(Excluded::NotOffered)
    }

    /// Flags that are undefined when the case ends at `rip`: all that ever are when it ends elsewhere. A trap's
    /// RIP is behind its instruction, of one byte or two.
    pub fn undefined_at(&self, rip: u64, trap: bool) -> u64 {
        let at = if trap { [rip.wrapping_sub(1), rip.wrapping_sub(2)] } else { [rip, rip] };
        let found: Vec<_> = at.iter().filter_map(|a| self.nodes.get(a)).collect();
        if found.is_empty() {
            return self.nodes.values().fold(0, |u, n| u | n.undefined | undefined_flags(&n.ins));
        }
        found.iter().fold(0, |u, n| u | n.undefined | if trap { 0 } else { flags_lost_by_fault(&n.ins) })
    }
}
