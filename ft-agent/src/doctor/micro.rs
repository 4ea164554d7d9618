//! A guest of a few instructions on bare KVM, to test how KVM and the CPU behave.
#![allow(unsafe_code)]

use std::os::fd::AsRawFd;

use kvm_bindings::{
    CpuId, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, KVM_MAX_CPUID_ENTRIES,
    kvm_guest_debug, kvm_interrupt, kvm_regs, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use nix::libc::EINTR;

const BYTES: usize = 512 << 10;
const PML4: usize = 0x1000;
const PDPT: usize = 0x2000;
const PD: usize = 0x3000;
const IDT: usize = 0x4000;
const GDT: usize = 0x500;
const HANDLERS: usize = 0x5000;
/// Where programs begin.
pub const CODE: u64 = 0x1_0000;
const STACK: u64 = 0x3_0000;
/// The vector of the interrupt, whose handler only returns.
pub const INTERRUPT: u32 = 0x20;
/// The bit that an exception's handler sets in R15, beside the vector.
const RAISED: u64 = 0x100;

// KVM_INTERRUPT, which kvm-ioctls leaves out.
nix::ioctl_write_ptr!(inject, 0xae, 0x86, kvm_interrupt);

type Result<T> = std::result::Result<T, kvm_ioctls::Error>;

/// Why the guest stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MicroExit {
    /// HLT.
    Halted,
    /// HLT in the handler of this exception.
    Raised(u8),
    /// A write to a port.
    Out(u16),
    /// A read of a port.
    In(u16),
    /// An access to device memory.
    Memory,
    /// An access to a model-specific register.
    Msr,
    /// A debug exception: a breakpoint or a single step.
    Debug,
    /// A signal, or `immediate_exit`.
    Interrupted,
    /// The guest can take an interrupt.
    Window,
    /// Another exit, or KVM cannot run the guest any further.
    Other,
}

#[repr(C, align(4096))]
struct Memory([u8; BYTES]);

/// A virtual machine with one vCPU, its memory and its program.
pub struct MicroGuest {
    vcpu: VcpuFd,
    // The memory is dropped last: the virtual machine uses it.
    _vm: VmFd,
    memory: Box<Memory>,
}

impl MicroGuest {
    /// A guest that starts with this program at [`CODE`], in ring 0 of 64-bit mode.
    pub fn new(kvm: &Kvm, program: &[u8]) -> Result<MicroGuest> {
        let mut memory = Box::new(Memory([0; BYTES]));
        write_tables(&mut memory.0, program);
        let vm = kvm.create_vm()?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            guest_phys_addr: 0,
            memory_size: BYTES as u64,
            userspace_addr: memory.0.as_ptr() as u64,
            flags: 0,
        };
        // SAFETY: the memory is boxed and dropped after the virtual machine that uses it.
        unsafe { vm.set_user_memory_region(region)? };
        let vcpu = vm.create_vcpu(0)?;
        vcpu.set_cpuid2(&cpuid_table(kvm)?)?;
        let mut sregs = vcpu.get_sregs()?;
        let segment = |selector, type_, l| kvm_segment {
            base: 0,
            limit: u32::MAX,
            selector,
            type_,
            present: 1,
            s: 1,
            l,
            db: 1 - l,
            g: 1,
            ..Default::default()
        };
        sregs.cs = segment(0x10, 11, 1);
        let data = segment(0x18, 3, 0);
        (sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs) = (data, data, data, data, data);
        (sregs.gdt.base, sregs.gdt.limit) = (GDT as u64, 31);
        (sregs.idt.base, sregs.idt.limit) = (IDT as u64, 0xfff);
        (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8005_0033, PML4 as u64, 0x6a0, 0xd00);
        sregs.efer &= !0x800;
        vcpu.set_sregs(&sregs)?;
        vcpu.set_regs(&kvm_regs { rip: CODE, rsp: STACK, rflags: 2, ..Default::default() })?;
        Ok(MicroGuest { vcpu, _vm: vm, memory })
    }

    /// Runs the guest to its next exit.
    pub fn run(&mut self) -> Result<MicroExit> {
        let left = match self.vcpu.run() {
            Ok(VcpuExit::Hlt) => MicroExit::Halted,
            Ok(VcpuExit::IoOut(port, _)) => MicroExit::Out(port),
            Ok(VcpuExit::IoIn(port, _)) => MicroExit::In(port),
            Ok(VcpuExit::MmioRead(..) | VcpuExit::MmioWrite(..)) => MicroExit::Memory,
            Ok(VcpuExit::X86Rdmsr(_) | VcpuExit::X86Wrmsr(_)) => MicroExit::Msr,
            Ok(VcpuExit::Debug(_)) => MicroExit::Debug,
            Ok(VcpuExit::Intr) => MicroExit::Interrupted,
            Ok(VcpuExit::IrqWindowOpen) => MicroExit::Window,
            Ok(_) => MicroExit::Other,
            Err(e) if e.errno() == EINTR => MicroExit::Interrupted,
            Err(e) => return Err(e),
        };
        if left != MicroExit::Halted {
            return Ok(left);
        }
        let raised = self.regs()?.r15;
        Ok(if raised & RAISED != 0 { MicroExit::Raised(raised as u8) } else { left })
    }

    /// Sets the value that the IN which has stopped the guest will read.
    pub fn answer(&mut self, value: u8) {
        let run = self.vcpu.get_kvm_run();
        // SAFETY: the exit was for port I/O, so that this member is the valid one.
        let offset = unsafe { run.__bindgen_anon_1.io.data_offset } as usize;
        // SAFETY: KVM places the data inside the mapped area that begins with `run`, and it stays there until the next run.
        unsafe { *std::ptr::from_mut(run).cast::<u8>().add(offset) = value };
    }

    /// General registers.
    pub fn regs(&self) -> Result<kvm_regs> {
        self.vcpu.get_regs()
    }

    /// Sets the general registers.
    pub fn set_regs(&self, regs: &kvm_regs) -> Result<()> {
        self.vcpu.set_regs(regs)
    }

    /// Completes the access of the last exit without executing another instruction.
    pub fn finish(&mut self) -> Result<MicroExit> {
        self.vcpu.set_kvm_immediate_exit(1);
        let left = self.run();
        self.vcpu.set_kvm_immediate_exit(0);
        left
    }

    /// Sets a breakpoint on the instruction at an address; `None` removes it.
    pub fn break_at(&self, at: Option<u64>) -> Result<()> {
        let mut debug = kvm_guest_debug::default();
        if let Some(at) = at {
            debug.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP;
            debug.arch.debugreg[0] = at;
            // L0, execution, one byte; bit 10 reads as one.
            debug.arch.debugreg[7] = 0x401;
        }
        self.vcpu.set_guest_debug(&debug)
    }

    /// Makes each run stop after one instruction.
    pub fn single_step(&self) -> Result<()> {
        let control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP;
        self.vcpu.set_guest_debug(&kvm_guest_debug { control, ..Default::default() })
    }

    /// Injects [`INTERRUPT`] if the guest can take it now. `true`: it could.
    pub fn inject_if_ready(&mut self) -> Result<bool> {
        let ready = self.vcpu.get_kvm_run().ready_for_interrupt_injection != 0;
        if ready {
            // SAFETY: an open vCPU, and a structure that outlives the call.
            unsafe { inject(self.vcpu.as_raw_fd(), &kvm_interrupt { irq: INTERRUPT }) }
                .map_err(|e| kvm_ioctls::Error::new(e as i32))?;
        }
        Ok(ready)
    }

    /// The guest's memory.
    pub fn memory(&self) -> &[u8] {
        &self.memory.0
    }
}

/// The CPUID table: what KVM supports, without the instructions that read the time or random numbers.
fn cpuid_table(kvm: &Kvm) -> Result<CpuId> {
    let mut table = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    for entry in table.as_mut_slice() {
        match entry.function {
            // TSC; TSC-deadline, RDRAND.
            1 => {
                entry.edx &= !(1 << 4);
                entry.ecx &= !(1 << 24 | 1 << 30);
            }
            // RDSEED; RDPID.
            7 if entry.index == 0 => {
                entry.ebx &= !(1 << 18);
                entry.ecx &= !(1 << 22);
            }
            // RDTSCP.
            0x8000_0001 => entry.edx &= !(1 << 27),
            _ => {}
        }
    }
    Ok(table)
}

/// Writes page tables, descriptors, handlers and the program into the guest's memory.
fn write_tables(memory: &mut [u8], program: &[u8]) {
    let mut put = |at: usize, bytes: &[u8]| memory[at..at + bytes.len()].copy_from_slice(bytes);
    // All entries are accessed and dirty from the start. The second 2 MiB map no memory: accesses to them are exits.
    put(PML4, &(PDPT as u64 | 0x23).to_le_bytes());
    put(PDPT, &(PD as u64 | 0x23).to_le_bytes());
    put(PD, &0xe3u64.to_le_bytes());
    put(PD + 8, &(0x20_0000u64 | 0xe3).to_le_bytes());
    put(GDT + 16, &0x00af_9b00_0000_ffffu64.to_le_bytes());
    put(GDT + 24, &0x00cf_9300_0000_ffffu64.to_le_bytes());
    for vector in 0..=INTERRUPT as usize {
        let at = (HANDLERS + 16 * vector) as u64;
        let gate = at & 0xffff | 0x10 << 16 | 0x8e00 << 32 | (at >> 16 & 0xffff) << 48;
        put(IDT + 16 * vector, &gate.to_le_bytes());
        // mov r15d, RAISED + vector; hlt
        let raised = [0x41, 0xbf, vector as u8, (RAISED >> 8) as u8, 0, 0, 0xf4];
        put(at as usize, if vector == INTERRUPT as usize { &[0x48, 0xcf] } else { &raised });
    }
    put(CODE as usize, program);
}
