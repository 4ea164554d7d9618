//! The LOCK prefix, and instructions that do nothing.

use crate::guest::*;
use crate::r;

#[test]
fn lock_is_legal_before_few_instructions_and_only_with_a_memory_destination() {
    let legal: [&[u8]; 8] = [
        &[0xf0, 0x01, 0x03],          // add [rbx], eax
        &[0xf0, 0x80, 0x0b, 1],       // or byte [rbx], 1
        &[0xf0, 0x87, 0x03],          // xchg [rbx], eax
        &[0xf0, 0xff, 0x03],          // inc dword [rbx]
        &[0xf0, 0xf7, 0x1b],          // neg dword [rbx]
        &[0xf0, 0x0f, 0xba, 0x33, 1], // btr dword [rbx], 1
        &[0xf0, 0x0f, 0xb1, 0x0b],    // cmpxchg [rbx], ecx
        &[0xf0, 0x0f, 0xc7, 0x0b],    // cmpxchg8b [rbx]
    ];
    for code in legal {
        Guest::new(code).reg(r::RBX, DATA).done();
    }
    let illegal: [&[u8]; 9] = [
        &[0xf0, 0x01, 0xc0],       // add eax, eax
        &[0xf0, 0x03, 0x03],       // add eax, [rbx]
        &[0xf0, 0x39, 0x03],       // cmp [rbx], eax
        &[0xf0, 0x85, 0x03],       // test [rbx], eax
        &[0xf0, 0x89, 0x03],       // mov [rbx], eax
        &[0xf0, 0xc1, 0x23, 1],    // shl dword [rbx], 1
        &[0xf0, 0x0f, 0xa3, 0x03], // bt [rbx], eax
        &[0xf0, 0x90],             // nop
        &[0xf0, 0xa4],             // movsb
    ];
    for code in illegal {
        let outcome = Guest::new(code).reg(r::RBX, DATA).run();
        assert_eq!(outcome, Outcome::Fault { vector: 6, error: None, rip: CODE }, "{code:x?}");
    }
}

#[test]
fn hints_do_nothing_and_touch_no_memory() {
    let mut g = Guest::new(&[
        0x90, // nop
        0xf3, 0x90, // pause
        0x0f, 0x1f, 0x03, // nop [rbx]
        0xf3, 0x0f, 0x1e, 0xfa, // endbr64
        0xf3, 0x48, 0x0f, 0x1e, 0xc8, // rdsspq rax
        0x0f, 0x18, 0x0b, // prefetcht0 [rbx]
        0x0f, 0x0d, 0x0b, // prefetchw [rbx]
        0x0f, 0xae, 0xe8, 0x0f, 0xae, 0xf0, 0x0f, 0xae, 0xf8, // lfence, mfence, sfence
    ])
    .reg(r::RBX, 0x1000_0000)
    .reg(r::RAX, 5);
    assert_eq!(g.done()[r::RAX], 5);
    assert_eq!(g.state.retired, 10);
}

#[test]
fn undefined_instructions() {
    let undefined: [&[u8]; 4] = [&[0x0f, 0x0b], &[0x0f, 0xb9, 0xc0], &[0x0f, 0xff, 0xc0], &[0x06]];
    for code in undefined {
        assert_eq!(Guest::new(code).run(), Outcome::Fault { vector: 6, error: None, rip: CODE });
    }
}
