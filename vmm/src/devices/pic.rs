//! The pair of 8259A interrupt controllers as it is wired in a PC: the second one is on line 2 of the first. Includes the
//! edge/level registers of the chipset. References are to the 8259A data sheet (Intel 231468).

use serde::{Deserialize, Serialize};

/// Line of the first controller to which the second one is connected.
const CASCADE: u8 = 2;
/// Ports of both controllers and of the edge/level registers, for the bus.
pub const PORTS: [(u16, u16); 3] = [(0x20, 2), (0xa0, 2), (0x4d0, 2)];
/// Edge/level bits that cannot be set, by controller: timer, keyboard, cascade; clock, coprocessor.
const ALWAYS_EDGE: [u8; 2] = [0b0000_0111, 0b0010_0001];

/// Where a controller is in its initialisation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Init {
    Done,
    /// ICW2 is next; the flag says whether ICW4 will come.
    Vector(bool),
    /// ICW3 is next; the flag says whether ICW4 will come.
    Cascade(bool),
    /// ICW4 is next.
    Mode,
}

/// One controller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Chip {
    /// Interrupt requests: latched edges, and level-triggered lines that are high.
    irr: u8,
    /// Interrupts in service.
    isr: u8,
    /// Mask: lines whose bit is set are not delivered.
    imr: u8,
    /// The lines as the devices drive them.
    lines: u8,
    /// Lines that are level-triggered.
    level: u8,
    vector_base: u8,
    init: Init,
    /// The line with the lowest priority; the next one has the highest.
    lowest: u8,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_mask: bool,
    special_fully_nested: bool,
    read_isr: bool,
    poll: bool,
}

impl Chip {
    fn new() -> Chip {
        Chip {
            irr: 0,
            isr: 0,
            imr: 0xff,
            lines: 0,
            level: 0,
            vector_base: 0,
            init: Init::Done,
            lowest: 7,
            auto_eoi: false,
            rotate_on_auto_eoi: false,
            special_mask: false,
            special_fully_nested: false,
            read_isr: false,
            poll: false,
        }
    }

    fn set_line(&mut self, line: u8, high: bool) {
        let bit = 1 << line;
        let was_high = self.lines & bit != 0;
        self.lines = self.lines & !bit | if high { bit } else { 0 };
        if self.level & bit != 0 {
            self.irr = self.irr & !bit | self.lines & bit;
        } else if high && !was_high {
            self.irr |= bit;
        }
    }

    /// The line of the highest priority among `bits`.
    fn highest(&self, bits: u8) -> Option<u8> {
        (1..=8).map(|i| (self.lowest + i) & 7).find(|line| bits >> line & 1 != 0)
    }

    /// Rank of a line's priority; 0 is the highest.
    fn rank(&self, line: u8) -> u8 {
        line.wrapping_sub(self.lowest + 1) & 7
    }

    /// The request that the controller would deliver now.
    fn request(&self, is_first: bool) -> Option<u8> {
        let line = self.highest(self.irr & !self.imr)?;
        let mut in_service = self.isr;
        if self.special_mask {
            in_service &= !self.imr;
        }
        if self.special_fully_nested && is_first {
            // An interrupt of the second controller in service does not block another request from it.
            in_service &= !(1 << CASCADE);
        }
        match self.highest(in_service) {
            Some(busy) if self.rank(busy) <= self.rank(line) => None,
            _ => Some(line),
        }
    }

    /// The acknowledge cycle for a line.
    fn acknowledge(&mut self, line: u8) {
        let bit = 1 << line;
        if self.level & bit == 0 {
            self.irr &= !bit;
        }
        if !self.auto_eoi {
            self.isr |= bit;
        } else if self.rotate_on_auto_eoi {
            self.lowest = line;
        }
    }

    fn read(&mut self, offset: u16, is_first: bool) -> u8 {
        if std::mem::take(&mut self.poll) {
            // A poll replaces the acknowledge cycle ("Poll Command").
            return match self.request(is_first) {
                Some(line) => {
                    self.acknowledge(line);
                    0x80 | line
                }
                None => 0,
            };
        }
        match offset {
            0 if self.read_isr => self.isr,
            0 => self.irr,
            _ => self.imr,
        }
    }

    fn write(&mut self, offset: u16, value: u8) {
        match (offset, self.init) {
            (0, _) if value & 0x10 != 0 => self.initialise(value),
            (0, _) if value & 0x08 != 0 => self.operate_mode(value),
            (0, _) => self.end_of_interrupt(value),
            (_, Init::Done) => self.imr = value,
            (_, Init::Vector(mode)) => {
                self.vector_base = value & 0xf8;
                self.init = Init::Cascade(mode);
            }
            // The wiring is fixed, so ICW3, which describes it, is ignored.
            (_, Init::Cascade(true)) => self.init = Init::Mode,
            (_, Init::Cascade(false)) => self.init = Init::Done,
            (_, Init::Mode) => {
                self.auto_eoi = value & 0x02 != 0;
                self.special_fully_nested = value & 0x10 != 0;
                self.init = Init::Done;
            }
        }
    }

    /// Serves ICW1. Single mode (without ICW3) does not exist on a PC, and its bit is ignored.
    fn initialise(&mut self, value: u8) {
        // Latched edges are cleared; level-triggered lines that are high still request.
        *self = Chip { lines: self.lines, level: self.level, ..Chip::new() };
        self.irr = self.lines & self.level;
        self.imr = 0;
        self.init = Init::Vector(value & 1 != 0);
    }

    /// Serves OCW3.
    fn operate_mode(&mut self, value: u8) {
        if value & 0x40 != 0 {
            self.special_mask = value & 0x20 != 0;
        }
        if value & 0x04 != 0 {
            self.poll = true;
        } else if value & 0x02 != 0 {
            self.read_isr = value & 1 != 0;
        }
    }

    /// Serves OCW2: bit 7 is rotation, bit 6 specific, bit 5 end of interrupt; bits 2:0 are the line.
    fn end_of_interrupt(&mut self, value: u8) {
        let line = value & 7;
        match value >> 5 {
            0b001 | 0b101 => {
                let in_service = if self.special_mask { self.isr & !self.imr } else { self.isr };
                if let Some(line) = self.highest(in_service) {
                    self.isr &= !(1 << line);
                    if value & 0x80 != 0 {
                        self.lowest = line;
                    }
                }
            }
            0b011 => self.isr &= !(1 << line),
            0b111 => {
                self.isr &= !(1 << line);
                self.lowest = line;
            }
            0b110 => self.lowest = line,
            0b100 => self.rotate_on_auto_eoi = true,
            0b000 => self.rotate_on_auto_eoi = false,
            _ => {}
        }
    }

    fn set_level_triggered(&mut self, level: u8) {
        self.level = level;
        self.irr = self.irr & !level | self.lines & level;
    }
}

/// Both controllers. Lines are numbered 0 to 15.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pic {
    chips: [Chip; 2],
}

impl Default for Pic {
    fn default() -> Pic {
        Pic::new()
    }
}

impl Pic {
    /// The controllers after power-on. All lines are masked until the guest initialises them.
    pub fn new() -> Pic {
        Pic { chips: [Chip::new(), Chip::new()] }
    }

    /// Whether a state that was read from a file is one that the controllers can be in.
    pub fn is_sane(&self) -> bool {
        self.chips.iter().all(|chip| chip.lowest < 8)
    }

    /// Sets the level of a device's line.
    pub fn set_line(&mut self, line: u8, high: bool) {
        self.chips[(line >> 3 & 1) as usize].set_line(line & 7, high);
        self.cascade();
    }

    /// Whether an interrupt waits for the CPU.
    pub fn pending(&self) -> bool {
        self.chips[0].request(true).is_some()
    }

    /// The CPU takes an interrupt. Returns its vector; without a request, that of the spurious interrupt, line 7.
    pub fn acknowledge(&mut self) -> u8 {
        let Some(line) = self.chips[0].request(true) else {
            return self.chips[0].vector_base | 7;
        };
        self.chips[0].acknowledge(line);
        let vector = if line == CASCADE {
            let second = &mut self.chips[1];
            let line = second.request(false).unwrap_or(7);
            if second.request(false).is_some() {
                second.acknowledge(line);
            }
            second.vector_base | line
        } else {
            self.chips[0].vector_base | line
        };
        self.cascade();
        vector
    }

    /// Serves a read of one of the [`PORTS`].
    pub fn read(&mut self, port: u16) -> u8 {
        let value = match port {
            0x20 | 0x21 => self.chips[0].read(port & 1, true),
            0xa0 | 0xa1 => self.chips[1].read(port & 1, false),
            _ => self.chips[(port & 1) as usize].level,
        };
        self.cascade();
        value
    }

    /// Serves a write to one of the [`PORTS`].
    pub fn write(&mut self, port: u16, value: u8) {
        let chip = match port {
            0x20 | 0x21 => 0,
            0xa0 | 0xa1 => 1,
            _ => {
                let chip = (port & 1) as usize;
                self.chips[chip].set_level_triggered(value & !ALWAYS_EDGE[chip]);
                self.cascade();
                return;
            }
        };
        self.chips[chip].write(port & 1, value);
        self.cascade();
    }

    /// Drives line 2 of the first controller by the output of the second. It falls during an acknowledge cycle, so a further
    /// request is a new edge.
    fn cascade(&mut self) {
        let asks = self.chips[1].request(false).is_some();
        let first = &mut self.chips[0];
        let bit = 1 << CASCADE;
        first.lines = first.lines & !bit | if asks { bit } else { 0 };
        first.irr = first.irr & !bit | if asks { bit } else { 0 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Controllers initialised as Linux does it: vectors 0x30 and 0x38, cascade, normal EOI, no line masked.
    fn linux() -> Pic {
        let mut pic = Pic::new();
        for (port, value) in [
            (0x20, 0x11),
            (0x21, 0x30),
            (0x21, 0x04),
            (0x21, 0x01),
            (0xa0, 0x11),
            (0xa1, 0x38),
            (0xa1, 0x02),
            (0xa1, 0x01),
            (0x21, 0x00),
            (0xa1, 0x00),
        ] {
            pic.write(port, value);
        }
        pic
    }

    fn pulse(pic: &mut Pic, line: u8) {
        pic.set_line(line, true);
        pic.set_line(line, false);
    }

    #[test]
    fn an_edge_is_delivered_once() {
        let mut pic = linux();
        pic.set_line(4, true);
        assert!(pic.pending());
        assert_eq!(pic.acknowledge(), 0x34);
        assert!(!pic.pending(), "in service");
        pic.write(0x20, 0x20);
        assert!(!pic.pending(), "a line that stays high makes no new edge");
        pic.set_line(4, false);
        pic.set_line(4, true);
        assert!(pic.pending());
    }

    #[test]
    fn a_level_requests_until_it_falls() {
        let mut pic = linux();
        pic.write(0x4d0, 0x20);
        pic.set_line(5, true);
        assert_eq!(pic.acknowledge(), 0x35);
        pic.write(0x20, 0x65);
        assert!(pic.pending(), "still high after the EOI");
        pic.set_line(5, false);
        assert!(!pic.pending());
        assert_eq!(pic.read(0x4d0), 0x20);
    }

    #[test]
    fn priorities_nest() {
        let mut pic = linux();
        pulse(&mut pic, 4);
        assert_eq!(pic.acknowledge(), 0x34);
        pulse(&mut pic, 6);
        assert!(!pic.pending(), "6 is below 4");
        pulse(&mut pic, 0);
        assert_eq!(pic.acknowledge(), 0x30, "0 is above 4");
        pic.write(0x20, 0x20);
        assert!(!pic.pending(), "4 is still in service");
        pic.write(0x20, 0x20);
        assert_eq!(pic.acknowledge(), 0x36);
    }

    #[test]
    fn the_second_controller_comes_through_line_2() {
        let mut pic = linux();
        pulse(&mut pic, 10);
        pulse(&mut pic, 9);
        assert_eq!(pic.acknowledge(), 0x39);
        assert!(!pic.pending());
        // Linux's order: a specific EOI to the second controller, then one for the cascade line to the first.
        pic.write(0xa0, 0x60 + 1);
        pic.write(0x20, 0x60 + CASCADE);
        assert!(pic.pending());
        assert_eq!(pic.acknowledge(), 0x3a);
    }

    #[test]
    fn a_masked_request_is_held_back_and_not_lost() {
        let mut pic = linux();
        pic.write(0x21, 0x10);
        pulse(&mut pic, 4);
        assert!(!pic.pending());
        assert_eq!(pic.read(0x21), 0x10);
        pic.write(0x20, 0x0a);
        assert_eq!(pic.read(0x20), 0x10, "IRR");
        pic.write(0x21, 0);
        assert_eq!(pic.acknowledge(), 0x34);
        pic.write(0x20, 0x0b);
        assert_eq!(pic.read(0x20), 0x10, "ISR");
    }

    #[test]
    fn a_request_that_vanished_is_spurious() {
        let mut pic = linux();
        pic.write(0x4d0, 0x20);
        pic.set_line(5, true);
        pic.set_line(5, false);
        assert_eq!(pic.acknowledge(), 0x37);
        pic.write(0x20, 0x0b);
        assert_eq!(pic.read(0x20), 0, "nothing is in service");
    }

    #[test]
    fn special_mask_lets_lower_priorities_through() {
        let mut pic = linux();
        pulse(&mut pic, 1);
        pic.acknowledge();
        pulse(&mut pic, 3);
        assert!(!pic.pending());
        pic.write(0x21, 0x02);
        pic.write(0x20, 0x68);
        assert!(pic.pending());
        pic.write(0x20, 0x48);
        assert!(!pic.pending());
    }

    #[test]
    fn polling_acknowledges() {
        let mut pic = linux();
        pic.write(0x20, 0x0c);
        assert_eq!(pic.read(0x20), 0);
        pulse(&mut pic, 3);
        pic.write(0x20, 0x0c);
        assert_eq!(pic.read(0x20), 0x83);
        assert!(!pic.pending());
    }

    #[test]
    fn rotation_moves_the_priorities() {
        let mut pic = linux();
        pulse(&mut pic, 3);
        pic.acknowledge();
        pic.write(0x20, 0xa0);
        pulse(&mut pic, 3);
        pulse(&mut pic, 4);
        assert_eq!(pic.acknowledge(), 0x34, "3 is the lowest now");
        pic.write(0x20, 0xc7);
        pic.write(0x20, 0x64);
        assert_eq!(pic.acknowledge(), 0x33);
    }

    #[test]
    fn automatic_eoi_leaves_nothing_in_service() {
        let mut pic = linux();
        for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 0x04), (0x21, 0x03)] {
            pic.write(port, value);
        }
        pulse(&mut pic, 4);
        pulse(&mut pic, 6);
        assert_eq!(pic.acknowledge(), 0x34);
        assert_eq!(pic.acknowledge(), 0x36);
    }
}
