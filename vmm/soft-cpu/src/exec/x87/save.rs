//! FLDENV, FNSTENV, FRSTOR, FNSAVE; FXSAVE, FXRSTOR.
//!
//! The segment selectors of FIP and FDP are stored as zero, and ignored when loaded, as on CPUs that have
//! deprecated them.

use iced_x86::{Code, Instruction};

use super::control::{initialise, set_control, set_status, status};
use super::{EXCEPTIONS, get, guard, guard_no_wait, physical};
use crate::exec::sse::MXCSR_MASK;
use crate::exit::CpuStop;
use crate::float::{F80, FloatClass};
use crate::insn::{Handler, Insn, threaded};
use crate::paging::is_canonical;
use crate::state::Cpu;

/// Size of the environment with a 16-bit operand size.
const SHORT: usize = 14;
/// Size of the environment otherwise.
const LONG: usize = 28;
/// Bytes that FXSAVE writes; the rest of its 512 bytes are reserved or for software.
const FXSAVE_WRITTEN: usize = 416;

fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn number(bytes: &[u8], at: usize, len: usize) -> u128 {
    let mut wide = [0; 16];
    wide[..len].copy_from_slice(&bytes[at..at + len]);
    u128::from_le_bytes(wide)
}

fn put(bytes: &mut [u8], at: usize, value: u128, len: usize) {
    bytes[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
}

fn extended(x: F80) -> u128 {
    u128::from(x.sign_exp) << 64 | u128::from(x.significand)
}

/// The full tag word: two bits for each physical register (SDM 1, 8.1.7).
fn tag_word(cpu: &Cpu) -> u16 {
    (0..8).fold(0, |tags, i| {
        let r = physical(cpu, i);
        let tag = match get(cpu, i).operand().class {
            _ if cpu.x87.in_use >> r & 1 == 0 => 3,
            FloatClass::Normal => 0,
            FloatClass::Zero => 1,
            _ => 2,
        };
        tags | tag << (2 * r)
    })
}

fn store_environment(cpu: &Cpu, bytes: &mut [u8]) {
    let x87 = &cpu.x87;
    let words = [x87.control, status(cpu), tag_word(cpu)];
    if bytes.len() == SHORT {
        let words = [words[0], words[1], words[2], x87.instruction as u16, 0, x87.data as u16, 0];
        for (n, w) in words.into_iter().enumerate() {
            put(bytes, 2 * n, w.into(), 2);
        }
        return;
    }
    bytes.fill(0xff);
    for (n, w) in words.into_iter().enumerate() {
        put(bytes, 4 * n, w.into(), 2);
    }
    put(bytes, 12, u128::from(x87.instruction as u32), 4);
    put(bytes, 16, u128::from(x87.opcode) << 16, 4);
    put(bytes, 20, u128::from(x87.data as u32), 4);
    put(bytes, 24, 0, 2);
}

fn load_environment(cpu: &mut Cpu, bytes: &[u8]) {
    let short = bytes.len() == SHORT;
    let step = if short { 2 } else { 4 };
    set_control(cpu, word(bytes, 0));
    set_status(cpu, word(bytes, step));
    let tags = word(bytes, 2 * step);
    let x87 = &mut cpu.x87;
    x87.in_use = (0..8).filter(|r| tags >> (2 * r) & 3 != 3).fold(0, |used, r| used | 1 << r);
    if short {
        x87.instruction = word(bytes, 6).into();
        x87.data = word(bytes, 10).into();
        x87.opcode = 0;
    } else {
        x87.instruction = number(bytes, 12, 4) as u64;
        x87.opcode = word(bytes, 18) & 0x7ff;
        x87.data = number(bytes, 20, 4) as u64;
    }
}

fn fnstenv<const LEN: usize>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard_no_wait(cpu)?;
    let mut bytes = [0; LEN];
    store_environment(cpu, &mut bytes);
    store(cpu, ram, i, &bytes, &ends(LEN, LEN))?;
    cpu.x87.control |= EXCEPTIONS;
    super::summarise(cpu);
    Ok(())
}

fn fldenv<const LEN: usize>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let mut bytes = [0; LEN];
    load(cpu, ram, i, &mut bytes, &ends(LEN, LEN))?;
    load_environment(cpu, &bytes);
    Ok(())
}

/// `LEN` is the size of the environment, which the eight registers follow.
fn fnsave<const LEN: usize>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard_no_wait(cpu)?;
    let mut bytes = [0; LONG + 80];
    let bytes = &mut bytes[..LEN + 80];
    store_environment(cpu, &mut bytes[..LEN]);
    for n in 0..8 {
        put(bytes, LEN + 10 * n, extended(get(cpu, n as u8)), 10);
    }
    store(cpu, ram, i, bytes, &ends(LEN, LEN + 80))?;
    initialise(cpu);
    Ok(())
}

fn frstor<const LEN: usize>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard(cpu)?;
    let mut bytes = [0; LONG + 80];
    let bytes = &mut bytes[..LEN + 80];
    load(cpu, ram, i, bytes, &ends(LEN, LEN + 80))?;
    load_environment(cpu, &bytes[..LEN]);
    for n in 0..8 {
        load_register(cpu, n, &bytes[LEN + 10 * n..]);
    }
    Ok(())
}

/// Loads the contents of ST(`n`); whether it is in use is in the tag word.
fn load_register(cpu: &mut Cpu, n: usize, bytes: &[u8]) {
    let r = physical(cpu, n as u8);
    cpu.x87.significand[r] = number(bytes, 0, 8) as u64;
    cpu.x87.sign_exponent[r] = word(bytes, 8);
}

/// Offset and length of bytes that are accessed.
type Touch = (usize, usize);

/// What hardware accesses first of an operand that begins with an environment: the field of the control word,
/// then the last byte.
const fn ends(environment: usize, len: usize) -> [Touch; 2] {
    [(0, if environment == SHORT { 2 } else { 4 }), (len - 1, 1)]
}

/// What hardware accesses first of the operand of FXSAVE.
const FXSAVE_END: [Touch; 1] = [(511, 1)];

/// Reads the operand, but accesses `first` before anything else, which decides the address that a fault
/// reports.
fn load(cpu: &mut Cpu, ram: &mut [u8], i: &Insn, bytes: &mut [u8], first: &[Touch]) -> Result<(), CpuStop> {
    let addr = cpu.ea(i);
    first
        .iter()
        .try_for_each(|(at, len)| cpu.load_bytes(ram, cpu.ea_at(i, *at), &mut [0; 4][..*len]))
        .and_then(|()| cpu.load_bytes(ram, addr, bytes))
        .map_err(|stop| cpu.operand_fault(i, stop))
}

/// Writes the operand in the same way.
fn store(cpu: &mut Cpu, ram: &mut [u8], i: &Insn, bytes: &[u8], first: &[Touch]) -> Result<(), CpuStop> {
    let addr = cpu.ea(i);
    first
        .iter()
        .try_for_each(|(at, len)| {
            let part = cpu.ea_at(i, *at);
            cpu.check_alignment(part, *len)?;
            cpu.probe_write(ram, part, *len)
        })
        .and_then(|()| cpu.store_bytes(ram, addr, bytes))
        .map_err(|stop| cpu.operand_fault(i, stop))
}

/// Raises #GP unless the operand is aligned to 16 bytes; instead #AC if alignment is checked and it is not
/// aligned to 4 bytes either. Before that, #GP or #SS if the address is not canonical.
fn check_alignment(cpu: &mut Cpu, i: &Insn) -> Result<(), CpuStop> {
    let addr = cpu.ea(i);
    if !is_canonical(addr) {
        return cpu.general_protection(0).map_err(|stop| cpu.operand_fault(i, stop));
    }
    match addr & 15 {
        0 => Ok(()),
        n if n % 4 != 0 && cpu.checks_alignment() => cpu.raise(17, Some(0)),
        _ => cpu.general_protection(0),
    }
}

/// FXSAVE; `WIDE` is FXSAVE64, with pointers of 64 bits.
fn fxsave<const WIDE: bool>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard_no_wait(cpu)?;
    check_alignment(cpu, i)?;
    let pointer = if WIDE { 8 } else { 4 };
    let mut bytes = [0; FXSAVE_WRITTEN];
    put(&mut bytes, 0, cpu.x87.control.into(), 2);
    put(&mut bytes, 2, status(cpu).into(), 2);
    put(&mut bytes, 4, cpu.x87.in_use.into(), 1);
    put(&mut bytes, 6, cpu.x87.opcode.into(), 2);
    put(&mut bytes, 8, cpu.x87.instruction.into(), pointer);
    put(&mut bytes, 16, cpu.x87.data.into(), pointer);
    put(&mut bytes, 24, cpu.mxcsr.into(), 4);
    put(&mut bytes, 28, MXCSR_MASK.into(), 4);
    for n in 0..8 {
        put(&mut bytes, 32 + 16 * n, extended(get(cpu, n as u8)), 16);
    }
    for (n, x) in cpu.xmm.into_iter().enumerate() {
        put(&mut bytes, 160 + 16 * n, x, 16);
    }
    store(cpu, ram, i, &bytes, &FXSAVE_END)
}

fn fxrstor<const WIDE: bool>(cpu: &mut Cpu, ram: &mut [u8], i: &Insn) -> Result<(), CpuStop> {
    guard_no_wait(cpu)?;
    check_alignment(cpu, i)?;
    let mut bytes = [0; 512];
    load(cpu, ram, i, &mut bytes, &FXSAVE_END)?;
    let mxcsr = number(&bytes, 24, 4) as u32;
    if mxcsr & !MXCSR_MASK != 0 {
        return cpu.general_protection(0);
    }
    let pointer = if WIDE { 8 } else { 4 };
    cpu.mxcsr = mxcsr;
    set_control(cpu, word(&bytes, 0));
    set_status(cpu, word(&bytes, 2));
    cpu.x87.in_use = bytes[4];
    cpu.x87.opcode = word(&bytes, 6) & 0x7ff;
    cpu.x87.instruction = number(&bytes, 8, pointer) as u64;
    cpu.x87.data = number(&bytes, 16, pointer) as u64;
    for n in 0..8 {
        load_register(cpu, n, &bytes[32 + 16 * n..]);
    }
    for (n, x) in cpu.xmm.iter_mut().enumerate() {
        *x = number(&bytes, 160 + 16 * n, 16);
    }
    Ok(())
}

/// Handlers of this family.
pub(super) fn select(ins: &Instruction, insn: &mut Insn) -> Option<()> {
    let handler: Handler = match ins.code() {
        Code::Fnstenv_m14byte => threaded!(fnstenv::<SHORT>),
        Code::Fnstenv_m28byte => threaded!(fnstenv::<LONG>),
        Code::Fldenv_m14byte => threaded!(fldenv::<SHORT>),
        Code::Fldenv_m28byte => threaded!(fldenv::<LONG>),
        Code::Fnsave_m94byte => threaded!(fnsave::<SHORT>),
        Code::Fnsave_m108byte => threaded!(fnsave::<LONG>),
        Code::Frstor_m94byte => threaded!(frstor::<SHORT>),
        Code::Frstor_m108byte => threaded!(frstor::<LONG>),
        Code::Fxsave_m512byte => threaded!(fxsave::<false>),
        Code::Fxsave64_m512byte => threaded!(fxsave::<true>),
        Code::Fxrstor_m512byte => threaded!(fxrstor::<false>),
        Code::Fxrstor64_m512byte => threaded!(fxrstor::<true>),
        _ => return None,
    };
    insn.exec = handler;
    Some(())
}
