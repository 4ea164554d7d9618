//! Translates blocks of guest code to host code: the second tier of `soft-cpu`, with its interpreter as the reference.
//!
//! A block becomes a straight piece of host code that keeps the guest's registers where the interpreter has them, in the
//! [`Cpu`], and does instruction by instruction what the handlers do. A memory access looks into the same fast TLB; where that
//! does not have it, and for every instruction without code of its own ([`ops`]), the instruction's handler is called. So there
//! is one definition of what an instruction does beyond its most frequent path, and a translated guest can be stopped after
//! any instruction with the state that the interpreter would have.
//!
//! # From block to block
//!
//! Each block has a slot: a word that holds the address of its code, or of a stub that leaves to the run loop while it has none.
//! A jump within the guest's page goes through the slot of its target. Any other looks its target up in the
//! [`Jump`]s by linear address, and believes what it finds if the instruction TLB still has the very entry that it had
//! when the run loop fetched there: an entry's rights depend on nothing but the privilege level, for which there are two tables.
//! Before each block the instructions left to run are counted down; where they do not suffice, the run loop
//! interprets the part that may run.
//!
//! # Safety
//!
//! Translated code writes to the `Cpu` and to RAM alone: registers by constant offsets, RAM at offsets that the fast TLB's entries
//! give, whose pages lie wholly in RAM. It runs while [`Translator::run`] has both borrowed.
#![cfg(target_arch = "x86_64")]
// In what `dynasm!` makes of register numbers.
#![allow(clippy::useless_conversion)]
// Maps are looked up and never gone through: their order is nowhere.
#![allow(clippy::disallowed_types)]

mod block;
mod memory;
mod ops;
mod stubs;

use std::collections::HashMap;
use std::io;

use iced_x86::{Decoder, DecoderOptions};
use soft_cpu::decode::{BlockDecoder, Decoded, Place};
use soft_cpu::insn::Insn;
use soft_cpu::state::RIP_BASE;
use soft_cpu::tier::{Ran, Translator, perform};
use soft_cpu::{Cpu, Stop};

use block::Block;
use memory::CodeMemory;
use stubs::Enter;

/// Bytes of code kept before everything is dropped and translated anew.
const CODE_MAX: usize = 12 << 20;
/// More than a block of the longest instructions needs.
const BLOCK_CODE_MAX: usize = 64 << 10;
/// Blocks known before everything is dropped.
const SLOTS: usize = 1 << 16;
/// Places for targets of jumps, for each of supervisor and user mode.
const JUMPS: usize = 4096;

/// A block's place in the table of code addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Slot(u32);

/// Slots that no block has, with what every block needs.
mod fixed {
    use super::Slot;
    /// Leaves to the run loop, at the address in [`super::RIP_BASE`].
    pub(super) const LEAVE: Slot = Slot(0);
    /// Leaves to the run loop, at RIP.
    pub(super) const LEAVE_AT_RIP: Slot = Slot(1);
    /// Calls a handler.
    pub(super) const PERFORM: Slot = Slot(2);
    /// The first that is a block's.
    pub(super) const FIRST: usize = 3;
}

/// A target of jumps: valid as long as the instruction TLB has this frame for its page.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
struct Jump {
    rip: u64,
    frame: u64,
    slot: *const u64,
}

/// Not canonical, so no jump's target.
const NO_RIP: u64 = 1 << 63;
const NO_JUMP: Jump = Jump { rip: NO_RIP, frame: 0, slot: std::ptr::null() };

/// What translated code is entered with.
#[repr(C)]
struct Frame {
    cpu: *mut Cpu,
    ram: *mut u8,
    ram_len: usize,
    fast: *const u8,
    slots: *const u64,
    jumps: *const Jump,
    code_tlb: *const u8,
    budget: i64,
    code: u64,
}

/// What it leaves with.
#[repr(C)]
struct Left {
    /// 0, or the instruction that stopped, shifted left by 8, with its [`Stop`] plus 1.
    stopped: u64,
    /// What is left of the budget.
    budget: i64,
}

/// See the crate.
pub struct Native {
    memory: CodeMemory,
    stubs: usize,
    enter: Enter,
    slots: Box<[u64]>,
    used: usize,
    by_start: HashMap<usize, Slot>,
    by_page: HashMap<usize, Vec<Slot>>,
    insns: Vec<Box<[Insn]>>,
    jumps: [Box<[Jump; JUMPS]>; 2],
}

// SAFETY: the pointers in `jumps` lead into `slots`, which moves along.
#[allow(unsafe_code)]
unsafe impl Send for Native {}

impl Native {
    /// A translator that knows nothing yet.
    ///
    /// # Errors
    /// When the host gives no memory that may be executed.
    pub fn new() -> io::Result<Native> {
        let mut memory = CodeMemory::new(CODE_MAX)?;
        let stubs = stubs::add(&mut memory, handler);
        let mut slots = vec![stubs.leave; SLOTS].into_boxed_slice();
        slots[fixed::LEAVE_AT_RIP.0 as usize] = stubs.leave_at_rip;
        slots[fixed::PERFORM.0 as usize] = stubs.perform;
        Ok(Native {
            stubs: memory.used(),
            memory,
            enter: stubs.enter,
            slots,
            used: fixed::FIRST,
            by_start: HashMap::new(),
            by_page: HashMap::new(),
            insns: Vec::new(),
            jumps: std::array::from_fn(|_| Box::new([NO_JUMP; JUMPS])),
        })
    }

    /// The slot of the block at a RAM offset, which may not be translated yet.
    fn slot(&mut self, start: usize) -> Slot {
        *self.by_start.entry(start).or_insert_with(|| {
            self.used += 1;
            let slot = Slot(self.used as u32 - 1);
            self.by_page.entry(start / 4096).or_default().push(slot);
            slot
        })
    }

    fn forget_all(&mut self) {
        self.memory.truncate(self.stubs);
        let leave = self.slots[fixed::LEAVE.0 as usize];
        self.slots[fixed::FIRST..].fill(leave);
        self.used = fixed::FIRST;
        self.by_start.clear();
        self.by_page.clear();
        self.insns.clear();
        for jumps in &mut self.jumps {
            jumps.fill(NO_JUMP);
        }
    }

    /// Code for the block at RIP, if the last fetch there is still good.
    fn find(&self, cpu: &Cpu) -> Option<u64> {
        let jump = &self.jumps[cpu.fetches_as_user() as usize][jump_index(cpu.rip)];
        let cached = cpu.tlb.code(cpu.rip >> 12);
        let found = jump.rip == cpu.rip && cached.page == cpu.rip >> 12 && cached.frame == jump.frame;
        if !found {
            return None;
        }
        let index = (jump.slot as usize - self.slots.as_ptr() as usize) / size_of::<u64>();
        let code = self.slots[index];
        (code != self.slots[fixed::LEAVE.0 as usize]).then_some(code)
    }
}

/// Where the jump to `rip` is noted; [`block::Block`] has the same in code.
fn jump_index(rip: u64) -> usize {
    (rip ^ rip >> 11) as usize % JUMPS
}

impl Translator for Native {
    fn translate(&mut self, ram: &[u8], start: usize, count: usize) -> bool {
        let block_slots = count + 2;
        if self.memory.left() < BLOCK_CODE_MAX || self.used + block_slots > SLOTS {
            self.forget_all();
        }
        let bytes = &ram[start..((start | 4095) + 1).min(ram.len())];
        let mut decoder = BlockDecoder::new(bytes);
        let (mut insns, mut decoded, mut last) = (Vec::new(), Vec::new(), Place::Middle);
        for _ in 0..count {
            let Decoded::Insn(insn, place) = decoder.decode() else { return false };
            let at = &bytes[insn.offset as usize..];
            let ip = insn.offset as u64;
            decoded.push(Decoder::with_ip(64, at, ip, DecoderOptions::FORCE_RESERVED_NOP).decode());
            insns.push(insn);
            last = place;
        }
        if last == Place::Alone {
            return false;
        }
        let insns = insns.into_boxed_slice();
        let slot = self.slot(start);
        let code = Block::new(self, start, &insns).translate(&decoded, last == Place::Last);
        let Some(code) = code else { return false };
        self.slots[slot.0 as usize] = self.memory.add(&code);
        self.insns.push(insns);
        true
    }

    fn link(&mut self, cpu: &Cpu, start: usize) -> bool {
        let Some(slot) = self.by_start.get(&start) else { return false };
        let place = &self.slots[slot.0 as usize];
        if *place == self.slots[fixed::LEAVE.0 as usize] {
            return false;
        }
        let frame = cpu.tlb.code(cpu.rip >> 12).frame;
        self.jumps[cpu.fetches_as_user() as usize][jump_index(cpu.rip)] =
            Jump { rip: cpu.rip, frame, slot: place };
        true
    }

    fn run(&mut self, cpu: &mut Cpu, ram: &mut [u8], budget: u64) -> Option<Ran> {
        let code = self.find(cpu)?;
        assert!(ram.len().is_multiple_of(4096), "RAM is not made of pages");
        cpu.regs[RIP_BASE as usize] = cpu.rip;
        let frame = Frame {
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
        // SAFETY: `code` is that of a block, and the pointers are good while `cpu` and `ram` are borrowed.
        #[allow(unsafe_code)]
        let left = unsafe { (self.enter)(&frame) };
        let ran = budget - left.budget as u64;
        cpu.retired += ran;
        if left.stopped == 0 {
            return (ran > 0).then_some(Ran::On);
        }
        // SAFETY: it is one of `self.insns`, which only `forget_all` drops.
        #[allow(unsafe_code)]
        let insn = unsafe { *((left.stopped >> 8) as *const Insn) };
        let rip = cpu.regs[RIP_BASE as usize].wrapping_add(insn.offset as u64);
        Some(Ran::Stopped(stop(left.stopped as u8), insn, rip))
    }

    fn invalidate(&mut self, page: usize) {
        for slot in self.by_page.get(&page).into_iter().flatten() {
            self.slots[slot.0 as usize] = self.slots[fixed::LEAVE.0 as usize];
        }
    }
}

/// What translated code calls for an instruction that it has no code for: 0, or its [`Stop`] plus 1.
#[allow(unsafe_code)]
unsafe extern "sysv64" fn handler(cpu: *mut Cpu, ram: *mut u8, ram_len: usize, insn: *const Insn) -> u64 {
    // SAFETY: they come from `run`'s frame and, the instruction, from its translator.
    let (cpu, ram, insn) = unsafe { (&mut *cpu, std::slice::from_raw_parts_mut(ram, ram_len), &*insn) };
    match perform(cpu, ram, insn) {
        Ok(()) => 0,
        Err(stop) => stop as u64 + 1,
    }
}

fn stop(code: u8) -> Stop {
    const ALL: [Stop; 8] = [
        Stop::Fault,
        Stop::Io,
        Stop::CodeWrite,
        Stop::Again,
        Stop::Trap,
        Stop::Halt,
        Stop::Slow,
        Stop::Shutdown,
    ];
    *ALL.iter().find(|stop| **stop as u8 + 1 == code).expect("translated code leaves with a stop")
}
