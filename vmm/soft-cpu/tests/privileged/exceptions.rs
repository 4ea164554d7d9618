//! Exception delivery: frames, stacks, error codes, double and triple faults.

use iced_x86::code_asm::*;
use soft_cpu::CpuExit;

use crate::guest::*;

const RF: u64 = 1 << 16;

fn frame(g: &Guest, at: u64) -> [u64; 5] {
    std::array::from_fn(|n| g.read_u64(at + 8 * n as u64))
}

#[test]
fn a_fault_in_the_kernel_stays_on_its_stack_which_is_aligned() {
    let mut g = Guest::asm(|a| a.ud2()).reg(4, STACK - 3).flags(0x202);
    assert_eq!(g.run(), Outcome::Fault { vector: 6, error: None, rip: CODE });
    let top = (STACK - 3) & !15;
    assert_eq!(g.state.gpr[4], top - 40);
    let expected = [CODE, KERNEL_CODE as u64, 0x202 | RF, STACK - 3, KERNEL_DATA as u64];
    assert_eq!(frame(&g, top - 40), expected);
    // An interrupt gate clears IF.
    assert_eq!(g.state.rflags & 0x200, 0);
    assert_eq!(g.state.sys.seg[2].selector, KERNEL_DATA);
}

#[test]
fn a_fault_in_user_mode_goes_to_rsp0_with_a_null_ss() {
    let mut g = Guest::asm(|a| a.ud2()).user().flags(0x202);
    g.run();
    let expected = [CODE, USER_CODE as u64, 0x202 | RF, STACK, USER_DATA as u64];
    assert_eq!(frame(&g, KERNEL_STACK - 40), expected);
    assert_eq!(g.state.sys.seg[2].selector, 0);
    assert_eq!(g.state.sys.seg[1].selector, KERNEL_CODE);
}

#[test]
fn an_interrupt_stack_is_used_at_every_level() {
    for user in [false, true] {
        let g = Guest::asm(|a| a.ud2());
        let mut g = if user { g.user() } else { g };
        g.write(IDT + 6 * 16 + 4, &[1]);
        g.run();
        assert_eq!(g.state.gpr[4], IST1 - 40);
    }
}

#[test]
fn a_trap_gate_leaves_interrupts_on_and_traps_push_no_rf() {
    let mut g = Guest::asm(|a| a.int3()).flags(0x202);
    g.write(IDT + 3 * 16 + 5, &[0x8f]);
    assert_eq!(g.run(), Outcome::Fault { vector: 3, error: None, rip: CODE + 1 });
    assert_eq!(g.state.rflags & 0x200, 0x200);
    assert_eq!(frame(&g, g.state.gpr[4])[2] & RF, 0);
}

#[test]
fn int_n_respects_the_gates_level() {
    let int = || Guest::asm(|a| a.int(0x80)).user();
    let mut g = int();
    assert_eq!(g.run(), Outcome::Fault { vector: 13, error: Some(0x80 << 3 | 2), rip: CODE });
    let mut g = int();
    g.write(IDT + 0x80 * 16 + 5, &[0xee]);
    assert_eq!(g.run(), Outcome::Fault { vector: 0x80, error: None, rip: CODE + 2 });
    assert_eq!(g.state.retired, 1);
    // An exception is delivered whatever the gate's DPL is.
    let mut g = Guest::asm(|a| a.ud2()).user();
    assert_eq!(g.run(), Outcome::Fault { vector: 6, error: None, rip: CODE });
}

#[test]
fn faults_of_delivery_name_the_gate() {
    // INT 0x30 through a gate that is not present, of the wrong type, or beyond the limit.
    for (patch, vector, error) in
        [(Some(0x0e), 11, 0x30 << 3 | 2), (Some(0x8c), 13, 0x30 << 3 | 2), (None, 13, 0x30 << 3 | 2)]
    {
        let mut g = Guest::asm(|a| a.int(0x30));
        match patch {
            Some(kind) => g.write(IDT + 0x30 * 16 + 5, &[kind]),
            None => g.state.sys.idtr.limit = 0x30 * 16 + 14,
        }
        assert_eq!(g.run(), Outcome::Fault { vector, error: Some(error), rip: CODE });
    }
    // EXT is set when an exception was being delivered: #UD's gate is not present.
    let mut g = Guest::asm(|a| a.ud2());
    g.write(IDT + 6 * 16 + 5, &[0x0e]);
    assert_eq!(g.run(), Outcome::Fault { vector: 11, error: Some(6 << 3 | 3), rip: CODE });
    // The gate's code segment.
    for (selector, vector, error) in [(0u16, 13, 0), (KERNEL_DATA, 13, 0x10), (0x50, 13, 0x50)] {
        let mut g = Guest::asm(|a| a.int(0x30));
        g.write(IDT + 0x30 * 16 + 2, &selector.to_le_bytes());
        assert_eq!(g.run(), Outcome::Fault { vector, error: Some(error), rip: CODE });
    }
}

#[test]
fn contributory_faults_double_and_benign_ones_do_not() {
    // #GP while delivering #GP.
    let mut g = Guest::asm(|a| a.mov(rax, qword_ptr(rbx))).reg(3, 1 << 47);
    g.write(IDT + 13 * 16 + 5, &[0x0e]);
    assert_eq!(g.run(), Outcome::Fault { vector: 8, error: Some(0), rip: CODE });
    // #PF while delivering #PF: the stack is not mapped; #DF has its own stack.
    let mut g = Guest::asm(|a| a.mov(rax, qword_ptr(DATA)));
    g.set_pte(DATA, 0);
    g.set_pte(STACK - 8, 0);
    g.write(IDT + 8 * 16 + 4, &[1]);
    assert_eq!(g.run(), Outcome::Fault { vector: 8, error: Some(0), rip: CODE });
    assert_eq!(g.state.sys.cr2, STACK - 8);
    // #PF while delivering #GP is delivered as #PF.
    let mut g = Guest::asm(|a| a.mov(rax, qword_ptr(rbx))).reg(3, 1 << 47);
    g.set_pte(STACK - 8, 0);
    g.write(IDT + 14 * 16 + 4, &[1]);
    assert_eq!(g.run(), Outcome::Fault { vector: 14, error: Some(2), rip: CODE });
    // #NP while delivering #PF.
    let mut g = Guest::asm(|a| a.mov(rax, qword_ptr(DATA)));
    g.set_pte(DATA, 0);
    g.write(IDT + 14 * 16 + 5, &[0x0e]);
    assert_eq!(g.run(), Outcome::Fault { vector: 8, error: Some(0), rip: CODE });
    // #GP while delivering #UD.
    let mut g = Guest::asm(|a| a.ud2());
    g.write(IDT + 6 * 16 + 2, &[0, 0]);
    assert_eq!(g.run(), Outcome::Fault { vector: 13, error: Some(1), rip: CODE });
}

#[test]
fn a_fault_of_the_double_fault_shuts_down() {
    let mut g = Guest::asm(|a| a.ud2());
    g.state.sys.idtr.limit = 0;
    assert_eq!(g.run(), Outcome::Exit(CpuExit::Shutdown));
}

#[test]
fn the_task_segment_and_its_stack_are_checked() {
    let mut g = Guest::asm(|a| a.ud2()).user();
    g.state.sys.tr.limit = 10;
    g.write(IDT + 10 * 16 + 4, &[0]);
    // #TS needs the same stack, so it doubles, and so does #DF.
    assert_eq!(g.run(), Outcome::Exit(CpuExit::Shutdown));
    let mut g = Guest::asm(|a| a.ud2());
    g.state.sys.tr.limit = 0x2a;
    g.write(IDT + 6 * 16 + 4, &[1]);
    assert_eq!(g.run(), Outcome::Fault { vector: 10, error: Some(TSS_SELECTOR as u32 | 1), rip: CODE });
    let mut g = Guest::asm(|a| a.ud2()).user();
    g.write_u64(TSS + 4, 0x9000_0000_0000);
    g.write(IDT + 12 * 16 + 4, &[1]);
    assert_eq!(g.run(), Outcome::Fault { vector: 12, error: Some(1), rip: CODE });
}

#[test]
fn instructions_longer_than_15_bytes_are_general_protection() {
    for user in [false, true] {
        let g = Guest::new(&[[0x66; 15].as_slice(), &[0x90]].concat());
        let mut g = if user { g.user() } else { g };
        assert_eq!(g.run(), Outcome::Fault { vector: 13, error: Some(0), rip: CODE });
    }
    assert_eq!(Guest::new(&[[0x66; 14].as_slice(), &[0x90]].concat()).run(), Outcome::Done);
}

#[test]
fn an_instruction_that_crosses_into_an_unmapped_page_faults_there() {
    let at = CODE + 0xffd;
    let mut g = Guest::asm(|a| a.jmp(rbx)).reg(3, at);
    g.write(at, &[0x48, 0xc7, 0xc0, 1, 0, 0, 0]);
    g.set_pte(CODE + 0x1000, 0);
    assert_eq!(g.run(), Outcome::Fault { vector: 14, error: Some(0x10), rip: at });
    assert_eq!(g.state.sys.cr2, CODE + 0x1000);
    // An instruction that does not reach the next page runs.
    let mut g = Guest::asm(|a| a.jmp(rbx)).reg(3, at);
    g.write(at, &[0x48, 0xff, 0xc1]);
    g.set_pte(CODE + 0x1000, 0);
    assert_eq!(g.run(), Outcome::Fault { vector: 14, error: Some(0x10), rip: CODE + 0x1000 });
    assert_eq!(g.state.retired, 2);
    // INSERTQ does not exist on this CPU, so that its immediates are not fetched.
    let at = CODE + 0xffb;
    let mut g = Guest::asm(|a| a.jmp(rbx)).reg(3, at);
    g.write(at, &[0xf2, 0x44, 0x0f, 0x78, 0xf0]);
    g.set_pte(CODE + 0x1000, 0);
    assert_eq!(g.run(), Outcome::Fault { vector: 6, error: None, rip: at });
}

#[test]
fn alignment_is_checked_in_user_mode_when_asked_for() {
    const AC: u64 = 1 << 18;
    let access = || Guest::asm(|a| a.mov(eax, dword_ptr(DATA + 2)));
    assert_eq!(access().user().flags(AC).run(), Outcome::Fault { vector: 17, error: Some(0), rip: CODE });
    assert_eq!(access().user().run(), Outcome::Done);
    assert_eq!(access().flags(AC).run(), Outcome::Done);
    assert_eq!(Guest::asm(|a| a.mov(ax, word_ptr(DATA + 2))).user().flags(AC).run(), Outcome::Done);
    let mut g = access().user().flags(AC);
    g.state.sys.cr0 &= !(1 << 18);
    assert_eq!(g.run(), Outcome::Done);
}
