//! The suite that every engine passes: the same programs make the same exits, registers and memory.

mod vcpu;

use entry::{Position, PositionUnit};
use soft_cpu::CpuState;
use vmm::Engine;
use vmm::vcpu::Exit;
use vmm::vcpu::perf::events::CpuModel;

use vcpu::programs::{Program, all};
use vcpu::{Guest, emulates_ring_0, has_counter, has_kvm, normal, skip};

/// Interrupts need exact windows.
fn can_run(engine: Engine, program: &Program) -> bool {
    let can = !engine.is_kvm() || program.interrupts.is_empty() || !emulates_ring_0();
    if !can {
        skip(
            program.name,
            "on KVM: needs one that does not emulate ring 0 (interrupt windows, flags that are pushed)",
        );
    }
    can
}

/// The software CPU is what the others are compared with.
fn conforms(engine: Engine) {
    // The handler of a fault is no place for a trap flag: single steps are not for programs that fault.
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
            // Between the iterations of a string instruction, registers are the engine's own.
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

/// Stopped at each position on the way, saved, and gone on with in a fresh vCPU, a guest ends as it would have.
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
            // A CPU of its own around the same memory.
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

/// The counter is the host's.
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
    // Status flags that the SDM leaves undefined (IMUL, shifts and rotations by more than one bit) are with us as Intel has
    // them. What the programs read of them is compared everywhere, by what they make of it.
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

/// Where kicks have stopped a guest between two exits, another one is landed, in the same state.
#[test]
fn a_guest_is_landed_where_another_was_kicked() {
    const TEST: &str = "a_guest_is_landed_where_another_was_kicked";
    // The software CPU is through these programs before anybody kicks it.
    let engines = [(Engine::KvmStepCounter, has_kvm(TEST)), (Engine::KvmCounter, has_counter(TEST))];
    for (engine, _) in engines.into_iter().filter(|(_, can)| *can) {
        let programs: Vec<_> = steps().filter(|program| can_run(engine, program)).collect();
        let (mut stops, mut rounds) = (0, 0);
        // Whether a kick meets a guest between two exits is the host's scheduler's choice.
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

/// A kick from another thread is answered where it may be, and changes nothing.
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

/// An access that is finished at the next entry, or by a stop behind every so many, is the same access.
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
