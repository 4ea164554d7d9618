//! What a virtio device works with while it serves its queues.

use super::queue::{Broken, Chain, VirtQueue};
use crate::devices::access::Effects;
use crate::ram::GuestMemory;

/// A device's queues, guest memory, and the place for its effects.
pub(super) struct DeviceIo<'a> {
    pub slot: u8,
    pub queues: &'a mut [VirtQueue],
    pub memory: &'a GuestMemory,
    pub effects: &'a mut Effects,
    /// The driver wants an interrupt for a used buffer.
    pub signal: bool,
    /// How many chains may still be taken: a ring that overlaps another one could go on for ever.
    pub chains_left: u32,
}

impl DeviceIo<'_> {
    /// Takes the next chain of a queue.
    pub fn next_chain(&mut self, queue: usize) -> Result<Option<Chain>, Broken> {
        self.chains_left = self.chains_left.checked_sub(1).ok_or(Broken)?;
        self.queues[queue].next_chain(self.memory)
    }

    /// Gives a chain back, with `written` bytes in its writable part.
    pub fn return_chain(&mut self, queue: usize, head: u16, written: u32) -> Result<(), Broken> {
        self.signal |= self.queues[queue].return_chain(self.memory, head, written)?;
        Ok(())
    }
}
