//! What the host reports about itself: its CPU, its settings, and the capabilities of its KVM.

use std::fs;
use std::os::unix::fs::FileExt;

use kvm_bindings::{KVM_CAP_PMU_CAPABILITY, KVM_CAP_SYNC_REGS, KVM_CAP_X86_USER_SPACE_MSR};
use kvm_ioctls::{Cap, Kvm};
use vmm::vcpu::perf::events::{BranchEvent, Core, CpuModel, branch_event};

use super::{Check, EXITS_ONLY};

/// Checks the CPU model, and returns it with the event that counts its conditional branches, if that is known.
pub fn cpu(checks: &mut Vec<Check>) -> (CpuModel, Option<BranchEvent>) {
    let model = CpuModel::host();
    let event = branch_event(&model, Core::Big);
    checks.push(match event {
        Some(e) => Check::pass(
            "cpu model",
            format!("{model}: conditional branches are counted by {} ({:#x})", e.name, e.config),
        ),
        None => Check::fail(
            "cpu model",
            format!("{model} is not in the table of CPUs whose branch counter is known to be exact"),
            format!(
                "{EXITS_ONLY}; to support this CPU, show that its counter is exact and add it to the table"
            ),
        ),
    });
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = info.lines().find(|l| l.starts_with("flags")).unwrap_or_default();
    let virtual_machine = flags.split(' ').any(|f| f == "hypervisor");
    checks.push(Check::passes(
        "bare metal",
        !virtual_machine,
        match virtual_machine {
            true => "this host is itself a virtual machine: its branch counter may be missing or inexact",
            false => "this host is not a virtual machine: its branch counter is the hardware's own",
        },
        "use a bare-metal host: few hypervisors give their guests a branch counter that is exact while a nested guest runs",
    ));
    (model, event)
}

/// The trimmed content of a file of sysfs or procfs, if it can be read.
fn setting(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|s| s.trim().to_owned())
}

/// Checks the settings of the host that can make its counters inexact.
pub fn settings(checks: &mut Vec<Check>, model: &CpuModel) {
    let amd = model.vendor == "AuthenticAMD";
    checks.push(match setting("/sys/devices/cpu/freeze_on_smi") {
        _ if amd => Check::not_applicable(
            "freeze_on_smi",
            "not needed on AMD: KVM handles system management interrupts outside the guest",
        ),
        Some(v) if v == "1" => {
            Check::pass("freeze_on_smi", "set to 1: the counter stops in system management mode")
        }
        Some(v) => Check::fail(
            "freeze_on_smi",
            format!(
                "set to {v}: the counter also counts in system management mode, so counts differ between runs"
            ),
            "run as root: echo 1 > /sys/devices/cpu/freeze_on_smi",
        ),
        None => Check::not_applicable(
            "freeze_on_smi",
            "there is no such setting: the kernel has no driver for this CPU's performance counters",
        ),
    });
    checks.push(spec_lock_map(amd));
    checks.push(match setting("/proc/sys/kernel/nmi_watchdog").as_deref() {
        Some("1") => Check::fail(
            "nmi_watchdog",
            "on: the kernel's NMI watchdog occupies one of the CPU's counters",
            "if the branch counter cannot be opened, run as root: sysctl kernel.nmi_watchdog=0",
        ),
        _ => {
            Check::pass("nmi_watchdog", "off: the kernel's NMI watchdog occupies none of the CPU's counters")
        }
    });
}

/// The MSR and the bit in it that keep AMD's Zen CPUs from counting branches after a locked instruction that were executed
/// speculatively and rolled back.
const SPEC_LOCK_MSR: u64 = 0xc001_1020;
const SPEC_LOCK_OFF: u64 = 1 << 54;

/// Checks that SpecLockMap, which makes AMD's Zen CPUs count too many branches, is off on every CPU.
fn spec_lock_map(amd: bool) -> Check {
    const NAME: &str = "SpecLockMap";
    const REMEDY: &str =
        "as root, with Secure Boot off: modprobe msr, then set bit 54 of MSR 0xc0011020 on every CPU";
    if !amd {
        return Check::not_applicable(
            NAME,
            "not needed: only AMD's Zen CPUs count branches that were executed speculatively and rolled back",
        );
    }
    let cpus = fs::read_dir("/dev/cpu").into_iter().flatten().flatten();
    let files: Vec<_> = cpus.map(|cpu| cpu.path().join("msr")).filter(|p| p.exists()).collect();
    if files.is_empty() {
        return Check::fail(NAME, "cannot be checked: there is no /dev/cpu/*/msr", REMEDY);
    }
    for path in files {
        let mut value = [0; 8];
        let read = fs::File::open(&path).and_then(|f| f.read_exact_at(&mut value, SPEC_LOCK_MSR));
        if let Err(e) = read {
            return Check::fail(
                NAME,
                format!("cannot be checked: cannot read {}: {e}", path.display()),
                REMEDY,
            );
        }
        if u64::from_le_bytes(value) & SPEC_LOCK_OFF == 0 {
            return Check::fail(
                NAME,
                format!("on ({}): branches that were rolled back are counted too", path.display()),
                REMEDY,
            );
        }
    }
    Check::pass(NAME, "off on every CPU: branches that were rolled back are not counted")
}

/// The capabilities without which the engine cannot run.
const NEEDED: [(Cap, &str); 6] = [
    (Cap::UserMemory, "USER_MEMORY"),
    (Cap::ImmediateExit, "IMMEDIATE_EXIT"),
    (Cap::VcpuEvents, "VCPU_EVENTS"),
    (Cap::SetGuestDebug, "SET_GUEST_DEBUG"),
    (Cap::X86UserSpaceMsr, "X86_USER_SPACE_MSR"),
    (Cap::X86MsrFilter, "X86_MSR_FILTER"),
];

/// Opens `/dev/kvm` and checks its capabilities. `None`: it cannot be opened.
pub fn kvm(checks: &mut Vec<Check>) -> Option<Kvm> {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(e) => {
            checks.push(Check::fail(
                "kvm",
                format!("cannot open /dev/kvm: {e}"),
                "load kvm_intel or kvm_amd, enable virtualization in the firmware, and give this user access to /dev/kvm",
            ));
            return None;
        }
    };
    checks
        .push(Check::pass("kvm", format!("/dev/kvm can be opened (API version {})", kvm.get_api_version())));
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
                "KVM has all that vmft needs (SYNC_REGS {:#x}, USER_SPACE_MSR {:#x}, PMU_CAPABILITY {pmu})",
                has(KVM_CAP_SYNC_REGS),
                has(KVM_CAP_X86_USER_SPACE_MSR)
            ),
            false => format!("KVM lacks capabilities that vmft needs: {}", missing.join(", ")),
        },
        "use a newer kernel (5.10 or later)",
    ));
    Some(kvm)
}
