//! The machine on engines whose positions are counted branches: recording while the guest is kicked anywhere, and replaying.
#![allow(clippy::disallowed_methods, reason = "the thread that kicks sleeps between two kicks")]

mod guest;
mod vcpu;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use entry::End;
use entry::log::{Entry, LoggedInput, Record};
use vmm::guest_loop::Turn;
use vmm::record::{LogIntervals, Recorder};
use vmm::source::{Live, PlannedStops};
use vmm::vcpu::landing::Landings;
use vmm::{Engine, GuestLoop};

use guest::log::{MemoryLog, replay};
use guest::world::World;
use guest::{image_of, machine_on, total};
use vcpu::{emulates_ring_0, has_counter, has_kvm, skip};

/// Records the small guest, which computes for `work` rounds between two halts. All the while it is kicked, bytes are typed, and
/// the host's clock moves.
fn record(engine: Engine, work: u32, seed: u32, every: Duration) -> GuestLoop<Recorder<World, MemoryLog>> {
    let machine = machine_on(engine, &image_of(work, 12), Vec::new());
    let typing =
        (1..40).map(|n| (n * 3 + seed % 5, vec![(seed * 7 + n) as u8; 1 + n as usize % 4])).collect();
    let kicker = machine.kicker();
    let world = World { typing, clock_step_ns: 300_000 + u64::from(seed) * 1000, ..World::default() };
    let live = Live::new(world, engine.unit(), PlannedStops::default());
    let mut recording =
        GuestLoop { machine, source: Recorder::new(live, MemoryLog::default(), LogIntervals::BACKUP) };
    let done = AtomicBool::new(false);
    std::thread::scope(|threads| {
        threads.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                kicker.kick();
                std::thread::sleep(every);
            }
        });
        let turn = recording.run();
        done.store(true, Ordering::Relaxed);
        assert_eq!(turn.unwrap(), Turn::Finished(End::PowerOff));
    });
    recording
}

/// Number of inputs at positions between two exits of the guest.
fn at_branches(log: &[Record]) -> usize {
    let input = |r: &&Record| {
        matches!(&r.entry, Entry::Input(LoggedInput::Console { .. } | LoggedInput::Clock { .. }))
    };
    log.iter().filter(input).filter(|r| r.position.rip != 0).count()
}

/// Records and replays. Returns the number of inputs at branches, and the counts of the landings.
fn replays(engine: Engine, work: u32, seeds: u32, every: Duration) -> (usize, Landings) {
    let (mut inputs, mut all) = (0, Landings::default());
    for seed in 0..seeds {
        let mut recorded = record(engine, work, seed, every);
        let log = recorded.source.log().0.clone();
        inputs += at_branches(&log);
        let mut replay = replay(machine_on(engine, &image_of(work, 12), Vec::new()), log);
        assert_eq!(replay.run().unwrap(), Turn::Finished(End::PowerOff));
        assert!(replay.source.is_done());
        assert_eq!(total(&mut replay.machine), total(&mut recorded.machine), "{engine:?}, {seed}");
        let Landings { landed, passed, retries, .. } = replay.machine.counts().landings;
        (all.landed, all.passed, all.retries) =
            (all.landed + landed, all.passed + passed, all.retries + retries);
    }
    eprintln!("{engine:?}: {inputs} inputs at branches, {all:?}");
    (inputs, all)
}

#[test]
fn inputs_at_any_branch_replay_on_the_software_cpu() {
    let (inputs, landings) = replays(Engine::SoftCounter, 3000, 40, Duration::from_micros(50));
    assert!(inputs > 200 && landings.landed > 200 && landings.passed > landings.landed, "{landings:?}");
    // Now and then an overflow of the simulated counter comes later than the margin allows.
    assert!(landings.retries > 10, "{landings:?}");
}

#[test]
fn inputs_at_any_branch_replay_on_kvm() {
    const TEST: &str = "inputs_at_any_branch_replay_on_kvm";
    if emulates_ring_0() {
        return skip(TEST, "needs a KVM that does not emulate ring 0 (interrupt windows)");
    }
    if !has_kvm(TEST) {
        return;
    }
    let (inputs, landings) = replays(Engine::KvmStepCounter, 250, 3, Duration::from_micros(900));
    assert!(inputs > 15 && landings.landed > 15 && landings.passed > 0, "{landings:?}");
}

/// With the host's own counter.
#[test]
fn inputs_at_any_branch_replay_by_the_hosts_counter() {
    if has_counter("inputs_at_any_branch_replay_by_the_hosts_counter") {
        let (inputs, landings) = replays(Engine::KvmCounter, 30_000_000, 20, Duration::from_millis(1));
        assert!(inputs > 100 && landings.landed > 100, "{landings:?}");
    }
}
