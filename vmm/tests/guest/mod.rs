//! A small guest in machine code. It counts timer ticks, computes, halts, and reads bytes from the serial port.
#![allow(dead_code, reason = "each test binary uses a part of this module")]

pub mod log;
pub mod world;

use entry::Digest;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use vmm::record::RecordSink;
use vmm::replay::{Records, Replayer, Standby};
use vmm::{BootFile, BootFiles, BootPlan, Engine, GuestLoop, Machine, MachineConfig, Slot};

pub const BASE: u64 = 0x20_0000;
const TICK: u64 = BASE + 0x400;
const TYPED: u64 = BASE + 0x600;
const IDTR: u64 = BASE + 0x800;
const IDT: u64 = BASE + 0x1000;
/// Number of ticks after which the guest switches itself off.
pub const TICKS: u32 = 40;

/// An ELF file that is loaded at [`BASE`] and entered at its start. Its content is one executable section.
pub fn elf(image: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 64 + 56];
    file[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\0");
    file[16..20].copy_from_slice(&[2, 0, 62, 0]);
    file[24..32].copy_from_slice(&BASE.to_le_bytes());
    file[32..40].copy_from_slice(&64u64.to_le_bytes());
    file[52..58].copy_from_slice(&[64, 0, 56, 0, 1, 0]);
    file[64..68].copy_from_slice(&1u32.to_le_bytes());
    for (field, value) in
        [(8, 120), (16, BASE), (24, BASE), (32, image.len() as u64), (40, image.len() as u64)]
    {
        file[64 + field..72 + field].copy_from_slice(&value.to_le_bytes());
    }
    file.extend_from_slice(image);
    let sections = file.len() as u64;
    file[40..48].copy_from_slice(&sections.to_le_bytes());
    file[58..64].copy_from_slice(&[64, 0, 2, 0, 1, 0]);
    // Two sections: SHT_PROGBITS with SHF_ALLOC and SHF_EXECINSTR, and SHT_STRTAB. Their names are empty.
    for (kind, flags, address, at, len) in [(1u32, 6u64, BASE, 120, image.len() as u64), (3, 0, 0, 8, 8)] {
        file.extend(0u32.to_le_bytes());
        file.extend(kind.to_le_bytes());
        for value in [flags, address, at, len, 0, 0, 0] {
            file.extend(u64::to_le_bytes(value));
        }
    }
    file
}

pub fn assemble(at: u64, code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut assembler = CodeAssembler::new(64).unwrap();
    code(&mut assembler).unwrap();
    assembler.assemble(at).unwrap()
}

pub fn out(a: &mut CodeAssembler, port: u32, value: u32) -> Result<(), IcedError> {
    a.mov(edx, port)?;
    a.mov(eax, value)?;
    a.out(dx, al)
}

/// The main loop: counts ticks in r15, has a hash of the typed bytes in r14, and writes a running sum, rcx, over 64 KiB of memory.
fn main_loop(a: &mut CodeAssembler, work: u32, ticks: u32) -> Result<(), IcedError> {
    a.mov(rsp, 0x30_0000u64)?;
    a.mov(rax, IDTR)?;
    a.lidt(qword_ptr(rax))?;
    for (port, value) in [
        (0x20, 0x11),
        (0x21, 0x30),
        (0x21, 4),
        (0x21, 1),
        (0x21, 0xee),
        (0xa0, 0x11),
        (0xa1, 0x38),
        (0xa1, 2),
        (0xa1, 1),
        (0xa1, 0xff),
        (0x43, 0x34),
        (0x40, 0x9c),
        (0x40, 0x2e),
        (0x3f9, 1),
    ] {
        out(a, port, value)?;
    }
    a.xor(r15d, r15d)?;
    a.xor(r14d, r14d)?;
    a.xor(ecx, ecx)?;
    a.xor(ebx, ebx)?;
    a.sti()?;
    let (mut round, mut again, mut end) = (a.create_label(), a.create_label(), a.create_label());
    a.set_label(&mut round)?;
    a.mov(edi, work)?;
    a.set_label(&mut again)?;
    a.add(rcx, rdi)?;
    a.rol(rcx, 7)?;
    a.inc(ebx)?;
    a.and(ebx, 0x1fff)?;
    a.mov(qword_ptr(0x28_0000 + rbx * 8), rcx)?;
    a.dec(edi)?;
    a.jnz(again)?;
    a.hlt()?;
    a.cmp(r15d, ticks)?;
    a.jae(end)?;
    a.jmp(round)?;
    a.set_label(&mut end)?;
    out(a, 0x604, 0x34)
}

fn tick(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.push(rax)?;
    a.push(rdx)?;
    a.inc(r15d)?;
    // Prints a letter for each tick, and ends the line after eight.
    a.mov(eax, r15d)?;
    a.and(eax, 7)?;
    a.add(eax, b'a' as i32)?;
    a.mov(edx, 0x3f8)?;
    a.out(dx, al)?;
    a.test(r15d, 7)?;
    let mut not_yet = a.create_label();
    a.jnz(not_yet)?;
    out(a, 0x3f8, b'\n' as u32)?;
    a.set_label(&mut not_yet)?;
    out(a, 0x20, 0x20)?;
    a.pop(rdx)?;
    a.pop(rax)?;
    a.iretq()
}

fn typed(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.push(rax)?;
    a.push(rdx)?;
    let mut more = a.create_label();
    a.set_label(&mut more)?;
    a.mov(edx, 0x3f8)?;
    a.in_(al, dx)?;
    a.movzx(eax, al)?;
    a.imul_3(r14, r14, 31)?;
    a.add(r14, rax)?;
    a.add(rcx, r14)?;
    // The interrupt line is edge-triggered, so all bytes that are there must be read.
    a.mov(edx, 0x3fd)?;
    a.in_(al, dx)?;
    a.test(al, 1)?;
    a.jnz(more)?;
    out(a, 0x20, 0x20)?;
    a.pop(rdx)?;
    a.pop(rax)?;
    a.iretq()
}

/// The image of the guest.
pub fn image() -> Vec<u8> {
    image_of(70_000, TICKS)
}

/// The image of the guest with `work` rounds of computing between two halts, which ends after `ticks` ticks.
pub fn image_of(work: u32, ticks: u32) -> Vec<u8> {
    let mut image = vec![0; 0x2000];
    let mut put = |at: u64, bytes: &[u8], end: u64| {
        assert!(at + bytes.len() as u64 <= end);
        image[(at - BASE) as usize..][..bytes.len()].copy_from_slice(bytes);
    };
    put(BASE, &assemble(BASE, |a| main_loop(a, work, ticks)), TICK);
    put(TICK, &assemble(TICK, tick), TYPED);
    put(TYPED, &assemble(TYPED, typed), IDTR);
    put(IDTR, &[&0xfffu16.to_le_bytes()[..], &IDT.to_le_bytes()].concat(), IDT);
    for (vector, handler) in [(0x30, TICK), (0x34, TYPED)] {
        // A 64-bit interrupt gate with selector 0x10.
        let low = handler & 0xffff | 0x10 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
        put(IDT + 16 * vector, &low.to_le_bytes(), IDT + 0x1000);
    }
    image
}

/// A machine with this guest.
pub fn machine() -> Machine {
    machine_of(&image(), Vec::new())
}

/// Digest of the whole machine. Checks that all writes to RAM were reported.
pub fn total(machine: &mut Machine) -> Digest {
    let digest = machine.digest().unwrap();
    assert_eq!(digest, machine.full_digest().unwrap(), "a write to RAM was not reported");
    digest.total()
}

pub fn machine_of(image: &[u8], slots: Vec<Slot>) -> Machine {
    machine_on(Engine::Soft, image, slots)
}

pub fn machine_on(engine: Engine, image: &[u8], slots: Vec<Slot>) -> Machine {
    let config = MachineConfig { engine, memory_bytes: 16 << 20, epoch_s: 0, slots };
    let kernel = BootFile::new("test guest", elf(image));
    let files = BootFiles { kernel, initrd: None, command_line: String::new(), seed: None, rewrite: true };
    let plan = BootPlan::new(&files, &config).unwrap();
    Machine::new(config, plan).unwrap()
}
