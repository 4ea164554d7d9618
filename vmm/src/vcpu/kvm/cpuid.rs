//! CPUID as the guest sees it: the software CPU's table, without what KVM cannot trap.
//!
//! It has no RDTSC, RDTSCP, RDRAND, RDSEED, XSAVE or its variants, no performance counters and no sign of KVM. So every
//! register that the guest may use is in `CpuState`.

use std::arch::x86_64::__cpuid;
use std::hash::Hasher;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;
use soft_cpu::exec::cpuid::cpuid;
use twox_hash::XxHash3_64;

use super::super::VcpuError;
use super::failed;

/// Leaf 1, EDX.
const TSC: u32 = 1 << 4;
/// Leaf 1, ECX.
const CMPXCHG16B: u32 = 1 << 13;
/// Leaf 8000_0001h, EDX.
const RDTSCP: u32 = 1 << 27;
/// Leaf 8000_0001h, EDX: SYSCALL, NX and long mode itself.
const LONG_MODE: u32 = 1 << 11 | 1 << 20 | 1 << 29;
/// Leaf 1, ECX. KVM does not list it as supported, because it is up to its user to set it.
const HYPERVISOR: u32 = 1 << 31;
const BASIC_MAX: u32 = 7;
const SIGNIFICANT: u32 = kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX;

/// The guest's CPUID table. The vendor, and on AMD the model, are the host's, because instructions behave differently by them.
/// Features that the host's KVM lacks are left out.
///
/// # Errors
/// The host's CPU lacks a feature that guests are built to need.
pub fn profile(kvm: &Kvm) -> Result<CpuId, VcpuError> {
    let host = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("reading the host's CPUID"))?;
    let host_leaf = |leaf| {
        let found = host.as_slice().iter().find(|e| e.function == leaf);
        found.copied().unwrap_or_default()
    };
    let mut entries: Vec<_> = leaves().collect();
    let vendor = host_leaf(0);
    for e in &mut entries {
        let supported = host_leaf(e.function);
        match e.function {
            0 => (e.eax, e.ebx, e.ecx, e.edx) = (BASIC_MAX, vendor.ebx, vendor.ecx, vendor.edx),
            1 => {
                if &vendor.ebx.to_le_bytes() != b"Genu" {
                    e.eax = supported.eax;
                }
                require("leaf 1, ECX", CMPXCHG16B, supported.ecx)?;
                require("leaf 1, EDX", e.edx & !TSC, supported.edx)?;
                e.ecx &= supported.ecx | HYPERVISOR;
                e.edx &= !TSC;
            }
            0x8000_0001 => {
                require("leaf 80000001h, EDX", LONG_MODE, supported.edx)?;
                e.ecx &= supported.ecx;
                e.edx &= supported.edx & !RDTSCP;
            }
            // IA32_TSC_ADJUST; the invariant TSC.
            7 | 0x8000_0007 => (e.ebx, e.edx) = (0, 0),
            _ => {}
        }
    }
    CpuId::from_entries(&entries).map_err(|_| VcpuError::KvmLacks("room for the guest's CPUID table"))
}

/// Digest of a table and of the host's CPU model: equal on hosts between which a guest may move.
pub fn digest(profile: &CpuId) -> u64 {
    let mut hash = XxHash3_64::new();
    for e in profile.as_slice() {
        for word in [e.function, e.index, e.eax, e.ebx, e.ecx, e.edx] {
            hash.write(&word.to_le_bytes());
        }
    }
    // Undefined results of instructions, and approximations, differ between models.
    hash.write(&__cpuid(1).eax.to_le_bytes());
    hash.finish()
}

/// The software CPU's leaves that the guest may read.
fn leaves() -> impl Iterator<Item = kvm_cpuid_entry2> {
    let plain = [0, 1, 2, 7, 0x4000_0000].into_iter().chain(0x8000_0000..=0x8000_0008);
    let leaves = plain.map(|leaf| (leaf, 0, if leaf == 7 { SIGNIFICANT } else { 0 }));
    let caches = (0..4).map(|n| (4, n, SIGNIFICANT));
    leaves.chain(caches).map(|(function, index, flags)| {
        let [eax, ebx, ecx, edx] = cpuid(function, index);
        kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..Default::default() }
    })
}

/// Fails if a wanted feature is not supported.
fn require(place: &'static str, wanted: u32, supported: u32) -> Result<(), VcpuError> {
    match wanted & !supported {
        0 => Ok(()),
        missing => Err(VcpuError::CpuLacks { place, missing }),
    }
}
