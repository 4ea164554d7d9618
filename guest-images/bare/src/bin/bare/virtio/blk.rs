//! virtio-blk (virtio 1.2, section 5.2): requests of one size, several in flight.
#![allow(unsafe_code)]

use super::mmio::Mmio;
use super::queue::{NEXT, Queue, WRITE};
use crate::ram::Free;
use bare::options::Device as Location;

const DEVICE_ID: u32 = 2;
/// VIRTIO_BLK_F_FLUSH.
const FEATURE_FLUSH: u64 = 1 << 9;

/// Bytes in a request's buffer.
pub const CHUNK_LEN: u64 = 32 * 1024;
/// Requests that can be in flight.
pub const SLOTS: usize = 8;
const SECTOR_LEN: u64 = 512;

/// Stored before each request, so that one that was not answered is not taken for a success.
const STATUS_NONE: u8 = 0xff;

/// What a request does with its chunk.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// VIRTIO_BLK_T_IN.
    Read = 0,
    /// VIRTIO_BLK_T_OUT.
    Write = 1,
    /// VIRTIO_BLK_T_FLUSH, without a chunk.
    Flush = 4,
}

/// `struct virtio_blk_req` without its data.
#[repr(C)]
struct Request {
    kind: u32,
    reserved: u32,
    sector: u64,
    status: u8,
}

const STATUS_OFFSET: usize = core::mem::offset_of!(Request, status);

/// A disk. Slot i has descriptors 3i to 3i + 2, the i-th request and the i-th buffer.
pub struct Disk {
    mmio: Mmio,
    queue: Queue,
    flushes: bool,
    /// Whole chunks on the disk.
    pub chunks: u64,
    requests: [*mut Request; SLOTS],
    buffers: [*mut u64; SLOTS],
    /// The chunk that a busy slot is about.
    busy: [Option<u64>; SLOTS],
}

impl Disk {
    /// The first disk among `devices`, started.
    pub fn find(devices: &[Option<Location>], free: &mut Free) -> Option<Self> {
        let mmio = Mmio::find(devices, DEVICE_ID)?;
        let flushes = mmio.negotiate(0, FEATURE_FLUSH) & FEATURE_FLUSH != 0;
        let sectors = u64::from_le_bytes(core::array::from_fn(|i| mmio.config(i as u64)));
        let queue = Queue::new(mmio, 0, 32, free);
        assert!(usize::from(queue.size()) >= 3 * SLOTS, "virtio-blk has a queue of {}", queue.size());
        let requests = [(); SLOTS].map(|()| free.take_words(4).as_mut_ptr().cast());
        let buffers = [(); SLOTS].map(|()| free.take_words(CHUNK_LEN / 8).as_mut_ptr());
        mmio.start();
        let chunks = sectors / (CHUNK_LEN / SECTOR_LEN);
        Some(Self { mmio, queue, flushes, chunks, requests, buffers, busy: [None; SLOTS] })
    }

    /// The device's interrupt, for [`crate::cpu::wait`].
    pub fn irq(&self) -> u32 {
        self.mmio.irq
    }

    /// Answers the device's interrupt; finished requests are then taken by polling.
    pub fn acknowledge(&self) {
        self.mmio.acknowledge();
    }

    /// Whether the device can flush.
    pub fn flushes(&self) -> bool {
        self.flushes
    }

    /// A slot without a request.
    pub fn idle_slot(&self) -> Option<usize> {
        self.busy.iter().position(Option::is_none)
    }

    /// True if no request is in flight.
    pub fn is_idle(&self) -> bool {
        self.busy.iter().all(Option::is_none)
    }

    /// The buffer of a slot without a request.
    pub fn buffer(&mut self, slot: usize) -> &mut [u64] {
        assert!(self.busy[slot].is_none());
        // SAFETY: the device has given this slot's buffer back, and gets it again through `submit`, which needs `self`.
        unsafe { core::slice::from_raw_parts_mut(self.buffers[slot], (CHUNK_LEN / 8) as usize) }
    }

    /// Starts a request for `chunk` in a slot without one; [`Self::publish`] tells the device.
    pub fn submit(&mut self, slot: usize, kind: Kind, chunk: u64) {
        assert!(self.busy[slot].replace(chunk).is_none());
        let request = self.requests[slot];
        let sector = if kind == Kind::Flush { 0 } else { chunk * (CHUNK_LEN / SECTOR_LEN) };
        // SAFETY: the device does not have this slot's request.
        unsafe {
            request.write_volatile(Request { kind: kind as u32, reserved: 0, sector, status: STATUS_NONE })
        }
        let (header, status) = (request as u64, request as u64 + STATUS_OFFSET as u64);
        let first = 3 * slot as u16;
        let (data, last) = (first + 1, first + 2);
        if kind == Kind::Flush {
            self.queue.describe(first, header, 16, NEXT, last);
        } else {
            let direction = if kind == Kind::Read { WRITE } else { 0 };
            self.queue.describe(first, header, 16, NEXT, data);
            self.queue.describe(data, self.buffers[slot] as u64, CHUNK_LEN as u32, NEXT | direction, last);
        }
        self.queue.describe(last, status, 1, WRITE, 0);
        self.queue.offer(first);
    }

    /// Gives the device the new requests.
    pub fn publish(&mut self) {
        self.queue.publish();
    }

    /// A slot whose request is finished, and its chunk.
    ///
    /// # Panics
    /// If the device reports an error.
    pub fn finished(&mut self) -> Option<(usize, u64)> {
        let (first, _) = self.queue.take()?;
        let slot = usize::from(first / 3);
        let chunk = self.busy[slot].take().expect("device finished a request that it did not have");
        // SAFETY: the device has given this slot's request back.
        let status = unsafe { self.requests[slot].cast::<u8>().add(STATUS_OFFSET).read_volatile() };
        assert_eq!(status, 0, "virtio-blk: status of chunk {chunk}");
        Some((slot, chunk))
    }
}
