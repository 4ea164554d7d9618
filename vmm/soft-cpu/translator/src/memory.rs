//! Memory for code: never writable and executable at one address.

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;

use memmap2::{Mmap, MmapMut, MmapOptions};

/// The same memory at two addresses: at one it can be written, at the other executed.
pub(crate) struct CodeMemory {
    write: MmapMut,
    execute: Mmap,
    used: usize,
}

impl CodeMemory {
    /// Room for `len` bytes.
    ///
    /// # Errors
    /// When the host gives no memory that may be executed.
    #[allow(unsafe_code)]
    pub(crate) fn new(len: usize) -> io::Result<CodeMemory> {
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::memfd_create(c"vmft-code".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(len as u64)?;
        // SAFETY: nobody else has the file. What runs at `execute` is code that was written whole before.
        let (write, execute) = unsafe { (MmapMut::map_mut(&file)?, MmapOptions::new().map_exec(&file)?) };
        Ok(CodeMemory { write, execute, used: 0 })
    }

    /// Bytes left.
    pub(crate) fn left(&self) -> usize {
        self.write.len() - self.used
    }

    /// Adds code, which fits; gives the address where it can be run.
    pub(crate) fn add(&mut self, code: &[u8]) -> u64 {
        let at = self.used;
        self.write[at..at + code.len()].copy_from_slice(code);
        self.used = (at + code.len()).next_multiple_of(16).min(self.write.len());
        self.execute.as_ptr() as u64 + at as u64
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
