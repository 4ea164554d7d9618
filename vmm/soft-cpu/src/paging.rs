//! 4-level paging (SDM 3A, chapter 5): the page-table walk, access rights, accessed and dirty bits.
//!
//! Upper levels get their accessed bit as the walk passes them, the last level its accessed and dirty bit
//! only when the access is allowed. PAT, PCD and PWT have no effect. Protection keys, PCIDs, SMEP and SMAP do
//! not exist (CPUID).

use crate::exit::CpuStop;
use crate::state::{Cpu, FetchPage};
use crate::tlb::{TlbEntry, right};

/// Bits of a physical address, as CPUID 80000008h says.
pub const PHYSICAL_BITS: u32 = 40;

/// What a linear address is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Data read.
    Read,
    /// Data write.
    Write,
    /// Instruction fetch.
    Fetch,
}

mod pte {
    pub const PRESENT: u64 = 1 << 0;
    pub const WRITE: u64 = 1 << 1;
    pub const USER: u64 = 1 << 2;
    pub const ACCESSED: u64 = 1 << 5;
    pub const DIRTY: u64 = 1 << 6;
    pub const LARGE: u64 = 1 << 7;
    pub const GLOBAL: u64 = 1 << 8;
    pub const NO_EXECUTE: u64 = 1 << 63;
    pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
}

mod error {
    pub const PRESENT: u32 = 1 << 0;
    pub const WRITE: u32 = 1 << 1;
    pub const USER: u32 = 1 << 2;
    pub const RESERVED: u32 = 1 << 3;
    pub const FETCH: u32 = 1 << 4;
}

/// CR0.WP.
const CR0_WP: u64 = 1 << 16;
/// CR4.PGE.
const CR4_PGE: u64 = 1 << 7;
/// EFER.NXE.
const EFER_NXE: u64 = 1 << 11;

/// Is `addr` canonical (bits 63 to 47 all equal)?
#[inline(always)]
pub fn is_canonical(addr: u64) -> bool {
    ((addr as i64) << 16 >> 16) as u64 == addr
}

impl Cpu {
    /// Translates a canonical linear address through the TLB, filling it on a miss.
    ///
    /// `user`: it is a user-mode access (implicit supervisor accesses, such as to the IDT, are not). Returns
    /// the TLB entry, whose rights allow the access.
    pub(crate) fn translate(
        &mut self,
        ram: &mut [u8],
        addr: u64,
        access: Access,
        user: bool,
    ) -> Result<TlbEntry, CpuStop> {
        let page = addr >> 12;
        let cached = *self.cached(access, page);
        if cached.holds(page) && self.allows(&cached, access, user) && !needs_dirty(&cached, access) {
            return Ok(cached);
        }
        // A cached entry that does not allow the access may be stale: walk again before faulting, as hardware
        // does, and use what the page tables have now (after SDM 3A 5.10.2.3 a fault invalidates the entry).
        let entry = self.walk(ram, addr, access, user)?;
        match access {
            Access::Fetch => self.tlb.set_code(page, entry),
            _ => {
                self.tlb.set_data(page, entry);
                self.fast.forget(page);
            }
        }
        Ok(entry)
    }

    /// Whether a cached instruction translation may be used at the current privilege level.
    #[inline(always)]
    pub(crate) fn may_fetch(&self, e: &TlbEntry) -> bool {
        let wanted = if self.user() { right::USER } else { 0 };
        e.frame & (right::NO_EXECUTE | wanted) == wanted
    }

    /// RAM offset of the code at `addr`, as a fetch would find it, without changing TLB or page tables.
    /// `None`: the fetch would fault, or the page is not in RAM.
    pub(crate) fn peek_code(&self, ram: &[u8], addr: u64) -> Option<usize> {
        let cached = self.tlb.code(addr >> 12);
        let frame = match cached.holds(addr >> 12) && self.may_fetch(cached) {
            true => cached.frame,
            false => self.peek_page(ram, addr)?,
        };
        Some(self.ram_offset(frame & pte::ADDRESS)? + (addr as usize & 4095))
    }

    /// The page-table walk of [`Cpu::peek_code`], which changes nothing.
    fn peek_page(&self, ram: &[u8], addr: u64) -> Option<u64> {
        let wanted = pte::PRESENT | if self.user() { pte::USER } else { 0 };
        let mut table = self.sys.cr3 & pte::ADDRESS;
        for level in (0..4u32).rev() {
            let entry = self.read_physical(ram, table + (addr >> (12 + 9 * level) & 511) * 8);
            if entry & (wanted | pte::NO_EXECUTE) != wanted || !is_canonical(addr) {
                return None;
            }
            if level == 0 || entry & pte::LARGE != 0 {
                let inside = (1u64 << (12 + 9 * level)) - 1;
                return Some(entry & pte::ADDRESS & !inside | addr & inside & !0xfff);
            }
            table = entry & pte::ADDRESS;
        }
        None
    }

    fn cached(&self, access: Access, page: u64) -> &TlbEntry {
        match access {
            Access::Fetch => self.tlb.code(page),
            _ => self.tlb.data(page),
        }
    }

    fn allows(&self, e: &TlbEntry, access: Access, user: bool) -> bool {
        if user && e.frame & right::USER == 0 {
            return false;
        }
        match access {
            Access::Read => true,
            Access::Write => e.frame & right::WRITE != 0 || !user && self.sys.cr0 & CR0_WP == 0,
            Access::Fetch => e.frame & right::NO_EXECUTE == 0,
        }
    }

    fn walk(&mut self, ram: &mut [u8], addr: u64, access: Access, user: bool) -> Result<TlbEntry, CpuStop> {
        let nxe = self.sys.efer & EFER_NXE != 0;
        let beyond = pte::ADDRESS & !((1 << PHYSICAL_BITS) - 1);
        let reserved = if nxe { beyond } else { beyond | pte::NO_EXECUTE };
        let mut table = self.sys.cr3 & pte::ADDRESS;
        let mut rights = pte::WRITE | pte::USER;
        let mut no_execute = 0;
        for level in (0..4u32).rev() {
            let slot = table + (addr >> (12 + 9 * level) & 511) * 8;
            // A table outside RAM reads as all ones, like other unmapped addresses, so its reserved bits are
            // set.
            let entry = self.read_physical(ram, slot);
            if entry & pte::PRESENT == 0 {
                return self.page_fault(addr, access, user, 0);
            }
            let large = level > 0 && entry & pte::LARGE != 0;
            let misaligned = if large { (1u64 << (12 + 9 * level)) - (1 << 13) } else { 0 };
            if entry & (reserved | misaligned) != 0 || level == 3 && large {
                return self.page_fault(addr, access, user, error::PRESENT | error::RESERVED);
            }
            rights &= entry;
            no_execute |= entry & pte::NO_EXECUTE;
            if level > 0 && !large {
                self.set_bits(ram, slot, entry, pte::ACCESSED)?;
                table = entry & pte::ADDRESS;
                continue;
            }
            let inside = (1u64 << (12 + 9 * level)) - 1;
            let frame = entry & pte::ADDRESS & !inside | addr & inside & !0xfff;
            let global = if self.sys.cr4 & CR4_PGE != 0 { entry & pte::GLOBAL } else { 0 };
            let mut e = TlbEntry {
                page: addr >> 12,
                frame: frame
                    | right::VALID
                    | rights & (pte::WRITE | pte::USER)
                    | global
                    | (level as u64) << right::SIZE_SHIFT
                    | no_execute >> 63 << right::NO_EXECUTE.trailing_zeros(),
            };
            if !self.allows(&e, access, user) {
                return self.page_fault(addr, access, user, error::PRESENT);
            }
            let dirty = if access == Access::Write { pte::DIRTY } else { entry & pte::DIRTY };
            e.frame |= dirty;
            self.set_bits(ram, slot, entry, pte::ACCESSED | dirty)?;
            return Ok(e);
        }
        unreachable!("level 0 returns")
    }

    /// Sets accessed and dirty bits. A page table may share a page with code, like any other data.
    fn set_bits(&mut self, ram: &mut [u8], slot: u64, entry: u64, bits: u64) -> Result<(), CpuStop> {
        match self.ram_offset(slot) {
            Some(at) if entry & bits != bits => self.write_ram(ram, at, &(entry | bits).to_le_bytes()),
            _ => Ok(()),
        }
    }

    #[cold]
    fn page_fault<T>(&mut self, addr: u64, access: Access, user: bool, code: u32) -> Result<T, CpuStop> {
        let mut code = code | if user { error::USER } else { 0 };
        match access {
            Access::Write => code |= error::WRITE,
            Access::Fetch if self.sys.efer & EFER_NXE != 0 => code |= error::FETCH,
            _ => {}
        }
        // The cached translations of the faulting address are dropped (SDM 3A 5.10.4.1). Other pieces of a
        // large page stay, as they may on hardware that caches large pages in pieces.
        let page = addr >> 12;
        if self.tlb.data(page).holds(page) {
            self.tlb.set_data(page, TlbEntry::default());
            self.fast.forget(page);
        }
        if self.tlb.code(page).holds(page) {
            self.tlb.set_code(page, TlbEntry::default());
            self.fetch = FetchPage::NONE;
        }
        self.sys.cr2 = addr;
        self.raise(14, Some(code))
    }

    /// Drops all cached translations (with `keep_global`, except global ones), after a change of page tables
    /// or modes.
    pub(crate) fn flush_tlb(&mut self, keep_global: bool) {
        self.tlb.flush(keep_global);
        self.fast.flush();
        self.fetch = FetchPage::NONE;
    }

    /// INVLPG.
    pub(crate) fn invalidate_page(&mut self, addr: u64) {
        self.fetch = FetchPage::NONE;
        let fast = &mut self.fast;
        self.tlb.invalidate(addr >> 12, |page| fast.forget(page));
    }

    /// Reads 8 aligned bytes of physical memory; all ones outside RAM.
    fn read_physical(&self, ram: &[u8], addr: u64) -> u64 {
        let at = self.ram_offset(addr).and_then(|o| ram.get(o..)?.first_chunk());
        at.map_or(u64::MAX, |b| u64::from_le_bytes(*b))
    }
}

fn needs_dirty(e: &TlbEntry, access: Access) -> bool {
    access == Access::Write && e.frame & right::DIRTY == 0
}
