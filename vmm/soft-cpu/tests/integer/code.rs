//! Code that changes, and where instructions are fetched from.

use iced_x86::code_asm::*;

use crate::guest::*;
use crate::r;

#[test]
fn code_may_change_itself_in_the_running_block() {
    let mut g = Guest::new(&[
        0xc6, 0x05, 1, 0, 0, 0, 42, // mov byte [rip + 1], 42: the immediate of the next
        0xb0, 1, // mov al, 1
    ]);
    assert_eq!(g.done()[r::RAX], 42);
    assert_eq!(g.state.retired, 2);
}

#[test]
fn a_store_through_an_alias_changes_the_code() {
    let mut g = Guest::new(&[
        0xc6, 0x04, 0x25, 9, 0, 4, 0, 42, // mov byte [DATA + 9], 42: the immediate of the next
        0xb0, 1, // mov al, 1
    ]);
    g.set_pte(DATA, CODE | 7);
    assert_eq!(g.done()[r::RAX], 42);
}

#[test]
fn an_instruction_across_pages_is_seen_to_change_in_either_page() {
    let start = CODE + 0xffd;
    let program = |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.call(start)?;
        a.add(rbx, rax)?;
        a.mov(byte_ptr(start + 1), 0x10)?; // in the first page
        a.mov(byte_ptr(start + 4), 0x20)?; // in the second
        a.dec(rcx)?;
        a.jne(again)
    };
    let mut g = Guest::asm(program).reg(r::RCX, 3);
    g.write(start, &[0xb8, 1, 0, 0, 0, 0xc3]); // mov eax, 1; ret
    assert_eq!(g.done()[r::RBX], 1 + 2 * 0x2000_0010);
}

#[test]
fn a_stale_translation_is_fetched_from_until_it_is_flushed() {
    // Two pages with the same program except for two immediates; the program maps the second page in place of
    // its own.
    let program = |n: u32| {
        assemble(|a| {
            let mut next = a.create_label();
            a.mov(qword_ptr(PT + CODE / 4096 * 8), (DATA | 7) as i32)?;
            a.jmp(next)?;
            a.set_label(&mut next)?;
            a.mov(bl, n)?;
            a.mov(rax, cr3)?;
            a.mov(cr3, rax)?;
            a.mov(cl, n)
        })
    };
    let mut g = Guest::new(&program(1));
    let page = g.read(CODE, 4096).to_vec();
    g.write(DATA, &page);
    g.write(DATA, &program(2));
    let regs = g.done();
    assert_eq!((regs[r::RBX], regs[r::RCX]), (1, 2));
}
