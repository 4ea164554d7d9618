//! The suite that every engine must pass: the same programs lead to the same exits, registers and memory.

mod vcpu;

use entry::{Position, PositionUnit};
use soft_cpu::CpuState;
use vmm::Engine;
use vmm::vcpu::Exit;
use vmm::vcpu::perf::events::CpuModel;

use vcpu::programs::{Program, all};
use vcpu::{Guest, emulates_ring_0, has_counter, has_kvm, normal, skip};

/// Whether the engine can run the program here: interrupts need exact interrupt windows.
fn can_run(engine: Engine, program: &Program) -> bool {
    let can = !engine.is_kvm() || program.interrupts.is_empty() || !emulates_ring_0();
    if !can {
        skip(
            program.name,
            "on KVM: needs a KVM that does not emulate ring 0 (interrupt windows, pushed flags)",
        );
    }
    can
}

/// Compares the engine with the software CPU, which is the reference.
fn conforms(engine: Engine) {
    // Single steps do not survive the handler of a fault, which runs without the trap flag.
    let steps = matches!(engine, Engine::KvmStep | Engine::KvmStepCounter);
    let fit = |program: &Program| !(steps && program.faults);
    for program in all().into_iter().filter(|program| fit(program) && can_run(engine, program)) {
        let (mut expected, mut guest) = (Guest::new(Engine::Soft, &program), Guest::new(engine, &program));
        assert!(expected.run(None) && guest.run(None), "{}", program.name);
        let names = expected.seen.iter().zip(&guest.seen).enumerate();
        for (n, (expected, seen)) in names {
            assert_eq!(
                (seen.exit, seen.answer),
                (expected.exit, expected.answer),
                "{engine:?}, {}: {n}",
                program.name
            );
            // Between the iterations of a string instruction each engine has its own registers.
            let both = [seen, expected].iter().all(|s| s.registers != [0; 18]);
            if both && !program.repeats {
                assert_eq!(seen.registers, expected.registers, "{engine:?}, {}: exit {n}", program.name);
            }
        }
        assert_eq!(guest.seen.len(), expected.seen.len(), "{engine:?}, {}", program.name);
        if guest.seen.last().is_none_or(|s| s.exit != Exit::Shutdown) {
            assert_eq!(guest.cpu(), expected.cpu(), "{engine:?}, {}", program.name);
        }
        assert_eq!(guest.ram_digest(), expected.ram_digest(), "{engine:?}, {}: RAM", program.name);
    }
}

/// A guest that is stopped at each position, saved, and continued in a new vCPU ends like one that ran straight through.
fn survives_saving(engine: Engine) {
    for program in all().into_iter().filter(|program| can_run(engine, program)) {
        let mut straight = Guest::new(engine, &program);
        straight.run(None);
        let ends = straight.vcpu.position();
        let mut guest = Guest::new(engine, &program);
        for count in 1..=ends.count {
            if guest.run(Some(Position::exact(count))) {
                break;
            }
            // There is no instruction boundary between the accesses of one instruction.
            assert!(guest.vcpu.position() >= Position::exact(count), "{}", program.name);
            let state = guest.vcpu.save().unwrap();
            guest.ram_digest();
            // A new vCPU with the same memory.
            guest.vcpu = engine.vcpu(&guest.ram).unwrap();
            guest.vcpu.restore(&state).unwrap();
            let again = guest.vcpu.save().unwrap();
            assert_eq!(again.differences(&state), [""; 0], "{engine:?}, {} at {count}", program.name);
        }
        guest.run(None);
        assert_eq!(guest.seen, straight.seen, "{engine:?}, {}", program.name);
        assert_eq!(guest.ram_digest(), straight.ram_digest(), "{engine:?}, {}", program.name);
    }
}

#[test]
fn the_software_cpu_conforms() {
    conforms(Engine::Soft);
    survives_saving(Engine::Soft);
}

#[test]
fn the_interpreter_conforms() {
    conforms(Engine::Interpreter);
    survives_saving(Engine::Interpreter);
}

#[test]
fn kvm_with_positions_at_exits_conforms() {
    if has_kvm("kvm_with_positions_at_exits_conforms") {
        conforms(Engine::KvmSync);
        survives_saving(Engine::KvmSync);
    }
}

#[test]
fn kvm_with_single_steps_conforms() {
    if has_kvm("kvm_with_single_steps_conforms") {
        conforms(Engine::KvmStep);
    }
}

#[test]
fn counted_branches_on_the_software_cpu_conform() {
    conforms(Engine::SoftCounter);
    survives_saving(Engine::SoftCounter);
}

#[test]
fn counted_branches_on_kvm_conform() {
    if has_kvm("counted_branches_on_kvm_conform") {
        conforms(Engine::KvmStepCounter);
    }
}

/// With the host's own counter.
#[test]
fn branches_that_the_host_counts_conform() {
    if has_counter("branches_that_the_host_counts_conform") {
        conforms(Engine::KvmCounter);
        survives_saving(Engine::KvmCounter);
    }
}

fn steps() -> impl Iterator<Item = Program> {
    all().into_iter().filter(|program| !program.repeats && !program.faults)
}

#[test]
fn kvm_agrees_with_the_software_cpu_after_every_step() {
    if !has_kvm("kvm_agrees_with_the_software_cpu_after_every_step") {
        return;
    }
    // Where the SDM leaves status flags undefined (IMUL, shifts and rotations by more than one bit), the software CPU sets them as
    // Intel's CPUs do. Flags that the programs read are compared on every host, through the results.
    let status = if CpuModel::host().vendor == "GenuineIntel" { 0 } else { soft_cpu::flags::bits::STATUS };
    let defined = |guest: &Guest| {
        let cpu = guest.cpu();
        CpuState { rflags: cpu.rflags & !status, ..cpu }
    };
    for program in steps().filter(|program| can_run(Engine::KvmStep, program)) {
        let (mut soft, mut kvm) = (Guest::new(Engine::Soft, &program), Guest::new(Engine::KvmStep, &program));
        assert_eq!(Engine::KvmStep.unit(), PositionUnit::Steps);
        for count in 1.. {
            let at = Position::exact(count);
            let ended = soft.run(Some(at));
            assert_eq!(kvm.run(Some(at)), ended, "{} at {count}", program.name);
            assert_eq!(defined(&kvm), defined(&soft), "{} at {count}", program.name);
            if ended {
                assert!(count > 10);
                break;
            }
        }
        assert_eq!(kvm.ram_digest(), soft.ram_digest(), "{}", program.name);
    }
}

/// Runs a guest to its end while another thread kicks it.
fn run_kicked(guest: &mut Guest) {
    let kicker = guest.vcpu.kicker();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|threads| {
        threads.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                kicker.kick();
                std::thread::yield_now();
            }
        });
        guest.run(None);
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

/// A second guest is landed at each position at which kicks have stopped the first one between two exits, in the same state.
#[test]
fn a_guest_is_landed_where_another_was_kicked() {
    const TEST: &str = "a_guest_is_landed_where_another_was_kicked";
    // Not the software CPU, which has run these programs to their end before the first kick comes.
    let engines = [(Engine::KvmStepCounter, has_kvm(TEST)), (Engine::KvmCounter, has_counter(TEST))];
    for (engine, _) in engines.into_iter().filter(|(_, can)| *can) {
        let programs: Vec<_> = steps().filter(|program| can_run(engine, program)).collect();
        let (mut stops, mut rounds) = (0, 0);
        // Whether a kick stops the guest between two exits depends on the host's scheduler.
        while rounds < 60 || stops <= 2 && rounds < 5000 {
            rounds += 1;
            for program in &programs {
                let (mut kicked, mut landed) = (Guest::new(engine, program), Guest::new(engine, program));
                run_kicked(&mut kicked);
                for (at, cpu) in &kicked.stops {
                    assert!(!landed.run(Some(*at)), "{engine:?}, {}", program.name);
                    assert_eq!(
                        (landed.vcpu.position(), &landed.cpu()),
                        (*at, cpu),
                        "{engine:?}, {}",
                        program.name
                    );
                }
                landed.run(None);
                assert_eq!(landed.seen, kicked.seen, "{engine:?}, {}", program.name);
                assert_eq!(landed.ram_digest(), kicked.ram_digest(), "{engine:?}, {}", program.name);
                stops += kicked.stops.len();
            }
        }
        assert!(stops > 2, "{engine:?}: {stops}");
    }
}

/// Kicks from another thread stop a guest only where they may, and change nothing.
#[test]
fn kicks_change_nothing() {
    let kvm = [Engine::KvmSync, Engine::KvmStep, Engine::KvmStepCounter];
    let kvm = if has_kvm("kicks_change_nothing") { &kvm[..] } else { &[] };
    for engine in [Engine::SoftCounter].into_iter().chain(kvm.iter().copied()) {
        for program in all().into_iter().filter(|program| can_run(engine, program)) {
            let mut quiet = Guest::new(engine, &program);
            quiet.run(None);
            let mut kicked = Guest::new(engine, &program);
            run_kicked(&mut kicked);
            assert_eq!(kicked.seen, quiet.seen, "{engine:?}, {}", program.name);
            assert_eq!(kicked.ram_digest(), quiet.ram_digest(), "{engine:?}, {}", program.name);
            let states = [kicked.vcpu.save(), quiet.vcpu.save()].map(|s| s.ok().map(|s| normal(&s)));
            assert_eq!(states[0], states[1], "{engine:?}, {}", program.name);
        }
    }
}

/// Whether an access is finished at once, at the next entry, or by a stop after every few positions makes no difference.
#[test]
fn when_an_access_is_finished_changes_nothing() {
    if !has_kvm("when_an_access_is_finished_changes_nothing") {
        return;
    }
    for program in all().into_iter().filter(|program| can_run(Engine::KvmSync, program)) {
        let run = |lazy: bool, every: Option<u64>| {
            let mut guest = Guest::new(Engine::KvmSync, &program);
            guest.lazy = lazy;
            while !guest.run(every.map(|n| Position::exact(guest.vcpu.position().count + n))) {}
            let asked: Vec<_> = guest.seen.iter().map(|s| (s.exit, s.answer)).collect();
            let state = guest.vcpu.save().ok().map(|state| normal(&state));
            (asked, guest.vcpu.position(), guest.vcpu.take_exit_checks(), state, guest.ram_digest())
        };
        let at_once = run(false, None);
        for every in [None, Some(1), Some(2), Some(3), Some(5)] {
            assert_eq!(run(true, every), at_once, "{}, a stop every {every:?}", program.name);
        }
    }
}
