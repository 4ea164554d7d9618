//! The channel's bytes: golden file, round trips, cutting, and what is refused.
#![allow(clippy::disallowed_methods)]

use std::collections::BTreeMap;

use entry::PositionUnit;
use entry::identity::Identity;
use entry::log::EndReason;
use logging_channel::message::{
    Ack, BODY_MAX, Beat, CERTIFICATE_MAX, Hello, KeyProof, Message, NAME_MAX, REASON_MAX, Role,
    SIGNATURE_MAX, encode, risk,
};
use logging_channel::message_error::{MessageError, MessageFault};
use logging_channel::stream::{MessageReader, Outbox};
use logging_channel::versions::{ChannelVersions, OURS};
use proptest::prelude::*;

/// The version in which most of these tests write. Builds for tests of upgrades know one more.
const NEWEST: u16 = 4;

fn hello() -> Hello {
    Hello {
        versions: ChannelVersions { newest: NEWEST, oldest: 3 },
        vm: "trial".into(),
        role: Role::Backup,
        incarnation: 0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10,
        disks: BTreeMap::from([("root".into(), 7), ("spare".into(), 8)]),
        timeout_ns: 1_000_000_000,
        buffer_bytes: 32 << 20,
        identity: Identity::new(PositionUnit::Instructions).field("ram-bytes", 1 << 27),
    }
}

/// One of each kind, in the order of their numbers.
fn one_of_each() -> Vec<Message> {
    vec![
        Message::Hello(Box::new(hello())),
        Message::Start { generation: 3 },
        Message::Log(b"a block's bytes".to_vec()),
        Message::Ack(Ack { received: 300, replayed: 299, echo_ns: 5_000_000_000 }),
        Message::Released { outputs: 41 },
        Message::Beat(Beat {
            stamp_ns: 6_000_000_000,
            echo_ns: 5_000_000_001,
            turns: 1000,
            records: 299,
            position: 123_456_789,
            risks: risk::STORE_SILENT | risk::BEHIND,
            lag_ns: 2_500_000_000,
        }),
        Message::Failed { reason: "the disk \"root\" failed".into() },
        Message::HandOver,
        Message::Live,
        Message::End(EndReason::Stopped),
        Message::Ended,
        Message::Key(KeyProof { certificate: vec![0x30; 300], scheme: 0x0403, signature: vec![7; 70] }),
    ]
}

/// The same, as far as version 3 can say it.
fn one_of_each_in_version_3() -> Vec<Message> {
    let change = |message| match message {
        Message::Hello(hello) => {
            Message::Hello(Box::new(Hello { versions: ChannelVersions { newest: 3, oldest: 3 }, ..*hello }))
        }
        Message::Beat(beat) => Message::Beat(Beat { risks: 0, lag_ns: 0, ..beat }),
        other => other,
    };
    one_of_each().into_iter().map(change).collect()
}

fn bytes_in(version: u16, messages: &[Message]) -> Vec<u8> {
    let mut bytes = Vec::new();
    messages.iter().for_each(|m| encode(version, m, &mut bytes));
    bytes
}

fn bytes_of(messages: &[Message]) -> Vec<u8> {
    bytes_in(NEWEST, messages)
}

/// Everything that a reader returns when the bytes come in pieces of these lengths, again and again.
fn read(bytes: &[u8], pieces: &[usize]) -> (Vec<Message>, Option<MessageError>) {
    let (mut reader, mut messages, mut rest) = (MessageReader::new(), Vec::new(), bytes);
    for piece in pieces.iter().cycle() {
        let (now, later) = rest.split_at(rest.len().min(*piece));
        reader.push(now);
        rest = later;
        loop {
            match reader.next_message() {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break,
                Err(error) => {
                    assert_eq!(
                        reader.next_message(),
                        Err(error.clone()),
                        "a reader that has failed fails again"
                    );
                    return (messages, Some(error));
                }
            }
        }
        assert!(reader.incomplete() <= BODY_MAX + 16 + piece, "a reader keeps at most one message");
        if rest.is_empty() {
            return (messages, None);
        }
    }
    unreachable!("there is a piece")
}

fn refusal(bytes: &[u8]) -> MessageError {
    read(bytes, &[bytes.len()]).1.expect("these bytes are refused")
}

/// These files never change: another format is a new version, with its own file.
#[test]
fn golden() {
    let versions: [(u16, Vec<Message>, &[u8]); 2] = [
        (3, one_of_each_in_version_3(), include_bytes!("golden/v3.channel")),
        (4, one_of_each(), include_bytes!("golden/v4.channel")),
    ];
    for (version, messages, golden) in versions {
        assert!(bytes_in(version, &messages) == golden, "the bytes of the channel have changed: {version}");
        assert_eq!(read(golden, &[golden.len()]), (messages, None));
    }
}

#[test]
fn beats_in_version_3_say_nothing_of_risks() {
    let hello = one_of_each_in_version_3()[0].clone();
    let bytes = bytes_in(3, &[hello.clone(), one_of_each()[5].clone()]);
    assert_eq!(read(&bytes, &[7]), (vec![hello, one_of_each_in_version_3()[5].clone()], None));
}

/// The messages that version 4 has added: a golden file of its own, which never changes either.
#[test]
fn golden_handover() {
    let golden = include_bytes!("golden/v4-handover.channel");
    let versions = ChannelVersions { newest: 4, oldest: 3 };
    let added = [
        Message::Hello(Box::new(Hello { versions, ..hello() })),
        Message::Prepare,
        Message::Prepared { records: 300 },
        Message::Yield,
    ];
    let mut bytes = Vec::new();
    added.iter().for_each(|m| encode(4, m, &mut bytes));
    assert!(bytes == golden, "the bytes of the channel have changed");
    assert_eq!(read(golden, &[golden.len()]), (added.to_vec(), None));
}

#[test]
fn only_the_first_message_is_a_hello() {
    let error = refusal(&bytes_of(&[Message::HandOver]));
    assert_eq!(error, MessageError { offset: 0, fault: MessageFault::Hello });
    let first = bytes_of(&one_of_each()[..1]);
    let twice = [first.clone(), first.clone()].concat();
    assert_eq!(refusal(&twice), MessageError { offset: first.len() as u64, fault: MessageFault::Hello });
}

#[test]
fn a_length_is_refused_before_its_bytes_come() {
    let mut bytes = bytes_of(&one_of_each()[..1]);
    let start = bytes.len() as u64;
    bytes.extend([3, 0xff, 0xff, 0xff, 0x7f]);
    let error = refusal(&bytes);
    assert_eq!(error.offset, start + 1);
    let text = error.to_string();
    assert!(
        text.contains("the length of the message is 268435455, but must be between 0 and 1048592"),
        "{text}"
    );
}

#[test]
fn errors_name_the_field_and_its_offset() {
    let golden = bytes_of(&one_of_each());
    let changed = |at: usize, value: u8| {
        let mut bytes = golden.clone();
        bytes[at] = value;
        refusal(&bytes).to_string()
    };
    // Kind and a length of two bytes stand before the hello's body.
    assert_eq!(
        changed(3, b'X'),
        "channel: byte 3: this is not a vmft channel (the magic number differs): check the address and port of \
         the peer"
    );
    assert_eq!(changed(15, 2), "channel: byte 15: role 2 is unknown");
    assert_eq!(
        changed(16, 0),
        "channel: byte 16: the length of the VM name is 0, but must be between 1 and 64"
    );
    assert_eq!(changed(0, 99), "channel: byte 0: message kind 99 is unknown");
    let golden = bytes_of(&one_of_each()[..11]);
    let last = golden.len() - 1;
    let mut long = golden.clone();
    long[last] = 1;
    long.push(0);
    assert_eq!(
        refusal(&long).to_string(),
        format!("channel: byte {}: the message continues after its last field", last + 1)
    );
}

/// A hello's versions follow its kind, a length of two bytes and the magic number; in version 2 the role came after
/// the only version.
#[test]
fn sides_without_a_common_version_are_named() {
    let refused = |versions: &[u8], theirs: &str| {
        let mut bytes = bytes_of(&one_of_each());
        bytes.splice(11..15, versions.iter().copied());
        let words = format!(
            "channel: byte 11: the peer speaks {theirs} of the channel's protocol and this vmft {OURS}, so they have \
             none in common: replace the older of the two releases of vmft"
        );
        assert_eq!(refusal(&bytes).to_string(), words);
    };
    refused(&[2, 0, 0, 5], "version 2");
    refused(&[12, 0, 11, 0], "versions 11 to 12");
}

#[test]
fn both_sides_speak_the_newest_version_that_both_know() {
    for newest in 3..=9 {
        let versions = ChannelVersions { newest, oldest: 3 };
        let mut outbox = Outbox::new();
        outbox.push(&Message::Hello(Box::new(Hello { versions, ..hello() })));
        let mut reader = MessageReader::new();
        reader.push(outbox.front());
        assert!(matches!(reader.next_message(), Ok(Some(Message::Hello(h))) if h.versions == versions));
        assert_eq!(reader.version(), Some(newest.min(OURS.newest)));
        outbox.wrote(outbox.front().len());
        outbox.speak(newest.min(OURS.newest));
        outbox.push(&one_of_each()[5]);
        reader.push(outbox.front());
        let spoken = if newest == 3 { one_of_each_in_version_3() } else { one_of_each() };
        assert_eq!(reader.next_message(), Ok(Some(spoken[5].clone())));
    }
}

#[test]
fn fields_that_a_later_version_adds_to_a_hello_are_ignored() {
    let mut bytes = bytes_of(&one_of_each());
    let [low, high] = [bytes[1], bytes[2]];
    let length = usize::from(low & 0x7f) | usize::from(high) << 7;
    bytes.splice(3 + length..3 + length, *b"more");
    (bytes[1], bytes[2]) = ((length + 4) as u8 | 0x80, ((length + 4) >> 7) as u8);
    assert_eq!(read(&bytes, &[bytes.len()]), (one_of_each(), None));
}

#[test]
fn a_refusal_may_come_in_place_of_a_hello() {
    let refusal = Message::Failed { reason: "this backup has a primary already".into() };
    assert_eq!(read(&bytes_of(std::slice::from_ref(&refusal)), &[5]), (vec![refusal], None));
}

#[test]
fn a_key_proof_is_bounded() {
    let hello = one_of_each()[0].clone();
    for (certificate, signature) in [(CERTIFICATE_MAX + 1, 1), (1, SIGNATURE_MAX + 1), (0, 1), (1, 0)] {
        let (certificate, signature) = (vec![1; certificate], vec![2; signature]);
        let proof = Message::Key(KeyProof { certificate, scheme: 3, signature });
        let error = refusal(&bytes_of(&[hello.clone(), proof]));
        assert!(error.to_string().contains("must be between 1 and"), "{error}");
    }
}

#[test]
fn a_long_reason_is_cut_at_a_character() {
    let message = Message::Failed { reason: "ä".repeat(REASON_MAX) };
    let (read, error) = read(&bytes_of(&[one_of_each()[0].clone(), message]), &[100]);
    assert_eq!(error, None);
    assert_eq!(read[1], Message::Failed { reason: "ä".repeat(REASON_MAX / 2) });
}

fn any_hello() -> impl Strategy<Value = Message> {
    let name = || proptest::string::string_regex(&format!("[a-z]{{1,{NAME_MAX}}}")).expect("a pattern");
    let disks = proptest::collection::btree_map(name(), any::<u128>(), 0..16);
    (name(), any::<bool>(), any::<u128>(), disks, any::<(u64, u64)>(), ".{0,200}").prop_map(
        |(vm, primary, incarnation, disks, (timeout_ns, buffer_bytes), value)| {
            let role = if primary { Role::Primary } else { Role::Backup };
            let identity = Identity::new(PositionUnit::Branches).field("value", value);
            Message::Hello(Box::new(Hello {
                versions: hello().versions,
                vm,
                role,
                incarnation,
                disks,
                timeout_ns,
                buffer_bytes,
                identity,
            }))
        },
    )
}

fn any_message() -> impl Strategy<Value = Message> {
    prop_oneof![
        any::<u64>().prop_map(|generation| Message::Start { generation }),
        proptest::collection::vec(any::<u8>(), 0..3000).prop_map(Message::Log),
        any::<[u64; 3]>()
            .prop_map(|[received, replayed, echo_ns]| { Message::Ack(Ack { received, replayed, echo_ns }) }),
        any::<u64>().prop_map(|outputs| Message::Released { outputs }),
        any::<[u64; 7]>().prop_map(|[stamp_ns, echo_ns, turns, records, position, risks, lag_ns]| {
            Message::Beat(Beat { stamp_ns, echo_ns, turns, records, position, risks, lag_ns })
        }),
        ".{0,80}".prop_map(|reason| Message::Failed { reason }),
        Just(Message::HandOver),
        Just(Message::Prepare),
        any::<u64>().prop_map(|records| Message::Prepared { records }),
        Just(Message::Yield),
        Just(Message::Live),
        (0u8..4).prop_map(|n| Message::End(EndReason::numbered(n).expect("a reason"))),
        Just(Message::Ended),
        (1..=CERTIFICATE_MAX, any::<(u8, u16)>(), 1..=SIGNATURE_MAX).prop_map(
            |(certificate, (byte, scheme), signature)| {
                let (certificate, signature) = (vec![byte; certificate], vec![byte; signature]);
                Message::Key(KeyProof { certificate, scheme, signature })
            }
        ),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn messages_are_read_as_they_were_sent(
        hello in any_hello(),
        rest in proptest::collection::vec(any_message(), 0..12),
        pieces in proptest::collection::vec(1usize..700, 1..8),
    ) {
        let messages: Vec<_> = std::iter::once(hello).chain(rest).collect();
        prop_assert_eq!(read(&bytes_of(&messages), &pieces), (messages, None));
    }

    #[test]
    fn damage_is_an_error_or_other_messages_and_cutting_makes_no_difference(
        rest in proptest::collection::vec(any_message(), 0..6),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        pieces in proptest::collection::vec(1usize..50, 1..8),
    ) {
        let messages: Vec<_> = one_of_each().into_iter().take(1).chain(rest).collect();
        let mut bytes = bytes_of(&messages);
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        prop_assert_eq!(read(&bytes, &pieces), read(&bytes, &[bytes.len()]));
    }
}
