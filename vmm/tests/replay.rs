//! Recording and replaying a small guest: a replay is equal to its recording whatever happened and when, and every change of a
//! log is noticed.

mod guest;

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, Ordering};

use entry::block::{Decoder, Encoder};
use entry::codec::{ByteReader, DecodeError, encode};
use entry::identity::Identity;
use entry::log::{Entry, Record};
use entry::{End, Position, PositionUnit};
use proptest::prelude::*;
use vmm::GuestLoop;
use vmm::guest_loop::{LoopError, Turn};
use vmm::machine::Machine;
use vmm::record::{LogIntervals, Recorder};
use vmm::replay::{Records, ReplayError, Replayer};
use vmm::source::{Live, PlannedStops};

use guest::log::{MemoryLog, NoDisk, replay};
use guest::world::World;
use guest::{machine, total};

type Recording = GuestLoop<Recorder<World, MemoryLog>>;

fn recording(world: World, stops: PlannedStops, pace: LogIntervals) -> Recording {
    let live = Live::new(world, PositionUnit::Instructions, stops);
    GuestLoop { machine: machine(), source: Recorder::new(live, MemoryLog::default(), pace) }
}

/// Replays a recording. The replay must end like the recording, with the same machine.
fn check(mut recorded: Recording) {
    let mut replay = replay(machine(), recorded.source.log().0.clone());
    assert_eq!(replay.run().unwrap(), Turn::Finished(End::PowerOff));
    assert!(replay.source.is_done());
    assert_eq!(replay.source.equal_until(), Some(recorded.machine.position()));
    assert_eq!(total(&mut replay.machine), total(&mut recorded.machine));
}

fn typing(raw: Vec<(u32, Vec<u8>)>) -> VecDeque<(u32, Vec<u8>)> {
    let mut look = 0;
    let at = |(after, bytes)| {
        look += after;
        (look, bytes)
    };
    raw.into_iter().map(at).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// With inputs, kicks and pauses at any moment, and a fast or slow host clock, the log alone leads to the same run.
    #[test]
    fn what_is_recorded_replays(
        raw in prop::collection::vec((1u32..60, prop::collection::vec(any::<u8>(), 1..20)), 0..8),
        pauses in prop::collection::vec(1u64..400_000, 0..30),
        clock_step_ns in prop_oneof![Just(0u64), 1u64..100_000, 1_000_000u64..30_000_000],
        pace in prop_oneof![Just(LogIntervals::FILE), Just(LogIntervals::BACKUP)],
        // After a kick the guest stops at the first position at which it may.
        kicks in prop_oneof![Just(0u32), 1u32..20_000],
    ) {
        let world = World { typing: typing(raw), clock_step_ns, ..World::default() };
        let mut recording = recording(world, PlannedStops::default(), pace);
        let kicker = recording.machine.kicker();
        recording.source.live().outside().kicks = Some((kicks, kicker));
        let mut pauses = pauses.into_iter();
        let turn = loop {
            let at = recording.machine.position().count;
            recording.source.live().pause_at(pauses.next().map(|after| Position::exact(at + after)));
            match recording.run().unwrap() {
                Turn::Paused => {}
                turn => break turn,
            }
        };
        prop_assert_eq!(turn, Turn::Finished(End::PowerOff));
        check(recording);
    }
}

/// Kicks from another thread stop the guest anywhere, also when an interrupt was just delivered or time was just skipped. An
/// input that is applied there meets the same state in the replay.
#[test]
fn a_storm_of_kicks_leaves_no_trace() {
    let mut kicks = 0;
    for round in 0..12 {
        let raw = (0..400).map(|n| (1 + (n * 7 + round) % 23, vec![n as u8; 3])).collect();
        let clock_step_ns = [0, 30_000, 400_000][round as usize % 3];
        let mut recording = recording(
            World { typing: typing(raw), clock_step_ns, ..World::default() },
            PlannedStops::default(),
            LogIntervals::FILE,
        );
        let kicker = recording.machine.kicker();
        let over = AtomicBool::new(false);
        std::thread::scope(|threads| {
            threads.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    kicker.kick();
                    (0..round * 50).for_each(|_| std::hint::spin_loop());
                }
            });
            let turn = recording.run();
            over.store(true, Ordering::Relaxed);
            assert_eq!(turn.unwrap(), Turn::Finished(End::PowerOff));
        });
        kicks += recording.machine.counts().kicks;
        check(recording);
    }
    // The number of kicks depends on how busy the host is.
    assert!(kicks > 12, "{kicks} kicks");
}

/// A short recording with each kind of record that this guest makes.
fn short() -> (Vec<Record>, Machine) {
    let typing = [(3, b"some".to_vec()), (5, b" bytes".to_vec())].into();
    let stops = PlannedStops { digests: [300_000, 700_000].map(Position::exact).into(), pause: None };
    let mut recording =
        recording(World { typing, clock_step_ns: 7_000_000, ..World::default() }, stops, LogIntervals::FILE);
    while recording.machine.counts().interrupts < 12 {
        assert_eq!(recording.run_once().unwrap(), Turn::Again);
    }
    recording.source.stop(&mut recording.machine).unwrap();
    let log = std::mem::take(&mut recording.source.log().0);
    for kind in ["console-in", "clock", "console-out", "mark", "state", "end"] {
        assert!(log.iter().any(|record| record.entry.kind() == kind), "{kind}");
    }
    (log, recording.machine)
}

/// The records of an encoded log.
struct Bytes {
    decoder: Decoder,
    block: std::vec::IntoIter<Record>,
}

impl Records for Bytes {
    type Error = DecodeError;

    fn next(&mut self) -> Result<Option<Record>, DecodeError> {
        loop {
            if let Some(record) = self.block.next() {
                return Ok(Some(record));
            }
            match self.decoder.next_block()? {
                Some(records) => self.block = records.into_iter(),
                None => return Ok(None),
            }
        }
    }
}

type Failure = ReplayError<DecodeError, Infallible>;

/// Replays an encoded log. Returns the number of bytes at its end that are not a whole block, as after a crash.
fn replay_bytes(bytes: &[u8]) -> Result<usize, LoopError<Failure>> {
    let mut decoder = Decoder::new();
    decoder.push(bytes);
    let identity = decoder.identity().map_err(|e| LoopError::Source(ReplayError::Log(e)))?;
    assert!(identity.is_some(), "a replay needs the header");
    let source = Replayer::new(Bytes { decoder, block: Vec::new().into_iter() }, NoDisk);
    let mut replay = GuestLoop { machine: machine(), source };
    replay.run()?;
    assert!(replay.source.is_done());
    Ok(replay.source.records().decoder.incomplete())
}

#[test]
fn a_changed_byte_anywhere_in_a_log_is_refused_where_it_is() {
    let (log, _) = short();
    let mut encoder = Encoder::new(&Identity::new(PositionUnit::Instructions));
    let mut bytes = encoder.take_bytes();
    // Offsets at which the header and the blocks begin.
    let mut starts = vec![0, bytes.len()];
    for records in log.chunks(6) {
        records.iter().for_each(|record| encoder.append(record));
        encoder.close_block();
        bytes.extend(encoder.take_bytes());
        starts.push(bytes.len());
    }
    assert_eq!(replay_bytes(&bytes).unwrap(), 0);
    for at in 0..bytes.len() {
        // The length of the identity: if it is damaged there is no header to begin with (the codec's tests check that).
        if (10..14).contains(&at) {
            continue;
        }
        let mut bad = bytes.clone();
        bad[at] ^= 1 << (at % 8);
        let start = starts.iter().rev().find(|start| **start <= at).unwrap();
        match replay_bytes(&bad) {
            Err(LoopError::Source(ReplayError::Log(e))) => {
                assert!((*start as u64..=at as u64).contains(&e.offset), "byte {at}: {e}")
            }
            other => panic!("byte {at}: {other:?}"),
        }
    }
}

/// If the checksums match although a record was changed, the replay finds it: not before the changed record, and at the next
/// digest at the latest.
#[test]
fn a_changed_record_is_a_divergence_where_it_takes_effect() {
    let (log, mut recorded) = short();
    let end = recorded.digest().unwrap();
    let mut bytes = Vec::new();
    let mut last = Position::default();
    log.iter().for_each(|record| encode(PositionUnit::Instructions, &mut last, record, &mut bytes));
    let (mut refused, mut made_up_for) = (0, 0);
    for at in 0..bytes.len() {
        let mut bad = bytes.clone();
        bad[at] ^= 1 << (at % 8);
        let mut reader = ByteReader::new(&bad, 0);
        let mut last = Position::default();
        let mut changed = Vec::new();
        while !reader.is_done() {
            match reader.record(PositionUnit::Instructions, &mut last) {
                Ok(record) => changed.push(record),
                Err(_) => break,
            }
        }
        if !reader.is_done() {
            refused += 1;
            continue;
        }
        let first = log.iter().zip(&changed).position(|(a, b)| a != b).expect("one byte differs");
        let digest = |record: &Record| matches!(record.entry, Entry::State(_));
        let found_by = first + changed[first..].iter().position(digest).unwrap_or(changed.len());
        let mut replay = replay(machine(), changed);
        match replay.run() {
            Err(LoopError::Source(ReplayError::Divergence(_))) => {
                let found = replay.source.applied() as usize;
                assert!((first..=found_by).contains(&found), "byte {at}: {found}, not {first}..={found_by}");
            }
            // A changed reading of the clock can go unnoticed if the next reading comes before the guest looks at the time.
            Ok(Turn::Paused) if log[first].entry.kind() == "clock" => {
                assert_eq!(replay.machine.digest().unwrap(), end);
                made_up_for += 1;
            }
            other => panic!("byte {at}, {}: {other:?}", log[first]),
        }
    }
    assert!(refused + made_up_for < bytes.len() / 2, "{refused} and {made_up_for} of {}", bytes.len());
}

#[test]
fn a_cut_log_replays_up_to_its_last_whole_block() {
    let (log, _) = short();
    let mut encoder = Encoder::new(&Identity::new(PositionUnit::Instructions));
    log.iter().for_each(|record| encoder.append(record));
    encoder.close_block();
    let bytes = encoder.take_bytes();
    let cut = &bytes[..bytes.len() - 1];
    assert!(replay_bytes(cut).unwrap() > 100);
}

#[test]
fn nothing_follows_the_end() {
    let (mut log, _) = short();
    let position = log.last().unwrap().position;
    // With the last state of the log, and without it.
    for _ in 0..2 {
        log.push(Record { position, entry: Entry::Mark { time_ns: 0 } });
        let error = replay(machine(), log.clone()).run().unwrap_err().to_string();
        assert!(error.contains("the guest has ended, but the log goes on"), "{error}");
        log.truncate(log.len() - 2);
    }
}
