//! A split virtqueue (virtio 1.2, section 2.7) over memory that is shared with the device.
#![allow(unsafe_code)]

use super::mmio::Mmio;
use crate::ram::Free;
use core::sync::atomic::{Ordering, compiler_fence};

/// Descriptor flag: `next` continues the chain.
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes.
pub const WRITE: u16 = 2;

const AVAIL_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;

#[repr(C)]
#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Used {
    id: u32,
    len: u32,
}

/// A queue. Descriptor chains are made once, by [`Queue::describe`]; which of them are on offer is up to the owner.
pub struct Queue {
    mmio: Mmio,
    index: u32,
    size: u16,
    descriptors: *mut Descriptor,
    /// flags, idx, ring
    avail: *mut u16,
    /// flags, idx, ring of `Used`
    used: *mut u16,
    offered: u16,
    published: u16,
    taken: u16,
}

impl Queue {
    /// Sets queue `index` up with at most `size_max` descriptors, a power of two and at most 128.
    pub fn new(mmio: Mmio, index: u32, size_max: u16, free: &mut Free) -> Self {
        // A page for each area: 128 descriptors are 2048 bytes, the rings are smaller.
        assert!(size_max <= 128);
        let [descriptors, avail, used] = [(); 3].map(|()| {
            let page = free.take_words(512);
            page.fill(0);
            page.as_mut_ptr()
        });
        let size = mmio.set_queue(index, size_max, [descriptors as u64, avail as u64, used as u64]);
        let (descriptors, avail, used) = (descriptors.cast(), avail.cast(), used.cast());
        Self { mmio, index, size, descriptors, avail, used, offered: 0, published: 0, taken: 0 }
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Writes descriptor `id`; the device must not have it.
    pub fn describe(&mut self, id: u16, address: u64, len: u32, flags: u16, next: u16) {
        assert!(id < self.size);
        // SAFETY: within the descriptor area; only this driver uses this entry now.
        unsafe { self.descriptors.add(id.into()).write_volatile(Descriptor { address, len, flags, next }) }
    }

    /// Puts the chain that starts at `id` into the ring, for the next [`Self::publish`].
    pub fn offer(&mut self, id: u16) {
        let slot = 2 + self.offered % self.size;
        self.offered = self.offered.wrapping_add(1);
        // SAFETY: within the avail area, which only the driver writes.
        unsafe { self.avail.add(slot.into()).write_volatile(id) }
    }

    /// Chains that were offered and not published.
    pub fn unpublished(&self) -> u16 {
        self.offered.wrapping_sub(self.published)
    }

    /// Gives the device what was offered, and tells it unless it looks by itself.
    pub fn publish(&mut self) {
        if self.unpublished() == 0 {
            return;
        }
        self.published = self.offered;
        // What the buffers hold is written before the index says that they are there.
        compiler_fence(Ordering::SeqCst);
        // SAFETY: the index is within the avail area, which only the driver writes, the flags within the used area.
        let flags = unsafe {
            self.avail.add(1).write_volatile(self.published);
            self.used.read_volatile()
        };
        if flags & USED_NO_NOTIFY == 0 {
            self.mmio.notify(self.index);
        }
    }

    /// True if [`Self::take`] would return something.
    pub fn has_used(&self) -> bool {
        // SAFETY: within the used area.
        unsafe { self.used.add(1).read_volatile() != self.taken }
    }

    /// The next chain that the device is done with: its first descriptor, and the bytes written.
    pub fn take(&mut self) -> Option<(u16, u32)> {
        if !self.has_used() {
            return None;
        }
        // SAFETY: within the used area; the entry was written before the index that covers it.
        let used =
            unsafe { self.used.add(2).cast::<Used>().add((self.taken % self.size).into()).read_volatile() };
        compiler_fence(Ordering::SeqCst);
        self.taken = self.taken.wrapping_add(1);
        let id =
            u16::try_from(used.id).ok().filter(|&id| id < self.size).expect("device returned a wrong id");
        Some((id, used.len))
    }

    /// Whether the device interrupts for used buffers.
    pub fn want_interrupts(&mut self, on: bool) {
        // SAFETY: within the avail area.
        unsafe { self.avail.write_volatile(if on { 0 } else { AVAIL_NO_INTERRUPT }) }
    }
}
