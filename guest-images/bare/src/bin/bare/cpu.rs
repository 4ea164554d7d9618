//! Ring 0's side of the guest as ring 3 sees it: interrupts that were taken, sleeping, and the way down.
#![allow(unsafe_code)]

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

unsafe extern "C" {
    fn system_call(number: u32);
}

global_asm!(include_str!("ring0.s"));

/// Bit n: IRQ line n was taken since the last [`take_pending`]. Written by the interrupt stubs.
#[unsafe(no_mangle)]
static PENDING: AtomicU32 = AtomicU32::new(0);

/// Timer interrupts since boot. Written by the stub of IRQ 0.
#[unsafe(no_mangle)]
static TICKS: AtomicU64 = AtomicU64::new(0);

/// The interrupt lines taken since the last call, one bit each.
pub fn take_pending() -> u32 {
    PENDING.swap(0, Ordering::Relaxed)
}

/// Timer interrupts since boot.
pub fn ticks() -> u64 {
    TICKS.load(Ordering::Relaxed)
}

/// Sleeps until an interrupt is pending; returns at once when one is.
pub fn idle() {
    // SAFETY: call 0 changes no memory but what the interrupt stubs change.
    unsafe { system_call(0) }
}

/// Lets interrupts in, for good.
pub fn enable_interrupts() {
    // SAFETY: the stubs preserve every register.
    unsafe { system_call(1) }
}

/// Triple fault: the VMM sees the guest crash.
pub fn crash() -> ! {
    // SAFETY: call 2 does not return.
    unsafe { system_call(2) }
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
