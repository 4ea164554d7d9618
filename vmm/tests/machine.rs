//! The machine with a small guest: it is deterministic whatever stops it, and can be saved, restored and reset.

mod guest;

use entry::{Console, Digest, End, Input, Output, Position, PositionUnit};
use vmm::guest_loop::{GuestLoop, Turn};
use vmm::machine::{Machine, Stop};
use vmm::source::{Live, PlannedStops};

use guest::world::World;
use guest::{assemble, machine, machine_of, out, total};

/// Runs to a position, whatever the machine stops for on the way; guest time is virtual. Returns what was printed.
fn run_to(machine: &mut Machine, until: Option<Position>) -> (Option<End>, Vec<u8>) {
    let mut printed = Vec::new();
    loop {
        let stop = machine.run(until).unwrap();
        for output in machine.take_outputs() {
            let Output::Console { bytes, .. } = output else { panic!("{output:?}") };
            printed.extend(bytes);
        }
        match stop {
            Stop::Reached => return (None, printed),
            Stop::End(end) => return (Some(end), printed),
            Stop::Kicked | Stop::Between | Stop::Halted | Stop::Outputs => {}
            Stop::Question(question) => panic!("{question:?}"),
        }
    }
}

const POSITIONS: [u64; 6] = [1, 100_003, 1_000_000, 3_000_001, 7_654_321, 9_999_999];

/// Digests of an undisturbed run at [`POSITIONS`].
fn reference() -> Vec<Digest> {
    let mut machine = machine();
    let at = |count| {
        assert_eq!(run_to(&mut machine, Some(Position::exact(count))).0, None);
        assert_eq!(machine.position().count, count);
        total(&mut machine)
    };
    POSITIONS.map(at).to_vec()
}

#[test]
fn the_guest_ticks_halts_and_switches_itself_off() {
    let mut machine = machine();
    let (end, printed) = run_to(&mut machine, None);
    assert_eq!(end, Some(End::PowerOff));
    assert_eq!(String::from_utf8(printed).unwrap(), "bcdefgha\n".repeat(5));
    // 40 ticks of 10 ms; the guest halted until the last one.
    assert_eq!(machine.time_ns() / 10_000_000, 40);
    assert_eq!(machine.counts().interrupts, 40);
    assert!(machine.counts().idle_ns > 100_000_000);
}

#[test]
fn stops_leave_no_trace() {
    let reference = reference();
    let mut machine = machine();
    let kicker = machine.kicker();
    let mut random = 12345u64;
    for (count, digest) in POSITIONS.into_iter().zip(reference) {
        while machine.position().count < count {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1);
            let step = (random >> 33) % 40_000;
            let until = Position::exact((machine.position().count + step).min(count));
            if random >> 60 < 6 {
                kicker.kick();
            }
            machine.run(Some(until)).unwrap();
            machine.take_outputs();
        }
        assert_eq!(total(&mut machine), digest, "at {count}");
    }
}

#[test]
fn a_restored_machine_goes_on_alike() {
    let reference = reference();
    let mut saved = Vec::new();
    for (i, count) in POSITIONS.into_iter().enumerate() {
        let mut machine = machine();
        if i > 0 {
            machine.restore(&mut &saved[..]).unwrap();
        }
        run_to(&mut machine, Some(Position::exact(count)));
        assert_eq!(total(&mut machine), reference[i], "at {count}");
        saved.clear();
        machine.save(&mut saved).unwrap();
    }
    // Restoring over a machine that has run before gives the same state.
    let mut other = machine();
    run_to(&mut other, Some(Position::exact(5_000_000)));
    other.restore(&mut &saved[..]).unwrap();
    assert_eq!(total(&mut other), reference[POSITIONS.len() - 1]);
    let mut again = Vec::new();
    other.save(&mut again).unwrap();
    assert_eq!(saved, again);
}

#[test]
fn differences_have_names() {
    let (mut one, mut other) = (machine(), machine());
    run_to(&mut one, Some(Position::exact(500_000)));
    run_to(&mut other, Some(Position::exact(500_000)));
    assert_eq!(one.digest().unwrap(), other.digest().unwrap());
    let input = Input::Console { console: Console::Serial, bytes: b"x".to_vec() };
    other.apply(input);
    other.ram().page(77)[5] ^= 1;
    other.ram().note_written(77);
    let differences = one.digest().unwrap().differences(&other.digest().unwrap());
    assert_eq!(differences, ["pic", "serial", "ram"]);
    let pages: Vec<u32> = (0..one.ram().pages())
        .filter(|page| one.ram().page_digest(*page) != other.ram().page_digest(*page))
        .collect();
    assert_eq!(pages, [77]);
    run_to(&mut one, Some(Position::exact(500_001)));
    let names = one.vcpu_state().unwrap().differences(&other.vcpu_state().unwrap());
    assert!(names.contains(&"rip") && names.contains(&"retired") && !names.contains(&"cr3"), "{names:?}");
}

#[test]
fn a_damaged_or_foreign_file_is_refused() {
    let mut first = machine();
    run_to(&mut first, Some(Position::exact(50_000)));
    let mut saved = Vec::new();
    first.save(&mut saved).unwrap();
    let mut target = machine();
    let mut message = |bytes: &[u8]| target.restore(&mut &bytes[..]).unwrap_err().to_string();
    for at in (0..saved.len()).step_by(97).chain(0..300) {
        let mut damaged = saved.clone();
        damaged[at] ^= 0x10;
        message(&damaged);
    }
    for length in (0..saved.len()).step_by(131) {
        let error = message(&saved[..length]);
        assert!(error.contains("ends early") || error.contains("another section"), "{error}");
    }
    let mut version = saved.clone();
    version[8] = 9;
    assert!(message(&version).contains("version 9"));
    let mut other = machine_of(&guest::image(), vec![vmm::Slot::Entropy]);
    let error = other.restore(&mut &saved[..]).unwrap_err().to_string();
    assert_eq!(error, "the saved machine differs from the configured one in: devices");
}

#[test]
fn a_reset_boots_again_and_time_goes_on() {
    // The guest tells its second boot from its first by the battery-backed memory.
    let code = assemble(guest::BASE, |a| {
        use iced_x86::code_asm::*;
        let mut second = a.create_label();
        out(a, 0x70, 0x40)?;
        a.in_(al, 0x71)?;
        a.cmp(al, 7)?;
        a.je(second)?;
        out(a, 0x71, 7)?;
        a.mov(qword_ptr(0x30_0000), 1)?;
        out(a, 0x64, 0xfe)?;
        a.set_label(&mut second)?;
        a.mov(rbx, qword_ptr(0x30_0000))?;
        out(a, 0x604, 0x34)
    });
    let mut machine = machine_of(&code, Vec::new());
    assert_eq!(run_to(&mut machine, None).0, Some(End::Reboot));
    let at = machine.position();
    machine.reset().unwrap();
    assert_eq!(machine.position(), at);
    assert_eq!(run_to(&mut machine, None).0, Some(End::PowerOff));
    assert!(machine.position() > at && machine.time_ns() == machine.position().count);
    let state = machine.vcpu_state().unwrap();
    let state = state.cpu();
    assert_eq!(state.gpr[3], 0, "memory was cleared");
    total(&mut machine);
}

#[test]
fn an_address_without_a_device_reads_as_ones_and_a_triple_fault_ends_the_run() {
    let code = assemble(guest::BASE, |a| {
        use iced_x86::code_asm::*;
        a.mov(edx, 0x1234)?;
        a.in_(eax, dx)?;
        a.mov(r8d, eax)?;
        a.mov(rax, 0xfee0_0000u64)?;
        a.mov(r9, qword_ptr(rax))?;
        a.mov(r10w, word_ptr(rax))?;
        a.mov(qword_ptr(rax), r9)?;
        a.ud2()
    });
    let mut machine = machine_of(&code, Vec::new());
    assert_eq!(run_to(&mut machine, None).0, Some(End::TripleFault));
    let state = machine.vcpu_state().unwrap();
    let state = state.cpu();
    assert_eq!((state.gpr[8], state.gpr[9], state.gpr[10]), (0xffff_ffff, u64::MAX, 0xffff));
}

#[test]
fn the_host_clock_pulls_a_slow_guest_along() {
    let live = Live::new(
        World { clock_step_ns: 2_000_000, ..World::default() },
        PositionUnit::Instructions,
        PlannedStops::default(),
    );
    let mut guest = GuestLoop { machine: machine(), source: live };
    assert_eq!(guest.run().unwrap(), Turn::Finished(End::PowerOff));
    // The guest gets each of its ticks, although it ran for a fraction of their time only.
    assert_eq!(guest.machine.counts().interrupts, 40);
    assert!(guest.machine.position().count < 20_000_000);
    assert_eq!(guest.source.outside().printed, "bcdefgha\n".repeat(5).as_bytes());
}

#[test]
fn stops_asked_for_are_taken() {
    let stops =
        PlannedStops { digests: [7, 1_000].map(Position::exact).into(), pause: Some(Position::exact(2_000)) };
    let live = Live::new(World::default(), PositionUnit::Instructions, stops);
    let mut guest = GuestLoop { machine: machine(), source: live };
    assert_eq!(guest.run().unwrap(), Turn::Paused);
    assert_eq!(guest.machine.position(), Position::exact(2_000));
}
