//! Which instructions are tried, and which the comparison leaves out, with the reason.

use std::sync::OnceLock;

use iced_x86::{Code, CpuidFeature, EncodingKind, Instruction, Mnemonic};
use soft_cpu::exec::cpuid::cpuid;

/// The register file that an instruction mainly works on; cases prefer to stay within one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Class {
    /// General registers.
    Integer,
    /// x87.
    X87,
    /// MMX.
    Mmx,
    /// XMM.
    Sse,
}

/// What every x86-64 CPU has. The last line are hints in the space of NOPs (0F 0D and 0F 18 to 0F 1F), which
/// run everywhere.
const BASE: &[CpuidFeature] = &[
    CpuidFeature::INTEL8086,
    CpuidFeature::INTEL186,
    CpuidFeature::INTEL286,
    CpuidFeature::INTEL386,
    CpuidFeature::INTEL486,
    CpuidFeature::X64,
    CpuidFeature::CPUID,
    CpuidFeature::FPU287,
    CpuidFeature::FPU387,
    CpuidFeature::MULTIBYTENOP,
    CpuidFeature::PAUSE,
    CpuidFeature::PREFETCHW,
    CpuidFeature::CLDEMOTE,
    CpuidFeature::CET_IBT,
    CpuidFeature::MPX,
    CpuidFeature::PREFETCHITI,
];

/// EAX to EDX, as CPUID gives them.
#[derive(Clone, Copy)]
enum Word {
    B = 1,
    C = 2,
    D = 3,
}

/// Where CPUID says that a feature is there: leaf, register, bit.
const OPTIONAL: &[(CpuidFeature, u32, Word, u32)] = &[
    (CpuidFeature::FPU, 1, Word::D, 0),
    (CpuidFeature::TSC, 1, Word::D, 4),
    (CpuidFeature::MSR, 1, Word::D, 5),
    (CpuidFeature::CX8, 1, Word::D, 8),
    (CpuidFeature::SEP, 1, Word::D, 11),
    (CpuidFeature::CMOV, 1, Word::D, 15),
    (CpuidFeature::CLFSH, 1, Word::D, 19),
    (CpuidFeature::MMX, 1, Word::D, 23),
    (CpuidFeature::FXSR, 1, Word::D, 24),
    (CpuidFeature::SSE, 1, Word::D, 25),
    (CpuidFeature::SSE2, 1, Word::D, 26),
    (CpuidFeature::SSE3, 1, Word::C, 0),
    (CpuidFeature::PCLMULQDQ, 1, Word::C, 1),
    (CpuidFeature::SSSE3, 1, Word::C, 9),
    (CpuidFeature::CMPXCHG16B, 1, Word::C, 13),
    (CpuidFeature::SSE4_1, 1, Word::C, 19),
    (CpuidFeature::SSE4_2, 1, Word::C, 20),
    (CpuidFeature::MOVBE, 1, Word::C, 22),
    (CpuidFeature::POPCNT, 1, Word::C, 23),
    (CpuidFeature::AES, 1, Word::C, 25),
    (CpuidFeature::LZCNT, 0x8000_0001, Word::C, 5),
    (CpuidFeature::SYSCALL, 0x8000_0001, Word::D, 11),
    (CpuidFeature::RDTSCP, 0x8000_0001, Word::D, 27),
    (CpuidFeature::BMI1, 7, Word::B, 3),
    (CpuidFeature::ADX, 7, Word::B, 19),
    (CpuidFeature::CLFLUSHOPT, 7, Word::B, 23),
    (CpuidFeature::CLWB, 7, Word::B, 24),
    (CpuidFeature::SHA, 7, Word::B, 29),
];

/// What the soft CPU's CPUID offers.
fn offered() -> &'static [CpuidFeature] {
    static OFFERED: OnceLock<Vec<CpuidFeature>> = OnceLock::new();
    OFFERED.get_or_init(|| {
        let has =
            |(_, leaf, word, bit): &&(_, u32, Word, u32)| cpuid(*leaf, 0)[*word as usize] >> bit & 1 != 0;
        BASE.iter().copied().chain(OPTIONAL.iter().filter(has).map(|o| o.0)).collect()
    })
}

/// Features that this host lacks of those offered: cases with their instructions cannot be compared.
pub fn missing_on_host() -> Vec<CpuidFeature> {
    let host = |leaf, word| {
        let r = std::arch::x86_64::__cpuid_count(leaf, 0);
        [r.eax, r.ebx, r.ecx, r.edx][word as usize]
    };
    let lacks = |(f, leaf, word, bit): &&(_, u32, Word, u32)| {
        offered().contains(f) && host(*leaf, *word) >> bit & 1 == 0
    };
    OPTIONAL.iter().filter(lacks).map(|o| o.0).collect()
}

/// Why an instruction is not compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Excluded {
    /// The soft CPU's CPUID does not offer it: it is #UD there, and this host may execute it.
    NotOffered,
    /// It answers with this host's identity, time or configuration.
    HostSpecific,
    /// It shows or uses descriptor tables, which are not the host's; privileged behaviour has its own suite.
    Descriptors,
    /// It enters the host's kernel.
    SystemCall,
    /// Its result is an approximation; ours is defined by golden vectors (float module).
    Approximate,
}

/// Instructions that are not compared.
pub const EXCLUDED: &[(Excluded, &[Mnemonic])] = &[
    (Excluded::HostSpecific, &[Mnemonic::Cpuid, Mnemonic::Rdtsc, Mnemonic::Rdtscp, Mnemonic::Rdpmc]),
    (
        Excluded::Descriptors,
        &[
            Mnemonic::Sgdt,
            Mnemonic::Sidt,
            Mnemonic::Sldt,
            Mnemonic::Str,
            Mnemonic::Smsw,
            Mnemonic::Lar,
            Mnemonic::Lsl,
            Mnemonic::Verr,
            Mnemonic::Verw,
            Mnemonic::Lfs,
            Mnemonic::Lgs,
            Mnemonic::Lss,
            Mnemonic::Retf,
            Mnemonic::Iret,
            Mnemonic::Iretd,
            Mnemonic::Iretq,
        ],
    ),
    (Excluded::SystemCall, &[Mnemonic::Syscall, Mnemonic::Sysenter]),
    (
        Excluded::Approximate,
        &[
            Mnemonic::Rcpps,
            Mnemonic::Rcpss,
            Mnemonic::Rsqrtps,
            Mnemonic::Rsqrtss,
            Mnemonic::Fsin,
            Mnemonic::Fcos,
            Mnemonic::Fsincos,
            Mnemonic::Fptan,
            Mnemonic::Fpatan,
            Mnemonic::F2xm1,
            Mnemonic::Fyl2x,
            Mnemonic::Fyl2xp1,
        ],
    ),
];

/// Single encodings of mnemonics that are otherwise compared.
const EXCLUDED_CODES: &[(Excluded, &[Code])] = &[(
    Excluded::Descriptors,
    &[
        Code::Mov_Sreg_rm16,
        Code::Mov_Sreg_r32m16,
        Code::Mov_Sreg_r64m16,
        Code::Popw_FS,
        Code::Popw_GS,
        Code::Popq_FS,
        Code::Popq_GS,
        Code::Jmp_m1616,
        Code::Jmp_m1632,
        Code::Jmp_m1664,
        Code::Call_m1616,
        Code::Call_m1632,
        Code::Call_m1664,
    ],
)];

/// An encoding that the generator can choose.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The encoding.
    pub code: Code,
    /// Its register file.
    pub class: Class,
}

/// Is this instruction compared?
pub fn vet(ins: &Instruction) -> Result<(), Excluded> {
    vet_code(ins.code())?;
    if ins.mnemonic() == Mnemonic::Int && ins.immediate8() == 0x80 {
        return Err(Excluded::SystemCall);
    }
    Ok(())
}

fn vet_code(code: Code) -> Result<(), Excluded> {
    if !code.cpuid_features().iter().all(|f| offered().contains(f)) {
        return Err(Excluded::NotOffered);
    }
    let excluded = EXCLUDED.iter().find(|(_, list)| list.contains(&code.mnemonic())).map(|(why, _)| *why);
    let excluded =
        excluded.or(EXCLUDED_CODES.iter().find(|(_, list)| list.contains(&code)).map(|(why, _)| *why));
    excluded.map_or(Ok(()), Err)
}

/// All encodings of 64-bit mode that are compared, but MPX, which is NOPs with operands of its own.
pub fn entries() -> Vec<Entry> {
    all_codes()
        .filter(|c| !c.cpuid_features().contains(&CpuidFeature::MPX))
        .filter(|c| vet_code(*c).is_ok())
        .map(|code| Entry { code, class: class(code) })
        .collect()
}

/// All encodings of 64-bit mode that the soft CPU offers and the comparison leaves out.
pub fn excluded() -> Vec<(Code, Excluded)> {
    all_codes()
        .filter_map(|c| vet_code(c).err().map(|why| (c, why)))
        .filter(|(_, why)| *why != Excluded::NotOffered)
        .collect()
}

fn all_codes() -> impl Iterator<Item = Code> {
    Code::values().filter(|c| {
        let op = c.op_code();
        let real = op.is_instruction() && op.encoding() == EncodingKind::Legacy;
        // Those with a WAIT before them are two instructions.
        real && !op.fwait() && op.mode64() && op.intel_decoder64()
    })
}

fn class(code: Code) -> Class {
    use CpuidFeature::{FPU, FPU287, FPU387, MMX, SSE, SSE2, SSE3, SSE4_1, SSE4_2, SSSE3};
    let features = code.cpuid_features();
    let op = code.op_code();
    let is_mmx = op.op_kinds().iter().any(|k| {
        use iced_x86::OpCodeOperandKind::{mm_or_mem, mm_reg, mm_rm};
        matches!(k, mm_or_mem | mm_reg | mm_rm)
    });
    if features.iter().any(|f| matches!(f, FPU | FPU287 | FPU387)) {
        Class::X87
    } else if is_mmx || features.contains(&MMX) {
        Class::Mmx
    } else if features.iter().any(|f| matches!(f, SSE | SSE2 | SSE3 | SSSE3 | SSE4_1 | SSE4_2)) {
        Class::Sse
    } else {
        Class::Integer
    }
}
