//! `workload=serve`.

use crate::console::Console;
use crate::{cpu, serial};
use bare::counter::Counter;

/// Serves for ever, asleep while there is nothing to do.
pub fn run() -> ! {
    let mut counter = Counter::new();
    let mut console = Console::new();
    loop {
        if cpu::take_pending() & 1 << serial::IRQ != 0 {
            console.serve(&mut counter);
        }
        cpu::idle();
    }
}
