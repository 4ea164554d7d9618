//! Moves between registers and memory, extensions, and the stack.

use dynasmrt::{DynamicLabel, DynasmApi, DynasmLabelApi, dynasm};
use iced_x86::{Instruction, Mnemonic};
use soft_cpu::state::reg;

use super::flags::condition;
use crate::assembler::host::*;
use crate::assembler::{BlockAssembler, OperandAccess, register};
use crate::effect::{BYTE, DOUBLE, OperandKind, QUAD, WORD, kind, width};

impl BlockAssembler<'_> {
    /// Loads operand `n` (a register, the memory operand or an immediate) into host register `h`.
    pub(super) fn source(
        &mut self,
        k: usize,
        ins: &Instruction,
        n: u32,
        w: usize,
        h: u8,
        slow: DynamicLabel,
    ) {
        let i = self.insns[k];
        match kind(ins, n) {
            OperandKind::Register => self.get(w, h, if n == 0 { i.dst } else { i.src }),
            OperandKind::Memory => {
                self.operand(&i, w, OperandAccess::Read, slow);
                self.load(w, h);
            }
            _ => self.immediate(w, h, i.imm),
        }
    }

    pub(super) fn mov(&mut self, k: usize, ins: &Instruction) {
        let (i, w) = (self.insns[k], width(ins, 0));
        let (slow, back) = self.slow(k);
        if kind(ins, 0) == OperandKind::Memory {
            self.operand(&i, w, OperandAccess::Write, slow);
            self.source(k, ins, 1, w, RAX, slow);
            self.store(w, RAX);
        } else {
            self.source(k, ins, 1, w, RAX, slow);
            self.put(w, i.dst, RAX);
        }
        dynasm!(self.ops ; .arch x64 ; =>back);
    }

    pub(super) fn extend(&mut self, k: usize, ins: &Instruction) {
        let (i, from, to) = (self.insns[k], width(ins, 1), width(ins, 0));
        let (slow, back) = self.slow(k);
        self.source(k, ins, 1, from, RAX, slow);
        if ins.mnemonic() != Mnemonic::Movzx {
            self.sign_extend(from);
            if to == DOUBLE {
                dynasm!(self.ops ; .arch x64 ; mov eax, eax);
            }
        }
        self.put(to, i.dst, RAX);
        dynasm!(self.ops ; .arch x64 ; =>back);
    }

    /// Sign-extends the value of width `from` in RAX to 64 bits.
    pub(super) fn sign_extend(&mut self, from: usize) {
        match from {
            BYTE => dynasm!(self.ops ; .arch x64 ; movsx rax, al),
            WORD => dynasm!(self.ops ; .arch x64 ; movsx rax, ax),
            DOUBLE => dynasm!(self.ops ; .arch x64 ; movsxd rax, eax),
            _ => {}
        }
    }

    pub(super) fn push(&mut self, k: usize, ins: &Instruction) {
        let (slow, back) = self.slow(k);
        self.get(QUAD, RAX, reg::RSP);
        dynasm!(self.ops ; .arch x64 ; sub rax, 8 ; mov rdi, rax);
        self.probe(QUAD, OperandAccess::Write, slow);
        self.source(k, ins, 0, QUAD, RAX, slow);
        self.store(QUAD, RAX);
        self.put(QUAD, reg::RSP, RDI);
        dynasm!(self.ops ; .arch x64 ; =>back);
    }

    pub(super) fn cmov(&mut self, k: usize, ins: &Instruction) {
        let (i, w) = (self.insns[k], width(ins, 0));
        let (slow, back) = self.slow(k);
        self.source(k, ins, 1, w, RSI, slow);
        self.get(w, RDI, i.dst);
        let cc = self.evaluate(condition(ins));
        // CMOVcc RDI, RSI
        self.ops.extend([0x48, 0x0f, 0x40 + cc, 0xfe]);
        self.put(QUAD, i.dst, RDI);
        dynasm!(self.ops ; .arch x64 ; =>back);
    }
    /// CDQE, CWDE, CQO, CDQ.
    pub(super) fn extend_accumulator(&mut self, ins: &Instruction) {
        match ins.mnemonic() {
            Mnemonic::Cdqe => {
                self.get(DOUBLE, RAX, reg::RAX);
                dynasm!(self.ops ; .arch x64 ; movsxd rax, eax);
                self.put(QUAD, reg::RAX, RAX);
            }
            Mnemonic::Cwde => {
                self.get(WORD, RAX, reg::RAX);
                dynasm!(self.ops ; .arch x64 ; movsx eax, ax);
                self.put(QUAD, reg::RAX, RAX);
            }
            Mnemonic::Cqo => {
                self.get(QUAD, RAX, reg::RAX);
                dynasm!(self.ops ; .arch x64 ; sar rax, 63);
                self.put(QUAD, reg::RDX, RAX);
            }
            _ => {
                self.get(DOUBLE, RAX, reg::RAX);
                dynasm!(self.ops ; .arch x64 ; sar eax, 31);
                self.put(QUAD, reg::RDX, RAX);
            }
        }
    }

    pub(super) fn pop(&mut self, k: usize) {
        let (slow, back) = self.slow(k);
        self.get(QUAD, RAX, reg::RSP);
        self.probe(QUAD, OperandAccess::Read, slow);
        self.load(QUAD, RAX);
        let stack = register(reg::RSP);
        dynasm!(self.ops ; .arch x64 ; add QWORD [rbx + stack], 8);
        self.put(QUAD, self.insns[k].dst, RAX);
        dynasm!(self.ops ; .arch x64 ; =>back);
    }

    pub(super) fn leave(&mut self, k: usize) {
        let (slow, back) = self.slow(k);
        self.get(QUAD, RAX, reg::RBP);
        self.probe(QUAD, OperandAccess::Read, slow);
        self.load(QUAD, RDI);
        self.get(QUAD, RAX, reg::RBP);
        dynasm!(self.ops ; .arch x64 ; add rax, 8);
        self.put(QUAD, reg::RSP, RAX);
        self.put(QUAD, reg::RBP, RDI);
        dynasm!(self.ops ; .arch x64 ; =>back);
    }
}
