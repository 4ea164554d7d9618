//! virtio 1.2 devices behind the virtio-mmio transport, version 2 (section 4.2.2), split rings.
//!
//! Whatever a driver does, the reply is the same on every side and costs bounded time and memory. What cannot be made
//! sense of (rings or chains outside of RAM, loops, wrong direction) sets DEVICE_NEEDS_RESET, and the device does nothing
//! until it is reset.

use entry::{Answer, Input, Question};
use serde::{Deserialize, Serialize};
use virtio_queue::QueueT;

use super::{Context, Effects};
use crate::config::Slot;
use crate::ram::GuestMemory;

mod blk;
mod console;
mod net;
mod queue;
mod rng;

use blk::Blk;
use console::VirtioConsole;
use net::Net;
use queue::{Broken, Chain, VirtQueue};
use rng::Rng;

/// VIRTIO_RING_F_INDIRECT_DESC, VIRTIO_RING_F_EVENT_IDX and VIRTIO_F_VERSION_1.
const COMMON_FEATURES: u64 = 1 << 28 | EVENT_IDX | VERSION_1;
const EVENT_IDX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;

/// Bits of the status register (section 2.1).
mod status {
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
}

/// More chains than any queue holds.
const CHAINS_MAX: u32 = 1024;

/// Bits of the interrupt status register.
const USED_BUFFER: u32 = 1;
const CONFIG_CHANGE: u32 = 2;

/// Registers of the transport (table 4.1).
mod register {
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const VENDOR_ID: u64 = 0x0c;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_NUM_MAX: u64 = 0x34;
    pub const QUEUE_NUM: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESC_LOW: u64 = 0x80;
    pub const QUEUE_DESC_HIGH: u64 = 0x84;
    pub const QUEUE_DRIVER_LOW: u64 = 0x90;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x94;
    pub const QUEUE_DEVICE_LOW: u64 = 0xa0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0xa4;
    pub const SHARED_MEMORY: std::ops::RangeInclusive<u64> = 0xb0..=0xbc;
    pub const CONFIG: u64 = 0x100;
}

/// What a device works on when it is told to.
struct Io<'a> {
    slot: u8,
    queues: &'a mut [VirtQueue],
    memory: &'a GuestMemory,
    effects: &'a mut Effects,
    /// A used buffer is to be announced.
    signal: bool,
    /// How many chains may still be taken: a ring that overlaps another could go on for ever.
    chains_left: u32,
}

impl Io<'_> {
    /// The next chain of a queue.
    fn pop(&mut self, queue: usize) -> Result<Option<Chain>, Broken> {
        self.chains_left = self.chains_left.checked_sub(1).ok_or(Broken)?;
        self.queues[queue].pop(self.memory)
    }

    /// Gives a chain back with `written` bytes in its writable part.
    fn put(&mut self, queue: usize, head: u16, written: u32) -> Result<(), Broken> {
        self.signal |= self.queues[queue].put(self.memory, head, written)?;
        Ok(())
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Device {
    Net(Net),
    Blk(Blk),
    Rng(Rng),
    Console(VirtioConsole),
}

/// A virtio device with its transport. Everything in it is state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioMmio {
    slot: u8,
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    interrupt_status: u32,
    queues: Vec<VirtQueue>,
    device: Device,
}

impl VirtioMmio {
    /// A device after power-on.
    pub fn new(slot: u8, config: &Slot) -> VirtioMmio {
        let device = match *config {
            Slot::Net { mac } => Device::Net(Net::new(mac)),
            Slot::Disk { bytes, read_only } => Device::Blk(Blk::new(bytes, read_only)),
            Slot::Entropy => Device::Rng(Rng::default()),
            Slot::Console => Device::Console(VirtioConsole),
        };
        let sizes: &[u16] = match device {
            Device::Net(_) => &net::QUEUES,
            Device::Blk(_) => &blk::QUEUES,
            Device::Rng(_) => &rng::QUEUES,
            Device::Console(_) => &console::QUEUES,
        };
        VirtioMmio {
            slot,
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            interrupt_status: 0,
            queues: sizes.iter().map(|size| VirtQueue::new(*size)).collect(),
            device,
        }
    }

    /// Reset of the machine: as after power-on, but disk requests keep their numbers.
    pub fn power_cycle(&mut self) {
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.queue_sel = 0;
        self.reset();
    }

    fn reset(&mut self) {
        self.status = 0;
        self.driver_features = 0;
        self.interrupt_status = 0;
        self.queues.iter_mut().for_each(VirtQueue::reset);
        match &mut self.device {
            Device::Blk(blk) => blk.reset(),
            Device::Rng(rng) => *rng = Rng::default(),
            Device::Net(_) | Device::Console(_) => {}
        }
    }

    /// Whether this is the same kind of device, with the same queues, in the same slot.
    pub fn has_shape_of(&self, other: &VirtioMmio) -> bool {
        let sizes =
            |device: &VirtioMmio| device.queues.iter().map(|queue| queue.max_size()).collect::<Vec<_>>();
        (self.slot, self.device_id(), sizes(self)) == (other.slot, other.device_id(), sizes(other))
    }

    /// What kind of device it is, for messages.
    pub fn name(&self) -> &'static str {
        match self.device {
            Device::Net(_) => "virtio-net",
            Device::Blk(_) => "virtio-blk",
            Device::Rng(_) => "virtio-rng",
            Device::Console(_) => "virtio-console",
        }
    }

    /// Level of the interrupt line.
    pub fn irq(&self) -> bool {
        self.interrupt_status != 0
    }

    fn device_id(&self) -> u32 {
        match self.device {
            Device::Net(_) => 1,
            Device::Blk(_) => 2,
            Device::Console(_) => 3,
            Device::Rng(_) => 4,
        }
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES
            | match &self.device {
                Device::Net(_) => net::FEATURES,
                Device::Blk(blk) => blk.features(),
                Device::Rng(_) | Device::Console(_) => 0,
            }
    }

    /// The device may use its rings.
    fn is_live(&self) -> bool {
        self.status & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK
    }

    /// The guest reads `size` bytes at `offset` of the window.
    pub fn read(&self, offset: u64, size: u8) -> u64 {
        if offset >= register::CONFIG {
            let config = match &self.device {
                Device::Net(net) => net.config(),
                Device::Blk(blk) => blk.config(),
                Device::Rng(_) | Device::Console(_) => Vec::new(),
            };
            let at = (offset - register::CONFIG) as usize;
            let byte = |i: usize| config.get(at + i).copied().unwrap_or(0) as u64;
            return (0..size as usize).fold(0, |value, i| value | byte(i) << (8 * i));
        }
        // The transport's registers are 32 bits wide and read so.
        if size == 4 && offset & 3 == 0 { self.read_register(offset) as u64 } else { 0 }
    }

    fn read_register(&self, offset: u64) -> u32 {
        let queue = self.queues.get(self.queue_sel as usize);
        match offset {
            register::MAGIC => u32::from_le_bytes(*b"virt"),
            register::VERSION => 2,
            register::DEVICE_ID => self.device_id(),
            register::VENDOR_ID => u32::from_le_bytes(*b"vmft"),
            register::DEVICE_FEATURES => half(self.features(), self.device_features_sel),
            register::QUEUE_NUM_MAX => queue.map_or(0, |queue| queue.max_size().into()),
            register::QUEUE_READY => queue.is_some_and(|queue| queue.ready()) as u32,
            register::INTERRUPT_STATUS => self.interrupt_status,
            register::STATUS => self.status,
            // There is no shared memory.
            offset if register::SHARED_MEMORY.contains(&offset) => u32::MAX,
            _ => 0,
        }
    }

    /// The guest writes `size` bytes at `offset` of the window. No device has a writable configuration.
    pub fn write(&mut self, offset: u64, size: u8, value: u64, cx: &mut Context<'_>) {
        if size == 4 && offset & 3 == 0 && offset < register::CONFIG {
            self.write_register(offset, value as u32, cx);
        }
    }

    fn write_register(&mut self, offset: u64, value: u32, cx: &mut Context<'_>) {
        match offset {
            register::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            register::DRIVER_FEATURES if self.status & status::FEATURES_OK == 0 => {
                let shift = 32 * self.driver_features_sel as u64;
                if shift < 64 {
                    let kept = self.driver_features & !((u32::MAX as u64) << shift);
                    self.driver_features = kept | (value as u64) << shift;
                }
            }
            register::QUEUE_SEL => self.queue_sel = value,
            register::QUEUE_NOTIFY => self.notify(value as usize, cx),
            register::INTERRUPT_ACK => self.interrupt_status &= !value,
            register::STATUS => self.set_status(value, cx),
            _ => self.set_up_queue(offset, value),
        }
    }

    /// Registers of the selected queue. They are fixed while it is in use.
    fn set_up_queue(&mut self, offset: u64, value: u32) {
        let event_idx = self.driver_features & EVENT_IDX != 0;
        let Some(queue) = self.queues.get_mut(self.queue_sel as usize) else { return };
        if queue.ready() && offset != register::QUEUE_READY {
            return;
        }
        match offset {
            register::QUEUE_NUM => queue.set_size(value.try_into().unwrap_or(u16::MAX)),
            register::QUEUE_READY => queue.set_in_use(value & 1 != 0, event_idx),
            register::QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
            register::QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
            register::QUEUE_DRIVER_LOW => queue.set_avail_ring_address(Some(value), None),
            register::QUEUE_DRIVER_HIGH => queue.set_avail_ring_address(None, Some(value)),
            register::QUEUE_DEVICE_LOW => queue.set_used_ring_address(Some(value), None),
            register::QUEUE_DEVICE_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    fn set_status(&mut self, value: u32, cx: &mut Context<'_>) {
        if value == 0 {
            self.reset();
            return;
        }
        let mut value = value & !status::NEEDS_RESET | self.status & status::NEEDS_RESET;
        let agreed = self.driver_features & !self.features() == 0 && self.driver_features & VERSION_1 != 0;
        if !agreed {
            value &= !status::FEATURES_OK;
        }
        let was_live = self.is_live();
        self.status = value;
        // A driver may have filled its rings before it said that it is ready.
        if !was_live && self.is_live() {
            (0..self.queues.len()).for_each(|queue| self.notify(queue, cx));
        }
    }

    /// The driver has put chains into a queue.
    fn notify(&mut self, queue: usize, cx: &mut Context<'_>) {
        if queue < self.queues.len() && self.queues[queue].ready() {
            self.work(cx, |device, io| match device {
                Device::Net(net) => net.notify(queue, io),
                Device::Blk(blk) => blk.notify(io),
                Device::Rng(rng) => rng.notify(io),
                Device::Console(console) => console.notify(queue, io),
            });
        }
    }

    /// Lets the device do something with its rings; what it cannot make sense of ends its service.
    fn work(
        &mut self,
        cx: &mut Context<'_>,
        work: impl FnOnce(&mut Device, &mut Io<'_>) -> Result<(), Broken>,
    ) {
        if !self.is_live() {
            return;
        }
        let mut io = Io {
            slot: self.slot,
            queues: &mut self.queues,
            memory: cx.memory,
            effects: cx.effects,
            signal: false,
            chains_left: CHAINS_MAX,
        };
        let result = work(&mut self.device, &mut io);
        if io.signal {
            self.interrupt_status |= USED_BUFFER;
        }
        if result.is_err() {
            self.status |= status::NEEDS_RESET;
            self.interrupt_status |= CONFIG_CHANGE;
        }
    }

    /// Whether an input would find a buffer.
    pub fn takes(&self, input: &Input, memory: &GuestMemory) -> bool {
        match (&self.device, input) {
            (Device::Net(_), Input::Frame { .. }) => self.is_live() && self.queues[net::RX].has_chain(memory),
            (Device::Console(_), Input::Console { .. }) => {
                self.is_live() && self.queues[console::RX].has_chain(memory)
            }
            _ => true,
        }
    }

    /// Applies an input for this slot. One of another kind of device is ignored.
    pub fn apply(&mut self, input: Input, cx: &mut Context<'_>) {
        self.work(cx, |device, io| match (device, input) {
            (Device::Net(net), Input::Frame { bytes, .. }) => net.receive(&bytes, io),
            (Device::Blk(blk), Input::DiskDone { id, result, .. }) => blk.done(id, result, io),
            (Device::Console(console), Input::Console { bytes, .. }) => console.receive(&bytes, io),
            _ => Ok(()),
        });
    }

    /// The answer to this device's question. False: it is of another kind or length.
    pub fn answer(&mut self, question: &Question, answer: Answer, cx: &mut Context<'_>) -> bool {
        let (Question::Entropy { len, .. }, Answer::Entropy(bytes)) = (question, answer) else {
            return false;
        };
        if bytes.len() != *len as usize {
            return false;
        }
        self.work(cx, |device, io| match device {
            Device::Rng(rng) => rng.answer(&bytes, io),
            _ => Ok(()),
        });
        true
    }

    /// Disk requests that were asked for and are not done, in order: to be issued again when nobody else will.
    pub fn unfinished(&self) -> Vec<entry::DiskRequest> {
        match &self.device {
            Device::Blk(blk) => blk.unfinished(self.slot),
            _ => Vec::new(),
        }
    }
}

fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

#[cfg(test)]
mod tests;
