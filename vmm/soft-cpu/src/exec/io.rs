//! IN, OUT, INS, OUTS.

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::exit::{CpuExit, CpuStop};
use crate::flags::bits;
use crate::insn::{Handler, Insn, PlaceInBlock, flag, threaded};
use crate::int::Int;
use crate::state::{Cpu, reg};

/// Where the 64-bit TSS has the offset of its I/O permission bitmap.
const BITMAP_OFFSET: u64 = 0x66;

impl Cpu {
    /// #GP(0) unless IOPL or the TSS' bitmap allows `size` ports from `port` on (SDM 1, 19.5.2).
    fn may_use_ports(&mut self, ram: &mut [u8], port: u16, size: u8) -> Result<(), CpuStop> {
        if !self.io_privileged() {
            let (base, limit) = (self.sys.tr.base, self.sys.tr.limit as u64);
            if BITMAP_OFFSET + 1 > limit {
                return self.general_protection(0);
            }
            let bitmap: u16 = self.load_system(ram, base.wrapping_add(BITMAP_OFFSET))?;
            let at = bitmap as u64 + port as u64 / 8;
            // The CPU always looks at two bytes.
            if at + 1 > limit {
                return self.general_protection(0);
            }
            let denied: u16 = self.load_system(ram, base.wrapping_add(at))?;
            if denied >> (port % 8) & ((1 << size) - 1) != 0 {
                return self.general_protection(0);
            }
        }
        Ok(())
    }

    /// Checks the permission and notes port breakpoints.
    fn check_ports(&mut self, ram: &mut [u8], port: u16, size: u8) -> Result<(), CpuStop> {
        self.may_use_ports(ram, port, size)?;
        self.note_port_breakpoints(port, size);
        Ok(())
    }

    fn port_in<T: Int>(&mut self, ram: &mut [u8], port: u16) -> Result<T, CpuStop> {
        self.check_ports(ram, port, T::SIZE as u8)?;
        Ok(T::from_u64(self.ask(CpuExit::PioIn { port, size: T::SIZE as u8 })?))
    }

    fn port_out<T: Int>(&mut self, ram: &mut [u8], port: u16, v: T) -> Result<(), CpuStop> {
        self.check_ports(ram, port, T::SIZE as u8)?;
        self.ask(CpuExit::PioOut { port, size: T::SIZE as u8, value: v.to_u64() as u32 })?;
        Ok(())
    }

    fn port(&self, i: &Insn, in_dx: bool) -> u16 {
        if in_dx { self.reg(reg::RDX) } else { i.imm as u8 as u16 }
    }
}

fn input<T: Int, const DX: bool>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let port = cpu.port(i, DX);
    let v: T = cpu.port_in(ram, port)?;
    cpu.set_reg(reg::RAX, v);
    Ok(())
}

fn output<T: Int, const DX: bool>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let port = cpu.port(i, DX);
    let v = cpu.reg::<T>(reg::RAX);
    cpu.port_out(ram, port, v)
}

/// Runs one iteration of INS or OUTS, and moves RSI or RDI (`pointer`) by one element. With REP the
/// instruction then runs again for the next iteration, as every iteration leaves the CPU anyway. The port's
/// permission is checked before anything else, even before the count.
fn iterate<T: Int>(
    cpu: &mut Cpu,
    ram: &mut [u8],
    i: &Insn,
    pointer: u8,
    element: impl FnOnce(&mut Cpu, &mut [u8], u64) -> Result<(), CpuStop>,
) -> Result<(), CpuStop> {
    let port = cpu.reg(reg::RDX);
    cpu.may_use_ports(ram, port, T::SIZE as u8)?;
    let mask = if i.flags & flag::ADDR32 != 0 { u32::MAX as u64 } else { u64::MAX };
    let repeated = i.flags & (flag::REP | flag::REPNE) != 0;
    let count = cpu.regs[reg::RCX as usize] & mask;
    if repeated && count == 0 {
        return Ok(());
    }
    let at = cpu.regs[pointer as usize] & mask;
    element(cpu, ram, at)?;
    let size = T::SIZE as u64;
    let next =
        if cpu.flags.non_status() & bits::DF != 0 { at.wrapping_sub(size) } else { at.wrapping_add(size) };
    cpu.regs[pointer as usize] = next & mask;
    if !repeated {
        return Ok(());
    }
    cpu.regs[reg::RCX as usize] = count - 1;
    if count == 1 {
        return Ok(());
    }
    cpu.retired += 1;
    Err(CpuStop::RepSuspended)
}

fn ins<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    iterate::<T>(cpu, ram, i, reg::RDI, |cpu, ram, at| {
        // The device must not be read if the store would fault: reading may change its state.
        cpu.probe_write(ram, at, T::SIZE)?;
        let port = cpu.reg(reg::RDX);
        let v: T = cpu.port_in(ram, port)?;
        cpu.store(ram, at, v)
    })
}

fn outs<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    let base = cpu.regs[i.seg as usize];
    iterate::<T>(cpu, ram, i, reg::RSI, |cpu, ram, at| {
        let port = cpu.reg(reg::RDX);
        let v: T = cpu.load(ram, base.wrapping_add(at))?;
        cpu.port_out(ram, port, v)
    })
}

/// Handlers of this family.
pub fn select(ins_: &Instruction, insn: &mut Insn) -> Option<PlaceInBlock> {
    macro_rules! widths {
        ($width:expr, $f:ident $(, $dx:literal)?) => {
            match $width {
                1 => threaded!($f::<u8 $(, $dx)?>) as Handler,
                2 => threaded!($f::<u16 $(, $dx)?>),
                _ => threaded!($f::<u32 $(, $dx)?>),
            }
        };
    }
    let register = |n| ins_.op_kind(n) == OpKind::Register;
    insn.exec = match ins_.mnemonic() {
        Mnemonic::In if register(1) => widths!(ins_.op0_register().size(), input, true),
        Mnemonic::In => widths!(ins_.op0_register().size(), input, false),
        Mnemonic::Out if register(0) => widths!(ins_.op1_register().size(), output, true),
        Mnemonic::Out => widths!(ins_.op1_register().size(), output, false),
        Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => widths!(ins_.memory_size().size(), ins),
        Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd => widths!(ins_.memory_size().size(), outs),
        _ => return None,
    };
    Some(PlaceInBlock::Alone)
}
