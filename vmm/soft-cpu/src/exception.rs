//! Delivery of faults, traps and interrupts through the IDT in 64-bit mode (SDM 3A, chapter 6).

use crate::exit::{CpuStop, Exception};
use crate::flags::bits;
use crate::paging::is_canonical;
use crate::segment::attr;
use crate::state::{Cpu, Segment, Shadow, reg, seg};

/// An event that is to be delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PendingEvent {
    /// The exception in `Cpu::exception`: a fault, or a debug trap.
    Exception,
    /// An external interrupt.
    Interrupt(u8),
}

/// What caused the transfer through an interrupt gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum InterruptSource {
    /// An exception or an external interrupt: faults during delivery set EXT in their error codes.
    Outside,
    /// INT n or INT3: the gate's DPL is checked.
    Software,
}

const DEBUG: u8 = 1;
const DOUBLE_FAULT: u8 = 8;
const INVALID_TSS: u8 = 10;
const NOT_PRESENT: u8 = 11;
const STACK_FAULT: u8 = 12;

/// Classes of exceptions: they decide whether a fault during delivery makes a double fault (SDM 3A, tables
/// 6-4 and 6-5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ExceptionClass {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

impl ExceptionClass {
    fn of(vector: u8) -> ExceptionClass {
        match vector {
            0 | 10..=13 => ExceptionClass::Contributory,
            14 => ExceptionClass::PageFault,
            DOUBLE_FAULT => ExceptionClass::DoubleFault,
            _ => ExceptionClass::Benign,
        }
    }

    /// Does a fault of class `second`, during delivery of one of this class, make a double fault?
    fn doubles(self, second: ExceptionClass) -> bool {
        match self {
            ExceptionClass::PageFault => second != ExceptionClass::Benign,
            ExceptionClass::Contributory => second == ExceptionClass::Contributory,
            _ => false,
        }
    }
}

impl Cpu {
    /// Delivers an event: pushes the frame, whose RIP is `Cpu::rip`, and goes to the handler. If that faults
    /// it delivers that fault, or a double fault.
    ///
    /// # Errors
    /// [`CpuStop::Shutdown`] for a triple fault, and for descriptor tables or stacks outside RAM.
    pub(crate) fn deliver(&mut self, ram: &mut [u8], event: PendingEvent) -> Result<(), CpuStop> {
        let (mut next, mut class) = match event {
            PendingEvent::Exception => (self.exception, ExceptionClass::of(self.exception.vector)),
            PendingEvent::Interrupt(vector) => (Exception { vector, error: None }, ExceptionClass::Benign),
        };
        loop {
            match self.enter(ram, next, InterruptSource::Outside) {
                Ok(()) => break,
                Err(CpuStop::Fault) => {}
                Err(_) => return Err(CpuStop::Shutdown),
            }
            let second = ExceptionClass::of(self.exception.vector);
            (next, class) = match class {
                ExceptionClass::DoubleFault => return Err(CpuStop::Shutdown),
                _ if class.doubles(second) => {
                    (Exception { vector: DOUBLE_FAULT, error: Some(0) }, ExceptionClass::DoubleFault)
                }
                _ => (self.exception, second),
            };
        }
        if event == PendingEvent::Exception && next.vector == DEBUG {
            self.sys.dr7 &= !crate::debug::GENERAL_DETECT;
        }
        Ok(())
    }

    /// Transfers control through one gate. On an error nothing has changed except memory of the stack.
    pub(crate) fn enter(
        &mut self,
        ram: &mut [u8],
        event: Exception,
        source: InterruptSource,
    ) -> Result<(), CpuStop> {
        let ext = (source == InterruptSource::Outside) as u32;
        let gate_error = (event.vector as u32) << 3 | 2 | ext;
        let at = event.vector as u64 * 16;
        if at + 15 > self.sys.idtr.limit as u64 {
            return self.general_protection(gate_error);
        }
        let base = self.sys.idtr.base.wrapping_add(at);
        let low: u64 = self.load_system(ram, base)?;
        let high: u64 = self.load_system(ram, base.wrapping_add(8))?;
        let kind = low >> 40 & 0x1f;
        let forbidden = source == InterruptSource::Software && (low >> 45 & 3) < self.cpl() as u64;
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
        self.flags.update_non_status(clear, 0);
        self.rip = target;
        self.shadow = Shadow::None;
        Ok(())
    }

    /// The gate's code segment, and the privilege level that the handler runs at.
    fn gate_code(&mut self, ram: &mut [u8], selector: u16, ext: u32) -> Result<(Segment, u8), CpuStop> {
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
    fn task_stack(&mut self, ram: &mut [u8], offset: u64, ext: u32) -> Result<u64, CpuStop> {
        if offset + 7 > self.sys.tr.limit as u64 {
            let error = (self.sys.tr.selector & !3) as u32 | ext;
            return self.raise(INVALID_TSS, Some(error));
        }
        self.load_system(ram, self.sys.tr.base.wrapping_add(offset))
    }

    fn push_frame(&mut self, ram: &mut [u8], top: u64, event: Exception, ext: u32) -> Result<(), CpuStop> {
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
