//! The seam for a tier that runs translated code in place of [`crate::run`]'s interpreter.
//!
//! A translator is given blocks that the interpreter has run often, and runs them when the CPU comes to them again. Its code
//! does what the handlers of the block's instructions do, one after another; where it has no code of its own for an
//! instruction, or not all at hand, it calls the handler ([`perform`]). It runs nothing that needs the run loop's care: no
//! instruction of [`crate::decode::Place::Alone`], and none behind one that may change what the run loop looks at.

use std::mem::offset_of;

use crate::exit::Stop;
use crate::flags::Flags;
use crate::insn::Insn;
use crate::state::Cpu;
use crate::tlb::{FastEntry, FastTlb};

/// What came of running translated code.
pub enum Ran {
    /// RIP is at the start of some block.
    On,
    /// This instruction, at this address, did not simply finish.
    Stopped(Stop, Insn, u64),
}

/// A translator of blocks. All of it is invisible to the guest: it may forget anything at any time.
pub trait Translator: Send {
    /// Translates the block of `count` instructions at RAM offset `start`, which comes without one of
    /// [`crate::decode::Place::Alone`]. Says whether it could.
    fn translate(&mut self, ram: &[u8], start: usize, count: usize) -> bool;

    /// Notes that the block at RIP, whose fetch the instruction TLB has just allowed, is at RAM offset `start`. Says whether
    /// its translation is still there.
    fn link(&mut self, cpu: &Cpu, start: usize) -> bool;

    /// Runs translated code from RIP on, for at most `budget` instructions, and counts what retired. `None`, and nothing
    /// has happened, where none can be run.
    fn run(&mut self, cpu: &mut Cpu, ram: &mut [u8], budget: u64) -> Option<Ran>;

    /// Forgets the blocks of a page of RAM.
    fn invalidate(&mut self, page: usize);
}

/// Executes one instruction by its handler: what [`Ran::Stopped`] and a translator's slow paths are made of. RIP is as the
/// handler expects it: behind the instruction where it ends its block.
#[inline]
pub fn perform(cpu: &mut Cpu, ram: &mut [u8], insn: &Insn) -> Result<(), Stop> {
    (insn.exec)(cpu, ram, std::slice::from_ref(insn))
}

/// Where translated code finds the parts of a [`Cpu`]: offsets from its start, bytes.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// [`Cpu::regs`].
    pub regs: i32,
    /// [`Cpu::rip`].
    pub rip: i32,
    /// What ZF is: set when this is 0. Flags are as [`crate::flags`] describes.
    pub zero: i32,
    /// SF and PF.
    pub sign: i32,
    /// The carry vector.
    pub carry: i32,
}

/// See [`Layout`].
pub const LAYOUT: Layout = {
    let flags = offset_of!(Cpu, flags);
    let (zero, sign, carry) = Flags::OFFSETS;
    Layout {
        regs: offset_of!(Cpu, regs) as i32,
        rip: offset_of!(Cpu, rip) as i32,
        zero: (flags + zero) as i32,
        sign: (flags + sign) as i32,
        carry: (flags + carry) as i32,
    }
};

/// Where translated code finds the parts of an entry of the fast TLB ([`Cpu::fast_entries`]): its size, and the offsets of
/// the linear page that may be read, of the one that may be written, and of where the page begins in RAM.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub struct FastLayout {
    pub size: usize,
    pub read: i32,
    pub write: i32,
    pub ram: i32,
}

/// See [`FastLayout`].
pub const FAST_LAYOUT: FastLayout = FastLayout {
    size: size_of::<FastEntry>(),
    read: offset_of!(FastEntry, read) as i32,
    write: offset_of!(FastEntry, write) as i32,
    ram: offset_of!(FastEntry, ram) as i32,
};

impl Cpu {
    /// The fast TLB that applies now: [`crate::tlb::DATA_ENTRIES`] entries, direct-mapped by linear page. An entry's page
    /// lies wholly in RAM.
    pub fn fast_entries(&self) -> *const u8 {
        FastTlb::entries(&self.fast, self.mode).cast()
    }

    /// Instructions are fetched with user rights: which of two caches of fetches applies.
    pub fn fetches_as_user(&self) -> bool {
        self.user()
    }
}
