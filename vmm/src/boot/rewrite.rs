//! Instructions of a kernel that tell the time or chance, turned into exits whose value is in the log.
//!
//! KVM cannot trap RDTSC and its like, and Linux executes it though CPUID hides it. Each site in the executable sections of
//! a vmlinux becomes `out PORT, al`, padded by NOPs: two bytes, as long as the shortest of them, that change no register.
//! Behind such an exit the machine looks up in [`Sites`] where it came from, asks for a value and lets [`Site::apply`] do
//! what the instruction would have done. The code that Linux copies over other code at boot (`.altinstr_replacement`) is
//! rewritten too, and the places it may be copied to are sites.
//!
//! A section is decoded from its start. Where something on the way is no instruction, what follows closely may be out of
//! step; a site there is not touched but named, as are those of kernels that are not ELF files.

use std::collections::BTreeMap;
use std::fmt;

use entry::Question;
use iced_x86::{Code, Decoder, DecoderOptions, Instruction};

use super::kernel::{Section, sections};
use crate::vcpu::General;

/// Port of the exits. No device of the machine and none that Linux looks for is there.
pub const PORT: u8 = 0xeb;
/// After something that is no instruction so many bytes are not trusted.
const DOUBTFUL: u64 = 256;
/// Flags that RDRAND sets: CF, and clears: OF, SF, ZF, AF, PF (SDM 2B).
const CARRY: u64 = 1;
const ARITHMETIC: u64 = 0x8d5;

/// What an instruction asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Asks {
    /// RDTSC: time-stamp counter.
    Rdtsc,
    /// RDTSCP: time-stamp counter and IA32_TSC_AUX.
    Rdtscp,
    /// RDPMC: a performance counter.
    Rdpmc,
    /// RDRAND into a register of so many bytes.
    Rdrand(u8, u8),
    /// RDSEED into a register of so many bytes.
    Rdseed(u8, u8),
}

impl Asks {
    fn of(instruction: &Instruction) -> Option<Asks> {
        let register = instruction.op0_register();
        let (number, bytes) = (register.full_register().number() as u8, register.size() as u8);
        Some(match instruction.code() {
            Code::Rdtsc => Asks::Rdtsc,
            Code::Rdtscp => Asks::Rdtscp,
            Code::Rdpmc => Asks::Rdpmc,
            Code::Rdrand_r16 | Code::Rdrand_r32 | Code::Rdrand_r64 => Asks::Rdrand(number, bytes),
            Code::Rdseed_r16 | Code::Rdseed_r32 | Code::Rdseed_r64 => Asks::Rdseed(number, bytes),
            _ => return None,
        })
    }

    /// The instruction's name.
    pub fn name(self) -> &'static str {
        match self {
            Asks::Rdtsc => "rdtsc",
            Asks::Rdtscp => "rdtscp",
            Asks::Rdpmc => "rdpmc",
            Asks::Rdrand(..) => "rdrand",
            Asks::Rdseed(..) => "rdseed",
        }
    }
}

/// A rewritten instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Site {
    /// What it was.
    pub asks: Asks,
    /// Its length, bytes.
    pub len: u8,
}

/// Bytes of the OUT that stands in an instruction's place.
pub const OUT: u64 = 2;

impl Site {
    /// What it asks, at this guest time.
    pub fn question(&self, time_ns: u64) -> Question {
        match self.asks {
            Asks::Rdtsc | Asks::Rdtscp | Asks::Rdpmc => Question::Time { time_ns },
            Asks::Rdrand(..) | Asks::Rdseed(..) => Question::Random,
        }
    }

    /// Does what the instruction would have done with this value, behind the OUT in its place. IA32_TSC_AUX is 0: no guest of
    /// such an engine can write it.
    pub fn apply(&self, value: u64, to: &mut General) {
        to.rip += u64::from(self.len) - OUT;
        let gpr = &mut to.gpr;
        match self.asks {
            Asks::Rdtsc | Asks::Rdpmc => (gpr[0], gpr[2]) = (value & 0xffff_ffff, value >> 32),
            Asks::Rdtscp => {
                (gpr[0], gpr[2]) = (value & 0xffff_ffff, value >> 32);
                gpr[1] = 0;
            }
            Asks::Rdrand(register, bytes) | Asks::Rdseed(register, bytes) => {
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

/// All rewritten sites by linear address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sites(BTreeMap<u64, Site>);

impl Sites {
    /// The site at this address.
    pub fn at(&self, rip: u64) -> Option<Site> {
        self.0.get(&rip).copied()
    }

    /// Addresses with their sites, ascending.
    pub fn iter(&self) -> impl Iterator<Item = (u64, Site)> + '_ {
        self.0.iter().map(|(at, site)| (*at, *site))
    }
}

/// What came of rewriting a kernel.
#[derive(Clone, Debug)]
pub struct Rewritten {
    /// Where it leaves now.
    pub sites: Sites,
    /// Instructions rewritten in the file, which may be copied to more than one place.
    pub instructions: BTreeMap<&'static str, usize>,
    /// What was left as it is, and would make a replay differ if it is executed.
    pub left: Vec<(u64, Asks)>,
}

impl Rewritten {
    /// There was nothing to rewrite.
    pub fn is_empty(&self) -> bool {
        self.instructions.is_empty() && self.left.is_empty()
    }
}

impl fmt::Display for Rewritten {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts: Vec<_> = self.instructions.iter().map(|(name, n)| format!("{n} {name}")).collect();
        let counts = if counts.is_empty() { "nothing".into() } else { counts.join(", ") };
        write!(f, "rewritten: {counts}; {} addresses", self.sites.0.len())?;
        for (at, asks) in &self.left {
            write!(f, "\nwarning: {} at {at:#x} cannot be rewritten safely and stays", asks.name())?;
        }
        Ok(())
    }
}

/// Rewrites a vmlinux: the file to boot, and what is different in it. `None`: it is no ELF file with sections, so nothing
/// is known of its code; warn.
pub fn rewrite(file: &[u8]) -> Option<(Vec<u8>, Rewritten)> {
    let sections = sections(file)?;
    let mut new = file.to_vec();
    let mut result = Rewritten { sites: Sites::default(), instructions: BTreeMap::new(), left: Vec::new() };
    let replacements = replacements(file, &sections);
    for section in sections.iter().filter(|s| s.executable) {
        let pieces = pieces(section, &replacements);
        for (start, len) in pieces {
            let Some(code) = file.get(start..start + len) else { continue };
            let address = section.address + (start - section.offset) as u64;
            let sweep = sweep(code, address);
            for (at, site, safe) in sweep {
                if !safe {
                    result.left.push((at, site.asks));
                    continue;
                }
                let offset = start + (at - address) as usize;
                let bytes = &mut new[offset..offset + site.len as usize];
                bytes.fill(0x90);
                bytes[..2].copy_from_slice(&[0xe6, PORT]);
                *result.instructions.entry(site.asks.name()).or_default() += 1;
                result.sites.0.insert(at, site);
                for copy in replacements.iter().filter(|r| (r.from..r.from + r.len).contains(&at)) {
                    result.sites.0.insert(copy.to + (at - copy.from), site);
                }
            }
        }
    }
    Some((new, result))
}

/// Code that may be copied over other code.
#[derive(Clone, Copy, Debug)]
struct Replacement {
    from: u64,
    to: u64,
    len: u64,
}

/// The entries of `.altinstructions` (struct alt_instr): offsets of instruction and replacement from their own fields,
/// then flags of 2 bytes (Linux up to 6.2) or 4, and the two lengths.
fn replacements(file: &[u8], sections: &[Section]) -> Vec<Replacement> {
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

/// What to decode in one go: a section, or each replacement of the section that has them.
fn pieces(section: &Section, replacements: &[Replacement]) -> Vec<(usize, usize)> {
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

/// The sites of a piece of code, and whether its decoding is beyond doubt there.
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
        } else if let Some(asks) = Asks::of(&instruction) {
            let site = Site { asks, len: instruction.len() as u8 };
            found.push((at, site, at >= doubtful_until));
        }
    }
    found
}

#[cfg(test)]
#[path = "rewrite_tests.rs"]
mod tests;
