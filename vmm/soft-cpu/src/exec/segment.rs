//! Segment registers: MOV, PUSH, POP, LSS, LFS, LGS; LLDT, LTR, SLDT, STR; LAR, LSL, VERR, VERW.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use crate::exit::CpuStop;
use crate::insn::{Handler, Insn, PlaceInBlock, register_index, threaded};
use crate::int::Int;
use crate::paging::is_canonical;
use crate::segment::{attr, unpack};
use crate::state::{Cpu, FS_BASE, GS_BASE, Segment, Shadow, reg, seg};

const NOT_PRESENT: u8 = 11;
const STACK_FAULT: u8 = 12;
/// Descriptor types of system segments in 64-bit mode (SDM 3A, table 3-2).
const TYPE_LDT: u16 = 2;
const TYPE_TSS: u16 = 9;
const TYPE_TSS_BUSY: u16 = 11;
const TYPE_CALL_GATE: u16 = 12;

/// Error code that names a selector.
pub(super) fn selector_error(selector: u16) -> u32 {
    (selector & !3) as u32
}

impl Cpu {
    /// Loads ES, SS, DS, FS or GS with all checks (SDM 2, MOV).
    fn load_segment(&mut self, ram: &mut [u8], n: usize, selector: u16) -> Result<(), CpuStop> {
        let segment = match n {
            seg::SS => self.stack_segment(ram, selector, self.cpl())?,
            _ => self.data_segment(ram, selector)?,
        };
        self.sys.seg[n] = segment;
        match n {
            seg::FS => self.regs[FS_BASE as usize] = segment.base,
            seg::GS => self.regs[GS_BASE as usize] = segment.base,
            seg::SS => self.shadow = Shadow::Everything,
            _ => {}
        }
        Ok(())
    }

    /// The segment for ES, DS, FS or GS. A null selector clears the base of FS and GS, as on Intel's CPUs.
    fn data_segment(&mut self, ram: &mut [u8], selector: u16) -> Result<Segment, CpuStop> {
        if selector & !3 == 0 {
            return Ok(Segment { selector, ..Segment::default() });
        }
        let error = selector_error(selector);
        let mut s = self.read_descriptor(ram, selector, error)?;
        if !s.is_readable() || !s.is_conforming() && (s.rpl() > s.dpl() || self.cpl() > s.dpl()) {
            return self.general_protection(error);
        }
        if !s.is_present() {
            return self.raise(NOT_PRESENT, Some(error));
        }
        self.mark_accessed(ram, &mut s)?;
        Ok(s)
    }

    /// The segment for SS at privilege level `cpl`.
    pub(super) fn stack_segment(
        &mut self,
        ram: &mut [u8],
        selector: u16,
        cpl: u8,
    ) -> Result<Segment, CpuStop> {
        let error = selector_error(selector);
        if selector & !3 == 0 {
            if cpl == 3 || selector as u8 & 3 != cpl {
                return self.general_protection(0);
            }
            return Ok(Segment { selector, attr: (cpl as u16) << attr::DPL_SHIFT, ..Segment::default() });
        }
        let mut s = self.read_descriptor(ram, selector, error)?;
        if s.rpl() != cpl || !s.is_writable_data() || s.dpl() != cpl {
            return self.general_protection(error);
        }
        if !s.is_present() {
            return self.raise(STACK_FAULT, Some(error));
        }
        self.mark_accessed(ram, &mut s)?;
        Ok(s)
    }

    /// Reads a 16-byte system descriptor of the GDT: for LLDT and LTR.
    fn system_segment(&mut self, ram: &mut [u8], selector: u16, kind: u16) -> Result<Segment, CpuStop> {
        let error = selector_error(selector);
        let at = if selector & 4 != 0 { None } else { self.descriptor_address(selector, 16) };
        let Some(at) = at else { return self.general_protection(error) };
        let low: u64 = self.load_system(ram, at)?;
        let high: u64 = self.load_system(ram, at.wrapping_add(8))?;
        let mut s = unpack(selector, low);
        s.base |= high << 32;
        let is_kind = s.attr & (attr::TYPE | attr::CODE_OR_DATA) == kind;
        if !is_kind || high >> 40 & 0x1f != 0 || !is_canonical(s.base) {
            return self.general_protection(error);
        }
        if !s.is_present() {
            return self.raise(NOT_PRESENT, Some(error));
        }
        Ok(s)
    }

    /// Reads a 16-bit operand: register `dst` or memory.
    fn selector_operand(&mut self, ram: &mut [u8], i: &Insn, is_reg: bool) -> Result<u16, CpuStop> {
        if is_reg { Ok(self.reg(i.dst)) } else { self.load_operand(ram, i) }
    }
}

/// MOV Sreg, r16; `dst` is the segment register.
fn mov_from_reg(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let selector = cpu.reg(i.src);
    cpu.load_segment(ram, i.dst as usize, selector)
}

fn mov_from_mem(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let selector = cpu.load_operand(ram, i)?;
    cpu.load_segment(ram, i.dst as usize, selector)
}

fn mov_to_reg<T: Int>(cpu: &mut Cpu, _: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let selector = cpu.sys.seg[i.src as usize].selector;
    cpu.set_reg(i.dst, T::from_u64(selector as u64));
    Ok(())
}

fn mov_to_mem(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let selector = cpu.sys.seg[i.src as usize].selector;
    cpu.store_operand(ram, i, selector)
}

fn push<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let selector = cpu.sys.seg[i.dst as usize].selector;
    let at = cpu.regs[reg::RSP as usize].wrapping_sub(T::SIZE as u64);
    cpu.store(ram, at, T::from_u64(selector as u64)).map_err(|stop| cpu.stack_fault(stop))?;
    cpu.regs[reg::RSP as usize] = at;
    Ok(())
}

fn pop<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let at = cpu.regs[reg::RSP as usize];
    let selector = cpu.load::<T>(ram, at).map_err(|stop| cpu.stack_fault(stop))?.to_u64() as u16;
    cpu.load_segment(ram, i.dst as usize, selector)?;
    cpu.regs[reg::RSP as usize] = at.wrapping_add(T::SIZE as u64);
    Ok(())
}

/// LSS, LFS, LGS: in memory there is an offset of width `T`, followed by the selector.
fn load_far<T: Int, const N: usize>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let addr = cpu.ea(i);
    let far = (|| {
        let offset = cpu.load::<T>(ram, addr)?;
        Ok((offset, cpu.load::<u16>(ram, addr.wrapping_add(T::SIZE as u64))?))
    })();
    let (offset, selector) = far.map_err(|stop| cpu.operand_fault(i, stop))?;
    cpu.load_segment(ram, N, selector)?;
    cpu.set_reg(i.dst, offset);
    Ok(())
}

fn lldt<const REG: bool>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    cpu.privileged()?;
    let selector = cpu.selector_operand(ram, i, REG)?;
    cpu.sys.ldtr = if selector & !3 == 0 {
        Segment { selector, ..Segment::default() }
    } else {
        cpu.system_segment(ram, selector, TYPE_LDT)?
    };
    Ok(())
}

fn ltr<const REG: bool>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    cpu.privileged()?;
    let selector = cpu.selector_operand(ram, i, REG)?;
    if selector & !3 == 0 {
        return cpu.general_protection(0);
    }
    let mut s = cpu.system_segment(ram, selector, TYPE_TSS)?;
    s.attr = s.attr & !attr::TYPE | TYPE_TSS_BUSY;
    if let Some(at) = cpu.descriptor_address(selector, 16) {
        cpu.store_system(ram, at.wrapping_add(5), s.attr as u8)?;
    }
    cpu.sys.tr = s;
    Ok(())
}

/// SLDT and STR.
fn store_selector(cpu: &mut Cpu, ram: &mut [u8], i: &Insn, width: usize, v: u16) -> Result<(), CpuStop> {
    match width {
        0 => return cpu.store_operand(ram, i, v),
        2 => cpu.set_reg(i.dst, v),
        // 32 bits clear the upper half.
        _ => cpu.set_reg(i.dst, v as u64),
    }
    Ok(())
}

fn sldt<const WIDTH: usize>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let v = cpu.sys.ldtr.selector;
    store_selector(cpu, ram, i, WIDTH, v)
}

fn str<const WIDTH: usize>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let v = cpu.sys.tr.selector;
    store_selector(cpu, ram, i, WIDTH, v)
}

/// The descriptor of a selector, with its first 8 bytes, if LAR, LSL, VERR and VERW may access it.
fn accessible_descriptor(
    cpu: &mut Cpu,
    ram: &mut [u8],
    selector: u16,
) -> Result<Option<(Segment, u64)>, CpuStop> {
    if selector & !3 == 0 {
        return Ok(None);
    }
    let Some(at) = cpu.descriptor_address(selector, 8) else { return Ok(None) };
    let d: u64 = cpu.load_system(ram, at)?;
    let s = unpack(selector, d);
    let allowed = s.is_conforming() || cpu.cpl() <= s.dpl() && s.rpl() <= s.dpl();
    Ok(allowed.then_some((s, d)))
}

/// LAR and (with `LIMIT`) LSL. The selector is operand 1: a register with `REG`, else memory.
fn load_rights_or_limit<T: Int, const REG: bool, const LIMIT: bool>(
    cpu: &mut Cpu,
    ram: &mut [u8],
    i: &Insn,
) -> Result<(), CpuStop> {
    let selector = if REG { cpu.reg(i.src) } else { cpu.load_operand(ram, i)? };
    let found = accessible_descriptor(cpu, ram, selector)?.filter(|(s, _)| {
        let kind = s.attr & attr::TYPE;
        let gate = !LIMIT && kind == TYPE_CALL_GATE;
        s.attr & attr::CODE_OR_DATA != 0 || matches!(kind, TYPE_LDT | TYPE_TSS | TYPE_TSS_BUSY) || gate
    });
    cpu.flags.set_zf(found.is_some());
    if let Some((s, d)) = found {
        let v = if LIMIT { s.limit as u64 } else { d >> 32 & 0x00ff_ff00 };
        cpu.set_reg(i.dst, T::from_u64(v));
    }
    Ok(())
}

/// VERR and (with `WRITE`) VERW.
fn verify<const REG: bool, const WRITE: bool>(
    cpu: &mut Cpu,
    ram: &mut [u8],
    i: &Insn,
) -> Result<(), CpuStop> {
    let selector = cpu.selector_operand(ram, i, REG)?;
    let found = accessible_descriptor(cpu, ram, selector)?;
    let fits = |s: &Segment| if WRITE { s.is_writable_data() } else { s.is_readable() };
    cpu.flags.set_zf(found.is_some_and(|(s, _)| fits(&s)));
    Ok(())
}

/// Handlers of this family.
pub fn select(ins: &Instruction, insn: &mut Insn) -> Option<PlaceInBlock> {
    let is_reg = |n| ins.op_kind(n) == OpKind::Register;
    let first = if is_reg(0) { ins.op0_register() } else { Register::None };
    // An instruction that loads SS inhibits events after it, and so ends its block.
    let loads = |r: Register| if r == Register::SS { PlaceInBlock::Last } else { PlaceInBlock::Middle };
    let (exec, place): (Handler, PlaceInBlock) = match ins.mnemonic() {
        Mnemonic::Mov if first == Register::CS => return None,
        Mnemonic::Mov if first.is_segment_register() && is_reg(1) => (threaded!(mov_from_reg), loads(first)),
        Mnemonic::Mov if first.is_segment_register() => (threaded!(mov_from_mem), loads(first)),
        Mnemonic::Mov if is_reg(1) && ins.op1_register().is_segment_register() => {
            let width = first.size();
            (select_mov_to(if is_reg(0) { width } else { 0 }), PlaceInBlock::Middle)
        }
        Mnemonic::Push if first.is_segment_register() => (
            if ins.stack_pointer_increment() == -2 { threaded!(push::<u16>) } else { threaded!(push::<u64>) },
            PlaceInBlock::Middle,
        ),
        Mnemonic::Pop if first.is_segment_register() => (
            if ins.stack_pointer_increment() == 2 { threaded!(pop::<u16>) } else { threaded!(pop::<u64>) },
            PlaceInBlock::Middle,
        ),
        Mnemonic::Lss => (select_far_load::<{ seg::SS }>(first), PlaceInBlock::Last),
        Mnemonic::Lfs => (select_far_load::<{ seg::FS }>(first), PlaceInBlock::Middle),
        Mnemonic::Lgs => (select_far_load::<{ seg::GS }>(first), PlaceInBlock::Middle),
        Mnemonic::Lldt => {
            (if is_reg(0) { threaded!(lldt::<true>) } else { threaded!(lldt::<false>) }, PlaceInBlock::Middle)
        }
        Mnemonic::Ltr => {
            (if is_reg(0) { threaded!(ltr::<true>) } else { threaded!(ltr::<false>) }, PlaceInBlock::Middle)
        }
        Mnemonic::Sldt | Mnemonic::Str => {
            (select_store(ins.mnemonic(), if is_reg(0) { first.size() } else { 0 }), PlaceInBlock::Middle)
        }
        Mnemonic::Lar | Mnemonic::Lsl => {
            if is_reg(1) {
                insn.src = register_index(ins.op1_register());
            }
            (
                select_rights_or_limit(first.size(), is_reg(1), ins.mnemonic() == Mnemonic::Lsl),
                PlaceInBlock::Middle,
            )
        }
        Mnemonic::Verr => (
            if is_reg(0) { threaded!(verify::<true, false>) } else { threaded!(verify::<false, false>) },
            PlaceInBlock::Middle,
        ),
        Mnemonic::Verw => (
            if is_reg(0) { threaded!(verify::<true, true>) } else { threaded!(verify::<false, true>) },
            PlaceInBlock::Middle,
        ),
        _ => return None,
    };
    insn.exec = exec;
    Some(place)
}

fn select_mov_to(width: usize) -> Handler {
    match width {
        0 => threaded!(mov_to_mem),
        2 => threaded!(mov_to_reg::<u16>),
        4 => threaded!(mov_to_reg::<u32>),
        _ => threaded!(mov_to_reg::<u64>),
    }
}

fn select_far_load<const N: usize>(to: Register) -> Handler {
    match to.size() {
        2 => threaded!(load_far::<u16, N>),
        4 => threaded!(load_far::<u32, N>),
        _ => threaded!(load_far::<u64, N>),
    }
}

fn select_store(mnemonic: Mnemonic, width: usize) -> Handler {
    match (mnemonic, width) {
        (Mnemonic::Sldt, 0) => threaded!(sldt::<0>),
        (Mnemonic::Sldt, 2) => threaded!(sldt::<2>),
        (Mnemonic::Sldt, _) => threaded!(sldt::<4>),
        (_, 0) => threaded!(str::<0>),
        (_, 2) => threaded!(str::<2>),
        _ => threaded!(str::<4>),
    }
}

fn select_rights_or_limit(width: usize, is_reg: bool, limit: bool) -> Handler {
    macro_rules! by_source {
        ($t:ty) => {
            match (is_reg, limit) {
                (true, true) => threaded!(load_rights_or_limit::<$t, true, true>),
                (true, false) => threaded!(load_rights_or_limit::<$t, true, false>),
                (false, true) => threaded!(load_rights_or_limit::<$t, false, true>),
                (false, false) => threaded!(load_rights_or_limit::<$t, false, false>),
            }
        };
    }
    match width {
        2 => by_source!(u16),
        4 => by_source!(u32),
        _ => by_source!(u64),
    }
}
