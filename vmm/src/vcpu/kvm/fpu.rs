//! x87 and SSE state, which KVM returns in FXSAVE's layout (SDM 1, table 10-2) at the start of its XSAVE area.
//!
//! KVM_GET_FPU would be simpler, but it does not return MXCSR.
#![allow(unsafe_code)]

use kvm_bindings::kvm_xsave;
use kvm_ioctls::VcpuFd;
use soft_cpu::CpuState;
use soft_cpu::state::X87;

use super::super::VcpuError;
use super::failed;

const MXCSR: usize = 24;
const ST: usize = 32;
const XMM: usize = 160;
/// XSTATE_BV, after the legacy area: the components that are present.
const COMPONENTS: usize = 512;
/// Components x87 and SSE.
const LEGACY: u32 = 3;
/// The field TOP of the status word.
const TOP: u16 = 7 << 11;

/// Reads the state into `cpu`.
pub fn save(vcpu: &VcpuFd, cpu: &mut CpuState) -> Result<(), VcpuError> {
    let xsave = vcpu.get_xsave().map_err(failed("reading the FPU"))?;
    let bytes = xsave.region.map(u32::to_le_bytes);
    let bytes = bytes.as_flattened();
    let word = |at| u16::from_le_bytes(array(bytes, at));
    let top = (word(2) & TOP) >> 11;
    cpu.x87 =
        X87 { control: word(0), status: word(2) & !TOP, top: top as u8, in_use: bytes[4], ..X87::default() };
    // The area has ST(0) to ST(7), `CpuState` the physical registers.
    for n in 0..8 {
        let (from, to) = (ST + 16 * n, (top as usize + n) & 7);
        cpu.x87.significand[to] = u64::from_le_bytes(array(bytes, from));
        cpu.x87.sign_exponent[to] = word(from + 8);
    }
    cpu.mxcsr = u32::from_le_bytes(array(bytes, MXCSR));
    cpu.xmm = std::array::from_fn(|n| u128::from_le_bytes(array(bytes, XMM + 16 * n)));
    Ok(())
}

/// Sets the state from `cpu`.
pub fn restore(vcpu: &VcpuFd, cpu: &CpuState) -> Result<(), VcpuError> {
    let x87 = &cpu.x87;
    let mut bytes = [0; COMPONENTS];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, &x87.control.to_le_bytes());
    put(2, &(x87.status | u16::from(x87.top) << 11).to_le_bytes());
    put(4, &[x87.in_use]);
    put(MXCSR, &cpu.mxcsr.to_le_bytes());
    for n in 0..8 {
        let from = (x87.top as usize + n) & 7;
        put(ST + 16 * n, &x87.significand[from].to_le_bytes());
        put(ST + 16 * n + 8, &x87.sign_exponent[from].to_le_bytes());
    }
    for (n, value) in cpu.xmm.iter().enumerate() {
        put(XMM + 16 * n, &value.to_le_bytes());
    }
    let mut xsave = kvm_xsave::default();
    for (to, from) in xsave.region.iter_mut().zip(bytes.as_chunks().0) {
        *to = u32::from_le_bytes(*from);
    }
    xsave.region[COMPONENTS / 4] = LEGACY;
    // SAFETY: the kernel reads the 4 KiB of the structure and no more unless features were asked for by
    // arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM), which this program never does.
    unsafe { vcpu.set_xsave(&xsave) }.map_err(failed("setting the FPU"))
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    std::array::from_fn(|n| bytes[at + n])
}
