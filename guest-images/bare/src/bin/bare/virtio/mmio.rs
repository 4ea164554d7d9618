//! The registers of a virtio-mmio device (virtio 1.2, section 4.2.2) and its start (section 3.1.1).
#![allow(unsafe_code)]

use crate::cpu;
use bare::options::Device;
use core::arch::asm;

const MAGIC_VALUE: u64 = 0x000;
const VERSION: u64 = 0x004;
const DEVICE_ID: u64 = 0x008;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SEL: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SEL: u64 = 0x024;
const QUEUE_SEL: u64 = 0x030;
const QUEUE_NUM_MAX: u64 = 0x034;
const QUEUE_NUM: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
const QUEUE_NOTIFY: u64 = 0x050;
const INTERRUPT_ACK: u64 = 0x064;
const STATUS: u64 = 0x070;
const QUEUE_DESC: u64 = 0x080;
const QUEUE_DRIVER: u64 = 0x090;
const QUEUE_DEVICE: u64 = 0x0a0;
const CONFIG: u64 = 0x100;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;

/// VIRTIO_F_VERSION_1.
const VERSION_1: u64 = 1 << 32;

/// A device's registers.
#[derive(Clone, Copy)]
pub struct Mmio {
    base: u64,
    /// The device's interrupt, for [`crate::cpu::wait`].
    pub irq: u32,
}

impl Mmio {
    /// The first device with virtio's `id` among `devices`.
    pub fn find(devices: &[Option<Device>], id: u32) -> Option<Self> {
        let mut all = devices.iter().flatten().map(|device| Self { base: device.base, irq: 1 << device.irq });
        all.find(|mmio| {
            let known = mmio.read(MAGIC_VALUE) == MAGIC && mmio.read(VERSION) == 2;
            known && mmio.read(DEVICE_ID) == id
        })
    }

    /// Resets the device and agrees on features: VERSION_1, the `required`, and what it has of the `optional`. Returns
    /// those of the last. Queues come next, then [`Self::start`].
    ///
    /// # Panics
    /// If the device does not offer what is required.
    pub fn negotiate(&self, required: u64, optional: u64) -> u64 {
        self.write(STATUS, 0);
        self.write(STATUS, ACKNOWLEDGE | DRIVER);
        let offered = [0, 1].map(|half| {
            self.write(DEVICE_FEATURES_SEL, half);
            u64::from(self.read(DEVICE_FEATURES)) << (32 * half)
        });
        let (offered, required) = (offered[0] | offered[1], required | VERSION_1);
        assert_eq!(offered & required, required, "virtio at {:#x}: features", self.base);
        let accepted = required | offered & optional;
        for half in [0, 1] {
            self.write(DRIVER_FEATURES_SEL, half);
            self.write(DRIVER_FEATURES, (accepted >> (32 * half)) as u32);
        }
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert!(self.read(STATUS) & FEATURES_OK != 0, "virtio at {:#x} refuses its own features", self.base);
        accepted & optional
    }

    /// The device may use its queues from now on.
    pub fn start(&self) {
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// Gives queue `index` its size, at most `size_max`, and its areas (descriptors, driver's, device's). Returns the size.
    pub fn set_queue(&self, index: u32, size_max: u16, areas: [u64; 3]) -> u16 {
        self.write(QUEUE_SEL, index);
        let size = self.read(QUEUE_NUM_MAX).min(size_max.into()) as u16;
        assert!(size.is_power_of_two(), "virtio at {:#x}: queue {index} has {size} entries", self.base);
        self.write(QUEUE_NUM, size.into());
        for (register, address) in [QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE].into_iter().zip(areas) {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(QUEUE_READY, 1);
        size
    }

    /// Tells the device to look at queue `index`.
    pub fn notify(&self, index: u32) {
        self.write(QUEUE_NOTIFY, index);
    }

    /// Takes the interrupt of used buffers back, so that the next one can come. Before the queues are looked at.
    pub fn acknowledge(&self) {
        self.write(INTERRUPT_ACK, 1);
        cpu::end_of_interrupt(self.irq);
    }

    /// One byte of the device's configuration.
    pub fn config(&self, offset: u64) -> u8 {
        let value: u8;
        // SAFETY: as in `read`.
        unsafe {
            asm!("mov {}, [{}]", out(reg_byte) value, in(reg) self.base + CONFIG + offset, options(nostack))
        }
        value
    }

    fn read(&self, register: u64) -> u32 {
        let value: u32;
        // SAFETY: the command line says that the device's registers are there; a plain MOV, which every VMM can emulate.
        unsafe { asm!("mov {:e}, [{}]", out(reg) value, in(reg) self.base + register, options(nostack)) }
        value
    }

    fn write(&self, register: u64, value: u32) {
        // SAFETY: as in `read`. The device may read or write what the queues name; the compiler sees a memory clobber.
        unsafe { asm!("mov [{}], {:e}", in(reg) self.base + register, in(reg) value, options(nostack)) }
    }
}
