//! The translation look-aside buffers.
//!
//! Their contents are guest-visible state: a guest that changes a page table without invalidating the TLB
//! keeps seeing the old translation as long as its entry exists. So the TLBs are defined exactly: two
//! direct-mapped arrays, one for data and one for instruction fetch, in which a hit changes nothing. They are
//! saved and digested. Large pages are cached in 4 KiB pieces, which have the size of the large page.
//!
//! `FastTlb` is a faster copy of part of the data TLB: always a subset of it, never state.

use serde::{Deserialize, Serialize};

/// Entries of the data TLB.
pub const DATA_ENTRIES: usize = 1024;
/// Entries of the instruction TLB.
pub const CODE_ENTRIES: usize = 256;

/// Access rights and attributes of a cached translation, in the bits of a page-table entry.
pub mod right {
    #![allow(missing_docs)]
    pub const VALID: u64 = 1 << 0;
    pub const WRITE: u64 = 1 << 1;
    pub const USER: u64 = 1 << 2;
    pub const DIRTY: u64 = 1 << 6;
    pub const GLOBAL: u64 = 1 << 8;
    /// Two bits: 0 for a 4 KiB page, 1 for 2 MiB, 2 for 1 GiB.
    pub const SIZE_SHIFT: u32 = 9;
    pub const NO_EXECUTE: u64 = 1 << 11;
}

/// One cached translation of a 4 KiB page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[repr(C)]
pub struct TlbEntry {
    /// Linear page number (linear address >> 12, with its upper bits).
    pub page: u64,
    /// Physical page address, with [`right`] bits in the low 12.
    pub frame: u64,
}

impl TlbEntry {
    /// Whether the entry translates linear page `page`.
    #[inline(always)]
    pub fn holds(&self, page: u64) -> bool {
        self.page == page && self.frame & right::VALID != 0
    }

    /// Whether the entry translates `page`, or another piece of the same large page.
    fn covers(&self, page: u64) -> bool {
        let shift = 9 * self.size();
        self.frame & right::VALID != 0 && self.page >> shift == page >> shift
    }

    /// 0 for a 4 KiB page, 1 for a piece of a 2 MiB page, 2 of a 1 GiB page.
    fn size(&self) -> usize {
        (self.frame >> right::SIZE_SHIFT) as usize & 3
    }
}

/// Hash of the large page of size `size` that a linear page is in.
fn region(page: u64, size: usize) -> usize {
    (page >> (9 * size)) as usize % REGIONS
}

/// Both TLBs.
#[derive(Clone)]
pub struct Tlb {
    data: Box<[TlbEntry; DATA_ENTRIES]>,
    code: Box<[TlbEntry; CODE_ENTRIES]>,
    /// How many pieces of 2 MiB and of 1 GiB pages are cached, by a hash of the large page's number: if there
    /// are none, INVLPG need not search for them. Derived from the entries, not state.
    pieces: [[u16; REGIONS]; 2],
}

const REGIONS: usize = 64;

/// The valid entries of both TLBs with their indexes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TlbState {
    /// Data TLB.
    pub data: Vec<(u16, TlbEntry)>,
    /// Instruction TLB.
    pub code: Vec<(u16, TlbEntry)>,
}

impl Default for Tlb {
    fn default() -> Tlb {
        Tlb {
            data: Box::new([TlbEntry::default(); DATA_ENTRIES]),
            code: Box::new([TlbEntry::default(); CODE_ENTRIES]),
            pieces: [[0; REGIONS]; 2],
        }
    }
}

impl Tlb {
    /// The slot of the data TLB that could have a linear page.
    #[inline(always)]
    pub fn data(&self, page: u64) -> &TlbEntry {
        &self.data[page as usize % DATA_ENTRIES]
    }

    /// The slot of the instruction TLB that could have a linear page.
    #[inline(always)]
    pub fn code(&self, page: u64) -> &TlbEntry {
        &self.code[page as usize % CODE_ENTRIES]
    }

    /// All slots of the instruction TLB.
    pub fn code_entries(&self) -> &[TlbEntry; CODE_ENTRIES] {
        &self.code
    }

    /// Fills the slot of the data TLB for a linear page.
    pub fn set_data(&mut self, page: u64, entry: TlbEntry) {
        let slot = &mut self.data[page as usize % DATA_ENTRIES];
        let old = std::mem::replace(slot, entry);
        self.count(&old, &entry);
    }

    /// Fills the slot of the instruction TLB for a linear page.
    pub fn set_code(&mut self, page: u64, entry: TlbEntry) {
        let slot = &mut self.code[page as usize % CODE_ENTRIES];
        let old = std::mem::replace(slot, entry);
        self.count(&old, &entry);
    }

    fn count(&mut self, old: &TlbEntry, new: &TlbEntry) {
        if let Some(pieces) = self.pieces_with(old) {
            *pieces -= 1;
        }
        if let Some(pieces) = self.pieces_with(new) {
            *pieces += 1;
        }
    }

    /// The count that an entry belongs to, if it is a piece of a large page.
    fn pieces_with(&mut self, e: &TlbEntry) -> Option<&mut u16> {
        let size = e.size();
        (size > 0).then(|| &mut self.pieces[size - 1][region(e.page, size)])
    }

    /// Drops everything, or everything that is not global (MOV to CR3 with CR4.PGE, SDM 3A 5.10.4.1).
    pub fn flush(&mut self, keep_global: bool) {
        let kept = if keep_global { right::GLOBAL } else { 0 };
        for e in self.data.iter_mut().chain(self.code.iter_mut()).filter(|e| e.frame & kept == 0) {
            if e.size() > 0 {
                self.pieces[e.size() - 1][region(e.page, e.size())] -= 1;
            }
            *e = TlbEntry::default();
        }
    }

    /// INVLPG: drops what translates linear page `page`, including all pieces of a large page, global or not.
    /// Calls `dropped` with each linear page that the data TLB loses.
    pub fn invalidate(&mut self, page: u64, mut dropped: impl FnMut(u64)) {
        if (1..=2).any(|size| self.pieces[size - 1][region(page, size)] > 0) {
            for n in 0..DATA_ENTRIES as u64 {
                let e = *self.data(n);
                if e.covers(page) {
                    dropped(e.page);
                    self.set_data(n, TlbEntry::default());
                }
            }
            for n in 0..CODE_ENTRIES as u64 {
                if self.code(n).covers(page) {
                    self.set_code(n, TlbEntry::default());
                }
            }
            return;
        }
        if self.data(page).holds(page) {
            dropped(page);
            self.set_data(page, TlbEntry::default());
        }
        if self.code(page).holds(page) {
            self.set_code(page, TlbEntry::default());
        }
    }

    /// The valid entries.
    pub fn save(&self) -> TlbState {
        fn valid(entries: &[TlbEntry]) -> Vec<(u16, TlbEntry)> {
            let indexed = entries.iter().enumerate();
            indexed.filter(|(_, e)| e.frame & right::VALID != 0).map(|(i, e)| (i as u16, *e)).collect()
        }
        TlbState { data: valid(&self.data[..]), code: valid(&self.code[..]) }
    }

    /// Replaces the entries by saved ones. Indexes beyond the arrays are ignored.
    pub fn restore(&mut self, s: &TlbState) {
        *self = Tlb::default();
        for (i, e) in s.data.iter().filter(|(i, _)| (*i as usize) < DATA_ENTRIES) {
            self.set_data(*i as u64, *e);
        }
        for (i, e) in s.code.iter().filter(|(i, _)| (*i as usize) < CODE_ENTRIES) {
            self.set_code(*i as u64, *e);
        }
    }
}

/// No linear page has this number.
const NO_PAGE: u64 = u64::MAX;

/// Where a linear page lies in RAM, and which accesses to it need no further checks.
#[derive(Clone, Copy)]
pub(crate) struct FastEntry {
    /// Linear page that may be read, or [`NO_PAGE`].
    pub(crate) read: u64,
    /// Linear page that may be written: its entry is dirty, its RAM is already marked written and has no
    /// decoded code. Or [`NO_PAGE`].
    pub(crate) write: u64,
    /// Offset of the page in RAM.
    pub(crate) ram: usize,
}

const NOWHERE: FastEntry = FastEntry { read: NO_PAGE, write: NO_PAGE, ram: 0 };

/// Most entries of [`FastTlb::filled`]; after that all are dropped.
const FILLED_MAX: usize = 4 * DATA_ENTRIES;

/// A shadow of the data TLB for each of supervisor and user mode; the other two modes
/// ([`crate::state::WATCHED`]) have empty ones.
pub(crate) struct FastTlb {
    entries: Box<[[FastEntry; DATA_ENTRIES]; 4]>,
    /// Mode and slot of all entries that may be filled, so that a flush only costs what was filled since the
    /// last.
    filled: Vec<(u16, u16)>,
}

impl Default for FastTlb {
    fn default() -> FastTlb {
        FastTlb { entries: Box::new([[NOWHERE; DATA_ENTRIES]; 4]), filled: Vec::with_capacity(FILLED_MAX) }
    }
}

impl FastTlb {
    #[inline(always)]
    pub(crate) fn get(&self, mode: usize, page: u64) -> &FastEntry {
        &self.entries[mode & 3][page as usize % DATA_ENTRIES]
    }

    /// The entries of a mode.
    pub(crate) fn entries(&self, mode: usize) -> *const FastEntry {
        self.entries[mode & 3].as_ptr()
    }

    /// Adds linear page `page`, at RAM offset `ram`: it may be read, and written if `writable`.
    pub(crate) fn fill(&mut self, user: bool, page: u64, ram: usize, writable: bool) {
        if self.filled.len() == FILLED_MAX {
            self.flush();
        }
        let slot = page as usize % DATA_ENTRIES;
        let e = &mut self.entries[user as usize][slot];
        if e.read != page {
            *e = FastEntry { read: page, ram, ..NOWHERE };
            self.filled.push((user as u16, slot as u16));
        }
        if writable {
            e.write = page;
        }
    }

    /// Drops all entries.
    pub(crate) fn flush(&mut self) {
        for (mode, slot) in self.filled.drain(..) {
            self.entries[mode as usize][slot as usize] = NOWHERE;
        }
    }

    /// Drops the slot of a linear page in both modes, because its TLB entry changes.
    pub(crate) fn forget(&mut self, page: u64) {
        for entries in &mut self.entries[..2] {
            entries[page as usize % DATA_ENTRIES] = NOWHERE;
        }
    }

    /// Makes every write take the slow path again.
    pub(crate) fn forget_writes(&mut self) {
        for (mode, slot) in &self.filled {
            self.entries[*mode as usize][*slot as usize].write = NO_PAGE;
        }
    }

    /// Makes writes to the RAM page at `ram` take the slow path again, whatever its linear address.
    pub(crate) fn forget_writes_to(&mut self, ram: usize) {
        for (mode, slot) in &self.filled {
            let e = &mut self.entries[*mode as usize][*slot as usize];
            if e.ram == ram {
                e.write = NO_PAGE;
            }
        }
    }
}
