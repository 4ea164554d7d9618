//! Which pages of RAM were written: those written through vm-memory, and sets of pages.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::bitmap::{Bitmap, RefSlice, WithBitmapSlice};

use super::PAGE;

/// Pages written through vm-memory: a bit for each, and a list.
#[derive(Debug, Default)]
pub(super) struct WriteLog {
    bits: Vec<AtomicU64>,
    list: Mutex<Vec<u32>>,
}

impl WriteLog {
    pub fn new(pages: usize) -> WriteLog {
        WriteLog {
            bits: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            list: Mutex::default(),
        }
    }

    pub fn list(&self) -> MutexGuard<'_, Vec<u32>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn insert(&self, page: usize) {
        let bit = 1 << (page % 64);
        if self.bits[page / 64].load(Ordering::Relaxed) & bit == 0 {
            self.bits[page / 64].fetch_or(bit, Ordering::Relaxed);
            self.list().push(page as u32);
        }
    }

    fn contains(&self, page: usize) -> bool {
        self.bits[page / 64].load(Ordering::Relaxed) >> (page % 64) & 1 != 0
    }

    /// Clears the bit of a page that the caller takes off the list.
    pub fn clear_bit(&self, page: usize) {
        self.bits[page / 64].fetch_and(!(1 << (page % 64)), Ordering::Relaxed);
    }

    pub fn clear(&self) {
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

impl RegionLog {
    /// For the region that begins `base` bytes into the mapping.
    pub(super) fn new(log: Arc<WriteLog>, base: usize) -> RegionLog {
        RegionLog { log, base }
    }
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
            self.log.insert(page);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.log.contains((self.base + offset) / PAGE)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, RegionLog> {
        RefSlice::new(self, offset)
    }
}

/// A set of pages: a bit for each, and a list.
#[derive(Debug, Default)]
pub(super) struct PageSet {
    bits: Vec<u64>,
    list: Vec<u32>,
}

impl PageSet {
    /// An empty set of pages below `pages`.
    pub fn new(pages: usize) -> PageSet {
        PageSet { bits: vec![0; pages.div_ceil(64)], list: Vec::new() }
    }

    pub fn insert(&mut self, page: u32) {
        let (word, bit) = (page as usize / 64, 1 << (page % 64));
        if self.bits[word] & bit == 0 {
            self.bits[word] |= bit;
            self.list.push(page);
        }
    }

    /// Empties the set and returns its pages in the order in which they were inserted.
    pub fn take(&mut self) -> Vec<u32> {
        for page in &self.list {
            self.bits[*page as usize / 64] = 0;
        }
        std::mem::take(&mut self.list)
    }
}
