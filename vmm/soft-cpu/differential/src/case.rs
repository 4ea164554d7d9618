//! A case: instructions, in a form that allows leaving out some of them, and the state that they start in.

use iced_x86::{Encoder, Instruction};

use crate::flow::{self, Flow, Reject};
use crate::layout::{CODE, CODE_LEN};
use crate::state::{CODE_MAX, CaseStart, PLANTED_MAX, Planted};

/// One instruction of a case.
#[derive(Clone, Debug)]
pub struct Item {
    /// Prefixes before the encoder's output: redundant, contradictory or illegal ones.
    pub prefixes: Vec<u8>,
    /// The instruction.
    pub ins: Instruction,
    /// The number of the item that a near branch goes to; the number of items means the end.
    pub target: Option<usize>,
    /// The index of a byte of the encoding that is changed, and the value it is XORed with.
    pub mutation: Option<(u8, u8)>,
}

/// A value in the start state that is the address of an item.
#[derive(Clone, Copy, Debug)]
pub enum Pointer {
    /// In a general register.
    Register(usize),
    /// In memory.
    Memory(u64),
}

/// Where the code goes.
#[derive(Clone, Copy, Debug)]
pub enum Placement {
    /// At this offset in the first page.
    At(u64),
    /// Across the boundary of the two pages, with this many bytes before it.
    Across(u64),
    /// With its end this many bytes before the end of all code pages; with a negative number the rest is cut
    /// off.
    Before(i64),
}

/// A case, as generated from its seed.
#[derive(Clone, Debug)]
pub struct Case {
    /// The seed that it was generated from.
    pub seed: u64,
    /// The items, with their numbers; items that were left out are missing.
    pub items: Vec<(usize, Item)>,
    /// Values in the start state that are addresses of items.
    pub pointers: Vec<(Pointer, usize)>,
    /// Where the code goes.
    pub placement: Placement,
    /// The start state, without code.
    pub start: CaseStart,
}

/// A case ready to run.
#[derive(Clone, Debug)]
pub struct Built {
    /// The start state, with code.
    pub start: CaseStart,
    /// The instructions that it can reach.
    pub flow: Flow,
}

impl Case {
    /// Assembles the case and checks that it can be compared.
    pub fn build(&self) -> Result<Built, Reject> {
        let length: u64 = self.assemble(CODE)?.iter().map(|b| b.len() as u64).sum();
        let at = match self.placement {
            Placement::At(offset) => CODE + offset,
            Placement::Across(before) => CODE + CODE_LEN / 2 - before.min(length),
            // At least one byte of code stays.
            Placement::Before(gap) => CODE + CODE_LEN - length.saturating_add_signed(gap).max(1),
        };
        let pieces = self.assemble(at)?;
        let starts = addresses(at, &pieces);
        let mut code = pieces.concat();
        code.truncate((CODE + CODE_LEN - at) as usize);
        if code.len() > CODE_MAX {
            return Err(Reject::NotEncodable);
        }
        let mut start = CaseStart { rip: at, code, ..self.start.clone() };
        let mut roots = vec![at];
        for (pointer, target) in &self.pointers {
            let address = self.address(&starts, *target);
            roots.push(address);
            match pointer {
                Pointer::Register(r) => start.gpr[*r] = address,
                Pointer::Memory(at) => {
                    let mut bytes = [0; 16];
                    bytes[..8].copy_from_slice(&address.to_le_bytes());
                    start.planted.push(Planted { at: *at, len: 8, bytes });
                }
            }
        }
        if start.planted.len() > PLANTED_MAX {
            return Err(Reject::NotEncodable);
        }
        let flow = flow::analyse(&start.code, at, &roots)?;
        Ok(Built { start, flow })
    }

    /// The bytes of each item if the first is at `at`.
    fn assemble(&self, at: u64) -> Result<Vec<Vec<u8>>, Reject> {
        // Branch targets do not change lengths, so that a first pass gives all addresses.
        let first = self.encode_all(at, None)?;
        let starts = addresses(at, &first);
        self.encode_all(at, Some(&starts))
    }

    fn encode_all(&self, at: u64, starts: Option<&[u64]>) -> Result<Vec<Vec<u8>>, Reject> {
        let mut ip = at;
        let mut pieces = Vec::with_capacity(self.items.len());
        for (_, item) in &self.items {
            let piece = self.encode(item, ip, starts)?;
            ip += piece.len() as u64;
            pieces.push(piece);
        }
        Ok(pieces)
    }

    fn encode(&self, item: &Item, ip: u64, starts: Option<&[u64]>) -> Result<Vec<u8>, Reject> {
        let ip = ip + item.prefixes.len() as u64;
        let mut ins = item.ins;
        if let Some(target) = item.target {
            ins.set_near_branch64(starts.map_or(ip + 2, |s| self.address(s, target)));
        }
        let mut encoder = Encoder::new(64);
        encoder.encode(&ins, ip).map_err(|_| Reject::NotEncodable)?;
        let mut bytes = item.prefixes.clone();
        bytes.extend(encoder.take_buffer());
        if let Some((at, change)) = item.mutation {
            let n = bytes.len();
            bytes[at as usize % n] ^= change;
        }
        Ok(bytes)
    }

    /// The address of item `number` or, if that was left out, of the next one.
    fn address(&self, starts: &[u64], number: usize) -> u64 {
        let index = self.items.iter().position(|(n, _)| *n >= number).unwrap_or(self.items.len());
        starts[index]
    }
}

/// The address of each piece, and of the end of the last.
fn addresses(at: u64, pieces: &[Vec<u8>]) -> Vec<u64> {
    let mut starts = vec![at];
    starts.extend(pieces.iter().scan(at, |ip, p| {
        *ip += p.len() as u64;
        Some(*ip)
    }));
    starts
}
