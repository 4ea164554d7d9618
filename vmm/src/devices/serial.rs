//! A 16550A serial port (National Semiconductor PC16550D), interrupt line 4.
//!
//! This does not use vm-superio, which raises edges and reports all pending causes in IIR at once where the real part has
//! a level and priorities, and whose state cannot be serialised. The line has no speed: the transmitter is always empty.

use serde::{Deserialize, Serialize};

/// First of the eight ports.
pub const PORT: u16 = 0x3f8;
/// Interrupt line.
pub const IRQ: u8 = 4;
/// Number of received bytes that the port holds; more wait outside the machine.
pub const FIFO: usize = 64;
/// The most printed bytes that wait for the end of their line; they then leave as one output.
const LINE_MAX: usize = 256;

mod ier {
    pub const RECEIVED: u8 = 1;
    pub const TRANSMITTER_EMPTY: u8 = 2;
    pub const ALL: u8 = 0x0f;
}
const LCR_DLAB: u8 = 0x80;
const MCR_LOOP: u8 = 0x10;
const LSR_DATA_READY: u8 = 0x01;
const LSR_TRANSMITTER_EMPTY: u8 = 0x60;
/// CTS, DSR and DCD: the other side is ready.
const MSR_CONNECTED: u8 = 0xb0;

/// The port. Everything in it is state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Serial {
    ier: u8,
    lcr: u8,
    mcr: u8,
    scratch: u8,
    divisor: [u8; 2],
    fifo_enabled: bool,
    /// The transmitter-empty interrupt is pending. Reading it from IIR clears it.
    transmitter_empty: bool,
    received: Vec<u8>,
    printed: Vec<u8>,
}

impl Default for Serial {
    fn default() -> Serial {
        Serial::new()
    }
}

impl Serial {
    /// The port after a reset, at 9600 baud.
    pub fn new() -> Serial {
        Serial {
            ier: 0,
            lcr: 3,
            mcr: 0,
            scratch: 0,
            divisor: [12, 0],
            fifo_enabled: false,
            transmitter_empty: false,
            received: Vec::new(),
            printed: Vec::new(),
        }
    }

    /// Whether a state that was read from a file is one that the port can be in.
    pub fn is_sane(&self) -> bool {
        self.received.len() <= FIFO && self.printed.len() <= LINE_MAX
    }

    /// Level of the interrupt line.
    pub fn irq(&self) -> bool {
        self.cause() != 1
    }

    /// Number of bytes that [`Serial::receive`] has room for.
    pub fn room(&self) -> usize {
        FIFO - self.received.len()
    }

    /// Receives typed bytes. Those that do not fit are lost, as on a line without flow control.
    pub fn receive(&mut self, bytes: &[u8]) {
        let fits = bytes.len().min(self.room());
        self.received.extend_from_slice(&bytes[..fits]);
    }

    /// Takes the printed bytes if they are a complete line or fill the buffer, or if `all` is set.
    pub fn take_printed(&mut self, all: bool) -> Option<Vec<u8>> {
        let full = self.printed.len() >= LINE_MAX || self.printed.ends_with(b"\n");
        (full || all && !self.printed.is_empty()).then(|| std::mem::take(&mut self.printed))
    }

    /// Bits 3:0 of IIR: the pending cause with the highest priority; 1 if there is none.
    fn cause(&self) -> u8 {
        if self.ier & ier::RECEIVED != 0 && !self.received.is_empty() {
            4
        } else if self.ier & ier::TRANSMITTER_EMPTY != 0 && self.transmitter_empty {
            2
        } else {
            1
        }
    }

    /// Serves a read of register `offset`.
    pub fn read(&mut self, offset: u16) -> u8 {
        let dlab = self.lcr & LCR_DLAB != 0;
        match offset {
            0 | 1 if dlab => self.divisor[offset as usize],
            0 if self.received.is_empty() => 0,
            0 => self.received.remove(0),
            1 => self.ier,
            2 => {
                let cause = self.cause();
                if cause == 2 {
                    self.transmitter_empty = false;
                }
                cause | if self.fifo_enabled { 0xc0 } else { 0 }
            }
            3 => self.lcr,
            4 => self.mcr,
            5 => LSR_TRANSMITTER_EMPTY | if self.received.is_empty() { 0 } else { LSR_DATA_READY },
            6 if self.mcr & MCR_LOOP != 0 => {
                // In loopback mode DTR, RTS, OUT1 and OUT2 come back as DSR, CTS, RI and DCD.
                (self.mcr & 1) << 5 | (self.mcr & 2) << 3 | (self.mcr & 0x0c) << 4
            }
            6 => MSR_CONNECTED,
            _ => self.scratch,
        }
    }

    /// Serves a write to register `offset`.
    pub fn write(&mut self, offset: u16, value: u8) {
        let dlab = self.lcr & LCR_DLAB != 0;
        match offset {
            0 | 1 if dlab => self.divisor[offset as usize] = value,
            0 => {
                if self.mcr & MCR_LOOP != 0 {
                    self.receive(&[value]);
                } else {
                    self.printed.push(value);
                }
                self.transmitter_empty = true;
            }
            1 => {
                // Enabling the transmitter-empty interrupt raises it: the transmitter is always empty.
                if value & !self.ier & ier::TRANSMITTER_EMPTY != 0 {
                    self.transmitter_empty = true;
                }
                self.ier = value & ier::ALL;
            }
            2 => {
                self.fifo_enabled = value & 1 != 0;
                if value & 2 != 0 {
                    self.received.clear();
                }
            }
            3 => self.lcr = value,
            4 => self.mcr = value & 0x1f,
            7 => self.scratch = value,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_leaves_when_it_is_complete() {
        let mut serial = Serial::new();
        for byte in b"hello\nlog" {
            serial.write(0, *byte);
            if *byte == b'\n' {
                assert_eq!(serial.take_printed(false).unwrap(), b"hello\n");
            }
        }
        assert_eq!(serial.take_printed(false), None);
        assert_eq!(serial.take_printed(true).unwrap(), b"log");
        assert_eq!(serial.take_printed(true), None);
    }

    #[test]
    fn linux_detects_a_16550a_with_fifo() {
        // What Linux's autoconfig checks: FIFO bits in IIR after FCR is written, the low four bits of IER, loopback.
        let mut serial = Serial::new();
        serial.write(2, 1);
        assert_eq!(serial.read(2) >> 6, 3);
        serial.write(1, 0xff);
        assert_eq!(serial.read(1), 0x0f);
        serial.write(4, 0x1a);
        assert_eq!(serial.read(6) & 0xf0, 0x90);
        serial.write(3, 0x80);
        serial.write(0, 1);
        serial.write(1, 0);
        assert_eq!((serial.read(0), serial.read(1)), (1, 0));
    }

    #[test]
    fn received_bytes_interrupt_until_they_are_read() {
        let mut serial = Serial::new();
        serial.receive(b"ab");
        assert!(!serial.irq(), "not enabled");
        serial.write(1, ier::RECEIVED);
        assert!(serial.irq());
        assert_eq!(serial.read(2) & 0x0f, 4);
        assert_eq!((serial.read(5) & 1, serial.read(0), serial.read(0)), (1, b'a', b'b'));
        assert!(!serial.irq());
        assert_eq!(serial.read(5), 0x60);
    }

    #[test]
    fn an_empty_transmitter_interrupts_once() {
        let mut serial = Serial::new();
        serial.write(1, ier::TRANSMITTER_EMPTY);
        assert!(serial.irq());
        assert_eq!(serial.read(2), 2);
        assert!(!serial.irq() && serial.read(2) == 1);
        serial.write(0, b'x');
        assert!(serial.irq());
        serial.receive(b"y");
        serial.write(1, ier::TRANSMITTER_EMPTY | ier::RECEIVED);
        assert_eq!(serial.read(2), 4, "received data come first");
        serial.read(0);
        assert_eq!(serial.read(2), 2, "and the transmitter's interrupt is not lost");
    }

    #[test]
    fn the_receiver_is_bounded() {
        let mut serial = Serial::new();
        serial.receive(&[7; 1000]);
        assert_eq!((serial.room(), serial.received.len()), (0, FIFO));
        serial.write(2, 2);
        assert_eq!(serial.room(), FIFO);
    }
}
