//! Measures the speed of the interpreter, in millions of guest instructions per second, for several kinds of
//! loops.
//!
//! `cargo bench -p soft-cpu` runs them all; a word after `--` selects those whose name contains it. Each
//! figure is the best of many short slices, so that it depends little on how busy the host is.
#![allow(clippy::disallowed_methods, clippy::disallowed_types)]

use std::time::{Duration, Instant};

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use soft_cpu::{CpuExit, RunLimit};

#[path = "../tests/guest/mod.rs"]
mod guest;
use guest::*;

/// Instructions in a slice.
const SLICE: u64 = 1_000_000;
/// How long each program is measured.
const TIME: Duration = Duration::from_secs(2);

type Program = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// Endless loops.
const PROGRAMS: [(&str, Program); 8] = [
    ("register", register_loop),
    ("branch", branch_loop),
    ("memory", memory_loop),
    ("call", call_loop),
    ("sha256", sha256_rounds),
    ("string", string_loop),
    ("vector", vector_loop),
    ("double", double_loop),
];

fn register_loop(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.set_label(&mut top)?;
    a.add(rax, rbx)?;
    a.mov(rdx, rax)?;
    a.shr(rdx, 7)?;
    a.xor(rbx, rdx)?;
    a.lea(rsi, ptr(rax + rbx * 4 + 3))?;
    a.and(esi, 0xffff)?;
    a.sub(rcx, 1)?;
    a.jne(top)?;
    a.jmp(top)
}

/// Short blocks: every third instruction is a branch, and half of the branches are taken.
fn branch_loop(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut top = a.create_label();
    let mut even = a.create_label();
    let mut small = a.create_label();
    a.set_label(&mut top)?;
    a.inc(rax)?;
    a.test(al, 1)?;
    a.je(even)?;
    a.add(rbx, rax)?;
    a.set_label(&mut even)?;
    a.mov(ecx, eax)?;
    a.cmp(cl, 0x80)?;
    a.jb(small)?;
    a.dec(rbx)?;
    a.set_label(&mut small)?;
    a.jmp(top)
}

fn memory_loop(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.mov(rbx, DATA)?;
    a.set_label(&mut top)?;
    a.mov(rax, qword_ptr(rbx + rcx))?;
    a.add(rax, rdx)?;
    a.mov(qword_ptr(rbx + rcx + 8), rax)?;
    a.add(dword_ptr(rbx + rcx + 16), 1)?;
    a.movzx(edx, byte_ptr(rbx + rcx + 3))?;
    a.add(ecx, 24)?;
    a.and(ecx, 0xffff)?;
    a.jmp(top)
}

fn call_loop(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut top = a.create_label();
    let mut function = a.create_label();
    a.set_label(&mut top)?;
    a.mov(rdi, rax)?;
    a.call(function)?;
    a.jmp(top)?;
    a.set_label(&mut function)?;
    a.push(rbp)?;
    a.mov(rbp, rsp)?;
    a.push(rbx)?;
    a.lea(rax, ptr(rdi + 1))?;
    a.pop(rbx)?;
    a.pop(rbp)?;
    a.ret()
}

/// The compression function's rounds as a compiler writes them, over a schedule in memory.
fn sha256_rounds(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut top = a.create_label();
    let mut v = [eax, ebx, ecx, edx, r8d, r9d, r10d, r11d];
    a.mov(rsi, DATA)?;
    a.set_label(&mut top)?;
    for round in 0..16 {
        let [va, vb, vc, vd, ve, vf, vg, vh] = v;
        a.mov(r12d, ve)?;
        a.mov(r13d, ve)?;
        a.ror(r12d, 6)?;
        a.ror(r13d, 11)?;
        a.xor(r12d, r13d)?;
        a.ror(r13d, 14)?;
        a.xor(r12d, r13d)?;
        a.mov(r14d, vf)?;
        a.xor(r14d, vg)?;
        a.and(r14d, ve)?;
        a.xor(r14d, vg)?;
        a.add(vh, dword_ptr(rsi + round * 4))?;
        a.add(vh, 0x428a_2f98)?;
        a.add(vh, r14d)?;
        a.add(vh, r12d)?;
        a.add(vd, vh)?;
        a.mov(r12d, va)?;
        a.ror(r12d, 2)?;
        a.mov(r13d, va)?;
        a.ror(r13d, 13)?;
        a.xor(r12d, r13d)?;
        a.mov(r14d, va)?;
        a.mov(r15d, va)?;
        a.or(r14d, vb)?;
        a.and(r15d, vb)?;
        a.and(r14d, vc)?;
        a.or(r14d, r15d)?;
        a.add(vh, r12d)?;
        a.add(vh, r14d)?;
        a.mov(dword_ptr(rsi + round * 4 + 64), vh)?;
        v.rotate_right(1);
    }
    a.jmp(top)
}

fn string_loop(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.set_label(&mut top)?;
    a.mov(rsi, DATA)?;
    a.mov(rdi, DATA + 0x1_0000)?;
    a.mov(ecx, 100)?;
    a.rep().movsb()?;
    a.mov(rdi, DATA + 0x1_0000)?;
    a.mov(ecx, 32)?;
    a.rep().stosq()?;
    a.jmp(top)
}

/// What memcpy and strlen do with SSE2.
fn vector_loop(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.mov(rsi, DATA)?;
    a.pxor(xmm1, xmm1)?;
    a.set_label(&mut top)?;
    a.movdqu(xmm0, xmmword_ptr(rsi + 8))?;
    a.movups(xmmword_ptr(rsi + 0x100), xmm0)?;
    a.movdqa(xmm2, xmmword_ptr(rsi + 0x20))?;
    a.pminub(xmm2, xmm0)?;
    a.pcmpeqb(xmm2, xmm1)?;
    a.pmovmskb(eax, xmm2)?;
    a.movaps(xmmword_ptr(rsi + 0x200), xmm2)?;
    a.jmp(top)
}

fn double_loop(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.mov(ecx, 3)?;
    a.cvtsi2sd(xmm1, ecx)?;
    a.set_label(&mut top)?;
    a.movapd(xmm0, xmm1)?;
    a.mulsd(xmm0, xmm1)?;
    a.addsd(xmm0, xmm1)?;
    a.divsd(xmm0, xmm1)?;
    a.ucomisd(xmm0, xmm1)?;
    a.cvttsd2si(rax, xmm0)?;
    a.jmp(top)
}

/// The best rate of all slices, in instructions per second.
fn measure(program: Program) -> f64 {
    let mut g = Guest::asm(program);
    g.cpu.restore(&g.state);
    let end = Instant::now() + TIME;
    let mut best = Duration::MAX;
    while Instant::now() < end {
        let limit = RunLimit { until: g.cpu.retired() + SLICE, interrupt_window: false };
        let start = Instant::now();
        assert_eq!(g.cpu.run(&mut g.ram, &limit), CpuExit::Reached);
        best = best.min(start.elapsed());
    }
    SLICE as f64 / best.as_secs_f64()
}

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    for (name, program) in PROGRAMS {
        if wanted.is_empty() || wanted.iter().any(|w| name.contains(w.as_str())) {
            println!("{name:10} {:7.1} MIPS", measure(program) / 1e6);
        }
    }
}
