//! Workloads that need little or no device.
#![allow(unsafe_code)]

use crate::cpu;
use crate::println;
use crate::ram::Free;
use crate::virtio::rng::Rng;
use bare::options::Options;
use bare::pattern::{Spin, mem_pass};
use core::arch::asm;

/// `workload=spin`.
pub fn spin(options: &Options) {
    let mut registers = Spin::new(options.seed);
    let mut done = 0u64;
    while options.count.is_none_or(|count| done < count) {
        let rounds = options.count.map_or(options.every, |count| options.every.min(count - done));
        spin_rounds(&mut registers, rounds);
        done += rounds;
        let Spin { x, a, b } = registers;
        println!("spin {done} x={x:016x} a={a:016x} b={b} ticks={}", cpu::ticks());
    }
}

/// [`Spin::round`], `rounds` times (not 0), with every variable in a register.
pub fn spin_rounds(spin: &mut Spin, rounds: u64) {
    // SAFETY: only the named registers and the flags change.
    unsafe {
        asm!(
            "2:",
            "mov {t}, {x}", "shl {t}, 13", "xor {x}, {t}",
            "mov {t}, {x}", "shr {t}, 7", "xor {x}, {t}",
            "mov {t}, {x}", "shl {t}, 17", "xor {x}, {t}",
            "test {x:l}, 1",
            "jz 3f",
            "add {a}, {x}",
            "jmp 4f",
            "3:", "rol {a}, 5",
            "4:", "test {x:l}, 0x30",
            "jnz 5f",
            "inc {b}",
            "5:", "dec {n}",
            "jnz 2b",
            x = inout(reg) spin.x, a = inout(reg) spin.a, b = inout(reg) spin.b,
            n = inout(reg) rounds => _, t = out(reg) _,
            options(nomem, nostack),
        );
    }
}

/// `workload=mem`.
pub fn mem(options: &Options, mut free: Free) {
    let area = free.take_words(options.mib.saturating_mul(1 << 17));
    // RAM is zero at power-on, but not after a reset by another guest's code.
    area.fill(0);
    for pass in 0..options.count.unwrap_or(u64::MAX) {
        let sum = mem_pass(area, options.seed, pass);
        println!("mem {} sum={sum:016x} ticks={}", pass + 1, cpu::ticks());
    }
}

/// `workload=random`.
pub fn random(options: &Options, mut free: Free) {
    let mut rng = Rng::find(&options.devices, &mut free).expect("no virtio-rng device on the command line");
    for index in 0..options.count.unwrap_or(u64::MAX) {
        println!("random {} {:016x}", index + 1, rng.word());
    }
}
