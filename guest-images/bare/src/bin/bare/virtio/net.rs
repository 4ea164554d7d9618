//! virtio-net (virtio 1.2, section 5.1) as a smoltcp device: no offloads, one buffer for each descriptor.
#![allow(unsafe_code)]

use super::mmio::Mmio;
use super::queue::{Queue, WRITE};
use crate::ram::Free;
use bare::options::Device as Location;
use core::slice;
use smoltcp::phy::{self, DeviceCapabilities, Medium};
use smoltcp::time::Instant;

const DEVICE_ID: u32 = 1;
/// VIRTIO_NET_F_MAC.
const FEATURE_MAC: u64 = 1 << 5;
const QUEUE_LEN_MAX: u16 = 128;
/// `struct virtio_net_hdr`, with `num_buffers`; all zero in what is sent.
const HEADER_LEN: usize = 12;
const FRAME_LEN_MAX: usize = 1514;
const BUFFER_LEN: usize = 2048;

/// A network device.
pub struct Net {
    mmio: Mmio,
    /// Its Ethernet address.
    pub mac: [u8; 6],
    receiver: Receiver,
    sender: Sender,
}

/// The receive queue, and buffer i at descriptor i.
pub struct Receiver {
    queue: Queue,
    buffers: Buffers,
}

/// The transmit queue, buffer i at descriptor i, and which of them the device does not have.
pub struct Sender {
    queue: Queue,
    buffers: Buffers,
    idle: [u16; QUEUE_LEN_MAX as usize],
    idle_len: usize,
    /// Someone wanted to send and could not; the device interrupts when it has sent something.
    waiting: bool,
}

#[derive(Clone, Copy)]
struct Buffers(*mut u8);

impl Buffers {
    fn new(count: u16, free: &mut Free) -> Self {
        let words = free.take_words(u64::from(count) * (BUFFER_LEN / 8) as u64);
        // Only the headers: what follows is written before it is read.
        words.chunks_mut(BUFFER_LEN / 8).for_each(|buffer| buffer[..2].fill(0));
        Self(words.as_mut_ptr().cast())
    }

    fn address(self, id: u16) -> *mut u8 {
        self.0.wrapping_add(usize::from(id) * BUFFER_LEN)
    }

    /// The frame in a buffer.
    ///
    /// # Safety
    /// The device must not have the buffer while the slice is used.
    unsafe fn frame<'a>(self, id: u16, len: usize) -> &'a mut [u8] {
        assert!(len <= BUFFER_LEN - HEADER_LEN);
        // SAFETY: within this buffer, which by the caller's promise nobody else uses.
        unsafe { slice::from_raw_parts_mut(self.address(id).add(HEADER_LEN), len) }
    }
}

impl Net {
    /// The first network device among `devices`, started.
    pub fn find(devices: &[Option<Location>], free: &mut Free) -> Option<Self> {
        let mmio = Mmio::find(devices, DEVICE_ID)?;
        mmio.negotiate(FEATURE_MAC, 0);
        let mac = core::array::from_fn(|i| mmio.config(i as u64));
        let mut receiver = Receiver::new(Queue::new(mmio, 0, QUEUE_LEN_MAX, free), free);
        let sender = Sender::new(Queue::new(mmio, 1, QUEUE_LEN_MAX, free), free);
        mmio.start();
        receiver.queue.publish();
        Some(Self { mmio, mac, receiver, sender })
    }

    /// The device's interrupt, for [`crate::cpu::wait`].
    pub fn irq(&self) -> u32 {
        self.mmio.irq
    }

    /// Answers the device's interrupt; frames are then taken by polling.
    pub fn acknowledge(&self) {
        self.mmio.acknowledge();
    }

    /// Gives the device frames and empty buffers since the last call. True if someone who waited for room can send
    /// now; otherwise the device's interrupt will say so.
    pub fn flush(&mut self) -> bool {
        self.sender.queue.publish();
        // Each notification costs an exit: buffers go back by the quarter.
        if self.receiver.queue.unpublished() >= self.receiver.queue.size() / 4 {
            self.receiver.queue.publish();
        }
        self.sender.waiting && self.sender.has_room()
    }
}

impl Receiver {
    fn new(mut queue: Queue, free: &mut Free) -> Self {
        let buffers = Buffers::new(queue.size(), free);
        for id in 0..queue.size() {
            queue.describe(id, buffers.address(id) as u64, BUFFER_LEN as u32, WRITE, 0);
            queue.offer(id);
        }
        Self { queue, buffers }
    }
}

impl Sender {
    fn new(mut queue: Queue, free: &mut Free) -> Self {
        queue.want_interrupts(false);
        let buffers = Buffers::new(queue.size(), free);
        let idle_len = queue.size().into();
        Self { queue, buffers, idle: core::array::from_fn(|i| i as u16), idle_len, waiting: false }
    }

    /// Takes back what the device has sent. True if there is a buffer.
    fn has_room(&mut self) -> bool {
        while let Some((id, _)) = self.queue.take() {
            self.idle[self.idle_len] = id;
            self.idle_len += 1;
        }
        let full = self.idle_len == 0;
        if full != self.waiting {
            self.waiting = full;
            self.queue.want_interrupts(full);
        }
        !full
    }
}

impl phy::Device for Net {
    type RxToken<'a> = RxToken<'a>;
    type TxToken<'a> = &'a mut Sender;

    fn receive(&mut self, _now: Instant) -> Option<(RxToken<'_>, &mut Sender)> {
        // A frame may need an answer, so it is taken only when there is room to send.
        if !self.receiver.queue.has_used() || !self.sender.has_room() {
            return None;
        }
        let (id, len) = self.receiver.queue.take()?;
        Some((RxToken { receiver: &mut self.receiver, id, len: len as usize }, &mut self.sender))
    }

    fn transmit(&mut self, _now: Instant) -> Option<&mut Sender> {
        self.sender.has_room().then_some(&mut self.sender)
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME_LEN_MAX;
        capabilities
    }
}

/// A frame that came in; its buffer goes back to the device with the token.
pub struct RxToken<'a> {
    receiver: &'a mut Receiver,
    id: u16,
    len: usize,
}

impl phy::RxToken for RxToken<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        // SAFETY: the device has given this buffer back, and `drop` offers it again only afterwards.
        f(unsafe { self.receiver.buffers.frame(self.id, self.len.saturating_sub(HEADER_LEN)) })
    }
}

impl Drop for RxToken<'_> {
    fn drop(&mut self) {
        self.receiver.queue.offer(self.id);
    }
}

impl phy::TxToken for &mut Sender {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        self.idle_len -= 1;
        let id = self.idle[self.idle_len];
        // SAFETY: the device does not have an idle buffer; it is offered after `f`.
        let result = f(unsafe { self.buffers.frame(id, len) });
        self.queue.describe(id, self.buffers.address(id) as u64, (HEADER_LEN + len) as u32, 0, 0);
        self.queue.offer(id);
        result
    }
}
