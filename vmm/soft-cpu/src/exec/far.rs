//! Transfers to another code segment: far JMP, CALL and RET, INT, IRET, SYSCALL, SYSENTER, SYSRET, SYSEXIT.
//!
//! This CPU knows only 64-bit code segments: a transfer to compatibility mode raises #GP with the selector,
//! as for a segment of the wrong type; so do call gates and task gates.

use iced_x86::{Code, Instruction};

use crate::debug::SINGLE_STEP;
use crate::exception::InterruptSource;
use crate::exit::{CpuStop, Exception};
use crate::flags::{Flags, bits};
use crate::insn::{Handler, Insn, PlaceInBlock, threaded};
use crate::int::Int;
use crate::paging::is_canonical;
use crate::segment::attr;
use crate::state::{Cpu, Segment, reg, seg};

use super::msr::efer;
use super::segment::selector_error;

const NOT_PRESENT: u8 = 11;

/// Access rights of the flat segments that SYSCALL, SYSRET, SYSENTER and SYSEXIT load; the DPL is added.
const CODE_ATTR: u16 = 0xa09b;
const DATA_ATTR: u16 = 0xc093;

fn flat(selector: u16, attr: u16, cpl: u8) -> Segment {
    Segment {
        selector: selector & !3 | cpl as u16,
        attr: attr | (cpl as u16) << attr::DPL_SHIFT,
        limit: u32::MAX,
        base: 0,
    }
}

impl Cpu {
    /// The code segment of a far JMP or CALL.
    fn jump_target(&mut self, ram: &mut [u8], selector: u16) -> Result<Segment, CpuStop> {
        let cpl = self.cpl();
        self.code_segment(ram, selector, |s| match s.is_conforming() {
            true => s.dpl() <= cpl,
            false => s.rpl() <= cpl && s.dpl() == cpl,
        })
    }

    /// The code segment of a far RET or IRET; its RPL is the new privilege level.
    fn return_target(&mut self, ram: &mut [u8], selector: u16) -> Result<Segment, CpuStop> {
        let cpl = self.cpl();
        self.code_segment(ram, selector, |s| {
            let level = if s.is_conforming() { s.dpl() <= s.rpl() } else { s.dpl() == s.rpl() };
            s.rpl() >= cpl && level
        })
    }

    fn code_segment(
        &mut self,
        ram: &mut [u8],
        selector: u16,
        allowed: impl FnOnce(&Segment) -> bool,
    ) -> Result<Segment, CpuStop> {
        if selector & !3 == 0 {
            return self.general_protection(0);
        }
        let error = selector_error(selector);
        let mut s = self.read_descriptor(ram, selector, error)?;
        if !s.is_code() || !s.is_64_bit() || !allowed(&s) {
            return self.general_protection(error);
        }
        if !s.is_present() {
            return self.raise(NOT_PRESENT, Some(error));
        }
        self.mark_accessed(ram, &mut s)?;
        Ok(s)
    }

    fn stack_load<T: Int>(&mut self, ram: &mut [u8], addr: u64) -> Result<u64, CpuStop> {
        match self.load::<T>(ram, addr) {
            Ok(v) => Ok(v.to_u64()),
            Err(stop) => Err(self.stack_fault(stop)),
        }
    }

    /// Returns to the same or an outer privilege level. On an error nothing has changed.
    fn far_return(&mut self, ram: &mut [u8], to: &Return) -> Result<(), CpuStop> {
        let old = self.cpl();
        let code = self.return_target(ram, to.cs)?;
        let cpl = code.rpl();
        let stack = match to.stack {
            Some((ss, rsp)) => Some((self.stack_segment(ram, ss, cpl)?, rsp)),
            None => None,
        };
        if !is_canonical(to.rip) {
            return self.general_protection(0);
        }
        self.sys.seg[seg::CS] = code;
        self.rip = to.rip;
        if let Some((ss, rsp)) = stack {
            self.sys.seg[seg::SS] = ss;
            self.regs[reg::RSP as usize] = rsp;
        }
        self.set_cpl(cpl);
        if cpl > old {
            self.clear_inner_segments();
        }
        Ok(())
    }

    /// Makes the data segments null that the new privilege level may not use. The bases of FS and GS stay.
    fn clear_inner_segments(&mut self) {
        let cpl = self.cpl();
        for n in [seg::ES, seg::DS, seg::FS, seg::GS] {
            let s = &mut self.sys.seg[n];
            if s.is_present() && !s.is_conforming() && s.dpl() < cpl {
                *s = Segment::default();
            }
        }
    }

    /// Suppresses the single-step trap after this instruction, although TF was set at its start.
    fn suppress_single_step(&mut self) {
        self.single_step = false;
    }
}

/// The destination of a far return.
struct Return {
    cs: u16,
    rip: u64,
    /// SS and RSP, when they change.
    stack: Option<(u16, u64)>,
}

/// Reads the far pointer in memory: the offset, of width `T`, followed by the selector.
fn far_pointer<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(u64, u16), CpuStop> {
    let addr = cpu.ea(i);
    let mut read = || {
        let offset = cpu.load::<T>(ram, addr)?.to_u64();
        Ok((offset, cpu.load::<u16>(ram, addr.wrapping_add(T::SIZE as u64))?))
    };
    let far = read();
    far.map_err(|stop| cpu.operand_fault(i, stop))
}

fn enter_code(cpu: &mut Cpu, code: Segment, rip: u64) {
    let cpl = cpu.cpl() as u16;
    cpu.sys.seg[seg::CS] = Segment { selector: code.selector & !3 | cpl, ..code };
    cpu.rip = rip;
}

fn jmp<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let (rip, selector) = far_pointer::<T>(cpu, ram, i)?;
    let code = cpu.jump_target(ram, selector)?;
    if !is_canonical(rip) {
        return cpu.general_protection(0);
    }
    enter_code(cpu, code, rip);
    Ok(())
}

fn call<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let (rip, selector) = far_pointer::<T>(cpu, ram, i)?;
    let code = cpu.jump_target(ram, selector)?;
    let size = T::SIZE as u64;
    let top = cpu.regs[reg::RSP as usize].wrapping_sub(2 * size);
    let mut frame = [0; 16];
    frame[..8].copy_from_slice(&cpu.rip.to_le_bytes());
    let cs = (cpu.sys.seg[seg::CS].selector as u64).to_le_bytes();
    frame[T::SIZE..T::SIZE + 8].copy_from_slice(&cs);
    cpu.store_bytes(ram, top, &frame[..2 * T::SIZE]).map_err(|stop| cpu.stack_fault(stop))?;
    if !is_canonical(rip) {
        return cpu.general_protection(0);
    }
    cpu.regs[reg::RSP as usize] = top;
    enter_code(cpu, code, rip);
    Ok(())
}

fn ret<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let size = T::SIZE as u64;
    let rsp = cpu.regs[reg::RSP as usize];
    let released = i.imm as u16 as u64;
    let rip = cpu.stack_load::<T>(ram, rsp)?;
    let cs = cpu.stack_load::<T>(ram, rsp.wrapping_add(size))? as u16;
    let new_rsp = rsp.wrapping_add(2 * size).wrapping_add(released);
    if cs as u8 & 3 <= cpu.cpl() {
        cpu.far_return(ram, &Return { cs, rip, stack: None })?;
        cpu.regs[reg::RSP as usize] = new_rsp;
        return Ok(());
    }
    let outer = cpu.stack_load::<T>(ram, new_rsp)?;
    let ss = cpu.stack_load::<T>(ram, new_rsp.wrapping_add(size))? as u16;
    cpu.far_return(ram, &Return { cs, rip, stack: Some((ss, outer.wrapping_add(released))) })
}

fn iret<T: Int>(cpu: &mut Cpu, ram: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    if cpu.flags.non_status() & bits::NT != 0 {
        return cpu.general_protection(0);
    }
    let rsp = cpu.regs[reg::RSP as usize];
    let mut frame = [0; 5];
    for (n, v) in frame.iter_mut().enumerate() {
        *v = cpu.stack_load::<T>(ram, rsp.wrapping_add((n * T::SIZE) as u64))?;
    }
    let [rip, cs, flags, new_rsp, ss] = frame;
    let (cpl, io) = (cpu.cpl(), cpu.io_privileged());
    cpu.far_return(ram, &Return { cs: cs as u16, rip, stack: Some((ss as u16, new_rsp)) })?;
    let mut loaded = bits::STATUS | bits::TF | bits::DF | bits::NT;
    if T::SIZE > 2 {
        loaded |= bits::RF | bits::AC | bits::ID;
    }
    if io {
        loaded |= bits::IF;
    }
    if cpl == 0 {
        loaded |= bits::IOPL | if T::SIZE > 2 { bits::VIF | bits::VIP } else { 0 };
    }
    cpu.flags = Flags::from_bits(cpu.flags.to_bits() & !loaded | flags & loaded);
    Ok(())
}

/// INT n and INT3. A fault during delivery counts as a fault of this instruction.
fn int(cpu: &mut Cpu, ram: &mut [u8], vector: u8) -> Result<(), CpuStop> {
    cpu.enter(ram, Exception { vector, error: None }, InterruptSource::Software)?;
    cpu.suppress_single_step();
    Ok(())
}

/// INT1 raises #DB as a trap, whatever the DPL of the gate is.
fn int1(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    cpu.suppress_single_step();
    cpu.exception = Exception { vector: 1, error: None };
    Err(CpuStop::Trap)
}

fn syscall(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    if cpu.sys.efer & efer::SCE == 0 {
        return cpu.undefined();
    }
    let flags = cpu.flags.to_bits() & !bits::RF;
    cpu.regs[reg::RCX as usize] = cpu.rip;
    cpu.regs[reg::R11 as usize] = flags;
    cpu.rip = cpu.sys.lstar;
    cpu.flags = Flags::from_bits(flags & !cpu.sys.fmask);
    let selector = (cpu.sys.star >> 32) as u16;
    cpu.enter_flat(selector & !3, (selector & !3).wrapping_add(8), 0);
    if cpu.flags.non_status() & bits::TF == 0 {
        cpu.suppress_single_step();
    }
    Ok(())
}

fn sysret(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    if cpu.sys.efer & efer::SCE == 0 {
        return cpu.undefined();
    }
    cpu.privileged()?;
    let rip = cpu.regs[reg::RCX as usize];
    if !is_canonical(rip) {
        return cpu.general_protection(0);
    }
    let kept = bits::STATUS | bits::TF | bits::IF | bits::DF | bits::IOPL | bits::NT | bits::AC;
    let kept = kept | bits::VIF | bits::VIP | bits::ID;
    cpu.flags = Flags::from_bits(cpu.regs[reg::R11 as usize] & kept);
    cpu.rip = rip;
    let selector = (cpu.sys.star >> 48) as u16;
    cpu.enter_flat(selector.wrapping_add(16), selector.wrapping_add(8), 3);
    if cpu.flags.non_status() & bits::TF == 0 {
        cpu.suppress_single_step();
        return Ok(());
    }
    // Unlike IRET, SYSRET traps at once when it sets TF.
    cpu.suppress_single_step();
    cpu.set_debug_status(SINGLE_STEP);
    cpu.exception = Exception { vector: 1, error: None };
    Err(CpuStop::Trap)
}

fn sysenter(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    let [selector, rsp, rip] = cpu.sys.sysenter;
    let selector = selector as u16 & !3;
    if selector == 0 {
        return cpu.general_protection(0);
    }
    cpu.flags.update_non_status(bits::IF | bits::VM | bits::RF, 0);
    cpu.regs[reg::RSP as usize] = rsp;
    cpu.rip = rip;
    cpu.enter_flat(selector, selector.wrapping_add(8), 0);
    Ok(())
}

fn sysexit(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    let selector = cpu.sys.sysenter[0] as u16 & !3;
    if selector == 0 {
        return cpu.general_protection(0);
    }
    cpu.privileged()?;
    let (rip, rsp) = (cpu.regs[reg::RDX as usize], cpu.regs[reg::RCX as usize]);
    if !is_canonical(rip) || !is_canonical(rsp) {
        return cpu.general_protection(0);
    }
    cpu.regs[reg::RSP as usize] = rsp;
    cpu.rip = rip;
    cpu.enter_flat(selector.wrapping_add(32), selector.wrapping_add(40), 3);
    Ok(())
}

/// SYSRET and SYSEXIT without REX.W would enter compatibility mode.
fn to_32_bit(cpu: &mut Cpu, _: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    cpu.general_protection(0)
}

impl Cpu {
    fn enter_flat(&mut self, cs: u16, ss: u16, cpl: u8) {
        self.sys.seg[seg::CS] = flat(cs, CODE_ATTR, cpl);
        self.sys.seg[seg::SS] = flat(ss, DATA_ATTR, cpl);
        self.cpl_changed();
    }
}

/// Handlers of this family.
pub fn select(ins: &Instruction, insn: &mut Insn) -> Option<PlaceInBlock> {
    let exec: Handler = match ins.code() {
        Code::Jmp_m1616 => threaded!(jmp::<u16>),
        Code::Jmp_m1632 => threaded!(jmp::<u32>),
        Code::Jmp_m1664 => threaded!(jmp::<u64>),
        Code::Call_m1616 => threaded!(call::<u16>),
        Code::Call_m1632 => threaded!(call::<u32>),
        Code::Call_m1664 => threaded!(call::<u64>),
        Code::Retfw | Code::Retfw_imm16 => threaded!(ret::<u16>),
        Code::Retfd | Code::Retfd_imm16 => threaded!(ret::<u32>),
        Code::Retfq | Code::Retfq_imm16 => threaded!(ret::<u64>),
        Code::Iretw => threaded!(iret::<u16>),
        Code::Iretd => threaded!(iret::<u32>),
        Code::Iretq => threaded!(iret::<u64>),
        Code::Int_imm8 => threaded!(|cpu, ram, i| int(cpu, ram, i.imm as u8)),
        Code::Int3 => threaded!(|cpu, ram, _| int(cpu, ram, 3)),
        Code::Int1 => threaded!(int1),
        Code::Syscall => threaded!(syscall),
        Code::Sysretq => threaded!(sysret),
        Code::Sysenter => threaded!(sysenter),
        Code::Sysexitq => threaded!(sysexit),
        Code::Sysretd | Code::Sysexitd => threaded!(to_32_bit),
        _ => return None,
    };
    insn.exec = exec;
    Some(PlaceInBlock::Last)
}
