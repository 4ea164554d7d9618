//! Memory that the boot protocol hands over: the zero page, the command line, and what is free.
#![allow(unsafe_code)]

use bare::boot_params::{BootParams, LEN};
use core::ffi::CStr;
use core::slice;

/// x86's COMMAND_LINE_SIZE, its zero included.
const COMMAND_LINE_LEN_MAX: usize = 2048;

unsafe extern "C" {
    static image_end: u8;
}

/// The zero page at the address of the boot protocol's RSI.
pub fn boot_params(address: u64) -> BootParams<'static> {
    // SAFETY: the boot protocol puts a zero page there, outside this image, and nobody writes to it any more.
    BootParams(unsafe { &*(address as *const [u8; LEN]) })
}

/// The command line; empty without one.
///
/// # Panics
/// If it is not UTF-8 or has no end.
pub fn command_line(address: u64) -> &'static str {
    if address == 0 {
        return "";
    }
    // SAFETY: the boot protocol puts a string of at most this size there, outside this image, and nobody writes to it
    // any more; the machine's RAM goes on behind it.
    let bytes = unsafe { slice::from_raw_parts(address as *const u8, COMMAND_LINE_LEN_MAX) };
    let line = CStr::from_bytes_until_nul(bytes).expect("command line is longer than 2047 bytes");
    line.to_str().expect("command line is not UTF-8")
}

/// The RAM behind this image, given out once and never taken back. Its contents are what the machine left there.
pub struct Free {
    next: u64,
    end: u64,
}

impl Free {
    /// All of it.
    pub fn new(params: &BootParams) -> Self {
        let next = &raw const image_end as u64;
        let end = params.ram_end(next).expect("e820 has no RAM behind the image").min(1 << 32);
        Self { next, end }
    }

    /// `len` bytes, a multiple of 8, page-aligned.
    pub fn take_bytes(&mut self, len: usize) -> &'static mut [u8] {
        let words = self.take_words((len / 8) as u64);
        // SAFETY: the same memory; any bytes are valid, and the words' only owner is gone.
        unsafe { slice::from_raw_parts_mut(words.as_mut_ptr().cast(), len) }
    }

    /// `len` words, page-aligned.
    pub fn take_words(&mut self, len: u64) -> &'static mut [u64] {
        let start = self.next;
        let end =
            len.checked_mul(8).and_then(|bytes| start.checked_add(bytes)).filter(|&end| end <= self.end);
        self.next = end.expect("out of RAM: give the machine more memory").next_multiple_of(4096);
        // SAFETY: e820 says that it is RAM, it is mapped, and nothing else has it: `next` has moved past it.
        unsafe { slice::from_raw_parts_mut(start as *mut u64, len as usize) }
    }
}
