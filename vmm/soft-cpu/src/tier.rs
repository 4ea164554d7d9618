//! The interface to a second tier, which runs translated code in place of [`crate::run`]'s interpreter.
//!
//! A translator is given blocks that the interpreter has run often, and runs them when the CPU comes to them
//! again. Its code does what the handlers of the block's instructions do, one after another. For an
//! instruction that it does not translate, or whose access the fast TLB does not allow, it calls the handler
//! ([`perform`]). It runs nothing that needs the run loop: no instruction of
//! [`crate::insn::PlaceInBlock::Alone`], and none after one that may change what the run loop checks.

use std::mem::offset_of;

use crate::exit::CpuStop;
use crate::flags::Flags;
use crate::insn::Insn;
use crate::state::Cpu;
use crate::tlb::{FastEntry, FastTlb};

/// How translated code ended.
pub enum Ran {
    /// It has left at RIP, the start of some block.
    AtBlock,
    /// This instruction, at this address, did not simply finish.
    Stopped(CpuStop, Insn, u64),
}

/// A translator of blocks. It is invisible to the guest, and may forget any translation at any time.
pub trait Translator: Send {
    /// Translates the block of `count` instructions at RAM offset `start`, none of which is
    /// [`crate::insn::PlaceInBlock::Alone`]. Returns whether it could.
    fn translate(&mut self, ram: &[u8], start: usize, count: usize) -> bool;

    /// Notes that the block at RIP, whose fetch the instruction TLB has just allowed, is at RAM offset
    /// `start`. Returns whether it has a translation.
    fn link(&mut self, cpu: &Cpu, start: usize) -> bool;

    /// Runs translated code from RIP on, for at most `budget` instructions, and counts those that retire.
    /// `None`: there is no translated code for RIP or the budget is too small, and nothing has happened.
    fn run(&mut self, cpu: &mut Cpu, ram: &mut [u8], budget: u64) -> Option<Ran>;

    /// Forgets the blocks of page number `page` of RAM.
    fn invalidate(&mut self, page: usize);
}

/// Executes one instruction by its handler, for a translator's slow paths. RIP has to be as the handler
/// expects it: at the end of the instruction, if it is the last of its block.
#[inline]
pub fn perform(cpu: &mut Cpu, ram: &mut [u8], insn: &Insn) -> Result<(), CpuStop> {
    (insn.exec)(cpu, ram, std::slice::from_ref(insn))
}

/// Where translated code finds the parts of a [`Cpu`]: offsets from its start, bytes.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// [`Cpu::regs`].
    pub regs: i32,
    /// [`Cpu::rip`].
    pub rip: i32,
    /// ZF is set if this is 0. Flags are kept as [`crate::flags`] describes.
    pub zero: i32,
    /// SF and PF.
    pub sign: i32,
    /// The carry vector.
    pub carry: i32,
}

/// The [`Layout`].
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

/// Where translated code finds the parts of an entry of the fast TLB ([`Cpu::fast_entries`]): the size of an
/// entry, and the offsets in it of the linear page that may be read, the linear page that may be written, and
/// the page's RAM offset.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub struct FastLayout {
    pub size: usize,
    pub read: i32,
    pub write: i32,
    pub ram: i32,
}

/// The [`FastLayout`].
pub const FAST_LAYOUT: FastLayout = FastLayout {
    size: size_of::<FastEntry>(),
    read: offset_of!(FastEntry, read) as i32,
    write: offset_of!(FastEntry, write) as i32,
    ram: offset_of!(FastEntry, ram) as i32,
};

impl Cpu {
    /// The fast TLB of the current mode: [`crate::tlb::DATA_ENTRIES`] entries, direct-mapped by linear page.
    /// The page of an entry lies wholly in RAM.
    pub fn fast_entries(&self) -> *const u8 {
        FastTlb::entries(&self.fast, self.mode).cast()
    }

    /// Whether instructions are fetched with user rights, which decides which of two jump caches applies.
    pub fn fetches_as_user(&self) -> bool {
        self.user()
    }
}
