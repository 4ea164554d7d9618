//! Memory for code, mapped twice: at one address it can be written, at another it can be executed.
//!
//! A confined process may make no memory executable any more. It reserves what it needs before ([`reserve`]).

use std::io;
use std::ptr::{NonNull, null_mut};
use std::sync::{Arc, Mutex, PoisonError};

use libc::{MAP_ANONYMOUS, MAP_FAILED, MAP_SHARED, MREMAP_MAYMOVE, PROT_EXEC, PROT_READ, PROT_WRITE, c_void};

/// Memory for code; see the module's documentation.
pub(crate) struct CodeMemory {
    mappings: Arc<CodeMappings>,
    used: usize,
}

/// The two mappings of the same pages.
struct CodeMappings {
    write: Mapping,
    execute: Mapping,
}

/// Mappings that were made ahead, and that are used again. One that nothing else refers to is free.
static RESERVED: Mutex<Vec<Arc<CodeMappings>>> = Mutex::new(Vec::new());

/// A mapping of `len` bytes, unmapped on drop.
struct Mapping {
    at: NonNull<u8>,
    len: usize,
}

impl Mapping {
    fn new(at: *mut c_void, len: usize) -> io::Result<Mapping> {
        match NonNull::new(at) {
            Some(mapped) if at != MAP_FAILED => Ok(Mapping { at: mapped.cast(), len }),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Mapping {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: this value owns the mapping, and nothing points into it any more.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.len) };
    }
}

impl CodeMappings {
    #[allow(unsafe_code)]
    fn new(len: usize) -> io::Result<CodeMappings> {
        // SAFETY: a new mapping at an address that the kernel chooses.
        let write =
            unsafe { libc::mmap(null_mut(), len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0) };
        let write = Mapping::new(write, len)?;
        // SAFETY: for a shared mapping an old size of 0 asks for a second one of the same pages (mremap(2)).
        let execute = unsafe { libc::mremap(write.at.as_ptr().cast(), 0, len, MREMAP_MAYMOVE) };
        let execute = Mapping::new(execute, len)?;
        // SAFETY: the mapping is our own, and nobody relies on being able to write to it.
        if unsafe { libc::mprotect(execute.at.as_ptr().cast(), len, PROT_READ | PROT_EXEC) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(CodeMappings { write, execute })
    }
}

/// Maps memory ahead for this many that are in use at the same time, each of `len` bytes, a multiple of the page size.
///
/// # Errors
/// When the host allows no memory that can be executed.
pub(crate) fn reserve(count: usize, len: usize) -> io::Result<()> {
    let made = (0..count).map(|_| CodeMappings::new(len).map(Arc::new)).collect::<io::Result<Vec<_>>>()?;
    RESERVED.lock().unwrap_or_else(PoisonError::into_inner).extend(made);
    Ok(())
}

impl CodeMemory {
    /// Memory for `len` bytes, a multiple of the page size: reserved memory, if some of this length is free.
    ///
    /// # Errors
    /// When the host allows no memory that can be executed.
    pub(crate) fn new(len: usize) -> io::Result<CodeMemory> {
        let reserved = RESERVED.lock().unwrap_or_else(PoisonError::into_inner);
        let is_free = |m: &&Arc<CodeMappings>| Arc::strong_count(m) == 1 && m.write.len == len;
        let mappings = match reserved.iter().find(is_free) {
            Some(mappings) => mappings.clone(),
            None => Arc::new(CodeMappings::new(len)?),
        };
        Ok(CodeMemory { mappings, used: 0 })
    }

    /// Bytes left.
    pub(crate) fn left(&self) -> usize {
        self.mappings.write.len - self.used
    }

    /// Adds code and returns the address where it can be executed.
    ///
    /// # Panics
    /// When the code does not fit into [`CodeMemory::left`] bytes.
    #[allow(unsafe_code)]
    pub(crate) fn add(&mut self, code: &[u8]) -> u64 {
        assert!(
            code.len() <= self.left(),
            "{} bytes of code do not fit into the {} bytes that are left",
            code.len(),
            self.left()
        );
        let (at, page) = (self.used, self.used & !4095);
        // SAFETY: the bytes lie in the mapping, and nobody has a reference into it. MADV_DONTNEED for the
        // written pages only unmaps them at this address: the mapping is shared, so their contents stay.
        unsafe {
            self.mappings.write.at.add(at).copy_from_nonoverlapping(NonNull::from(code).cast(), code.len());
            let written = self.mappings.write.at.add(page).as_ptr().cast();
            libc::madvise(written, at + code.len() - page, libc::MADV_DONTNEED);
        }
        self.used = (at + code.len()).next_multiple_of(16).min(self.mappings.write.len);
        self.mappings.execute.at.as_ptr() as u64 + at as u64
    }

    /// Drops all code after the first `len` bytes.
    pub(crate) fn truncate(&mut self, len: usize) {
        self.used = len;
    }

    /// Bytes in use.
    pub(crate) fn used(&self) -> usize {
        self.used
    }
}

// SAFETY: a mapping is plain memory. Only the one `CodeMemory` that has it writes to it.
#[allow(unsafe_code)]
unsafe impl Send for Mapping {}
// SAFETY: as above; `RESERVED` only counts the references.
#[allow(unsafe_code)]
unsafe impl Sync for Mapping {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_memory_is_used_again_and_by_one_at_a_time() {
        const LEN: usize = 8 << 12;
        reserve(1, LEN).unwrap();
        let at = |memory: &CodeMemory| memory.mappings.write.at;
        let (first, second) = (CodeMemory::new(LEN).unwrap(), CodeMemory::new(LEN).unwrap());
        assert_ne!(at(&first), at(&second));
        let reserved = at(&first);
        drop((first, second));
        let again = CodeMemory::new(LEN).unwrap();
        assert_eq!((at(&again), again.used()), (reserved, 0));
    }
}
