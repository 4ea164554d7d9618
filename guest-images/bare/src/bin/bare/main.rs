//! The guest itself: see the library's page for what it does. Ring 0 is `ring0.s`; all of this is ring 3.
#![no_std]
#![no_main]

mod console;
mod cpu;
mod disk;
mod libc;
mod ram;
mod serial;
mod serve;
mod services;
mod timer;
mod virtio;
mod workload;

use bare::boot_params::BootParams;
use bare::options::{Options, Workload};

/// Called by `ring0.s` with the boot protocol's RSI, interrupts off, `.bss` cleared.
#[allow(unsafe_code)]
#[unsafe(no_mangle)]
extern "C" fn main(boot_params: u64) -> ! {
    serial::init();
    let params = ram::boot_params(boot_params);
    let line = ram::command_line(params.command_line_address());
    let options = match Options::parse(line) {
        Ok(options) => options,
        Err(bad) => panic!("{bad}"),
    };
    timer::init(options.hz);
    run(&options, params)
}

fn run(options: &Options, params: BootParams) -> ! {
    match options.workload {
        Workload::Hello => println!("hello from ring 3"),
        Workload::Spin => workload::spin(options),
        Workload::Mem => workload::mem(options, ram::Free::new(&params)),
        Workload::Disk => disk::run(options, ram::Free::new(&params)),
        Workload::Random => workload::random(options, ram::Free::new(&params)),
        Workload::Panic => panic!("as the command line says"),
        Workload::Serve => serve::run(options, ram::Free::new(&params)),
    }
    cpu::power_off()
}

#[panic_handler]
fn on_panic(info: &core::panic::PanicInfo) -> ! {
    println!("{info}");
    cpu::crash()
}

/// Where ring 0 sends an exception, with a fresh stack.
#[allow(unsafe_code)]
#[unsafe(no_mangle)]
extern "C" fn exception_report(vector: u64, error_code: u64, rip: u64, cr2: u64, rsp: u64) -> ! {
    println!("exception {vector} error {error_code:#x} rip {rip:#x} cr2 {cr2:#x} rsp {rsp:#x}");
    cpu::crash()
}
