//! The messages on the connection, and their encoding: FORMAT.md, "The logging channel".
//!
//! Decoding is total: every byte string gives messages or an error with its offset. A message's length is
//! checked against the maximum of its kind before any of its bytes are kept.

use std::collections::BTreeMap;

use entry::block::{BLOCK_MAX, Decoder, Encoder};
use entry::codec::{ByteReader, DecodeFault, put_varint};
use entry::identity::{IDENTITY_MAX, Identity};
use entry::log::EndReason;

use crate::message_error::{MessageError, MessageFault};
use crate::versions::{ChannelVersions, OURS, RISKS_IN_BEATS, beat_end};

/// The first bytes of a hello.
pub const MAGIC: [u8; 8] = *b"VMFTCHN\0";
/// Longest name of a VM or a disk, in bytes.
pub const NAME_MAX: usize = 64;
/// Most disks that a VM may have.
pub const DISKS_MAX: usize = 16;
/// Longest reason, in bytes.
pub const REASON_MAX: usize = 1024;
/// Longest certificate in a [`KeyProof`], in bytes.
pub const CERTIFICATE_MAX: usize = 4096;
/// Longest signature in a [`KeyProof`], in bytes.
pub const SIGNATURE_MAX: usize = 1024;
/// Longest message body, in bytes: that of [`Message::Log`].
pub const BODY_MAX: usize = BLOCK_MAX + 16;
/// Longest header of a log, in bytes.
const HEADER_MAX: usize = IDENTITY_MAX + 32;
const HELLO_MAX: usize = HEADER_MAX + 2048;
const SMALL_MAX: usize = 128;
/// Most bytes of a log message before its block: its kind and a length of three bytes.
pub(crate) const LOG_PREFIX_MAX: usize = 4;
const _: () = assert!(BODY_MAX < 1 << 21);

mod kind {
    pub const HELLO: u8 = 1;
    pub const START: u8 = 2;
    pub const LOG: u8 = 3;
    pub const ACK: u8 = 4;
    pub const RELEASED: u8 = 5;
    pub const BEAT: u8 = 6;
    pub const FAILED: u8 = 7;
    pub const HAND_OVER: u8 = 8;
    pub const LIVE: u8 = 9;
    pub const END: u8 = 10;
    pub const ENDED: u8 = 11;
    pub const KEY: u8 = 12;
    pub const PREPARE: u8 = 13;
    pub const PREPARED: u8 = 14;
    pub const YIELD: u8 = 15;
}

/// The role of a replica in its pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Runs the guest and sends the log.
    Primary,
    /// Receives the log and replays it.
    Backup,
}

/// The first message of each side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The versions of the protocol that the sender knows.
    pub versions: ChannelVersions,
    /// Name of the VM, at most [`NAME_MAX`] bytes.
    pub vm: String,
    /// The sender's role.
    pub role: Role,
    /// The sender's incarnation.
    pub incarnation: u128,
    /// The sender's copies of the VM's disks, by name; at most [`DISKS_MAX`].
    pub disks: BTreeMap<String, u128>,
    /// The silence after which the sender suspects the other side, in ns.
    pub timeout_ns: u64,
    /// Weight of the records that the sender can hold (see [`crate::weight`]).
    pub buffer_bytes: u64,
    /// Its machine's identity. A primary's log continues the header made from this.
    pub identity: Identity,
}

/// The backup's acknowledgement of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ack {
    /// Records received.
    pub received: u64,
    /// Records replayed.
    pub replayed: u64,
    /// The latest [`Beat::stamp_ns`] that the backup has received.
    pub echo_ns: u64,
}

/// A heartbeat, which both sides send at a fixed interval.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Beat {
    /// The sender's clock, in ns. Only the sender itself interprets it, when it comes back as an echo.
    pub stamp_ns: u64,
    /// The latest stamp that the sender has received. It tells the other side that what it sent up to then
    /// has arrived.
    pub echo_ns: u64,
    /// Turns (iterations) of the sender's guest loop.
    pub turns: u64,
    /// Records that the sender has recorded or replayed.
    pub records: u64,
    /// The position of the sender's guest (its count).
    pub position: u64,
    /// What the sender knows that puts the pair at risk: a sum of the values in [`risk`]. Not in version 3.
    pub risks: u64,
    /// From the primary: how far the backup is behind, in ns. Not in version 3.
    pub lag_ns: u64,
}

/// The values of [`Beat::risks`]; a reader ignores those that it does not know.
pub mod risk {
    /// The store does not answer the sender.
    pub const STORE_SILENT: u64 = 1;
    /// The store has no record of the pair, or one from a backup.
    pub const STORE_UNKNOWN: u64 = 2;
    /// The guest's outputs do not leave the sender.
    pub const OUTPUTS_HELD: u64 = 4;
    /// The backup is further behind than it may be.
    pub const BEHIND: u64 = 8;
}

/// Shows that the sender has a new key, which replaces the one of the connection's handshake. Only the connection's
/// owner knows what is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyProof {
    /// The new certificate, at most [`CERTIFICATE_MAX`] bytes.
    pub certificate: Vec<u8>,
    /// The signature's scheme, as TLS 1.3 numbers them.
    pub scheme: u16,
    /// The new key's signature over a value that only this connection has, at most [`SIGNATURE_MAX`] bytes.
    pub signature: Vec<u8>,
}

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// From both: the first message.
    Hello(Box<Hello>),
    /// From the primary: the generation is open, and the guest runs.
    Start {
        /// The generation's number.
        generation: u64,
    },
    /// From the primary: one block of the log, encoded as FORMAT.md, "Block", says.
    Log(Vec<u8>),
    /// From the backup.
    Ack(Ack),
    /// From the primary: outputs have left.
    Released {
        /// Outputs since the log's start.
        outputs: u64,
    },
    /// From both.
    Beat(Beat),
    /// From both: the sender cannot go on, and will never take.
    Failed {
        /// Why, at most [`REASON_MAX`] bytes.
        reason: String,
    },
    /// From the primary, in version 3 only: the log ends here for a planned handover; the backup is to take, and go
    /// live.
    HandOver,
    /// From the backup: it lives, after a handover.
    Live,
    /// From the primary: the VM has ended for good, and all outputs have left.
    End(EndReason),
    /// From the backup: it knows that the VM has ended, and will never take.
    Ended,
    /// From both, at any time after the hello: the sender has a new key.
    Key(KeyProof),
    /// From the primary: it has paused its guest for a planned handover; the backup is to say when it has replayed
    /// everything. More of the log may follow: then the handover is off.
    Prepare,
    /// From the backup: it has replayed everything that it was sent, with equal digests, and is ready to go live.
    Prepared {
        /// Records replayed.
        records: u64,
    },
    /// From the primary: it will never take and never emit again; the backup is to go live.
    Yield,
}

impl Message {
    /// Its name in FORMAT.md.
    pub fn name(&self) -> &'static str {
        match self {
            Message::Hello(_) => "hello",
            Message::Start { .. } => "start",
            Message::Log(_) => "log",
            Message::Ack(_) => "ack",
            Message::Released { .. } => "released",
            Message::Beat(_) => "beat",
            Message::Failed { .. } => "failed",
            Message::HandOver => "hand-over",
            Message::Live => "live",
            Message::End(_) => "end",
            Message::Ended => "ended",
            Message::Key(_) => "key",
            Message::Prepare => "prepare",
            Message::Prepared { .. } => "prepared",
            Message::Yield => "yield",
        }
    }
}

/// The maximum length of a body of this kind.
///
/// # Errors
/// The kind is unknown.
pub(crate) fn body_max(kind: u8) -> Result<usize, MessageFault> {
    Ok(match kind {
        kind::HELLO => HELLO_MAX,
        kind::LOG => BODY_MAX,
        kind::FAILED => REASON_MAX + 8,
        kind::KEY => CERTIFICATE_MAX + SIGNATURE_MAX + 8,
        kind::START..=kind::ENDED | kind::PREPARE..=kind::YIELD => SMALL_MAX,
        _ => return Err(MessageFault::Kind(kind)),
    })
}

pub(crate) fn is_hello(kind: u8) -> bool {
    kind == kind::HELLO
}

/// Whether a message of this kind may come in place of the hello: its sender refuses the connection.
pub(crate) fn is_refusal(kind: u8) -> bool {
    kind == kind::FAILED
}

/// Appends a message's bytes in this version of the protocol. A hello and a failure are the same in all versions.
///
/// # Panics
/// If a name or a block is longer than allowed; both come from the program itself. A reason that is too long
/// is cut.
pub fn encode(version: u16, message: &Message, out: &mut Vec<u8>) {
    let mut b = Vec::new();
    let kind = match message {
        Message::Hello(hello) => {
            encode_hello(hello, &mut b);
            kind::HELLO
        }
        Message::Start { generation } => {
            put_varint(*generation, &mut b);
            kind::START
        }
        Message::Log(block) => {
            b.extend(block);
            kind::LOG
        }
        Message::Ack(ack) => {
            [ack.received, ack.replayed, ack.echo_ns].into_iter().for_each(|v| put_varint(v, &mut b));
            kind::ACK
        }
        Message::Released { outputs } => {
            put_varint(*outputs, &mut b);
            kind::RELEASED
        }
        Message::Beat(beat) => {
            let fields = [beat.stamp_ns, beat.echo_ns, beat.turns, beat.records, beat.position];
            let risks = [beat.risks, beat.lag_ns];
            let later = risks.iter().filter(|_| version >= RISKS_IN_BEATS);
            fields.iter().chain(later).chain(beat_end(version)).for_each(|v| put_varint(*v, &mut b));
            kind::BEAT
        }
        Message::Failed { reason } => {
            text(&reason[..reason.floor_char_boundary(REASON_MAX)], &mut b);
            kind::FAILED
        }
        Message::HandOver => kind::HAND_OVER,
        Message::Live => kind::LIVE,
        Message::End(reason) => {
            b.push(reason.number());
            kind::END
        }
        Message::Ended => kind::ENDED,
        Message::Key(proof) => {
            put_varint(proof.certificate.len() as u64, &mut b);
            b.extend(&proof.certificate);
            b.extend(proof.scheme.to_le_bytes());
            put_varint(proof.signature.len() as u64, &mut b);
            b.extend(&proof.signature);
            kind::KEY
        }
        Message::Prepare => kind::PREPARE,
        Message::Prepared { records } => {
            put_varint(*records, &mut b);
            kind::PREPARED
        }
        Message::Yield => kind::YIELD,
    };
    out.push(kind);
    put_varint(b.len() as u64, out);
    out.append(&mut b);
}

/// Turns a block after [`LOG_PREFIX_MAX`] free bytes into a log message in place. Returns where the message
/// begins.
pub(crate) fn encode_log(block: &mut [u8]) -> usize {
    let len = block.len() - LOG_PREFIX_MAX;
    assert!(len <= BODY_MAX, "a block of {len} bytes");
    let mut prefix = vec![kind::LOG];
    put_varint(len as u64, &mut prefix);
    let start = LOG_PREFIX_MAX - prefix.len();
    block[start..LOG_PREFIX_MAX].copy_from_slice(&prefix);
    start
}

fn encode_hello(hello: &Hello, out: &mut Vec<u8>) {
    assert!(hello.disks.len() <= DISKS_MAX, "{} disks", hello.disks.len());
    out.extend(MAGIC);
    out.extend([hello.versions.newest, hello.versions.oldest].into_iter().flat_map(u16::to_le_bytes));
    out.push(matches!(hello.role, Role::Backup) as u8);
    name(&hello.vm, out);
    out.extend(hello.incarnation.to_le_bytes());
    put_varint(hello.timeout_ns, out);
    put_varint(hello.buffer_bytes, out);
    out.push(hello.disks.len() as u8);
    for (disk, copy) in &hello.disks {
        name(disk, out);
        out.extend(copy.to_le_bytes());
    }
    let header = Encoder::new(&hello.identity).take_bytes();
    put_varint(header.len() as u64, out);
    out.extend(header);
}

fn name(name: &str, out: &mut Vec<u8>) {
    assert!((1..=NAME_MAX).contains(&name.len()), "a name of {} bytes", name.len());
    text(name, out);
}

fn text(text: &str, out: &mut Vec<u8>) {
    put_varint(text.len() as u64, out);
    out.extend(text.as_bytes());
}

/// Decodes the message of this kind and body in this version of the protocol. The body begins at the offset `base` of
/// the connection's bytes.
pub(crate) fn decode(version: u16, kind: u8, body: &[u8], base: u64) -> Result<Message, MessageError> {
    if kind == kind::LOG {
        return Ok(Message::Log(body.to_vec()));
    }
    let mut r = ByteReader::new(body, base);
    let message = match kind {
        kind::HELLO => Message::Hello(Box::new(decode_hello(&mut r)?)),
        kind::START => Message::Start { generation: r.varint("generation")? },
        kind::ACK => Message::Ack(Ack {
            received: r.varint("received")?,
            replayed: r.varint("replayed")?,
            echo_ns: r.varint("echo")?,
        }),
        kind::RELEASED => Message::Released { outputs: r.varint("outputs")? },
        kind::BEAT => Message::Beat(decode_beat(version, &mut r)?),
        kind::FAILED => Message::Failed { reason: decode_text(&mut r, "reason", 0, REASON_MAX)? },
        kind::HAND_OVER => Message::HandOver,
        kind::LIVE => Message::Live,
        kind::END => {
            let (offset, number) = (r.offset(), r.byte("reason")?);
            let unknown = MessageFault::Field(DecodeFault::Value { what: "end reason", value: number });
            Message::End(EndReason::numbered(number).ok_or(MessageError { offset, fault: unknown })?)
        }
        kind::ENDED => Message::Ended,
        kind::KEY => Message::Key(KeyProof {
            certificate: r.prefixed_bytes("certificate", 1, CERTIFICATE_MAX)?,
            scheme: u16::from_le_bytes(r.array("signature scheme")?),
            signature: r.prefixed_bytes("signature", 1, SIGNATURE_MAX)?,
        }),
        kind::PREPARE => Message::Prepare,
        kind::PREPARED => Message::Prepared { records: r.varint("records")? },
        kind::YIELD => Message::Yield,
        unknown => return Err(MessageError { offset: base, fault: MessageFault::Kind(unknown) }),
    };
    // A later version may append fields to a hello.
    if r.is_done() || kind == kind::HELLO {
        Ok(message)
    } else {
        Err(MessageError { offset: r.offset(), fault: MessageFault::Long })
    }
}

fn decode_beat(version: u16, r: &mut ByteReader<'_>) -> Result<Beat, MessageError> {
    let mut beat = Beat {
        stamp_ns: r.varint("stamp")?,
        echo_ns: r.varint("echo")?,
        turns: r.varint("turns")?,
        records: r.varint("records")?,
        position: r.varint("position")?,
        ..Beat::default()
    };
    if version >= RISKS_IN_BEATS {
        (beat.risks, beat.lag_ns) = (r.varint("risks")?, r.varint("lag")?);
    }
    for end in beat_end(version) {
        let offset = r.offset();
        if r.varint("end of a beat")? != *end {
            return Err(MessageError { offset, fault: MessageFault::Long });
        }
    }
    Ok(beat)
}

fn decode_hello(r: &mut ByteReader<'_>) -> Result<Hello, MessageError> {
    let offset = r.offset();
    let fault = |offset, fault| Err(MessageError { offset, fault });
    if r.array("magic")? != MAGIC {
        return fault(offset, MessageFault::Magic);
    }
    let offset = r.offset();
    let newest = u16::from_le_bytes(r.array("newest version")?);
    // Before version 3 there was one version only, and something else followed it.
    let oldest = if newest < OURS.oldest { newest } else { u16::from_le_bytes(r.array("oldest version")?) };
    let versions = ChannelVersions { newest, oldest };
    if OURS.common(versions).is_none() {
        return fault(offset, MessageFault::Versions(versions));
    }
    let offset = r.offset();
    let role = match r.byte("role")? {
        0 => Role::Primary,
        1 => Role::Backup,
        value => return fault(offset, MessageFault::Field(DecodeFault::Value { what: "role", value })),
    };
    let vm = decode_text(r, "VM name", 1, NAME_MAX)?;
    let incarnation = u128::from_le_bytes(r.array("incarnation")?);
    let timeout_ns = r.varint("timeout")?;
    let buffer_bytes = r.varint("buffer")?;
    let count = r.length("list of disks", 0, DISKS_MAX)?;
    let mut disks = BTreeMap::<String, u128>::new();
    for _ in 0..count {
        let offset = r.offset();
        let name = decode_text(r, "disk name", 1, NAME_MAX)?;
        if disks.last_key_value().is_some_and(|(last, _)| *last >= name) {
            return fault(offset, MessageFault::Order("disk names"));
        }
        disks.insert(name, u128::from_le_bytes(r.array("disk copy id")?));
    }
    let length = r.length("log header", 0, HEADER_MAX)?;
    let offset = r.offset();
    let mut header = Decoder::new();
    header.push(r.take(length, "log header")?);
    let identity = match header.identity() {
        Ok(identity) => identity.cloned(),
        Err(e) => return fault(offset + e.offset, MessageFault::Field(e.fault)),
    };
    let Some(identity) = identity else {
        return fault(offset, MessageFault::Field(DecodeFault::Short("log header")));
    };
    if header.incomplete() != 0 {
        return fault(offset + header.offset(), MessageFault::Long);
    }
    Ok(Hello { versions, vm, role, incarnation, disks, timeout_ns, buffer_bytes, identity })
}

fn decode_text(
    r: &mut ByteReader<'_>,
    what: &'static str,
    min: usize,
    max: usize,
) -> Result<String, MessageError> {
    let offset = r.offset();
    let bytes = r.prefixed_bytes(what, min, max)?;
    String::from_utf8(bytes)
        .map_err(|_| MessageError { offset, fault: MessageFault::Field(DecodeFault::Utf8 { what }) })
}
