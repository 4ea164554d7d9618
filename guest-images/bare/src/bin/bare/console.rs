//! The counter service on the console.

use crate::{cpu, println, serial, timer};
use bare::counter::{Counter, Line, Lines, Outcome};

/// A line that is being typed.
pub struct Console {
    lines: Lines,
}

impl Console {
    /// Nothing typed yet.
    pub const fn new() -> Self {
        Self { lines: Lines::new() }
    }

    /// Serves what has come in, if COM1 is among the interrupts `taken`. CR ends a line too, as a terminal sends it.
    pub fn on_interrupt(&mut self, taken: u32, counter: &mut Counter) {
        if taken & serial::IRQ == 0 {
            return;
        }
        while let Some(byte) = serial::read() {
            match self.lines.take(&[if byte == b'\r' { b'\n' } else { byte }]).1 {
                Line::Whole(b"") | Line::Partial => {}
                Line::Whole(line) => match counter.request(line, timer::ms()) {
                    Outcome::Reply(reply) => println!("{reply}"),
                    end => finish(end),
                },
                Line::TooLong => {
                    self.lines = Lines::new();
                    println!("line too long");
                }
            }
        }
        cpu::end_of_interrupt(serial::IRQ);
    }
}

/// Ends the machine as a request wants it.
pub fn finish(outcome: Outcome) {
    match outcome {
        Outcome::Reply(_) => {}
        Outcome::PowerOff => cpu::power_off(),
        Outcome::Reboot => cpu::reboot(),
        Outcome::Crash => panic!("as a client asked"),
    }
}
