//! Ring 0's side of the guest as ring 3 sees it: interrupts that were taken, sleeping, and the way down.
#![allow(unsafe_code)]

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

unsafe extern "C" {
    fn system_call(number: u32, lines: u32);
}

global_asm!(include_str!("ring0.s"));

/// Bit n: IRQ line n was taken since the last [`wait`] for it. Written by the interrupt stubs.
#[unsafe(no_mangle)]
static PENDING: AtomicU32 = AtomicU32::new(0);

/// The timer's bit among the interrupt lines.
pub const TIMER: u32 = 1 << 0;

/// Timer interrupts since boot. Written by the stub of IRQ 0.
#[unsafe(no_mangle)]
static TICKS: AtomicU64 = AtomicU64::new(0);

/// Sleeps until at least one of the interrupt lines in `mask` was taken; returns which, and forgets those. A device's
/// line stays blocked, with those behind it, until [`end_of_interrupt`].
pub fn wait(mask: u32) -> u32 {
    loop {
        let taken = PENDING.fetch_and(!mask, Ordering::Relaxed) & mask;
        if taken != 0 {
            return taken;
        }
        // SAFETY: call 0 changes no memory but what the interrupt stubs change.
        unsafe { system_call(0, mask) }
    }
}

/// Tells the PICs that the interrupt on `line`, given as its bit, is served: its device does not ask for it any more.
pub fn end_of_interrupt(line: u32) {
    // Specific EOI; lines 8 to 15 come through line 2.
    let number = line.trailing_zeros() as u8;
    if number < 8 {
        port_write(0x20, 0x60 | number);
    } else {
        port_write(0xa0, 0x60 | (number - 8));
        port_write(0x20, 0x62);
    }
}

/// Timer interrupts since boot.
pub fn ticks() -> u64 {
    TICKS.load(Ordering::Relaxed)
}

/// Lets interrupts in, for good.
pub fn enable_interrupts() {
    // SAFETY: the stubs preserve every register.
    unsafe { system_call(1, 0) }
}

/// Triple fault: the VMM sees the guest crash.
pub fn crash() -> ! {
    // SAFETY: call 2 does not return.
    unsafe { system_call(2, 0) }
    unreachable!()
}

/// Writes one byte to an I/O port.
pub fn port_write(port: u16, value: u8) {
    // SAFETY: no device of the machine behind a port can touch the guest's memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) }
}

/// Reads one byte from an I/O port.
pub fn port_read(port: u16) -> u8 {
    let value: u8;
    // SAFETY: no device of the machine behind a port can touch the guest's memory.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) }
    value
}

/// Turns the machine off.
pub fn power_off() -> ! {
    port_write(0x604, 0x34);
    crash()
}

/// Resets the machine through the keyboard controller.
pub fn reboot() -> ! {
    port_write(0x64, 0xfe);
    crash()
}
