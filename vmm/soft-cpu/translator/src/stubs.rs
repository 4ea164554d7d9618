//! The code around blocks: entering them, leaving them, calling handlers.
//!
//! Registers in translated code: RBX the CPU, R12 the slots, R13 the fast TLB of the mode, R14 RAM, R15 the
//! budget that is left; on the stack, at [`JUMPS`] and the following offsets, what is needed less often. All
//! other registers are scratch registers of a block.

use std::mem::offset_of;

use dynasmrt::x64::X64Relocation;
use dynasmrt::{DynasmApi, DynasmLabelApi, VecAssembler, dynasm};
use soft_cpu::Cpu;
use soft_cpu::insn::Insn;
use soft_cpu::state::RIP_BASE;
use soft_cpu::tier::LAYOUT;

use crate::memory::CodeMemory;
use crate::slots::Jump;

/// Offsets from RSP in a block.
pub(crate) const JUMPS: i32 = 0;
pub(crate) const CODE_TLB: i32 = 8;
const RAM_LEN: i32 = 16;

/// What translated code is entered with.
#[repr(C)]
pub(crate) struct EntryFrame {
    pub(crate) cpu: *mut Cpu,
    pub(crate) ram: *mut u8,
    pub(crate) ram_len: usize,
    pub(crate) fast: *const u8,
    pub(crate) slots: *const u64,
    pub(crate) jumps: *const Jump,
    pub(crate) code_tlb: *const u8,
    pub(crate) budget: i64,
    pub(crate) code: u64,
}

/// What translated code leaves with.
#[repr(C)]
pub(crate) struct LeaveState {
    /// 0, or the address of the instruction that stopped, shifted left by 8, with its [`soft_cpu::CpuStop`]
    /// plus 1.
    pub(crate) stopped: u64,
    /// The budget that is left.
    pub(crate) budget: i64,
}

/// Runs translated code.
pub(crate) type Enter = unsafe extern "sysv64" fn(&EntryFrame) -> LeaveState;
/// Executes an instruction by its handler. Returns 0, or the [`soft_cpu::CpuStop`] plus 1.
pub(crate) type HandlerThunk = unsafe extern "sysv64" fn(*mut Cpu, *mut u8, usize, *const Insn) -> u64;

pub(crate) struct Stubs {
    pub(crate) enter: Enter,
    pub(crate) leave: u64,
    pub(crate) leave_at_rip: u64,
    pub(crate) perform: u64,
}

macro_rules! field {
    ($f:ident) => {
        offset_of!(EntryFrame, $f) as i32
    };
}

/// Adds the stubs to `memory`.
pub(crate) fn add(memory: &mut CodeMemory, handler: HandlerThunk) -> Stubs {
    let base = LAYOUT.regs + 8 * RIP_BASE as i32;
    let mut ops = VecAssembler::<X64Relocation>::new(0);
    let enter = ops.offset().0;
    emit_enter(&mut ops);
    let leave = ops.offset().0;
    dynasm!(ops
        ; .arch x64
        ; mov rax, [rbx + base]
        ; mov [rbx + LAYOUT.rip], rax
    );
    let leave_at_rip = ops.offset().0;
    dynasm!(ops
        ; .arch x64
        ; xor eax, eax
        ; out:
        ; mov rdx, r15
        ; add rsp, 40
        ; pop r15
        ; pop r14
        ; pop r13
        ; pop r12
        ; pop rbp
        ; pop rbx
        ; ret
    );
    let perform = ops.offset().0;
    // Called with the instruction's address in RCX; RBP has the number of instructions after it in its block,
    // which are already counted.
    dynasm!(ops
        ; .arch x64
        ; sub rsp, 8
        ; mov [rsp], rcx
        ; mov rdi, rbx
        ; mov rsi, r14
        ; mov rdx, [rsp + RAM_LEN + 16]
        ; mov rax, QWORD handler as *const () as i64
        ; call rax
        ; test eax, eax
        ; jnz >stopped
        ; add rsp, 8
        ; ret
        ; stopped:
        ; mov rcx, [rsp]
        ; add rsp, 16
        ; lea r15, [r15 + rbp + 1]
        ; shl rcx, 8
        ; or rax, rcx
        ; jmp <out
    );
    let code = ops.finalize().expect("the stubs have all their labels");
    let at = memory.add(&code);
    // SAFETY: the code at `enter` has this signature and calling convention.
    #[allow(unsafe_code)]
    let enter = unsafe { std::mem::transmute::<usize, Enter>(at as usize + enter) };
    let address = |offset: usize| at + offset as u64;
    Stubs { enter, leave: address(leave), leave_at_rip: address(leave_at_rip), perform: address(perform) }
}

/// Saves the host's registers, loads those of translated code from the [`EntryFrame`], and jumps to the code.
fn emit_enter(ops: &mut VecAssembler<X64Relocation>) {
    dynasm!(ops
        ; .arch x64
        ; push rbx
        ; push rbp
        ; push r12
        ; push r13
        ; push r14
        ; push r15
        // With the return address and the six registers this aligns the stack to 16 bytes.
        ; sub rsp, 40
        ; mov rax, [rdi + field!(jumps)]
        ; mov [rsp + JUMPS], rax
        ; mov rax, [rdi + field!(code_tlb)]
        ; mov [rsp + CODE_TLB], rax
        ; mov rax, [rdi + field!(ram_len)]
        ; mov [rsp + RAM_LEN], rax
        ; mov rbx, [rdi + field!(cpu)]
        ; mov r12, [rdi + field!(slots)]
        ; mov r13, [rdi + field!(fast)]
        ; mov r14, [rdi + field!(ram)]
        ; mov r15, [rdi + field!(budget)]
        ; jmp QWORD [rdi + field!(code)]
    );
}
