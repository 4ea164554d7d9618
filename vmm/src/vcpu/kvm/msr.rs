//! Model-specific registers: KVM keeps those that are plain state, and accesses to all others are handled here.
//!
//! The guest reads the same values here as on the software CPU. Registers that neither has raise #GP.

/// Registers that KVM keeps for the guest, as base and count. They are saved and restored with its state.
pub const ALLOWED: [(u32, u32); 4] = [
    // IA32_SYSENTER_CS, _ESP, _EIP
    (0x174, 3),
    // IA32_PAT
    (0x277, 1),
    // IA32_EFER, STAR, LSTAR, CSTAR, FMASK
    (0xc000_0080, 5),
    // FS_BASE, GS_BASE, KERNEL_GS_BASE
    (0xc000_0100, 3),
];

const TSC: u32 = 0x10;
const PLATFORM_ID: u32 = 0x17;
const UCODE_REV: u32 = 0x8b;
const MISC_ENABLE: u32 = 0x1a0;
/// Fast strings on, no branch trace store, no PEBS.
const MISC_ENABLE_VALUE: u64 = 1 << 0 | 1 << 11 | 1 << 12;

/// The value that the guest reads at guest time `time_ns`; `None`: #GP.
pub fn read(number: u32, time_ns: u64) -> Option<u64> {
    match number {
        TSC => Some(time_ns),
        PLATFORM_ID | UCODE_REV => Some(0),
        MISC_ENABLE => Some(MISC_ENABLE_VALUE),
        _ => None,
    }
}

/// Whether the guest may write to a register; the value is ignored. `false`: #GP.
pub fn write(number: u32) -> bool {
    matches!(number, UCODE_REV | MISC_ENABLE)
}
