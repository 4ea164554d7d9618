//! Measures what an exit costs on this host's KVM, and what vmft adds to that: `cargo bench -p vmm --bench kvm_exits`.
//!
//! The same program is run in three ways: by KVM_RUN in a loop that does nothing else; by the engine, which answers, counts and
//! digests each access; and by the engine with each access's instruction finished before the next entry, as in a replay. It
//! prints the medians of several rounds.
#![allow(unsafe_code, clippy::disallowed_methods, clippy::disallowed_types)]

#[path = "../tests/vcpu/mod.rs"]
mod vcpu;

use std::os::fd::AsRawFd;
use std::time::Instant;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm::Engine;
use vmm::vcpu::{Exit, Limit};

use vcpu::programs::{CODE, GDT, PAGE_TABLES, Program, exits};
use vcpu::{Guest, has_kvm};

const ROUNDS: usize = 9;
const EXITS: u32 = 4000;
const VECTOR: u8 = 0x30;

fn main() {
    if !has_kvm("kvm_exits") {
        return;
    }
    println!("{:8} {:>12} {:>12} {:>8} {:>12} {:>8}", "exit", "KVM_RUN", "vmft", "adds", "finished", "adds");
    for program in exits(EXITS) {
        let mut times: Vec<[f64; 3]> =
            (0..ROUNDS).map(|_| [bare(&program), engine(&program, false), engine(&program, true)]).collect();
        let [bare, engine, finished] = [0, 1, 2].map(|of| {
            times.sort_by(|a, b| a[of].total_cmp(&b[of]));
            times[ROUNDS / 2][of]
        });
        let adds = |time: f64| (time / bare - 1.0) * 100.0;
        println!(
            "{:8} {bare:>9.2} us {engine:>9.2} us {:>6.1} % {finished:>9.2} us {:>6.1} %",
            program.name,
            adds(engine),
            adds(finished)
        );
    }
}

/// Microseconds for each exit, since `start`.
fn per_exit(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e6 / f64::from(EXITS)
}

/// Microseconds for each exit by the engine. `finish`: with an instruction boundary after each access.
fn engine(program: &Program, finish: bool) -> f64 {
    let Guest { mut ram, mut vcpu, .. } = Guest::new(Engine::KvmSync, program);
    let mut window = false;
    let mut halts = 0;
    let start = Instant::now();
    loop {
        let limit = Limit { until: None, interrupt_window: window, time_offset_ns: 0 };
        match vcpu.run(&mut ram, &limit).unwrap() {
            Exit::InterruptWindow => {
                window = false;
                vcpu.inject(VECTOR).unwrap();
            }
            Exit::Halted if program.interrupts.is_empty() || halts == EXITS => break,
            Exit::Halted => {
                halts += 1;
                window = true;
            }
            _ => {
                assert_eq!(vcpu.complete(&mut ram, 0).unwrap(), None);
                if finish {
                    assert_eq!(vcpu.finish_instruction(&mut ram).unwrap(), None);
                }
            }
        }
        if vcpu.position().count.is_multiple_of(64) {
            vcpu.take_exit_checks();
        }
    }
    per_exit(start)
}

/// Microseconds for each exit by KVM alone.
fn bare(program: &Program) -> f64 {
    let guest = Guest::new(Engine::KvmSync, program);
    let (_vm, mut vcpu) = plain_vm(&guest);
    let mut halts = 0;
    let start = Instant::now();
    loop {
        match vcpu.run().unwrap() {
            VcpuExit::Hlt if program.interrupts.is_empty() || halts == EXITS => break,
            VcpuExit::Hlt => {
                halts += 1;
                let irq = u32::from(VECTOR);
                // SAFETY: KVM_INTERRUPT on a vCPU's descriptor reads 4 bytes.
                let failed = unsafe { libc::ioctl(vcpu.as_raw_fd(), 0x4004_ae86, &irq) };
                assert_eq!(failed, 0);
            }
            _ => {}
        }
    }
    per_exit(start)
}

/// A virtual machine with the guest's memory and registers, and no other settings.
fn plain_vm(guest: &Guest) -> (VmFd, VcpuFd) {
    let vm = Kvm::new().unwrap().create_vm().unwrap();
    for (slot, region) in (0..).zip(guest.ram.memory().iter()) {
        let memory = kvm_userspace_memory_region {
            slot,
            flags: KVM_MEM_LOG_DIRTY_PAGES,
            guest_phys_addr: 0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the region is mapped as long as `guest` lives, and that is longer than this virtual machine runs.
        unsafe { vm.set_user_memory_region(memory) }.unwrap();
    }
    let vcpu = vm.create_vcpu(0).unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    let data = kvm_segment { type_: 3, s: 1, present: 1, g: 1, db: 1, limit: u32::MAX, ..Default::default() };
    let data = kvm_segment { selector: 0x18, ..data };
    sregs.cs = kvm_segment { selector: 0x10, type_: 11, l: 1, db: 0, ..data };
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, 31);
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8005_0033, PAGE_TABLES, 0x20, 0x500);
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.set_regs(&kvm_regs { rip: CODE, rflags: 2, ..Default::default() }).unwrap();
    (vm, vcpu)
}
