//! Flags: the guest's lazy ones (see `soft_cpu::flags`) and the host's, from which conditional jumps are
//! made.

use dynasmrt::{DynamicLabel, DynasmApi, DynasmLabelApi, dynasm};
use iced_x86::Instruction;
use soft_cpu::tier::LAYOUT;

use crate::assembler::BlockAssembler;
use crate::effect::{BYTE, DOUBLE, QUAD, WORD};

impl BlockAssembler<'_> {
    /// The return label of a slow path before a Jcc: there the host's flags are set from the guest's.
    pub(super) fn rejoin(&mut self, back: DynamicLabel) {
        let over = self.ops.new_dynamic_label();
        dynasm!(self.ops ; .arch x64 ; jmp =>over ; =>back);
        self.restore_flags();
        dynasm!(self.ops ; .arch x64 ; =>over);
    }

    /// Sets the guest's carry vector from R8, a carry vector of width `w`.
    pub(super) fn set_carry(&mut self, w: usize) {
        if w == QUAD {
            dynasm!(self.ops ; .arch x64 ; mov [rbx + LAYOUT.carry], r8);
            return;
        }
        let up = 64 - (8 << w);
        dynasm!(self.ops
            ; .arch x64
            ; mov r9d, r8d
            ; and r9d, 8
            ; shl r8, up
            ; or r8, r9
            ; mov [rbx + LAYOUT.carry], r8
        );
    }

    /// Sets the guest's ZF, SF and PF from the result in RAX, and sign-extends RAX.
    pub(super) fn set_result(&mut self, w: usize) {
        self.sign_extend(w);
        dynasm!(self.ops
            ; .arch x64
            ; mov [rbx + LAYOUT.zero], rax
            ; mov [rbx + LAYOUT.sign], rax
        );
    }

    /// Repeats the addition to set the host's flags.
    pub(super) fn host_add(&mut self, w: usize) {
        match w {
            BYTE => dynasm!(self.ops ; .arch x64 ; add sil, dil),
            WORD => dynasm!(self.ops ; .arch x64 ; add si, di),
            DOUBLE => dynasm!(self.ops ; .arch x64 ; add esi, edi),
            _ => dynasm!(self.ops ; .arch x64 ; add rsi, rdi),
        }
    }

    /// Compares the operands to set the host's flags.
    pub(super) fn host_cmp(&mut self, w: usize) {
        match w {
            BYTE => dynasm!(self.ops ; .arch x64 ; cmp sil, dil),
            WORD => dynasm!(self.ops ; .arch x64 ; cmp si, di),
            DOUBLE => dynasm!(self.ops ; .arch x64 ; cmp esi, edi),
            _ => dynasm!(self.ops ; .arch x64 ; cmp rsi, rdi),
        }
    }

    /// Tests the result to set the host's flags.
    pub(super) fn host_test(&mut self, w: usize) {
        match w {
            BYTE => dynasm!(self.ops ; .arch x64 ; test al, al),
            WORD => dynasm!(self.ops ; .arch x64 ; test ax, ax),
            DOUBLE => dynasm!(self.ops ; .arch x64 ; test eax, eax),
            _ => dynasm!(self.ops ; .arch x64 ; test rax, rax),
        }
    }

    /// Sets the host's status flags, except AF, from the guest's.
    fn restore_flags(&mut self) {
        // CF is bit 63 of the carry vector, OF its XOR with bit 62; ZF, SF and PF are derived from the stored
        // results.
        dynasm!(self.ops
            ; .arch x64
            ; mov rcx, [rbx + LAYOUT.carry]
            ; mov rdx, rcx
            ; shl rdx, 1
            ; xor rdx, rcx
            ; shr rdx, 63
            ; shl rdx, 11
            ; shr rcx, 63
            ; or rdx, rcx
            ; xor eax, eax
            ; cmp QWORD [rbx + LAYOUT.zero], 0
            ; sete al
            ; shl eax, 6
            ; or edx, eax
            ; cmp BYTE [rbx + LAYOUT.sign], 0
            ; setp al
            ; movzx eax, al
            ; shl eax, 2
            ; or edx, eax
            ; mov rax, [rbx + LAYOUT.sign]
            ; shr rax, 63
            ; shl eax, 7
            ; or edx, eax
            ; push rdx
            ; popf
        );
    }

    /// Sets the guest's CF from R8 and OF from R9, each 0 or 1, and clears AF.
    pub(super) fn set_cf_of(&mut self) {
        dynasm!(self.ops
            ; .arch x64
            ; xor r9, r8
            ; shl r8, 63
            ; shl r9, 62
            ; or r8, r9
            ; mov [rbx + LAYOUT.carry], r8
        );
    }

    /// Evaluates condition `cc` of the guest's flags: sets the host's flags and returns the condition to test
    /// on those. Changes RAX, RCX, R8.
    pub(super) fn evaluate(&mut self, cc: u8) -> u8 {
        const S: u8 = 8;
        const NZ: u8 = 5;
        let (holds, not) = (cc >> 1, cc & 1);
        match holds {
            // O, and L: SF differs from OF.
            0 | 6 => {
                dynasm!(self.ops
                    ; .arch x64
                    ; mov rax, [rbx + LAYOUT.carry]
                    ; mov rcx, rax
                    ; shl rcx, 1
                );
                if holds == 6 {
                    dynasm!(self.ops ; .arch x64 ; xor rax, [rbx + LAYOUT.sign]);
                }
                dynasm!(self.ops ; .arch x64 ; xor rax, rcx);
                S ^ not
            }
            // C
            1 => {
                dynasm!(self.ops ; .arch x64 ; cmp QWORD [rbx + LAYOUT.carry], 0);
                S ^ not
            }
            // Z
            2 => {
                dynasm!(self.ops ; .arch x64 ; cmp QWORD [rbx + LAYOUT.zero], 0);
                cc
            }
            // S
            4 => {
                dynasm!(self.ops ; .arch x64 ; cmp QWORD [rbx + LAYOUT.sign], 0);
                cc
            }
            // P: that of the low byte.
            5 => {
                dynasm!(self.ops ; .arch x64 ; cmp BYTE [rbx + LAYOUT.sign], 0);
                cc
            }
            // BE: C or Z. LE: L or Z.
            _ => {
                dynasm!(self.ops ; .arch x64 ; mov rax, [rbx + LAYOUT.carry]);
                if holds == 7 {
                    dynasm!(self.ops
                        ; .arch x64
                        ; mov rcx, rax
                        ; shl rcx, 1
                        ; xor rax, rcx
                        ; xor rax, [rbx + LAYOUT.sign]
                    );
                }
                dynasm!(self.ops
                    ; .arch x64
                    ; shr rax, 63
                    ; xor r8d, r8d
                    ; cmp QWORD [rbx + LAYOUT.zero], 0
                    ; sete r8b
                    ; or eax, r8d
                );
                NZ ^ not
            }
        }
    }

    /// Jumps if the host's flags meet condition `cc`.
    pub(super) fn jump_if(&mut self, cc: u8, to: DynamicLabel) {
        match cc {
            0 => dynasm!(self.ops ; .arch x64 ; jo =>to),
            1 => dynasm!(self.ops ; .arch x64 ; jno =>to),
            2 => dynasm!(self.ops ; .arch x64 ; jb =>to),
            3 => dynasm!(self.ops ; .arch x64 ; jae =>to),
            4 => dynasm!(self.ops ; .arch x64 ; je =>to),
            5 => dynasm!(self.ops ; .arch x64 ; jne =>to),
            6 => dynasm!(self.ops ; .arch x64 ; jbe =>to),
            7 => dynasm!(self.ops ; .arch x64 ; ja =>to),
            8 => dynasm!(self.ops ; .arch x64 ; js =>to),
            9 => dynasm!(self.ops ; .arch x64 ; jns =>to),
            10 => dynasm!(self.ops ; .arch x64 ; jp =>to),
            11 => dynasm!(self.ops ; .arch x64 ; jnp =>to),
            12 => dynasm!(self.ops ; .arch x64 ; jl =>to),
            13 => dynasm!(self.ops ; .arch x64 ; jge =>to),
            14 => dynasm!(self.ops ; .arch x64 ; jle =>to),
            _ => dynasm!(self.ops ; .arch x64 ; jg =>to),
        }
    }
}

/// The condition of a Jcc, SETcc or CMOVcc in its encoding (SDM 2, appendix B.1.4).
pub(super) fn condition(ins: &Instruction) -> u8 {
    ins.condition_code() as u8 - 1
}
