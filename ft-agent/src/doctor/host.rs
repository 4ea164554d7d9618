//! What the host says of itself: CPU, settings, KVM's capabilities.

use std::fs;
use std::os::unix::fs::FileExt;

use kvm_bindings::{KVM_CAP_PMU_CAPABILITY, KVM_CAP_SYNC_REGS, KVM_CAP_X86_USER_SPACE_MSR};
use kvm_ioctls::{Cap, Kvm};
use vmm::vcpu::perf::events::{Core, CpuModel, Event, event};

use super::Check;

/// The CPU model and its branch event.
pub fn cpu(checks: &mut Vec<Check>) -> (CpuModel, Option<Event>) {
    let model = CpuModel::host();
    let event = event(&model, Core::Big);
    checks.push(match event {
        Some(e) => Check::pass("cpu model", format!("{model}: {} ({:#x})", e.name, e.config)),
        None => Check::fail(
            "cpu model",
            format!("{model} is not in the table of exact branch counters"),
            "positions are at exits here; add the model once its counter was shown to be exact",
        ),
    });
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = info.lines().find(|l| l.starts_with("flags")).unwrap_or_default();
    let virtual_machine = flags.split(' ').any(|f| f == "hypervisor");
    checks.push(Check::passes(
        "bare metal",
        !virtual_machine,
        if virtual_machine { "the host is itself a virtual machine" } else { "no hypervisor below" },
        "use a bare-metal host: few hypervisors hand an exact guest-mode counter on",
    ));
    (model, event)
}

fn setting(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|s| s.trim().to_owned())
}

/// Settings of the host that make counters inexact.
pub fn settings(checks: &mut Vec<Check>, model: &CpuModel) {
    let amd = model.vendor == "AuthenticAMD";
    checks.push(match setting("/sys/devices/cpu/freeze_on_smi") {
        _ if amd => Check::not_applicable("freeze_on_smi", "AMD: KVM takes SMIs out of guest mode"),
        Some(v) if v == "1" => Check::pass("freeze_on_smi", "1"),
        Some(v) => Check::fail(
            "freeze_on_smi",
            format!("{v}: the counter runs on in system management mode"),
            "echo 1 > /sys/devices/cpu/freeze_on_smi",
        ),
        None => Check::not_applicable("freeze_on_smi", "the kernel drives no counter of this CPU"),
    });
    checks.push(spec_lock_map(amd));
    checks.push(match setting("/proc/sys/kernel/nmi_watchdog").as_deref() {
        Some("1") => Check::fail(
            "nmi_watchdog",
            "it takes one of the counters",
            "sysctl kernel.nmi_watchdog=0 if there are too few",
        ),
        _ => Check::pass("nmi_watchdog", "off"),
    });
}

/// MSR and bit that keep AMD's Zen from counting branches that a lock's speculation undoes.
const SPEC_LOCK_MSR: u64 = 0xc001_1020;
const SPEC_LOCK_OFF: u64 = 1 << 54;

fn spec_lock_map(amd: bool) -> Check {
    const NAME: &str = "SpecLockMap";
    const REMEDY: &str = "set bit 54 of MSR 0xc0011020 on every CPU (as root; modprobe msr), Secure Boot off";
    if !amd {
        return Check::not_applicable(NAME, "only AMD's Zen counts what a lock's speculation undid");
    }
    let cpus = fs::read_dir("/dev/cpu").into_iter().flatten().flatten();
    let files: Vec<_> = cpus.map(|cpu| cpu.path().join("msr")).filter(|p| p.exists()).collect();
    if files.is_empty() {
        return Check::fail(NAME, "there is no /dev/cpu/*/msr to look at", REMEDY);
    }
    for path in files {
        let mut value = [0; 8];
        let read = fs::File::open(&path).and_then(|f| f.read_exact_at(&mut value, SPEC_LOCK_MSR));
        if let Err(e) = read {
            return Check::fail(NAME, format!("{}: {e}", path.display()), REMEDY);
        }
        if u64::from_le_bytes(value) & SPEC_LOCK_OFF == 0 {
            return Check::fail(NAME, format!("{}: it is on", path.display()), REMEDY);
        }
    }
    Check::pass(NAME, "off on every CPU")
}

/// What the engine cannot do without.
const NEEDED: [(Cap, &str); 6] = [
    (Cap::UserMemory, "USER_MEMORY"),
    (Cap::ImmediateExit, "IMMEDIATE_EXIT"),
    (Cap::VcpuEvents, "VCPU_EVENTS"),
    (Cap::SetGuestDebug, "SET_GUEST_DEBUG"),
    (Cap::X86UserSpaceMsr, "X86_USER_SPACE_MSR"),
    (Cap::X86MsrFilter, "X86_MSR_FILTER"),
];

/// Opens KVM and looks at its capabilities.
pub fn kvm(checks: &mut Vec<Check>) -> Option<Kvm> {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(e) => {
            checks.push(Check::fail(
                "kvm",
                format!("/dev/kvm: {e}"),
                "load kvm_intel or kvm_amd, enable virtualization in the firmware, and let this user open /dev/kvm",
            ));
            return None;
        }
    };
    checks.push(Check::pass("kvm", format!("/dev/kvm opens, version {}", kvm.get_api_version())));
    let has = |cap: u32| kvm.check_extension_raw(cap.into());
    let mut missing: Vec<_> =
        NEEDED.iter().filter(|(cap, _)| !kvm.check_extension(*cap)).map(|(_, name)| *name).collect();
    if has(KVM_CAP_SYNC_REGS) & 1 == 0 {
        missing.push("SYNC_REGS");
    }
    let pmu = has(KVM_CAP_PMU_CAPABILITY);
    checks.push(Check::passes(
        "capabilities",
        missing.is_empty(),
        match missing.is_empty() {
            true => format!(
                "SYNC_REGS {:#x}, USER_SPACE_MSR {:#x}, PMU_CAPABILITY {pmu}",
                has(KVM_CAP_SYNC_REGS),
                has(KVM_CAP_X86_USER_SPACE_MSR)
            ),
            false => format!("missing: {}", missing.join(", ")),
        },
        "a newer kernel (5.10 or later)",
    ));
    Some(kvm)
}
