//! The instructions that are compared, and those that are not, with the reason.

use std::sync::OnceLock;

use iced_x86::{Code, CpuidFeature, EncodingKind, Instruction, Mnemonic};
use soft_cpu::exec::cpuid::cpuid;

/// The register file that an instruction mainly works on; cases prefer to stay within one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum RegisterFile {
    /// General registers.
    Integer,
    /// x87.
    X87,
    /// MMX.
    Mmx,
    /// XMM.
    Sse,
}

/// Features that every x86-64 CPU has. From PREFETCHW on they are hints in the encoding space of NOPs (0F 0D
/// and 0F 18 to 0F 1F), which run everywhere.
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

/// A register of CPUID's result, as an index into EAX to EDX.
#[derive(Clone, Copy)]
enum Word {
    B = 1,
    C = 2,
    D = 3,
}

/// Where CPUID reports a feature: leaf, register, bit.
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

/// The features in the soft CPU's CPUID.
fn offered() -> &'static [CpuidFeature] {
    static OFFERED: OnceLock<Vec<CpuidFeature>> = OnceLock::new();
    OFFERED.get_or_init(|| {
        let has =
            |(_, leaf, word, bit): &&(_, u32, Word, u32)| cpuid(*leaf, 0)[*word as usize] >> bit & 1 != 0;
        BASE.iter().copied().chain(OPTIONAL.iter().filter(has).map(|o| o.0)).collect()
    })
}

/// Features of the soft CPU that this host lacks: cases with their instructions cannot be compared.
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
    /// It is not in the soft CPU's CPUID, and so #UD there; this host may execute it.
    NotOffered,
    /// Its result depends on this host's identity, time or configuration.
    HostSpecific,
    /// It shows or uses descriptor tables, in which the soft CPU differs from the host; privileged behaviour
    /// has its own tests.
    Descriptors,
    /// It enters the host's kernel.
    SystemCall,
    /// Its result is an approximation; the soft CPU's is defined by golden vectors (`soft_cpu::float`).
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

/// Encodings that are not compared, of mnemonics that otherwise are.
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
pub struct CatalogueEntry {
    /// The encoding.
    pub code: Code,
    /// The register file that it mainly works on.
    pub class: RegisterFile,
}

/// Checks that this instruction is compared.
///
/// # Errors
/// The reason why it is not.
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

/// All encodings of 64-bit mode that are compared, except MPX: NOPs whose operands the generator does not
/// know.
pub fn entries() -> Vec<CatalogueEntry> {
    all_codes()
        .filter(|c| !c.cpuid_features().contains(&CpuidFeature::MPX))
        .filter(|c| vet_code(*c).is_ok())
        .map(|code| CatalogueEntry { code, class: class(code) })
        .collect()
}

/// All encodings of 64-bit mode that the soft CPU has and that are not compared.
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
        // Mnemonics with a WAIT before them are two instructions.
        real && !op.fwait() && op.mode64() && op.intel_decoder64()
    })
}

fn class(code: Code) -> RegisterFile {
    use CpuidFeature::{FPU, FPU287, FPU387, MMX, SSE, SSE2, SSE3, SSE4_1, SSE4_2, SSSE3};
    let features = code.cpuid_features();
    let op = code.op_code();
    let is_mmx = op.op_kinds().iter().any(|k| {
        use iced_x86::OpCodeOperandKind::{mm_or_mem, mm_reg, mm_rm};
        matches!(k, mm_or_mem | mm_reg | mm_rm)
    });
    if features.iter().any(|f| matches!(f, FPU | FPU287 | FPU387)) {
        RegisterFile::X87
    } else if is_mmx || features.contains(&MMX) {
        RegisterFile::Mmx
    } else if features.iter().any(|f| matches!(f, SSE | SSE2 | SSE3 | SSSE3 | SSE4_1 | SSE4_2)) {
        RegisterFile::Sse
    } else {
        RegisterFile::Integer
    }
}
