//! The machine: vCPU, RAM, devices and clock. It runs until it stops, and returns why; it makes no callbacks.
//!
//! Everything it does is a function of its state, of the inputs given to [`Machine::apply`], and of the positions at which
//! they are given. A stop by a kick changes nothing, so it may come anywhere.

mod access;
mod trapped;

use std::sync::Arc;

use entry::{Answer, Digest, DiskRequest, End, Input, Output, Position, PositionUnit, Question};
use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_128;

use crate::boot::rewrite::Rewritten;
use crate::boot::{BootError, BootPlan};
use crate::bus::Bus;
use crate::clock::Clock;
use crate::config::{ConfigError, MachineConfig, MachineIdentity};
use crate::devices::{DeviceContext, Devices, Effects};
use crate::digest::digest_of;
use crate::ram::{Ram, RamError};
use crate::vcpu::landing::Landings;
use crate::vcpu::{Exit, Kick, Limit, Vcpu, VcpuError, VcpuWarning};

/// Raised whenever the same inputs may lead to another state, or the same state have another digest.
pub const MACHINE_VERSION: u32 = 2;

/// The most by which one `Input::Clock` moves guest time: an hour. More takes several.
pub const CLOCK_STEP_MAX_NS: u64 = 3_600_000_000_000;
/// Pages that the scrub checks with each digest. They take some 20 µs of the 90 ms between two digests of a pair; 256 MiB are
/// checked once in a minute and a half.
const SCRUB_PAGES: u32 = 64;

/// Why a machine cannot be made or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The guest cannot be booted.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The host has no memory for the guest, or the memory is faulty.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// The engine failed.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// The answer is of another kind or length than the question asks for.
    #[error("the answer to the guest's question {0:?} is of the wrong kind or length")]
    WrongAnswer(Question),
}

/// Why [`Machine::run`] returned.
#[derive(Debug, PartialEq, Eq)]
pub enum Stop {
    /// The position that was asked for is reached.
    Reached,
    /// The machine was kicked.
    Kicked,
    /// The machine was kicked where the engine has no position: it must not be changed here, only run on. [`Stop::Kicked`]
    /// follows at the next position.
    Between,
    /// The guest waits for an interrupt. Running it again moves guest time to the next deadline, if there is one.
    Halted,
    /// There are outputs or disk requests to be taken.
    Outputs,
    /// The guest asks a question, to be answered by [`Machine::answer`] before it runs again.
    Question(Question),
    /// The guest's run is over. After [`End::Reboot`] it goes on by [`Machine::reset`].
    End(End),
}

/// Counts of what happened so far, for summaries. They are not part of the state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Number of port accesses.
    pub pio: u64,
    /// Number of accesses to memory outside RAM.
    pub mmio: u64,
    /// Number of HLTs.
    pub halts: u64,
    /// Number of interrupts delivered.
    pub interrupts: u64,
    /// Number of kicks that stopped the guest.
    pub kicks: u64,
    /// Guest time that passed while halted, in ns.
    pub idle_ns: u64,
    /// Counts of the landings of an engine with a branch counter.
    pub landings: Landings,
}

/// Digests of the parts of a machine, so that a difference can be located.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateDigest {
    /// Names of the parts with their digests: `vcpu`, `clock`, each device, `ram`.
    pub parts: Vec<(&'static str, Digest)>,
}

impl StateDigest {
    /// One digest of all parts.
    pub fn total(&self) -> Digest {
        let mut hash = XxHash3_128::new();
        for (_, digest) in &self.parts {
            hash.write(&digest.0.to_le_bytes());
        }
        Digest(hash.finish_128())
    }

    /// Names of the parts that differ.
    pub fn differences(&self, other: &StateDigest) -> Vec<&'static str> {
        let pairs = self.parts.iter().zip(&other.parts);
        pairs.filter(|(a, b)| a != b).map(|(a, _)| a.0).collect()
    }
}

/// A machine: see the description of the module.
pub struct Machine {
    pub(crate) config: MachineConfig,
    pub(crate) plan: BootPlan,
    pub(crate) vcpu: Box<dyn Vcpu>,
    pub(crate) ram: Ram,
    pub(crate) devices: Devices,
    pub(crate) clock: Clock,
    ports: Bus,
    memory: Bus,
    effects: Effects,
    /// The value that an I/O instruction will read, once the question that it led to is answered.
    unfinished: Option<u64>,
    /// The last run stopped at a HLT, and the caller was told.
    halted: bool,
    /// The last run stopped between two positions.
    between_positions: bool,
    counts: Counts,
}

impl Machine {
    /// A machine at the start of its boot.
    ///
    /// # Errors
    /// The configuration is wrong, or the host cannot provide RAM or the engine.
    pub fn new(config: MachineConfig, plan: BootPlan) -> Result<Machine, MachineError> {
        config.validate()?;
        let mut ram = Ram::new(config.memory_bytes)?;
        let mut vcpu = config.engine.vcpu(&ram)?;
        vcpu.reset(&plan.load(&mut ram)?)?;
        let devices = Devices::new(&config);
        let (ports, memory) = devices.buses();
        let clock = Clock::new(config.engine.unit());
        Ok(Machine {
            config,
            plan,
            vcpu,
            ram,
            devices,
            clock,
            ports,
            memory,
            effects: Effects::default(),
            unfinished: None,
            halted: false,
            between_positions: false,
            counts: Counts::default(),
        })
    }

    /// What a machine must have in common with this one to be the same machine.
    pub fn identity(&self) -> MachineIdentity {
        MachineIdentity {
            machine_version: MACHINE_VERSION,
            config: self.config.clone(),
            boot: self.plan.digest(),
        }
    }

    /// What positions count.
    pub fn unit(&self) -> PositionUnit {
        self.config.engine.unit()
    }

    /// Position of the guest.
    pub fn position(&self) -> Position {
        self.vcpu.position()
    }

    /// Guest time in ns.
    pub fn time_ns(&self) -> u64 {
        self.clock.time_ns(self.position())
    }

    /// Guest time in ns at which the next timer is due.
    pub fn deadline_ns(&self) -> Option<u64> {
        self.devices.deadline_ns()
    }

    /// Whether the last run stopped at a HLT.
    pub fn is_halted(&self) -> bool {
        self.halted
    }

    /// Whether the last run stopped between two positions: the state belongs to neither.
    pub fn is_between_positions(&self) -> bool {
        self.between_positions
    }

    /// A check word for each synchronous exit since the last call, on engines whose positions are these exits.
    pub fn take_exit_checks(&mut self) -> Vec<u16> {
        self.vcpu.take_exit_checks()
    }

    /// Counts of what happened so far.
    pub fn counts(&self) -> Counts {
        Counts { landings: self.vcpu.landings(), ..self.counts }
    }

    /// What the user should be told about this machine's engine, once.
    pub fn engine_warning(&self) -> Option<&VcpuWarning> {
        self.vcpu.warning()
    }

    /// Which instructions of the kernel were rewritten; `None` if its code was not searched.
    pub fn rewritten(&self) -> Option<&Rewritten> {
        self.plan.rewritten()
    }

    /// A handle that stops [`Machine::run`] from another thread.
    pub fn kicker(&self) -> Arc<dyn Kick> {
        self.vcpu.kicker()
    }

    /// The outputs since the last call, in order.
    pub fn take_outputs(&mut self) -> Vec<Output> {
        std::mem::take(&mut self.effects.outputs)
    }

    /// The requests to disks since the last call, in order.
    pub fn take_disk_requests(&mut self) -> Vec<DiskRequest> {
        std::mem::take(&mut self.effects.disk)
    }

    /// Runs the guest until something is to be reported, or exactly to `until`.
    ///
    /// At each position at which it stops, the machine is in the same state whatever stopped it: timers that are due have
    /// fired, and a kick does not stop the engine between a skip of time, or the delivery of an interrupt, and the next
    /// instruction. So an input that was applied there in a recording meets the same state in a replay.
    ///
    /// # Errors
    /// Those of the engine.
    pub fn run(&mut self, until: Option<Position>) -> Result<Stop, MachineError> {
        if let Some(stop) = self.finish_instruction()? {
            return Ok(stop);
        }
        let stop = self.run_guest(until)?;
        self.fire_timers();
        Ok(stop)
    }

    fn run_guest(&mut self, until: Option<Position>) -> Result<Stop, MachineError> {
        self.between_positions = false;
        let mut halt_is_known = std::mem::take(&mut self.halted);
        loop {
            self.fire_timers();
            if self.has_outputs() || until.is_some_and(|until| self.position() >= until) {
                if let Some(stop) = self.reach_boundary()? {
                    return Ok(stop);
                }
                self.halted = halt_is_known;
                return Ok(if self.has_outputs() { Stop::Outputs } else { Stop::Reached });
            }
            let limit = self.run_limit(until);
            match self.vcpu.run(&mut self.ram, &limit)? {
                Exit::Reached => {}
                Exit::Kicked => {
                    self.counts.kicks += 1;
                    return Ok(Stop::Kicked);
                }
                Exit::Between => {
                    self.between_positions = true;
                    return Ok(Stop::Between);
                }
                Exit::InterruptWindow => {
                    self.counts.interrupts += 1;
                    self.vcpu.inject(self.devices.pic.acknowledge())?;
                    halt_is_known = false;
                }
                Exit::Halted if halt_is_known && self.skip_to_deadline() => halt_is_known = false,
                Exit::Halted => {
                    self.counts.halts += 1;
                    self.halted = true;
                    self.flush_console();
                    return Ok(if self.has_outputs() { Stop::Outputs } else { Stop::Halted });
                }
                Exit::Shutdown => return Ok(Stop::End(End::TripleFault)),
                exit => {
                    if let Some(stop) = self.serve_access(exit)? {
                        return Ok(stop);
                    }
                }
            }
        }
    }

    /// How far the engine may run now: to the caller's limit, or to the next deadline if running moves time.
    fn run_limit(&self, until: Option<Position>) -> Limit {
        let deadline = self.devices.deadline_ns().and_then(|ns| self.clock.position_of(ns));
        Limit {
            until: until.into_iter().chain(deadline).min(),
            interrupt_window: self.devices.pic.pending(),
            time_offset_ns: self.clock.offset_ns(),
        }
    }

    fn has_outputs(&self) -> bool {
        !self.effects.outputs.is_empty() || !self.effects.disk.is_empty()
    }

    /// Lets the timers fire that are due. Changes nothing before a deadline, so it does not matter how often it is called.
    fn fire_timers(&mut self) {
        let now_ns = self.time_ns();
        if self.devices.deadline_ns().is_some_and(|deadline| deadline <= now_ns) {
            self.devices.advance(now_ns);
            self.flush_console();
        }
    }

    /// Outputs what was printed of an incomplete console line. Complete lines leave at once, the rest at the next tick or
    /// HLT: moments that are the same in every run.
    fn flush_console(&mut self) {
        self.devices.flush_console(&mut self.effects);
    }

    /// Moves a halted guest's time to the next deadline. Returns `false` if there is none.
    fn skip_to_deadline(&mut self) -> bool {
        let Some(deadline) = self.devices.deadline_ns() else { return false };
        let at = self.position();
        self.counts.idle_ns += deadline.saturating_sub(self.clock.time_ns(at));
        self.clock.raise(at, deadline);
        true
    }

    /// Whether the machine has room for an input now. An input that is applied without room is lost, in the same way on
    /// every side.
    pub fn has_room_for(&self, input: &Input) -> bool {
        self.devices.has_room_for(input, self.ram.memory())
    }

    /// Applies an input at the present position.
    pub fn apply(&mut self, input: Input) {
        let at = self.position();
        if let Input::Clock { time_ns } = input {
            return self.raise_time(time_ns);
        }
        // The input may wake a halted guest, so time must not skip to the next deadline first.
        self.halted = false;
        let now_ns = self.clock.time_ns(at);
        let mut cx = DeviceContext { now_ns, memory: self.ram.memory(), effects: &mut self.effects };
        self.devices.apply(input, &mut cx);
    }

    /// Moves guest time forward, at most by [`CLOCK_STEP_MAX_NS`].
    fn raise_time(&mut self, time_ns: u64) {
        let (at, now_ns) = (self.position(), self.time_ns());
        let time_ns = time_ns.min(now_ns.saturating_add(CLOCK_STEP_MAX_NS));
        if self.halted {
            self.counts.idle_ns += time_ns.saturating_sub(now_ns);
        }
        // Each timer on the way fires at its own time, as when a halted guest skips to its deadline.
        while let Some(deadline) = self.devices.deadline_ns().filter(|deadline| *deadline <= time_ns) {
            self.clock.raise(at, deadline);
            self.fire_timers();
        }
        self.clock.raise(at, time_ns);
    }

    /// Answers the question of [`Stop::Question`].
    ///
    /// # Errors
    /// The answer does not fit the question, or the engine failed.
    pub fn answer(&mut self, answer: Answer) -> Result<(), MachineError> {
        let Some(question) = self.effects.question.take() else { return Ok(()) };
        if let (Question::Time { .. } | Question::Random, Answer::Value(value)) = (&question, &answer) {
            return self.emulate(question, *value);
        }
        let now_ns = self.time_ns();
        let mut cx = DeviceContext { now_ns, memory: self.ram.memory(), effects: &mut self.effects };
        match self.devices.answer(&question, answer, &mut cx) {
            true => Ok(()),
            false => Err(MachineError::WrongAnswer(question)),
        }
    }

    /// Resets the machine: RAM is as booted and devices are as powered on, while position and guest time go on.
    ///
    /// # Errors
    /// RAM cannot be cleared, or the engine failed.
    pub fn reset(&mut self) -> Result<(), MachineError> {
        self.ram.clear()?;
        self.vcpu.reset(&self.plan.load(&mut self.ram)?)?;
        self.devices.reset();
        self.unfinished = None;
        self.halted = false;
        Ok(())
    }

    /// Takes over those parts of a saved state that are neither RAM nor vCPU.
    pub(crate) fn replace_devices(&mut self, clock: Clock, devices: Devices) {
        self.clock = clock;
        self.devices = devices;
        self.effects = Effects::default();
        self.unfinished = None;
        self.halted = false;
    }

    /// Digest of the whole state. Of RAM it hashes the pages written since the last digest, and a few more in turn, to find a
    /// change that nobody reported and that the digest would not show.
    ///
    /// To be called at an instruction boundary, not while a question is open.
    ///
    /// # Errors
    /// Those of the engine, or RAM was changed by something other than the machine.
    pub fn digest(&mut self) -> Result<StateDigest, MachineError> {
        self.vcpu.report_written(&mut self.ram)?;
        let ram = self.ram.digest();
        self.ram.scrub(SCRUB_PAGES)?;
        self.digest_with(ram)
    }

    /// Digest of the whole state, with all of RAM hashed. Equal to [`Machine::digest`] unless RAM was changed by something other than the
    /// machine.
    ///
    /// # Errors
    /// Those of the engine.
    pub fn full_digest(&mut self) -> Result<StateDigest, MachineError> {
        let ram = self.ram.full_digest();
        self.digest_with(ram)
    }

    fn digest_with(&self, ram: Digest) -> Result<StateDigest, MachineError> {
        let mut parts = vec![("vcpu", digest_of(&self.vcpu.save()?)), ("clock", digest_of(&self.clock))];
        parts.extend(self.devices.digests());
        parts.push(("ram", ram));
        Ok(StateDigest { parts })
    }

    /// Disk requests that were made and are not completed: to be issued again after a restore and when going live.
    pub fn unfinished_disk_requests(&self) -> Vec<DiskRequest> {
        self.devices.virtio.iter().flat_map(|device| device.unfinished()).collect()
    }

    /// RAM, to compare its pages.
    pub fn ram(&mut self) -> &mut Ram {
        &mut self.ram
    }

    /// The vCPU's state, to compare its registers.
    ///
    /// # Errors
    /// Those of the engine.
    pub fn vcpu_state(&self) -> Result<crate::vcpu::VcpuState, MachineError> {
        Ok(self.vcpu.save()?)
    }
}
