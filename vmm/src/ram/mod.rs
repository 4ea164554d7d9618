//! Guest memory: one mapping, seen as a slice by the soft CPU and through vm-memory by devices and loaders.
//!
//! Guest-physical layout: RAM lies from 0 up to at most [`HOLE_START`]; a larger RAM continues at [`HOLE_END`]. A *page
//! number* in this module is the index of a 4 KiB page in the mapping, without the hole.
//!
//! RAM also tracks which pages were written. Devices and loaders write through [`Ram::memory`], whose bitmap lists the
//! pages for the engine ([`Ram::take_changed`]); the engine reports its own writes by [`Ram::note_written`]. Both make the
//! page's hash stale, and [`Ram::digest`] hashes stale pages only.
//!
//! The digest covers what differs from the machine's start: a page of zeros contributes nothing, and neither does a page
//! of a loaded file ([`Ram::load`]), whose content both sides have compared already. So a guest's initramfs is not read
//! again before its first instruction.
#![allow(unsafe_code)]

use std::sync::Arc;

use entry::Digest;
use twox_hash::XxHash3_128;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

mod written;

pub use written::RegionLog;
use written::{PageSet, WriteLog};

/// Guest-physical address at which the hole for devices begins.
pub const HOLE_START: u64 = soft_cpu::state::HOLE_START;
/// Guest-physical address at which the hole for devices ends.
pub const HOLE_END: u64 = soft_cpu::state::HOLE_END;
/// Bytes in a page.
pub const PAGE: usize = 4096;

/// Guest memory as vm-memory, virtio-queue and linux-loader see it.
pub type GuestMemory = GuestMemoryMmap<RegionLog>;

/// The host cannot give the guest its memory, or the memory is faulty.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// The size is zero or not a multiple of 4096.
    #[error("memory: {0} bytes is not a positive multiple of 4096")]
    Size(u64),
    /// mmap failed; a smaller guest may fit.
    #[error("memory: the host cannot map {bytes} bytes for the guest: {source}; give the guest less memory")]
    Map {
        /// Size of the guest's RAM.
        bytes: u64,
        /// The host's error.
        source: vm_memory::mmap::MmapRegionError,
    },
    /// The content of a page is not what was last written to it: the host's memory, or a program on the host, is faulty.
    #[error(
        "memory: page {page} of the guest's RAM was changed, but neither the guest nor a device wrote to it; check this host's memory"
    )]
    Changed {
        /// Page number in the mapping.
        page: u32,
    },
    /// The host refused to take pages back.
    #[error("memory: the host cannot clear the guest's RAM: {0}")]
    Clear(#[source] std::io::Error),
}

/// A copy of RAM, and the pages that may differ from it since.
struct Snapshot {
    content: Vec<u8>,
    written: PageSet,
}

/// A file in RAM that begins at the start of a page.
struct LoadedFile {
    first: u32,
    file: Arc<Vec<u8>>,
}

impl LoadedFile {
    /// The pages that the file fills completely. The rest of the file is treated like any other RAM.
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
    /// Owns the mapping, in which the regions of `memory` lie.
    mapping: MmapRegion<()>,
    memory: GuestMemory,
    changed: Arc<WriteLog>,
    /// Pages whose hash is stale.
    stale: PageSet,
    /// Made by the first [`Ram::take_snapshot`].
    snapshot: Option<Snapshot>,
    loaded: Option<LoadedFile>,
    /// Hash of each page and its number, 0 for a page whose content is that of the start; and the sum of the hashes.
    hashes: Vec<u128>,
    sum: u128,
    /// The page that the scrub checks next.
    scrub_at: u32,
}

impl Ram {
    /// Maps `len` bytes of zeros.
    ///
    /// # Errors
    /// The size is not a positive multiple of 4096, or the host cannot map it.
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
            let log = RegionLog::new(changed.clone(), base);
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
            stale: PageSet::new(pages),
            snapshot: None,
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

    /// Always `false`: RAM has at least one page.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Number of pages.
    pub fn pages(&self) -> u32 {
        self.hashes.len() as u32
    }

    /// Address of the mapping in this process, to tell one RAM from another.
    pub fn host_address(&self) -> usize {
        self.mapping.as_ptr() as usize
    }

    /// Memory for devices and loaders. Writes through it are tracked.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Memory for an engine that executes in this process, which must report its writes by [`Ram::note_written`].
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is readable and writable for its whole length and lives as long as `self`; the
        // exclusive borrow keeps `memory`, the only other access to it, from being used meanwhile.
        unsafe { std::slice::from_raw_parts_mut(self.mapping.as_ptr(), self.mapping.size()) }
    }

    /// Copies a file into RAM, beginning with page `first`. That part of RAM must lie below the hole, be zero, and not have
    /// been read by an engine. From now on the digest leaves out pages with this content: two sides that compare digests
    /// have compared their files before.
    ///
    /// # Panics
    /// The file does not fit: the caller must have checked that.
    pub fn load(&mut self, first: u32, file: Arc<Vec<u8>>) {
        let start = first as usize * PAGE;
        self.as_mut_slice()[start..start + file.len()].copy_from_slice(&file);
        let loaded = LoadedFile { first, file };
        if !loaded.file.len().is_multiple_of(PAGE) {
            self.note_written(loaded.pages().end);
        }
        self.loaded = Some(loaded);
    }

    /// Calls `changed_page` for each page written through [`Ram::memory`] since the last call. The engine calls this, and must
    /// discard what it derived from those pages.
    pub fn take_changed(&mut self, mut changed_page: impl FnMut(u32)) {
        let changed = self.changed.clone();
        let mut list = changed.list();
        for page in list.drain(..) {
            changed.clear_bit(page as usize);
            self.note_written(page);
            changed_page(page);
        }
    }

    /// Reports that the engine wrote to a page since it last reported that page.
    pub fn note_written(&mut self, page: u32) {
        self.stale.insert(page);
        if let Some(snapshot) = &mut self.snapshot {
            snapshot.written.insert(page);
        }
    }

    /// Counts as written the pages that devices wrote and that the engine has not taken yet.
    fn note_device_writes(&mut self) {
        for page in self.changed.clone().list().iter() {
            self.note_written(*page);
        }
    }

    /// Takes a snapshot of RAM for [`Ram::restore_snapshot`]. The first one copies all of RAM that is not zero, later ones copy the pages
    /// written since. The engine must have reported its writes.
    pub fn take_snapshot(&mut self) {
        self.note_device_writes();
        let (len, pages) = (self.len() as usize, self.pages());
        let mut snapshot = self.snapshot.take().unwrap_or_else(|| {
            let mut written = PageSet::new(pages as usize);
            (0..pages).filter(|page| !is_zero(self.page(*page))).for_each(|page| written.insert(page));
            Snapshot { content: vec![0; len], written }
        });
        for page in snapshot.written.take() {
            let start = page as usize * PAGE;
            snapshot.content[start..start + PAGE].copy_from_slice(self.page(page));
        }
        self.snapshot = Some(snapshot);
    }

    /// Makes RAM what it was at the last [`Ram::take_snapshot`]. The engine must have reported its writes before, and gets the pages
    /// that this changes from [`Ram::take_changed`].
    pub fn restore_snapshot(&mut self) {
        self.note_device_writes();
        let Some(mut snapshot) = self.snapshot.take() else { return };
        for page in snapshot.written.take() {
            let start = page as usize * PAGE;
            self.page(page).copy_from_slice(&snapshot.content[start..start + PAGE]);
            self.changed.insert(page as usize);
        }
        self.snapshot = Some(snapshot);
    }

    /// Digest of all of RAM. Hashes the pages written since the last digest only; the engine must have reported its writes.
    pub fn digest(&mut self) -> Digest {
        self.note_device_writes();
        for page in self.stale.take() {
            let hash = self.page_hash(page);
            let old = std::mem::replace(&mut self.hashes[page as usize], hash);
            self.sum = self.sum.wrapping_sub(old).wrapping_add(hash);
        }
        Digest(self.sum)
    }

    /// Digest of all of RAM. Hashes every page, whether a write to it was reported or not.
    pub fn full_digest(&mut self) -> Digest {
        Digest((0..self.pages()).fold(0, |sum, page| sum.wrapping_add(self.page_hash(page))))
    }

    /// Checks that the next `count` pages, in turn through all of RAM, still have the content that the last digest was computed
    /// from: no write to them was reported since. To be called right after [`Ram::digest`].
    ///
    /// # Errors
    /// [`RamError::Changed`]: a page has another content.
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

    /// Hash of a page's number and content as of the last digest, to find the pages in which two machines differ.
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

    /// Makes all of RAM zero and forgets which pages were written. The engine must discard all that it derived from RAM. The
    /// digest still leaves out the pages of the loaded file.
    ///
    /// # Errors
    /// The host refused to take the pages back.
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
        let loaded = self.loaded.as_ref().map_or(0..0, LoadedFile::pages);
        loaded.for_each(|page| self.stale.insert(page));
        self.snapshot = None;
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
mod tests;
