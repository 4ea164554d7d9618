//! Guest memory: one mapping, seen as a slice by the soft CPU and through vm-memory by devices and loaders.
//!
//! Guest-physical layout: RAM lies from 0 up to at most [`HOLE_START`], what is larger continues at
//! [`HOLE_END`]. A *page number* here is the index of a 4 KiB page in the mapping, without the hole.
//!
//! RAM also knows who wrote what. Devices and loaders write through [`Ram::memory`], whose bitmap lists the pages
//! for the engine ([`Ram::take_changed`]); the engine reports its own by [`Ram::note_written`]. Both make the page's hash stale,
//! and [`Ram::digest`] hashes stale pages only.
//!
//! The digest is of what differs from the start: pages of zeros, or those of a file that was loaded ([`Ram::load`]) and whose
//! content both sides have compared, count nothing. So a guest's initramfs is not read again before its first instruction.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use entry::Digest;
use twox_hash::XxHash3_128;
use vm_memory::bitmap::{Bitmap, RefSlice, WithBitmapSlice};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

/// Guest-physical address where the hole for devices begins.
pub const HOLE_START: u64 = soft_cpu::state::HOLE_START;
/// Guest-physical address behind the hole.
pub const HOLE_END: u64 = soft_cpu::state::HOLE_END;
/// Bytes in a page.
pub const PAGE: usize = 4096;

/// Guest memory as vm-memory, virtio-queue and linux-loader see it.
pub type GuestMemory = GuestMemoryMmap<RegionLog>;

/// The host cannot give the guest its memory.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// The size is no multiple of 4096, or zero.
    #[error("memory: {0} bytes is not a positive multiple of 4096")]
    Size(u64),
    /// mmap failed; a smaller guest may fit.
    #[error("memory: the host cannot map {bytes} bytes")]
    Map {
        /// How many.
        bytes: u64,
        /// The host's error.
        source: vm_memory::mmap::MmapRegionError,
    },
    /// A page is not what was written to it: the host's memory is faulty, or a program on it.
    #[error("memory: page {page} of the guest's RAM was changed behind the guest's back")]
    Changed {
        /// Which page of the mapping.
        page: u32,
    },
    /// The host would not take pages back.
    #[error("memory: the host cannot clear the guest's pages")]
    Clear(#[source] std::io::Error),
}

/// Pages written through vm-memory, a bit each and as a list.
#[derive(Debug, Default)]
struct WriteLog {
    bits: Vec<AtomicU64>,
    list: Mutex<Vec<u32>>,
}

impl WriteLog {
    fn new(pages: usize) -> WriteLog {
        WriteLog {
            bits: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            list: Mutex::default(),
        }
    }

    fn list(&self) -> std::sync::MutexGuard<'_, Vec<u32>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn mark(&self, page: usize) {
        let bit = 1 << (page % 64);
        if self.bits[page / 64].load(Ordering::Relaxed) & bit == 0 {
            self.bits[page / 64].fetch_or(bit, Ordering::Relaxed);
            self.list().push(page as u32);
        }
    }

    fn marked(&self, page: usize) -> bool {
        self.bits[page / 64].load(Ordering::Relaxed) >> (page % 64) & 1 != 0
    }

    fn clear(&self) {
        for page in self.list().drain(..) {
            self.bits[page as usize / 64].store(0, Ordering::Relaxed);
        }
    }
}

/// The write log as one region of guest memory sees it.
#[derive(Clone, Debug, Default)]
pub struct RegionLog {
    log: Arc<WriteLog>,
    base: usize,
}

impl<'a> WithBitmapSlice<'a> for RegionLog {
    type S = RefSlice<'a, RegionLog>;
}

impl Bitmap for RegionLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len == 0 {
            return;
        }
        let start = self.base + offset;
        for page in start / PAGE..=(start + len - 1) / PAGE {
            self.log.mark(page);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.log.marked((self.base + offset) / PAGE)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, RegionLog> {
        RefSlice::new(self, offset)
    }
}

/// A set of pages, a bit each and as a list.
#[derive(Debug, Default)]
struct Pages {
    bits: Vec<u64>,
    list: Vec<u32>,
}

impl Pages {
    fn new(pages: usize) -> Pages {
        Pages { bits: vec![0; pages.div_ceil(64)], list: Vec::new() }
    }

    fn insert(&mut self, page: u32) {
        let (word, bit) = (page as usize / 64, 1 << (page % 64));
        if self.bits[word] & bit == 0 {
            self.bits[word] |= bit;
            self.list.push(page);
        }
    }

    /// Empties it.
    fn take(&mut self) -> Vec<u32> {
        for page in &self.list {
            self.bits[*page as usize / 64] = 0;
        }
        std::mem::take(&mut self.list)
    }
}

/// RAM as it was once, and which pages may differ since.
struct Kept {
    content: Vec<u8>,
    written: Pages,
}

/// A file in RAM, from the start of a page on.
struct Loaded {
    first: u32,
    file: Arc<Vec<u8>>,
}

impl Loaded {
    /// The pages that it fills: what is left is RAM like any other.
    fn pages(&self) -> std::ops::Range<u32> {
        self.first..self.first + (self.file.len() / PAGE) as u32
    }

    fn page(&self, page: u32) -> Option<&[u8]> {
        let within = self.pages().contains(&page);
        within.then(|| &self.file[(page - self.first) as usize * PAGE..][..PAGE])
    }
}

/// The guest's RAM with its digest.
pub struct Ram {
    /// Owns the mapping; the regions of `memory` lie in it.
    mapping: MmapRegion<()>,
    memory: GuestMemory,
    changed: Arc<WriteLog>,
    /// Pages whose hash is stale.
    stale: Pages,
    /// From the first [`Ram::keep`] on.
    kept: Option<Kept>,
    loaded: Option<Loaded>,
    /// Hash of each page with its number, 0 for one that is as at the start; and their sum.
    hashes: Vec<u128>,
    sum: u128,
    /// The page that the scrub looks at next.
    scrub_at: u32,
}

impl Ram {
    /// Maps `len` bytes of zeros.
    pub fn new(len: u64) -> Result<Ram, RamError> {
        if len == 0 || !len.is_multiple_of(PAGE as u64) || len / PAGE as u64 > u32::MAX as u64 {
            return Err(RamError::Size(len));
        }
        let map_error = |source| RamError::Map { bytes: len, source };
        let flags = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let mapping = MmapRegion::<()>::build(None, len as usize, protection, flags).map_err(map_error)?;
        let pages = len as usize / PAGE;
        let changed = Arc::new(WriteLog::new(pages));

        let low = len.min(HOLE_START) as usize;
        let mut regions = Vec::new();
        for (base, size, addr) in [(0, low, 0), (low, len as usize - low, HOLE_END)] {
            if size == 0 {
                continue;
            }
            let log = RegionLog { log: changed.clone(), base };
            let builder = MmapRegionBuilder::new_with_bitmap(size, log)
                .with_mmap_prot(protection)
                .with_mmap_flags(flags);
            // SAFETY: `base..base + size` is inside `mapping`, which lives as long as `self`; `memory` is only
            // lent out by reference and does not unmap what it was given as a raw pointer.
            let region = unsafe { builder.with_raw_mmap_pointer(mapping.as_ptr().add(base)) };
            let region = region.build().map_err(map_error)?;
            // The address cannot overflow: both bases are below 2^33 and sizes below 2^44.
            regions.extend(GuestRegionMmap::new(region, GuestAddress(addr)));
        }
        let memory = GuestMemory::from_regions(regions).unwrap_or_default();
        Ok(Ram {
            mapping,
            memory,
            changed,
            stale: Pages::new(pages),
            kept: None,
            loaded: None,
            hashes: vec![0; pages],
            sum: 0,
            scrub_at: 0,
        })
    }

    /// Size in bytes.
    pub fn len(&self) -> u64 {
        self.mapping.size() as u64
    }

    /// Never: RAM has at least one page.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Number of pages.
    pub fn pages(&self) -> u32 {
        self.hashes.len() as u32
    }

    /// Where it lies in this process, to tell one RAM from another.
    pub fn host_address(&self) -> usize {
        self.mapping.as_ptr() as usize
    }

    /// For devices and loaders: writes through it are noted.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// For an engine that executes in this process: its writes are to be reported by [`Ram::note_written`].
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is readable and writable for its whole length and lives as long as `self`; the
        // exclusive borrow keeps `memory`, the only other way to it, from being used meanwhile.
        unsafe { std::slice::from_raw_parts_mut(self.mapping.as_ptr(), self.mapping.size()) }
    }

    /// Puts a file into RAM, which is zero there and no engine has looked at yet, from the start of a page. The digest takes
    /// this content for granted from now on: whoever compares digests has compared the files. Below the hole only.
    ///
    /// # Panics
    /// It does not fit: whoever chose the page has checked that.
    pub fn load(&mut self, first: u32, file: Arc<Vec<u8>>) {
        let start = first as usize * PAGE;
        self.as_mut_slice()[start..start + file.len()].copy_from_slice(&file);
        let loaded = Loaded { first, file };
        if !loaded.file.len().is_multiple_of(PAGE) {
            self.note_written(loaded.pages().end);
        }
        self.loaded = Some(loaded);
    }

    /// Hands each page written through [`Ram::memory`] since the last call to the engine, which must forget what
    /// it derived from them.
    pub fn take_changed(&mut self, mut tell: impl FnMut(u32)) {
        let changed = self.changed.clone();
        let mut list = changed.list();
        for page in list.drain(..) {
            changed.bits[page as usize / 64].fetch_and(!(1 << (page % 64)), Ordering::Relaxed);
            self.note_written(page);
            tell(page);
        }
    }

    /// The engine wrote to this page since it last said so.
    pub fn note_written(&mut self, page: u32) {
        self.stale.insert(page);
        if let Some(kept) = &mut self.kept {
            kept.written.insert(page);
        }
    }

    /// Notes what devices have written and the engine was not told of yet.
    fn note_changed(&mut self) {
        for page in self.changed.clone().list().iter() {
            self.note_written(*page);
        }
    }

    /// Keeps RAM as it is now, for [`Ram::go_back`]. The first time costs a copy of it, later ones what was written since. The
    /// engine must have reported its own.
    pub fn keep(&mut self) {
        self.note_changed();
        let (len, pages) = (self.len() as usize, self.pages());
        let mut kept = self.kept.take().unwrap_or_else(|| {
            let mut written = Pages::new(pages as usize);
            (0..pages).filter(|page| !is_zero(self.page(*page))).for_each(|page| written.insert(page));
            Kept { content: vec![0; len], written }
        });
        for page in kept.written.take() {
            let start = page as usize * PAGE;
            kept.content[start..start + PAGE].copy_from_slice(self.page(page));
        }
        self.kept = Some(kept);
    }

    /// Makes RAM what it was at the last [`Ram::keep`]. The engine must have reported its own writes, and learns of these by
    /// [`Ram::take_changed`].
    pub fn go_back(&mut self) {
        self.note_changed();
        let Some(mut kept) = self.kept.take() else { return };
        for page in kept.written.take() {
            let start = page as usize * PAGE;
            self.page(page).copy_from_slice(&kept.content[start..start + PAGE]);
            self.changed.mark(page as usize);
        }
        self.kept = Some(kept);
    }

    /// Digest of all of RAM, from the pages written since the last one. The engine must have reported its own.
    pub fn digest(&mut self) -> Digest {
        self.note_changed();
        for page in self.stale.take() {
            let hash = self.page_hash(page);
            let old = std::mem::replace(&mut self.hashes[page as usize], hash);
            self.sum = self.sum.wrapping_sub(old).wrapping_add(hash);
        }
        Digest(self.sum)
    }

    /// Digest of all of RAM from its content alone.
    pub fn full_digest(&mut self) -> Digest {
        Digest((0..self.pages()).fold(0, |sum, page| sum.wrapping_add(self.page_hash(page))))
    }

    /// Looks at the next `count` pages, all of RAM in turn, for one whose content is not what the digest was last computed from,
    /// although nobody reported a write. To be called right after [`Ram::digest`].
    ///
    /// # Errors
    /// [`RamError::Changed`]: there is one.
    pub fn scrub(&mut self, count: u32) -> Result<(), RamError> {
        for _ in 0..count.min(self.pages()) {
            let page = self.scrub_at;
            self.scrub_at = (page + 1) % self.pages();
            if self.page_hash(page) != self.hashes[page as usize] {
                return Err(RamError::Changed { page });
            }
        }
        Ok(())
    }

    /// Hash of a page's number and content when the digest was last computed, to name the pages that differ.
    pub fn page_digest(&self, page: u32) -> Digest {
        Digest(self.hashes[page as usize])
    }

    /// Content of a page.
    pub fn page(&mut self, page: u32) -> &mut [u8; PAGE] {
        let start = page as usize * PAGE;
        let slice = &mut self.as_mut_slice()[start..start + PAGE];
        slice.try_into().unwrap_or_else(|_| unreachable!("a page is {PAGE} bytes"))
    }

    fn page_hash(&mut self, page: u32) -> u128 {
        let loaded = self.loaded.take();
        let content = self.page(page);
        let as_at_start = match loaded.as_ref().and_then(|loaded| loaded.page(page)) {
            Some(before) => content == before,
            None => is_zero(content),
        };
        let hash = if as_at_start { 0 } else { XxHash3_128::oneshot_with_seed(page.into(), content) };
        self.loaded = loaded;
        hash
    }

    /// Makes all of RAM zero and forgets who wrote what. Engines must forget all they derived from RAM. The digest goes on taking
    /// for granted what it did.
    pub fn clear(&mut self) -> Result<(), RamError> {
        // SAFETY: the range is exactly the anonymous private mapping that `self` owns, borrowed exclusively;
        // MADV_DONTNEED makes its pages zero.
        let failed =
            unsafe { libc::madvise(self.mapping.as_ptr().cast(), self.mapping.size(), libc::MADV_DONTNEED) };
        if failed != 0 {
            return Err(RamError::Clear(std::io::Error::last_os_error()));
        }
        self.changed.clear();
        self.stale.take();
        let loaded = self.loaded.as_ref().map_or(0..0, Loaded::pages);
        loaded.for_each(|page| self.stale.insert(page));
        self.kept = None;
        self.hashes.fill(0);
        self.sum = 0;
        Ok(())
    }
}

/// Whether a page holds only zeros.
pub fn is_zero(page: &[u8; PAGE]) -> bool {
    page.chunks_exact(128).all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestMemoryBackend};

    #[test]
    fn device_writes_are_listed_once_and_hashed() {
        let mut ram = Ram::new(16 * PAGE as u64).unwrap();
        assert_eq!(ram.digest(), Digest(0), "zeros have digest 0");
        ram.memory().write_slice(&[1, 2, 3], GuestAddress(2 * PAGE as u64 - 1)).unwrap();
        ram.memory().write_slice(&[4], GuestAddress(PAGE as u64)).unwrap();
        let digest = ram.digest();
        let mut pages = Vec::new();
        ram.take_changed(|page| pages.push(page));
        assert_eq!(pages, [1, 2]);
        assert_ne!(digest, Digest(0));
        assert_eq!(ram.digest(), digest);
        assert_eq!(ram.full_digest(), digest);
    }

    #[test]
    fn a_loaded_file_counts_where_it_was_changed_only() {
        let file = Arc::new(vec![7; 2 * PAGE + 100]);
        let mut ram = Ram::new(8 * PAGE as u64).unwrap();
        ram.load(3, file.clone());
        let rest = ram.digest();
        assert_eq!((rest, ram.page(4)[9], ram.page(5)[99], ram.page(5)[100]), (ram.full_digest(), 7, 7, 0));
        assert_eq!((ram.page_digest(3), ram.page_digest(4)), (Digest(0), Digest(0)));
        assert_ne!(rest, Digest(0), "the last page is not full");
        assert!(ram.scrub(8).is_ok());

        ram.page(4)[9] = 8;
        assert!(matches!(ram.scrub(8), Err(RamError::Changed { page: 4 })), "nobody has reported that");
        ram.note_written(4);
        let changed = ram.digest();
        assert_ne!(changed, rest);
        ram.page(4).fill(0);
        ram.note_written(4);
        let zeros = ram.digest();
        assert_eq!(zeros, ram.full_digest());
        assert!(![rest, changed].contains(&zeros), "zeros are a change");

        ram.clear().unwrap();
        assert_eq!(ram.digest(), ram.full_digest());
        ram.load(3, file);
        ram.note_written(3);
        ram.note_written(4);
        assert_eq!(ram.digest(), rest, "loaded again, after all");
    }

    #[test]
    fn ram_above_the_hole_continues_the_slice() {
        let mut ram = Ram::new(HOLE_START + 4 * PAGE as u64).unwrap();
        assert!(ram.memory().find_region(GuestAddress(HOLE_START)).is_none());
        ram.memory().write_slice(b"high", GuestAddress(HOLE_END + PAGE as u64)).unwrap();
        let at = HOLE_START as usize + PAGE;
        assert_eq!(&ram.as_mut_slice()[at..at + 4], b"high");
        let mut pages = Vec::new();
        ram.take_changed(|page| pages.push(page));
        assert_eq!(pages, [(at / PAGE) as u32]);
    }

    #[test]
    fn a_scrub_finds_what_nobody_reported() {
        let mut ram = Ram::new(8 * PAGE as u64).unwrap();
        ram.digest();
        ram.as_mut_slice()[5 * PAGE] = 1;
        let found: Vec<bool> = (0..4).map(|_| ram.scrub(2).is_err()).collect();
        assert_eq!(found, [false, false, true, false], "the pages are looked at in turn");
        assert!(matches!(ram.scrub(100), Err(RamError::Changed { page: 5 })));
        ram.note_written(5);
        ram.digest();
        assert!(ram.scrub(100).is_ok());
    }

    #[test]
    fn clearing_makes_zeros() {
        let mut ram = Ram::new(8 * PAGE as u64).unwrap();
        ram.memory().write_slice(b"x", GuestAddress(3)).unwrap();
        ram.digest();
        ram.clear().unwrap();
        assert_eq!((ram.digest(), ram.full_digest(), ram.page(0)[3]), (Digest(0), Digest(0), 0));
    }

    #[test]
    fn odd_sizes_are_refused() {
        assert!(matches!(Ram::new(0), Err(RamError::Size(0))));
        assert!(matches!(Ram::new(4097), Err(RamError::Size(4097))));
    }

    proptest! {
        #[test]
        fn incremental_digest_equals_full(
            writes in prop::collection::vec((any::<bool>(), 0u64..32 * PAGE as u64 - 8, any::<u64>()), 1..60),
        ) {
            let mut ram = Ram::new(32 * PAGE as u64).unwrap();
            for (i, (by_device, at, value)) in writes.into_iter().enumerate() {
                // Small values make zero pages again from time to time.
                let value = if value % 3 == 0 { 0 } else { value };
                if by_device {
                    ram.memory().write_obj(value, GuestAddress(at)).unwrap();
                } else {
                    ram.as_mut_slice()[at as usize..at as usize + 8].copy_from_slice(&value.to_le_bytes());
                    ram.note_written((at / PAGE as u64) as u32);
                    ram.note_written(((at + 7) / PAGE as u64) as u32);
                }
                if i % 7 == 0 {
                    prop_assert_eq!(ram.digest(), ram.full_digest());
                }
                if i % 11 == 0 {
                    ram.take_changed(|_| ());
                }
            }
            prop_assert_eq!(ram.digest(), ram.full_digest());
        }
    }
}
