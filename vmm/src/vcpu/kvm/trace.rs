//! The trace of synchronous exits: a digest chained over everything that the guest did at them.
//!
//! Position alone says how many exits there were. A check word an exit (the low bits of the chain) says that they were the
//! same: a replay that compares the words finds a difference at the exit where it shows, or, once in 65,536, at the next.

use kvm_bindings::kvm_regs;
use twox_hash::XxHash3_64;

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

    /// The guest asked, with these registers, and was answered.
    pub fn access(&mut self, regs: &kvm_regs, exit: &Exit, answer: u64) {
        let (kind, place, size, value) = match *exit {
            Exit::PioIn { port, size } => (1, port.into(), size, answer),
            Exit::PioOut { port, size, value } => (2, port.into(), size, value.into()),
            Exit::MmioRead { addr, size } => (3, addr, size, answer),
            Exit::MmioWrite { addr, size, value } => (4, addr, size, value),
            _ => (0, 0, 0, 0),
        };
        self.extend(regs, [kind, place, size.into(), value]);
    }

    /// The guest accessed a model-specific register; `value` is what it read or wrote, `None` is #GP.
    pub fn msr(&mut self, regs: &kvm_regs, write: bool, number: u32, value: Option<u64>) {
        let kind = 5 + u64::from(write);
        self.extend(regs, [kind, number.into(), value.is_some().into(), value.unwrap_or(0)]);
    }

    /// The guest sleeps.
    pub fn halt(&mut self, regs: &kvm_regs) {
        self.extend(regs, [7, 0, 0, 0]);
    }

    /// The exit is over.
    pub fn complete(&mut self) {
        self.words.push(self.chain as u16);
    }

    /// The check words of the exits since the last call.
    pub fn take(&mut self) -> Vec<u16> {
        std::mem::take(&mut self.words)
    }

    /// Extends the chain by what was asked and the registers with which KVM left. Those behind the instruction would cost
    /// another entry; they are seen at the next exit.
    fn extend(&mut self, regs: &kvm_regs, [kind, place, size, value]: [u64; 4]) {
        let mut words = [0; 22];
        words[..4].copy_from_slice(&[kind, place, size, value]);
        words[4..20].copy_from_slice(&state::general(regs));
        words[20..].copy_from_slice(&[regs.rip, state::flags(regs)]);
        self.chain = XxHash3_64::oneshot_with_seed(self.chain, words.map(u64::to_le_bytes).as_flattened());
    }
}
