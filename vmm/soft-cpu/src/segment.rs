//! Segment descriptors: reading them, and what their bits mean (SDM 3A 3.4.5).

use crate::exit::CpuStop;
use crate::state::{Cpu, Segment};

/// Access rights in [`Segment::attr`].
pub mod attr {
    #![allow(missing_docs)]
    pub const TYPE: u16 = 0xf;
    pub const ACCESSED: u16 = 1 << 0;
    /// Of data segments; code segments are readable.
    pub const WRITABLE: u16 = 1 << 1;
    /// Of code segments.
    pub const CONFORMING: u16 = 1 << 2;
    pub const CODE: u16 = 1 << 3;
    pub const CODE_OR_DATA: u16 = 1 << 4;
    pub const DPL_SHIFT: u32 = 5;
    pub const PRESENT: u16 = 1 << 7;
    pub const LONG: u16 = 1 << 13;
    pub const DEFAULT_32: u16 = 1 << 14;
}

impl Segment {
    /// Descriptor privilege level.
    pub fn dpl(&self) -> u8 {
        (self.attr >> attr::DPL_SHIFT & 3) as u8
    }

    /// Requested privilege level of the selector.
    pub fn rpl(&self) -> u8 {
        (self.selector & 3) as u8
    }

    /// Whether the segment is present.
    pub fn is_present(&self) -> bool {
        self.attr & attr::PRESENT != 0
    }

    /// Whether it is a code segment.
    pub fn is_code(&self) -> bool {
        self.attr & (attr::CODE_OR_DATA | attr::CODE) == attr::CODE_OR_DATA | attr::CODE
    }

    /// Whether it is a data segment that may be written.
    pub fn is_writable_data(&self) -> bool {
        let bits = attr::CODE_OR_DATA | attr::CODE | attr::WRITABLE;
        self.attr & bits == attr::CODE_OR_DATA | attr::WRITABLE
    }

    /// Whether it is a data segment, or a code segment that may be read.
    pub fn is_readable(&self) -> bool {
        self.attr & attr::CODE_OR_DATA != 0 && (!self.is_code() || self.attr & attr::WRITABLE != 0)
    }

    /// Whether it is a conforming code segment.
    pub fn is_conforming(&self) -> bool {
        self.is_code() && self.attr & attr::CONFORMING != 0
    }

    /// Whether it is a code segment of 64-bit mode.
    pub fn is_64_bit(&self) -> bool {
        self.attr & (attr::LONG | attr::DEFAULT_32) == attr::LONG
    }
}

impl Cpu {
    /// Reads a segment descriptor of the GDT or LDT; `error` is the error code of a fault.
    pub(crate) fn read_descriptor(
        &mut self,
        ram: &mut [u8],
        selector: u16,
        error: u32,
    ) -> Result<Segment, CpuStop> {
        let Some(at) = self.descriptor_address(selector, 8) else {
            return self.general_protection(error);
        };
        let d: u64 = self.load_system(ram, at)?;
        Ok(unpack(selector, d))
    }

    /// Linear address of a descriptor of `len` bytes, or `None` beyond the limit of its table.
    pub(crate) fn descriptor_address(&self, selector: u16, len: u64) -> Option<u64> {
        let (base, limit) = if selector & 4 != 0 {
            (self.sys.ldtr.base, self.sys.ldtr.limit as u64)
        } else {
            (self.sys.gdtr.base, self.sys.gdtr.limit as u64)
        };
        let local_and_none = selector & 4 != 0 && self.sys.ldtr.selector & !3 == 0;
        let at = (selector & !7) as u64;
        (at + len - 1 <= limit && !local_and_none).then(|| base.wrapping_add(at))
    }

    /// Sets the accessed bit of a descriptor that is about to be loaded.
    pub(crate) fn mark_accessed(&mut self, ram: &mut [u8], segment: &mut Segment) -> Result<(), CpuStop> {
        if segment.attr & attr::ACCESSED == 0
            && let Some(at) = self.descriptor_address(segment.selector, 8)
        {
            segment.attr |= attr::ACCESSED;
            self.store_system(ram, at.wrapping_add(5), segment.attr as u8)?;
        }
        Ok(())
    }
}

/// Unpacks an 8-byte segment descriptor.
pub(crate) fn unpack(selector: u16, d: u64) -> Segment {
    let limit = (d & 0xffff | d >> 32 & 0xf_0000) as u32;
    let granular = d >> 55 & 1 != 0;
    Segment {
        selector,
        attr: (d >> 40 & 0xf0ff) as u16,
        limit: if granular { limit << 12 | 0xfff } else { limit },
        base: d >> 16 & 0xff_ffff | d >> 32 & 0xff00_0000,
    }
}
