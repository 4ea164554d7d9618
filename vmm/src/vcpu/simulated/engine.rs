//! The software CPU, run one instruction at a time, with the behaviour of KVM and of hardware at stops.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use soft_cpu::state::{Cpu, Shadow};

use super::counter::{Chance, SimulatedCounter};
use crate::ram::Ram;
use crate::vcpu::landing::{
    LandingError, LandingStop, RunRequest, SteerableEngine, StopPoint, TickCounter, anchor, registers_digest,
};
use crate::vcpu::soft::SoftKick;
use crate::vcpu::{Exit, Kick, SoftVcpu, Vcpu, VcpuError};

const TF: u64 = 1 << 8;
const RF: u64 = 1 << 16;
/// DR7 without breakpoints.
const HIDDEN: u64 = 0x400;

/// Defects of a host that must not become visible to its guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quirks {
    /// RFLAGS.RF does not pass the host's breakpoint, as in KVM's instruction emulator.
    pub ignores_resume_flag: bool,
    /// One stop at a breakpoint in this many leaves RFLAGS.RF set.
    pub leaves_resume_flag_one_in: u64,
    /// One instruction in this many is followed by a signal that nothing has caused.
    pub signals_one_in: u64,
}

/// The steerable engine of [`super::SimulatedVcpu`].
pub struct SimulatedEngine {
    soft: SoftVcpu,
    counter: SimulatedCounter,
    quirks: Quirks,
    chance: Chance,
    /// Set by a kick.
    kick: Arc<AtomicBool>,
    /// Instruction counts at which the guest is kicked, in descending order.
    kicks: Vec<u64>,
    /// How many more stops there may be, see [`STOPS_MAX`].
    stops_left: u64,
}

/// After this many stops since [`SimulatedEngine::replace`] a test is taken to run forever.
const STOPS_MAX: u64 = 200_000;

impl SimulatedEngine {
    pub(in crate::vcpu) fn new(ram_len: u64, counter: SimulatedCounter, quirks: Quirks) -> SimulatedEngine {
        let soft = SoftVcpu::new(ram_len);
        let (kick, chance) = (Arc::default(), Chance::new(ram_len));
        SimulatedEngine { soft, counter, quirks, chance, kick, kicks: Vec::new(), stops_left: u64::MAX }
    }

    /// Uses another counter and other defects from now on.
    pub fn replace(&mut self, counter: SimulatedCounter, quirks: Quirks, seed: u64) {
        (self.counter, self.quirks, self.chance) = (counter, quirks, Chance::new(seed));
        self.stops_left = STOPS_MAX;
    }

    /// Kicks the guest when the number of retired instructions reaches each of `at`.
    pub fn kick_at(&mut self, mut at: Vec<u64>) {
        at.sort_unstable_by(|a, b| b.cmp(a));
        self.kicks = at;
    }

    /// The simulated counter.
    pub fn simulated_counter(&mut self) -> &mut SimulatedCounter {
        &mut self.counter
    }

    /// Instructions retired, for tests. On hardware this number is not known.
    pub fn retired(&self) -> u64 {
        self.soft.cpu().retired()
    }

    /// The CPU's registers.
    pub fn cpu(&self) -> &Cpu {
        self.soft.cpu().cpu()
    }

    /// Whether the guest stops before its next instruction, and why.
    fn stop_before(&mut self, request: &RunRequest) -> Option<LandingStop> {
        while self.kicks.last().is_some_and(|at| *at <= self.retired()) {
            self.kicks.pop();
            self.kick.store(true, Ordering::Release);
        }
        if self.kick.swap(false, Ordering::Acquire) {
            return Some(LandingStop::Kicked);
        }
        if self.counter.take_signal() || self.chance.one_in(self.quirks.signals_one_in) {
            return Some(LandingStop::Signal);
        }
        let cpu = self.cpu();
        if request.window && cpu.interruptible() {
            return Some(LandingStop::Exit(Exit::InterruptWindow));
        }
        let passes = cpu.flags.non_status() & RF != 0 && !self.quirks.ignores_resume_flag;
        let hit = request.breakpoint == Some(cpu.rip) && !passes && !self.in_flight();
        if !hit || cpu.shadow == Shadow::Everything || cpu.halted {
            return None;
        }
        let left = self.chance.one_in(self.quirks.leaves_resume_flag_one_in);
        self.soft.cpu_mut().set_resume_flag(left);
        Some(LandingStop::Breakpoint)
    }

    /// An interrupt was injected and the guest has not run since.
    fn in_flight(&self) -> bool {
        self.cpu().interrupt.is_some()
    }

    /// Executes one instruction, or delivers the fault that it raises.
    fn execute(&mut self, ram: &mut Ram, request: &RunRequest) -> Option<LandingStop> {
        let rip = self.cpu().rip;
        let mut bytes = [0; 15];
        let conditional = !self.in_flight() && {
            let len = self.fetch_code(ram, rip, &mut bytes);
            is_conditional_branch(&bytes[..len])
        };
        let before = self.retired();
        // While the host uses its breakpoint, the guest's own are off.
        let guest_dr7 = request.breakpoint.map(|_| self.soft.cpu_mut().swap_dr7(HIDDEN));
        let exit = self.soft.cpu_mut().step_once(ram.as_mut_slice());
        if let Some(dr7) = guest_dr7
            && self.cpu().sys.dr7 == HIDDEN
        {
            self.soft.cpu_mut().swap_dr7(dr7);
        }
        let retired = self.retired() != before;
        if retired && conditional {
            self.counter.tick();
        }
        if request.step && !retired && exit.is_none() {
            self.leak_trap_flag(ram);
        }
        match exit {
            Some(exit) => Some(LandingStop::Exit(exit.into())),
            None if request.step && retired => Some(LandingStop::Stepped),
            None => None,
        }
    }

    /// Sets TF in the frame of a fault: a fault while the host steps pushes the host's trap flag.
    fn leak_trap_flag(&mut self, ram: &mut Ram) {
        let rsp = self.cpu().regs[4];
        // The frame of a fault with an error code, as #PF has: code, RIP, CS, RFLAGS.
        let at = rsp as usize + 24;
        if let Some(flags) = ram.as_mut_slice().get_mut(at..at + 8) {
            flags[1] |= (TF >> 8) as u8;
        }
    }
}

impl SteerableEngine for SimulatedEngine {
    fn vcpu(&self) -> &dyn Vcpu {
        &self.soft
    }

    fn vcpu_mut(&mut self) -> &mut dyn Vcpu {
        &mut self.soft
    }

    fn prepare(&mut self, ram: &mut Ram, time_offset_ns: u64) {
        self.soft.prepare(ram, time_offset_ns);
    }

    fn take_kick(&mut self) -> bool {
        self.kick.swap(false, Ordering::Acquire)
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::new(SoftKick(self.kick.clone()))
    }

    fn run_until_stop(&mut self, ram: &mut Ram, request: RunRequest) -> Result<LandingStop, VcpuError> {
        if request.resume {
            self.soft.cpu_mut().set_resume_flag(true);
        }
        self.stops_left = self.stops_left.saturating_sub(1);
        if self.stops_left == 0 {
            return Err(LandingError::Counter("(simulated) stops the guest again and again").into());
        }
        if request.step {
            // KVM clears TF when it has taken the trap, even if the guest itself had set it.
            self.soft.cpu_mut().clear_trap_flag();
        }
        loop {
            if let Some(stop) = self.stop_before(&request) {
                return Ok(stop);
            }
            if let Some(stop) = self.execute(ram, &request) {
                return Ok(stop);
            }
        }
    }

    fn stop_point(&mut self) -> Result<StopPoint, VcpuError> {
        let in_flight = self.in_flight();
        let cpu = self.cpu();
        let gpr: &[u64; 16] = cpu.regs.first_chunk().unwrap_or_else(|| unreachable!("RAX to R15 come first"));
        Ok(StopPoint {
            rip: cpu.rip,
            registers: registers_digest(gpr, cpu.flags.to_bits(), cpu.sys.cr3),
            shadow: cpu.shadow != Shadow::None,
            in_flight,
            debugs_itself: cpu.flags.non_status() & TF != 0 || cpu.sys.dr7 & 0xff != 0,
        })
    }

    fn fetch_code(&mut self, ram: &mut Ram, at: u64, bytes: &mut anchor::CodeBytes) -> usize {
        self.soft.cpu().peek(ram.as_mut_slice(), at, bytes)
    }

    fn clear_resume_flag(&mut self) -> Result<(), VcpuError> {
        // KVM_SET_REGS drops a pending exception.
        self.soft.cpu_mut().drop_interrupt();
        self.soft.cpu_mut().set_resume_flag(false);
        Ok(())
    }

    fn counter(&mut self) -> &mut dyn TickCounter {
        &mut self.counter
    }
}

/// Whether these bytes are a Jcc (SDM 2, tables ). Done without a decoder, as it is asked for each instruction.
fn is_conditional_branch(code: &[u8]) -> bool {
    let prefix = |b: &&u8| matches!(**b, 0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x64..=0x67 | 0xf2 | 0xf3);
    let prefixes = code.iter().take_while(prefix).count();
    matches!(code.get(prefixes..), Some([0x70..=0x7f, ..] | [0x0f, 0x80..=0x8f, ..]))
}
