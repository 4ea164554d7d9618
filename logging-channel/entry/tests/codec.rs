//! The format: golden bytes, round trips of arbitrary records, and bytes that are not a log.

use entry::block::{BLOCK_MAX, Decoder, Encoder};
use entry::codec::{BYTES_MAX, ByteReader, DecodeError, DecodeFault, ENTROPY_MAX};
use entry::identity::Identity;
use entry::log::{
    CheckWord, DiskStatus, EndReason, Entry, LoggedInput, LoggedOutput, OutputTo, Record, StateCheck,
};
use entry::{Answer, Console, Digest, End, Position, PositionUnit};
use proptest::collection::vec;
use proptest::prelude::*;

const UNITS: [PositionUnit; 4] =
    [PositionUnit::Instructions, PositionUnit::SynchronousExits, PositionUnit::Branches, PositionUnit::Steps];

fn console() -> impl Strategy<Value = Console> {
    prop_oneof![Just(Console::Serial), (0..255u8).prop_map(Console::Virtio)]
}

fn digest() -> impl Strategy<Value = Digest> {
    any::<u128>().prop_map(Digest)
}

fn entry() -> impl Strategy<Value = Entry> {
    let frame = (any::<u8>(), vec(any::<u8>(), 14..200))
        .prop_map(|(slot, bytes)| Entry::Input(LoggedInput::Frame { slot, bytes }));
    let status =
        prop_oneof![Just(DiskStatus::Done), digest().prop_map(DiskStatus::Read), Just(DiskStatus::Failed)];
    let disk = (any::<u8>(), any::<u64>(), status)
        .prop_map(|(slot, id, status)| Entry::Input(LoggedInput::DiskDone { slot, id, status }));
    let typed = (console(), vec(any::<u8>(), 1..50))
        .prop_map(|(console, bytes)| Entry::Input(LoggedInput::Console { console, bytes }));
    let to = prop_oneof![any::<u8>().prop_map(OutputTo::Net), console().prop_map(OutputTo::Console)];
    let output = (to, 0..=BYTES_MAX as u32, digest())
        .prop_map(|(to, len, digest)| Entry::Output(LoggedOutput { to, len, digest }));
    let end = prop_oneof![
        Just(EndReason::Guest(End::PowerOff)),
        Just(EndReason::Guest(End::Reboot)),
        Just(EndReason::Guest(End::TripleFault)),
        Just(EndReason::Stopped)
    ];
    prop_oneof![
        frame,
        disk,
        typed,
        output,
        any::<u64>().prop_map(|time_ns| Entry::Input(LoggedInput::Clock { time_ns })),
        any::<u8>().prop_map(|vector| Entry::Interrupt { vector }),
        vec(any::<u8>(), 0..100).prop_map(|b| Entry::Answer(Answer::Entropy(b))),
        any::<u64>().prop_map(|v| Entry::Answer(Answer::Value(v))),
        any::<u64>().prop_map(|time_ns| Entry::Mark { time_ns }),
        any::<[u32; 3]>().prop_map(|words| {
            let [vcpu, devices, ram] = words.map(CheckWord);
            Entry::State(StateCheck { vcpu, devices, ram })
        }),
        vec(any::<u16>(), 1..100).prop_map(Entry::Exits),
        end.prop_map(Entry::End),
    ]
}

/// Records with ascending positions in this unit, each with whether its block is closed after it.
fn records(unit: PositionUnit) -> impl Strategy<Value = Vec<(Record, bool)>> {
    let ascent = prop_oneof![0..300u64, 0..1u64 << 40];
    vec((ascent, 1..1000u64, any::<u64>(), entry(), any::<bool>()), 0..60).prop_map(move |raw| {
        let mut at = Position::default();
        let step = |(ascent, within, rip, entry, close)| {
            at.count += ascent;
            match unit {
                PositionUnit::Instructions | PositionUnit::Steps => {}
                PositionUnit::SynchronousExits => {
                    at.within = within + if ascent == 0 { at.within } else { 0 }
                }
                PositionUnit::Branches => {
                    at.within = within + if ascent == 0 { at.within } else { 0 };
                    at.rip = rip;
                    at.registers = rip.rotate_left(17);
                }
            }
            (Record { position: at, entry }, close)
        };
        raw.into_iter().map(step).collect()
    })
}

fn identity(unit: PositionUnit) -> Identity {
    Identity::new(unit).field("engine", "soft").field("ram-bytes", 268_435_456).field("kernel", "00ff")
}

fn encode(unit: PositionUnit, records: &[(Record, bool)]) -> Vec<u8> {
    let mut e = Encoder::new(&identity(unit));
    for (record, close) in records {
        e.append(record);
        if *close {
            e.close_block();
        }
    }
    e.close_block();
    e.take_bytes()
}

/// The identity, all records, and the number of bytes after the last whole block.
fn decode(bytes: &[u8], piece: usize) -> Result<(Option<Identity>, Vec<Record>, usize), DecodeError> {
    let mut d = Decoder::new();
    let mut records = Vec::new();
    for piece in bytes.chunks(piece.max(1)) {
        d.push(piece);
        while let Some(block) = d.next_block()? {
            records.extend(block);
        }
    }
    Ok((d.identity()?.cloned(), records, d.incomplete()))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn records_survive(piece in 1..5000usize, raw in (0..4usize).prop_flat_map(|u| records(UNITS[u]).prop_map(move |r| (u, r)))) {
        let (unit, raw) = (UNITS[raw.0], raw.1);
        let bytes = encode(unit, &raw);
        let (id, records, rest) = decode(&bytes, piece).unwrap();
        prop_assert_eq!(id.unwrap(), identity(unit));
        prop_assert_eq!(records, raw.into_iter().map(|(r, _)| r).collect::<Vec<_>>());
        prop_assert_eq!(rest, 0);
    }

    #[test]
    fn a_log_taken_in_pieces_is_the_same(raw in records(PositionUnit::Instructions)) {
        let mut e = Encoder::new(&identity(PositionUnit::Instructions));
        let mut bytes = Vec::new();
        for (record, close) in &raw {
            e.append(record);
            if *close {
                e.close_block();
                let piece = e.take_bytes();
                bytes.extend(&piece);
                e.reuse(piece);
            }
        }
        e.close_block();
        bytes.extend(e.take_bytes());
        prop_assert_eq!(bytes, encode(PositionUnit::Instructions, &raw));
    }

    #[test]
    fn a_cut_log_gives_its_whole_blocks(cut in any::<prop::sample::Index>(), raw in records(PositionUnit::Instructions)) {
        let bytes = encode(PositionUnit::Instructions, &raw);
        let cut = cut.index(bytes.len() + 1);
        let (_, records, _) = decode(&bytes[..cut], 4096).unwrap();
        let all: Vec<_> = raw.into_iter().map(|(r, _)| r).collect();
        prop_assert!(all.starts_with(&records));
    }

    #[test]
    fn a_changed_byte_is_found(at in any::<prop::sample::Index>(), flip in 1..=255u8, raw in records(PositionUnit::Instructions)) {
        let mut bytes = encode(PositionUnit::Instructions, &raw);
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        match decode(&bytes, 4096) {
            // Refused at the start of what the checksum covers, or within it.
            Err(e) => prop_assert!(e.offset <= at as u64, "{e} for a change at {at}"),
            // A longer identity makes the header look cut off.
            Ok((identity, records, _)) => {
                prop_assert!((10..14).contains(&at) && identity.is_none(), "accepted, changed at {at}");
                prop_assert_eq!(records, []);
            }
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in vec(any::<u8>(), 0..2000), piece in 1..100usize) {
        // Also behind a header that is right, where decoding goes deepest.
        let mut whole = encode(PositionUnit::Branches, &[]);
        whole.extend(&bytes);
        for bytes in [&bytes, &whole] {
            if let Ok((_, records, _)) = decode(bytes, piece) {
                prop_assert!(records.len() <= bytes.len());
            }
        }
    }
}

#[test]
fn damage_to_any_byte_of_a_small_log_is_detected() {
    let bytes = encode(PositionUnit::Instructions, &sample());
    for at in 0..bytes.len() {
        for flip in 1..=0xff {
            let mut damaged = bytes.clone();
            damaged[at] ^= flip;
            if let Ok((identity, ..)) = decode(&damaged, 64) {
                // The identity's length: a header that is not there in full gives no log.
                assert!((10..14).contains(&at) && identity.is_none(), "byte {at} ^ {flip:#x} was accepted");
            }
        }
    }
}

#[test]
fn lost_repeated_and_swapped_blocks_are_found() {
    let mut e = Encoder::new(&identity(PositionUnit::Instructions));
    let mut pieces = vec![e.take_bytes()];
    for (record, _) in sample() {
        e.append(&record);
        e.close_block();
        pieces.push(e.take_bytes());
    }
    let checksum = |pieces: &[&Vec<u8>]| {
        let bytes: Vec<u8> = pieces.iter().flat_map(|p| p.iter().copied()).collect();
        decode(&bytes, 4096).expect_err("accepted").fault == DecodeFault::Checksum
    };
    assert!(checksum(&[&pieces[0], &pieces[2]]), "lost");
    assert!(checksum(&[&pieces[0], &pieces[1], &pieces[1]]), "repeated");
    assert!(checksum(&[&pieces[0], &pieces[2], &pieces[1]]), "swapped");
}

#[test]
fn errors_name_the_offset() {
    let log = encode(PositionUnit::Instructions, &sample());
    let failure = |bytes: &[u8]| decode(bytes, 4096).expect_err("accepted").to_string();
    assert!(failure(b"VMFTLOX\0").starts_with("log: byte 0: this is not a vmft log"));
    let mut newer = log.clone();
    newer[8] = 9;
    assert_eq!(failure(&newer), "log: byte 8: the log has version 9, this vmft reads version 3");
    let mut huge = log.clone();
    huge[10..14].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(failure(&huge).starts_with("log: byte 10: the length of the identity is 4294967295"));
    let header = encode(PositionUnit::Instructions, &[]);
    let mut long = header.clone();
    long.extend([0xff, 0xff, 0x7f, 0x7f ^ 0xa5]);
    let expected = format!("log: byte {}: the length of the block is {}", header.len(), (1 << 23) - 1);
    assert!(failure(&long).starts_with(&expected), "{}", failure(&long));
    let mut zeros = header.clone();
    zeros.extend([0; 4]);
    assert!(failure(&zeros).starts_with(&format!("log: byte {}: ", header.len())));
}

#[test]
fn a_number_has_one_form() {
    let read =
        |bytes: &[u8]| ByteReader::new(bytes, 7).record(PositionUnit::Instructions, &mut Position::default());
    assert_eq!(read(&[48, 1, 0]).unwrap().position, Position::exact(1));
    let error = read(&[48, 0x81, 0]).unwrap_err();
    assert_eq!(error.to_string(), "log: byte 8: the number is not in its shortest form or exceeds 64 bits");
}

#[test]
fn an_identity_that_differs_is_named() {
    let ours = identity(PositionUnit::Instructions);
    assert_eq!(ours.check(&ours), Ok(()));
    let theirs = identity(PositionUnit::Instructions).field("cpuid", "x");
    assert_eq!(ours.check(&theirs).unwrap_err().to_string(), r#"cpuid ("x" there, "" here)"#);
    let theirs = identity(PositionUnit::Instructions).field("hint-kernel", "/elsewhere");
    assert_eq!(ours.check(&theirs), Ok(()));
    let theirs = identity(PositionUnit::Steps);
    assert_eq!(ours.check(&theirs).unwrap_err().field, "position-unit");
}

#[test]
fn the_largest_entries_fit_a_block() {
    const { assert!(BLOCK_MAX > 3 * BYTES_MAX) };
    let big = |entry| (Record { position: Position::exact(1), entry }, false);
    let frame = Entry::Input(LoggedInput::Frame { slot: 0, bytes: vec![7; BYTES_MAX] });
    let entropy = Entry::Answer(Answer::Entropy(vec![9; ENTROPY_MAX]));
    let records: Vec<_> = (0..40).flat_map(|_| [big(frame.clone()), big(entropy.clone())]).collect();
    let (_, got, rest) = decode(&encode(PositionUnit::Instructions, &records), 10_000).unwrap();
    assert_eq!((got.len(), rest), (80, 0));
}

/// One record of each kind. The golden file consists of these: the list may grow only at its end, with a new
/// version.
fn sample() -> Vec<(Record, bool)> {
    let entries = [
        Entry::Input(LoggedInput::Frame { slot: 0, bytes: (0..60).collect() }),
        Entry::Input(LoggedInput::DiskDone { slot: 1, id: 300, status: DiskStatus::Done }),
        Entry::Input(LoggedInput::DiskDone { slot: 1, id: 301, status: DiskStatus::Read(Digest(0x1234)) }),
        Entry::Input(LoggedInput::DiskDone { slot: 1, id: 302, status: DiskStatus::Failed }),
        Entry::Input(LoggedInput::Console { console: Console::Serial, bytes: b"hello\n".to_vec() }),
        Entry::Input(LoggedInput::Clock { time_ns: 1_000_000_007 }),
        Entry::Interrupt { vector: 0x21 },
        Entry::Answer(Answer::Entropy(vec![0xaa; 16])),
        Entry::Answer(Answer::Value(0x0123_4567_89ab_cdef)),
        Entry::Output(LoggedOutput { to: OutputTo::Net(0), len: 1514, digest: Digest(u128::MAX / 3) }),
        Entry::Output(LoggedOutput { to: OutputTo::Console(Console::Virtio(3)), len: 1, digest: Digest(7) }),
        Entry::Mark { time_ns: 5_000_000_000 },
        Entry::State(StateCheck { vcpu: CheckWord(1), devices: CheckWord(2), ram: CheckWord(3) }),
        Entry::End(EndReason::Guest(End::Reboot)),
        Entry::End(EndReason::Stopped),
    ];
    let at = |n: usize| Position::exact((n as u64).pow(5));
    entries
        .into_iter()
        .enumerate()
        .map(|(n, entry)| (Record { position: at(n), entry }, n % 4 == 3))
        .collect()
}

#[test]
fn the_golden_log_has_not_changed() {
    let golden = include_bytes!("golden/v3.log");
    let records = sample();
    assert_eq!(
        encode(PositionUnit::Instructions, &records),
        golden,
        "the format changed: give it a new version"
    );
    let (_, got, _) = decode(golden, 4096).unwrap();
    assert_eq!(got, records.into_iter().map(|(r, _)| r).collect::<Vec<_>>());
}

#[test]
fn the_golden_log_of_exits_has_not_changed() {
    let golden = include_bytes!("golden/v3-exits.log");
    let record = |count, within, entry| {
        (Record { position: Position { within, ..Position::exact(count) }, entry }, false)
    };
    let records = vec![
        record(2, 0, Entry::Exits(vec![0x1234, 0xfedc])),
        record(2, 1, Entry::Mark { time_ns: 1 }),
        record(3, 0, Entry::Exits(vec![0])),
        record(3, 0, Entry::Input(LoggedInput::Clock { time_ns: 300 })),
    ];
    assert_eq!(encode(PositionUnit::SynchronousExits, &records), golden, "the format changed");
    let (_, got, _) = decode(golden, 4096).unwrap();
    assert_eq!(got, records.into_iter().map(|(r, _)| r).collect::<Vec<_>>());
}

#[test]
fn older_versions_are_refused() {
    for (version, log) in [(1, &include_bytes!("golden/v1.log")[..]), (2, include_bytes!("golden/v2.log"))] {
        let error = decode(log, 4096).unwrap_err();
        assert_eq!((error.offset, error.fault), (8, DecodeFault::Version(version)));
    }
}
