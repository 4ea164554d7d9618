//! Delivery of faults, traps and interrupts through the IDT in 64-bit mode (SDM 3A, chapter 6).

use crate::exit::{Fault, Stop};
use crate::flags::bits;
use crate::paging::is_canonical;
use crate::segment::attr;
use crate::state::{Cpu, Segment, Shadow, reg, seg};

/// What is delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// `Cpu::fault`: a fault, or a debug trap.
    Exception,
    /// An external interrupt.
    Interrupt(u8),
}

/// Who goes through a gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// An exception or an external interrupt: error codes of delivery have EXT set.
    Outside,
    /// INT n or INT3: the gate's DPL is checked.
    Software,
}

const DEBUG: u8 = 1;
const DOUBLE_FAULT: u8 = 8;
const INVALID_TSS: u8 = 10;
const NOT_PRESENT: u8 = 11;
const STACK_FAULT: u8 = 12;

/// How an event and a fault during its delivery combine (SDM 3A, tables 6-4 and 6-5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

impl Class {
    fn of(vector: u8) -> Class {
        match vector {
            0 | 10..=13 => Class::Contributory,
            14 => Class::PageFault,
            DOUBLE_FAULT => Class::DoubleFault,
            _ => Class::Benign,
        }
    }

    /// A fault of `second` while delivering `self` makes a double fault.
    fn doubles(self, second: Class) -> bool {
        match self {
            Class::PageFault => second != Class::Benign,
            Class::Contributory => second == Class::Contributory,
            _ => false,
        }
    }
}

impl Cpu {
    /// Delivers an event: pushes the frame and goes to the handler, through double fault to `Err` (triple
    /// fault) when that fails. `Cpu::rip` is what the frame will say. Descriptor tables and stacks outside RAM
    /// count as a triple fault, too.
    pub(crate) fn deliver(&mut self, ram: &mut [u8], event: Event) -> Result<(), Stop> {
        let (mut next, mut class) = match event {
            Event::Exception => (self.fault, Class::of(self.fault.vector)),
            Event::Interrupt(vector) => (Fault { vector, error: None }, Class::Benign),
        };
        loop {
            match self.enter(ram, next, Source::Outside) {
                Ok(()) => break,
                Err(Stop::Fault) => {}
                Err(_) => return Err(Stop::Shutdown),
            }
            let second = Class::of(self.fault.vector);
            (next, class) = match class {
                Class::DoubleFault => return Err(Stop::Shutdown),
                _ if class.doubles(second) => {
                    (Fault { vector: DOUBLE_FAULT, error: Some(0) }, Class::DoubleFault)
                }
                _ => (self.fault, second),
            };
        }
        if event == Event::Exception && next.vector == DEBUG {
            self.sys.dr7 &= !crate::debug::GENERAL_DETECT;
        }
        Ok(())
    }

    /// Goes through one gate. On an error nothing has changed but the stack's memory.
    pub(crate) fn enter(&mut self, ram: &mut [u8], event: Fault, source: Source) -> Result<(), Stop> {
        let ext = (source == Source::Outside) as u32;
        let gate_error = (event.vector as u32) << 3 | 2 | ext;
        let at = event.vector as u64 * 16;
        if at + 15 > self.sys.idtr.limit as u64 {
            return self.general_protection(gate_error);
        }
        let base = self.sys.idtr.base.wrapping_add(at);
        let low: u64 = self.load_system(ram, base)?;
        let high: u64 = self.load_system(ram, base.wrapping_add(8))?;
        let kind = low >> 40 & 0x1f;
        let forbidden = source == Source::Software && (low >> 45 & 3) < self.cpl() as u64;
        if kind != 0xe && kind != 0xf || forbidden {
            return self.general_protection(gate_error);
        }
        if low >> 47 & 1 == 0 {
            return self.raise(NOT_PRESENT, Some(gate_error));
        }
        let target = low & 0xffff | low >> 32 & 0xffff_0000 | high << 32;
        let (code, cpl) = self.gate_code(ram, (low >> 16) as u16, ext)?;
        let ist = low >> 32 & 7;
        let stack = if ist != 0 {
            self.task_stack(ram, 0x24 + (ist - 1) * 8, ext)?
        } else if cpl != self.cpl() {
            self.task_stack(ram, 4 + cpl as u64 * 8, ext)?
        } else {
            self.regs[reg::RSP as usize]
        };
        if !is_canonical(target) {
            return self.general_protection(ext);
        }
        self.push_frame(ram, stack & !15, event, ext)?;

        if cpl != self.cpl() {
            // A null SS with the new RPL (SDM 3A 6.14.2).
            self.sys.seg[seg::SS] =
                Segment { selector: cpl as u16, attr: (cpl as u16) << attr::DPL_SHIFT, ..Segment::default() };
        }
        self.sys.seg[seg::CS] = Segment { selector: code.selector & !3 | cpl as u16, ..code };
        self.set_cpl(cpl);
        let clear = bits::TF | bits::NT | bits::RF | bits::VM | if kind == 0xe { bits::IF } else { 0 };
        self.flags.update_rest(clear, 0);
        self.rip = target;
        self.shadow = Shadow::None;
        Ok(())
    }

    /// The gate's code segment and the privilege level that the handler gets.
    fn gate_code(&mut self, ram: &mut [u8], selector: u16, ext: u32) -> Result<(Segment, u8), Stop> {
        let error = (selector & !3) as u32 | ext;
        if selector & !3 == 0 {
            return self.general_protection(ext);
        }
        let mut code = self.read_descriptor(ram, selector, error)?;
        if !code.is_code() || code.dpl() > self.cpl() || !code.is_64_bit() {
            return self.general_protection(error);
        }
        if code.attr & attr::PRESENT == 0 {
            return self.raise(NOT_PRESENT, Some(error));
        }
        self.mark_accessed(ram, &mut code)?;
        let cpl = if code.is_conforming() { self.cpl() } else { code.dpl() };
        Ok((code, cpl))
    }

    /// A stack pointer of the 64-bit TSS (SDM 3A 8.7).
    fn task_stack(&mut self, ram: &mut [u8], offset: u64, ext: u32) -> Result<u64, Stop> {
        if offset + 7 > self.sys.tr.limit as u64 {
            let error = (self.sys.tr.selector & !3) as u32 | ext;
            return self.raise(INVALID_TSS, Some(error));
        }
        self.load_system(ram, self.sys.tr.base.wrapping_add(offset))
    }

    fn push_frame(&mut self, ram: &mut [u8], top: u64, event: Fault, ext: u32) -> Result<(), Stop> {
        let ss = self.sys.seg[seg::SS].selector as u64;
        let cs = self.sys.seg[seg::CS].selector as u64;
        // Faults push RF=1, so that the handler's IRET passes an instruction breakpoint (SDM 3B 18.3.1.1).
        let fault = event.error.is_some() || matches!(event.vector, 0 | 5..=7 | 9 | 16 | 19);
        let rflags = self.flags.to_bits() | if fault { bits::RF } else { 0 };
        let frame = [ss, self.regs[reg::RSP as usize], rflags, cs, self.rip];
        let mut at = top;
        for v in frame.into_iter().chain(event.error.map(u64::from)) {
            at = at.wrapping_sub(8);
            if !is_canonical(at) {
                return self.raise(STACK_FAULT, Some(ext));
            }
            self.store_system(ram, at, v)?;
        }
        self.regs[reg::RSP as usize] = at;
        Ok(())
    }
}
