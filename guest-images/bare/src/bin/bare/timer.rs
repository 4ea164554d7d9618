//! The PIC pair and PIT channel 0: the guest's time base.

use crate::cpu::{self, port_write};
use core::sync::atomic::{AtomicU32, Ordering};

const PIT_HZ: u32 = 1_193_182;

static HZ: AtomicU32 = AtomicU32::new(100);

/// The guest's time in milliseconds since [`init`].
pub fn ms() -> u64 {
    cpu::ticks() * 1000 / u64::from(HZ.load(Ordering::Relaxed))
}

/// Remaps the PIC pair to vectors 0x20 and 0x28 with every line open, starts the PIT as rate generator and lets
/// interrupts in.
pub fn init(hz: u32) {
    for (command, vector, cascade) in [(0x20, 0x20, 4), (0xa0, 0x28, 2)] {
        port_write(command, 0x11);
        port_write(command + 1, vector);
        port_write(command + 1, cascade);
        port_write(command + 1, 0x01);
        port_write(command + 1, 0x00);
    }
    let divisor = (PIT_HZ + hz / 2) / hz;
    port_write(0x43, 0x34);
    port_write(0x40, divisor as u8);
    port_write(0x40, (divisor >> 8) as u8);
    HZ.store(hz, Ordering::Relaxed);
    cpu::enable_interrupts();
}
