//! The trace of synchronous exits: a chained digest of everything that the guest did at them.
//!
//! A position only tells how many exits there were. A check word for each exit (the low bits of the chain) tells whether they
//! were the same: a replay that compares the words finds a difference at the exit where it shows or, in one case of 65,536, at
//! the next.

use kvm_bindings::kvm_regs;
use twox_hash::XxHash3_64;

use super::super::Exit;
use super::state;

/// The trace of a vCPU's synchronous exits.
#[derive(Default)]
pub struct ExitTrace {
    /// The chained digest so far.
    pub chain: u64,
    /// The check words that were not taken yet.
    words: Vec<u16>,
}

impl ExitTrace {
    /// A trace that continues a chain.
    pub fn resumed(chain: u64) -> ExitTrace {
        ExitTrace { chain, words: Vec::new() }
    }

    /// Adds an access of the guest, with its registers and the answer.
    pub fn add_access(&mut self, regs: &kvm_regs, exit: &Exit, answer: u64) {
        let (kind, place, size, value) = match *exit {
            Exit::PioIn { port, size } => (1, port.into(), size, answer),
            Exit::PioOut { port, size, value } => (2, port.into(), size, value.into()),
            Exit::MmioRead { addr, size } => (3, addr, size, answer),
            Exit::MmioWrite { addr, size, value } => (4, addr, size, value),
            _ => (0, 0, 0, 0),
        };
        self.extend(regs, [kind, place, size.into(), value]);
    }

    /// Adds an access to a model-specific register. `value` is what the guest read or wrote; `None`: it got #GP.
    pub fn add_msr(&mut self, regs: &kvm_regs, write: bool, number: u32, value: Option<u64>) {
        let kind = 5 + u64::from(write);
        self.extend(regs, [kind, number.into(), value.is_some().into(), value.unwrap_or(0)]);
    }

    /// Adds a HLT.
    pub fn add_halt(&mut self, regs: &kvm_regs) {
        self.extend(regs, [7, 0, 0, 0]);
    }

    /// Ends the exit, and makes its check word.
    pub fn end_exit(&mut self) {
        self.words.push(self.chain as u16);
    }

    /// Takes the check words of the exits since the last call.
    pub fn take_check_words(&mut self) -> Vec<u16> {
        std::mem::take(&mut self.words)
    }

    /// Extends the chain by the access and the registers at the exit. To read the registers after the instruction would cost
    /// another entry; they are in the digest of the next exit.
    fn extend(&mut self, regs: &kvm_regs, [kind, place, size, value]: [u64; 4]) {
        let mut words = [0; 22];
        words[..4].copy_from_slice(&[kind, place, size, value]);
        words[4..20].copy_from_slice(&state::general(regs));
        words[20..].copy_from_slice(&[regs.rip, state::flags(regs)]);
        self.chain = XxHash3_64::oneshot_with_seed(self.chain, words.map(u64::to_le_bytes).as_flattened());
    }
}
