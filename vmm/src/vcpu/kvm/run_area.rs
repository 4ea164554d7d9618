//! The data that KVM and this program exchange in the mapping of `kvm_run`.
#![allow(unsafe_code)]

use kvm_bindings::*;
use kvm_ioctls::VcpuFd;

use super::super::Exit;

/// An access of the guest that is not completed yet. A string instruction on a port makes `count` accesses.
#[derive(Clone, Copy, Debug)]
pub enum PendingAccess {
    /// To a port.
    Port {
        /// Port number.
        port: u16,
        /// 1, 2 or 4.
        size: u8,
        /// Whether the guest reads.
        read: bool,
        /// Where the values are in the mapping.
        offset: u64,
        /// The number of accesses.
        count: u32,
        /// How many of them are completed.
        done: u32,
    },
    /// To memory outside RAM.
    Memory {
        /// Guest-physical address.
        addr: u64,
        /// 1 to 8.
        size: u8,
        /// Whether the guest reads.
        read: bool,
    },
}

/// The access of a KVM_EXIT_IO or KVM_EXIT_MMIO; `None` for other exits.
pub fn access(vcpu: &mut VcpuFd) -> Option<PendingAccess> {
    let run = vcpu.get_kvm_run();
    match run.exit_reason {
        KVM_EXIT_IO => {
            // SAFETY: the exit's reason says that the kernel has filled this variant in; it is plain numbers.
            let io = unsafe { run.__bindgen_anon_1.io };
            let read = u32::from(io.direction) == KVM_EXIT_IO_IN;
            let (port, size, count) = (io.port, io.size, io.count);
            Some(PendingAccess::Port { port, size, read, offset: io.data_offset, count, done: 0 })
        }
        KVM_EXIT_MMIO => {
            // SAFETY: as above.
            let mmio = unsafe { run.__bindgen_anon_1.mmio };
            Some(PendingAccess::Memory {
                addr: mmio.phys_addr,
                size: mmio.len as u8,
                read: mmio.is_write == 0,
            })
        }
        _ => None,
    }
}

impl PendingAccess {
    /// The exit for the next access.
    pub fn exit(&self, vcpu: &mut VcpuFd) -> Exit {
        match *self {
            PendingAccess::Port { port, size, read: true, .. } => Exit::PioIn { port, size },
            PendingAccess::Port { port, size, .. } => {
                Exit::PioOut { port, size, value: zero_extend(self.value_bytes(vcpu)) as u32 }
            }
            PendingAccess::Memory { addr, size, read: true } => Exit::MmioRead { addr, size },
            PendingAccess::Memory { addr, size, .. } => {
                Exit::MmioWrite { addr, size, value: zero_extend(self.value_bytes(vcpu)) }
            }
        }
    }

    /// Completes one access, with the value that the guest reads. `Some`: the accesses that are left.
    pub fn answer(self, vcpu: &mut VcpuFd, value: u64) -> Option<PendingAccess> {
        let (PendingAccess::Port { read, .. } | PendingAccess::Memory { read, .. }) = self;
        if read {
            let data = self.value_bytes(vcpu);
            let len = data.len();
            data.copy_from_slice(&value.to_le_bytes()[..len]);
        }
        match self {
            PendingAccess::Port { port, size, read, offset, count, done } if done + 1 < count => {
                Some(PendingAccess::Port { port, size, read, offset, count, done: done + 1 })
            }
            _ => None,
        }
    }

    /// The bytes of the next access's value in the mapping.
    fn value_bytes<'a>(&self, vcpu: &'a mut VcpuFd) -> &'a mut [u8] {
        let run = vcpu.get_kvm_run();
        match *self {
            PendingAccess::Port { size, offset, done, .. } => {
                let offset = offset as usize + done as usize * size as usize;
                // SAFETY: the kernel puts `count` values of `size` bytes at `offset` of the mapping that begins with
                // `kvm_run` (Documentation/virt/kvm/api.rst, KVM_EXIT_IO), `done` is below `count`, and the mapping is borrowed.
                unsafe {
                    std::slice::from_raw_parts_mut((run as *mut kvm_run as *mut u8).add(offset), size.into())
                }
            }
            PendingAccess::Memory { size, .. } => {
                // SAFETY: the access came from a KVM_EXIT_MMIO, and KVM was not entered since.
                let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
                &mut mmio.data[..size as usize]
            }
        }
    }
}

/// A little-endian value of up to 8 bytes.
fn zero_extend(data: &[u8]) -> u64 {
    let mut value = [0; 8];
    value[..data.len()].copy_from_slice(data);
    u64::from_le_bytes(value)
}

/// The guest's access to a model-specific register: its number and, for a write, the value.
pub fn msr(vcpu: &mut VcpuFd) -> (u32, u64) {
    // SAFETY: the caller has seen KVM_EXIT_X86_RDMSR or _WRMSR; plain numbers.
    let msr = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.msr };
    (msr.index, msr.data)
}

/// Answers the guest's access to a model-specific register. `None`: #GP.
pub fn answer_msr(vcpu: &mut VcpuFd, value: Option<u64>) {
    // SAFETY: as for `msr`.
    let msr = unsafe { &mut vcpu.get_kvm_run().__bindgen_anon_1.msr };
    msr.error = u8::from(value.is_none());
    msr.data = value.unwrap_or(0);
}

/// Makes KVM copy the general registers out at every exit.
pub fn share_registers(vcpu: &mut VcpuFd) {
    vcpu.get_kvm_run().kvm_valid_regs = KVM_SYNC_X86_REGS.into();
}

/// The general registers at the last return of KVM_RUN. Whoever sets registers in KVM updates them here, too.
pub fn registers(vcpu: &mut VcpuFd) -> &mut kvm_regs {
    // SAFETY: `share_registers` has asked for these, so the kernel fills them in at every return; plain numbers.
    unsafe { &mut vcpu.get_kvm_run().s.regs.regs }
}

/// DR6 of a KVM_EXIT_DEBUG.
pub fn debug_status(vcpu: &mut VcpuFd) -> u64 {
    // SAFETY: the caller has seen KVM_EXIT_DEBUG; plain numbers.
    unsafe { vcpu.get_kvm_run().__bindgen_anon_1.debug.arch.dr6 }
}

/// What KVM reports about an exit that it could not handle: the suberror and, for a failed emulation, the instruction's bytes.
pub fn internal_error(vcpu: &mut VcpuFd) -> (u32, Vec<u8>) {
    // SAFETY: the caller has seen KVM_EXIT_INTERNAL_ERROR; plain numbers.
    let failure = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.emulation_failure };
    // SAFETY: as above.
    let insn = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
    let has_bytes = failure.ndata >= 3 && failure.flags & 1 != 0;
    let len = if has_bytes { usize::from(insn.insn_size).min(insn.insn_bytes.len()) } else { 0 };
    (failure.suberror, insn.insn_bytes[..len].to_vec())
}

/// KVM_INTERRUPT: queues an external interrupt for delivery before the next instruction.
pub fn queue_interrupt(vcpu: &VcpuFd, vector: u8) -> Result<(), kvm_ioctls::Error> {
    use std::os::fd::AsRawFd;
    /// `_IOW(KVMIO, 0x86, struct kvm_interrupt)`, which kvm-ioctls lacks.
    const KVM_INTERRUPT: libc::c_ulong = 0x4004_ae86;
    let irq = kvm_interrupt { irq: vector.into() };
    // SAFETY: the descriptor is a vCPU's, and the kernel reads the argument only.
    match unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_INTERRUPT, &irq) } {
        0 => Ok(()),
        _ => Err(kvm_ioctls::Error::last()),
    }
}
