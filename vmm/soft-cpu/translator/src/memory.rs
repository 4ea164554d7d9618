//! Memory for code, mapped twice: at one address it can be written, at another it can be executed.
//!
//! It needs no system calls other than those that manage memory, which a confined process may still make.

use std::io;
use std::ptr::{NonNull, null_mut};

use libc::{MAP_ANONYMOUS, MAP_FAILED, MAP_SHARED, MREMAP_MAYMOVE, PROT_EXEC, PROT_READ, PROT_WRITE, c_void};

/// Memory for code; see the module's documentation.
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
        // SAFETY: this value owns the mapping, and nothing points into it any more.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.len) };
    }
}

impl CodeMemory {
    /// Memory for `len` bytes, a multiple of the page size.
    ///
    /// # Errors
    /// When the host allows no memory that can be executed.
    #[allow(unsafe_code)]
    pub(crate) fn new(len: usize) -> io::Result<CodeMemory> {
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
        Ok(CodeMemory { write, execute, used: 0 })
    }

    /// Bytes left.
    pub(crate) fn left(&self) -> usize {
        self.write.len - self.used
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
            self.write.at.add(at).copy_from_nonoverlapping(NonNull::from(code).cast(), code.len());
            let written = self.write.at.add(page).as_ptr().cast();
            libc::madvise(written, at + code.len() - page, libc::MADV_DONTNEED);
        }
        self.used = (at + code.len()).next_multiple_of(16).min(self.write.len);
        self.execute.at.as_ptr() as u64 + at as u64
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

// SAFETY: nobody else has these mappings.
#[allow(unsafe_code)]
unsafe impl Send for CodeMemory {}
