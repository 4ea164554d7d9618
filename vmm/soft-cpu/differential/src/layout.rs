//! The address space that every case runs in, natively and on the soft CPU.
//!
//! Whatever is not listed here is not mapped, or not accessible from ring 3. Everything except [`HIGH`] lies
//! below 2 GiB, so that every form of address can reach it; natively nothing else is mapped below 4 GiB.

/// Bytes in a page.
pub const PAGE: u64 = 4096;

/// Two pages of code, readable and executable; bytes that no case fills are INT3.
pub const CODE: u64 = 0x1000_0000;
/// Size of [`CODE`].
pub const CODE_LEN: u64 = 2 * PAGE;
/// Two writable pages, followed by [`READ_ONLY`].
pub const LOW: u64 = 0x2000_0000;
/// A page that may only be read; the page after it is not mapped.
pub const READ_ONLY: u64 = LOW + 2 * PAGE;
/// A page that is not mapped.
pub const HOLE: u64 = LOW + 3 * PAGE;
/// A writable page after the hole.
pub const AFTER_HOLE: u64 = LOW + 4 * PAGE;
/// A writable page that 32-bit addresses cannot reach.
pub const HIGH: u64 = 0x5a5a_5a5a_0000;

/// Base of FS while a case runs.
pub const FS_BASE: u64 = LOW + 0x7f8;
/// Base of GS while a case runs.
pub const GS_BASE: u64 = HIGH + 0x123;

/// A data page of the layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataPage {
    /// Linear address.
    pub at: u64,
    /// Whether a case may write to it.
    pub writable: bool,
}

/// The data pages, in the order in which memory images hold them.
pub const DATA: [DataPage; 5] = [
    DataPage { at: LOW, writable: true },
    DataPage { at: LOW + PAGE, writable: true },
    DataPage { at: AFTER_HOLE, writable: true },
    DataPage { at: HIGH, writable: true },
    DataPage { at: READ_ONLY, writable: false },
];

/// 8-byte words in a memory image.
pub const WORDS: usize = DATA.len() * 512;

/// The contents of the data pages before a case plants its own values: fixed random words.
pub fn background() -> Vec<u64> {
    let mut rng = crate::rng::CaseRng::new(0x0b5e_55ed);
    (0..WORDS).map(|_| rng.bits()).collect()
}

/// Address of word `index` of a memory image.
pub fn word_address(index: usize) -> u64 {
    DATA[index / 512].at + (index as u64 % 512) * 8
}

/// Can `len` bytes at `addr` be planted, that is, are all of them within writable pages?
pub fn plantable(addr: u64, len: u64) -> bool {
    let page = |a: u64| DATA.iter().any(|p| p.writable && p.at == a & !(PAGE - 1));
    page(addr) && page(addr.wrapping_add(len - 1))
}
