//! The first position at which two replays differ is found, and what differs is named.

mod guest;

use std::cell::Cell;
use std::convert::Infallible;

use entry::log::{Entry, LoggedInput, Record};
use entry::{End, Position, PositionUnit};
use vm_memory::{Bytes, GuestAddress};
use vmft_vmm::GuestLoop;
use vmft_vmm::guest_loop::{LoopError, Turn};
use vmft_vmm::machine::Machine;
use vmft_vmm::narrow::{Narrowed, Pieces, Reached, Replay, narrow};
use vmft_vmm::record::{Pace, Recorder};
use vmft_vmm::replay::ReplayError;
use vmft_vmm::source::{Live, Stops};

use guest::log::{Kept, NoDisk, Played, replay};
use guest::machine;
use guest::world::World;

fn log() -> Vec<Record> {
    let typing = [(9, b"bytes".to_vec())].into();
    let live = Live::new(World { typing, ..World::default() }, PositionUnit::Instructions, Stops::default());
    let source = Recorder::new(live, Kept::default(), Pace::FILE);
    let mut recording = GuestLoop { machine: machine(), source };
    assert_eq!(recording.run().unwrap(), Turn::Finished(End::PowerOff));
    std::mem::take(&mut recording.source.log().0)
}

/// What goes wrong on a host when its guest is at this position.
#[derive(Clone, Copy)]
enum Fault {
    /// A bit of RAM flips.
    Bit(u64, usize),
    /// One instruction, whose byte here is read with a flipped bit, does something else.
    Instruction(u64, usize),
}

struct Faulty {
    replay: Pieces<Played, NoDisk>,
    fault: Option<Fault>,
}

impl Faulty {
    fn flip(&mut self, byte: usize) {
        let ram = self.replay.machine().ram();
        let flipped = ram.page((byte / 4096) as u32)[byte % 4096] ^ 4;
        ram.memory().write_obj(flipped, GuestAddress(byte as u64)).unwrap();
    }

    fn there(&mut self, at: u64) {
        assert_eq!(self.replay.run_to(Position::exact(at)).unwrap(), Reached::There);
    }
}

impl Replay for Faulty {
    type Error = LoopError<ReplayError<Infallible, Infallible>>;

    fn run_to(&mut self, at: Position) -> Result<Reached, Self::Error> {
        match self.fault {
            Some(Fault::Bit(when, byte)) if when <= at.count => {
                self.there(when);
                self.flip(byte);
                self.fault = None;
            }
            Some(Fault::Instruction(when, byte)) if when < at.count => {
                self.there(when);
                self.flip(byte);
                self.there(when + 1);
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

/// Narrows with a fault in the second replay of each pair for which `faulty` has one.
fn narrow_with(log: &[Record], faulty: impl Fn(u32) -> Option<Fault>) -> Narrowed {
    let stops: Vec<u64> = log
        .iter()
        .filter(|record| matches!(record.entry, Entry::State(_)))
        .map(|record| record.position.count)
        .collect();
    assert!(stops.len() >= 3, "{stops:?}");
    let pairs = Cell::new(0);
    let pair = || {
        pairs.set(pairs.get() + 1);
        let side =
            |piece, fault| Faulty { replay: Pieces { guest: replay(machine(), log.to_vec()), piece }, fault };
        Ok([side(u64::MAX, None), side(70_001, faulty(pairs.get()))])
    };
    narrow(pair, &stops).unwrap()
}

/// What the guest never touches.
const IDLE_BYTE: usize = 0x7_7123;

#[test]
fn a_flipped_bit_of_ram_is_found_where_it_flips() {
    let log = log();
    for when in [1, 4_444_444, 10_000_001] {
        let Narrowed::Parted(parting) = narrow_with(&log, |_| Some(Fault::Bit(when, IDLE_BYTE))) else {
            panic!()
        };
        assert_eq!(parting.position, when);
        assert_eq!((&parting.registers[..], &parting.devices[..], parting.pages), (&[][..], &[""; 0][..], 1));
        let (at, a, b) = parting.bytes[0];
        assert_eq!((at, a ^ b), (IDLE_BYTE as u64, 4));
        let text = parting.to_string();
        assert!(text.contains(&format!("position {when}\n")) && text.contains("RAM page 0x77, "), "{text}");
    }
}

#[test]
fn registers_are_named() {
    let log = log();
    // Where the guest is at `add rcx, rdi`, whose operands are in its last byte.
    let mut replay = Pieces { guest: replay(machine(), log.clone()), piece: u64::MAX };
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
    let Narrowed::Parted(parting) = narrow_with(&log, |_| Some(Fault::Instruction(when, rip + 2))) else {
        panic!()
    };
    assert_eq!((parting.position, parting.pages), (when + 1, 0));
    // It was added to rbp.
    let names: Vec<_> = parting.registers.iter().map(|r| r.0).collect();
    assert!(names.contains(&"rcx") && names.contains(&"rbp"), "{names:?}");
    assert!(parting.to_string().contains("\n  register rcx: 0x"), "{parting}");
}

#[test]
fn what_comes_once_is_told_as_such() {
    let log = log();
    let Narrowed::Once { equal_at, differs_at } =
        narrow_with(&log, |pair| (pair == 1).then_some(Fault::Bit(4_444_444, IDLE_BYTE)))
    else {
        panic!()
    };
    assert!(equal_at < 4_444_444 && 4_444_444 <= differs_at, "{equal_at} {differs_at}");
    // A fault that comes every third time is found all the same.
    let sometimes = |pair: u32| (pair % 3 == 1).then_some(Fault::Bit(4_444_444, IDLE_BYTE));
    let Narrowed::Parted(parting) = narrow_with(&log, sometimes) else { panic!() };
    assert_eq!(parting.position, 4_444_444);
}

#[test]
fn equal_replays_are_equal_also_where_the_log_is_another() {
    let mut log = log();
    assert!(matches!(narrow_with(&log, |_| None), Narrowed::Equal(None)));
    let typed = log.iter_mut().find_map(|record| match &mut record.entry {
        Entry::Input(LoggedInput::Console { bytes, .. }) => Some(bytes),
        _ => None,
    });
    typed.unwrap()[0] ^= 1;
    let Narrowed::Equal(Some(divergence)) = narrow_with(&log, |_| None) else { panic!() };
    assert!(divergence.to_string().contains("RAM"), "{divergence}");
}
