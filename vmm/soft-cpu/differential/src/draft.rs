//! A case that is being generated, and where its operands may lie.

use crate::case::Pointer;
use crate::layout::{self, AFTER_HOLE, CODE_LEN, HIGH, HOLE, LOW, PAGE, READ_ONLY};
use crate::rng::CaseRng;
use crate::state::{CaseStart, PLANTED_MAX, Planted};

/// A case that is being generated.
pub(crate) struct Draft<'a> {
    pub(crate) rng: &'a mut CaseRng,
    pub(crate) start: CaseStart,
    pub(crate) pointers: Vec<(Pointer, usize)>,
    /// General registers that hold no pointers into the data pages.
    pub(crate) values: Vec<usize>,
    /// XMM, MMX or x87 registers that this case prefers.
    pub(crate) favourites: Vec<u32>,
}

/// A linear address for `size` bytes, usually one that can be read and written. `far` allows addresses that
/// 32-bit and RIP-relative operands cannot reach.
pub(crate) fn location(rng: &mut CaseRng, size: u64, far: bool) -> u64 {
    let size = size.clamp(1, 512);
    let part = 1 + rng.below(size);
    let align = size.next_power_of_two().min(16);
    let unaligned = rng.chance(20);
    match rng.below(200) {
        0..4 => READ_ONLY + rng.below(PAGE - size),
        4..12 => LOW + PAGE - part,
        12..14 => READ_ONLY - part,
        14..16 => HOLE - part,
        16..18 => HOLE + rng.below(PAGE),
        18..20 => AFTER_HOLE - part,
        20..22 => AFTER_HOLE + PAGE - part,
        22..24 => LOW - part,
        24 => layout::CODE + rng.below(CODE_LEN),
        25 if far => 0x8000_0000_0000 + rng.below(4096),
        26 if far => 0x8000_0000_0000 - part,
        27 if far => 0xffff_8000_0000_0000 + rng.below(4096),
        28 if far => HIGH + PAGE - part,
        n => {
            let page = match n % 8 {
                0 => LOW + PAGE,
                1 => AFTER_HOLE,
                2 if far => HIGH,
                _ => LOW,
            };
            // A few places are shared by many operands.
            let within = if n % 3 == 0 { 0x800 + rng.below(64) } else { rng.below(PAGE - size) };
            page + if unaligned { within } else { within & !(align - 1) }
        }
    }
}

impl Draft<'_> {
    /// Plants a value, if the address is in a writable data page and there is room for one more.
    pub(crate) fn plant(&mut self, at: u64, len: u8, bytes: [u8; 16]) {
        if layout::plantable(at, len as u64) && self.start.planted.len() + self.pointers.len() < PLANTED_MAX {
            self.start.planted.push(Planted { at, len, bytes });
        }
    }
}
