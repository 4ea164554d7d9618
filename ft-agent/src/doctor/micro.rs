//! A guest of a few instructions on raw KVM, to see what KVM and the CPU do.
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
/// Vector whose handler only returns.
pub const INTERRUPT: u32 = 0x20;
/// In R15 when a handler of an exception was entered, beside the vector.
const RAISED: u64 = 0x100;

// KVM_INTERRUPT, which kvm-ioctls leaves out.
nix::ioctl_write_ptr!(inject, 0xae, 0x86, kvm_interrupt);

type Result<T> = std::result::Result<T, kvm_ioctls::Error>;

/// Why the guest stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// HLT.
    Halted,
    /// HLT in the handler of this exception.
    Raised(u8),
    /// A port was written.
    Out(u16),
    /// A port is read.
    In(u16),
    /// Device memory was touched.
    Memory,
    /// A model-specific register was touched.
    Msr,
    /// A debug event.
    Debug,
    /// A signal.
    Interrupted,
    /// The window is open.
    Window,
    /// Something else, or KVM cannot go on.
    Other,
}

#[repr(C, align(4096))]
struct Memory([u8; BYTES]);

/// See the module.
pub struct Micro {
    vcpu: VcpuFd,
    // Memory goes last: the virtual machine uses it.
    _vm: VmFd,
    memory: Box<Memory>,
}

impl Micro {
    /// A guest with this program at [`CODE`], in ring 0 of 64-bit mode.
    pub fn new(kvm: &Kvm, program: &[u8]) -> Result<Micro> {
        let mut memory = Box::new(Memory([0; BYTES]));
        lay_out(&mut memory.0, program);
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
        vcpu.set_cpuid2(&hidden(kvm)?)?;
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
        Ok(Micro { vcpu, _vm: vm, memory })
    }

    /// Runs until the guest leaves.
    pub fn run(&mut self) -> Result<Left> {
        let left = match self.vcpu.run() {
            Ok(VcpuExit::Hlt) => Left::Halted,
            Ok(VcpuExit::IoOut(port, _)) => Left::Out(port),
            Ok(VcpuExit::IoIn(port, _)) => Left::In(port),
            Ok(VcpuExit::MmioRead(..) | VcpuExit::MmioWrite(..)) => Left::Memory,
            Ok(VcpuExit::X86Rdmsr(_) | VcpuExit::X86Wrmsr(_)) => Left::Msr,
            Ok(VcpuExit::Debug(_)) => Left::Debug,
            Ok(VcpuExit::Intr) => Left::Interrupted,
            Ok(VcpuExit::IrqWindowOpen) => Left::Window,
            Ok(_) => Left::Other,
            Err(e) if e.errno() == EINTR => Left::Interrupted,
            Err(e) => return Err(e),
        };
        if left != Left::Halted {
            return Ok(left);
        }
        let raised = self.regs()?.r15;
        Ok(if raised & RAISED != 0 { Left::Raised(raised as u8) } else { left })
    }

    /// Runs over one IN, whose answer is `value`.
    pub fn answer(&mut self, value: u8) {
        // SAFETY: after an exit for IN the data lies where KVM says, inside the shared area, until the next run.
        let run = self.vcpu.get_kvm_run();
        // SAFETY: the exit was for port I/O, so that this member is the valid one.
        let offset = unsafe { run.__bindgen_anon_1.io.data_offset } as usize;
        // SAFETY: KVM places the data inside the area that is mapped behind `run`.
        unsafe { *std::ptr::from_mut(run).cast::<u8>().add(offset) = value };
    }

    /// General registers.
    pub fn regs(&self) -> Result<kvm_regs> {
        self.vcpu.get_regs()
    }

    /// Sets them.
    pub fn set_regs(&self, regs: &kvm_regs) -> Result<()> {
        self.vcpu.set_regs(regs)
    }

    /// The next run finishes what the last exit was for and executes nothing.
    pub fn finish(&mut self) -> Result<Left> {
        self.vcpu.set_kvm_immediate_exit(1);
        let left = self.run();
        self.vcpu.set_kvm_immediate_exit(0);
        left
    }

    /// Stops before the instruction at an address.
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

    /// Stops behind each instruction.
    pub fn step(&self) -> Result<()> {
        let control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP;
        self.vcpu.set_guest_debug(&kvm_guest_debug { control, ..Default::default() })
    }

    /// Injects [`INTERRUPT`] if the guest takes it now.
    pub fn interrupt(&mut self) -> Result<bool> {
        let ready = self.vcpu.get_kvm_run().ready_for_interrupt_injection != 0;
        if ready {
            // SAFETY: an open vCPU, and a structure that outlives the call.
            unsafe { inject(self.vcpu.as_raw_fd(), &kvm_interrupt { irq: INTERRUPT }) }
                .map_err(|e| kvm_ioctls::Error::new(e as i32))?;
        }
        Ok(ready)
    }

    /// Its memory.
    pub fn memory(&self) -> &[u8] {
        &self.memory.0
    }
}

/// What KVM supports, without the instructions that tell the time or chance.
fn hidden(kvm: &Kvm) -> Result<CpuId> {
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

/// Page tables, descriptors, handlers, and the program.
fn lay_out(memory: &mut [u8], program: &[u8]) {
    let mut put = |at: usize, bytes: &[u8]| memory[at..at + bytes.len()].copy_from_slice(bytes);
    // Accessed and dirty from the start. The second 2 MiB are no memory: device accesses.
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
