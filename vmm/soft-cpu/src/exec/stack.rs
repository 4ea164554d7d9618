//! PUSH, POP, PUSHF, POPF, ENTER, LEAVE (SDM 2); for segment registers see [`super::segment`].

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::operand::{Dst, Imm, Mem, Quick, SourceOperand, is_memory, log_size};
use crate::exit::CpuStop;
use crate::flags::bits;
use crate::insn::{Handler, Insn, PlaceInBlock, quick, threaded};
use crate::int::Int;
use crate::state::{Cpu, reg};

const RSP: usize = reg::RSP as usize;
const RBP: usize = reg::RBP as usize;

/// How a handler accesses the stack.
pub(super) trait Stack {
    fn load<T: Int>(cpu: &mut Cpu, ram: &mut [u8], at: u64) -> Result<T, CpuStop>;
    fn store<T: Int>(cpu: &mut Cpu, ram: &mut [u8], at: u64, value: T) -> Result<(), CpuStop>;

    /// Pushes a value; RSP moves when the store has succeeded.
    #[inline(always)]
    fn push<T: Int>(cpu: &mut Cpu, ram: &mut [u8], value: T) -> Result<(), CpuStop> {
        let at = cpu.regs[RSP].wrapping_sub(T::SIZE as u64);
        Self::store(cpu, ram, at, value)?;
        cpu.regs[RSP] = at;
        Ok(())
    }
}

/// Access to the stack in exact handlers.
pub(super) struct ExactStack;
impl Stack for ExactStack {
    fn load<T: Int>(cpu: &mut Cpu, ram: &mut [u8], at: u64) -> Result<T, CpuStop> {
        cpu.load_stack(ram, at)
    }
    fn store<T: Int>(cpu: &mut Cpu, ram: &mut [u8], at: u64, value: T) -> Result<(), CpuStop> {
        cpu.store_stack(ram, at, value)
    }
}

/// Access to the stack in quick handlers.
impl Stack for Quick {
    #[inline(always)]
    fn load<T: Int>(cpu: &mut Cpu, ram: &mut [u8], at: u64) -> Result<T, CpuStop> {
        cpu.load_quick(ram, at).ok_or(CpuStop::Slow)
    }
    #[inline(always)]
    fn store<T: Int>(cpu: &mut Cpu, ram: &mut [u8], at: u64, value: T) -> Result<(), CpuStop> {
        cpu.store_quick(ram, at, value).ok_or(CpuStop::Slow)
    }
}

impl Cpu {
    /// Pushes a value; RSP moves when the store has succeeded.
    #[inline(always)]
    pub(super) fn push<T: Int>(&mut self, ram: &mut [u8], value: T) -> Result<(), CpuStop> {
        ExactStack::push(self, ram, value)
    }

    /// Reads from the stack at address `at`.
    #[inline(always)]
    pub(super) fn load_stack<T: Int>(&mut self, ram: &mut [u8], at: u64) -> Result<T, CpuStop> {
        match self.load(ram, at) {
            Ok(v) => Ok(v),
            Err(stop) => Err(self.stack_fault(stop)),
        }
    }

    /// Writes to the stack at address `at`.
    #[inline(always)]
    fn store_stack<T: Int>(&mut self, ram: &mut [u8], at: u64, value: T) -> Result<(), CpuStop> {
        match self.store(ram, at, value) {
            Ok(()) => Ok(()),
            Err(stop) => Err(self.stack_fault(stop)),
        }
    }
}

fn push<K: Stack, S: SourceOperand, T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let v = S::load::<T>(cpu, ram, i)?;
    K::push(cpu, ram, v)
}

fn pop_reg<K: Stack, T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let at = cpu.regs[RSP];
    let v = K::load::<T>(cpu, ram, at)?;
    cpu.regs[RSP] = at.wrapping_add(T::SIZE as u64);
    cpu.set_reg(i.dst, v);
    Ok(())
}

/// A destination address that uses RSP uses its new value.
fn pop_mem<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let at = cpu.regs[RSP];
    let v = cpu.load_stack::<T>(ram, at)?;
    cpu.regs[RSP] = at.wrapping_add(T::SIZE as u64);
    let stored = cpu.store_operand(ram, i, v);
    if stored.is_err() {
        cpu.regs[RSP] = at;
    }
    stored
}

fn pushf<T: Int>(cpu: &mut Cpu, ram: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    let v = cpu.flags.to_bits() & !(bits::VM | bits::RF);
    cpu.push(ram, T::from_u64(v))
}

/// IOPL changes only at CPL 0, IF only at CPL <= IOPL; otherwise they silently stay. RF is cleared; VM, VIF
/// and VIP stay. The 16-bit form leaves the upper flags unchanged.
fn popf<T: Int>(cpu: &mut Cpu, ram: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    use bits::*;
    let at = cpu.regs[RSP];
    let v = cpu.load_stack::<T>(ram, at)?.to_u64();
    cpu.regs[RSP] = at.wrapping_add(T::SIZE as u64);
    let (cpl, iopl) = (cpu.cpl() as u64, (cpu.flags.non_status() & IOPL) >> 12);
    let mut changes = TF | DF | NT | AC | ID;
    if cpl == 0 {
        changes |= IOPL;
    }
    if cpl <= iopl {
        changes |= IF;
    }
    if T::BITS == 16 {
        changes &= 0xffff;
    }
    cpu.flags.update_non_status(changes | RF, v & changes);
    cpu.flags.set_status(v);
    Ok(())
}

/// ENTER: `src` has the nesting level, 0 to 31, the immediate the size of the locals in bytes.
fn enter<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let (old_rsp, old_rbp) = (cpu.regs[RSP], cpu.regs[RBP]);
    let entered = enter_frame::<T>(cpu, ram, i);
    if entered.is_err() {
        cpu.regs[RSP] = old_rsp;
        cpu.regs[RBP] = old_rbp;
    }
    entered
}

fn enter_frame<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let rbp = cpu.regs[RBP];
    cpu.push(ram, T::from_u64(rbp))?;
    let frame = cpu.regs[RSP];
    if i.src > 0 {
        for n in 1..i.src as u64 {
            let display = rbp.wrapping_sub(n * T::SIZE as u64);
            let v = cpu.load_stack::<T>(ram, display)?;
            cpu.push(ram, v)?;
        }
        cpu.push(ram, T::from_u64(frame))?;
    }
    let rsp = cpu.regs[RSP].wrapping_sub(i.imm & 0xffff);
    // The new top of the stack must be writable (SDM 2, ENTER: #PF).
    let top = cpu.check_alignment(rsp, T::SIZE).and_then(|()| cpu.probe_write(ram, rsp, 1));
    if let Err(stop) = top {
        return Err(cpu.stack_fault(stop));
    }
    cpu.regs[RSP] = rsp;
    cpu.set_reg(reg::RBP, T::from_u64(frame));
    Ok(())
}

fn leave<K: Stack, T: Int>(cpu: &mut Cpu, ram: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
    let frame = cpu.regs[RBP];
    let v = K::load::<T>(cpu, ram, frame)?;
    cpu.regs[RSP] = frame.wrapping_add(T::SIZE as u64);
    cpu.set_reg(reg::RBP, v);
    Ok(())
}

fn select_push(ins: &Instruction) -> Option<Handler> {
    let wide = ins.stack_pointer_increment() == -8;
    Some(match ins.op0_kind() {
        OpKind::Register if ins.op0_register().is_gpr() => {
            if wide {
                quick!(push::<Quick, Dst, u64>, push::<ExactStack, Dst, u64>)
            } else {
                quick!(push::<Quick, Dst, u16>, push::<ExactStack, Dst, u16>)
            }
        }
        OpKind::Register => return None,
        OpKind::Memory => {
            if wide {
                quick!(push::<Quick, Quick, u64>, push::<ExactStack, Mem, u64>)
            } else {
                quick!(push::<Quick, Quick, u16>, push::<ExactStack, Mem, u16>)
            }
        }
        _ => {
            if wide {
                quick!(push::<Quick, Imm, u64>, push::<ExactStack, Imm, u64>)
            } else {
                quick!(push::<Quick, Imm, u16>, push::<ExactStack, Imm, u16>)
            }
        }
    })
}

fn select_pop(ins: &Instruction) -> Option<Handler> {
    let wide = log_size(ins, 0) == 3;
    Some(match (is_memory(ins, 0), wide) {
        (true, true) => threaded!(pop_mem::<u64>),
        (true, false) => threaded!(pop_mem::<u16>),
        _ if !ins.op0_register().is_gpr() => return None,
        (false, true) => quick!(pop_reg::<Quick, u64>, pop_reg::<ExactStack, u64>),
        (false, false) => quick!(pop_reg::<Quick, u16>, pop_reg::<ExactStack, u16>),
    })
}

/// Handlers of this family.
pub fn select(ins: &Instruction, insn: &mut Insn) -> Option<PlaceInBlock> {
    insn.exec = match ins.mnemonic() {
        Mnemonic::Push => select_push(ins)?,
        Mnemonic::Pop => select_pop(ins)?,
        Mnemonic::Pushf => threaded!(pushf::<u16>),
        Mnemonic::Pushfq => threaded!(pushf::<u64>),
        // TF and IF take effect on the next instruction.
        Mnemonic::Popf => {
            insn.exec = threaded!(popf::<u16>);
            return Some(PlaceInBlock::Last);
        }
        Mnemonic::Popfq => {
            insn.exec = threaded!(popf::<u64>);
            return Some(PlaceInBlock::Last);
        }
        Mnemonic::Enter => {
            insn.imm = ins.immediate16() as u64;
            insn.src = ins.immediate8_2nd() & 31;
            if ins.code() == Code::Enterq_imm16_imm8 {
                threaded!(enter::<u64>)
            } else {
                threaded!(enter::<u16>)
            }
        }
        Mnemonic::Leave => {
            if ins.code() == Code::Leaveq {
                quick!(leave::<Quick, u64>, leave::<ExactStack, u64>)
            } else {
                quick!(leave::<Quick, u16>, leave::<ExactStack, u16>)
            }
        }
        _ => return None,
    };
    Some(PlaceInBlock::Middle)
}
