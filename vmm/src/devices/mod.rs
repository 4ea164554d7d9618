//! The devices. Each takes an access or an input and gives a reply; interrupt lines are levels read off its state.
//! None does I/O or knows the time but by an argument. What is in a device's struct is its whole state: saving,
//! restoring and the digest come from it.

use entry::{Answer, Console, Digest, DiskRequest, Input, Output, Question};
use serde::{Deserialize, Serialize};

use crate::bus::{Bus, Target};
use crate::config::MachineConfig;
use crate::machine::digest_of;
use crate::ram::GuestMemory;

pub mod i8042;
pub mod pic;
pub mod pit;
pub mod rtc;
pub mod serial;

use pic::Pic;
use pit::Pit;
use rtc::Rtc;
use serial::Serial;

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
        Devices { pic: Pic::new(), pit: Pit::new(), rtc: Rtc::new(config.epoch_s), serial: Serial::new() }
    }

    /// A reset of the machine. Batteries last.
    pub fn reset(&mut self, config: &MachineConfig) {
        let mut rtc = self.rtc.clone();
        rtc.reset();
        *self = Devices { rtc, ..Devices::new(config) };
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
        (ports, Bus::default())
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
    pub fn read_virtio(&mut self, _slot: u8, _offset: u64, size: u8) -> u64 {
        u64::MAX >> (64 - 8 * size as u32)
    }

    /// A register of the virtio device in `slot` is written.
    pub fn write_virtio(&mut self, _slot: u8, _offset: u64, _size: u8, _value: u64, _cx: &mut Context<'_>) {}

    /// Whether there is room for an input.
    pub fn takes(&self, input: &Input, _memory: &GuestMemory) -> bool {
        match input {
            Input::Console { console: Console::Serial, bytes } => bytes.len() <= self.serial.room(),
            _ => true,
        }
    }

    /// Applies an input other than the clock.
    pub fn apply(&mut self, input: Input, cx: &mut Context<'_>) {
        if let Input::Console { console: Console::Serial, bytes } = input {
            self.serial.receive(&bytes);
            self.drive_lines(Target::Serial, cx.now_ns);
        }
    }

    /// Gives a device the answer to its question. False: they do not belong together.
    pub fn answer(&mut self, _question: &Question, _answer: Answer, _cx: &mut Context<'_>) -> bool {
        false
    }

    /// Lets the rest of a console's line out.
    pub fn flush_console(&mut self, effects: &mut Effects) {
        let printed = self.serial.take_printed(true);
        effects.outputs.extend(printed.map(|bytes| Output::Console { console: Console::Serial, bytes }));
    }

    /// The digest of each device, with its name.
    pub fn digests(&self) -> Vec<(&'static str, Digest)> {
        vec![
            ("pic", digest_of(&self.pic)),
            ("pit", digest_of(&self.pit)),
            ("rtc", digest_of(&self.rtc)),
            ("serial", digest_of(&self.serial)),
        ]
    }

    /// Sets the interrupt lines of a device whose state may have changed.
    pub fn drive_lines(&mut self, target: Target, now_ns: u64) {
        match target {
            Target::Pit => self.pic.set_line(0, self.pit.line(now_ns)),
            Target::Rtc => self.pic.set_line(rtc::IRQ, self.rtc.irq()),
            Target::Serial => self.pic.set_line(serial::IRQ, self.serial.irq()),
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
