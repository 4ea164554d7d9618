//! COM1 at 0x3f8: the console.

use crate::cpu::{port_read, port_write};
use core::fmt::{self, Write};

const DATA: u16 = 0x3f8;
const INTERRUPT_ENABLE: u16 = DATA + 1;
const FIFO_CONTROL: u16 = DATA + 2;
const LINE_CONTROL: u16 = DATA + 3;
const MODEM_CONTROL: u16 = DATA + 4;
const LINE_STATUS: u16 = DATA + 5;

/// The interrupt line of COM1, as a bit.
pub const IRQ: u32 = 1 << 4;

/// 8N1, FIFO on, receive interrupt on. The speed is left alone.
pub fn init() {
    port_write(LINE_CONTROL, 0x03);
    port_write(FIFO_CONTROL, 0x07);
    port_write(MODEM_CONTROL, 0x0b);
    port_write(INTERRUPT_ENABLE, 0x01);
}

/// The next byte received, if there is one.
pub fn read() -> Option<u8> {
    (port_read(LINE_STATUS) & 0x01 != 0).then(|| port_read(DATA))
}

/// The console as a [`Write`]; it waits for room and never fails.
pub struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        // An empty transmitter with its FIFO on takes 16 bytes: one status read for all of them.
        for burst in text.as_bytes().chunks(16) {
            while port_read(LINE_STATUS) & 0x20 == 0 {}
            burst.iter().for_each(|&byte| port_write(DATA, byte));
        }
        Ok(())
    }
}

/// Writes one line to the console, ended as a terminal wants it.
#[macro_export]
macro_rules! println {
    ($($arg:tt)*) => {{
        use core::fmt::Write;
        // The console never fails; an error could only come from a Display implementation.
        write!($crate::serial::Console, "{}\r\n", format_args!($($arg)*)).unwrap_or(())
    }};
}
