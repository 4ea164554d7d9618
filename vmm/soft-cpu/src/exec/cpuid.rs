//! CPUID: exactly the features that this CPU has.
//!
//! The vendor is GenuineIntel, because only then does Linux take the frequency of the time-stamp counter from
//! leaves 15h and 16h; otherwise it calibrates against a timer. The model is family 6 model 28, an in-order
//! core that kernels know to be free of speculation bugs, so that they do without costly mitigations.

use iced_x86::{Instruction, Mnemonic};

use crate::exit::CpuStop;
use crate::insn::{Insn, PlaceInBlock, threaded};
use crate::paging::PHYSICAL_BITS;
use crate::state::{Cpu, reg};

/// Frequency of the time-stamp counter: guest time in ns.
const TSC_HZ: u32 = 1_000_000_000;
/// Highest basic leaf.
const BASIC_MAX: u32 = 0x16;
/// Highest extended leaf.
const EXTENDED_MAX: u32 = 0x8000_0008;
/// Leaf with the hypervisor's name.
const HYPERVISOR: u32 = 0x4000_0000;

/// Family 6, model 28, stepping 10.
const SIGNATURE: u32 = 0x106ca;
/// Leaf 1 EBX: CLFLUSH lines of 64 bytes, one logical processor.
const LEAF1_EBX: u32 = 8 << 8 | 1 << 16;
/// SSE3, SSSE3, CMPXCHG16B, SSE4.1, SSE4.2, POPCNT, hypervisor.
const LEAF1_ECX: u32 = 1 << 0 | 1 << 9 | 1 << 13 | 1 << 19 | 1 << 20 | 1 << 23 | 1 << 31;
/// FPU, DE, PSE, TSC, MSR, PAE, CMPXCHG8B, SEP, PGE, CMOV, PAT, CLFLUSH, MMX, FXSR, SSE, SSE2.
const LEAF1_EDX: u32 = 1 << 0
    | 0xf << 2
    | 1 << 6
    | 1 << 8
    | 1 << 11
    | 1 << 13
    | 1 << 15
    | 1 << 16
    | 1 << 19
    | 1 << 23
    | 1 << 24
    | 1 << 25
    | 1 << 26;
/// IA32_TSC_ADJUST: with it Linux trusts the TSC without a watchdog.
const LEAF7_EBX: u32 = 1 << 1;
/// LAHF and SAHF in 64-bit mode.
const EXTENDED_ECX: u32 = 1 << 0;
/// SYSCALL, NX, 1 GiB pages, RDTSCP, long mode.
const EXTENDED_EDX: u32 = 1 << 11 | 1 << 20 | 1 << 26 | 1 << 27 | 1 << 29;
/// The TSC runs at a constant rate and never stops.
const INVARIANT_TSC: u32 = 1 << 8;

const BRAND: &[u8; 48] = b"vmft deterministic x86-64 CPU\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

/// EAX, EBX, ECX, EDX of a leaf. Leaves that do not exist are all zero.
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    match leaf {
        0 => named(BASIC_MAX, *b"GenuntelineI"),
        1 => [SIGNATURE, LEAF1_EBX, LEAF1_ECX, LEAF1_EDX],
        // Descriptor FFh: the caches are in leaf 4.
        2 => [0x00ff_0001, 0, 0, 0],
        4 => cache(subleaf),
        7 if subleaf == 0 => [0, LEAF7_EBX, 0, 0],
        // TSC = crystal clock * EBX / EAX.
        0x15 => [1, 1, TSC_HZ, 0],
        // Base, maximum and bus frequency, MHz.
        0x16 => [TSC_HZ / 1_000_000, TSC_HZ / 1_000_000, 100, 0],
        HYPERVISOR => named(HYPERVISOR, *b"vmft vmft   "),
        0x8000_0000 => [EXTENDED_MAX, 0, 0, 0],
        0x8000_0001 => [0, 0, EXTENDED_ECX, EXTENDED_EDX],
        0x8000_0002..=0x8000_0004 => {
            let at = (leaf - 0x8000_0002) as usize * 16;
            std::array::from_fn(|n| word(&BRAND[at + 4 * n..]))
        }
        // L2: 2 MiB, 8 ways, lines of 64 bytes.
        0x8000_0006 => [0, 0, 2048 << 16 | 6 << 12 | 64, 0],
        0x8000_0007 => [0, 0, 0, INVARIANT_TSC],
        0x8000_0008 => [48 << 8 | PHYSICAL_BITS, 0, 0, 0],
        _ => [0; 4],
    }
}

fn word(b: &[u8]) -> u32 {
    b.first_chunk().map_or(0, |b| u32::from_le_bytes(*b))
}

/// A leaf with a number in EAX and a name in EBX, ECX, EDX.
fn named(eax: u32, name: [u8; 12]) -> [u32; 4] {
    [eax, word(&name), word(&name[4..]), word(&name[8..])]
}

/// Cache parameters: 32 KiB each for data and code, 2 MiB unified. There are no caches, but C libraries
/// choose their copying loops by these sizes.
fn cache(subleaf: u32) -> [u32; 4] {
    let (kind, level, sets) = match subleaf {
        0 => (1, 1, 64),
        1 => (2, 1, 64),
        2 => (3, 2, 4096),
        _ => return [0; 4],
    };
    let (ways, line) = (8, 64);
    [kind | level << 5 | 1 << 8, (ways - 1) << 22 | (line - 1), sets - 1, 0]
}

fn run(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    let values = cpuid(cpu.reg(reg::RAX), cpu.reg(reg::RCX));
    for (r, v) in [reg::RAX, reg::RBX, reg::RCX, reg::RDX].into_iter().zip(values) {
        cpu.set_reg(r, v);
    }
    Ok(())
}

/// Handlers of this family.
pub fn select(ins: &Instruction, insn: &mut Insn) -> Option<PlaceInBlock> {
    if ins.mnemonic() != Mnemonic::Cpuid {
        return None;
    }
    insn.exec = threaded!(run);
    Some(PlaceInBlock::Middle)
}
