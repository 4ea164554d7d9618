//! MOVS, CMPS, SCAS, STOS, LODS, with REP, REPE and REPNE.
//!
//! Each iteration of a repeated instruction retires as one instruction, and its registers are committed
//! before the next begins, so that it may be stopped in between. Many iterations of MOVS and STOS are done at
//! once where the fast TLB allows the accesses; the result is the same as with single iterations.

use iced_x86::{Instruction, Mnemonic};

use super::alu;
use super::operand::widths;
use crate::exit::CpuStop;
use crate::flags::bits;
use crate::insn::{Handler, Insn, PlaceInBlock, flag};
use crate::int::Int;
use crate::paging::Access;
use crate::state::{Cpu, reg};

/// Iterations after which a repeated instruction returns to the run loop, so that a stop requested by another
/// thread is seen soon.
const ITERATIONS_MAX: u64 = 1 << 20;
const PAGE: usize = 4096;

/// A string instruction. `T` is the type of elements, `A` (u32 or u64) the width of addresses and count.
trait StringOp {
    /// Whether REPE and REPNE check ZF.
    const COMPARES: bool = false;
    /// Registers that are truncated to 32 bits by 32-bit addresses even if there is no iteration, or the
    /// first one faults. The SDM leaves this open; this is what current Intel processors do.
    const ALWAYS_TRUNCATED: &[u8] = &[reg::RCX];
    /// Does one iteration, except for the count. On an error nothing has changed.
    fn once<T: Int, A: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop>;
    /// Does as many iterations, up to `max`, as can be done at once, and returns how many: maybe none.
    #[inline(always)]
    fn many<T: Int>(_: &mut Cpu, _: &mut [u8], _: &Insn, _max: u64) -> u64 {
        0
    }
}

struct Movs;
struct Cmps;
struct Scas;
struct Stos;
struct Lods;

fn backward(cpu: &Cpu) -> bool {
    cpu.flags.non_status() & bits::DF != 0
}

/// Linear address of the source: RSI, with the segment's base.
#[inline(always)]
fn source<A: Int>(cpu: &Cpu, i: &Insn) -> u64 {
    cpu.reg::<A>(reg::RSI).to_u64().wrapping_add(cpu.reg(i.seg))
}

/// Linear address of the destination: RDI, in ES, whose base is 0.
#[inline(always)]
fn destination<A: Int>(cpu: &Cpu) -> u64 {
    cpu.reg::<A>(reg::RDI).to_u64()
}

/// Moves RSI or RDI by `n` elements.
#[inline(always)]
fn advance<T: Int, A: Int>(cpu: &mut Cpu, r: u8, n: u64) {
    let bytes = n * T::SIZE as u64;
    let delta = if backward(cpu) { bytes.wrapping_neg() } else { bytes };
    let v = cpu.reg::<A>(r).to_u64().wrapping_add(delta);
    cpu.set_reg(r, A::from_u64(v));
}

/// Number of elements from the one at `addr` to the end of its page (if backward, to its start), without one
/// that crosses.
fn elements_in_page<T: Int>(addr: u64, backward: bool) -> usize {
    let within = addr as usize % PAGE;
    match backward {
        false => (PAGE - within) / T::SIZE,
        true if within + T::SIZE <= PAGE => within / T::SIZE + 1,
        true => 0,
    }
}

/// The range in RAM of the `n` elements that begin with the one at offset `at`.
fn span<T: Int>(at: usize, n: usize, backward: bool) -> std::ops::Range<usize> {
    let start = if backward { at - (n - 1) * T::SIZE } else { at };
    start..start + n * T::SIZE
}

impl StringOp for Movs {
    const ALWAYS_TRUNCATED: &[u8] = &[reg::RCX, reg::RSI, reg::RDI];

    #[inline(always)]
    fn once<T: Int, A: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
        let v = cpu.load::<T>(ram, source::<A>(cpu, i))?;
        cpu.store(ram, destination::<A>(cpu), v)?;
        advance::<T, A>(cpu, reg::RSI, 1);
        advance::<T, A>(cpu, reg::RDI, 1);
        Ok(())
    }

    fn many<T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn, max: u64) -> u64 {
        let (from, to) = (source::<u64>(cpu, i), destination::<u64>(cpu));
        let (Some(s), Some(d)) = (cpu.run_offset(from, Access::Read), cpu.run_offset(to, Access::Write))
        else {
            return 0;
        };
        let back = backward(cpu);
        let fit = elements_in_page::<T>(from, back).min(elements_in_page::<T>(to, back));
        let mut n = max.min(fit as u64) as usize;
        // If the destination is ahead of the source, later iterations read what earlier ones write: do no
        // more at once than fit between the two.
        let gap = if back { s.wrapping_sub(d) } else { d.wrapping_sub(s) };
        if gap != 0 {
            n = n.min(gap / T::SIZE);
        }
        if n == 0 {
            return 0;
        }
        let (s, d) = (span::<T>(s, n, back), span::<T>(d, n, back));
        if s.end.max(d.end) > ram.len() {
            return 0;
        }
        ram.copy_within(s, d.start);
        advance::<T, u64>(cpu, reg::RSI, n as u64);
        advance::<T, u64>(cpu, reg::RDI, n as u64);
        n as u64
    }
}

impl StringOp for Stos {
    const ALWAYS_TRUNCATED: &[u8] = &[reg::RCX, reg::RDI];

    #[inline(always)]
    fn once<T: Int, A: Int>(cpu: &mut Cpu, ram: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
        let v = cpu.reg::<T>(reg::RAX);
        cpu.store(ram, destination::<A>(cpu), v)?;
        advance::<T, A>(cpu, reg::RDI, 1);
        Ok(())
    }

    fn many<T: Int>(cpu: &mut Cpu, ram: &mut [u8], _: &Insn, max: u64) -> u64 {
        let to = destination::<u64>(cpu);
        let Some(d) = cpu.run_offset(to, Access::Write) else { return 0 };
        let back = backward(cpu);
        let n = max.min(elements_in_page::<T>(to, back) as u64) as usize;
        if n == 0 {
            return 0;
        }
        let Some(bytes) = ram.get_mut(span::<T>(d, n, back)) else { return 0 };
        let v = cpu.reg::<T>(reg::RAX);
        for element in bytes.chunks_exact_mut(T::SIZE) {
            v.write(element);
        }
        advance::<T, u64>(cpu, reg::RDI, n as u64);
        n as u64
    }
}

impl StringOp for Lods {
    #[inline(always)]
    fn once<T: Int, A: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
        let v = cpu.load::<T>(ram, source::<A>(cpu, i))?;
        cpu.set_reg(reg::RAX, v);
        advance::<T, A>(cpu, reg::RSI, 1);
        Ok(())
    }
}

impl StringOp for Cmps {
    const COMPARES: bool = true;
    #[inline(always)]
    fn once<T: Int, A: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
        // If both fault, Intel's processors report the destination.
        let b = cpu.load::<T>(ram, destination::<A>(cpu))?;
        let a = cpu.load::<T>(ram, source::<A>(cpu, i))?;
        alu::sub(&mut cpu.flags, a, b);
        advance::<T, A>(cpu, reg::RSI, 1);
        advance::<T, A>(cpu, reg::RDI, 1);
        Ok(())
    }
}

impl StringOp for Scas {
    const COMPARES: bool = true;
    #[inline(always)]
    fn once<T: Int, A: Int>(cpu: &mut Cpu, ram: &mut [u8], _: &Insn) -> Result<(), CpuStop> {
        let b = cpu.load::<T>(ram, destination::<A>(cpu))?;
        let a = cpu.reg::<T>(reg::RAX);
        alu::sub(&mut cpu.flags, a, b);
        advance::<T, A>(cpu, reg::RDI, 1);
        Ok(())
    }
}

fn once<O: StringOp, A: Int, T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    O::once::<T, A>(cpu, ram, i)
}

fn repeat<O: StringOp, A: Int, T: Int>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    if A::BITS == 32 {
        for &r in O::ALWAYS_TRUNCATED {
            cpu.set_reg(r, cpu.reg::<A>(r));
        }
    }
    let count = cpu.reg::<A>(reg::RCX).to_u64();
    if count == 0 {
        return Ok(());
    }
    let max = cpu.rep_budget.min(ITERATIONS_MAX).min(count);
    let go_on_if_zero = i.flags & flag::REP != 0;
    let mut done = 0;
    loop {
        // 32-bit addresses may wrap in the middle of a page.
        let mut n = if A::BITS == 64 { O::many::<T>(cpu, ram, i, max - done) } else { 0 };
        if n == 0 {
            if let Err(stop) = O::once::<T, A>(cpu, ram, i) {
                cpu.retired += done;
                return Err(stop);
            }
            n = 1;
        }
        done += n;
        cpu.set_reg(reg::RCX, A::from_u64(count - done));
        if done == count || O::COMPARES && cpu.flags.zf() != go_on_if_zero {
            // The run loop counts the last iteration.
            cpu.retired += done - 1;
            return Ok(());
        }
        if done == max {
            cpu.retired += done;
            return Err(CpuStop::RepSuspended);
        }
    }
}

fn form<O: StringOp>(ins: &Instruction, insn: &mut Insn) -> (Handler, PlaceInBlock) {
    let repeated = insn.flags & (flag::REP | flag::REPNE) != 0;
    let table = match (repeated, insn.flags & flag::ADDR32 != 0) {
        (false, false) => widths!(once, O, u64),
        (false, true) => widths!(once, O, u32),
        (true, false) => widths!(repeat, O, u64),
        (true, true) => widths!(repeat, O, u32),
    };
    let handler = table[ins.memory_size().size().trailing_zeros() as usize];
    (handler, if repeated { PlaceInBlock::Alone } else { PlaceInBlock::Middle })
}

/// Handlers of this family.
pub fn select(ins: &Instruction, insn: &mut Insn) -> Option<PlaceInBlock> {
    use Mnemonic::*;
    // MOVSD and CMPSD are SSE instructions, too.
    if !ins.is_string_instruction() {
        return None;
    }
    let (handler, place) = match ins.mnemonic() {
        Movsb | Movsw | Movsd | Movsq => form::<self::Movs>(ins, insn),
        Cmpsb | Cmpsw | Cmpsd | Cmpsq => form::<self::Cmps>(ins, insn),
        Scasb | Scasw | Scasd | Scasq => form::<self::Scas>(ins, insn),
        Stosb | Stosw | Stosd | Stosq => form::<self::Stos>(ins, insn),
        Lodsb | Lodsw | Lodsd | Lodsq => form::<self::Lods>(ins, insn),
        _ => return None,
    };
    insn.exec = handler;
    Some(place)
}
