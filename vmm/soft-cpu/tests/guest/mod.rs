//! A guest for tests: flat page tables, GDT, TSS, an IDT whose handlers report their vector, and a program.
//!
//! Programs run to their end, where the harness puts a store to a device, or to a fault, whose handler is
//! such a store as well, so that the harness itself needs only MOV. Memory is mapped one to one and is
//! accessible from user mode.
#![allow(dead_code)]

use iced_x86::IcedError;
use iced_x86::code_asm::CodeAssembler;
use soft_cpu::state::{CpuState, Segment, TableRegister, seg};
use soft_cpu::{CpuExit, RunLimit, SoftCpu};

/// Bytes of RAM. The first 2 MiB are mapped by 4 KiB pages ([`PT`]), the rest by a 2 MiB page.
pub const RAM: usize = 4 << 20;
pub const PML4: u64 = 0x1000;
pub const PDPT: u64 = 0x2000;
pub const PD: u64 = 0x3000;
/// The page table of the first 2 MiB; entry n maps page n.
pub const PT: u64 = 0x4000;
pub const GDT: u64 = 0x5000;
pub const TSS: u64 = 0x6000;
pub const IDT: u64 = 0x7000;
/// RSP0 of the TSS.
pub const KERNEL_STACK: u64 = 0x9000;
/// IST1 of the TSS.
pub const IST1: u64 = 0xa000;
/// Handler of vector v: [`HANDLERS`] + 16 v.
pub const HANDLERS: u64 = 0xb000;
/// Where programs are loaded.
pub const CODE: u64 = 0x1_0000;
/// RSP at start.
pub const STACK: u64 = 0x3_0000;
/// Free for data, as are the page before it and the pages after it, up to 0x20_0000.
pub const DATA: u64 = 0x4_0000;
/// A gigabyte of device memory: every access is an exit.
pub const DEVICE: u64 = 0x4000_0000;
/// A store here ends the program.
pub const END: u64 = DEVICE + 0x1000;

pub const KERNEL_CODE: u16 = 0x08;
pub const KERNEL_DATA: u16 = 0x10;
pub const USER_DATA: u16 = 0x20 | 3;
pub const USER_CODE: u16 = 0x28 | 3;
pub const TSS_SELECTOR: u16 = 0x30;

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It reached its end.
    Done,
    /// A handler was entered.
    Fault { vector: u8, error: Option<u32>, rip: u64 },
    /// Something else.
    Exit(CpuExit),
}

/// A CPU with its RAM, and the state it starts from and ends in.
pub struct Guest {
    pub cpu: SoftCpu,
    pub ram: Vec<u8>,
    /// Before [`Guest::run`] the state to start from, afterwards the state at the end. After a fault that is
    /// the state in the handler, before its first instruction.
    pub state: CpuState,
}

/// Assembles a program for [`CODE`].
pub fn assemble(f: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    f(&mut a).unwrap();
    a.assemble(CODE).unwrap()
}

/// `mov [addr], al`, for an address below 2 GiB.
fn report(addr: u64) -> Vec<u8> {
    [&[0x88, 0x04, 0x25][..], &(addr as u32).to_le_bytes()].concat()
}

impl Guest {
    /// A guest that runs `code` at CPL 0.
    pub fn new(code: &[u8]) -> Guest {
        let mut cpu = SoftCpu::new(RAM as u64);
        let mut state = cpu.save();
        state.rip = CODE;
        state.gpr[4] = STACK;
        let s = &mut state.sys;
        s.cr0 = 0x8005_0033;
        s.cr3 = PML4;
        s.cr4 = 0x6a0;
        s.efer = 0xd01;
        s.pat = 0x0007_0406_0007_0406;
        s.seg = [KERNEL_DATA; 6].map(|selector| Segment { selector, attr: 0xc093, limit: !0, base: 0 });
        s.seg[seg::CS] = Segment { selector: KERNEL_CODE, attr: 0xa09b, limit: !0, base: 0 };
        s.tr = Segment { selector: TSS_SELECTOR, attr: 0x8b, limit: 0x67, base: TSS };
        s.gdtr = TableRegister { base: GDT, limit: 0x3f };
        s.idtr = TableRegister { base: IDT, limit: 0xfff };
        cpu.restore(&state);
        let mut g = Guest { cpu, ram: vec![0; RAM], state };
        g.build_tables();
        g.write(CODE, code);
        g.write(CODE + code.len() as u64, &report(END));
        g
    }

    /// A guest that runs what `f` assembles.
    pub fn asm(f: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Guest {
        Guest::new(&assemble(f))
    }

    /// Starts at CPL 3.
    pub fn user(mut self) -> Guest {
        let s = &mut self.state.sys;
        s.seg = [USER_DATA; 6].map(|selector| Segment { selector, attr: 0xc0f3, limit: !0, base: 0 });
        s.seg[seg::CS] = Segment { selector: USER_CODE, attr: 0xa0fb, limit: !0, base: 0 };
        self
    }

    /// Sets register `r` (0 is RAX, 15 is R15).
    pub fn reg(mut self, r: usize, value: u64) -> Guest {
        self.state.gpr[r] = value;
        self
    }

    /// Sets RFLAGS.
    pub fn flags(mut self, rflags: u64) -> Guest {
        self.state.rflags = rflags | 2;
        self
    }

    fn build_tables(&mut self) {
        const OPEN: u64 = 7;
        const LARGE: u64 = 0x80;
        self.write_u64(PML4, PDPT | OPEN);
        self.write_u64(PDPT, PD | OPEN);
        self.write_u64(PDPT + 8, DEVICE | OPEN | LARGE);
        self.write_u64(PD, PT | OPEN);
        self.write_u64(PD + 8, 0x20_0000 | OPEN | LARGE);
        for page in 0..512 {
            self.write_u64(PT + page * 8, page << 12 | OPEN);
        }
        let tss_low = 0x67 | (TSS & 0xff_ffff) << 16 | 0x8b << 40 | (TSS >> 24 & 0xff) << 56;
        let gdt = [
            0,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00cf_fb00_0000_ffff,
            0x00cf_f300_0000_ffff,
            0x00af_fb00_0000_ffff,
            tss_low,
            TSS >> 32,
        ];
        for (n, d) in gdt.into_iter().enumerate() {
            self.write_u64(GDT + n as u64 * 8, d);
        }
        self.write_u64(TSS + 4, KERNEL_STACK);
        self.write_u64(TSS + 0x24, IST1);
        for v in 0..256 {
            let handler = HANDLERS + 16 * v;
            let gate =
                handler & 0xffff | (KERNEL_CODE as u64) << 16 | 0x8e << 40 | (handler & 0xffff_0000) << 32;
            self.write_u64(IDT + 16 * v, gate);
            self.write(handler, &report(DEVICE + v));
        }
    }

    /// Runs to the end or to `limit` instructions. Checks that translated code does the same, also if it is
    /// stopped again and again.
    pub fn run_to(&mut self, limit: u64) -> Outcome {
        self.cpu.restore(&self.state);
        let (start, ram) = (self.state.clone(), self.ram.clone());
        let exit = self.cpu.run(&mut self.ram, &RunLimit { until: limit, interrupt_window: false });
        self.state = self.cpu.save();
        #[cfg(target_arch = "x86_64")]
        for stops in [u64::MAX, 7, 1] {
            self.compare_translated(&start, ram.clone(), limit, stops, exit);
        }
        match exit {
            CpuExit::MmioWrite { addr: END, .. } => Outcome::Done,
            CpuExit::MmioWrite { addr, .. } if (DEVICE..DEVICE + 256).contains(&addr) => {
                let vector = (addr - DEVICE) as u8;
                let rsp = self.state.gpr[4];
                let coded = matches!(vector, 8 | 10..=14 | 17 | 21);
                let error = coded.then(|| self.read_u64(rsp) as u32);
                Outcome::Fault { vector, error, rip: self.read_u64(rsp + 8 * coded as u64) }
            }
            exit => Outcome::Exit(exit),
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn compare_translated(
        &self,
        start: &CpuState,
        mut ram: Vec<u8>,
        limit: u64,
        stops: u64,
        expected: CpuExit,
    ) {
        let mut cpu = SoftCpu::new(RAM as u64);
        cpu.set_translator(Box::new(translator::NativeTranslator::new().unwrap()), 1);
        cpu.restore(start);
        let mut until = start.retired;
        let exit = loop {
            until = until.saturating_add(stops).min(limit);
            match cpu.run(&mut ram, &RunLimit { until, interrupt_window: false }) {
                CpuExit::Reached if until < limit => {}
                exit => break exit,
            }
        };
        assert_eq!(exit, expected, "translated, stopped every {stops}");
        assert_eq!(cpu.save(), self.state, "translated, stopped every {stops}");
        assert!(ram == self.ram, "translated, stopped every {stops}: RAM differs");
    }

    /// Runs to the end, but at most a million instructions.
    pub fn run(&mut self) -> Outcome {
        self.run_to(self.state.retired + 1_000_000)
    }

    /// Runs, and asserts that the program reached its end. Returns the registers.
    #[track_caller]
    pub fn done(&mut self) -> [u64; 16] {
        assert_eq!(self.run(), Outcome::Done);
        self.state.gpr
    }

    pub fn write(&mut self, addr: u64, bytes: &[u8]) {
        self.ram[addr as usize..addr as usize + bytes.len()].copy_from_slice(bytes);
    }

    pub fn write_u64(&mut self, addr: u64, value: u64) {
        self.write(addr, &value.to_le_bytes());
    }

    pub fn read(&self, addr: u64, len: usize) -> &[u8] {
        &self.ram[addr as usize..addr as usize + len]
    }

    pub fn read_u64(&self, addr: u64) -> u64 {
        u64::from_le_bytes(self.read(addr, 8).try_into().unwrap())
    }

    /// Changes the page-table entry of a page below 2 MiB.
    pub fn set_pte(&mut self, addr: u64, entry: u64) {
        assert!(addr < 0x20_0000);
        self.write_u64(PT + addr / 4096 * 8, entry);
    }
}
