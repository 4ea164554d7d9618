//! Translates blocks of guest code to host code: the second tier of `soft-cpu`, whose interpreter is the
//! reference.
//!
//! A block becomes a straight piece of host code that keeps the guest's registers where the interpreter has
//! them, in the [`Cpu`], and does instruction by instruction what the handlers do. A memory access looks into
//! the same fast TLB. Where that misses, and for every instruction that `ops` does not translate, the
//! instruction's handler is called. So there is one definition of what an instruction does outside its most
//! frequent path, and a translated guest can be stopped after any instruction with the state that the
//! interpreter would have.
//!
//! # From block to block
//!
//! Each block has a slot: a word that holds the address of its code, or, while it has none, of a stub that
//! leaves to the run loop. A jump within the guest's page goes through the slot of its target. Any other jump
//! looks its target up in the jump cache (`Jump`) by linear address. An entry found there is valid if the
//! instruction TLB still has the entry that it had when the run loop fetched there: the access rights then
//! depend only on the privilege level, and there is one jump cache for supervisor and one for user mode.
//! Before each block its instructions are counted down from the budget; if the budget does not suffice, the
//! run loop interprets the part of the block that may run.
//!
//! # Safety
//!
//! Translated code writes only to the `Cpu` and to RAM: to registers at constant offsets, to RAM at offsets
//! from entries of the fast TLB, whose pages lie wholly in RAM. It runs while [`Translator::run`] has both
//! borrowed.
#![cfg(target_arch = "x86_64")]
// `dynasm!` expands register numbers to such conversions.
#![allow(clippy::useless_conversion)]
// Hash maps are only looked up in, never iterated over, so that their order has no effect.
#![allow(clippy::disallowed_types)]

mod assembler;
mod block;
mod effect;
mod memory;
mod ops;
mod slots;
mod stubs;

use std::io;

use iced_x86::{Decoder, DecoderOptions};
use soft_cpu::decode::{BlockDecoder, Decoded};
use soft_cpu::insn::{Insn, PlaceInBlock};
use soft_cpu::state::RIP_BASE;
use soft_cpu::tier::{Ran, Translator, perform};
use soft_cpu::{Cpu, CpuStop};

use memory::CodeMemory;
use slots::{JUMPS, Jump, NO_JUMP, SlotTable, jump_index};
use stubs::{Enter, EntryFrame};

/// Bytes of code kept before everything is dropped and translated anew.
const CODE_MAX: usize = 12 << 20;
/// More than the code of any block needs.
const BLOCK_CODE_MAX: usize = 64 << 10;

/// The [`Translator`] of this host; see the crate's documentation.
pub struct NativeTranslator {
    memory: CodeMemory,
    /// Bytes of stubs at the start of `memory`.
    stubs: usize,
    enter: Enter,
    slots: SlotTable,
    /// The instructions of all blocks: their code has pointers to them.
    insns: Vec<Box<[Insn]>>,
    /// The jump caches of supervisor and user mode.
    jumps: [Box<[Jump; JUMPS]>; 2],
}

// SAFETY: the pointers in `jumps` lead into memory that `slots` owns, which is sent with them.
#[allow(unsafe_code)]
unsafe impl Send for NativeTranslator {}

impl NativeTranslator {
    /// A translator without any block.
    ///
    /// # Errors
    /// When the host allows no memory that can be executed.
    pub fn new() -> io::Result<NativeTranslator> {
        let mut memory = CodeMemory::new(CODE_MAX)?;
        let stubs = stubs::add(&mut memory, handler);
        Ok(NativeTranslator {
            stubs: memory.used(),
            memory,
            enter: stubs.enter,
            slots: SlotTable::new(stubs.leave, stubs.leave_at_rip, stubs.perform),
            insns: Vec::new(),
            jumps: std::array::from_fn(|_| Box::new([NO_JUMP; JUMPS])),
        })
    }

    /// Takes from the host now what this many translators at the same time need later, for a process that will be refused it.
    ///
    /// # Errors
    /// When the host allows no memory that can be executed.
    pub fn reserve(count: usize) -> io::Result<()> {
        memory::reserve(count, CODE_MAX)
    }

    fn forget_all(&mut self) {
        self.memory.truncate(self.stubs);
        self.slots.clear();
        self.insns.clear();
        for jumps in &mut self.jumps {
            jumps.fill(NO_JUMP);
        }
    }

    /// The code of the block at RIP, if the jump cache's entry for it is still valid.
    fn find(&self, cpu: &Cpu) -> Option<u64> {
        let jump = &self.jumps[cpu.fetches_as_user() as usize][jump_index(cpu.rip)];
        let cached = cpu.tlb.code(cpu.rip >> 12);
        let found = jump.rip == cpu.rip && cached.page == cpu.rip >> 12 && cached.frame == jump.frame;
        if found { self.slots.code_of(jump) } else { None }
    }
}

impl Translator for NativeTranslator {
    fn translate(&mut self, ram: &[u8], start: usize, count: usize) -> bool {
        let block_slots = count + 2;
        if self.memory.left() < BLOCK_CODE_MAX || !self.slots.has_room(block_slots) {
            self.forget_all();
        }
        let bytes = &ram[start..((start | 4095) + 1).min(ram.len())];
        let mut decoder = BlockDecoder::new(bytes);
        let (mut insns, mut decoded, mut last) = (Vec::new(), Vec::new(), PlaceInBlock::Middle);
        for _ in 0..count {
            let Decoded::Insn(insn, place) = decoder.decode() else { return false };
            let at = &bytes[insn.offset as usize..];
            let ip = insn.offset as u64;
            decoded.push(Decoder::with_ip(64, at, ip, DecoderOptions::FORCE_RESERVED_NOP).decode());
            insns.push(insn);
            last = place;
        }
        if last == PlaceInBlock::Alone {
            return false;
        }
        let insns = insns.into_boxed_slice();
        let slot = self.slots.slot(start);
        let code = block::translate(&mut self.slots, start, &insns, &decoded, last == PlaceInBlock::Last);
        let Some(code) = code else { return false };
        self.slots.set_code(slot, self.memory.add(&code));
        self.insns.push(insns);
        true
    }

    fn link(&mut self, cpu: &Cpu, start: usize) -> bool {
        let Some(slot) = self.slots.translated(start) else { return false };
        let frame = cpu.tlb.code(cpu.rip >> 12).frame;
        self.jumps[cpu.fetches_as_user() as usize][jump_index(cpu.rip)] = Jump { rip: cpu.rip, frame, slot };
        true
    }

    fn run(&mut self, cpu: &mut Cpu, ram: &mut [u8], budget: u64) -> Option<Ran> {
        let code = self.find(cpu)?;
        assert!(ram.len().is_multiple_of(4096), "RAM is not made of pages");
        cpu.regs[RIP_BASE as usize] = cpu.rip;
        let frame = EntryFrame {
            ram: ram.as_mut_ptr(),
            ram_len: ram.len(),
            fast: cpu.fast_entries(),
            slots: self.slots.as_ptr(),
            jumps: self.jumps[cpu.fetches_as_user() as usize].as_ptr(),
            code_tlb: cpu.tlb.code_entries().as_ptr().cast(),
            budget: budget as i64,
            code,
            cpu,
        };
        // SAFETY: `code` is the address of a block's code, and the pointers are valid while `cpu` and `ram`
        // are borrowed.
        #[allow(unsafe_code)]
        let left = unsafe { (self.enter)(&frame) };
        let ran = budget - left.budget as u64;
        cpu.retired += ran;
        if left.stopped == 0 {
            return (ran > 0).then_some(Ran::AtBlock);
        }
        // SAFETY: the pointer leads to one of `self.insns`, which only `forget_all` drops.
        #[allow(unsafe_code)]
        let insn = unsafe { *((left.stopped >> 8) as *const Insn) };
        let rip = cpu.regs[RIP_BASE as usize].wrapping_add(insn.offset as u64);
        Some(Ran::Stopped(stop(left.stopped as u8), insn, rip))
    }

    fn invalidate(&mut self, page: usize) {
        self.slots.invalidate(page);
    }
}

/// Executes an instruction by its handler, for translated code. Returns 0, or the [`CpuStop`] plus 1.
#[allow(unsafe_code)]
unsafe extern "sysv64" fn handler(cpu: *mut Cpu, ram: *mut u8, ram_len: usize, insn: *const Insn) -> u64 {
    // SAFETY: the pointers come from the frame in `run`; the instruction's was put into the code by the
    // translator.
    let (cpu, ram, insn) = unsafe { (&mut *cpu, std::slice::from_raw_parts_mut(ram, ram_len), &*insn) };
    match perform(cpu, ram, insn) {
        Ok(()) => 0,
        Err(stop) => stop as u64 + 1,
    }
}

fn stop(code: u8) -> CpuStop {
    const ALL: [CpuStop; 8] = [
        CpuStop::Fault,
        CpuStop::Io,
        CpuStop::CodeWrite,
        CpuStop::RepSuspended,
        CpuStop::Trap,
        CpuStop::Halt,
        CpuStop::Slow,
        CpuStop::Shutdown,
    ];
    *ALL.iter().find(|stop| **stop as u8 + 1 == code).expect("translated code leaves with a stop")
}
