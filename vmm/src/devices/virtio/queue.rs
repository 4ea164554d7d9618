//! A split ring (section 2.7) as a device uses it: it takes checked chains and gives them back as used.

use std::ops::{Deref, DerefMut};

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, Permissions};

use crate::ram::GuestMemory;

/// The driver did something that the device cannot make sense of: the device needs a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Broken;

impl From<virtio_queue::Error> for Broken {
    fn from(_: virtio_queue::Error) -> Broken {
        Broken
    }
}

impl From<vm_memory::GuestMemoryError> for Broken {
    fn from(_: vm_memory::GuestMemoryError) -> Broken {
        Broken
    }
}

/// A buffer of a chain. It lies in RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Buffer {
    pub addr: u64,
    pub len: u32,
}

/// A chain: buffers that the device may read, then buffers that it may write. All of them lie in RAM, and there are not more
/// than the queue has descriptors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Chain {
    pub head: u16,
    pub readable: Vec<Buffer>,
    pub writable: Vec<Buffer>,
}

/// Number of bytes in buffers.
pub(super) fn total(buffers: &[Buffer]) -> u64 {
    buffers.iter().map(|buffer| buffer.len as u64).sum()
}

/// Appends up to `limit` bytes of the buffers to `bytes`, after skipping the first `skip`.
pub(super) fn gather(
    memory: &GuestMemory,
    buffers: &[Buffer],
    skip: u64,
    limit: usize,
    bytes: &mut Vec<u8>,
) -> Result<(), Broken> {
    let mut skip = skip;
    let end = bytes.len() + limit;
    for buffer in buffers {
        let skipped = skip.min(buffer.len as u64);
        skip -= skipped;
        let len = (buffer.len as usize - skipped as usize).min(end - bytes.len());
        let start = bytes.len();
        bytes.resize(start + len, 0);
        memory.read_slice(&mut bytes[start..], GuestAddress(buffer.addr + skipped))?;
    }
    Ok(())
}

/// Writes bytes into the buffers, and returns how many fitted.
pub(super) fn scatter(memory: &GuestMemory, buffers: &[Buffer], bytes: &[u8]) -> Result<u32, Broken> {
    let mut rest = bytes;
    for buffer in buffers {
        let (now, later) = rest.split_at(rest.len().min(buffer.len as usize));
        memory.write_slice(now, GuestAddress(buffer.addr))?;
        rest = later;
    }
    Ok((bytes.len() - rest.len()) as u32)
}

/// A queue whose whole state can be saved.
#[derive(Debug)]
pub(super) struct VirtQueue(Queue);

impl PartialEq for VirtQueue {
    fn eq(&self, other: &VirtQueue) -> bool {
        self.0.state() == other.0.state()
    }
}

impl Eq for VirtQueue {}

impl Clone for VirtQueue {
    fn clone(&self) -> VirtQueue {
        VirtQueue(
            Queue::try_from(self.0.state())
                .unwrap_or_else(|error| unreachable!("a queue's own state: {error}")),
        )
    }
}

impl VirtQueue {
    /// A queue of at most `max_size` entries, a power of two.
    pub fn new(max_size: u16) -> VirtQueue {
        VirtQueue(
            Queue::new(max_size).unwrap_or_else(|error| unreachable!("queue sizes are constants: {error}")),
        )
    }

    pub fn reset(&mut self) {
        self.0 = Queue::new(self.0.max_size()).unwrap_or_else(|error| unreachable!("as before: {error}"));
    }

    /// Puts the queue into use, or out of use.
    pub fn set_in_use(&mut self, ready: bool, event_idx: bool) {
        // A new queue from the saved state: without EVENT_IDX, virtio-queue counts the chains given back since it last read
        // the driver's event index. That count is not in the saved state, and would be used once EVENT_IDX is negotiated.
        *self = self.clone();
        self.0.set_event_idx(event_idx);
        self.0.set_ready(ready);
    }

    /// Whether a chain waits in the queue.
    pub fn has_chain(&self, memory: &GuestMemory) -> bool {
        self.0.ready()
            && self.0.is_valid(memory)
            && self
                .0
                .avail_idx(memory, std::sync::atomic::Ordering::Acquire)
                .is_ok_and(|idx| idx.0 != self.0.next_avail())
    }

    /// Takes the next chain.
    pub fn next_chain(&mut self, memory: &GuestMemory) -> Result<Option<Chain>, Broken> {
        if !self.0.is_valid(memory) {
            return Err(Broken);
        }
        let longest = self.0.size() as usize;
        let Some(descriptors) = self.0.iter(memory)?.next() else { return Ok(None) };
        let head = descriptors.head_index();
        let mut chain = Chain { head, readable: Vec::new(), writable: Vec::new() };
        let mut complete = false;
        for descriptor in descriptors.take(longest) {
            let (addr, len) = (descriptor.addr(), descriptor.len());
            let access = if descriptor.is_write_only() { Permissions::Write } else { Permissions::Read };
            if !memory.check_range(addr, len as usize, access) {
                return Err(Broken);
            }
            let buffer = Buffer { addr: addr.0, len };
            match descriptor.is_write_only() {
                true => chain.writable.push(buffer),
                // The buffers that the device reads come first (2.7.4.2).
                false if chain.writable.is_empty() => chain.readable.push(buffer),
                false => return Err(Broken),
            }
            complete = !descriptor.has_next();
        }
        // A loop, or a descriptor that cannot be read, ends the iteration early.
        if complete { Ok(Some(chain)) } else { Err(Broken) }
    }

    /// Gives a chain back as used. Returns whether the driver wants an interrupt for it.
    pub fn return_chain(&mut self, memory: &GuestMemory, head: u16, written: u32) -> Result<bool, Broken> {
        self.0.add_used(memory, head, written)?;
        Ok(self.0.needs_notification(memory)?)
    }

    /// Asks to be notified of the next chain. Returns `true` if there is one already.
    pub fn ask_for_notification(&mut self, memory: &GuestMemory) -> Result<bool, Broken> {
        Ok(self.0.enable_notification(memory)?)
    }
}

impl Deref for VirtQueue {
    type Target = Queue;

    fn deref(&self) -> &Queue {
        &self.0
    }
}

impl DerefMut for VirtQueue {
    fn deref_mut(&mut self) -> &mut Queue {
        &mut self.0
    }
}

/// [`QueueState`] in a form that can be serialised.
#[derive(Serialize, Deserialize)]
struct SavedQueue {
    max_size: u16,
    next_avail: u16,
    next_used: u16,
    event_idx_enabled: bool,
    size: u16,
    ready: bool,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

impl Serialize for VirtQueue {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let QueueState {
            max_size,
            next_avail,
            next_used,
            event_idx_enabled,
            size,
            ready,
            desc_table,
            avail_ring,
            used_ring,
        } = self.0.state();
        SavedQueue {
            max_size,
            next_avail,
            next_used,
            event_idx_enabled,
            size,
            ready,
            desc_table,
            avail_ring,
            used_ring,
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for VirtQueue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<VirtQueue, D::Error> {
        let saved = SavedQueue::deserialize(deserializer)?;
        let state = QueueState {
            max_size: saved.max_size,
            next_avail: saved.next_avail,
            next_used: saved.next_used,
            event_idx_enabled: saved.event_idx_enabled,
            size: saved.size,
            ready: saved.ready,
            desc_table: saved.desc_table,
            avail_ring: saved.avail_ring,
            used_ring: saved.used_ring,
        };
        Queue::try_from(state).map(VirtQueue).map_err(serde::de::Error::custom)
    }
}
