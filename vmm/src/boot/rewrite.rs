//! Rewriting a kernel's instructions that read the time or random numbers into exits, whose values are then in the log.
//!
//! KVM cannot trap RDTSC and similar instructions, and Linux executes RDTSC although CPUID hides it. Each site (such an
//! instruction in an executable section of a vmlinux) becomes `out PORT, al`, padded with NOPs: this OUT has two bytes, as
//! many as the shortest of these instructions, and changes no register. After such an exit the machine looks up in [`Sites`]
//! which instruction was there, asks for a value, and lets [`Site::apply`] do what the instruction would have done. Code that
//! Linux copies over other code at boot (`.altinstr_replacement`) is rewritten too, and the places to which it may be copied
//! are sites as well.
//!
//! A section is decoded from its start. After bytes that are not an instruction, decoding may be out of step for a while: a
//! site found there is left as it is, and reported.

use std::collections::BTreeMap;
use std::fmt;

use entry::Question;
use iced_x86::{Code, Decoder, DecoderOptions, Instruction};

use super::kernel::{ElfSection, sections};
use crate::vcpu::GeneralRegisters;

/// Port of the exits. There is no device of the machine at this port, and none that Linux looks for.
pub const PORT: u8 = 0xeb;
/// Number of bytes after an invalid instruction whose decoding is not trusted.
const DOUBTFUL: u64 = 256;
/// CF, which RDRAND sets (SDM 2B).
const CARRY: u64 = 1;
/// CF, PF, AF, ZF, SF and OF; RDRAND clears all but CF.
const ARITHMETIC: u64 = 0x8d5;

/// An instruction that reads the time or random numbers: its result is not determined by the state of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum NondeterministicInsn {
    /// RDTSC: time-stamp counter.
    Rdtsc,
    /// RDTSCP: time-stamp counter and IA32_TSC_AUX.
    Rdtscp,
    /// RDPMC: a performance counter.
    Rdpmc,
    /// RDRAND: number and size in bytes of the destination register.
    Rdrand(u8, u8),
    /// RDSEED: number and size in bytes of the destination register.
    Rdseed(u8, u8),
}

impl NondeterministicInsn {
    fn of(instruction: &Instruction) -> Option<NondeterministicInsn> {
        let register = instruction.op0_register();
        let (number, bytes) = (register.full_register().number() as u8, register.size() as u8);
        Some(match instruction.code() {
            Code::Rdtsc => NondeterministicInsn::Rdtsc,
            Code::Rdtscp => NondeterministicInsn::Rdtscp,
            Code::Rdpmc => NondeterministicInsn::Rdpmc,
            Code::Rdrand_r16 | Code::Rdrand_r32 | Code::Rdrand_r64 => {
                NondeterministicInsn::Rdrand(number, bytes)
            }
            Code::Rdseed_r16 | Code::Rdseed_r32 | Code::Rdseed_r64 => {
                NondeterministicInsn::Rdseed(number, bytes)
            }
            _ => return None,
        })
    }

    /// Name of the instruction.
    pub fn name(self) -> &'static str {
        match self {
            NondeterministicInsn::Rdtsc => "rdtsc",
            NondeterministicInsn::Rdtscp => "rdtscp",
            NondeterministicInsn::Rdpmc => "rdpmc",
            NondeterministicInsn::Rdrand(..) => "rdrand",
            NondeterministicInsn::Rdseed(..) => "rdseed",
        }
    }
}

/// A rewritten instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Site {
    /// The instruction that was there.
    pub insn: NondeterministicInsn,
    /// Its length, bytes.
    pub len: u8,
}

/// Length of the OUT that replaces an instruction, bytes.
pub const OUT: u64 = 2;

impl Site {
    /// The question that the instruction asks at this guest time.
    pub fn question(&self, time_ns: u64) -> Question {
        match self.insn {
            NondeterministicInsn::Rdtsc | NondeterministicInsn::Rdtscp | NondeterministicInsn::Rdpmc => {
                Question::Time { time_ns }
            }
            NondeterministicInsn::Rdrand(..) | NondeterministicInsn::Rdseed(..) => Question::Random,
        }
    }

    /// Does to the registers what the instruction would have done with this value, after the OUT that replaces it. IA32_TSC_AUX
    /// is 0: no guest of such an engine can write it.
    pub fn apply(&self, value: u64, to: &mut GeneralRegisters) {
        to.rip += u64::from(self.len) - OUT;
        let gpr = &mut to.gpr;
        match self.insn {
            NondeterministicInsn::Rdtsc | NondeterministicInsn::Rdpmc => {
                (gpr[0], gpr[2]) = (value & 0xffff_ffff, value >> 32)
            }
            NondeterministicInsn::Rdtscp => {
                (gpr[0], gpr[2]) = (value & 0xffff_ffff, value >> 32);
                gpr[1] = 0;
            }
            NondeterministicInsn::Rdrand(register, bytes) | NondeterministicInsn::Rdseed(register, bytes) => {
                let register = &mut gpr[register as usize & 15];
                *register = match bytes {
                    2 => *register & !0xffff | value & 0xffff,
                    4 => value & 0xffff_ffff,
                    _ => value,
                };
                to.rflags = to.rflags & !ARITHMETIC | CARRY;
            }
        }
    }
}

/// The rewritten sites, by linear address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sites(BTreeMap<u64, Site>);

impl Sites {
    /// The site at this address.
    pub fn find(&self, rip: u64) -> Option<Site> {
        self.0.get(&rip).copied()
    }

    /// Addresses with their sites, ascending.
    pub fn iter(&self) -> impl Iterator<Item = (u64, Site)> + '_ {
        self.0.iter().map(|(at, site)| (*at, *site))
    }
}

/// Result of rewriting a kernel.
#[derive(Clone, Debug)]
pub struct Rewritten {
    /// The addresses at which the rewritten kernel makes an exit.
    pub sites: Sites,
    /// Number of rewritten instructions in the file, by name. One may be copied to several addresses.
    pub instructions: BTreeMap<&'static str, usize>,
    /// Addresses of instructions that were left as they are. If the guest executes one, a replay may differ.
    pub not_rewritten: Vec<(u64, NondeterministicInsn)>,
}

impl Rewritten {
    /// Whether there was nothing to rewrite.
    pub fn is_empty(&self) -> bool {
        self.instructions.is_empty() && self.not_rewritten.is_empty()
    }
}

impl fmt::Display for Rewritten {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts: Vec<_> = self.instructions.iter().map(|(name, n)| format!("{n} {name}")).collect();
        let counts = if counts.is_empty() { "nothing".into() } else { counts.join(", ") };
        write!(f, "rewritten instructions of the kernel: {counts}; at {} addresses", self.sites.0.len())?;
        for (at, asks) in &self.not_rewritten {
            write!(
                f,
                "\nwarning: {} at {at:#x} cannot be rewritten safely; if the guest executes it, a replay may differ",
                asks.name()
            )?;
        }
        Ok(())
    }
}

/// Rewrites a vmlinux. Returns the file to boot, and what was rewritten in it. `None`: the file is not an ELF file with
/// sections, so its code cannot be found; the caller should warn.
pub fn rewrite(file: &[u8]) -> Option<(Vec<u8>, Rewritten)> {
    let sections = sections(file)?;
    let mut new = file.to_vec();
    let mut result =
        Rewritten { sites: Sites::default(), instructions: BTreeMap::new(), not_rewritten: Vec::new() };
    let replacements = replacements(file, &sections);
    for section in sections.iter().filter(|s| s.executable) {
        let pieces = pieces(section, &replacements);
        for (start, len) in pieces {
            let Some(code) = file.get(start..start + len) else { continue };
            let address = section.address + (start - section.offset) as u64;
            let sweep = sweep(code, address);
            for (at, site, safe) in sweep {
                if !safe {
                    result.not_rewritten.push((at, site.insn));
                    continue;
                }
                let offset = start + (at - address) as usize;
                let bytes = &mut new[offset..offset + site.len as usize];
                bytes.fill(0x90);
                bytes[..2].copy_from_slice(&[0xe6, PORT]);
                *result.instructions.entry(site.insn.name()).or_default() += 1;
                result.sites.0.insert(at, site);
                for copy in replacements.iter().filter(|r| (r.from..r.from + r.len).contains(&at)) {
                    result.sites.0.insert(copy.to + (at - copy.from), site);
                }
            }
        }
    }
    Some((new, result))
}

/// Code that Linux may copy over other code.
#[derive(Clone, Copy, Debug)]
struct Replacement {
    from: u64,
    to: u64,
    len: u64,
}

/// The entries of `.altinstructions` (struct alt_instr): offsets of the instruction and of its replacement, each relative to
/// its own field, then 2 bytes of flags (Linux up to 6.2) or 4, and the two lengths.
fn replacements(file: &[u8], sections: &[ElfSection]) -> Vec<Replacement> {
    let named = |name: &str| sections.iter().find(|s| s.name == name);
    let (Some(table), Some(code)) = (named(".altinstructions"), named(".altinstr_replacement")) else {
        return Vec::new();
    };
    let Some(bytes) = file.get(table.offset..table.offset + table.len) else { return Vec::new() };
    let entries = |size: usize| -> Option<Vec<Replacement>> {
        let entry = |(n, e): (usize, &[u8])| {
            let at = table.address + (n * size) as u64;
            let field = |o: usize| Some(i64::from(i32::from_le_bytes(*e[o..].first_chunk()?)));
            let to = at.wrapping_add_signed(field(0)?);
            let from = (at + 4).wrapping_add_signed(field(4)?);
            let len = u64::from(e[size - 1]);
            let inside = from >= code.address && from + len <= code.address + code.len as u64;
            inside.then_some(Replacement { from, to, len })
        };
        bytes.len().is_multiple_of(size).then(|| bytes.chunks(size).enumerate().map(entry).collect())?
    };
    entries(12).or_else(|| entries(14)).unwrap_or_default()
}

/// The pieces of a section to be decoded separately: all of it, or each replacement in the section of replacements. Start in
/// the file and length.
fn pieces(section: &ElfSection, replacements: &[Replacement]) -> Vec<(usize, usize)> {
    if section.name != ".altinstr_replacement" || replacements.is_empty() {
        return vec![(section.offset, section.len)];
    }
    let mut pieces: Vec<_> = replacements
        .iter()
        .map(|r| (section.offset + (r.from - section.address) as usize, r.len as usize))
        .collect();
    pieces.sort_unstable();
    pieces.dedup();
    pieces
}

/// The sites in a piece of code with their addresses, and whether the decoding can be trusted there.
fn sweep(code: &[u8], address: u64) -> Vec<(u64, Site, bool)> {
    let mut decoder = Decoder::with_ip(64, code, address, DecoderOptions::NONE);
    let mut found = Vec::new();
    let mut doubtful_until = 0;
    let mut instruction = Instruction::default();
    while decoder.can_decode() {
        decoder.decode_out(&mut instruction);
        let at = instruction.ip();
        if instruction.is_invalid() {
            doubtful_until = at + DOUBTFUL;
        } else if let Some(asks) = NondeterministicInsn::of(&instruction) {
            let site = Site { insn: asks, len: instruction.len() as u8 };
            found.push((at, site, at >= doubtful_until));
        }
    }
    found
}

#[cfg(test)]
#[path = "rewrite_tests.rs"]
mod tests;
