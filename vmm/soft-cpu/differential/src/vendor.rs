//! Legitimate differences between processors of different vendors.
//!
//! The soft CPU is defined to do what Intel's processors do, on every host. On a host of another vendor a
//! case may therefore end differently although both are right, because the manuals leave something open (SDM
//! 3A 6.9: the order of exceptions within a class "may vary from processor to processor") or because the
//! manuals of the two vendors define different things. [`explain`] finds the instruction that causes the
//! difference. Such a case counts as not compared, for the reason that [`Quirk::reason`] returns. On Intel's
//! processors every difference counts.

use iced_x86::{Code, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};
use soft_cpu::CpuState;

use crate::case::Built;
use crate::flow::{Flow, is_prefix, is_x87, shows_pointers};
use crate::layout::{CODE, CODE_LEN};
use crate::soft::Soft;
use crate::state::{CaseEnd, CaseOutcome, CaseStart};

/// The vendor of the host's processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// Intel, and vendors that are not known to differ from it.
    Intel,
    /// AMD, and Hygon, whose processors are AMD's.
    Amd,
}

impl Vendor {
    /// The vendor of this host's processor.
    pub fn host() -> Vendor {
        let leaf = std::arch::x86_64::__cpuid(0);
        let name: Vec<u8> = [leaf.ebx, leaf.edx, leaf.ecx].iter().flat_map(|r| r.to_le_bytes()).collect();
        match name.as_slice() {
            b"AuthenticAMD" | b"HygonGenuine" => Vendor::Amd,
            _ => Vendor::Intel,
        }
    }

    /// Whether a word of memory counts as equal: FXSAVE stores MXCSR_MASK, in which AMD's processors have MM
    /// (bit 17, misaligned accesses), a feature that only they have.
    pub fn same_word(self, flow: &Flow, native: u64, soft: u64) -> bool {
        const MXCSR_MASK: u64 = 0xffff;
        const MM: u64 = 1 << 17;
        let masks = native >> 32 == MXCSR_MASK | MM && soft >> 32 == MXCSR_MASK;
        native == soft
            || self == Vendor::Amd
                && masks
                && native as u32 == soft as u32
                && flow.nodes.values().any(|n| saves_mxcsr_mask(&n.ins))
    }
}

/// A difference of AMD's processors from Intel's and from the soft CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quirk {
    /// AMD obeys an operand-size prefix before a near branch in 64-bit mode (16-bit displacement and RIP),
    /// Intel ignores it (SDM 2, "near branches"; APM 3, 1.2.5).
    ShortBranch,
    /// A repeat prefix before LOOPE or LOOPNE, where its effect is unpredictable (APM 3, 1.2.6): AMD uses the
    /// condition of the prefix instead of the opcode's.
    RepeatedLoop,
    /// PAUSE with REX.B: on AMD it exchanges RAX and R8, and the repeat prefix has no effect.
    PauseExchange,
    /// MXCSR's bit 17, MM, which only AMD's processors have: #GP on Intel's.
    MisalignedMode,
    /// 0F 0D with a register: on AMD PREFETCHW, which is then #UD (APM 3); on Intel a NOP.
    PrefetchRegister,
    /// The #DB of INT1 is a trap on both; but under AMD's virtualization the host's KVM delivers it with the
    /// RIP of the instruction itself, which SVM does not advance.
    Int1,
    /// MOVSXD with an operand size of 16 bits: Intel reads 16 bits, AMD 32.
    NarrowMovsxd,
    /// The x87's instruction and operand pointers, once loaded: AMD keeps and stores them only with a pending
    /// exception (APM 2, 11.4.4), and has more bits of them.
    X87Pointers,
    /// SHLD or SHRD of 16 bits by more than 16: result and flags are undefined (SDM 2, APM 3).
    DoubleShiftBeyond,
    /// RCL or RCR of 8 or 16 bits by a whole turn, which is not a count of zero: OF is undefined (SDM 2, APM
    /// 3).
    WholeTurn,
    /// DPPS or DPPD with several NaNs: which of them is the result depends on the order of additions, which
    /// is open.
    DotProductNan,
    /// An unmasked underflow in FSCALE, FPREM or FPREM1 of a denormal that does not change: AMD reports it,
    /// with the wrapped exponent; on Intel the operand is the result.
    TinyUnchanged,
    /// A near CALL to a non-canonical address is #GP on both, with RSP unchanged; Intel has already written
    /// the return address to the stack.
    CallFault,
    /// An MMX instruction that faults: Intel has already changed the x87's tags and reset TOP.
    MmxFault,
    /// An x87 store with an unmasked exception, to an address that may not be written: the order of the two
    /// exceptions is open; on AMD the page fault comes first.
    X87StoreFault,
    /// A store of the x87's state or of ten bytes that faults in its later part: Intel has already written
    /// the earlier part.
    TornStore,
    /// FS or GS with an offset that is not canonical, although the linear address is: #GP on AMD.
    SegmentOffset,
    /// LOCK MOV CR0: on AMD another encoding of MOV CR8 (APM 3, "MOV CRn"), and privileged; on Intel #UD.
    LockMovCr,
    /// FXSAVE stores MXCSR_MASK, and the case has used it (stored alone, it does not count:
    /// [`Vendor::same_word`]).
    MxcsrMask,
    /// A repeated string instruction with 32-bit addresses that stops early, or does no iteration: it is open
    /// when the upper halves of RCX, RSI and RDI are cleared.
    NarrowString,
    /// A string instruction with two memory operands that both fault: it is open which of them is reported.
    StringFault,
    /// MASKMOVDQU or MASKMOVQ with a fault: it is open which of the bytes is in CR2, and whether bytes that
    /// the mask does not select fault (SDM 2).
    MaskedStoreFault,
    /// An undefined instruction that reaches the end of all code: it is open how many of its bytes are
    /// fetched before #UD (AMD's UD0 and UD1 have no ModRM byte).
    UndefinedFetch,
    /// An alignment check and a page fault of one access: their order is open. It is also open whether
    /// instructions with unaligned 16-byte operands (MOVUPS, LDDQU, PCMPESTRI) check alignment at all (SDM
    /// 3A, interrupt 17).
    AlignmentFault,
}

impl Quirk {
    /// The reason in the list of cases that were not compared.
    pub fn reason(self) -> &'static str {
        match self {
            Quirk::ShortBranch => "AMD: operand-size prefix on a near branch",
            Quirk::RepeatedLoop => "AMD: repeat prefix on LOOPE or LOOPNE",
            Quirk::PauseExchange => "AMD: PAUSE with REX.B",
            Quirk::MisalignedMode => "AMD: MXCSR with MM",
            Quirk::PrefetchRegister => "AMD: PREFETCHW of a register",
            Quirk::Int1 => "AMD: RIP of INT1",
            Quirk::NarrowMovsxd => "AMD: MOVSXD of 16 bits",
            Quirk::X87Pointers => "AMD: loaded x87 pointers",
            Quirk::DoubleShiftBeyond => "AMD: SHLD or SHRD beyond the operand",
            Quirk::WholeTurn => "AMD: OF of RCL or RCR by a whole turn",
            Quirk::DotProductNan => "AMD: NaN of a dot product",
            Quirk::TinyUnchanged => "AMD: unmasked underflow of an unchanged denormal",
            Quirk::CallFault => "AMD: memory after a near call's #GP",
            Quirk::MmxFault => "AMD: x87 tags after an MMX instruction's fault",
            Quirk::X87StoreFault => "AMD: fault before an x87 store's exception",
            Quirk::TornStore => "AMD: what a faulting x87 store has written",
            Quirk::SegmentOffset => "AMD: FS or GS with an offset that is not canonical",
            Quirk::LockMovCr => "AMD: LOCK MOV of a control register",
            Quirk::MxcsrMask => "AMD: FXSAVE's MXCSR_MASK in use",
            Quirk::NarrowString => "AMD: upper halves in a string instruction with 32-bit addresses",
            Quirk::StringFault => "AMD: which of two operands faults",
            Quirk::MaskedStoreFault => "AMD: fault of a masked store",
            Quirk::UndefinedFetch => "AMD: fewer bytes of an undefined instruction",
            Quirk::AlignmentFault => "AMD: alignment check or page fault first",
        }
    }
}

/// One instruction of a case, as executed by the soft CPU.
struct CaseStep<'a> {
    /// The case.
    start: &'a CaseStart,
    /// The instruction.
    ins: &'a Instruction,
    /// The state before it.
    before: &'a CpuState,
    /// The state after it.
    after: &'a CpuState,
    /// How the host ended the case.
    native: &'a CaseOutcome,
    /// How the soft CPU ended it.
    soft: &'a CaseOutcome,
    /// Whether x87 pointers have been loaded before.
    pointers_loaded: bool,
}

const UNDEFINED: u8 = 6;
const STACK: u8 = 12;
const GENERAL: u8 = 13;
const PAGE_FAULT: u8 = 14;
const ALIGNMENT: u8 = 17;
/// RFLAGS.AC.
const AC: u64 = 1 << 18;
/// The underflow mask in the x87 control word.
const UNDERFLOW: u16 = 1 << 4;

impl CaseStep<'_> {
    /// The difference of AMD's processors for this instruction, if there is one.
    fn quirk(&self) -> Option<Quirk> {
        use Quirk::*;
        let all = [
            (ShortBranch, self.is_short_branch()),
            (RepeatedLoop, self.ins.is_loopcc() && self.has_prefix(&[0xf2, 0xf3])),
            (PauseExchange, self.is_pause_with_rex_b()),
            (MisalignedMode, self.is_misaligned_mode()),
            (PrefetchRegister, self.is_prefetch_of_register()),
            (Int1, self.ins.code() == Code::Int1),
            (NarrowMovsxd, self.ins.code() == Code::Movsxd_r16_rm16),
            (X87Pointers, self.pointers_loaded && shows_pointers(self.ins)),
            (DoubleShiftBeyond, self.is_double_shift_beyond()),
            (WholeTurn, self.is_whole_turn()),
            (DotProductNan, self.gives_nan()),
            (TinyUnchanged, self.is_tiny_unchanged()),
            (CallFault, self.is_call_to_nowhere()),
            (MmxFault, self.both_fault() && self.uses(|r| r.is_mm())),
            (X87StoreFault, self.is_x87_store_that_faults()),
            (TornStore, self.both_fault() && self.stores_x87()),
            (SegmentOffset, self.is_segment_offset()),
            (LockMovCr, self.is_lock_mov_cr()),
            (MxcsrMask, saves_mxcsr_mask(self.ins)),
            (NarrowString, self.is_narrow_string()),
            (StringFault, self.both_fault() && self.is_string_of_two()),
            (MaskedStoreFault, self.is_masked_store() && (self.native_faults() || self.soft_faults())),
            (UndefinedFetch, self.is_undefined_fetch()),
            (AlignmentFault, self.is_alignment_or_page()),
        ];
        all.into_iter().find(|(_, applies)| *applies).map(|(quirk, _)| quirk)
    }

    fn native_faults(&self) -> bool {
        self.native.rip == self.ins.ip() && memory_fault(self.native)
    }

    fn soft_faults(&self) -> bool {
        self.soft.rip == self.ins.ip() && memory_fault(self.soft)
    }

    fn both_fault(&self) -> bool {
        self.native_faults() && self.soft_faults()
    }

    fn uses(&self, of_kind: fn(Register) -> bool) -> bool {
        (0..self.ins.op_count())
            .any(|n| self.ins.op_kind(n) == OpKind::Register && of_kind(self.ins.op_register(n)))
    }

    /// The code from this instruction on.
    fn bytes(&self) -> &[u8] {
        let at = self.ins.ip().wrapping_sub(self.start.rip) as usize;
        self.start.code.get(at..).unwrap_or_default()
    }

    fn has_prefix(&self, any_of: &[u8]) -> bool {
        self.bytes().iter().take_while(|b| is_prefix(b)).any(|b| any_of.contains(b))
    }

    fn is_pause_with_rex_b(&self) -> bool {
        const REX_B: [u8; 8] = [0x41, 0x43, 0x45, 0x47, 0x49, 0x4b, 0x4d, 0x4f];
        self.ins.code() == Code::Pause && self.has_prefix(&REX_B)
    }

    /// The soft CPU raises #GP for an MXCSR that the host accepts.
    fn is_misaligned_mode(&self) -> bool {
        use Mnemonic::{Fxrstor, Fxrstor64, Ldmxcsr};
        let loads = matches!(self.ins.mnemonic(), Ldmxcsr | Fxrstor | Fxrstor64);
        loads && self.soft_faults() && vector(self.soft) == GENERAL && !self.native_faults()
    }

    fn is_short_branch(&self) -> bool {
        let near = self.ins.is_jcc_short_or_near()
            || self.ins.is_jmp_short_or_near()
            || self.ins.is_call_near()
            || self.ins.is_jmp_near_indirect()
            || self.ins.is_call_near_indirect()
            || self.ins.is_loop()
            || self.ins.is_loopcc()
            || self.ins.is_jcx_short()
            || self.ins.mnemonic() == Mnemonic::Ret
            || self.ins.is_invalid() && self.begins_branch();
        near && self.has_prefix(&[0x66])
    }

    /// Is it a JMP, CALL or Jcc whose displacement continues in an unmapped page? On AMD the instruction is
    /// shorter and does not.
    fn begins_branch(&self) -> bool {
        let mut opcode = self.bytes().iter().skip_while(|b| is_prefix(b));
        match opcode.next() {
            Some(0xe8 | 0xe9) => true,
            Some(0x0f) => matches!(opcode.next(), Some(0x80..=0x8f)),
            _ => false,
        }
    }

    fn is_prefetch_of_register(&self) -> bool {
        matches!(
            self.ins.code(),
            Code::Reservednop_rm16_r16_0F0D
                | Code::Reservednop_rm32_r32_0F0D
                | Code::Reservednop_rm64_r64_0F0D
        ) && self.ins.op0_kind() == OpKind::Register
    }

    /// An immediate count, or CL.
    fn count(&self) -> u64 {
        let last = self.ins.op_count() - 1;
        let count = match self.ins.op_kind(last) {
            OpKind::Immediate8 => self.ins.immediate8() as u64,
            _ => self.before.gpr[1],
        };
        count & 31
    }

    fn is_double_shift_beyond(&self) -> bool {
        let double = matches!(self.ins.mnemonic(), Mnemonic::Shld | Mnemonic::Shrd);
        double && self.ins.op1_register().size() == 2 && self.count() > 16
    }

    fn is_whole_turn(&self) -> bool {
        let bits = match self.ins.op0_kind() {
            OpKind::Register => self.ins.op0_register().size() * 8,
            _ => self.ins.memory_size().size() * 8,
        };
        matches!(self.ins.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr)
            && bits <= 16
            && self.count() != 0
            && self.count().is_multiple_of(bits as u64 + 1)
    }

    fn gives_nan(&self) -> bool {
        let value = || self.after.xmm[self.ins.op0_register().number()];
        match self.ins.mnemonic() {
            Mnemonic::Dpps => (0..4).any(|n| f32::from_bits((value() >> (32 * n)) as u32).is_nan()),
            Mnemonic::Dppd => (0..2).any(|n| f64::from_bits((value() >> (64 * n)) as u64).is_nan()),
            _ => false,
        }
    }

    fn is_tiny_unchanged(&self) -> bool {
        let x87 = &self.before.x87;
        matches!(self.ins.mnemonic(), Mnemonic::Fscale | Mnemonic::Fprem | Mnemonic::Fprem1)
            && x87.control & UNDERFLOW == 0
            && x87.sign_exponent[x87.top as usize] & 0x7fff == 0
    }

    fn is_call_to_nowhere(&self) -> bool {
        let general = vector(self.native) == GENERAL && vector(self.soft) == GENERAL;
        self.ins.is_call_near_indirect() && self.both_fault() && general
    }

    /// Stores from the x87, or all of its state.
    fn stores_x87(&self) -> bool {
        let mut info = InstructionInfoFactory::new();
        let stores = info.info(self.ins).used_memory().iter().any(|m| m.access() == OpAccess::Write);
        stores && (is_x87(self.ins) || saves_mxcsr_mask(self.ins))
    }

    fn is_x87_store_that_faults(&self) -> bool {
        const SUMMARY: u16 = 0x80;
        let pending = self.after.x87.status & SUMMARY != 0;
        pending && self.native_faults() && !self.soft_faults() && self.stores_x87()
    }

    fn is_segment_offset(&self) -> bool {
        let with_base = matches!(self.ins.memory_segment(), Register::FS | Register::GS);
        let operand = (0..self.ins.op_count()).find(|n| self.ins.op_kind(*n) == OpKind::Memory).unwrap_or(0);
        let offset = self.ins.virtual_address(operand, 0, |r, _, _| match r {
            r if r.is_gpr64() => Some(self.before.gpr[r.number()]),
            r if r.is_gpr32() => Some(self.before.gpr[r.number()] as u32 as u64),
            r => r.is_segment_register().then_some(0),
        });
        let canonical = |at: u64| (at as i64) << 16 >> 16 == at as i64;
        let general = vector(self.native) == GENERAL && self.both_fault();
        general && with_base && offset.is_some_and(|o| !canonical(o))
    }

    fn is_lock_mov_cr(&self) -> bool {
        let opcode: Vec<_> = self.bytes().iter().skip_while(|b| is_prefix(b)).take(2).collect();
        self.has_prefix(&[0xf0]) && matches!(opcode[..], [0x0f, 0x20 | 0x22])
    }

    fn is_narrow_string(&self) -> bool {
        let narrow = (0..self.ins.op_count()).any(|n| {
            use OpKind::{MemoryESEDI, MemorySegEDI, MemorySegESI};
            matches!(self.ins.op_kind(n), MemoryESEDI | MemorySegESI | MemorySegEDI)
        });
        let [_, rcx, _, _, _, _, rsi, rdi, ..] = self.before.gpr;
        let repeated = self.ins.has_rep_prefix() || self.ins.has_repne_prefix();
        narrow && repeated && (rcx | rsi | rdi) >> 32 != 0
    }

    fn is_string_of_two(&self) -> bool {
        use Mnemonic::{Cmpsb, Cmpsd, Cmpsq, Cmpsw, Movsb, Movsd, Movsq, Movsw};
        self.ins.is_string_instruction()
            && matches!(self.ins.mnemonic(), Cmpsb | Cmpsw | Cmpsd | Cmpsq | Movsb | Movsw | Movsd | Movsq)
    }

    fn is_masked_store(&self) -> bool {
        matches!(self.ins.mnemonic(), Mnemonic::Maskmovdqu | Mnemonic::Maskmovq)
    }

    fn is_undefined_fetch(&self) -> bool {
        let fetch = |o: &CaseOutcome| matches!(o.end, CaseEnd::Exception { vector: PAGE_FAULT, cr2, .. } if cr2 == CODE + CODE_LEN);
        self.native.rip == self.ins.ip()
            && vector(self.native) == UNDEFINED
            && self.soft_faults()
            && fetch(self.soft)
    }

    fn is_alignment_or_page(&self) -> bool {
        let checks = [self.native, self.soft].map(|o| o.rip == self.ins.ip() && vector(o) == ALIGNMENT);
        let whole_vector = self.ins.memory_size().size() == 16;
        self.before.rflags & AC != 0 && checks[0] != checks[1] && (whole_vector || self.both_fault())
    }
}

/// The vector of the exception that ended a case; 0 for other ends (no quirk is about #DE, which is vector
/// 0).
fn vector(outcome: &CaseOutcome) -> u8 {
    match outcome.end {
        CaseEnd::Exception { vector, .. } => vector,
        _ => 0,
    }
}

/// Whether the case ended with a fault of a memory access.
fn memory_fault(outcome: &CaseOutcome) -> bool {
    matches!(vector(outcome), STACK | GENERAL | PAGE_FAULT | ALIGNMENT)
}

/// Whether this instruction stores MXCSR_MASK.
pub fn saves_mxcsr_mask(ins: &Instruction) -> bool {
    matches!(ins.mnemonic(), Mnemonic::Fxsave | Mnemonic::Fxsave64)
}

/// Whether this instruction loads the x87's pointers.
fn loads_pointers(ins: &Instruction) -> bool {
    use Mnemonic::{Fldenv, Frstor, Fxrstor, Fxrstor64};
    matches!(ins.mnemonic(), Fldenv | Frstor | Fxrstor | Fxrstor64)
}

/// Runs the case on the soft CPU and returns the first instruction that `vendor`'s processors execute
/// differently, with the difference.
pub fn explain(
    vendor: Vendor,
    cpu: &mut Soft,
    built: &Built,
    native: &CaseOutcome,
    soft: &CaseOutcome,
) -> Option<(Quirk, Instruction)> {
    if vendor == Vendor::Intel {
        return None;
    }
    let (mut found, mut pointers_loaded) = (None, false);
    cpu.trace(&built.start, |before, after| {
        let Some(node) = built.flow.nodes.get(&before.rip) else { return true };
        let step =
            CaseStep { start: &built.start, ins: &node.ins, before, after, native, soft, pointers_loaded };
        found = step.quirk().map(|quirk| (quirk, node.ins));
        pointers_loaded |= loads_pointers(&node.ins);
        found.is_none()
    });
    found
}
