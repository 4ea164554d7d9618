//! Runs cases on the soft CPU: the [`layout`] through real page tables, ring 3, and an IDT whose handlers
//! halt.

use std::panic::{AssertUnwindSafe, catch_unwind};

use soft_cpu::state::{Registers, Segment, Shadow, TableRegister, X87, seg};
use soft_cpu::tlb::TlbState;
use soft_cpu::{CpuExit, CpuState, RunLimit, SoftCpu};

use crate::layout::{self, CODE_LEN, DATA, PAGE};
use crate::state::{CaseEnd, CaseOutcome, CaseStart, Fx};

const RAM: usize = 64 * PAGE as usize;
/// Instructions that a case may retire; more than the longest REP can before it faults.
const BUDGET: u64 = 100_000;
/// All of RAM for ring 0.
const KERNEL: u64 = 0xffff_8000_0000_0000;

// Physical pages.
const IDT: usize = 0x0000;
const GDT: usize = 0x1000;
const TSS: usize = GDT + 0x100;
const HANDLERS: usize = 0x2000;
const STACK_TOP: usize = 0x4000;
const CODE: usize = 0x4000;
const DATA_START: usize = CODE + CODE_LEN as usize;
const TABLES: usize = 0x10000;

/// Selectors, as Linux has them, for instructions that show them.
const KERNEL_CS: u16 = 0x10;
const USER_CS: u16 = 0x33;
const USER_SS: u16 = 0x2b;
const TR: u16 = 0x40;

/// How a case is run.
enum Way<'a> {
    Whole,
    /// In single steps.
    Steps,
    /// In single steps, passing the state before and after each to a function, as long as that returns true.
    Observed(&'a mut dyn FnMut(&CpuState, &CpuState) -> bool),
}

/// A soft CPU in the layout's address space.
pub struct Soft {
    cpu: SoftCpu,
    translates: bool,
    ram: Vec<u8>,
    background: Vec<u64>,
    system: Registers,
}

impl Default for Soft {
    fn default() -> Soft {
        Soft::new()
    }
}

/// An 8-byte code or data descriptor without base, with all of the limit.
fn descriptor(access: u64, flags: u64) -> u64 {
    0x000f_0000_0000_ffff | access << 40 | flags << 52
}

fn segment(selector: u16, descriptor: u64) -> Segment {
    Segment { selector, attr: (descriptor >> 40 & 0xf0ff) as u16, limit: u32::MAX, base: 0 }
}

struct Tables<'a> {
    ram: &'a mut [u8],
    next: usize,
}

impl Tables<'_> {
    fn map(&mut self, linear: u64, physical: usize, rights: u64) {
        let mut table = TABLES;
        for level in (1..4).rev() {
            let slot = table + (linear >> (12 + 9 * level) & 511) as usize * 8;
            let mut entry = get(self.ram, slot);
            if entry == 0 {
                self.next += PAGE as usize;
                entry = self.next as u64 | 7;
                put(self.ram, slot, entry);
            }
            table = entry as usize & !0xfff;
        }
        put(self.ram, table + (linear >> 12 & 511) as usize * 8, physical as u64 | rights);
    }
}

fn get(ram: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(ram[at..at + 8].try_into().expect("8 bytes"))
}

fn put(ram: &mut [u8], at: usize, v: u64) {
    ram[at..at + 8].copy_from_slice(&v.to_le_bytes());
}

impl Soft {
    /// A CPU in the layout's address space.
    pub fn new() -> Soft {
        let background = layout::background();
        let mut ram = vec![0; RAM];
        let kernel_code = descriptor(0x9b, 0xa);
        let user_code = descriptor(0xfb, 0xa);
        let user_data = descriptor(0xf3, 0xc);
        let tss = KERNEL + TSS as u64;
        put(&mut ram, GDT + KERNEL_CS as usize, kernel_code);
        put(&mut ram, GDT + (USER_SS & !7) as usize, user_data);
        put(&mut ram, GDT + (USER_CS & !7) as usize, user_code);
        let busy_tss = 0x67 | (tss & 0xff_ffff) << 16 | 0x8b << 40 | (tss >> 24 & 0xff) << 56;
        put(&mut ram, GDT + TR as usize, busy_tss);
        put(&mut ram, GDT + TR as usize + 8, tss >> 32);
        put(&mut ram, TSS + 4, KERNEL + STACK_TOP as u64);
        ram[TSS + 0x66] = 0x68;
        for vector in 0..256 {
            let handler = KERNEL + HANDLERS as u64 + vector as u64 * 16;
            // Linux allows ring 3 to use INT 3 and INT 4.
            let dpl = if matches!(vector, 3 | 4) { 3 } else { 0 };
            let gate = handler & 0xffff | (KERNEL_CS as u64) << 16 | (0x8e | dpl << 5) << 40;
            put(&mut ram, IDT + vector * 16, gate | (handler >> 16 & 0xffff) << 48);
            put(&mut ram, IDT + vector * 16 + 8, handler >> 32);
            ram[HANDLERS + vector * 16] = 0xf4;
        }
        ram[CODE..CODE + CODE_LEN as usize].fill(0xcc);
        for (i, v) in background.iter().enumerate() {
            put(&mut ram, DATA_START + i * 8, *v);
        }
        map_all(&mut ram);
        let mut system = Registers {
            gdtr: TableRegister { base: KERNEL + GDT as u64, limit: 0xff },
            idtr: TableRegister { base: KERNEL + IDT as u64, limit: 0xfff },
            tr: Segment { selector: TR, attr: 0x8b, limit: 0x67, base: tss },
            // PG, AM, WP, NE, ET, MP, PE; PGE, OSXMMEXCPT, OSFXSR, PAE; NXE, LMA, LME, SCE: as Linux has
            // them.
            cr0: 0x8005_0033,
            cr3: TABLES as u64,
            cr4: 0x6a0,
            efer: 0xd01,
            ..Registers::default()
        };
        system.seg[seg::CS] = segment(USER_CS, user_code);
        system.seg[seg::SS] = segment(USER_SS, user_data);
        Soft { cpu: SoftCpu::new(RAM as u64), translates: false, ram, background, system }
    }

    /// A CPU in the layout's address space that translates every block before it runs.
    pub fn translated() -> Soft {
        let mut soft = Soft { translates: true, ..Soft::new() };
        let native = translator::NativeTranslator::new()
            .expect("the host allows executable memory for translated code");
        soft.cpu.set_translator(Box::new(native), 1);
        soft
    }

    /// Runs a case to its end; with `step`, in single steps.
    pub fn run(&mut self, start: &CaseStart, step: bool) -> CaseOutcome {
        match catch_unwind(AssertUnwindSafe(|| {
            self.run_case(start, if step { Way::Steps } else { Way::Whole })
        })) {
            Ok(outcome) => outcome,
            Err(panic) => {
                *self = if self.translates { Soft::translated() } else { Soft::new() };
                let text = panic.downcast_ref::<String>().map(String::as_str);
                let text = text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("?");
                broken(start, format!("panic: {text}"))
            }
        }
    }

    /// Runs a case in single steps and calls `each` with the state before and after each instruction, as long
    /// as it returns true. The case must have been run before, and must not end as [`CaseEnd::Broken`].
    pub fn trace(&mut self, start: &CaseStart, mut each: impl FnMut(&CpuState, &CpuState) -> bool) {
        self.run_case(start, Way::Observed(&mut each));
    }

    fn run_case(&mut self, start: &CaseStart, way: Way<'_>) -> CaseOutcome {
        let code = CODE + (start.rip - layout::CODE) as usize;
        self.ram[code..code + start.code.len()].copy_from_slice(&start.code);
        for p in &start.planted {
            for (i, b) in p.bytes[..p.len as usize].iter().enumerate() {
                let at = physical(p.at + i as u64);
                self.ram[at] = *b;
            }
        }
        self.cpu.restore(&self.initial(start));
        let exit = match way {
            Way::Whole => self.run_to(BUDGET),
            Way::Steps => self.steps(&mut |_| true),
            Way::Observed(each) => {
                let mut before = self.cpu.save();
                self.steps(&mut |cpu| {
                    let after = cpu.save();
                    let on = each(&before, &after);
                    before = after;
                    on
                })
            }
        };
        let outcome = match exit {
            CpuExit::Hlt => self.outcome(),
            CpuExit::Reached => CaseOutcome { end: CaseEnd::Never, ..broken(start, String::new()) },
            exit => broken(start, format!("exit {exit:?}")),
        };
        let outcome = CaseOutcome { memory: self.take_changes(), ..outcome };
        self.ram[code..code + start.code.len()].fill(0xcc);
        outcome
    }

    fn run_to(&mut self, until: u64) -> CpuExit {
        self.cpu.run(&mut self.ram, &RunLimit { until, interrupt_window: false })
    }

    /// Runs in single steps as long as `on` returns true.
    fn steps(&mut self, on: &mut dyn FnMut(&SoftCpu) -> bool) -> CpuExit {
        let mut exit = CpuExit::Reached;
        for until in 1..=BUDGET {
            exit = self.run_to(until);
            // An instruction that faults does not retire: the exit is then that of the handler.
            if !on(&self.cpu) || !matches!(exit, CpuExit::Reached) {
                break;
            }
        }
        exit
    }

    fn initial(&self, start: &CaseStart) -> CpuState {
        let fx = &start.fx;
        let mut x87 = X87 {
            control: fx.fcw,
            status: fx.fsw & !(7 << 11),
            top: fx.top() as u8,
            in_use: fx.in_use,
            ..X87::default()
        };
        for (i, (significand, sign_exponent)) in fx.st.iter().enumerate() {
            let at = (fx.top() + i) % 8;
            x87.significand[at] = *significand;
            x87.sign_exponent[at] = *sign_exponent;
        }
        CpuState {
            gpr: start.gpr,
            fs_base: layout::FS_BASE,
            gs_base: layout::GS_BASE,
            rip: start.rip,
            rflags: start.rflags,
            xmm: fx.xmm,
            mxcsr: fx.mxcsr,
            x87,
            sys: self.system,
            retired: 0,
            tsc_offset: 0,
            shadow: Shadow::default(),
            halted: false,
            interrupt: None,
            tlb: TlbState::default(),
        }
    }

    /// The outcome of the case, from the registers and the stack of the handler.
    fn outcome(&self) -> CaseOutcome {
        let s = self.cpu.save();
        let vector = (s.rip.wrapping_sub(KERNEL + HANDLERS as u64) / 16) as u8;
        let mut frame = s.gpr[4].wrapping_sub(KERNEL) as usize;
        let has_error = matches!(vector, 8 | 10..=14 | 17);
        let error = if has_error { get(&self.ram, frame) as u32 } else { 0 };
        frame += if has_error { 8 } else { 0 };
        let mut gpr = s.gpr;
        gpr[4] = get(&self.ram, frame + 24);
        let top = s.x87.top as usize;
        let fx = Fx {
            fcw: s.x87.control,
            fsw: s.x87.status | (s.x87.top as u16) << 11,
            in_use: s.x87.in_use,
            mxcsr: s.mxcsr,
            st: std::array::from_fn(|i| {
                let at = (top + i) % 8;
                (s.x87.significand[at], s.x87.sign_exponent[at])
            }),
            xmm: s.xmm,
        };
        CaseOutcome {
            gpr,
            rip: get(&self.ram, frame),
            rflags: get(&self.ram, frame + 16),
            fx,
            end: CaseEnd::Exception { vector, error, cr2: s.sys.cr2 },
            memory: Vec::new(),
        }
    }

    /// Returns the words of memory that have changed, and restores them.
    fn take_changes(&mut self) -> Vec<(u32, u64)> {
        let mut changes = Vec::new();
        for (i, was) in self.background.iter().enumerate() {
            let at = DATA_START + i * 8;
            let now = get(&self.ram, at);
            if now != *was {
                changes.push((i as u32, now));
                put(&mut self.ram, at, *was);
            }
        }
        changes
    }
}

fn map_all(ram: &mut [u8]) {
    const NO_EXECUTE: u64 = 1 << 63;
    let mut tables = Tables { ram, next: TABLES };
    for page in (0..RAM).step_by(PAGE as usize) {
        tables.map(KERNEL + page as u64, page, 3);
    }
    for page in 0..CODE_LEN / PAGE {
        tables.map(layout::CODE + page * PAGE, CODE + (page * PAGE) as usize, 5);
    }
    for (n, page) in DATA.iter().enumerate() {
        let rights = if page.writable { 7 } else { 5 };
        tables.map(page.at, DATA_START + n * PAGE as usize, rights | NO_EXECUTE);
    }
}

/// RAM offset of a byte of a data page.
fn physical(addr: u64) -> usize {
    let page = DATA.iter().position(|p| p.at == addr & !(PAGE - 1)).expect("a data page");
    DATA_START + page * PAGE as usize + (addr % PAGE) as usize
}

/// The outcome of a case that did not end with an exception.
fn broken(start: &CaseStart, why: String) -> CaseOutcome {
    CaseOutcome {
        gpr: start.gpr,
        rip: start.rip,
        rflags: start.rflags,
        fx: start.fx,
        end: CaseEnd::Broken(why),
        memory: Vec::new(),
    }
}
