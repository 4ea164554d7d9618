//! Bisecting: the first position at which two replays differ is found, and what differs is named.

mod guest;

use std::cell::Cell;
use std::convert::Infallible;

use entry::log::{Entry, LoggedInput, Record};
use entry::{End, Position, PositionUnit};
use vm_memory::{Bytes, GuestAddress};
use vmm::GuestLoop;
use vmm::bisect::{BisectReplay, Bisection, PiecewiseReplay, Reached, bisect};
use vmm::guest_loop::{LoopError, Turn};
use vmm::machine::Machine;
use vmm::record::{LogIntervals, Recorder};
use vmm::replay::ReplayError;
use vmm::source::{Live, PlannedStops};

use guest::log::{MemoryLog, MemoryRecords, NoDisk, replay};
use guest::machine;
use guest::world::World;

fn log() -> Vec<Record> {
    let typing = [(9, b"bytes".to_vec())].into();
    let live =
        Live::new(World { typing, ..World::default() }, PositionUnit::Instructions, PlannedStops::default());
    let source = Recorder::new(live, MemoryLog::default(), LogIntervals::FILE);
    let mut recording = GuestLoop { machine: machine(), source };
    assert_eq!(recording.run().unwrap(), Turn::Finished(End::PowerOff));
    std::mem::take(&mut recording.source.log().0)
}

/// What goes wrong on a host when its guest is at a given position.
#[derive(Clone, Copy)]
enum Fault {
    /// A bit of RAM flips.
    Bit(u64, usize),
    /// One instruction does something else, because a bit of its code at this address is read flipped.
    Instruction(u64, usize),
}

struct Faulty {
    replay: PiecewiseReplay<MemoryRecords, NoDisk>,
    fault: Option<Fault>,
}

impl Faulty {
    fn flip(&mut self, byte: usize) {
        let ram = self.replay.machine().ram();
        let flipped = ram.page((byte / 4096) as u32)[byte % 4096] ^ 4;
        ram.memory().write_obj(flipped, GuestAddress(byte as u64)).unwrap();
    }

    fn run_exactly_to(&mut self, at: u64) {
        assert_eq!(self.replay.run_to(Position::exact(at)).unwrap(), Reached::There);
    }
}

impl BisectReplay for Faulty {
    type Error = LoopError<ReplayError<Infallible, Infallible>>;

    fn run_to(&mut self, at: Position) -> Result<Reached, Self::Error> {
        match self.fault {
            Some(Fault::Bit(when, byte)) if when <= at.count => {
                self.run_exactly_to(when);
                self.flip(byte);
                self.fault = None;
            }
            Some(Fault::Instruction(when, byte)) if when < at.count => {
                self.run_exactly_to(when);
                self.flip(byte);
                self.run_exactly_to(when + 1);
                self.flip(byte);
                self.fault = None;
            }
            _ => {}
        }
        self.replay.run_to(at)
    }

    fn machine(&mut self) -> &mut Machine {
        self.replay.machine()
    }
}

/// Bisects with a fault in the second replay of each pair for which `faulty` returns one.
fn bisect_with(log: &[Record], faulty: impl Fn(u32) -> Option<Fault>) -> Bisection {
    let stops: Vec<u64> = log
        .iter()
        .filter(|record| matches!(record.entry, Entry::State(_)))
        .map(|record| record.position.count)
        .collect();
    assert!(stops.len() >= 3, "{stops:?}");
    let pairs = Cell::new(0);
    let pair = || {
        pairs.set(pairs.get() + 1);
        let side = |piece, fault| Faulty {
            replay: PiecewiseReplay { guest: replay(machine(), log.to_vec()), piece },
            fault,
        };
        Ok([side(u64::MAX, None), side(70_001, faulty(pairs.get()))])
    };
    bisect(pair, &stops).unwrap()
}

/// An address that the guest never touches.
const IDLE_BYTE: usize = 0x7_7123;

#[test]
fn a_flipped_bit_of_ram_is_found_where_it_flips() {
    let log = log();
    for when in [1, 4_444_444, 10_000_001] {
        let Bisection::Different(difference) = bisect_with(&log, |_| Some(Fault::Bit(when, IDLE_BYTE)))
        else {
            panic!()
        };
        assert_eq!(difference.position, when);
        assert_eq!(
            (&difference.registers[..], &difference.devices[..], difference.pages),
            (&[][..], &[""; 0][..], 1)
        );
        let (at, a, b) = difference.bytes[0];
        assert_eq!((at, a ^ b), (IDLE_BYTE as u64, 4));
        let text = difference.to_string();
        assert!(text.contains(&format!("position {when}\n")) && text.contains("RAM page 0x77, "), "{text}");
    }
}

#[test]
fn registers_are_named() {
    let log = log();
    // A position at which the guest executes `add rcx, rdi`, whose last byte says the operands.
    let mut replay = PiecewiseReplay { guest: replay(machine(), log.clone()), piece: u64::MAX };
    let (when, rip) = (3_000_000..)
        .find_map(|at| {
            replay.run_to(Position::exact(at)).unwrap();
            let state = replay.machine().vcpu_state().unwrap();
            let cpu = state.cpu();
            let rip = cpu.rip as usize;
            let code = &replay.machine().ram().page((rip / 4096) as u32)[rip % 4096..];
            code.starts_with(&[0x48, 0x01, 0xf9]).then_some((at, rip))
        })
        .unwrap();
    let Bisection::Different(difference) = bisect_with(&log, |_| Some(Fault::Instruction(when, rip + 2)))
    else {
        panic!()
    };
    assert_eq!((difference.position, difference.pages), (when + 1, 0));
    // The sum went to rbp.
    let names: Vec<_> = difference.registers.iter().map(|r| r.0).collect();
    assert!(names.contains(&"rcx") && names.contains(&"rbp"), "{names:?}");
    assert!(difference.to_string().contains("\n  register rcx: 0x"), "{difference}");
}

#[test]
fn a_fault_that_comes_once_is_reported_as_such() {
    let log = log();
    let Bisection::Intermittent { equal_at, differs_at } =
        bisect_with(&log, |pair| (pair == 1).then_some(Fault::Bit(4_444_444, IDLE_BYTE)))
    else {
        panic!()
    };
    assert!(equal_at < 4_444_444 && 4_444_444 <= differs_at, "{equal_at} {differs_at}");
    // A fault that comes every third time is found too.
    let sometimes = |pair: u32| (pair % 3 == 1).then_some(Fault::Bit(4_444_444, IDLE_BYTE));
    let Bisection::Different(difference) = bisect_with(&log, sometimes) else { panic!() };
    assert_eq!(difference.position, 4_444_444);
}

#[test]
fn two_replays_that_both_differ_from_the_log_are_equal() {
    let mut log = log();
    assert!(matches!(bisect_with(&log, |_| None), Bisection::Equal(None)));
    let typed = log.iter_mut().find_map(|record| match &mut record.entry {
        Entry::Input(LoggedInput::Console { bytes, .. }) => Some(bytes),
        _ => None,
    });
    typed.unwrap()[0] ^= 1;
    let Bisection::Equal(Some(divergence)) = bisect_with(&log, |_| None) else { panic!() };
    assert!(divergence.to_string().contains("RAM"), "{divergence}");
}
