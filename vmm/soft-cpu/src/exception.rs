//! Delivery of faults, traps and interrupts through the IDT in 64-bit mode (SDM 3A, chapter 6).

use crate::exit::{Fault, Stop};
use crate::flags::bits;
use crate::paging::is_canonical;
use crate::state::{Cpu, Segment, reg, seg};

/// What is delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// `Cpu::fault`, raised by an instruction or as a debug trap.
    Fault,
    /// An external interrupt.
    Interrupt(u8),
    /// INT n, INT3 or INTO: the gate's DPL is checked.
    Software(u8),
}

/// Access rights in [`Segment::attr`].
pub mod attr {
    #![allow(missing_docs)]
    pub const TYPE: u16 = 0xf;
    pub const CODE_OR_DATA: u16 = 1 << 4;
    pub const DPL_SHIFT: u32 = 5;
    pub const PRESENT: u16 = 1 << 7;
    pub const LONG: u16 = 1 << 13;
    pub const DEFAULT_32: u16 = 1 << 14;
}

const DOUBLE_FAULT: u8 = 8;
const PAGE_FAULT: u8 = 14;

impl Cpu {
    /// Delivers an event: pushes the frame and goes to the handler, through double fault to `Err` (triple
    /// fault) when that fails. `Cpu::rip` is what the frame will say.
    pub(crate) fn deliver(&mut self, ram: &mut [u8], event: Event) -> Result<(), Stop> {
        let mut first = match event {
            Event::Fault => self.fault,
            Event::Interrupt(vector) | Event::Software(vector) => Fault { vector, error: None },
        };
        let mut software = matches!(event, Event::Software(_));
        let external = matches!(event, Event::Interrupt(_));
        // Each round can only get worse: a fault of delivery, a double fault, the end.
        for _ in 0..3 {
            match self.enter(ram, first, software, external) {
                Ok(()) => return Ok(()),
                Err(Stop::Fault) => {}
                Err(_) => return Err(Stop::Shutdown),
            }
            if first.vector == DOUBLE_FAULT {
                return Err(Stop::Shutdown);
            }
            let was_fault = event == Event::Fault || !software && !external;
            let double = was_fault && makes_double(first.vector, self.fault.vector);
            first = if double { Fault { vector: DOUBLE_FAULT, error: Some(0) } } else { self.fault };
            software = false;
        }
        Err(Stop::Shutdown)
    }

    /// Goes through one gate. On an error nothing has changed but the stack's memory.
    fn enter(&mut self, ram: &mut [u8], event: Fault, software: bool, external: bool) -> Result<(), Stop> {
        let gate_error = (event.vector as u32) << 3 | 2 | external as u32;
        let at = event.vector as u64 * 16;
        if at + 15 > self.sys.idtr.limit as u64 {
            return self.general_protection(gate_error);
        }
        let base = self.sys.idtr.base.wrapping_add(at);
        let low: u64 = self.load_system(ram, base)?;
        let high: u64 = self.load_system(ram, base.wrapping_add(8))?;
        let kind = low >> 40 & 0x1f;
        if kind != 0xe && kind != 0xf || software && (low >> 45 & 3) < self.cpl() as u64 {
            return self.general_protection(gate_error);
        }
        if low >> 47 & 1 == 0 {
            return self.raise(11, Some(gate_error));
        }
        let target = low & 0xffff | low >> 32 & 0xffff_0000 | high << 32;
        let selector = (low >> 16) as u16;
        let (code, cpl) = self.gate_code(ram, selector, external)?;
        let ist = low >> 32 & 7;
        let stack = if ist != 0 {
            self.task_stack(ram, 0x24 + (ist - 1) * 8)?
        } else if cpl != self.cpl() {
            self.task_stack(ram, 4 + cpl as u64 * 8)?
        } else {
            self.regs[reg::RSP as usize]
        };
        if !is_canonical(target) {
            return self.general_protection(external as u32);
        }
        self.push_frame(ram, stack & !15, event)?;

        if cpl != self.cpl() {
            // A null SS with the new RPL (SDM 3A 6.14.2).
            self.sys.seg[seg::SS] =
                Segment { selector: cpl as u16, attr: (cpl as u16) << attr::DPL_SHIFT, ..Segment::default() };
        }
        self.sys.seg[seg::CS] = Segment { selector: selector & !3 | cpl as u16, ..code };
        self.set_cpl(cpl);
        let clear = bits::TF | bits::NT | bits::RF | bits::VM | if kind == 0xe { bits::IF } else { 0 };
        self.flags.update_rest(clear, 0);
        self.rip = target;
        self.shadow = false;
        Ok(())
    }

    /// The gate's code segment and the privilege level that the handler gets.
    fn gate_code(&mut self, ram: &mut [u8], selector: u16, external: bool) -> Result<(Segment, u8), Stop> {
        let ext = external as u32;
        let error = (selector & !3) as u32 | ext;
        if selector & !3 == 0 {
            return self.general_protection(ext);
        }
        let code = self.read_descriptor(ram, selector, error)?;
        let dpl = (code.attr >> attr::DPL_SHIFT & 3) as u8;
        let is_code = code.attr & (attr::CODE_OR_DATA | 8) == attr::CODE_OR_DATA | 8;
        if !is_code || dpl > self.cpl() || code.attr & (attr::LONG | attr::DEFAULT_32) != attr::LONG {
            return self.general_protection(error);
        }
        if code.attr & attr::PRESENT == 0 {
            return self.raise(11, Some(error));
        }
        let conforming = code.attr & 4 != 0;
        Ok((code, if conforming { self.cpl() } else { dpl }))
    }

    /// A stack pointer of the 64-bit TSS (SDM 3A 8.7).
    fn task_stack(&mut self, ram: &mut [u8], offset: u64) -> Result<u64, Stop> {
        if offset + 7 > self.sys.tr.limit as u64 {
            let error = (self.sys.tr.selector & !3) as u32;
            return self.raise(10, Some(error));
        }
        let stack = self.load_system(ram, self.sys.tr.base.wrapping_add(offset))?;
        if !is_canonical(stack) {
            return self.raise(12, Some(0));
        }
        Ok(stack)
    }

    fn push_frame(&mut self, ram: &mut [u8], top: u64, event: Fault) -> Result<(), Stop> {
        let ss = self.sys.seg[seg::SS].selector as u64;
        let cs = self.sys.seg[seg::CS].selector as u64;
        // Faults push RF=1, so that the handler's IRET passes an instruction breakpoint (SDM 3B 18.3.1.1).
        let fault = event.error.is_some() || matches!(event.vector, 0 | 5..=7 | 9 | 16 | 19);
        let rflags = self.flags.to_bits() | if fault { bits::RF } else { 0 };
        let frame = [ss, self.regs[reg::RSP as usize], rflags, cs, self.rip];
        let mut at = top;
        for v in frame.into_iter().chain(event.error.map(u64::from)) {
            at = at.wrapping_sub(8);
            self.store_system(ram, at, v)?;
        }
        self.regs[reg::RSP as usize] = at;
        Ok(())
    }

    /// Reads a segment descriptor of the GDT or LDT; `error` is what a fault says.
    pub(crate) fn read_descriptor(
        &mut self,
        ram: &mut [u8],
        selector: u16,
        error: u32,
    ) -> Result<Segment, Stop> {
        let (base, limit) = if selector & 4 != 0 {
            (self.sys.ldtr.base, self.sys.ldtr.limit)
        } else {
            (self.sys.gdtr.base, self.sys.gdtr.limit as u32)
        };
        let at = (selector & !7) as u64;
        if at + 7 > limit as u64 {
            return self.general_protection(error);
        }
        let d: u64 = self.load_system(ram, base.wrapping_add(at))?;
        Ok(unpack_descriptor(selector, d))
    }
}

/// The parts of an 8-byte segment descriptor (SDM 3A 3.4.5).
pub(crate) fn unpack_descriptor(selector: u16, d: u64) -> Segment {
    let limit = (d & 0xffff | d >> 32 & 0xf_0000) as u32;
    let granular = d >> 55 & 1 != 0;
    Segment {
        selector,
        attr: (d >> 40 & 0xf0ff) as u16,
        limit: if granular { limit << 12 | 0xfff } else { limit },
        base: d >> 16 & 0xff_ffff | d >> 32 & 0xff00_0000,
    }
}

/// SDM 3A, table 6-5: does a fault of `second` while delivering `first` make a double fault?
fn makes_double(first: u8, second: u8) -> bool {
    let contributory = |v| matches!(v, 0 | 10..=13);
    match first {
        PAGE_FAULT => second == PAGE_FAULT || contributory(second),
        v if contributory(v) => contributory(second),
        _ => false,
    }
}

impl Cpu {
    /// Before an instruction that runs alone: raises #DB for an instruction breakpoint, and says whether TF
    /// will trap after it.
    pub(crate) fn debug_before(&mut self) -> Result<bool, Stop> {
        Ok(self.flags.rest() & bits::TF != 0)
    }

    /// After an instruction that ran alone and retired: is a #DB trap due (then `Cpu::fault` says so)?
    pub(crate) fn debug_after(&mut self, traps: bool) -> bool {
        const SINGLE_STEP: u64 = 1 << 14;
        self.flags.update_rest(bits::RF, 0);
        if traps {
            self.sys.dr6 |= SINGLE_STEP;
            self.fault = Fault { vector: 1, error: None };
        }
        traps
    }
}
