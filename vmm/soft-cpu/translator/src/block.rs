//! A block's code: its frame, the ways in and out, and memory operands. What instructions do is in [`crate::ops`].

use std::mem::offset_of;

use dynasmrt::x64::X64Relocation;
use dynasmrt::{DynamicLabel, DynasmApi, DynasmLabelApi, VecAssembler, dynasm};
use iced_x86::Instruction;
use soft_cpu::insn::{ADDR32, HIGH_BYTE, Insn};
use soft_cpu::state::{RIP_BASE, ZERO};
use soft_cpu::tier::{FAST_LAYOUT, LAYOUT};
use soft_cpu::tlb::{CODE_ENTRIES, DATA_ENTRIES, TlbEntry};

use crate::ops::{Effect, effect};
use crate::stubs::{CODE_TLB, JUMPS as JUMPS_AT};
use crate::{JUMPS, Jump, Native, fixed};

// What the code below shifts and masks by.
const _: () = assert!(FAST_LAYOUT.size == 24 && size_of::<Jump>() == 32 && size_of::<TlbEntry>() == 16);
const _: () = assert!(CODE_ENTRIES == 256);

/// Operand widths as binary logarithms of bytes.
pub(crate) const BYTE: usize = 0;
pub(crate) const WORD: usize = 1;
pub(crate) const DOUBLE: usize = 2;
pub(crate) const QUAD: usize = 3;

/// Host registers by number.
pub(crate) mod host {
    pub(crate) const RAX: u8 = 0;
    pub(crate) const RCX: u8 = 1;
    pub(crate) const RSI: u8 = 6;
    pub(crate) const RDI: u8 = 7;
}
use host::*;

/// What happens to a memory operand.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
}

/// Code that lies behind the block's.
enum Cold {
    /// The handler of instruction `k` does all of it; then the code at the label goes on.
    Handler(usize, DynamicLabel),
    /// It is the block's last: then the run loop goes on at RIP.
    LastHandler(usize),
    /// It is a Jcc whose jump is made: the same, without the rest of the block.
    JumpHandler(usize),
    /// The jump of the Jcc `k`.
    Taken(usize),
    /// The budget does not suffice.
    NoBudget,
}

/// A block in translation.
pub(crate) struct Block<'a> {
    pub(crate) ops: VecAssembler<X64Relocation>,
    native: &'a mut Native,
    start: usize,
    pub(crate) insns: &'a [Insn],
    cold: Vec<(DynamicLabel, Cold)>,
    /// The labels of `cold` that something jumps to, by number.
    used: Vec<bool>,
}

impl<'a> Block<'a> {
    pub(crate) fn new(native: &'a mut Native, start: usize, insns: &'a [Insn]) -> Block<'a> {
        Block { ops: VecAssembler::new(0), native, start, insns, cold: Vec::new(), used: Vec::new() }
    }

    /// The code. `leaves`: the last instruction may change RIP.
    pub(crate) fn translate(mut self, decoded: &[Instruction], leaves: bool) -> Option<Vec<u8>> {
        let count = self.insns.len() as i32;
        let no_budget = self.cold(Cold::NoBudget);
        self.will_use(no_budget);
        dynasm!(self.ops
            ; .arch x64
            ; sub r15, count
            ; js =>no_budget
        );
        let effects: Vec<Effect> =
            decoded.iter().zip(self.insns).map(|(ins, insn)| effect(ins, insn)).collect();
        let live = live_flags(decoded, &effects);
        let mut left = false;
        for (k, ins) in decoded.iter().enumerate() {
            let last = leaves && k + 1 == decoded.len();
            if effects[k] == Effect::Handler {
                if last {
                    self.set_rip_behind();
                }
                self.call_handler(k);
                if last {
                    self.leave_at_rip();
                    left = true;
                }
            } else {
                let fuses = effects.get(k + 1) == Some(&Effect::Jcc);
                let fused = k > 0 && effects[k - 1] == Effect::Fusing;
                left |= self.instruction(k, ins, live[k], fuses, fused);
            }
        }
        if !left {
            self.fall_through();
        }
        self.emit_cold();
        self.ops.finalize().ok()
    }

    /// Offset from the block's start of what lies behind instruction `k`.
    pub(crate) fn behind(&self, k: usize) -> i64 {
        self.insns[k].offset as i64 + self.insns[k].len as i64
    }

    fn cold(&mut self, what: Cold) -> DynamicLabel {
        let label = self.ops.new_dynamic_label();
        self.cold.push((label, what));
        label
    }

    /// Where instruction `k` goes when its quick way is not open; it comes back to the second label, which is to be set behind it.
    pub(crate) fn slow(&mut self, k: usize) -> (DynamicLabel, DynamicLabel) {
        let back = self.ops.new_dynamic_label();
        (self.cold(Cold::Handler(k, back)), back)
    }

    /// The same for the last instruction.
    pub(crate) fn slow_last(&mut self, k: usize) -> DynamicLabel {
        self.cold(Cold::LastHandler(k))
    }

    /// Where the Jcc `k` goes when it jumps.
    pub(crate) fn taken(&mut self, k: usize) -> DynamicLabel {
        let label = self.cold(Cold::Taken(k));
        self.will_use(label);
        label
    }

    /// Something jumps to a label: what is behind it has to be there.
    fn will_use(&mut self, label: DynamicLabel) {
        let n = label.get_id();
        self.used.resize(self.used.len().max(n + 1), false);
        self.used[n] = true;
    }

    pub(crate) fn is_used(&self, label: DynamicLabel) -> bool {
        self.used.get(label.get_id()).is_some_and(|used| *used)
    }

    fn emit_cold(&mut self) {
        // More may come up on the way.
        while let Some((label, cold)) = self.cold.pop() {
            if !self.is_used(label) {
                continue;
            }
            dynasm!(self.ops ; .arch x64 ; =>label);
            match cold {
                Cold::Handler(k, back) => {
                    self.call_handler(k);
                    dynasm!(self.ops ; .arch x64 ; jmp =>back);
                }
                Cold::LastHandler(k) => {
                    self.set_rip_behind();
                    self.call_handler(k);
                    self.leave_at_rip();
                }
                Cold::JumpHandler(k) => {
                    self.call_handler(k);
                    self.give_back(k);
                    self.leave_at_rip();
                }
                Cold::Taken(k) => {
                    let to = self.insns[k].imm as i64;
                    if self.in_page(to) {
                        self.give_back(k);
                        self.jump_in_page(to);
                    } else {
                        let miss = self.cold(Cold::JumpHandler(k));
                        self.target(to);
                        self.look_up(miss);
                        self.give_back(k);
                        self.jump_to_found();
                    }
                }
                Cold::NoBudget => {
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

    /// Instructions behind `k` do not run.
    fn give_back(&mut self, k: usize) {
        let rest = (self.insns.len() - 1 - k) as i32;
        if rest > 0 {
            dynasm!(self.ops ; .arch x64 ; add r15, rest);
        }
    }

    fn call_handler(&mut self, k: usize) {
        let insn = &self.insns[k] as *const Insn as i64;
        let rest = (self.insns.len() - 1 - k) as i32;
        dynasm!(self.ops
            ; .arch x64
            ; mov rcx, QWORD insn
            ; mov ebp, rest
            ; call QWORD [r12 + 8 * fixed::PERFORM.0 as i32]
        );
    }

    /// RIP behind the block, as handlers expect it that end one.
    fn set_rip_behind(&mut self) {
        let behind = self.behind(self.insns.len() - 1);
        self.target(behind);
        dynasm!(self.ops ; .arch x64 ; mov [rbx + LAYOUT.rip], rax);
    }

    fn leave_at_rip(&mut self) {
        dynasm!(self.ops ; .arch x64 ; jmp QWORD [r12 + 8 * fixed::LEAVE_AT_RIP.0 as i32]);
    }

    /// RAX: the linear address `to` bytes from the block's start.
    pub(crate) fn target(&mut self, to: i64) {
        let base = register(RIP_BASE);
        dynasm!(self.ops ; .arch x64 ; mov rax, [rbx + base]);
        match i32::try_from(to) {
            Ok(to) => dynasm!(self.ops ; .arch x64 ; add rax, to),
            Err(_) => dynasm!(self.ops ; .arch x64 ; mov rcx, QWORD to ; add rax, rcx),
        }
    }

    /// Is what lies `to` bytes from the block's start in the same page?
    pub(crate) fn in_page(&self, to: i64) -> bool {
        (0..4096).contains(&((self.start % 4096) as i64 + to))
    }

    /// Goes on in the same page.
    pub(crate) fn jump_in_page(&mut self, to: i64) {
        let slot = self.native.slot((self.start as i64 + to) as usize);
        let base = register(RIP_BASE);
        dynasm!(self.ops
            ; .arch x64
            ; add QWORD [rbx + base], to as i32
            ; jmp QWORD [r12 + 8 * slot.0 as i32]
        );
    }

    /// Goes on behind the block, where its last instruction does not jump.
    fn fall_through(&mut self) {
        let behind = self.behind(self.insns.len() - 1);
        if self.in_page(behind) {
            return self.jump_in_page(behind);
        }
        self.set_rip_behind();
        self.leave_at_rip();
    }

    /// Looks up the target in RAX; R10 is then what [`Block::jump_to_found`] needs. Changes RCX, RDX, RSI.
    pub(crate) fn look_up(&mut self, miss: DynamicLabel) {
        self.will_use(miss);
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

    /// Goes on at the target in RAX.
    pub(crate) fn jump_to_found(&mut self) {
        let base = register(RIP_BASE);
        dynasm!(self.ops
            ; .arch x64
            ; mov [rbx + base], rax
            ; jmp QWORD [r10]
        );
    }

    /// Host register `h`: the value of register operand `r`, zero-extended.
    pub(crate) fn get(&mut self, width: usize, h: u8, r: u8) {
        let at = register(r);
        match width {
            BYTE => dynasm!(self.ops ; .arch x64 ; movzx Rd(h), BYTE [rbx + at]),
            WORD => dynasm!(self.ops ; .arch x64 ; movzx Rd(h), WORD [rbx + at]),
            DOUBLE => dynasm!(self.ops ; .arch x64 ; mov Rd(h), [rbx + at]),
            _ => dynasm!(self.ops ; .arch x64 ; mov Rq(h), [rbx + at]),
        }
    }

    /// Writes host register `h` to register operand `r`; for 32 bits its upper half has to be 0.
    pub(crate) fn put(&mut self, width: usize, r: u8, h: u8) {
        let at = register(r);
        match width {
            BYTE => dynasm!(self.ops ; .arch x64 ; mov [rbx + at], Rb(h)),
            WORD => dynasm!(self.ops ; .arch x64 ; mov [rbx + at], Rw(h)),
            _ => dynasm!(self.ops ; .arch x64 ; mov [rbx + at], Rq(h)),
        }
    }

    /// Host register `h`: the immediate, zero-extended from its width.
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

    /// RAX: what LEA gives. Changes RCX.
    pub(crate) fn offset(&mut self, i: &Insn) {
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

    /// RDX: offset in RAM of the memory operand. Changes RAX and RCX.
    pub(crate) fn operand(&mut self, i: &Insn, width: usize, access: Access, slow: DynamicLabel) {
        self.offset(i);
        if i.seg != ZERO {
            let seg = register(i.seg);
            dynasm!(self.ops ; .arch x64 ; add rax, [rbx + seg]);
        }
        self.probe(width, access, slow);
    }

    /// RDX: offset in RAM of the linear address in RAX. Changes RAX and RCX.
    pub(crate) fn probe(&mut self, width: usize, access: Access, slow: DynamicLabel) {
        self.will_use(slow);
        let tag = if access == Access::Read { FAST_LAYOUT.read } else { FAST_LAYOUT.write };
        dynasm!(self.ops
            ; .arch x64
            ; mov ecx, eax
            ; shr ecx, 12
            ; and ecx, DATA_ENTRIES as i32 - 1
            ; lea rcx, [rcx + rcx * 2]
        );
        // What goes on in the next page ends in one that the entry cannot have.
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

    /// Host register `h`: what lies at offset RDX in RAM, zero-extended.
    pub(crate) fn load(&mut self, width: usize, h: u8) {
        match width {
            BYTE => dynasm!(self.ops ; .arch x64 ; movzx Rd(h), BYTE [r14 + rdx]),
            WORD => dynasm!(self.ops ; .arch x64 ; movzx Rd(h), WORD [r14 + rdx]),
            DOUBLE => dynasm!(self.ops ; .arch x64 ; mov Rd(h), [r14 + rdx]),
            _ => dynasm!(self.ops ; .arch x64 ; mov Rq(h), [r14 + rdx]),
        }
    }

    /// Writes host register `h` at offset RDX in RAM.
    pub(crate) fn store(&mut self, width: usize, h: u8) {
        match width {
            BYTE => dynasm!(self.ops ; .arch x64 ; mov [r14 + rdx], Rb(h)),
            WORD => dynasm!(self.ops ; .arch x64 ; mov [r14 + rdx], Rw(h)),
            DOUBLE => dynasm!(self.ops ; .arch x64 ; mov [r14 + rdx], Rd(h)),
            _ => dynasm!(self.ops ; .arch x64 ; mov [r14 + rdx], Rq(h)),
        }
    }
}

/// Offset of register operand `r` in the CPU.
pub(crate) fn register(r: u8) -> i32 {
    let high = (r & HIGH_BYTE != 0) as i32;
    LAYOUT.regs + 8 * (r & !HIGH_BYTE) as i32 + high
}

/// Whether the flags behind each instruction can be seen: by what reads them, or because it, or one behind it, may stop before
/// one that sets them all.
fn live_flags(decoded: &[Instruction], effects: &[Effect]) -> Vec<bool> {
    let mut live = vec![true; decoded.len()];
    for k in (1..decoded.len()).rev() {
        live[k - 1] = match effects[k] {
            Effect::Plain => live[k],
            Effect::SetsFlags => false,
            Effect::Fusing if !touches_memory(&decoded[k]) => false,
            _ => true,
        };
    }
    live
}

fn touches_memory(ins: &Instruction) -> bool {
    (0..ins.op_count()).any(|n| ins.op_kind(n) == iced_x86::OpKind::Memory)
}
