//! The devices. Each takes an access or an input and gives a reply; interrupt lines are levels read off its state.
//! None does I/O or knows the time but by an argument. What is in a device's struct is its whole state: saving,
//! restoring and the digest come from it.

use entry::{Answer, Console, Digest, DiskRequest, Input, Output, Question};
use serde::{Deserialize, Serialize};

use crate::bus::{Bus, Target};
use crate::config::{MachineConfig, VIRTIO_BASE, VIRTIO_IRQS, VIRTIO_SIZE, VIRTIO_STRIDE};
use crate::machine::digest_of;
use crate::ram::GuestMemory;

pub mod i8042;
pub mod pic;
pub mod pit;
pub mod rtc;
pub mod serial;
pub mod virtio;

use pic::Pic;
use pit::Pit;
use rtc::Rtc;
use serial::Serial;
use virtio::VirtioMmio;

/// Port that switches the machine off when the value is written.
pub const POWER_OFF_PORT: u16 = 0x604;
/// See [`POWER_OFF_PORT`].
pub const POWER_OFF_VALUE: u8 = 0x34;

/// The guest asked for the end of its run, or of the boot it is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Through [`POWER_OFF_PORT`].
    PowerOff,
    /// Through the keyboard controller.
    Reset,
}

/// What an access or an input led to besides its reply.
#[derive(Debug, Default)]
pub struct Effects {
    /// What leaves the machine, in order.
    pub outputs: Vec<Output>,
    /// Requests to disks, in order.
    pub disk: Vec<DiskRequest>,
    /// A question to be answered before the guest goes on.
    pub question: Option<Question>,
    /// Power-off or reset.
    pub request: Option<Request>,
}

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

/// What an access is made in: guest time and memory, and where effects go.
pub struct Context<'a> {
    /// Guest time in ns.
    pub now_ns: u64,
    /// Guest memory.
    pub memory: &'a GuestMemory,
    /// What it leads to.
    pub effects: &'a mut Effects,
}

impl Devices {
    /// Devices after power-on.
    pub fn new(config: &MachineConfig) -> Devices {
        let virtio =
            config.slots.iter().zip(0..).map(|(device, slot)| VirtioMmio::new(slot, device)).collect();
        let rtc = Rtc::new(config.epoch_s);
        let mut devices = Devices { pic: Pic::new(), pit: Pit::new(), rtc, serial: Serial::new(), virtio };
        devices.wire();
        devices
    }

    /// A reset of the machine. Batteries last, and disk requests keep their numbers.
    pub fn reset(&mut self) {
        self.pic = Pic::new();
        self.pit = Pit::new();
        self.rtc.reset();
        self.serial = Serial::new();
        self.virtio.iter_mut().for_each(VirtioMmio::power_cycle);
        self.wire();
    }

    /// Whether these are the same kinds of devices in the same slots, and hold only what a device can hold.
    pub fn has_shape_of(&self, other: &Devices) -> bool {
        let sane = self.pic.is_sane() && self.pit.is_sane() && self.rtc.is_sane() && self.serial.is_sane();
        sane && self.virtio.len() == other.virtio.len()
            && self.virtio.iter().zip(&other.virtio).all(|(a, b)| a.has_shape_of(b))
    }

    /// Interrupt lines after power-on: all edges, the timer's is high. A virtio line falls when its interrupt status is
    /// acknowledged, so edges lose nothing, and a guest may acknowledge after its handler has ended.
    fn wire(&mut self) {
        self.pic.set_line(0, self.pit.line(0));
    }

    /// The port and the memory bus.
    pub fn buses(&self) -> (Bus, Bus) {
        let mut ports = Bus::default();
        for (start, len) in pic::PORTS {
            ports.add(start.into(), len.into(), Target::Pic);
        }
        for (start, len) in pit::PORTS {
            ports.add(start.into(), len.into(), Target::Pit);
        }
        ports.add(rtc::PORT.into(), 2, Target::Rtc);
        ports.add(serial::PORT.into(), 8, Target::Serial);
        ports.add(i8042::DATA.into(), 1, Target::I8042);
        ports.add(i8042::COMMAND.into(), 1, Target::I8042);
        ports.add(POWER_OFF_PORT.into(), 1, Target::PowerOff);
        let mut memory = Bus::default();
        for slot in 0..self.virtio.len() as u8 {
            memory.add(VIRTIO_BASE + slot as u64 * VIRTIO_STRIDE, VIRTIO_SIZE, Target::Virtio(slot));
        }
        (ports, memory)
    }

    /// One byte of a port is read.
    pub fn read_port(&mut self, target: Target, port: u16, offset: u64, cx: &mut Context<'_>) -> u8 {
        let offset = offset as u16;
        let value = match target {
            Target::Pic => self.pic.read(port),
            Target::Pit => self.pit.read(port, cx.now_ns),
            Target::Rtc => self.rtc.read(offset, cx.now_ns),
            Target::Serial => self.serial.read(offset),
            Target::I8042 => i8042::read(port),
            Target::PowerOff | Target::Virtio(_) => 0xff,
        };
        self.drive_lines(target, cx.now_ns);
        value
    }

    /// One byte of a port is written.
    pub fn write_port(&mut self, target: Target, port: u16, offset: u64, value: u8, cx: &mut Context<'_>) {
        let offset = offset as u16;
        match target {
            Target::Pic => self.pic.write(port, value),
            Target::Pit => self.pit.write(port, value, cx.now_ns),
            Target::Rtc => self.rtc.write(offset, value, cx.now_ns),
            Target::Serial => {
                self.serial.write(offset, value);
                let printed = self.serial.take_printed(false);
                cx.effects
                    .outputs
                    .extend(printed.map(|bytes| Output::Console { console: Console::Serial, bytes }));
            }
            Target::I8042 if i8042::write(port, value) => cx.effects.request = Some(Request::Reset),
            Target::PowerOff if value == POWER_OFF_VALUE => cx.effects.request = Some(Request::PowerOff),
            _ => {}
        }
        self.drive_lines(target, cx.now_ns);
    }

    /// A register of the virtio device in `slot` is read.
    pub fn read_virtio(&self, slot: u8, offset: u64, size: u8) -> u64 {
        self.virtio[slot as usize].read(offset, size)
    }

    /// A register of the virtio device in `slot` is written.
    pub fn write_virtio(&mut self, slot: u8, offset: u64, size: u8, value: u64, cx: &mut Context<'_>) {
        self.virtio[slot as usize].write(offset, size, value, cx);
        self.drive_lines(Target::Virtio(slot), cx.now_ns);
    }

    /// Whether there is room for an input.
    pub fn takes(&self, input: &Input, memory: &GuestMemory) -> bool {
        match (input, slot_of(input)) {
            (_, Some(slot)) => {
                self.virtio.get(slot as usize).is_none_or(|device| device.takes(input, memory))
            }
            (Input::Console { bytes, .. }, None) => bytes.len() <= self.serial.room(),
            _ => true,
        }
    }

    /// Applies an input other than the clock. One for a device that does not exist is ignored.
    pub fn apply(&mut self, input: Input, cx: &mut Context<'_>) {
        if let Some(slot) = slot_of(&input) {
            if let Some(device) = self.virtio.get_mut(slot as usize) {
                device.apply(input, cx);
                self.drive_lines(Target::Virtio(slot), cx.now_ns);
            }
        } else if let Input::Console { bytes, .. } = input {
            self.serial.receive(&bytes);
            self.drive_lines(Target::Serial, cx.now_ns);
        }
    }

    /// Gives a device the answer to its question. False: they do not belong together.
    pub fn answer(&mut self, question: &Question, answer: Answer, cx: &mut Context<'_>) -> bool {
        let Question::Entropy { slot, .. } = *question else { return false };
        let Some(device) = self.virtio.get_mut(slot as usize) else { return false };
        let fits = device.answer(question, answer, cx);
        self.drive_lines(Target::Virtio(slot), cx.now_ns);
        fits
    }

    /// Lets the rest of a console's line out.
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

    /// Sets the interrupt lines of a device whose state may have changed.
    pub fn drive_lines(&mut self, target: Target, now_ns: u64) {
        match target {
            Target::Pit => self.pic.set_line(0, self.pit.line(now_ns)),
            Target::Rtc => self.pic.set_line(rtc::IRQ, self.rtc.irq()),
            Target::Serial => self.pic.set_line(serial::IRQ, self.serial.irq()),
            Target::Virtio(slot) => {
                self.pic.set_line(VIRTIO_IRQS[slot as usize], self.virtio[slot as usize].irq());
            }
            _ => {}
        }
    }

    /// The next guest time at which a timer does something.
    pub fn deadline_ns(&self) -> Option<u64> {
        self.pit.deadline_ns().into_iter().chain(self.rtc.deadline_ns()).min()
    }

    /// Timers up to a guest time.
    pub fn advance(&mut self, now_ns: u64) {
        if self.pit.advance(now_ns) {
            self.pic.set_line(0, false);
            self.pic.set_line(0, true);
            self.drive_lines(Target::Pit, now_ns);
        }
        self.rtc.advance(now_ns);
        self.drive_lines(Target::Rtc, now_ns);
    }
}

/// The virtio slot that an input is for.
fn slot_of(input: &Input) -> Option<u8> {
    match input {
        Input::Frame { slot, .. } | Input::DiskDone { slot, .. } => Some(*slot),
        Input::Console { console: Console::Virtio(slot), .. } => Some(*slot),
        Input::Console { console: Console::Serial, .. } | Input::Clock { .. } => None,
    }
}
