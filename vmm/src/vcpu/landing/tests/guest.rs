//! Small guests that do, in an order made from a seed, everything that makes positions difficult.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::ram::Ram;
use crate::vcpu::Start;
use crate::vcpu::simulated::Chance;

pub const RAM: u64 = 512 << 10;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const GDT: u64 = 0x500;
const IDT: u64 = 0x4000;
const IDTR: u64 = 0x600;
const HANDLERS: u64 = 0x5000;
pub const CODE: u64 = 0x1_0000;
const STACK: u64 = 0x3_0000;
const DATA: u64 = 0x4_0000;
/// The word that each input writes, and that programs and handlers read.
pub const INPUT: u64 = 0x3_8000;
/// What interrupt handlers have read, mixed: inputs, frames, registers.
const SEEN: u64 = 0x3_8100;
/// Device memory.
const DEVICE: u64 = 0x20_0000;
pub const END_PORT: u16 = 0x604;
/// The vector of a handler that retires no conditional branch.
pub const PLAIN: u8 = 0x30;
/// The vector of a handler with a loop.
pub const LOOPING: u8 = 0x31;

type Asm = CodeAssembler;

/// Assembles code for an address.
pub fn assemble(at: u64, code: impl FnOnce(&mut Asm) -> Result<(), IcedError>) -> Vec<u8> {
    let mut a = Asm::new(64).unwrap();
    code(&mut a).unwrap();
    a.assemble(at).unwrap()
}

/// One piece of a program. RBX is data; RCX, RSI, RDI, RAX and RDX are scratch; R15 counts rounds.
fn piece(a: &mut Asm, kind: u64, n: u64) -> Result<(), IcedError> {
    let n = n as i32;
    if kind < 5 { inner_piece(a, kind, n) } else { outer_piece(a, kind, n) }
}

/// A piece that needs nothing from outside the vCPU.
fn inner_piece(a: &mut Asm, kind: u64, n: i32) -> Result<(), IcedError> {
    match kind {
        0 => {
            // A loop of one conditional branch.
            a.mov(ecx, 3 + n % 40)?;
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.imul_3(rbx, rbx, 31)?;
            a.add(rbx, rcx)?;
            a.dec(ecx)?;
            a.jnz(again)?;
        }
        1 => {
            // The same function twice, with no conditional branch between.
            let (mut f, mut over) = (a.create_label(), a.create_label());
            a.call(f)?;
            a.call(f)?;
            a.jmp(over)?;
            a.set_label(&mut f)?;
            a.add(qword_ptr(DATA), ebx)?;
            a.rol(rbx, 3)?;
            a.ret()?;
            a.set_label(&mut over)?;
        }
        2 => {
            a.mov(edi, (DATA + 0x100) as i32)?;
            a.mov(esi, (DATA + 0x90) as i32)?;
            a.mov(ecx, 5 + n % 60)?;
            a.rep().movsb()?;
        }
        3 => {
            // Interrupt shadows right before a branch.
            a.cli()?;
            a.test(ebx, 1 << (n % 8))?;
            let mut next = a.create_label();
            a.sti()?;
            a.jz(next)?;
            a.inc(rbx)?;
            a.set_label(&mut next)?;
            a.mov(ax, ss)?;
            a.test(ebx, 2)?;
            let mut last = a.create_label();
            a.mov(ss, ax)?;
            a.jnz(last)?;
            a.dec(rbx)?;
            a.set_label(&mut last)?;
            a.nop()?;
        }
        _ => {
            a.pushfq()?;
            a.pop(rax)?;
            a.add(rbx, rax)?;
            a.ud2()?;
        }
    }
    Ok(())
}

/// A piece that accesses devices or inputs, waits for an interrupt, or raises one.
fn outer_piece(a: &mut Asm, kind: u64, n: i32) -> Result<(), IcedError> {
    match kind {
        5 => {
            a.mov(edx, 0x100 + n % 8)?;
            a.mov(eax, ebx)?;
            a.out(dx, eax)?;
            a.in_(eax, dx)?;
            a.add(rbx, rax)?;
        }
        6 => {
            a.mov(qword_ptr(DEVICE + 8 * (n as u64 % 8)), rbx)?;
            a.xor(rbx, qword_ptr(DEVICE + 64))?;
        }
        7 => {
            // A read of the last input.
            a.mov(rax, qword_ptr(INPUT))?;
            a.xor(rbx, rax)?;
            a.test(al, 1)?;
            let mut next = a.create_label();
            a.jp(next)?;
            a.ror(rbx, 9)?;
            a.set_label(&mut next)?;
        }
        8 => {
            a.sti()?;
            a.hlt()?;
        }
        _ => {
            a.int(0x32)?;
            a.mov(ecx, 2 + n % 5)?;
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.lea(rbx, qword_ptr(rbx + rcx * 2 + 1))?;
            a.loop_(again)?;
        }
    }
    Ok(())
}

/// A program of random pieces that runs a few thousand instructions.
pub fn random(seed: u64) -> Vec<u8> {
    let mut chance = Chance::new(seed);
    let pieces: Vec<_> =
        (0..6 + chance.below(10)).map(|_| (chance.below(10), chance.below(1 << 16))).collect();
    let rounds = 2 + chance.below(6) as i32;
    program(|a| {
        a.mov(r15d, rounds)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        for (kind, n) in &pieces {
            piece(a, *kind, *n)?;
        }
        a.dec(r15d)?;
        a.jnz(again)
    })
}

/// A program: set-up, `body`, and the end.
pub fn program(body: impl FnOnce(&mut Asm) -> Result<(), IcedError>) -> Vec<u8> {
    assemble(CODE, |a| {
        a.mov(esp, STACK as i32)?;
        a.mov(eax, IDTR as i32)?;
        a.lidt(qword_ptr(rax))?;
        a.mov(ebx, 0x1234_5678)?;
        a.sti()?;
        body(a)?;
        a.mov(edx, i32::from(END_PORT))?;
        a.out(dx, al)
    })
}

/// Mixes the frame, the interrupted registers and the last input into [`SEEN`].
fn mix_in_what_is_seen(a: &mut Asm) -> Result<(), IcedError> {
    a.push(rax)?;
    a.mov(rax, qword_ptr(SEEN))?;
    a.imul_3(rax, rax, 0x1_0dcd)?;
    a.add(rax, qword_ptr(rsp + 8))?;
    a.add(rax, qword_ptr(rsp + 24))?;
    a.rol(rax, 7)?;
    a.add(rax, rbx)?;
    a.add(rax, rcx)?;
    a.xor(rax, qword_ptr(INPUT))?;
    a.mov(qword_ptr(SEEN), rax)?;
    a.pop(rax)
}

fn handler(vector: u8, a: &mut Asm) -> Result<(), IcedError> {
    match vector {
        6 => a.add(qword_ptr(rsp), 2)?,
        PLAIN | 0x32 => mix_in_what_is_seen(a)?,
        LOOPING => {
            mix_in_what_is_seen(a)?;
            a.push(rcx)?;
            a.mov(ecx, 3)?;
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.inc(qword_ptr(SEEN + 8))?;
            a.dec(ecx)?;
            a.jnz(again)?;
            a.pop(rcx)?;
        }
        // #DB and unexpected exceptions are counted, so that they change the ending, and passed.
        _ => {
            a.inc(qword_ptr(SEEN + 16))?;
            a.or(dword_ptr(rsp + 16), 1 << 16)?;
        }
    }
    a.iretq()
}

/// Clears RAM, and writes a program with its tables and handlers into it.
pub fn load(ram: &mut Ram, program: &[u8]) -> Start {
    ram.clear().unwrap();
    let bytes = ram.as_mut_slice();
    let mut put = |at: u64, with: &[u8]| bytes[at as usize..][..with.len()].copy_from_slice(with);
    put(PML4, &(PDPT | 3).to_le_bytes());
    put(PDPT, &(PD | 3).to_le_bytes());
    for (n, frame) in [(0, 0), (1, DEVICE)] {
        put(PD + 8 * n, &(frame | 0x83u64).to_le_bytes());
    }
    for (n, descriptor) in [(2, 0x00af_9b00_0000_ffffu64), (3, 0x00cf_9300_0000_ffff)] {
        put(GDT + 8 * n, &descriptor.to_le_bytes());
    }
    put(IDTR, &[&0xfffu16.to_le_bytes()[..], &IDT.to_le_bytes()].concat());
    for vector in 0..=0x40u8 {
        let at = HANDLERS + 0x80 * u64::from(vector);
        let gate = at & 0xffff | 0x10 << 16 | 0x8e00 << 32 | (at >> 16 & 0xffff) << 48;
        put(IDT + 16 * u64::from(vector), &gate.to_le_bytes());
        put(at, &assemble(at, |a| handler(vector, a)));
    }
    put(CODE, program);
    put(DATA, &[0x5a; 0x200]);
    Start { entry: CODE, boot_params: 0, page_tables: PML4, gdt: GDT }
}
