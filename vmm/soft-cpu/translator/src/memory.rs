//! Memory for code: one address where it can be written, another where it can be executed.
//!
//! It takes nothing but calls that manage memory, which a confined process still has.

use std::io;
use std::ptr::{NonNull, null_mut};

use libc::{MAP_ANONYMOUS, MAP_FAILED, MAP_SHARED, MREMAP_MAYMOVE, PROT_EXEC, PROT_READ, PROT_WRITE, c_void};

/// See the module.
pub(crate) struct CodeMemory {
    write: Mapping,
    execute: Mapping,
    used: usize,
}

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
        // SAFETY: it is our own mapping, and nothing points into it any more.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.len) };
    }
}

impl CodeMemory {
    /// Room for `len` bytes, a multiple of the page size.
    ///
    /// # Errors
    /// When the host gives no memory that may be executed.
    #[allow(unsafe_code)]
    pub(crate) fn new(len: usize) -> io::Result<CodeMemory> {
        // SAFETY: a new mapping at an address that the kernel chooses.
        let write =
            unsafe { libc::mmap(null_mut(), len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0) };
        let write = Mapping::new(write, len)?;
        // SAFETY: for a shared mapping an old size of 0 asks for a second one of the same pages (mremap(2)).
        let execute = unsafe { libc::mremap(write.at.as_ptr().cast(), 0, len, MREMAP_MAYMOVE) };
        let execute = Mapping::new(execute, len)?;
        // SAFETY: the mapping is ours; that it can no longer be written takes nothing from anybody.
        if unsafe { libc::mprotect(execute.at.as_ptr().cast(), len, PROT_READ | PROT_EXEC) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(CodeMemory { write, execute, used: 0 })
    }

    /// Bytes left.
    pub(crate) fn left(&self) -> usize {
        self.write.len - self.used
    }

    /// Adds code, which fits; gives the address where it can be run.
    #[allow(unsafe_code)]
    pub(crate) fn add(&mut self, code: &[u8]) -> u64 {
        assert!(code.len() <= self.left(), "code of {} bytes for {}", code.len(), self.left());
        let (at, page) = (self.used, self.used & !4095);
        // SAFETY: the bytes lie in the mapping, and nobody has a reference into it. Telling the kernel that the written pages are
        // not needed at this address takes them from nowhere else: they are shared.
        unsafe {
            self.write.at.add(at).copy_from_nonoverlapping(NonNull::from(code).cast(), code.len());
            let written = self.write.at.add(page).as_ptr().cast();
            libc::madvise(written, at + code.len() - page, libc::MADV_DONTNEED);
        }
        self.used = (at + code.len()).next_multiple_of(16).min(self.write.len);
        self.execute.at.as_ptr() as u64 + at as u64
    }

    /// Forgets all code behind the first `len` bytes.
    pub(crate) fn truncate(&mut self, len: usize) {
        self.used = len;
    }

    /// Bytes of code.
    pub(crate) fn used(&self) -> usize {
        self.used
    }
}

// SAFETY: the mappings are this value's alone.
#[allow(unsafe_code)]
unsafe impl Send for CodeMemory {}
