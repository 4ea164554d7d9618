//! The assembler of a block: entry and exits, slow paths, register and memory operands. What each instruction
//! does is in [`crate::ops`].

use std::mem::offset_of;

use dynasmrt::x64::X64Relocation;
use dynasmrt::{DynamicLabel, DynasmApi, DynasmLabelApi, VecAssembler, dynasm};
use soft_cpu::insn::{ADDR32, Insn};
use soft_cpu::int::HIGH_BYTE;
use soft_cpu::state::{RIP_BASE, ZERO};
use soft_cpu::tier::{FAST_LAYOUT, LAYOUT};
use soft_cpu::tlb::{CODE_ENTRIES, DATA_ENTRIES, TlbEntry};

use crate::effect::{BYTE, DOUBLE, QUAD, WORD};
use crate::slots::{JUMPS, Jump, SlotTable, fixed};
use crate::stubs::{CODE_TLB, JUMPS as JUMPS_AT};

// The emitted code shifts and masks by these.
const _: () = assert!(FAST_LAYOUT.size == 24 && size_of::<Jump>() == 32 && size_of::<TlbEntry>() == 16);
const _: () = assert!(CODE_ENTRIES == 256);

/// Host registers by number.
pub(crate) mod host {
    pub(crate) const RAX: u8 = 0;
    pub(crate) const RCX: u8 = 1;
    pub(crate) const RSI: u8 = 6;
    pub(crate) const RDI: u8 = 7;
}
use host::*;

/// What an instruction does with a memory operand.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum OperandAccess {
    Read,
    Write,
}

/// Code that is placed after the block's frequent paths.
enum ColdCode {
    /// Calls the handler of instruction `k`, then continues at the label.
    Handler(usize, DynamicLabel),
    /// Calls the handler of `k`, the block's last instruction, then leaves to the run loop at RIP.
    LastHandler(usize),
    /// Calls the handler of `k`, a Jcc that is taken, then leaves to the run loop at RIP; the rest of the
    /// block does not run.
    JumpHandler(usize),
    /// The jump of the Jcc `k`, which is taken.
    Taken(usize),
    /// Leaves to the run loop, because the budget does not suffice for the block.
    NoBudget,
}

/// A block that is being translated.
pub(crate) struct BlockAssembler<'a> {
    pub(crate) ops: VecAssembler<X64Relocation>,
    slots: &'a mut SlotTable,
    start: usize,
    pub(crate) insns: &'a [Insn],
    /// Cold code that is still to be emitted, with its label.
    cold: Vec<(DynamicLabel, ColdCode)>,
    /// By label number: does anything jump there?
    used: Vec<bool>,
}

impl<'a> BlockAssembler<'a> {
    pub(crate) fn new(slots: &'a mut SlotTable, start: usize, insns: &'a [Insn]) -> BlockAssembler<'a> {
        BlockAssembler { ops: VecAssembler::new(0), slots, start, insns, cold: Vec::new(), used: Vec::new() }
    }

    /// Counts the block's instructions down from the budget, before all else.
    pub(crate) fn count_block(&mut self) {
        let count = self.insns.len() as i32;
        let no_budget = self.cold(ColdCode::NoBudget);
        self.set_used(no_budget);
        dynasm!(self.ops
            ; .arch x64
            ; sub r15, count
            ; js =>no_budget
        );
    }

    /// Emits the cold code; returns all of the block's code.
    pub(crate) fn finish(mut self) -> Option<Vec<u8>> {
        self.emit_cold();
        self.ops.finalize().ok()
    }

    /// Offset of the end of instruction `k` from the block's start.
    pub(crate) fn end_of(&self, k: usize) -> i64 {
        self.insns[k].offset as i64 + self.insns[k].len as i64
    }

    /// A label for cold code, which is emitted if something jumps there.
    fn cold(&mut self, what: ColdCode) -> DynamicLabel {
        let label = self.ops.new_dynamic_label();
        self.cold.push((label, what));
        label
    }

    /// The label of the slow path of instruction `k`, and the label where that returns: the caller sets it at
    /// the instruction's end.
    pub(crate) fn slow(&mut self, k: usize) -> (DynamicLabel, DynamicLabel) {
        let back = self.ops.new_dynamic_label();
        (self.cold(ColdCode::Handler(k, back)), back)
    }

    /// The label of the slow path of the block's last instruction, which does not return.
    pub(crate) fn slow_last(&mut self, k: usize) -> DynamicLabel {
        self.cold(ColdCode::LastHandler(k))
    }

    /// The label to which the Jcc `k` jumps when it is taken.
    pub(crate) fn taken(&mut self, k: usize) -> DynamicLabel {
        let label = self.cold(ColdCode::Taken(k));
        self.set_used(label);
        label
    }

    /// Notes that something jumps to `label`, so that its code has to be emitted.
    fn set_used(&mut self, label: DynamicLabel) {
        let n = label.get_id();
        self.used.resize(self.used.len().max(n + 1), false);
        self.used[n] = true;
    }

    pub(crate) fn is_used(&self, label: DynamicLabel) -> bool {
        self.used.get(label.get_id()).is_some_and(|used| *used)
    }

    fn emit_cold(&mut self) {
        // Cold code may need more cold code.
        while let Some((label, cold)) = self.cold.pop() {
            if !self.is_used(label) {
                continue;
            }
            dynasm!(self.ops ; .arch x64 ; =>label);
            match cold {
                ColdCode::Handler(k, back) => {
                    self.call_handler(k);
                    dynasm!(self.ops ; .arch x64 ; jmp =>back);
                }
                ColdCode::LastHandler(k) => {
                    self.set_rip_to_end();
                    self.call_handler(k);
                    self.leave_at_rip();
                }
                ColdCode::JumpHandler(k) => {
                    self.call_handler(k);
                    self.give_back(k);
                    self.leave_at_rip();
                }
                ColdCode::Taken(k) => {
                    let to = self.insns[k].imm as i64;
                    if self.in_page(to) {
                        self.give_back(k);
                        self.jump_in_page(to);
                    } else {
                        let miss = self.cold(ColdCode::JumpHandler(k));
                        self.target(to);
                        self.look_up(miss);
                        self.give_back(k);
                        self.jump_to_found();
                    }
                }
                ColdCode::NoBudget => {
                    let count = self.insns.len() as i32;
                    dynasm!(self.ops
                        ; .arch x64
                        ; add r15, count
                        ; jmp QWORD [r12 + 8 * fixed::LEAVE.0 as i32]
                    );
                }
            }
        }
    }

    /// Gives the budget back for the instructions after `k`, which do not run.
    fn give_back(&mut self, k: usize) {
        let rest = (self.insns.len() - 1 - k) as i32;
        if rest > 0 {
            dynasm!(self.ops ; .arch x64 ; add r15, rest);
        }
    }

    pub(crate) fn call_handler(&mut self, k: usize) {
        let insn = &self.insns[k] as *const Insn as i64;
        let rest = (self.insns.len() - 1 - k) as i32;
        dynasm!(self.ops
            ; .arch x64
            ; mov rcx, QWORD insn
            ; mov ebp, rest
            ; call QWORD [r12 + 8 * fixed::PERFORM.0 as i32]
        );
    }

    /// Sets RIP to the end of the block, as the handler of a block's last instruction expects it.
    pub(crate) fn set_rip_to_end(&mut self) {
        let behind = self.end_of(self.insns.len() - 1);
        self.target(behind);
        dynasm!(self.ops ; .arch x64 ; mov [rbx + LAYOUT.rip], rax);
    }

    pub(crate) fn leave_at_rip(&mut self) {
        dynasm!(self.ops ; .arch x64 ; jmp QWORD [r12 + 8 * fixed::LEAVE_AT_RIP.0 as i32]);
    }

    /// Puts the linear address `to` bytes from the block's start into RAX. May change RCX.
    pub(crate) fn target(&mut self, to: i64) {
        let base = register(RIP_BASE);
        dynasm!(self.ops ; .arch x64 ; mov rax, [rbx + base]);
        match i32::try_from(to) {
            Ok(to) => dynasm!(self.ops ; .arch x64 ; add rax, to),
            Err(_) => dynasm!(self.ops ; .arch x64 ; mov rcx, QWORD to ; add rax, rcx),
        }
    }

    /// Is the address `to` bytes from the block's start in the block's page?
    pub(crate) fn in_page(&self, to: i64) -> bool {
        (0..4096).contains(&((self.start % 4096) as i64 + to))
    }

    /// Jumps to the block `to` bytes from this one's start, in the same page.
    pub(crate) fn jump_in_page(&mut self, to: i64) {
        let slot = self.slots.slot((self.start as i64 + to) as usize);
        let base = register(RIP_BASE);
        dynasm!(self.ops
            ; .arch x64
            ; add QWORD [rbx + base], to as i32
            ; jmp QWORD [r12 + 8 * slot.0 as i32]
        );
    }

    /// Goes on at the end of the block, whose last instruction does not jump.
    pub(crate) fn fall_through(&mut self) {
        let behind = self.end_of(self.insns.len() - 1);
        if self.in_page(behind) {
            return self.jump_in_page(behind);
        }
        self.set_rip_to_end();
        self.leave_at_rip();
    }

    /// Looks up the target in RAX in the jump cache: jumps to `miss`, or puts what [`Self::jump_to_found`]
    /// needs into R10. Changes RCX, RDX, RSI.
    pub(crate) fn look_up(&mut self, miss: DynamicLabel) {
        self.set_used(miss);
        let (page, frame) = (offset_of!(TlbEntry, page) as i32, offset_of!(TlbEntry, frame) as i32);
        dynasm!(self.ops
            ; .arch x64
            ; mov rcx, rax
            ; shr rcx, 11
            ; xor ecx, eax
            ; and ecx, JUMPS as i32 - 1
            ; shl ecx, 5
            ; add rcx, [rsp + JUMPS_AT]
            ; cmp [rcx + offset_of!(Jump, rip) as i32], rax
            ; jne =>miss
            ; mov rdx, rax
            ; shr rdx, 12
            ; movzx esi, dl
            ; shl esi, 4
            ; add rsi, [rsp + CODE_TLB]
            ; cmp [rsi + page], rdx
            ; jne =>miss
            ; mov rdx, [rcx + offset_of!(Jump, frame) as i32]
            ; cmp [rsi + frame], rdx
            ; jne =>miss
            ; mov r10, [rcx + offset_of!(Jump, slot) as i32]
        );
    }

    /// Jumps to the target in RAX, which [`Self::look_up`] has found.
    pub(crate) fn jump_to_found(&mut self) {
        let base = register(RIP_BASE);
        dynasm!(self.ops
            ; .arch x64
            ; mov [rbx + base], rax
            ; jmp QWORD [r10]
        );
    }

    /// Loads guest register `r` into host register `h`, zero-extended.
    pub(crate) fn get(&mut self, width: usize, h: u8, r: u8) {
        let at = register(r);
        match width {
            BYTE => dynasm!(self.ops ; .arch x64 ; movzx Rd(h), BYTE [rbx + at]),
            WORD => dynasm!(self.ops ; .arch x64 ; movzx Rd(h), WORD [rbx + at]),
            DOUBLE => dynasm!(self.ops ; .arch x64 ; mov Rd(h), [rbx + at]),
            _ => dynasm!(self.ops ; .arch x64 ; mov Rq(h), [rbx + at]),
        }
    }

    /// Stores host register `h` into guest register `r`. With 32 bits the upper half of `h` has to be 0.
    pub(crate) fn put(&mut self, width: usize, r: u8, h: u8) {
        let at = register(r);
        match width {
            BYTE => dynasm!(self.ops ; .arch x64 ; mov [rbx + at], Rb(h)),
            WORD => dynasm!(self.ops ; .arch x64 ; mov [rbx + at], Rw(h)),
            _ => dynasm!(self.ops ; .arch x64 ; mov [rbx + at], Rq(h)),
        }
    }

    /// Loads an immediate of this width into host register `h`, zero-extended.
    pub(crate) fn immediate(&mut self, width: usize, h: u8, imm: u64) {
        let v = match width {
            BYTE => imm as u8 as i64,
            WORD => imm as u16 as i64,
            DOUBLE => imm as u32 as i64,
            _ => imm as i64,
        };
        if let Ok(v) = i32::try_from(v) {
            dynasm!(self.ops ; .arch x64 ; mov Rq(h), v);
        } else if let Ok(v) = u32::try_from(v) {
            dynasm!(self.ops ; .arch x64 ; mov Rd(h), v as i32);
        } else {
            dynasm!(self.ops ; .arch x64 ; mov Rq(h), QWORD v);
        }
    }

    /// Puts the effective address of the memory operand into RAX. Changes RCX.
    pub(crate) fn effective_address(&mut self, i: &Insn) {
        if i.base == ZERO {
            dynasm!(self.ops ; .arch x64 ; xor eax, eax);
        } else {
            self.get(QUAD, RAX, i.base);
        }
        if i.index != ZERO {
            self.get(QUAD, RCX, i.index);
            match i.scale & 3 {
                0 => dynasm!(self.ops ; .arch x64 ; lea rax, [rax + rcx + i.disp]),
                1 => dynasm!(self.ops ; .arch x64 ; lea rax, [rax + rcx * 2 + i.disp]),
                2 => dynasm!(self.ops ; .arch x64 ; lea rax, [rax + rcx * 4 + i.disp]),
                _ => dynasm!(self.ops ; .arch x64 ; lea rax, [rax + rcx * 8 + i.disp]),
            }
        } else if i.disp != 0 {
            dynasm!(self.ops ; .arch x64 ; add rax, i.disp);
        }
        if i.scale & ADDR32 != 0 {
            dynasm!(self.ops ; .arch x64 ; mov eax, eax);
        }
    }

    /// Puts the RAM offset of the memory operand into RDX, or jumps to `slow`. Changes RAX and RCX.
    pub(crate) fn operand(&mut self, i: &Insn, width: usize, access: OperandAccess, slow: DynamicLabel) {
        self.effective_address(i);
        if i.seg != ZERO {
            let seg = register(i.seg);
            dynasm!(self.ops ; .arch x64 ; add rax, [rbx + seg]);
        }
        self.probe(width, access, slow);
    }

    /// Puts the RAM offset of the linear address in RAX into RDX, or jumps to `slow` if the fast TLB does not
    /// allow the access. Changes RAX and RCX.
    pub(crate) fn probe(&mut self, width: usize, access: OperandAccess, slow: DynamicLabel) {
        self.set_used(slow);
        let tag = if access == OperandAccess::Read { FAST_LAYOUT.read } else { FAST_LAYOUT.write };
        dynasm!(self.ops
            ; .arch x64
            ; mov ecx, eax
            ; shr ecx, 12
            ; and ecx, DATA_ENTRIES as i32 - 1
            ; lea rcx, [rcx + rcx * 2]
        );
        // An access that crosses into the next page is checked by its last byte: the entry cannot have that
        // page.
        if width == BYTE {
            dynasm!(self.ops ; .arch x64 ; mov rdx, rax);
        } else {
            let last = (1 << width) - 1;
            dynasm!(self.ops ; .arch x64 ; lea rdx, [rax + last]);
        }
        dynasm!(self.ops
            ; .arch x64
            ; shr rdx, 12
            ; cmp [r13 + rcx * 8 + tag], rdx
            ; jne =>slow
            ; and eax, 4095
            ; mov rdx, [r13 + rcx * 8 + FAST_LAYOUT.ram]
            ; add rdx, rax
        );
    }

    /// Loads host register `h` from offset RDX in RAM, zero-extended.
    pub(crate) fn load(&mut self, width: usize, h: u8) {
        match width {
            BYTE => dynasm!(self.ops ; .arch x64 ; movzx Rd(h), BYTE [r14 + rdx]),
            WORD => dynasm!(self.ops ; .arch x64 ; movzx Rd(h), WORD [r14 + rdx]),
            DOUBLE => dynasm!(self.ops ; .arch x64 ; mov Rd(h), [r14 + rdx]),
            _ => dynasm!(self.ops ; .arch x64 ; mov Rq(h), [r14 + rdx]),
        }
    }

    /// Stores host register `h` at offset RDX in RAM.
    pub(crate) fn store(&mut self, width: usize, h: u8) {
        match width {
            BYTE => dynasm!(self.ops ; .arch x64 ; mov [r14 + rdx], Rb(h)),
            WORD => dynasm!(self.ops ; .arch x64 ; mov [r14 + rdx], Rw(h)),
            DOUBLE => dynasm!(self.ops ; .arch x64 ; mov [r14 + rdx], Rd(h)),
            _ => dynasm!(self.ops ; .arch x64 ; mov [r14 + rdx], Rq(h)),
        }
    }
}

/// Offset of guest register `r` in the [`soft_cpu::Cpu`].
pub(crate) fn register(r: u8) -> i32 {
    let high = (r & HIGH_BYTE != 0) as i32;
    LAYOUT.regs + 8 * (r & !HIGH_BYTE) as i32 + high
}
