//! The devices. Each takes an access or an input and gives a reply; the level of its interrupt line follows from its
//! state. A device does no I/O and gets the time as an argument. Its struct is its whole state, from which saving,
//! restoring and the digest are derived.

use entry::{Answer, Console, Digest, Input, Output, Question};
use serde::{Deserialize, Serialize};

use crate::bus::{Bus, BusTarget};
use crate::config::{MachineConfig, VIRTIO_BASE, VIRTIO_IRQS, VIRTIO_SIZE, VIRTIO_STRIDE};
use crate::digest::digest_of;
use crate::ram::GuestMemory;

mod access;
pub mod i8042;
pub mod pic;
pub mod pit;
pub mod rtc;
pub mod serial;
pub mod virtio;

pub use access::{DeviceContext, Effects, PowerRequest};
use pic::Pic;
use pit::Pit;
use rtc::Rtc;
use serial::Serial;
use virtio::VirtioMmio;

/// Port that switches the machine off when [`POWER_OFF_VALUE`] is written to it.
pub const POWER_OFF_PORT: u16 = 0x604;
/// The value that switches the machine off.
pub const POWER_OFF_VALUE: u8 = 0x34;

/// All devices of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Devices {
    /// Interrupt controllers.
    pub pic: Pic,
    /// Timer.
    pub pit: Pit,
    /// Clock.
    pub rtc: Rtc,
    /// Serial port.
    pub serial: Serial,
    /// virtio devices, by slot.
    pub virtio: Vec<VirtioMmio>,
}

impl Devices {
    /// Devices after power-on.
    pub fn new(config: &MachineConfig) -> Devices {
        let virtio =
            config.slots.iter().zip(0..).map(|(device, slot)| VirtioMmio::new(slot, device)).collect();
        let rtc = Rtc::new(config.epoch_s);
        let mut devices = Devices { pic: Pic::new(), pit: Pit::new(), rtc, serial: Serial::new(), virtio };
        devices.connect_lines();
        devices
    }

    /// Resets the devices. What has a battery keeps its state, and the numbers of disk requests go on.
    pub fn reset(&mut self) {
        self.pic = Pic::new();
        self.pit = Pit::new();
        self.rtc.reset();
        self.serial = Serial::new();
        self.virtio.iter_mut().for_each(VirtioMmio::power_cycle);
        self.connect_lines();
    }

    /// Whether the devices are of the same kinds, in the same slots, as `other`, and each in a state that it can be in.
    pub fn has_shape_of(&self, other: &Devices) -> bool {
        let sane = self.pic.is_sane() && self.pit.is_sane() && self.rtc.is_sane() && self.serial.is_sane();
        sane && self.virtio.len() == other.virtio.len()
            && self.virtio.iter().zip(&other.virtio).all(|(a, b)| a.has_shape_of(b))
    }

    /// Sets the interrupt lines as after power-on: all are edge-triggered, the timer's is high. A virtio line falls when the
    /// guest acknowledges the interrupt status, so no interrupt is lost to edges, and a guest may acknowledge after its handler
    /// has ended.
    fn connect_lines(&mut self) {
        self.pic.set_line(0, self.pit.line(0));
    }

    /// The bus of ports and the bus of memory.
    pub fn buses(&self) -> (Bus, Bus) {
        let mut ports = Bus::default();
        for (start, len) in pic::PORTS {
            ports.add(start.into(), len.into(), BusTarget::Pic);
        }
        for (start, len) in pit::PORTS {
            ports.add(start.into(), len.into(), BusTarget::Pit);
        }
        ports.add(rtc::PORT.into(), 2, BusTarget::Rtc);
        ports.add(serial::PORT.into(), 8, BusTarget::Serial);
        ports.add(i8042::DATA.into(), 1, BusTarget::I8042);
        ports.add(i8042::COMMAND.into(), 1, BusTarget::I8042);
        ports.add(POWER_OFF_PORT.into(), 1, BusTarget::PowerOff);
        let mut memory = Bus::default();
        for slot in 0..self.virtio.len() as u8 {
            memory.add(VIRTIO_BASE + slot as u64 * VIRTIO_STRIDE, VIRTIO_SIZE, BusTarget::Virtio(slot));
        }
        (ports, memory)
    }

    /// Serves a read of one byte of a port.
    pub fn read_port(&mut self, target: BusTarget, port: u16, offset: u64, cx: &mut DeviceContext<'_>) -> u8 {
        let offset = offset as u16;
        let value = match target {
            BusTarget::Pic => self.pic.read(port),
            BusTarget::Pit => self.pit.read(port, cx.now_ns),
            BusTarget::Rtc => self.rtc.read(offset, cx.now_ns),
            BusTarget::Serial => self.serial.read(offset),
            BusTarget::I8042 => i8042::read(port),
            BusTarget::PowerOff | BusTarget::Virtio(_) => 0xff,
        };
        self.drive_lines(target, cx.now_ns);
        value
    }

    /// Serves a write of one byte to a port.
    pub fn write_port(
        &mut self,
        target: BusTarget,
        port: u16,
        offset: u64,
        value: u8,
        cx: &mut DeviceContext<'_>,
    ) {
        let offset = offset as u16;
        match target {
            BusTarget::Pic => self.pic.write(port, value),
            BusTarget::Pit => self.pit.write(port, value, cx.now_ns),
            BusTarget::Rtc => self.rtc.write(offset, value, cx.now_ns),
            BusTarget::Serial => {
                self.serial.write(offset, value);
                let printed = self.serial.take_printed(false);
                cx.effects
                    .outputs
                    .extend(printed.map(|bytes| Output::Console { console: Console::Serial, bytes }));
            }
            BusTarget::I8042 if i8042::write(port, value) => cx.effects.request = Some(PowerRequest::Reset),
            BusTarget::PowerOff if value == POWER_OFF_VALUE => {
                cx.effects.request = Some(PowerRequest::PowerOff)
            }
            _ => {}
        }
        self.drive_lines(target, cx.now_ns);
    }

    /// Serves a read of a register of the virtio device in `slot`.
    pub fn read_virtio(&self, slot: u8, offset: u64, size: u8) -> u64 {
        self.virtio[slot as usize].read(offset, size)
    }

    /// Serves a write to a register of the virtio device in `slot`.
    pub fn write_virtio(&mut self, slot: u8, offset: u64, size: u8, value: u64, cx: &mut DeviceContext<'_>) {
        self.virtio[slot as usize].write(offset, size, value, cx);
        self.drive_lines(BusTarget::Virtio(slot), cx.now_ns);
    }

    /// Whether the device that an input is for has room for it.
    pub fn has_room_for(&self, input: &Input, memory: &GuestMemory) -> bool {
        match (input, slot_of(input)) {
            (_, Some(slot)) => {
                self.virtio.get(slot as usize).is_none_or(|device| device.has_room_for(input, memory))
            }
            (Input::Console { bytes, .. }, None) => bytes.len() <= self.serial.room(),
            _ => true,
        }
    }

    /// Applies an input other than [`Input::Clock`]. An input for a device that does not exist is ignored.
    pub fn apply(&mut self, input: Input, cx: &mut DeviceContext<'_>) {
        if let Some(slot) = slot_of(&input) {
            if let Some(device) = self.virtio.get_mut(slot as usize) {
                device.apply(input, cx);
                self.drive_lines(BusTarget::Virtio(slot), cx.now_ns);
            }
        } else if let Input::Console { bytes, .. } = input {
            self.serial.receive(&bytes);
            self.drive_lines(BusTarget::Serial, cx.now_ns);
        }
    }

    /// Gives a device the answer to its question. Returns `false` if the answer does not fit the question.
    pub fn answer(&mut self, question: &Question, answer: Answer, cx: &mut DeviceContext<'_>) -> bool {
        let Question::Entropy { slot, .. } = *question else { return false };
        let Some(device) = self.virtio.get_mut(slot as usize) else { return false };
        let fits = device.answer(question, answer, cx);
        self.drive_lines(BusTarget::Virtio(slot), cx.now_ns);
        fits
    }

    /// Outputs what was printed of a console line that is not complete.
    pub fn flush_console(&mut self, effects: &mut Effects) {
        let printed = self.serial.take_printed(true);
        effects.outputs.extend(printed.map(|bytes| Output::Console { console: Console::Serial, bytes }));
    }

    /// The digest of each device, with its name.
    pub fn digests(&self) -> Vec<(&'static str, Digest)> {
        let mut digests = vec![
            ("pic", digest_of(&self.pic)),
            ("pit", digest_of(&self.pit)),
            ("rtc", digest_of(&self.rtc)),
            ("serial", digest_of(&self.serial)),
        ];
        digests.extend(self.virtio.iter().map(|device| (device.name(), digest_of(device))));
        digests
    }

    /// Sets the interrupt line of a device whose state may have changed.
    pub fn drive_lines(&mut self, target: BusTarget, now_ns: u64) {
        match target {
            BusTarget::Pit => self.pic.set_line(0, self.pit.line(now_ns)),
            BusTarget::Rtc => self.pic.set_line(rtc::IRQ, self.rtc.irq()),
            BusTarget::Serial => self.pic.set_line(serial::IRQ, self.serial.irq()),
            BusTarget::Virtio(slot) => {
                self.pic.set_line(VIRTIO_IRQS[slot as usize], self.virtio[slot as usize].irq());
            }
            _ => {}
        }
    }

    /// Guest time in ns at which the next timer is due.
    pub fn deadline_ns(&self) -> Option<u64> {
        self.pit.deadline_ns().into_iter().chain(self.rtc.deadline_ns()).min()
    }

    /// Brings the timers up to a guest time.
    pub fn advance(&mut self, now_ns: u64) {
        if self.pit.advance(now_ns) {
            self.pic.set_line(0, false);
            self.pic.set_line(0, true);
            self.drive_lines(BusTarget::Pit, now_ns);
        }
        self.rtc.advance(now_ns);
        self.drive_lines(BusTarget::Rtc, now_ns);
    }
}

/// The slot of the virtio device that an input is for.
fn slot_of(input: &Input) -> Option<u8> {
    match input {
        Input::Frame { slot, .. } | Input::DiskDone { slot, .. } => Some(*slot),
        Input::Console { console: Console::Virtio(slot), .. } => Some(*slot),
        Input::Console { console: Console::Serial, .. } | Input::Clock { .. } => None,
    }
}
