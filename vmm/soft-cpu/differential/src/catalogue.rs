//! Which instructions are tried, and which the comparison leaves out, with the reason.

use iced_x86::{Code, CpuidFeature, EncodingKind, Instruction, Mnemonic};

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

/// What the soft CPU's CPUID offers. The last lines are hints in the space of NOPs (SDM 2, opcode 0F 18 to 0F
/// 1F), which every CPU runs; and shadow stacks, which no operating system has switched on for this process.
pub const OFFERED: &[CpuidFeature] = &[
    CpuidFeature::INTEL8086,
    CpuidFeature::INTEL186,
    CpuidFeature::INTEL286,
    CpuidFeature::INTEL386,
    CpuidFeature::INTEL486,
    CpuidFeature::X64,
    CpuidFeature::CMOV,
    CpuidFeature::CX8,
    CpuidFeature::CMPXCHG16B,
    CpuidFeature::CLFSH,
    CpuidFeature::CPUID,
    CpuidFeature::FPU,
    CpuidFeature::FPU287,
    CpuidFeature::FPU387,
    CpuidFeature::FXSR,
    CpuidFeature::MMX,
    CpuidFeature::MSR,
    CpuidFeature::MULTIBYTENOP,
    CpuidFeature::PAUSE,
    CpuidFeature::POPCNT,
    CpuidFeature::SSE,
    CpuidFeature::SSE2,
    CpuidFeature::SSE3,
    CpuidFeature::SSSE3,
    CpuidFeature::SSE4_1,
    CpuidFeature::SSE4_2,
    CpuidFeature::SYSCALL,
    CpuidFeature::TSC,
    CpuidFeature::PREFETCHW,
    CpuidFeature::CLDEMOTE,
    CpuidFeature::CET_IBT,
    CpuidFeature::MPX,
    CpuidFeature::PREFETCHITI,
];

/// Why an instruction is not compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Excluded {
    /// Its feature is not in [`OFFERED`]: the soft CPU has #UD where this host may execute it.
    NotOffered,
    /// It answers with this host's identity, time or configuration.
    HostSpecific,
    /// It shows or uses descriptor tables, which are not the host's; privileged behaviour has its own suite.
    Descriptors,
    /// It enters the host's kernel.
    SystemCall,
    /// Its result is an approximation; ours is defined by golden vectors (float module).
    Approximate,
    /// It stores x87 instruction and data pointers, which differ between models of CPU.
    X87Pointers,
}

/// Instructions that are not compared.
pub const EXCLUDED: &[(Excluded, &[Mnemonic])] = &[
    (Excluded::HostSpecific, &[Mnemonic::Cpuid, Mnemonic::Rdtsc, Mnemonic::Rdpmc]),
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
    (
        Excluded::X87Pointers,
        &[
            Mnemonic::Fnstenv,
            Mnemonic::Fstenv,
            Mnemonic::Fnsave,
            Mnemonic::Fsave,
            Mnemonic::Fxsave,
            Mnemonic::Fxsave64,
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
    if !code.cpuid_features().iter().all(|f| OFFERED.contains(f)) {
        return Err(Excluded::NotOffered);
    }
    let excluded = EXCLUDED.iter().find(|(_, list)| list.contains(&code.mnemonic())).map(|(why, _)| *why);
    let excluded =
        excluded.or(EXCLUDED_CODES.iter().find(|(_, list)| list.contains(&code)).map(|(why, _)| *why));
    excluded.map_or(Ok(()), Err)
}

/// All encodings of 64-bit mode that are compared.
pub fn entries() -> Vec<Entry> {
    all_codes().filter(|c| vet_code(*c).is_ok()).map(|code| Entry { code, class: class(code) }).collect()
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
        real && op.mode64() && op.intel_decoder64() && *c != Code::INVALID
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

/// Features that this host lacks of those offered: cases with their instructions cannot be compared.
pub fn missing_on_host() -> Vec<CpuidFeature> {
    let host = [
        (CpuidFeature::SSE3, is_x86_feature_detected!("sse3")),
        (CpuidFeature::SSSE3, is_x86_feature_detected!("ssse3")),
        (CpuidFeature::SSE4_1, is_x86_feature_detected!("sse4.1")),
        (CpuidFeature::SSE4_2, is_x86_feature_detected!("sse4.2")),
        (CpuidFeature::POPCNT, is_x86_feature_detected!("popcnt")),
        (CpuidFeature::CMPXCHG16B, is_x86_feature_detected!("cmpxchg16b")),
    ];
    host.into_iter().filter(|(_, has)| !has).map(|(f, _)| f).collect()
}
