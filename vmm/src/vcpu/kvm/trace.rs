//! The trace of synchronous exits: a digest chained over everything that the guest did at them.
//!
//! Position alone says how many exits there were. A check word an exit (the low bits of the chain) says that they were the
//! same: a replay that compares the words finds a difference at the exit where it shows, or, once in 65,536, at the next.

use kvm_bindings::kvm_regs;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::super::Exit;
use super::state;

/// See the module.
#[derive(Default)]
pub struct Trace {
    /// The chain so far.
    pub chain: u64,
    /// Check words that were not taken yet.
    words: Vec<u16>,
}

impl Trace {
    /// Goes on with a chain.
    pub fn from(chain: u64) -> Trace {
        Trace { chain, words: Vec::new() }
    }

    /// The guest asked, and was answered.
    pub fn access(&mut self, exit: &Exit, answer: u64) {
        let (kind, place, size, value) = match *exit {
            Exit::PioIn { port, size } => (1, port.into(), size, answer),
            Exit::PioOut { port, size, value } => (2, port.into(), size, value.into()),
            Exit::MmioRead { addr, size } => (3, addr, size, answer),
            Exit::MmioWrite { addr, size, value } => (4, addr, size, value),
            _ => (0, 0, 0, 0),
        };
        self.extend([kind, place, size.into(), value]);
    }

    /// The guest accessed a model-specific register; `value` is what it read or wrote, `None` is #GP.
    pub fn msr(&mut self, write: bool, number: u32, value: Option<u64>) {
        self.extend([5 + u64::from(write), number.into(), value.is_some().into(), value.unwrap_or(0)]);
    }

    /// The exit is over, and these are the registers behind it.
    pub fn complete(&mut self, regs: &kvm_regs) {
        self.extend(state::general(regs));
        self.extend([regs.rip, state::flags(regs)]);
        self.words.push(self.chain as u16);
    }

    /// The check words of the exits since the last call.
    pub fn take(&mut self) -> Vec<u16> {
        std::mem::take(&mut self.words)
    }

    fn extend<const N: usize>(&mut self, values: [u64; N]) {
        self.chain = xxh3_64_with_seed(values.map(u64::to_le_bytes).as_flattened(), self.chain);
    }
}
