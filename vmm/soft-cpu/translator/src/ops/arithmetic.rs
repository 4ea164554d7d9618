//! Arithmetic, logic, shifts and IMUL.

use dynasmrt::{DynasmApi, DynasmLabelApi, dynasm};
use iced_x86::{Instruction, Mnemonic};
use soft_cpu::tier::LAYOUT;

use crate::assembler::host::*;
use crate::assembler::{BlockAssembler, OperandAccess};
use crate::effect::{DOUBLE, OperandKind, QUAD, kind, width};

impl BlockAssembler<'_> {
    /// ADD, SUB, AND, OR, XOR, CMP, TEST. Operand 0 is in RSI, operand 1 in RDI, the result in RAX; if
    /// operand 0 is in memory, RDX has its offset in RAM.
    pub(super) fn alu(&mut self, k: usize, ins: &Instruction, live: bool, fuses: bool) {
        use Mnemonic as M;
        let (i, w) = (self.insns[k], width(ins, 0));
        let (slow, back) = self.slow(k);
        let stores = !matches!(ins.mnemonic(), M::Cmp | M::Test);
        let to_memory = kind(ins, 0) == OperandKind::Memory;
        if to_memory {
            let access = if stores { OperandAccess::Write } else { OperandAccess::Read };
            self.operand(&i, w, access, slow);
            self.load(w, RSI);
            self.source(k, ins, 1, w, RDI, slow);
        } else {
            self.source(k, ins, 1, w, RDI, slow);
            self.get(w, RSI, i.dst);
        }
        match ins.mnemonic() {
            M::Add if w == QUAD => dynasm!(self.ops ; .arch x64 ; lea rax, [rsi + rdi]),
            M::Add => dynasm!(self.ops ; .arch x64 ; lea eax, [rsi + rdi]),
            M::Sub | M::Cmp => dynasm!(self.ops ; .arch x64 ; mov rax, rsi ; sub rax, rdi),
            M::And | M::Test => dynasm!(self.ops ; .arch x64 ; mov rax, rsi ; and rax, rdi),
            M::Or => dynasm!(self.ops ; .arch x64 ; mov rax, rsi ; or rax, rdi),
            _ => dynasm!(self.ops ; .arch x64 ; mov rax, rsi ; xor rax, rdi),
        }
        if w == DOUBLE {
            dynasm!(self.ops ; .arch x64 ; mov eax, eax);
        }
        if stores && to_memory {
            self.store(w, RAX);
        } else if stores {
            self.put(w, i.dst, RAX);
        }
        if live {
            self.alu_flags(ins.mnemonic(), w);
        }
        // The slow path, too, has to leave the host's flags for the Jcc; it returns without operands or
        // result in registers.
        if !fuses {
            dynasm!(self.ops ; .arch x64 ; =>back);
            return;
        }
        match ins.mnemonic() {
            M::Add => self.host_add(w),
            M::Sub | M::Cmp => self.host_cmp(w),
            _ => self.host_test(w),
        }
        if self.is_used(slow) {
            self.rejoin(back);
        }
    }

    /// The status flags, from operands and result where [`Self::alu`] has them.
    fn alu_flags(&mut self, mnemonic: Mnemonic, w: usize) {
        use Mnemonic as M;
        match mnemonic {
            M::Add => {
                // a & b | (a | b) & !r
                dynasm!(self.ops
                    ; .arch x64
                    ; mov r8, rsi
                    ; or r8, rdi
                    ; mov r9, rax
                    ; not r9
                    ; and r8, r9
                    ; mov r9, rsi
                    ; and r9, rdi
                    ; or r8, r9
                );
                self.set_carry(w);
            }
            M::Sub | M::Cmp => {
                // !a & b | !(a ^ b) & r
                dynasm!(self.ops
                    ; .arch x64
                    ; mov r9, rsi
                    ; xor r9, rdi
                    ; mov r8, r9
                    ; not r9
                    ; and r9, rax
                    ; and r8, rdi
                    ; or r8, r9
                );
                self.set_carry(w);
            }
            _ => dynasm!(self.ops ; .arch x64 ; mov QWORD [rbx + LAYOUT.carry], 0),
        }
        self.set_result(w);
    }

    pub(super) fn unary(&mut self, k: usize, ins: &Instruction, live: bool) {
        use Mnemonic as M;
        let (i, w) = (self.insns[k], width(ins, 0));
        let (slow, back) = self.slow(k);
        let to_memory = kind(ins, 0) == OperandKind::Memory;
        if to_memory {
            self.operand(&i, w, OperandAccess::Write, slow);
            self.load(w, RSI);
        } else {
            self.get(w, RSI, i.dst);
        }
        dynasm!(self.ops ; .arch x64 ; mov rax, rsi);
        match ins.mnemonic() {
            M::Inc => dynasm!(self.ops ; .arch x64 ; inc rax),
            M::Dec => dynasm!(self.ops ; .arch x64 ; dec rax),
            M::Neg => dynasm!(self.ops ; .arch x64 ; neg rax),
            _ => dynasm!(self.ops ; .arch x64 ; not rax),
        }
        if w == DOUBLE {
            dynasm!(self.ops ; .arch x64 ; mov eax, eax);
        }
        if to_memory {
            self.store(w, RAX);
        } else {
            self.put(w, i.dst, RAX);
        }
        if live && ins.mnemonic() != M::Not {
            dynasm!(self.ops ; .arch x64 ; mov r8, rsi);
            match ins.mnemonic() {
                // a & !r
                M::Inc => dynasm!(self.ops ; .arch x64 ; mov r9, rax ; not r9 ; and r8, r9),
                // !a & r
                M::Dec => dynasm!(self.ops ; .arch x64 ; not r8 ; and r8, rax),
                // a | r
                _ => dynasm!(self.ops ; .arch x64 ; or r8, rax),
            }
            if ins.mnemonic() == M::Neg {
                self.set_carry(w);
            } else {
                // CF stays, and OF is that of the new carry vector: if CF would change, flip both top bits.
                dynasm!(self.ops ; .arch x64 ; mov r11, [rbx + LAYOUT.carry]);
                self.set_carry(w);
                dynasm!(self.ops
                    ; .arch x64
                    ; xor r11, [rbx + LAYOUT.carry]
                    ; sar r11, 63
                    ; shl r11, 62
                    ; xor [rbx + LAYOUT.carry], r11
                );
            }
            self.set_result(w);
        }
        dynasm!(self.ops ; .arch x64 ; =>back);
    }

    /// A shift of a 32-bit or 64-bit register by a constant that is not 0.
    pub(super) fn shift(&mut self, k: usize, ins: &Instruction, live: bool) {
        use Mnemonic as M;
        let (i, w) = (self.insns[k], width(ins, 0));
        let (mask, msb) = if w == QUAD { (63, 63) } else { (31, 31) };
        let count = (i.imm & mask) as i8;
        self.get(w, RSI, i.dst);
        dynasm!(self.ops ; .arch x64 ; mov rax, rsi);
        match (ins.mnemonic(), w) {
            (M::Shl, QUAD) => dynasm!(self.ops ; .arch x64 ; shl rax, count),
            (M::Shl, _) => dynasm!(self.ops ; .arch x64 ; shl eax, count),
            (M::Shr, QUAD) => dynasm!(self.ops ; .arch x64 ; shr rax, count),
            (M::Shr, _) => dynasm!(self.ops ; .arch x64 ; shr eax, count),
            (_, QUAD) => dynasm!(self.ops ; .arch x64 ; sar rax, count),
            (..) => dynasm!(self.ops ; .arch x64 ; sar eax, count),
        }
        self.put(w, i.dst, RAX);
        if !live {
            return;
        }
        // R8: CF, the last bit shifted out. R9: OF, by the definition of soft-cpu's `shift`.
        let last_out = if ins.mnemonic() == M::Shl { msb + 1 - count } else { count - 1 };
        dynasm!(self.ops ; .arch x64 ; mov r8, rsi ; shr r8, last_out ; and r8d, 1);
        match ins.mnemonic() {
            M::Shl => dynasm!(self.ops
                ; .arch x64
                ; mov r9, rsi
                ; shr r9, msb - 1
                ; mov r11, r9
                ; shr r11, 1
                ; xor r9, r11
                ; and r9d, 1
            ),
            M::Shr => dynasm!(self.ops ; .arch x64 ; mov r9, rsi ; shr r9, msb ; and r9d, 1),
            _ => dynasm!(self.ops ; .arch x64 ; xor r9d, r9d),
        }
        self.set_cf_of();
        self.set_result(w);
    }

    /// The 32-bit and 64-bit forms with two or three operands.
    pub(super) fn imul(&mut self, k: usize, ins: &Instruction, live: bool) {
        let (i, w) = (self.insns[k], width(ins, 0));
        let (slow, back) = self.slow(k);
        if ins.op_count() == 3 {
            self.source(k, ins, 1, w, RSI, slow);
            self.immediate(w, RDI, i.imm);
        } else {
            self.source(k, ins, 1, w, RDI, slow);
            self.get(w, RSI, i.dst);
        }
        match w {
            QUAD => dynasm!(self.ops ; .arch x64 ; imul rsi, rdi),
            _ => dynasm!(self.ops ; .arch x64 ; imul esi, edi),
        }
        dynasm!(self.ops ; .arch x64 ; seto r8b ; mov rax, rsi);
        self.put(w, i.dst, RAX);
        if live {
            dynasm!(self.ops ; .arch x64 ; movzx r8d, r8b ; mov r9, r8);
            self.set_cf_of();
            self.set_result(w);
            // ZF is clear whatever the result is.
            dynasm!(self.ops ; .arch x64 ; mov QWORD [rbx + LAYOUT.zero], 1);
        }
        dynasm!(self.ops ; .arch x64 ; =>back);
    }
}
