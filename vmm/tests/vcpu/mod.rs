//! A vCPU with a minimal machine around it, to compare engines.
#![allow(dead_code, reason = "each test binary uses a part of this module")]

pub mod programs;

use vm_memory::{Bytes, GuestAddress};
use vmm::Engine;
use vmm::ram::Ram;
use vmm::vcpu::perf::events::{Core, CpuModel, branch_event};
use vmm::vcpu::perf::{CounterConfig, PerfCounter};
use vmm::vcpu::{Exit, Limit, Start, Vcpu, VcpuState};

use entry::{Digest, Position};
use programs::{CODE, DATA, GDT, IDT, PAGE_TABLES, Program};
use soft_cpu::CpuState;
use soft_cpu::state::{Segment, X87};

/// Reports that a test cannot run here; `scripts/test` counts the lines.
pub fn skip(test: &str, reason: &str) {
    use std::io::Write;
    eprintln!("SKIPPED {test}: {reason}");
    let Some(path) = std::env::var_os("VMFT_SKIPPED") else { return };
    let file = std::fs::OpenOptions::new().append(true).create(true).open(path);
    file.and_then(|mut f| writeln!(f, "{test}: {reason}"))
        .expect("the list of skipped tests is not writable");
}

/// Whether `/dev/kvm` can be opened. `false`: the test was reported as skipped.
pub fn has_kvm(test: &str) -> bool {
    let open = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    match open {
        Ok(_) => true,
        Err(e) => {
            skip(test, &format!("needs /dev/kvm: {e}"));
            false
        }
    }
}

/// Whether the host's KVM executes ring 0 by its emulator. Such a KVM opens interrupt windows there at a later instruction
/// boundary, which depends on the host's own interrupts.
pub fn emulates_ring_0() -> bool {
    std::path::Path::new("/sys/module/kvm_pvm").exists()
}

/// Whether this host has a branch counter that counts in guests. `false`: the test was reported as skipped.
pub fn has_counter(test: &str) -> bool {
    let model = CpuModel::host();
    let signal = libc::SIGRTMIN() + 3;
    let found = match branch_event(&model, Core::Big) {
        None => Err(format!("the CPU ({model}) is not in the table of exact branch counters")),
        Some(event) => PerfCounter::open(CounterConfig::guest(event.config), signal)
            .map(|_| ())
            .map_err(|e| format!("perf_event_open: {e}")),
    };
    if let Err(e) = &found {
        skip(test, &format!("needs a branch counter: {e} (vmft doctor says more)"));
    }
    found.is_ok() && has_kvm(test)
}

/// An exit, its answer, and the registers after it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub exit: Exit,
    pub answer: u64,
    /// RAX to R15, RIP, RFLAGS.
    pub registers: [u64; 18],
}

/// A vCPU and its RAM, with the program loaded.
pub struct Guest {
    pub ram: Ram,
    pub vcpu: Box<dyn Vcpu>,
    /// Interrupts that are still to be delivered, one at each HLT.
    pub interrupts: Vec<u8>,
    pub seen: Vec<Seen>,
    /// Only the guest's exits are kept, so that the engine finishes an instruction only where it has to.
    pub lazy: bool,
    /// Where kicks have stopped the guest between two exits.
    pub stops: Vec<(Position, CpuState)>,
}

impl Guest {
    pub fn new(engine: Engine, program: &Program) -> Guest {
        let ram = Ram::new(programs::RAM).unwrap();
        let write = |at: u64, bytes: &[u8]| ram.memory().write_slice(bytes, GuestAddress(at)).unwrap();
        let words = |at: u64, words: &[u64]| {
            for (n, word) in (0..).zip(words) {
                write(at + 8 * n, &word.to_le_bytes());
            }
        };
        // All bits that the CPU would set in the page tables are set.
        words(PAGE_TABLES, &[PAGE_TABLES + 0x1000 | 0x63]);
        words(PAGE_TABLES + 0x1000, &[PAGE_TABLES + 0x2000 | 0x63]);
        let pages: Vec<u64> = (0..8).map(|n| n << 21 | 0xe3).collect();
        words(PAGE_TABLES + 0x2000, &pages);
        words(GDT, &[0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff]);
        write(CODE, &program.code);
        for &(vector, handler) in &program.handlers {
            let low = handler & 0xffff | 0x10 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
            words(IDT + 16 * u64::from(vector), &[low, handler >> 32]);
        }
        let mut vcpu = engine.vcpu(&ram).unwrap();
        vcpu.reset(&Start { entry: CODE, boot_params: DATA, page_tables: PAGE_TABLES, gdt: GDT }).unwrap();
        Guest {
            ram,
            vcpu,
            interrupts: program.interrupts.clone(),
            seen: Vec::new(),
            lazy: false,
            stops: Vec::new(),
        }
    }

    /// Runs to the position, or to the program's end: a HLT for which no interrupt is left, or a shutdown. Returns `true` at the
    /// end.
    pub fn run(&mut self, until: Option<Position>) -> bool {
        loop {
            if until.is_some_and(|until| self.vcpu.position() >= until) {
                match self.vcpu.finish_instruction(&mut self.ram).unwrap() {
                    None => return false,
                    Some(exit) => self.access(exit),
                }
                continue;
            }
            // From the first HLT on an interrupt is pending.
            let window = self.seen.iter().any(|s| s.exit == Exit::Halted) && !self.interrupts.is_empty();
            let limit = Limit { until, interrupt_window: window, time_offset_ns: 0 };
            let exit = self.vcpu.run(&mut self.ram, &limit).unwrap();
            match exit {
                Exit::Reached => return false,
                Exit::InterruptWindow => {
                    let vector = self.interrupts.remove(0);
                    self.vcpu.inject(vector).unwrap();
                }
                Exit::Halted => {
                    let again = self.seen.last().is_some_and(|s| s.exit == Exit::Halted);
                    if self.interrupts.is_empty() || again && window {
                        return true;
                    }
                    self.note(exit, 0);
                }
                Exit::Shutdown => {
                    self.seen.push(Seen { exit, answer: 0, registers: [0; 18] });
                    return true;
                }
                Exit::Kicked if self.vcpu.position().rip != 0 => {
                    self.stops.push((self.vcpu.position(), self.cpu()));
                }
                Exit::Kicked | Exit::Between => {}
                access => self.access(access),
            }
        }
    }

    fn access(&mut self, mut exit: Exit) {
        loop {
            let n = self.seen.len() as u64;
            let answer = match exit {
                Exit::PioIn { port, size } => (u64::from(port) * 0x0101_0101 + n) & mask(size),
                Exit::MmioRead { addr, size } => (addr.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ n) & mask(size),
                _ => 0,
            };
            let next = self.vcpu.complete(&mut self.ram, answer).unwrap();
            match next {
                None if self.lazy => return self.note(exit, answer),
                None => match self.vcpu.finish_instruction(&mut self.ram).unwrap() {
                    None => return self.note(exit, answer),
                    Some(next) => {
                        self.seen.push(Seen { exit, answer, registers: [0; 18] });
                        exit = next;
                    }
                },
                Some(next) => {
                    // Registers in the middle of an instruction are undefined.
                    self.seen.push(Seen { exit, answer, registers: [0; 18] });
                    exit = next;
                }
            }
        }
    }

    fn note(&mut self, exit: Exit, answer: u64) {
        if self.lazy {
            return self.seen.push(Seen { exit, answer, registers: [0; 18] });
        }
        let cpu = self.cpu();
        let mut registers = [0; 18];
        registers[..16].copy_from_slice(&cpu.gpr);
        (registers[16], registers[17]) = (cpu.rip, cpu.rflags);
        self.seen.push(Seen { exit, answer, registers });
    }

    /// The registers, without those in which engines differ.
    pub fn cpu(&self) -> CpuState {
        normal(&self.vcpu.save().unwrap())
    }

    /// Digest of RAM. Checks that the engine has reported all its writes.
    pub fn ram_digest(&mut self) -> Digest {
        self.vcpu.report_written(&mut self.ram).unwrap();
        let digest = self.ram.digest();
        assert_eq!(digest, self.ram.full_digest(), "a write to RAM was not reported");
        digest
    }
}

fn mask(size: u8) -> u64 {
    u64::MAX >> (64 - 8 * u32::from(size))
}

/// Registers in which engines must agree. Each engine has its own positions, its own TLB, and its own hidden parts of segments
/// that 64-bit mode ignores; KVM does not save the x87's pointers.
pub fn normal(state: &VcpuState) -> CpuState {
    let mut cpu = state.cpu().clone();
    (cpu.retired, cpu.tsc_offset, cpu.tlb) = (0, 0, Default::default());
    cpu.rflags &= !(1 << 16);
    cpu.x87 = X87 { opcode: 0, instruction: 0, data: 0, ..cpu.x87 };
    for s in cpu.sys.seg.iter_mut().chain([&mut cpu.sys.ldtr]) {
        *s = Segment { selector: s.selector, ..Segment::default() };
    }
    cpu
}
