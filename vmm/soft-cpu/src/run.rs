//! The run loop: blocks of decoded instructions, and what happens between them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::code::{Block, CodeCache, Heat};
use crate::decode::LENGTH_MAX;
use crate::exception::PendingEvent;
use crate::exit::{CpuExit, CpuStop};
use crate::flags::bits;
use crate::insn::{self, Insn};
use crate::paging::{Access, is_canonical};
use crate::state::{Cpu, CpuState, FetchPage, RIP_BASE, Shadow};
use crate::tier::{Ran, Translator};

/// Instructions that translated code may run before the run loop checks whether another thread wants it to
/// stop.
const TRANSLATED_BETWEEN_CHECKS: u64 = 4096;

/// How far [`SoftCpu::run`] may go.
#[derive(Clone, Copy, Debug)]
pub struct RunLimit {
    /// Stop when this many instructions have retired since the machine was made.
    pub until: u64,
    /// Stop as soon as an external interrupt could be delivered.
    pub interrupt_window: bool,
}

/// A CPU with its cache of decoded code.
pub struct SoftCpu {
    pub(crate) cpu: Cpu,
    code: CodeCache,
    translator: Option<Box<dyn Translator>>,
    kick: Arc<AtomicBool>,
}

impl SoftCpu {
    /// A CPU for `ram_len` bytes of RAM. It does nothing useful until a state is restored.
    pub fn new(ram_len: u64) -> SoftCpu {
        SoftCpu { cpu: Cpu::new(ram_len), code: CodeCache::new(), translator: None, kick: Arc::default() }
    }

    /// From its `hot`th run on, a block is run as translated code. This changes nothing but the speed.
    pub fn set_translator(&mut self, translator: Box<dyn Translator>, hot: u8) {
        self.forget_code();
        self.code.set_hot(hot);
        self.translator = Some(translator);
    }

    /// Runs the guest until there is an exit. `ram` is all of RAM.
    ///
    /// # Panics
    /// When `ram` has another length than was given to [`SoftCpu::new`].
    pub fn run(&mut self, ram: &mut [u8], limit: &RunLimit) -> CpuExit {
        assert_eq!(
            ram.len() as u64,
            self.cpu.ram_len,
            "RAM does not have the size that the CPU was made for"
        );
        if let Some(exit) = self.wake(ram) {
            return exit;
        }
        loop {
            let cpu = &self.cpu;
            if cpu.retired >= limit.until {
                return CpuExit::Reached;
            }
            if self.kick.load(Ordering::Relaxed) && self.kick.swap(false, Ordering::Acquire) {
                return CpuExit::Kicked;
            }
            if limit.interrupt_window && cpu.interruptible() {
                return CpuExit::InterruptWindow;
            }
            let exit = if cpu.needs_care(CARE) {
                self.careful_step(ram, limit.until - cpu.retired)
            } else {
                // Whatever may open the interrupt window ends its block, so that no moment is missed.
                let window = if limit.interrupt_window { bits::IF } else { 0 };
                self.blocks(ram, limit.until, CARE | window)
            };
            if let Some(exit) = exit {
                return exit;
            }
        }
    }

    /// Does one step: executes the next instruction (or one iteration of it), or delivers the exception that
    /// it raises. [`SoftCpu::retired`] tells whether it retired. Slow; for callers that look at every step.
    pub fn step_once(&mut self, ram: &mut [u8]) -> Option<CpuExit> {
        match self.wake(ram) {
            None => self.careful_step(ram, 1),
            exit => exit,
        }
    }

    /// Delivers an interrupt that was injected. Returns an exit if there is nothing to execute.
    fn wake(&mut self, ram: &mut [u8]) -> Option<CpuExit> {
        if let Some(vector) = self.cpu.interrupt.take() {
            self.cpu.halted = false;
            if let Some(exit) = self.deliver(ram, PendingEvent::Interrupt(vector)) {
                return Some(exit);
            }
        }
        self.cpu.halted.then_some(CpuExit::Hlt)
    }

    /// Answers the question of the last [`CpuExit`] and finishes its instruction. `None`: it has retired.
    /// For writes the value is ignored.
    pub fn complete(&mut self, ram: &mut [u8], value: u64) -> Option<CpuExit> {
        self.cpu.io_replies.values.push(value);
        self.cpu.io_replies.used = 0;
        let exit = self.careful_step(ram, 1);
        if !exit.is_some_and(|e| e.is_question()) {
            self.cpu.io_replies.values.clear();
            self.cpu.io_replies.used = 0;
        }
        exit
    }

    /// Instructions retired since the machine was made.
    pub fn retired(&self) -> u64 {
        self.cpu.retired
    }

    /// Whether HLT has retired and no interrupt has been delivered since.
    pub fn is_halted(&self) -> bool {
        self.cpu.halted
    }

    /// Whether an interrupt may be injected now.
    pub fn interruptible(&self) -> bool {
        self.cpu.interruptible()
    }

    /// Delivers an external interrupt before the next instruction.
    ///
    /// # Panics
    /// When [`SoftCpu::interruptible`] is false.
    pub fn inject(&mut self, vector: u8) {
        assert!(self.cpu.interruptible(), "an interrupt was injected while the guest could not take one");
        self.cpu.interrupt = Some(vector);
    }

    /// When set to true from another thread, [`SoftCpu::run`] returns [`CpuExit::Kicked`] soon.
    pub fn kicker(&self) -> Arc<AtomicBool> {
        self.kick.clone()
    }

    /// Sets what RDTSC adds to the number of retired instructions.
    pub fn set_tsc_offset(&mut self, offset: u64) {
        self.cpu.tsc_offset = offset;
    }

    /// The machine has written to page `page` of RAM: drops the code that was decoded from it.
    pub fn ram_changed(&mut self, page: u32) {
        if self.cpu.code_chunks[page as usize] != 0 {
            self.cpu.code_written.push(page);
            self.drop_written_code();
        }
    }

    /// Passes `page` the number of each page of RAM that the CPU has written since the last call, in the
    /// order of their first writes.
    pub fn take_written(&mut self, page: impl FnMut(u32)) {
        self.cpu.take_written(page);
    }

    /// The CPU's state. To be called at an instruction boundary, so not between an exit that is a question
    /// and `complete`.
    pub fn save(&self) -> CpuState {
        self.cpu.save()
    }

    /// Replaces the state by a saved one, and drops all decoded code.
    pub fn restore(&mut self, state: &CpuState) {
        self.cpu.restore(state);
        self.forget_code();
    }

    fn forget_code(&mut self) {
        for page in 0..self.cpu.code_chunks.len() {
            self.forget_code_of(page);
        }
    }

    fn forget_code_of(&mut self, page: usize) {
        let chunks = std::mem::take(&mut self.cpu.code_chunks[page]);
        if chunks != 0 {
            self.code.invalidate(page, chunks);
            if let Some(translator) = &mut self.translator {
                translator.invalidate(page);
            }
        }
    }

    /// Runs blocks until there is an exit, `until` instructions have retired, a flag of `attention` is set,
    /// the next instruction needs [`SoftCpu::careful_step`], or another thread asks for a stop.
    fn blocks(&mut self, ram: &mut [u8], until: u64, attention: u64) -> Option<CpuExit> {
        loop {
            let budget = until - self.cpu.retired;
            let exit = match self.translated(ram, budget) {
                Some(exit) => exit,
                None => self.step(ram, budget, u64::MAX, true),
            };
            let kicked = self.kick.load(Ordering::Relaxed);
            if exit.is_some() || kicked || self.cpu.retired >= until || self.cpu.needs_care(attention) {
                return exit;
            }
        }
    }

    /// Runs translated code, if there is any for RIP.
    #[inline(always)]
    fn translated(&mut self, ram: &mut [u8], budget: u64) -> Option<Option<CpuExit>> {
        let translator = self.translator.as_mut()?;
        match translator.run(&mut self.cpu, ram, budget.min(TRANSLATED_BETWEEN_CHECKS))? {
            Ran::AtBlock => Some(None),
            Ran::Stopped(stop, insn, rip) => Some(self.stopped(ram, stop, rip, Some(insn))),
        }
    }

    /// Counts one more run of the block at RIP, which is at RAM offset `start`, and translates it if it is
    /// hot. Returns whether there is translated code for it now.
    #[inline(always)]
    fn translate(&mut self, ram: &[u8], start: usize, block: &Block) -> bool {
        let Some(translator) = &mut self.translator else { return false };
        if self.code.warm(block) == Heat::Cold {
            return false;
        }
        if translator.link(&self.cpu, start) {
            return true;
        }
        if !translator.translate(ram, start, block.count as usize) {
            self.code.never_translate(block);
            return false;
        }
        translator.link(&self.cpu, start)
    }

    /// Runs one block, or as much of it as `budget` (instructions and iterations) and `most` (instructions)
    /// allow. With `may_translate` it may run translated code, and then more than one block.
    #[inline(always)]
    fn step(&mut self, ram: &mut [u8], budget: u64, most: u64, may_translate: bool) -> Option<CpuExit> {
        let rip = self.cpu.rip;
        let start = match self.fetch(ram, rip) {
            Ok(start) => start,
            Err(stop) => return self.stopped(ram, stop, rip, None),
        };
        let block = match self.code.find(start) {
            Some(block) => block,
            None => match self.decode_block(ram, start) {
                Some(block) => block,
                None => return self.crossing_step(ram, rip, budget),
            },
        };
        if may_translate
            && self.translate(ram, start, &block)
            && let Some(exit) = self.translated(ram, budget)
        {
            return exit;
        }
        self.execute(ram, &block, budget, most)
    }

    #[inline(always)]
    fn execute(&mut self, ram: &mut [u8], block: &Block, budget: u64, most: u64) -> Option<CpuExit> {
        let cpu = &mut self.cpu;
        let rip = cpu.rip;
        let mut insns = self.code.insns(block);
        cpu.regs[RIP_BASE as usize] = rip;
        cpu.rip = rip.wrapping_add(block.len as u64);
        cpu.rep_budget = budget;
        cpu.left = 0;
        let most = budget.min(most);
        if insns.len() as u64 > most {
            // Only the block's last instruction looks at RIP (it finds the end of the block), and that one
            // does not run now.
            let (now, later) = insns.split_at(most as usize);
            cpu.rip = rip.wrapping_add(later[0].offset as u64);
            insns = now;
        }
        if let Err(stop) = insn::run(cpu, ram, insns) {
            let done = insns.len() - 1 - cpu.left;
            cpu.retired += done as u64;
            let insn = insns[done];
            return self.stopped(ram, stop, rip.wrapping_add(insn.offset as u64), Some(insn));
        }
        cpu.retired += (insns.len() - cpu.left) as u64;
        None
    }

    /// Runs one instruction with all the checks that a block does without: interrupt shadow, TF, RF,
    /// breakpoints, alignment. REP may run `budget` iterations, or only one if each may trap.
    #[cold]
    #[inline(never)]
    fn careful_step(&mut self, ram: &mut [u8], budget: u64) -> Option<CpuExit> {
        let cpu = &mut self.cpu;
        let (shadow, rf) = (cpu.shadow, cpu.flags.non_status() & bits::RF);
        if let Err(stop) = cpu.debug_before() {
            let rip = cpu.rip;
            return self.stopped(ram, stop, rip, None);
        }
        let before = cpu.retired;
        let budget = if cpu.debugged() { 1 } else { budget };
        let exit = self.step(ram, budget, 1, false);
        let cpu = &mut self.cpu;
        if exit.is_some_and(|e| e.is_question()) {
            // The instruction has not run yet.
            cpu.shadow = shadow;
            cpu.flags.update_non_status(0, rf);
        }
        let retired = cpu.retired != before;
        if !cpu.debug_after(retired) {
            return exit;
        }
        cpu.halted = false;
        self.deliver(ram, PendingEvent::Exception)
    }

    /// RAM offset of the instruction at `rip`.
    #[inline(always)]
    fn fetch(&mut self, ram: &mut [u8], rip: u64) -> Result<usize, CpuStop> {
        match self.cpu.fetch.offset(rip) {
            Some(offset) => Ok(offset),
            None => self.fetch_page(ram, rip),
        }
    }

    /// [`SoftCpu::fetch`] for an instruction that is not in the page of the last one.
    #[inline(never)]
    fn fetch_page(&mut self, ram: &mut [u8], rip: u64) -> Result<usize, CpuStop> {
        let cpu = &mut self.cpu;
        cpu.fetch = FetchPage::NONE;
        let page = rip >> 12;
        let cached = *cpu.tlb.code(page);
        let entry = if cached.holds(page) && cpu.may_fetch(&cached) {
            cached
        } else {
            if !is_canonical(rip) {
                return cpu.general_protection(0);
            }
            let user = cpu.user();
            // The page tables, whose accessed bits are set, may share a page with decoded code. No
            // instruction is running now, so that code can be dropped at once.
            cpu.code_write_allowed = true;
            let entry = cpu.translate(ram, rip, Access::Fetch, user);
            cpu.code_write_allowed = false;
            self.drop_written_code();
            entry?
        };
        let cpu = &mut self.cpu;
        match cpu.ram_offset(entry.frame & 0x000f_ffff_ffff_f000) {
            Some(frame) => {
                cpu.fetch = FetchPage::new(rip, frame);
                Ok(frame + (rip as usize & 4095))
            }
            // There is no code outside RAM: as if 0xff were read, which is not an instruction.
            None => cpu.undefined(),
        }
    }

    #[cold]
    #[inline(never)]
    fn decode_block(&mut self, ram: &[u8], start: usize) -> Option<Block> {
        let page = start / 4096;
        let mut chunks = self.cpu.code_chunks[page];
        let block = self.code.decode(ram, start, &mut chunks);
        if self.cpu.code_chunks[page] == 0 && chunks != 0 {
            self.cpu.fast.forget_writes_to(page * 4096);
        }
        self.cpu.code_chunks[page] = chunks;
        block
    }

    /// Runs an instruction that crosses a page boundary.
    #[cold]
    #[inline(never)]
    fn crossing_step(&mut self, ram: &mut [u8], rip: u64, budget: u64) -> Option<CpuExit> {
        let mut bytes = [0; LENGTH_MAX];
        let first = 4096 - (rip as usize & 4095);
        let halves = (|| Ok((self.fetch(ram, rip)?, self.fetch(ram, rip.wrapping_add(first as u64))?)))();
        let (a, b) = match halves {
            Ok(halves) => halves,
            Err(stop) => return self.stopped(ram, stop, rip, None),
        };
        bytes[..first].copy_from_slice(&ram[a..a + first]);
        bytes[first..].copy_from_slice(&ram[b..b + LENGTH_MAX - first]);
        let insn = self.code.crossing(a, &bytes);
        self.single(ram, rip, insn, budget)
    }

    /// Runs one instruction that is not, or no longer, in the cache.
    fn single(&mut self, ram: &mut [u8], rip: u64, insn: Insn, budget: u64) -> Option<CpuExit> {
        let cpu = &mut self.cpu;
        cpu.rip = rip.wrapping_add(insn.len as u64);
        cpu.regs[RIP_BASE as usize] = rip.wrapping_sub(insn.offset as u64);
        cpu.rep_budget = budget;
        match (insn.exec)(cpu, ram, &[insn]) {
            Ok(()) => {
                cpu.retired += 1;
                None
            }
            Err(stop) => self.stopped(ram, stop, rip, Some(insn)),
        }
    }

    /// Handles an instruction at `rip` that did not simply finish, or its fetch (then `insn` is `None`).
    #[cold]
    #[inline(never)]
    fn stopped(&mut self, ram: &mut [u8], stop: CpuStop, rip: u64, insn: Option<Insn>) -> Option<CpuExit> {
        let next_rip = self.cpu.rip;
        self.cpu.rip = rip;
        match stop {
            CpuStop::Fault => self.deliver(ram, PendingEvent::Exception),
            CpuStop::Io => Some(self.cpu.io),
            CpuStop::RepSuspended => {
                // REP that was interrupted between two iterations must not hit its breakpoint again (SDM 3B
                // 18.3.1.1).
                self.cpu.flags.update_non_status(0, bits::RF);
                None
            }
            CpuStop::Trap => {
                self.cpu.rip = next_rip;
                self.cpu.retired += 1;
                self.deliver(ram, PendingEvent::Exception)
            }
            CpuStop::Halt => {
                self.cpu.rip = next_rip;
                self.cpu.retired += 1;
                self.cpu.halted = true;
                Some(CpuExit::Hlt)
            }
            CpuStop::Shutdown => Some(CpuExit::Shutdown),
            CpuStop::Slow => unreachable!("`quick!` calls the exact handler when the quick one gives up"),
            CpuStop::CodeWrite => {
                self.drop_written_code();
                let insn = insn?;
                // REP may be stopped again and again by its own writes; each time it gets one iteration
                // further.
                self.cpu.code_write_allowed = true;
                self.cpu.io_replies.used = 0;
                let exit = self.single(ram, rip, insn, 1);
                self.cpu.code_write_allowed = false;
                self.drop_written_code();
                exit
            }
        }
    }

    fn deliver(&mut self, ram: &mut [u8], event: PendingEvent) -> Option<CpuExit> {
        self.cpu.code_write_allowed = true;
        let delivered = self.cpu.deliver(ram, event);
        self.cpu.code_write_allowed = false;
        self.drop_written_code();
        delivered.err().map(|_| CpuExit::Shutdown)
    }

    fn drop_written_code(&mut self) {
        while let Some(page) = self.cpu.code_written.pop() {
            self.forget_code_of(page as usize);
        }
    }
}

/// Flags with which an instruction has to run by [`SoftCpu::careful_step`].
const CARE: u64 = bits::TF | bits::RF | bits::AC;

impl Cpu {
    /// Whether the next instruction has to run by [`SoftCpu::careful_step`], or a flag of `attention` is set.
    #[inline(always)]
    fn needs_care(&self, attention: u64) -> bool {
        self.shadow != Shadow::None || self.flags.non_status() & attention != 0 || self.sys.dr7 & 0xff != 0
    }
}
