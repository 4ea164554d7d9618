//! The machine on KVM: recording and replaying with exits or single steps as positions.

mod guest;
mod vcpu;

use entry::log::{Entry, LoggedInput, Record};
use entry::{End, Position};
use vmm::guest_loop::{LoopError, Turn};
use vmm::machine::Machine;
use vmm::record::{LogIntervals, Recorder};
use vmm::replay::{Difference, Divergence, ReplayError};
use vmm::source::{Live, PlannedStops};
use vmm::{Engine, GuestLoop};

use guest::log::{MemoryLog, replay};
use guest::world::World;
use guest::{image_of, machine_on, total};
use vcpu::has_kvm;

/// The small guest for a few ticks: it halts, computes, prints, and reads typed bytes.
fn machine(engine: Engine) -> Machine {
    machine_on(engine, &image_of(30, 12), Vec::new())
}

/// Records the guest while it is kicked. If each step is a position, bytes are also typed and the host's clock moves, at moments
/// chosen by `seed`. (Interrupts in the guest's main loop need exact interrupt windows in ring 0, which a KVM that emulates
/// ring 0 does not provide.)
fn record(engine: Engine, seed: u32) -> GuestLoop<Recorder<World, MemoryLog>> {
    let machine = machine(engine);
    let typed = if engine == Engine::KvmStep { 12 } else { 1 };
    let typing =
        (1..typed).map(|n| (n * 3 + seed % 5, vec![(seed * 7 + n) as u8; 1 + n as usize % 4])).collect();
    let clock_step_ns = if typed > 1 { 400_000 + u64::from(seed) * 1000 } else { 0 };
    let kicks = Some((10_000, machine.kicker()));
    let world = World { typing, clock_step_ns, kicks, ..World::default() };
    let live = Live::new(world, engine.unit(), PlannedStops::default());
    let mut recording =
        GuestLoop { machine, source: Recorder::new(live, MemoryLog::default(), LogIntervals::BACKUP) };
    assert_eq!(recording.run().unwrap(), Turn::Finished(End::PowerOff));
    recording
}

fn replays(engine: Engine, seeds: u32) {
    for seed in 0..seeds {
        let mut recorded = record(engine, seed);
        let log = recorded.source.log().0.clone();
        let typed = log.iter().filter(|r| matches!(r.entry, Entry::Input(LoggedInput::Console { .. })));
        assert!(typed.count() > 3 || engine == Engine::KvmSync, "bytes were typed at this guest");
        let mut replay = replay(machine(engine), log);
        assert_eq!(replay.run().unwrap(), Turn::Finished(End::PowerOff));
        assert!(replay.source.is_done());
        assert_eq!(total(&mut replay.machine), total(&mut recorded.machine), "{engine:?}, {seed}");
    }
}

#[test]
fn positions_at_exits_replay() {
    if has_kvm("positions_at_exits_replay") {
        replays(Engine::KvmSync, 30);
    }
}

#[test]
fn single_steps_replay_with_inputs_at_any_count() {
    if has_kvm("single_steps_replay_with_inputs_at_any_count") {
        replays(Engine::KvmStep, 10);
    }
}

/// Replays a log from which the guest diverges.
fn divergence(log: Vec<Record>) -> Divergence {
    match replay(machine(Engine::KvmSync), log).run() {
        Err(LoopError::Source(ReplayError::Divergence(d))) => *d,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_divergence_is_found_at_its_exit() {
    if !has_kvm("a_divergence_is_found_at_its_exit") {
        return;
    }
    let log = record(Engine::KvmSync, 1).source.log().0.clone();
    // Every check word of the log is compared at its own position.
    let mut first = 1;
    for (n, record) in log.iter().enumerate() {
        let Entry::Exits(words) = &record.entry else { continue };
        let k = n % words.len();
        let mut changed = words.clone();
        changed[k] ^= 1;
        let mut log = log.clone();
        log[n].entry = Entry::Exits(changed);
        let found = divergence(log);
        assert_eq!(found.position, Position::exact(first + k as u64));
        assert!(matches!(found.what, Difference::Exit { .. }));
        first += words.len() as u64;
    }
}
