//! Records and replays small guests with a counter that skids, and tests each [`Hazard`].

use std::collections::VecDeque;
use std::hash::Hasher;

use entry::Position;
use soft_cpu::state::Shadow;
use twox_hash::{XxHash3_64, XxHash3_128};
use vm_memory::{Bytes, GuestAddress};

use super::policy::Margin;
use super::{Hazard, Lander, SteerableEngine, anchor};
use crate::ram::Ram;
use crate::vcpu::simulated::{Chance, Quirks, SimulatedCounter, SimulatedEngine, SimulatedVcpu, Skid};
use crate::vcpu::{Exit, Limit, Vcpu, VcpuError, VcpuState};

mod guest;
mod hazards;
mod properties;

/// Exits after which a guest is taken to run forever.
const TURNS_MAX: u32 = 20_000;

/// An input: a word written to the guest's memory, and an interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Input {
    at: Position,
    word: u64,
    vector: u8,
}

/// The final state of a guest, and a digest of what it did.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Ending {
    /// Digest of RAM and of all accesses to devices.
    digest: (u128, u64),
    registers: [u64; 16],
    at: Position,
}

#[derive(Debug)]
enum Failure {
    Vcpu(VcpuError),
    /// A replayed guest ran past the position of an input.
    Past,
    /// The guest does not end.
    Endless,
    Shutdown,
    /// A kicked guest was stopped where a replay cannot stop it.
    NotAPosition,
}

impl From<VcpuError> for Failure {
    fn from(e: VcpuError) -> Failure {
        Failure::Vcpu(e)
    }
}

/// The world around a vCPU, which changes with each exit.
#[derive(Clone, Debug, Default)]
struct World {
    pending: VecDeque<u8>,
    accesses: u64,
    next: usize,
}

/// A vCPU with RAM, which runs one program after the other.
struct Bench {
    vcpu: SimulatedVcpu,
    ram: Ram,
    world: World,
    /// The CPU before its first instruction.
    origin: VcpuState,
}

impl Bench {
    fn new() -> Bench {
        let counter = SimulatedCounter::new(Skid::default(), 0);
        let host = SimulatedEngine::new(guest::RAM, counter, Quirks::default());
        let mut vcpu = SimulatedVcpu::new(host, Lander::new(Margin::new(1, 1)));
        let mut ram = Ram::new(guest::RAM).unwrap();
        vcpu.reset(&guest::load(&mut ram, &[])).unwrap();
        let origin = vcpu.engine.vcpu().save().unwrap();
        Bench { vcpu, ram, world: World::default(), origin }
    }

    fn start(&mut self, program: &[u8], setting: &Setting, seed: u64) {
        guest::load(&mut self.ram, program);
        let mut counter = SimulatedCounter::new(setting.skid, seed);
        counter.miscounts_one_in = setting.miscounts_one_in;
        self.vcpu.engine.replace(counter, setting.quirks, seed);
        self.vcpu.engine.kick_at(Vec::new());
        let mut lander = Lander::new(Margin::new(setting.margin, 1 << 20));
        lander.ignored_hazard = setting.ignored;
        self.vcpu.lander = lander;
        self.vcpu.restore_at(&self.origin, Position::default()).unwrap();
        self.world = World::default();
    }

    /// Records a program whose guest is kicked at these instruction counts and gets an input at each kick.
    fn record(
        &mut self,
        program: &[u8],
        kicks: &[u64],
        setting: &Setting,
        seed: u64,
    ) -> Result<(Vec<Input>, Ending), Failure> {
        self.start(program, setting, seed);
        let from = self.vcpu.engine.retired();
        self.vcpu.engine.kick_at(kicks.iter().map(|at| from + at).collect());
        let mut inputs = Vec::new();
        let mut chance = Chance::new(seed);
        let ending = self.run(&mut inputs, |at, n| {
            let vector = if chance.one_in(2) { guest::PLAIN } else { guest::LOOPING };
            Some(Input { at, word: chance.number() ^ n as u64, vector })
        })?;
        Ok((inputs, ending))
    }

    /// Replays a recording. Returns the ending, and how often a position was missed and tried again.
    fn replay(
        &mut self,
        program: &[u8],
        inputs: &[Input],
        setting: &Setting,
        seed: u64,
    ) -> Result<(Ending, u64), Failure> {
        self.start(program, setting, seed);
        let mut inputs = inputs.to_vec();
        let ending = self.run(&mut inputs, |_, _| None)?;
        Ok((ending, self.vcpu.landings().retries))
    }

    /// The guest loop of recording and replay: `new` makes an input where the guest was kicked, in a recording.
    fn run(
        &mut self,
        inputs: &mut Vec<Input>,
        mut new: impl FnMut(Position, usize) -> Option<Input>,
    ) -> Result<Ending, Failure> {
        for _ in 0..TURNS_MAX {
            let at = self.vcpu.position();
            if let Some(input) = inputs.get(self.world.next).copied() {
                if at > input.at {
                    return Err(Failure::Past);
                }
                if at == input.at {
                    self.apply(input);
                    continue;
                }
            }
            let until = inputs.get(self.world.next).map(|i| i.at);
            let limit = Limit { until, interrupt_window: !self.world.pending.is_empty(), time_offset_ns: 0 };
            match self.vcpu.run(&mut self.ram, &limit)? {
                Exit::Reached => {}
                Exit::Kicked => {
                    if let Some(input) = new(self.vcpu.position(), inputs.len()) {
                        self.check()?;
                        inputs.push(input);
                    }
                }
                Exit::InterruptWindow => {
                    let vector = self
                        .world
                        .pending
                        .pop_front()
                        .expect("the window was requested because an interrupt is pending");
                    self.vcpu.inject(vector)?;
                }
                Exit::Halted if self.world.pending.is_empty() => self.world.pending.push_back(guest::LOOPING),
                Exit::Halted | Exit::Between => {}
                Exit::PioOut { port: guest::END_PORT, .. } => return Ok(self.ending()),
                Exit::Shutdown => return Err(Failure::Shutdown),
                exit => self.access(exit)?,
            }
        }
        Err(Failure::Endless)
    }

    fn apply(&mut self, input: Input) {
        self.ram.memory().write_obj(input.word, GuestAddress(guest::INPUT)).unwrap();
        self.world.pending.push_back(input.vector);
        self.world.next += 1;
    }

    fn access(&mut self, mut exit: Exit) -> Result<(), Failure> {
        loop {
            let mut hash = XxHash3_64::with_seed(self.world.accesses);
            hash.write(format!("{exit:?}").as_bytes());
            self.world.accesses = hash.finish();
            match self.vcpu.complete(&mut self.ram, self.world.accesses & 0xffff)? {
                None => break,
                Some(Exit::Shutdown) => return Err(Failure::Shutdown),
                Some(next) => exit = next,
            }
        }
        Ok(())
    }

    /// Checks that the position is at an exit, or at a branch outside an interrupt shadow and with nothing in flight.
    fn check(&mut self) -> Result<(), Failure> {
        let at = self.vcpu.position();
        let ram = &mut self.ram;
        let cpu = self.vcpu.engine.cpu();
        let mut code = |at: u64, bytes: &mut anchor::CodeBytes| {
            bytes.copy_from_slice(&ram.as_mut_slice()[at as usize..][..15]);
            15
        };
        let branch = anchor::decode(&mut code, cpu.rip).is_some_and(|i| anchor::is_conditional_branch(&i));
        let calm = (cpu.shadow, cpu.interrupt) == (Shadow::None, None);
        let good = at.rip == 0 || calm && branch && cpu.rip == at.rip;
        if good { Ok(()) } else { Err(Failure::NotAPosition) }
    }

    fn ending(&mut self) -> Ending {
        let digest = (XxHash3_128::oneshot(self.ram.as_mut_slice()), self.world.accesses);
        let registers = *self.vcpu.engine.cpu().regs.first_chunk().unwrap();
        Ending { digest, registers, at: self.vcpu.position() }
    }
}

/// The parameters of a run.
#[derive(Clone, Copy, Debug, Default)]
struct Setting {
    margin: u64,
    skid: Skid,
    quirks: Quirks,
    miscounts_one_in: u64,
    ignored: Option<Hazard>,
}
