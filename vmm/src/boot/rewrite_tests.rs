use iced_x86::IcedError;
use iced_x86::code_asm::*;
use soft_cpu::{CpuExit, CpuState, RunLimit, SoftCpu};

use super::*;

const AT: u64 = 0x1000;

/// An ELF file with one executable section at [`AT`].
fn elf(code: &[u8]) -> Vec<u8> {
    let names = b"\0.text\0.shstrtab\0";
    let mut file = vec![0; 64];
    file[..6].copy_from_slice(b"\x7fELF\x02\x01");
    let (code_at, names_at) = (64, 64 + code.len());
    let headers_at = names_at + names.len();
    file[40..48].copy_from_slice(&(headers_at as u64).to_le_bytes());
    file[58..64].copy_from_slice(&[64, 0, 3, 0, 2, 0]);
    file.extend(code);
    file.extend(names);
    file.extend([0; 64]);
    for (name, kind, flags, address, at, len) in
        [(1u32, 1u32, 6u64, AT, code_at, code.len()), (7, 3, 0, 0, names_at, names.len())]
    {
        file.extend(name.to_le_bytes());
        file.extend(kind.to_le_bytes());
        for value in [flags, address, at as u64, len as u64, 0, 0, 0] {
            file.extend(value.to_le_bytes());
        }
    }
    file
}

fn assemble(code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    code(&mut a).unwrap();
    a.assemble(AT).unwrap()
}

/// Runs code at [`AT`] on the soft CPU to its HLT. Answers the exits of rewritten sites with the CPU's time-stamp counter.
/// Returns the state, the memory that was written, and the number of these exits.
fn run(code: &[u8], sites: &Sites) -> (CpuState, Vec<u8>, usize) {
    let mut ram = vec![0; 0x20_0000];
    for (at, entry) in [(0x2000, 0x3003u64), (0x3000, 0x4003), (0x4000, 0x83)] {
        ram[at..at + 8].copy_from_slice(&entry.to_le_bytes());
    }
    ram[AT as usize..][..code.len()].copy_from_slice(code);
    let mut cpu = SoftCpu::new(ram.len() as u64);
    let mut state = cpu.save();
    (state.rip, state.rflags, state.gpr[4]) = (AT, 2, 0x1_0000);
    let sys = &mut state.sys;
    (sys.cr0, sys.cr3, sys.cr4, sys.efer) = (0x8005_0033, 0x2000, 0x6a0, 0x500);
    sys.seg = [soft_cpu::state::Segment { selector: 0x18, attr: 0xc093, limit: !0, base: 0 }; 6];
    sys.seg[1] = soft_cpu::state::Segment { selector: 0x10, attr: 0xa09b, limit: !0, base: 0 };
    cpu.restore(&state);
    let mut asked = 0;
    loop {
        match cpu.run(&mut ram, &RunLimit { until: u64::MAX, interrupt_window: false }) {
            CpuExit::Hlt => return (cpu.save(), ram[0x8000..0x9000].to_vec(), asked),
            CpuExit::PioOut { port, .. } if port == u16::from(PORT) => {
                let rip = cpu.cpu().rip;
                let value = cpu.cpu().tsc();
                assert_eq!(cpu.complete(&mut ram, 0), None);
                let site = sites.find(rip).expect("the exit is that of a rewritten instruction");
                let mut state = cpu.save();
                let mut general = GeneralRegisters { gpr: state.gpr, rip: state.rip, rflags: state.rflags };
                site.apply(value, &mut general);
                GeneralRegisters { gpr: state.gpr, rip: state.rip, rflags: state.rflags } = general;
                assert_eq!(state.rip, rip + u64::from(site.len));
                cpu.restore(&state);
                asked += 1;
            }
            exit => panic!("{exit:?}"),
        }
    }
}

#[test]
fn a_rewritten_program_does_the_same() {
    let code = assemble(|a| {
        a.mov(ecx, 5)?;
        a.mov(edi, 0x8000)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.lfence()?;
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        a.stosq()?;
        // The bytes of RDTSC as data in an instruction.
        a.mov(r8d, 0x310f_310f)?;
        a.push(rcx)?;
        a.rdtscp()?;
        a.add(rax, rcx)?;
        a.pop(rcx)?;
        a.stosq()?;
        a.dec(ecx)?;
        a.jnz(again)?;
        a.hlt()
    });
    let before = run(&code, &Sites::default());
    let (file, rewritten) = rewrite(&elf(&code)).unwrap();
    assert_eq!(rewritten.instructions, [("rdtsc", 1), ("rdtscp", 1)].into());
    assert!(rewritten.not_rewritten.is_empty());
    let after = run(&file[64..64 + code.len()], &rewritten.sites);
    assert_eq!((before.0, before.1), (after.0, after.1));
    assert_eq!((before.2, after.2), (0, 10));
}

#[test]
fn random_numbers_go_to_the_register_of_the_instruction() {
    let code = assemble(|a| {
        a.rdrand(r11)?;
        a.rdrand(ecx)?;
        a.rdseed(bx)?;
        a.rdpmc()
    });
    let (file, rewritten) = rewrite(&elf(&code)).unwrap();
    let asks: Vec<_> = rewritten.sites.iter().map(|(_, site)| site.insn).collect();
    assert_eq!(
        asks,
        [
            NondeterministicInsn::Rdrand(11, 8),
            NondeterministicInsn::Rdrand(1, 4),
            NondeterministicInsn::Rdseed(3, 2),
            NondeterministicInsn::Rdpmc
        ]
    );
    let mut general = GeneralRegisters { gpr: [!0; 16], rip: 0, rflags: 0x8d7 };
    for (_, site) in rewritten.sites.iter() {
        site.apply(0x1111_2222_3333_4444, &mut general);
    }
    let GeneralRegisters { gpr, rflags, .. } = general;
    assert_eq!((gpr[11], gpr[1], gpr[3]), (0x1111_2222_3333_4444, 0x3333_4444, !0xffff | 0x4444));
    assert_eq!((gpr[0], gpr[2], rflags), (0x3333_4444, 0x1111_2222, 3));
    let text = Decoder::with_ip(64, &file[64..64 + code.len()], AT, 0);
    let mnemonics: Vec<_> = text.into_iter().map(|i| i.mnemonic()).collect();
    assert!(mnemonics.iter().all(|m| matches!(m, iced_x86::Mnemonic::Out | iced_x86::Mnemonic::Nop)));
}

#[test]
fn what_may_be_data_is_left_and_reported() {
    // 06 is not an instruction in 64-bit mode. One RDTSC follows closely after it, another one far after it.
    let code = [&[0x06][..], &[0x90; 20], &[0x0f, 0x31], &[0x90; 300], &[0x0f, 0x31]].concat();
    let (_, rewritten) = rewrite(&elf(&code)).unwrap();
    assert_eq!(rewritten.not_rewritten, [(AT + 21, NondeterministicInsn::Rdtsc)]);
    assert_eq!(rewritten.sites.iter().map(|(at, _)| at).collect::<Vec<_>>(), [AT + 323]);
    assert!(rewritten.to_string().contains("rdtsc at 0x1015 cannot"));
    assert!(rewrite(b"MZ not an ELF file").is_none());
}
