//! Converts the vCPU's state between the software CPU's form and KVM's.
//!
//! Other state in KVM is either constant (CPUID hides the features that would need it) or not the guest's. The x87's last
//! instruction and data pointers are left out, because CPUs differ in when they save them. RF is clear at every instruction
//! boundary, except in a guest that debugs itself.

use kvm_bindings::*;
use kvm_ioctls::VcpuFd;
use soft_cpu::CpuState;
use soft_cpu::state::{Registers, Segment, Shadow, TableRegister, X87};

use super::super::{GeneralRegisters, VcpuError};
use super::{failed, fpu, run_area};

/// Model-specific registers that are not in `kvm_sregs`.
const MSRS: [u32; 9] =
    [0x174, 0x175, 0x176, 0x277, 0xc000_0081, 0xc000_0082, 0xc000_0083, 0xc000_0084, 0xc000_0102];
/// RFLAGS.TF.
pub const TF: u64 = 1 << 8;
/// RFLAGS.RF.
pub const RF: u64 = 1 << 16;

/// Reads the whole state at an instruction boundary; `retired` is set to `count`.
pub fn save(vcpu: &VcpuFd, count: u64, halted: bool) -> Result<CpuState, VcpuError> {
    let regs = vcpu.get_regs().map_err(failed("reading registers"))?;
    let sregs = vcpu.get_sregs().map_err(failed("reading system registers"))?;
    let debug = vcpu.get_debug_regs().map_err(failed("reading debug registers"))?;
    let events = vcpu.get_vcpu_events().map_err(failed("reading events"))?;
    // A KVM that delivers exceptions by emulation leaves `injected` set, so it is ignored: at an instruction boundary no delivery
    // is half done.
    if events.exception.pending != 0 {
        return Err(VcpuError::ExceptionPending(events.exception.nr));
    }
    let msrs = read_msrs(vcpu)?;
    let queued = events.interrupt.injected != 0 && events.interrupt.soft == 0;
    let mut cpu = CpuState {
        gpr: general(&regs),
        fs_base: sregs.fs.base,
        gs_base: sregs.gs.base,
        rip: regs.rip,
        rflags: regs.rflags & !RF,
        xmm: [0; 16],
        mxcsr: 0,
        x87: X87::default(),
        sys: system(&sregs, &debug, &msrs),
        retired: count,
        tsc_offset: 0,
        shadow: match events.interrupt.shadow {
            0 => Shadow::None,
            n if n & KVM_X86_SHADOW_INT_MOV_SS as u8 != 0 => Shadow::Everything,
            _ => Shadow::Interrupts,
        },
        halted,
        interrupt: queued.then_some(events.interrupt.nr),
        tlb: Default::default(),
    };
    fpu::save(vcpu, &mut cpu)?;
    Ok(cpu)
}

/// Sets the whole state.
pub fn restore(vcpu: &mut VcpuFd, s: &CpuState) -> Result<(), VcpuError> {
    // KVM takes CR8 and the APIC's base from the mapping at every entry.
    let old = vcpu.get_sregs().map_err(failed("reading system registers"))?;
    let run = vcpu.get_kvm_run();
    run.cr8 = s.sys.cr8;
    run.apic_base = old.apic_base;
    vcpu.set_sregs(&kvm_sregs { apic_base: old.apic_base, ..sregs(s) })
        .map_err(failed("setting system registers"))?;
    let general = GeneralRegisters { gpr: s.gpr, rip: s.rip, rflags: s.rflags };
    vcpu.set_regs(&general_registers(&general)).map_err(failed("setting registers"))?;
    fpu::restore(vcpu, s)?;
    let debug = kvm_debugregs { db: s.sys.dr, dr6: s.sys.dr6, dr7: s.sys.dr7, ..Default::default() };
    vcpu.set_debug_regs(&debug).map_err(failed("setting debug registers"))?;
    write_msrs(vcpu, &s.sys)?;
    let mut events = kvm_vcpu_events { flags: KVM_VCPUEVENT_VALID_SHADOW, ..Default::default() };
    events.interrupt.shadow = match s.shadow {
        Shadow::None => 0,
        Shadow::Interrupts => KVM_X86_SHADOW_INT_STI as u8,
        Shadow::Everything => KVM_X86_SHADOW_INT_MOV_SS as u8,
    };
    vcpu.set_vcpu_events(&events).map_err(failed("setting events"))?;
    if let Some(vector) = s.interrupt {
        run_area::queue_interrupt(vcpu, vector).map_err(failed("queueing an interrupt"))?;
    }
    Ok(())
}

/// RAX to R15 in the order of their encoding.
pub fn general(r: &kvm_regs) -> [u64; 16] {
    [
        r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13,
        r.r14, r.r15,
    ]
}

/// RFLAGS without RF, which depends on why KVM returned.
pub fn flags(r: &kvm_regs) -> u64 {
    r.rflags & !RF
}

/// KVM's form of general registers.
pub fn general_registers(general: &GeneralRegisters) -> kvm_regs {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = general.gpr;
    let (rip, rflags) = (general.rip, general.rflags);
    kvm_regs { rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
}

/// The system registers, in the software CPU's form.
fn system(s: &kvm_sregs, debug: &kvm_debugregs, msrs: &[u64; MSRS.len()]) -> Registers {
    let &[cs, esp, eip, pat, star, lstar, cstar, fmask, kernel_gs_base] = msrs;
    Registers {
        seg: [&s.es, &s.cs, &s.ss, &s.ds, &s.fs, &s.gs].map(segment),
        ldtr: segment(&s.ldt),
        tr: segment(&s.tr),
        gdtr: TableRegister { base: s.gdt.base, limit: s.gdt.limit },
        idtr: TableRegister { base: s.idt.base, limit: s.idt.limit },
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        dr: debug.db,
        dr6: debug.dr6,
        dr7: debug.dr7,
        efer: s.efer,
        star,
        lstar,
        cstar,
        fmask,
        kernel_gs_base,
        sysenter: [cs, esp, eip],
        pat,
        tsc_aux: 0,
        tsc_adjust: 0,
    }
}

/// The system registers, in KVM's form.
fn sregs(s: &CpuState) -> kvm_sregs {
    let sys = &s.sys;
    let [es, cs, ss, ds, mut fs, mut gs] = sys.seg.map(kvm_segment_of);
    (fs.base, gs.base) = (s.fs_base, s.gs_base);
    let table = |t: TableRegister| kvm_dtable { base: t.base, limit: t.limit, ..Default::default() };
    kvm_sregs {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr: kvm_segment_of(sys.tr),
        ldt: kvm_segment_of(sys.ldtr),
        gdt: table(sys.gdtr),
        idt: table(sys.idtr),
        cr0: sys.cr0,
        cr2: sys.cr2,
        cr3: sys.cr3,
        cr4: sys.cr4,
        cr8: sys.cr8,
        efer: sys.efer,
        ..Default::default()
    }
}

/// A segment in the software CPU's form. The hidden part of an unusable segment has no effect, and is read as zeros. The bases
/// of FS and GS are also kept outside the segments.
fn segment(s: &kvm_segment) -> Segment {
    if s.unusable != 0 || s.present == 0 {
        return Segment { selector: s.selector, ..Segment::default() };
    }
    let attr =
        [(s.type_, 0), (s.s, 4), (s.dpl, 5), (s.present, 7), (s.avl, 12), (s.l, 13), (s.db, 14), (s.g, 15)];
    let attr = attr.into_iter().fold(0, |all, (bits, at)| all | u16::from(bits) << at);
    Segment { selector: s.selector, attr, limit: s.limit, base: s.base }
}

/// A segment in KVM's form.
fn kvm_segment_of(s: Segment) -> kvm_segment {
    let bits = |at: u32, mask: u16| (s.attr >> at & mask) as u8;
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: bits(0, 15),
        s: bits(4, 1),
        dpl: bits(5, 3),
        present: bits(7, 1),
        avl: bits(12, 1),
        l: bits(13, 1),
        db: bits(14, 1),
        g: bits(15, 1),
        unusable: 1 - bits(7, 1),
        padding: 0,
    }
}

fn msr_list(values: [u64; MSRS.len()]) -> Result<Msrs, VcpuError> {
    let entries = MSRS.iter().zip(values);
    let entries: Vec<_> =
        entries.map(|(&index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
    Msrs::from_entries(&entries).map_err(|_| VcpuError::KvmLacks("room for a list of the MSRs to save"))
}

fn read_msrs(vcpu: &VcpuFd) -> Result<[u64; MSRS.len()], VcpuError> {
    let mut list = msr_list([0; MSRS.len()])?;
    match vcpu.get_msrs(&mut list).map_err(failed("reading MSRs"))? {
        n if n == MSRS.len() => Ok(std::array::from_fn(|i| list.as_slice()[i].data)),
        _ => Err(VcpuError::KvmLacks("an MSR of the 64-bit architecture")),
    }
}

fn write_msrs(vcpu: &VcpuFd, s: &Registers) -> Result<(), VcpuError> {
    let [cs, esp, eip] = s.sysenter;
    let values = [cs, esp, eip, s.pat, s.star, s.lstar, s.cstar, s.fmask, s.kernel_gs_base];
    match vcpu.set_msrs(&msr_list(values)?).map_err(failed("setting MSRs"))? {
        n if n == MSRS.len() => Ok(()),
        _ => Err(VcpuError::KvmLacks("an MSR of the 64-bit architecture")),
    }
}
