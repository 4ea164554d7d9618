//! Instructions with code of their own: the frequent forms of the frequent ones, where the fast TLB has what they need.

use dynasmrt::{DynamicLabel, DynasmApi, DynasmLabelApi, dynasm};
use iced_x86::{Code, ConditionCode, Instruction, Mnemonic, OpKind};
use soft_cpu::decode::is_immediate;
use soft_cpu::insn::Insn;
use soft_cpu::state::{RIP_BASE, reg};
use soft_cpu::tier::LAYOUT;

use crate::block::host::*;
use crate::block::{Access, BYTE, Block, DOUBLE, QUAD, WORD, register};

/// What an instruction's code does beyond its operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// It has none: its handler is called.
    Handler,
    /// Registers alone, no flag.
    Plain,
    /// Registers alone, and all status flags.
    SetsFlags,
    /// All status flags, and it leaves the host's as a Jcc needs them.
    Fusing,
    /// Registers alone, reads or keeps flags.
    ReadsFlags,
    /// It may stop.
    Stops,
    /// A conditional jump.
    Jcc,
}

/// The effect of an instruction: what has no code here is [`Effect::Handler`].
pub(crate) fn effect(ins: &Instruction, insn: &Insn) -> Effect {
    use Effect::*;
    use Mnemonic as M;
    let (a, b) = (kind(ins, 0), kind(ins, 1));
    let memory = a == Kind::Memory || b == Kind::Memory;
    let pure = |effect| if memory { Stops } else { effect };
    if ins.is_jcc_short_or_near() {
        return Jcc;
    }
    match ins.mnemonic() {
        M::Nop | M::Reservednop | M::Pause | M::Lfence | M::Mfence | M::Sfence => Plain,
        M::Mov => match (a, b) {
            (Kind::Other, _) | (_, Kind::Other) => Handler,
            _ if is_moffs(ins) => Handler,
            _ => pure(Plain),
        },
        M::Movzx | M::Movsx | M::Movsxd => pure(Plain),
        M::Lea if width(ins, 0) >= DOUBLE => Plain,
        M::Add | M::Sub | M::And | M::Or | M::Xor | M::Cmp | M::Test => Fusing,
        M::Inc | M::Dec => pure(ReadsFlags),
        M::Neg => pure(SetsFlags),
        M::Not => pure(Plain),
        M::Shl | M::Shr | M::Sar if a == Kind::Register && b == Kind::Immediate => {
            match (width(ins, 0), insn.imm & if width(ins, 0) == QUAD { 63 } else { 31 }) {
                (DOUBLE | QUAD, 1..) => SetsFlags,
                _ => Handler,
            }
        }
        M::Imul if ins.op_count() > 1 && width(ins, 0) >= DOUBLE => pure(SetsFlags),
        M::Cdqe | M::Cwde | M::Cqo | M::Cdq => Plain,
        M::Push if ins.stack_pointer_increment() == -8 && matches!(a, Kind::Register | Kind::Immediate) => {
            Stops
        }
        M::Pop if a == Kind::Register && width(ins, 0) == QUAD => Stops,
        M::Leave if ins.code() == Code::Leaveq => Stops,
        M::Call if ins.is_call_near() && (a == Kind::Branch || a == Kind::Register) => Stops,
        M::Call if ins.is_call_near_indirect() => Stops,
        M::Jmp if ins.is_jmp_short_or_near() || ins.is_jmp_near_indirect() => Stops,
        M::Ret if matches!(ins.code(), Code::Retnq | Code::Retnq_imm16) => Stops,
        _ if is_cmov(ins) && width(ins, 0) >= DOUBLE => {
            if memory {
                Stops
            } else {
                ReadsFlags
            }
        }
        _ if is_setcc(ins) && a == Kind::Register => ReadsFlags,
        _ => Handler,
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Register,
    Memory,
    Immediate,
    Branch,
    Other,
    Absent,
}

fn kind(ins: &Instruction, n: u32) -> Kind {
    if n >= ins.op_count() {
        return Kind::Absent;
    }
    match ins.op_kind(n) {
        OpKind::Register if ins.op_register(n).is_gpr() => Kind::Register,
        OpKind::Memory => Kind::Memory,
        kind if is_immediate(kind) => Kind::Immediate,
        OpKind::NearBranch64 => Kind::Branch,
        _ => Kind::Other,
    }
}

fn is_conditional(ins: &Instruction) -> bool {
    ins.condition_code() != ConditionCode::None
}

/// SETcc: LOOPcc has a target and no byte.
fn is_setcc(ins: &Instruction) -> bool {
    is_conditional(ins) && ins.op_count() == 1 && width(ins, 0) == BYTE
}

/// CMOVcc: FCMOVcc has other registers.
fn is_cmov(ins: &Instruction) -> bool {
    is_conditional(ins) && ins.op_count() == 2 && kind(ins, 0) == Kind::Register
}

/// MOV with a 64-bit address in place of an operand.
fn is_moffs(ins: &Instruction) -> bool {
    use Code::*;
    matches!(
        ins.code(),
        Mov_AL_moffs8
            | Mov_AX_moffs16
            | Mov_EAX_moffs32
            | Mov_RAX_moffs64
            | Mov_moffs8_AL
            | Mov_moffs16_AX
            | Mov_moffs32_EAX
            | Mov_moffs64_RAX
    )
}

/// Binary logarithm of the bytes of operand `n`, a register or memory.
fn width(ins: &Instruction, n: u32) -> usize {
    let bytes = match ins.op_kind(n) {
        OpKind::Memory => ins.memory_size().size(),
        OpKind::Register => ins.op_register(n).size(),
        _ => 8,
    };
    bytes.trailing_zeros() as usize
}

impl Block<'_> {
    /// Emits instruction `k`, which has code here. `live`: its flags can be seen. `fuses`: a Jcc is behind it. `fused`: the
    /// one before it has left the host's flags for it. Says whether the block ends with it.
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
                self.offset(&i);
                if width(ins, 0) == DOUBLE {
                    dynasm!(self.ops ; .arch x64 ; mov eax, eax);
                }
                self.put(QUAD, i.dst, RAX);
            }
            M::Add | M::Sub | M::And | M::Or | M::Xor | M::Cmp | M::Test => self.alu(k, ins, live, fuses),
            M::Inc | M::Dec | M::Neg | M::Not => self.unary(k, ins, live),
            M::Shl | M::Shr | M::Sar => self.shift(k, ins, live),
            M::Imul => self.imul(k, ins, live),
            M::Cdqe => {
                self.get(DOUBLE, RAX, reg::RAX);
                dynasm!(self.ops ; .arch x64 ; movsxd rax, eax);
                self.put(QUAD, reg::RAX, RAX);
            }
            M::Cwde => {
                self.get(WORD, RAX, reg::RAX);
                dynasm!(self.ops ; .arch x64 ; movsx eax, ax);
                self.put(QUAD, reg::RAX, RAX);
            }
            M::Cqo => {
                self.get(QUAD, RAX, reg::RAX);
                dynasm!(self.ops ; .arch x64 ; sar rax, 63);
                self.put(QUAD, reg::RDX, RAX);
            }
            M::Cdq => {
                self.get(DOUBLE, RAX, reg::RAX);
                dynasm!(self.ops ; .arch x64 ; sar eax, 31);
                self.put(QUAD, reg::RDX, RAX);
            }
            M::Push => self.push(k, ins),
            M::Pop => {
                let (slow, back) = self.slow(k);
                self.get(QUAD, RAX, reg::RSP);
                self.probe(QUAD, Access::Read, slow);
                self.load(QUAD, RAX);
                let stack = register(reg::RSP);
                dynasm!(self.ops ; .arch x64 ; add QWORD [rbx + stack], 8);
                self.put(QUAD, i.dst, RAX);
                dynasm!(self.ops ; .arch x64 ; =>back);
            }
            M::Leave => {
                let (slow, back) = self.slow(k);
                self.get(QUAD, RAX, reg::RBP);
                self.probe(QUAD, Access::Read, slow);
                self.load(QUAD, RDI);
                self.get(QUAD, RAX, reg::RBP);
                dynasm!(self.ops ; .arch x64 ; add rax, 8);
                self.put(QUAD, reg::RSP, RAX);
                self.put(QUAD, reg::RBP, RDI);
                dynasm!(self.ops ; .arch x64 ; =>back);
            }
            M::Jmp => {
                self.jump(k, ins);
                return true;
            }
            M::Call => {
                self.call(k, ins);
                return true;
            }
            M::Ret => {
                let slow = self.slow_last(k);
                self.get(QUAD, RAX, reg::RSP);
                self.probe(QUAD, Access::Read, slow);
                self.load(QUAD, RAX);
                self.look_up(slow);
                let (stack, more) = (register(reg::RSP), 8 + (i.imm & 0xffff) as i32);
                dynasm!(self.ops ; .arch x64 ; add QWORD [rbx + stack], more);
                self.jump_to_found();
                return true;
            }
            _ if is_cmov(ins) => self.cmov(k, ins),
            _ if is_setcc(ins) => {
                let cc = self.evaluate(condition(ins));
                // SETcc AL
                self.ops.extend([0x0f, 0x90 + cc, 0xc0]);
                self.put(BYTE, i.dst, RAX);
            }
            // NOP and its like.
            _ => {}
        }
        false
    }

    /// Host register `h`: operand `n`, a register, the memory operand or an immediate.
    fn source(&mut self, k: usize, ins: &Instruction, n: u32, w: usize, h: u8, slow: DynamicLabel) {
        let i = self.insns[k];
        match kind(ins, n) {
            Kind::Register => self.get(w, h, if n == 0 { i.dst } else { i.src }),
            Kind::Memory => {
                self.operand(&i, w, Access::Read, slow);
                self.load(w, h);
            }
            _ => self.immediate(w, h, i.imm),
        }
    }

    fn mov(&mut self, k: usize, ins: &Instruction) {
        let (i, w) = (self.insns[k], width(ins, 0));
        let (slow, back) = self.slow(k);
        if kind(ins, 0) == Kind::Memory {
            self.operand(&i, w, Access::Write, slow);
            self.source(k, ins, 1, w, RAX, slow);
            self.store(w, RAX);
        } else {
            self.source(k, ins, 1, w, RAX, slow);
            self.put(w, i.dst, RAX);
        }
        dynasm!(self.ops ; .arch x64 ; =>back);
    }

    fn extend(&mut self, k: usize, ins: &Instruction) {
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

    /// RAX from its lower part.
    fn sign_extend(&mut self, from: usize) {
        match from {
            BYTE => dynasm!(self.ops ; .arch x64 ; movsx rax, al),
            WORD => dynasm!(self.ops ; .arch x64 ; movsx rax, ax),
            DOUBLE => dynasm!(self.ops ; .arch x64 ; movsxd rax, eax),
            _ => {}
        }
    }

    /// Operand 0 is in RSI, operand 1 in RDI, the result in RAX; RDX has the place of a memory operand 0 in RAM.
    fn alu(&mut self, k: usize, ins: &Instruction, live: bool, fuses: bool) {
        use Mnemonic as M;
        let (i, w) = (self.insns[k], width(ins, 0));
        let (slow, back) = self.slow(k);
        let stores = !matches!(ins.mnemonic(), M::Cmp | M::Test);
        let to_memory = kind(ins, 0) == Kind::Memory;
        if to_memory {
            let access = if stores { Access::Write } else { Access::Read };
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
            match ins.mnemonic() {
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
        // The slow way has to leave the host's flags, too: it comes back before them, with nothing in registers.
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

    /// Behind a slow way, the host's flags that the next Jcc looks at, from the guest's.
    fn rejoin(&mut self, back: DynamicLabel) {
        let over = self.ops.new_dynamic_label();
        dynasm!(self.ops ; .arch x64 ; jmp =>over ; =>back);
        self.restore_flags();
        dynasm!(self.ops ; .arch x64 ; =>over);
    }

    /// R8, a carry vector of this width, becomes the guest's.
    fn set_carry(&mut self, w: usize) {
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

    /// ZF, SF and PF from the result in RAX, which is then sign-extended.
    fn set_result(&mut self, w: usize) {
        self.sign_extend(w);
        dynasm!(self.ops
            ; .arch x64
            ; mov [rbx + LAYOUT.zero], rax
            ; mov [rbx + LAYOUT.sign], rax
        );
    }

    fn host_add(&mut self, w: usize) {
        match w {
            BYTE => dynasm!(self.ops ; .arch x64 ; add sil, dil),
            WORD => dynasm!(self.ops ; .arch x64 ; add si, di),
            DOUBLE => dynasm!(self.ops ; .arch x64 ; add esi, edi),
            _ => dynasm!(self.ops ; .arch x64 ; add rsi, rdi),
        }
    }

    fn host_cmp(&mut self, w: usize) {
        match w {
            BYTE => dynasm!(self.ops ; .arch x64 ; cmp sil, dil),
            WORD => dynasm!(self.ops ; .arch x64 ; cmp si, di),
            DOUBLE => dynasm!(self.ops ; .arch x64 ; cmp esi, edi),
            _ => dynasm!(self.ops ; .arch x64 ; cmp rsi, rdi),
        }
    }

    fn host_test(&mut self, w: usize) {
        match w {
            BYTE => dynasm!(self.ops ; .arch x64 ; test al, al),
            WORD => dynasm!(self.ops ; .arch x64 ; test ax, ax),
            DOUBLE => dynasm!(self.ops ; .arch x64 ; test eax, eax),
            _ => dynasm!(self.ops ; .arch x64 ; test rax, rax),
        }
    }

    /// The host's status flags but AF from the guest's.
    fn restore_flags(&mut self) {
        // CF is bit 63 of the carry vector, OF its difference to bit 62; ZF, SF and PF those of two values.
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

    fn unary(&mut self, k: usize, ins: &Instruction, live: bool) {
        use Mnemonic as M;
        let (i, w) = (self.insns[k], width(ins, 0));
        let (slow, back) = self.slow(k);
        let to_memory = kind(ins, 0) == Kind::Memory;
        if to_memory {
            self.operand(&i, w, Access::Write, slow);
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
                // CF stays, and OF is what the new vector says: both top bits change if CF would.
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

    /// A shift of a register of 32 or 64 bits by a constant that is not 0.
    fn shift(&mut self, k: usize, ins: &Instruction, live: bool) {
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

    /// CF from R8 and OF from R9, each 0 or 1; AF is cleared.
    fn set_cf_of(&mut self) {
        dynasm!(self.ops
            ; .arch x64
            ; xor r9, r8
            ; shl r8, 63
            ; shl r9, 62
            ; or r8, r9
            ; mov [rbx + LAYOUT.carry], r8
        );
    }

    /// The forms with two and three operands, of 32 and 64 bits.
    fn imul(&mut self, k: usize, ins: &Instruction, live: bool) {
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

    fn push(&mut self, k: usize, ins: &Instruction) {
        let (slow, back) = self.slow(k);
        self.get(QUAD, RAX, reg::RSP);
        dynasm!(self.ops ; .arch x64 ; sub rax, 8 ; mov rdi, rax);
        self.probe(QUAD, Access::Write, slow);
        self.source(k, ins, 0, QUAD, RAX, slow);
        self.store(QUAD, RAX);
        self.put(QUAD, reg::RSP, RDI);
        dynasm!(self.ops ; .arch x64 ; =>back);
    }

    fn jump(&mut self, k: usize, ins: &Instruction) {
        let i = self.insns[k];
        let slow = self.slow_last(k);
        if kind(ins, 0) == Kind::Branch {
            let to = self.behind(k).wrapping_add(i.imm as i64);
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

    fn call(&mut self, k: usize, ins: &Instruction) {
        let i = self.insns[k];
        let slow = self.slow_last(k);
        let to = self.behind(k).wrapping_add(i.imm as i64);
        let direct = kind(ins, 0) == Kind::Branch;
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
        self.probe(QUAD, Access::Write, slow);
        let (base, behind) = (register(RIP_BASE), self.behind(k) as i32);
        dynasm!(self.ops ; .arch x64 ; mov rax, [rbx + base] ; add rax, behind);
        self.store(QUAD, RAX);
        self.put(QUAD, reg::RSP, RDI);
        if in_page {
            self.jump_in_page(to);
        } else {
            dynasm!(self.ops ; .arch x64 ; mov rax, r11);
            self.jump_to_found();
        }
    }

    fn cmov(&mut self, k: usize, ins: &Instruction) {
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

    /// Brings a condition on the guest's flags into the host's; gives the condition on those. Changes RAX, RCX, R8.
    fn evaluate(&mut self, cc: u8) -> u8 {
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

    /// Jumps when the host's flags fulfil a condition.
    fn jump_if(&mut self, cc: u8, to: DynamicLabel) {
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
fn condition(ins: &Instruction) -> u8 {
    ins.condition_code() as u8 - 1
}
