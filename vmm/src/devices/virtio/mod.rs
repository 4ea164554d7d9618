//! virtio 1.2 devices behind the virtio-mmio transport, version 2 (section 4.2.2), split rings.
//!
//! Whatever a driver does, the reply is the same on every side, and takes bounded time and memory. If a device cannot make
//! sense of its rings (rings or chains outside of RAM, loops, wrong direction), it sets DEVICE_NEEDS_RESET and does nothing
//! until it is reset.

use entry::{Answer, Input, Question};
use serde::{Deserialize, Serialize};
use virtio_queue::QueueT;

use super::access::DeviceContext;
use crate::config::Slot;
use crate::ram::GuestMemory;

mod blk;
mod console;
mod io;
mod net;
mod queue;
mod rng;

use blk::Blk;
use console::VirtioConsole;
use io::DeviceIo;
use net::Net;
use queue::{Broken, VirtQueue};
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

/// The most chains that are taken in one go: more than any queue holds.
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

/// The device behind the transport.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum VirtioDevice {
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
    device: VirtioDevice,
}

impl VirtioMmio {
    /// A device after power-on.
    pub fn new(slot: u8, config: &Slot) -> VirtioMmio {
        let device = match *config {
            Slot::Net { mac } => VirtioDevice::Net(Net::new(mac)),
            Slot::Disk { bytes, read_only } => VirtioDevice::Blk(Blk::new(bytes, read_only)),
            Slot::Entropy => VirtioDevice::Rng(Rng::default()),
            Slot::Console => VirtioDevice::Console(VirtioConsole),
        };
        let sizes: &[u16] = match device {
            VirtioDevice::Net(_) => &net::QUEUES,
            VirtioDevice::Blk(_) => &blk::QUEUES,
            VirtioDevice::Rng(_) => &rng::QUEUES,
            VirtioDevice::Console(_) => &console::QUEUES,
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

    /// Resets the device with the machine: as after power-on, but the numbers of disk requests go on.
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
            VirtioDevice::Blk(blk) => blk.reset(),
            VirtioDevice::Rng(rng) => *rng = Rng::default(),
            VirtioDevice::Net(_) | VirtioDevice::Console(_) => {}
        }
    }

    /// Whether this device is of the same kind, with the same queues, in the same slot, as `other`.
    pub fn has_shape_of(&self, other: &VirtioMmio) -> bool {
        let sizes =
            |device: &VirtioMmio| device.queues.iter().map(|queue| queue.max_size()).collect::<Vec<_>>();
        (self.slot, self.device_id(), sizes(self)) == (other.slot, other.device_id(), sizes(other))
    }

    /// The kind of device, for messages and digests.
    pub fn name(&self) -> &'static str {
        match self.device {
            VirtioDevice::Net(_) => "virtio-net",
            VirtioDevice::Blk(_) => "virtio-blk",
            VirtioDevice::Rng(_) => "virtio-rng",
            VirtioDevice::Console(_) => "virtio-console",
        }
    }

    /// Level of the interrupt line.
    pub fn irq(&self) -> bool {
        self.interrupt_status != 0
    }

    fn device_id(&self) -> u32 {
        match self.device {
            VirtioDevice::Net(_) => 1,
            VirtioDevice::Blk(_) => 2,
            VirtioDevice::Console(_) => 3,
            VirtioDevice::Rng(_) => 4,
        }
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES
            | match &self.device {
                VirtioDevice::Net(_) => net::FEATURES,
                VirtioDevice::Blk(blk) => blk.features(),
                VirtioDevice::Rng(_) | VirtioDevice::Console(_) => 0,
            }
    }

    /// Whether the device may use its rings.
    fn is_live(&self) -> bool {
        self.status & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK
    }

    /// Serves a read of `size` bytes at `offset` of the register window.
    pub fn read(&self, offset: u64, size: u8) -> u64 {
        if offset >= register::CONFIG {
            let config = match &self.device {
                VirtioDevice::Net(net) => net.config(),
                VirtioDevice::Blk(blk) => blk.config(),
                VirtioDevice::Rng(_) | VirtioDevice::Console(_) => Vec::new(),
            };
            let at = (offset - register::CONFIG) as usize;
            let byte = |i: usize| config.get(at + i).copied().unwrap_or(0) as u64;
            return (0..size as usize).fold(0, |value, i| value | byte(i) << (8 * i));
        }
        // The registers of the transport are 32 bits wide and must be read as such.
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

    /// Serves a write of `size` bytes at `offset` of the register window. No device has a writable configuration.
    pub fn write(&mut self, offset: u64, size: u8, value: u64, cx: &mut DeviceContext<'_>) {
        if size == 4 && offset & 3 == 0 && offset < register::CONFIG {
            self.write_register(offset, value as u32, cx);
        }
    }

    fn write_register(&mut self, offset: u64, value: u32, cx: &mut DeviceContext<'_>) {
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

    /// Serves a write to a register of the selected queue. These are fixed while the queue is in use.
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

    fn set_status(&mut self, value: u32, cx: &mut DeviceContext<'_>) {
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
        // A driver may have filled its rings before it set DRIVER_OK.
        if !was_live && self.is_live() {
            (0..self.queues.len()).for_each(|queue| self.notify(queue, cx));
        }
    }

    /// Serves a driver's notification that it has put chains into a queue.
    fn notify(&mut self, queue: usize, cx: &mut DeviceContext<'_>) {
        if queue < self.queues.len() && self.queues[queue].ready() {
            self.run_device(cx, |device, io| match device {
                VirtioDevice::Net(net) => net.notify(queue, io),
                VirtioDevice::Blk(blk) => blk.notify(io),
                VirtioDevice::Rng(rng) => rng.notify(io),
                VirtioDevice::Console(console) => console.notify(queue, io),
            });
        }
    }

    /// Lets the device work on its rings. If it cannot make sense of them, it needs a reset.
    fn run_device(
        &mut self,
        cx: &mut DeviceContext<'_>,
        work: impl FnOnce(&mut VirtioDevice, &mut DeviceIo<'_>) -> Result<(), Broken>,
    ) {
        if !self.is_live() {
            return;
        }
        let mut io = DeviceIo {
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

    /// Whether the driver has a buffer for an input.
    pub fn has_room_for(&self, input: &Input, memory: &GuestMemory) -> bool {
        match (&self.device, input) {
            (VirtioDevice::Net(_), Input::Frame { .. }) => {
                self.is_live() && self.queues[net::RX].has_chain(memory)
            }
            (VirtioDevice::Console(_), Input::Console { .. }) => {
                self.is_live() && self.queues[console::RX].has_chain(memory)
            }
            _ => true,
        }
    }

    /// Applies an input for this slot. An input for another kind of device is ignored.
    pub fn apply(&mut self, input: Input, cx: &mut DeviceContext<'_>) {
        self.run_device(cx, |device, io| match (device, input) {
            (VirtioDevice::Net(net), Input::Frame { bytes, .. }) => net.receive(&bytes, io),
            (VirtioDevice::Blk(blk), Input::DiskDone { id, result, .. }) => blk.complete(id, result, io),
            (VirtioDevice::Console(console), Input::Console { bytes, .. }) => console.receive(&bytes, io),
            _ => Ok(()),
        });
    }

    /// Takes the answer to this device's question. Returns `false` if the answer is of the wrong kind or length.
    pub fn answer(&mut self, question: &Question, answer: Answer, cx: &mut DeviceContext<'_>) -> bool {
        let (Question::Entropy { len, .. }, Answer::Entropy(bytes)) = (question, answer) else {
            return false;
        };
        if bytes.len() != *len as usize {
            return false;
        }
        self.run_device(cx, |device, io| match device {
            VirtioDevice::Rng(rng) => rng.answer(&bytes, io),
            _ => Ok(()),
        });
        true
    }

    /// Disk requests that were made and are not completed, in order.
    pub fn unfinished(&self) -> Vec<entry::DiskRequest> {
        match &self.device {
            VirtioDevice::Blk(blk) => blk.unfinished(self.slot),
            _ => Vec::new(),
        }
    }
}

/// The low (0) or high (1) half of the features.
fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

#[cfg(test)]
mod tests;
