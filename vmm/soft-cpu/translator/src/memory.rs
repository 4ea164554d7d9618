//! Memory for code, which can be executed where it is mapped and is written through its file alone.
// The file is memory of the process, nothing of the host's.
#![allow(clippy::disallowed_types)]

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;

use memmap2::{Mmap, MmapOptions};

/// See the module.
pub(crate) struct CodeMemory {
    file: File,
    mapped: Mmap,
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
        // SAFETY: nobody else has the file, and its length stays. What runs in it was written whole before.
        let mapped = unsafe { MmapOptions::new().map_exec(&file)? };
        Ok(CodeMemory { file, mapped, used: 0 })
    }

    /// Bytes left.
    pub(crate) fn left(&self) -> usize {
        self.mapped.len() - self.used
    }

    /// Adds code; gives the address where it can be run.
    ///
    /// # Errors
    /// When it does not fit, or the host has no page for it.
    pub(crate) fn add(&mut self, code: &[u8]) -> io::Result<u64> {
        let at = self.used;
        if code.len() > self.left() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.file.write_all_at(code, at as u64)?;
        self.used = (at + code.len()).next_multiple_of(16).min(self.mapped.len());
        Ok(self.mapped.as_ptr() as u64 + at as u64)
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
