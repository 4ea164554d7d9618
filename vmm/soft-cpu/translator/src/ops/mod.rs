//! Emits the code of single instructions: the frequent forms of the frequent ones. It does the common case,
//! in which the fast TLB has the pages that the instruction needs; otherwise it calls the instruction's
//! handler.

mod arithmetic;
mod flags;
mod moves;
mod transfers;

use dynasmrt::dynasm;
use iced_x86::{Instruction, Mnemonic};

use crate::assembler::BlockAssembler;
use crate::assembler::host::*;
use crate::effect::{BYTE, DOUBLE, QUAD, is_cmov, is_setcc, width};
use flags::condition;

impl BlockAssembler<'_> {
    /// Emits instruction `k`, whose effect is not [`Effect::Handler`](crate::effect::Effect::Handler).
    /// `live`: the flags are live after it. `fuses`: a Jcc follows. `fused`: the instruction before has left
    /// the host's flags as this Jcc needs them. Returns whether the block ends with it.
    pub(crate) fn instruction(
        &mut self,
        k: usize,
        ins: &Instruction,
        live: bool,
        fuses: bool,
        fused: bool,
    ) -> bool {
        use Mnemonic as M;
        let i = self.insns[k];
        if ins.is_jcc_short_or_near() {
            let taken = self.taken(k);
            let cc = condition(ins);
            let cc = if fused { cc } else { self.evaluate(cc) };
            self.jump_if(cc, taken);
            return false;
        }
        match ins.mnemonic() {
            M::Mov => self.mov(k, ins),
            M::Movzx | M::Movsx | M::Movsxd => self.extend(k, ins),
            M::Lea => {
                self.effective_address(&i);
                if width(ins, 0) == DOUBLE {
                    dynasm!(self.ops ; .arch x64 ; mov eax, eax);
                }
                self.put(QUAD, i.dst, RAX);
            }
            M::Add | M::Sub | M::And | M::Or | M::Xor | M::Cmp | M::Test => self.alu(k, ins, live, fuses),
            M::Inc | M::Dec | M::Neg | M::Not => self.unary(k, ins, live),
            M::Shl | M::Shr | M::Sar => self.shift(k, ins, live),
            M::Imul => self.imul(k, ins, live),
            M::Cdqe | M::Cwde | M::Cqo | M::Cdq => self.extend_accumulator(ins),
            M::Push => self.push(k, ins),
            M::Pop => self.pop(k),
            M::Leave => self.leave(k),
            M::Jmp => self.jump(k, ins),
            M::Call => self.call(k, ins),
            M::Ret => self.ret(k),
            _ if is_cmov(ins) => self.cmov(k, ins),
            _ if is_setcc(ins) => {
                let cc = self.evaluate(condition(ins));
                // SETcc AL
                self.ops.extend([0x0f, 0x90 + cc, 0xc0]);
                self.put(BYTE, i.dst, RAX);
            }
            // NOP, PAUSE, fences.
            _ => {}
        }
        matches!(ins.mnemonic(), M::Jmp | M::Call | M::Ret)
    }
}
