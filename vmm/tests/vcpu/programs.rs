//! Small programs in ring 0, made of instructions that KVM's emulator supports too.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

pub const RAM: u64 = 1 << 20;
pub const PAGE_TABLES: u64 = 0x1000;
pub const GDT: u64 = 0x500;
pub const IDT: u64 = 0x8000;
const IDTR: u64 = 0x600;
pub const CODE: u64 = 0x1_0000;
/// Handlers, 0x100 apart.
const HANDLERS: u64 = 0x1_8000;
pub const STACK: u64 = 0x3_0000;
pub const DATA: u64 = 0x4_0000;
/// Memory outside RAM.
const DEVICE: u64 = 0x20_0000;

type Asm = CodeAssembler;
type Made = Result<(), IcedError>;

/// A program. Its code is loaded at [`CODE`].
pub struct Program {
    pub name: &'static str,
    pub code: Vec<u8>,
    pub handlers: Vec<(u8, u64)>,
    /// Interrupts that come from the first HLT on.
    pub interrupts: Vec<u8>,
    /// The program has a REP instruction, whose iterations engines count differently.
    pub repeats: bool,
    /// The program causes an exception, whose handler a CPU with the trap flag does not step through.
    pub faults: bool,
}

fn start(a: &mut Asm) -> Made {
    a.mov(rsp, STACK)?;
    a.mov(rax, IDTR)?;
    a.mov(word_ptr(rax), 0xfff)?;
    a.mov(rbx, IDT)?;
    a.mov(qword_ptr(rax + 2), rbx)?;
    a.lidt(ptr(rax))?;
    a.xor(ebx, ebx)?;
    a.mov(r12, DATA)
}

fn program(name: &'static str, body: impl FnOnce(&mut Asm) -> Made) -> Program {
    let mut a = Asm::new(64).unwrap();
    start(&mut a).and_then(|()| body(&mut a)).and_then(|()| a.hlt()).unwrap();
    let mut code = a.assemble(CODE).unwrap();
    assert!(code.len() < (HANDLERS - CODE) as usize);
    code.resize((HANDLERS - CODE) as usize, 0);
    let mut handlers = Vec::new();
    let mut put = |vector: u8, handler: &dyn Fn(&mut Asm) -> Made| {
        let at = CODE + code.len() as u64;
        let mut a = Asm::new(64).unwrap();
        handler(&mut a).unwrap();
        let bytes = a.assemble(at).unwrap();
        let end = code.len() + 0x100;
        code.extend(bytes);
        code.resize(end, 0);
        handlers.push((vector, at));
    };
    // Handlers of interrupts: they add up RIP, RFLAGS and RSP of the interrupted program.
    for vector in [0x30, 0x31] {
        put(vector, &|a| {
            a.push(rax)?;
            a.mov(rax, qword_ptr(rsp + 8))?;
            a.add(rax, qword_ptr(rsp + 24))?;
            a.imul_2(rbx, qword_ptr(rsp + 32))?;
            a.add(rbx, rax)?;
            a.add(rbx, i32::from(vector))?;
            a.pop(rax)?;
            a.iretq()
        });
    }
    // Handlers of faults, without and with an error code: they return after the instruction, whose length is in R11.
    for (vector, has_code) in [(0, false), (6, false), (13, true), (14, true)] {
        put(vector, &|a| {
            if has_code {
                a.pop(r10)?;
                a.add(rbx, r10)?;
            }
            a.add(rbx, i32::from(vector) + 1)?;
            a.add(qword_ptr(rsp), r11)?;
            a.iretq()
        });
    }
    Program { name, code, handlers, interrupts: Vec::new(), repeats: false, faults: false }
}

fn arithmetic(a: &mut Asm) -> Made {
    a.mov(rcx, 0x1234_5678_9abc_def0u64)?;
    a.mov(edi, 25)?;
    let (mut again, mut function, mut over) = (a.create_label(), a.create_label(), a.create_label());
    a.set_label(&mut again)?;
    a.imul_3(rcx, rcx, 31)?;
    a.add(rcx, rdi)?;
    a.rol(rcx, 7)?;
    a.mov(qword_ptr(r12 + rdi * 8), rcx)?;
    a.xor(rbx, qword_ptr(r12 + rdi * 8))?;
    a.call(function)?;
    a.dec(edi)?;
    a.jnz(again)?;
    a.jmp(over)?;
    a.set_label(&mut function)?;
    a.push(rcx)?;
    a.pushfq()?;
    a.shr(rcx, 3)?;
    a.adc(rbx, rcx)?;
    a.popfq()?;
    a.sbb(rbx, 5)?;
    a.pop(rcx)?;
    a.ret()?;
    a.set_label(&mut over)?;
    a.mov(eax, 1000)?;
    a.cdq()?;
    a.mov(esi, 7)?;
    a.div(esi)?;
    a.bswap(rbx)?;
    a.movzx(r8d, bl)?;
    a.movsx(r9, bx)?;
    a.lea(r10, qword_ptr(r8 + r9 * 4 + 9))?;
    a.cmp(r8, r9)?;
    a.setl(cl)?;
    a.cmovae(r8, r10)?;
    a.xchg(qword_ptr(r12), r8)
}

fn ports(a: &mut Asm) -> Made {
    a.mov(edx, 0x1234)?;
    a.mov(eax, 0xa1b2_c3d4u32)?;
    a.out(dx, al)?;
    a.out(dx, ax)?;
    a.out(dx, eax)?;
    a.in_(al, dx)?;
    a.add(rbx, rax)?;
    a.in_(ax, dx)?;
    a.add(rbx, rax)?;
    a.in_(eax, dx)?;
    a.add(rbx, rax)?;
    a.in_(al, 0x21)?;
    a.out(0x80, al)?;
    a.out(0x7e, al)?;
    a.inc(rbx)
}

fn port_strings(a: &mut Asm) -> Made {
    a.mov(edx, 0x300)?;
    a.mov(rdi, DATA)?;
    a.mov(ecx, 9)?;
    a.rep().insd()?;
    a.mov(rsi, DATA)?;
    a.mov(ecx, 11)?;
    a.rep().outsw()?;
    a.mov(ecx, 3)?;
    a.rep().outsb()?;
    a.xor(ecx, ecx)?;
    a.rep().outsb()
}

fn devices(a: &mut Asm) -> Made {
    a.mov(rsi, DEVICE)?;
    a.mov(rcx, 0x8877_6655_4433_2211u64)?;
    a.mov(byte_ptr(rsi), cl)?;
    a.mov(word_ptr(rsi + 2), cx)?;
    a.mov(dword_ptr(rsi + 4), ecx)?;
    a.mov(qword_ptr(rsi + 8), rcx)?;
    a.mov(al, byte_ptr(rsi + 16))?;
    a.add(rbx, rax)?;
    a.movzx(eax, word_ptr(rsi + 18))?;
    a.add(rbx, rax)?;
    a.mov(eax, dword_ptr(rsi + 20))?;
    a.add(rbx, rax)?;
    a.xor(rbx, qword_ptr(rsi + 24))?;
    // Reads, then writes.
    a.add(dword_ptr(rsi + 32), ebx)?;
    a.inc(qword_ptr(rsi + 40))?;
    a.push(qword_ptr(rsi + 48))?;
    a.pop(qword_ptr(rsi + 56))?;
    a.inc(rbx)
}

fn strings(a: &mut Asm) -> Made {
    a.mov(rdi, DATA)?;
    a.mov(eax, 0x5a)?;
    a.mov(ecx, 300)?;
    a.rep().stosb()?;
    a.mov(rsi, DATA + 3)?;
    a.mov(ecx, 40)?;
    a.rep().movsq()?;
    a.mov(rdi, DATA)?;
    a.mov(ecx, 1000)?;
    a.repe().scasb()
}

/// Interrupts for a halted CPU, in interrupt shadows, and while interrupts are disabled.
fn interrupts(a: &mut Asm) -> Made {
    a.sti()?;
    a.hlt()?;
    a.inc(rbx)?;
    a.cli()?;
    a.mov(ecx, 6)?;
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.imul_3(rbx, rbx, 3)?;
    a.dec(ecx)?;
    a.jnz(again)?;
    a.sti()?;
    a.inc(rbx)?;
    a.add(rbx, 5)?;
    a.cli()?;
    a.mov(ax, ss)?;
    a.sti()?;
    a.mov(ss, ax)?;
    a.add(rbx, 7)?;
    a.add(rbx, 8)?;
    a.pushfq()?;
    a.cli()?;
    a.popfq()?;
    a.add(rbx, 9)?;
    a.hlt()
}

fn faults(a: &mut Asm) -> Made {
    a.mov(r11d, 2)?;
    a.ud2()?;
    a.xor(edx, edx)?;
    a.xor(ecx, ecx)?;
    a.div(ecx)?;
    // An address that is not mapped, then one that is not canonical. This MOV has 3 bytes.
    a.mov(r11d, 3)?;
    a.mov(rsi, 0x4000_0000u64)?;
    a.mov(rax, qword_ptr(rsi))?;
    a.mov(rax, cr2)?;
    a.add(rbx, rax)?;
    a.mov(rsi, 0x8000_0000_0000_0000u64)?;
    a.mov(rax, qword_ptr(rsi))
}

fn registers(a: &mut Asm) -> Made {
    for (number, value) in
        [(0xc000_0100u32, 0x1234_5000u32), (0xc000_0102, 0x777), (0xc000_0082, 0x4_5678), (0x175, 0x9000)]
    {
        a.mov(ecx, number)?;
        a.mov(eax, value)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.xor(eax, eax)?;
        a.rdmsr()?;
        a.add(rbx, rax)?;
    }
    // MSRs that KVM leaves to user space, and ones that do not exist.
    a.mov(r11d, 2)?;
    for number in [0x1a0u32, 0x8b, 0x17, 0x1234, 0x802, 0x4b56_4d01] {
        a.mov(ecx, number)?;
        a.xor(eax, eax)?;
        a.xor(edx, edx)?;
        a.rdmsr()?;
        a.imul_3(rbx, rbx, 5)?;
        a.add(rbx, rax)?;
    }
    a.mov(rax, cr0)?;
    a.add(rbx, rax)?;
    a.mov(rax, cr4)?;
    a.add(rbx, rax)?;
    a.mov(rax, 0x1_2345u64)?;
    a.mov(dr0, rax)?;
    a.mov(rcx, dr0)?;
    a.add(rbx, rcx)
}

fn crash(a: &mut Asm) -> Made {
    a.mov(word_ptr(r12), 0)?;
    a.lidt(ptr(r12))?;
    a.ud2()
}

/// All programs.
pub fn all() -> Vec<Program> {
    vec![
        program("arithmetic", arithmetic),
        program("ports", ports),
        Program { repeats: true, ..program("strings of ports", port_strings) },
        program("devices", devices),
        Program { repeats: true, ..program("strings", strings) },
        Program { interrupts: vec![0x30, 0x31, 0x30], ..program("interrupts", interrupts) },
        Program { faults: true, ..program("faults", faults) },
        Program { faults: true, ..program("registers", registers) },
        Program { faults: true, ..program("crash", crash) },
    ]
}

/// Programs that make `count` exits of one kind, to measure what one costs.
pub fn exits(count: u32) -> Vec<Program> {
    let looped = |a: &mut Asm, body: &dyn Fn(&mut Asm) -> Made| {
        a.mov(ecx, count)?;
        a.mov(rsi, DEVICE)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        body(a)?;
        a.dec(ecx)?;
        a.jnz(again)
    };
    vec![
        program("PIO", |a| looped(a, &|a| a.out(0x80, al))),
        program("MMIO", |a| looped(a, &|a| a.mov(dword_ptr(rsi), ecx))),
        Program {
            interrupts: vec![0x30],
            ..program("HLT", |a| {
                looped(a, &|a| {
                    a.sti()?;
                    a.hlt()
                })
            })
        },
    ]
}
