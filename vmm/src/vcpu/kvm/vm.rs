//! A virtual machine on `/dev/kvm`, with the settings that make it deterministic.
//!
//! It uses no interrupt controller, timer, eventfd or coalesced access in the kernel, because these act between exits. Accesses
//! to model-specific registers that are not plain state are exits to this program. Paravirtual features and the performance
//! counters are off.
#![allow(unsafe_code)]

use kvm_bindings::*;
use kvm_ioctls::{
    Cap, Kvm, MsrExitReason, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuFd, VmFd,
};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::super::VcpuError;
use super::{cpuid, failed, msr};
use crate::ram::{PAGE, Ram};

/// The capabilities without which this engine cannot run.
const NEEDED: [(Cap, &str); 5] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::X86UserSpaceMsr, "KVM_CAP_X86_USER_SPACE_MSR"),
    (Cap::X86MsrFilter, "KVM_CAP_X86_MSR_FILTER"),
];

/// Quirks of KVM that are switched off where it supports that: an OUT to port 0x7e that advances RIP too early, the rewriting
/// of the guest's hypercalls, and those of the local APIC.
const QUIRKS_OFF: u32 = KVM_X86_QUIRK_LINT0_REENABLED
    | KVM_X86_QUIRK_LAPIC_MMIO_HOLE
    | KVM_X86_QUIRK_OUT_7E_INC_RIP
    | KVM_X86_QUIRK_FIX_HYPERCALL_INSN
    | KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS;

/// A memory slot of KVM: a contiguous region of the guest's memory.
struct MemorySlot {
    number: u32,
    first_page: u32,
    bytes: usize,
}

/// A virtual machine whose memory is a [`Ram`].
pub struct Vm {
    fd: VmFd,
    slots: Vec<MemorySlot>,
    /// The address of the RAM in this process.
    base: usize,
    /// The [`cpuid::digest`] of the guest's CPUID table.
    pub cpu_digest: u64,
}

impl Vm {
    /// Makes a virtual machine whose memory is `ram`, and its only vCPU.
    pub fn new(ram: &Ram) -> Result<(Vm, VcpuFd), VcpuError> {
        let kvm = Kvm::new().map_err(failed("opening /dev/kvm"))?;
        for (cap, name) in NEEDED {
            if !kvm.check_extension(cap) {
                return Err(VcpuError::KvmLacks(name));
            }
        }
        if kvm.check_extension_raw(KVM_CAP_SYNC_REGS.into()) & KVM_SYNC_X86_REGS as i32 == 0 {
            return Err(VcpuError::KvmLacks("KVM_CAP_SYNC_REGS"));
        }
        let fd = kvm.create_vm().map_err(failed("creating a virtual machine"))?;
        configure(&fd)?;
        let slots = map_memory(&fd, ram)?;
        let vcpu = fd.create_vcpu(0).map_err(failed("creating a vCPU"))?;
        let profile = cpuid::profile(&kvm)?;
        vcpu.set_cpuid2(&profile).map_err(failed("setting CPUID"))?;
        Ok((Vm { fd, slots, base: ram.host_address(), cpu_digest: cpuid::digest(&profile) }, vcpu))
    }

    /// Whether this machine's memory is `ram`.
    pub fn is_of(&self, ram: &Ram) -> bool {
        self.base == ram.host_address()
    }

    /// Reports to `ram` which pages the guest has written since the last call.
    pub fn report_written(&self, ram: &mut Ram) -> Result<(), VcpuError> {
        for slot in &self.slots {
            let log =
                self.fd.get_dirty_log(slot.number, slot.bytes).map_err(failed("reading dirty pages"))?;
            for (n, mut word) in log.into_iter().enumerate() {
                while word != 0 {
                    ram.note_written(slot.first_page + (n as u32) * 64 + word.trailing_zeros());
                    word &= word - 1;
                }
            }
        }
        Ok(())
    }
}

/// Makes the settings that have to be made before the vCPU.
fn configure(fd: &VmFd) -> Result<(), VcpuError> {
    let enable = |cap: u32, value: u64, what| {
        let cap = kvm_enable_cap { cap, args: [value, 0, 0, 0], ..Default::default() };
        fd.enable_cap(&cap).map_err(failed(what))
    };
    let reasons = MsrExitReason::Unknown | MsrExitReason::Inval | MsrExitReason::Filter;
    enable(KVM_CAP_X86_USER_SPACE_MSR, reasons.bits().into(), "enabling exits for MSRs")?;
    let bitmaps = msr::ALLOWED.map(|(_, count)| vec![0xff; count.div_ceil(8) as usize]);
    let ranges: Vec<_> = msr::ALLOWED
        .iter()
        .zip(&bitmaps)
        .map(|(&(base, msr_count), bitmap)| MsrFilterRange {
            flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
            base,
            msr_count,
            bitmap,
        })
        .collect();
    fd.set_msr_filter(MsrFilterDefaultAction::DENY, &ranges).map_err(failed("filtering MSRs"))?;

    // Optional capabilities: a KVM that lacks one of the first two has nothing to switch off; the others only add to its state.
    let has = |cap: u32| fd.check_extension_raw(cap.into()) as u32;
    let quirks = has(KVM_CAP_DISABLE_QUIRKS2) & QUIRKS_OFF;
    let optional = [
        (KVM_CAP_PMU_CAPABILITY, has(KVM_CAP_PMU_CAPABILITY) & KVM_PMU_CAP_DISABLE),
        (KVM_CAP_DISABLE_QUIRKS2, quirks),
        (KVM_CAP_EXCEPTION_PAYLOAD, has(KVM_CAP_EXCEPTION_PAYLOAD)),
        (KVM_CAP_X86_TRIPLE_FAULT_EVENT, has(KVM_CAP_X86_TRIPLE_FAULT_EVENT)),
    ];
    for (cap, value) in optional {
        if value != 0 {
            enable(cap, value.into(), "enabling a capability")?;
        }
    }
    Ok(())
}

/// Maps the guest's memory, with a log of the pages that it writes.
fn map_memory(fd: &VmFd, ram: &Ram) -> Result<Vec<MemorySlot>, VcpuError> {
    let mut first_page = 0;
    let mut slots = Vec::new();
    for (number, region) in (0..).zip(ram.memory().iter()) {
        let bytes = region.len();
        let memory = kvm_userspace_memory_region {
            slot: number,
            flags: KVM_MEM_LOG_DIRTY_PAGES,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: bytes,
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the region is mapped, readable and writable for its whole length. The guest writes to it only inside
        // KVM_RUN, which `KvmVcpu` calls while it borrows this very `Ram` exclusively (it checks that).
        unsafe { fd.set_user_memory_region(memory) }.map_err(failed("mapping the guest's memory"))?;
        slots.push(MemorySlot { number, first_page, bytes: bytes as usize });
        first_page += (bytes / PAGE as u64) as u32;
    }
    Ok(slots)
}
