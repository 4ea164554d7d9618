//! Unconditional transfers of control: JMP, CALL, RET. Each ends its block.

use dynasmrt::{DynasmApi, dynasm};
use iced_x86::Instruction;
use soft_cpu::state::{RIP_BASE, reg};

use crate::assembler::host::*;
use crate::assembler::{BlockAssembler, OperandAccess, register};
use crate::effect::{OperandKind, QUAD, kind};

impl BlockAssembler<'_> {
    pub(super) fn jump(&mut self, k: usize, ins: &Instruction) {
        let i = self.insns[k];
        let slow = self.slow_last(k);
        if kind(ins, 0) == OperandKind::Branch {
            let to = self.end_of(k).wrapping_add(i.imm as i64);
            if self.in_page(to) {
                return self.jump_in_page(to);
            }
            self.target(to);
        } else {
            self.source(k, ins, 0, QUAD, RAX, slow);
        }
        self.look_up(slow);
        self.jump_to_found();
    }

    pub(super) fn call(&mut self, k: usize, ins: &Instruction) {
        let i = self.insns[k];
        let slow = self.slow_last(k);
        let to = self.end_of(k).wrapping_add(i.imm as i64);
        let direct = kind(ins, 0) == OperandKind::Branch;
        let in_page = direct && self.in_page(to);
        if !in_page {
            if direct {
                self.target(to);
            } else {
                self.source(k, ins, 0, QUAD, RAX, slow);
            }
            self.look_up(slow);
            dynasm!(self.ops ; .arch x64 ; mov r11, rax);
        }
        self.get(QUAD, RAX, reg::RSP);
        dynasm!(self.ops ; .arch x64 ; sub rax, 8 ; mov rdi, rax);
        self.probe(QUAD, OperandAccess::Write, slow);
        let (base, end) = (register(RIP_BASE), self.end_of(k) as i32);
        dynasm!(self.ops ; .arch x64 ; mov rax, [rbx + base] ; add rax, end);
        self.store(QUAD, RAX);
        self.put(QUAD, reg::RSP, RDI);
        if in_page {
            self.jump_in_page(to);
        } else {
            dynasm!(self.ops ; .arch x64 ; mov rax, r11);
            self.jump_to_found();
        }
    }
    pub(super) fn ret(&mut self, k: usize) {
        let slow = self.slow_last(k);
        self.get(QUAD, RAX, reg::RSP);
        self.probe(QUAD, OperandAccess::Read, slow);
        self.load(QUAD, RAX);
        self.look_up(slow);
        let (stack, more) = (register(reg::RSP), 8 + (self.insns[k].imm & 0xffff) as i32);
        dynasm!(self.ops ; .arch x64 ; add QWORD [rbx + stack], more);
        self.jump_to_found();
    }
}
