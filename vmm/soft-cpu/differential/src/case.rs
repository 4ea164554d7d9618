//! A case: instructions in a form from which some can be left out, and the state that they start in.

use iced_x86::{Encoder, Instruction};

use crate::flow::{self, Flow, Reject};
use crate::layout::{CODE, CODE_LEN};
use crate::state::{CODE_MAX, PLANTED_MAX, Planted, Start};

/// One instruction of a case.
#[derive(Clone, Debug)]
pub struct Item {
    /// Prefixes before what the encoder makes: redundant, contradictory or illegal ones.
    pub prefixes: Vec<u8>,
    /// The instruction.
    pub ins: Instruction,
    /// The number of the item that a near branch goes to; the number of items means the end.
    pub target: Option<usize>,
    /// A byte of the encoding that is changed, and how (exclusive or).
    pub mutation: Option<(u8, u8)>,
}

/// A value of the start that is the address of an item.
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
    /// So many bytes into the first page.
    At(u64),
    /// With so many bytes before the page's end.
    Across(u64),
    /// With its end so many bytes before the end of all code pages; what is negative is cut off.
    Before(i64),
}

/// A case, as generated from its seed.
#[derive(Clone, Debug)]
pub struct Case {
    /// What it was made from.
    pub seed: u64,
    /// The items, with their numbers: those left out are missing.
    pub items: Vec<(usize, Item)>,
    /// Item addresses that the start holds.
    pub pointers: Vec<(Pointer, usize)>,
    /// Where the code goes.
    pub placement: Placement,
    /// The state, without code.
    pub start: Start,
}

/// A case ready to run.
#[derive(Clone, Debug)]
pub struct Built {
    /// What runs.
    pub start: Start,
    /// What it can do.
    pub flow: Flow,
}

impl Case {
    /// Assembles the case and checks that it can be compared.
    pub fn build(&self) -> Result<Built, Reject> {
        let length: u64 = self.assemble(CODE)?.iter().map(|b| b.len() as u64).sum();
        let at = match self.placement {
            Placement::At(offset) => CODE + offset,
            Placement::Across(before) => CODE + CODE_LEN / 2 - before.min(length),
            // At least one byte stays.
            Placement::Before(gap) => CODE + CODE_LEN - length.saturating_add_signed(gap).max(1),
        };
        let pieces = self.assemble(at)?;
        let starts = addresses(at, &pieces);
        let mut code = pieces.concat();
        code.truncate((CODE + CODE_LEN - at) as usize);
        if code.len() > CODE_MAX {
            return Err(Reject::NotEncodable);
        }
        let mut start = Start { rip: at, code, ..self.start.clone() };
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

    /// The bytes of each item when the first lies at `at`.
    fn assemble(&self, at: u64) -> Result<Vec<Vec<u8>>, Reject> {
        // Targets do not change lengths, so a first round gives all addresses.
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

    /// The address of item `number`, or of the next one that is left.
    fn address(&self, starts: &[u64], number: usize) -> u64 {
        let index = self.items.iter().position(|(n, _)| *n >= number).unwrap_or(self.items.len());
        starts[index]
    }
}

/// Where each piece begins, and where the last ends.
fn addresses(at: u64, pieces: &[Vec<u8>]) -> Vec<u64> {
    let mut starts = vec![at];
    starts.extend(pieces.iter().scan(at, |ip, p| {
        *ip += p.len() as u64;
        Some(*ip)
    }));
    starts
}
