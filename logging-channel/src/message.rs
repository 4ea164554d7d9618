//! What goes over the connection: FORMAT.md, "Channel".
//!
//! Decoding is total: every byte string gives messages or an error with its offset. A message's length is checked
//! against the bound of its kind before anything of it is kept.

use std::collections::BTreeMap;

use entry::block::{BLOCK_MAX, Decoder, Encoder};
use entry::codec::{DecodeError, Reader, What, varint};
use entry::identity::{IDENTITY_MAX, Identity};
use entry::log::EndReason;

/// First bytes of a connection's hello.
pub const MAGIC: [u8; 8] = *b"VMFTCHN\0";
/// Version of the protocol.
pub const VERSION: u16 = 2;
/// Longest VM's or disk's name, bytes.
pub const NAME_MAX: usize = 64;
/// Most disks of a VM.
pub const DISKS_MAX: usize = 16;
/// Longest reason, bytes.
pub const REASON_MAX: usize = 1024;
/// Longest message body: that of [`Message::Log`].
pub const BODY_MAX: usize = BLOCK_MAX + 16;
/// A log's header around its identity.
const HEADER_MAX: usize = IDENTITY_MAX + 32;
const HELLO_MAX: usize = HEADER_MAX + 2048;
const SMALL_MAX: usize = 128;
/// What a log message has in front of its block: at most its kind and three bytes of length.
pub(crate) const LOG_ROOM: usize = 4;
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
}

/// Which side of a pair somebody is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Runs the guest and sends the log.
    Primary,
    /// Replays it.
    Backup,
}

/// The first message of each side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Name of the VM, at most [`NAME_MAX`] bytes.
    pub vm: String,
    /// What the sender of this is.
    pub role: Role,
    /// Its incarnation.
    pub incarnation: u128,
    /// Its copies of the VM's disks: name and id, at most [`DISKS_MAX`].
    pub disks: BTreeMap<String, u128>,
    /// After how much silence it suspects the other.
    pub timeout_ns: u64,
    /// Weight of the records that it can hold (see [`crate::weight`]).
    pub buffer_bytes: u64,
    /// Its machine. The log that it will send, if it does, goes on from this.
    pub identity: Identity,
}

/// The backup's word on the log, sent when it has received more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ack {
    /// Records received.
    pub received: u64,
    /// Records replayed.
    pub replayed: u64,
    /// The last [`Beat::stamp_ns`] that the backup has heard.
    pub echo_ns: u64,
}

/// Sent by both at a fixed interval.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Beat {
    /// The sender's clock. Only the sender reads it again, out of an echo.
    pub stamp_ns: u64,
    /// The last stamp that the sender has heard: the other side knows by it that a word of that age has arrived.
    pub echo_ns: u64,
    /// Turns that the sender's guest loop has made.
    pub turns: u64,
    /// Records recorded or replayed.
    pub records: u64,
    /// Count of the position where its guest is.
    pub position: u64,
}

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// The first, both ways.
    Hello(Box<Hello>),
    /// Primary: the generation is open, the guest runs.
    Start {
        /// Its number.
        generation: u64,
    },
    /// Primary: one block of the log in the bytes of FORMAT.md, "Block".
    Log(Vec<u8>),
    /// Backup.
    Ack(Ack),
    /// Primary: so many outputs have left.
    Released {
        /// Outputs since the log's start.
        outputs: u64,
    },
    /// Both.
    Beat(Beat),
    /// Both: the sender cannot go on, and will never take.
    Failed {
        /// Why, at most [`REASON_MAX`] bytes.
        reason: String,
    },
    /// Primary: the log ends here for a planned handover; take, and go live.
    HandOver,
    /// Backup: it lives, after a handover.
    Live,
    /// Primary: the VM has ended for good, everything was released.
    End(EndReason),
    /// Backup: it knows that the VM has ended, and will never take.
    Ended,
}

impl Message {
    /// Its name.
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
        }
    }
}

/// Bytes that are no message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("channel: byte {offset}: {fault}")]
pub struct MessageError {
    /// Where in the connection's bytes.
    pub offset: u64,
    /// What is wrong there.
    pub fault: Fault,
}

/// What is wrong with the bytes at an offset.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum Fault {
    #[error("not a vmft channel (the magic differs)")]
    Magic,
    #[error("protocol version {0}, this vmft speaks version {VERSION}")]
    Version(u16),
    #[error("a hello is expected first, and only first")]
    Hello,
    #[error("unknown kind of message {0}")]
    Kind(u8),
    #[error("the message goes on behind its last field")]
    Long,
    #[error("the {0} do not ascend")]
    Order(&'static str),
    #[error("{0}")]
    Field(What),
}

impl From<DecodeError> for MessageError {
    fn from(e: DecodeError) -> MessageError {
        MessageError { offset: e.offset, fault: Fault::Field(e.what) }
    }
}

/// Longest body of a kind.
///
/// # Errors
/// The kind is unknown.
pub(crate) fn body_max(kind: u8) -> Result<usize, Fault> {
    Ok(match kind {
        kind::HELLO => HELLO_MAX,
        kind::LOG => BODY_MAX,
        kind::FAILED => REASON_MAX + 8,
        kind::START..=kind::ENDED => SMALL_MAX,
        _ => return Err(Fault::Kind(kind)),
    })
}

pub(crate) fn is_hello(kind: u8) -> bool {
    kind == kind::HELLO
}

/// Appends a message's bytes.
///
/// # Panics
/// When a name or a block is longer than allowed: they are the program's own. A reason is cut.
pub fn encode(message: &Message, out: &mut Vec<u8>) {
    let mut b = Vec::new();
    let kind = match message {
        Message::Hello(hello) => {
            encode_hello(hello, &mut b);
            kind::HELLO
        }
        Message::Start { generation } => {
            varint(*generation, &mut b);
            kind::START
        }
        Message::Log(block) => {
            b.extend(block);
            kind::LOG
        }
        Message::Ack(ack) => {
            [ack.received, ack.replayed, ack.echo_ns].into_iter().for_each(|v| varint(v, &mut b));
            kind::ACK
        }
        Message::Released { outputs } => {
            varint(*outputs, &mut b);
            kind::RELEASED
        }
        Message::Beat(beat) => {
            let fields = [beat.stamp_ns, beat.echo_ns, beat.turns, beat.records, beat.position];
            fields.into_iter().for_each(|v| varint(v, &mut b));
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
    };
    out.push(kind);
    varint(b.len() as u64, out);
    out.append(&mut b);
}

/// Makes a block with [`LOG_ROOM`] bytes free in front of it a log message, in its own memory; where that begins.
pub(crate) fn encode_log(block: &mut [u8]) -> usize {
    let len = block.len() - LOG_ROOM;
    assert!(len <= BODY_MAX, "a block of {len} bytes");
    let mut prefix = vec![kind::LOG];
    varint(len as u64, &mut prefix);
    let start = LOG_ROOM - prefix.len();
    block[start..LOG_ROOM].copy_from_slice(&prefix);
    start
}

fn encode_hello(hello: &Hello, out: &mut Vec<u8>) {
    assert!(hello.disks.len() <= DISKS_MAX, "{} disks", hello.disks.len());
    out.extend(MAGIC);
    out.extend(VERSION.to_le_bytes());
    out.push(matches!(hello.role, Role::Backup) as u8);
    name(&hello.vm, out);
    out.extend(hello.incarnation.to_le_bytes());
    varint(hello.timeout_ns, out);
    varint(hello.buffer_bytes, out);
    out.push(hello.disks.len() as u8);
    for (disk, copy) in &hello.disks {
        name(disk, out);
        out.extend(copy.to_le_bytes());
    }
    let header = Encoder::new(&hello.identity).take();
    varint(header.len() as u64, out);
    out.extend(header);
}

fn name(name: &str, out: &mut Vec<u8>) {
    assert!((1..=NAME_MAX).contains(&name.len()), "a name of {} bytes", name.len());
    text(name, out);
}

fn text(text: &str, out: &mut Vec<u8>) {
    varint(text.len() as u64, out);
    out.extend(text.as_bytes());
}

/// The message of a kind with this body, which lies at `base` in the connection's bytes.
pub(crate) fn decode(kind: u8, body: &[u8], base: u64) -> Result<Message, MessageError> {
    if kind == kind::LOG {
        return Ok(Message::Log(body.to_vec()));
    }
    let mut r = Reader::new(body, base);
    let message = match kind {
        kind::HELLO => Message::Hello(Box::new(decode_hello(&mut r)?)),
        kind::START => Message::Start { generation: r.varint("generation")? },
        kind::ACK => Message::Ack(Ack {
            received: r.varint("received")?,
            replayed: r.varint("replayed")?,
            echo_ns: r.varint("echo")?,
        }),
        kind::RELEASED => Message::Released { outputs: r.varint("outputs")? },
        kind::BEAT => Message::Beat(Beat {
            stamp_ns: r.varint("stamp")?,
            echo_ns: r.varint("echo")?,
            turns: r.varint("turns")?,
            records: r.varint("records")?,
            position: r.varint("position")?,
        }),
        kind::FAILED => Message::Failed { reason: decode_text(&mut r, "reason", 0, REASON_MAX)? },
        kind::HAND_OVER => Message::HandOver,
        kind::LIVE => Message::Live,
        kind::END => {
            let (offset, number) = (r.offset(), r.byte("reason")?);
            let unknown = Fault::Field(What::Value { what: "end reason", value: number });
            Message::End(EndReason::numbered(number).ok_or(MessageError { offset, fault: unknown })?)
        }
        kind::ENDED => Message::Ended,
        unknown => return Err(MessageError { offset: base, fault: Fault::Kind(unknown) }),
    };
    if r.is_done() { Ok(message) } else { Err(MessageError { offset: r.offset(), fault: Fault::Long }) }
}

fn decode_hello(r: &mut Reader<'_>) -> Result<Hello, MessageError> {
    let offset = r.offset();
    let fault = |offset, fault| Err(MessageError { offset, fault });
    if r.array("magic")? != MAGIC {
        return fault(offset, Fault::Magic);
    }
    let offset = r.offset();
    let version = u16::from_le_bytes(r.array("version")?);
    if version != VERSION {
        return fault(offset, Fault::Version(version));
    }
    let offset = r.offset();
    let role = match r.byte("role")? {
        0 => Role::Primary,
        1 => Role::Backup,
        value => return fault(offset, Fault::Field(What::Value { what: "role", value })),
    };
    let vm = decode_text(r, "VM's name", 1, NAME_MAX)?;
    let incarnation = u128::from_le_bytes(r.array("incarnation")?);
    let timeout_ns = r.varint("timeout")?;
    let buffer_bytes = r.varint("buffer")?;
    let count = r.length("number of disks", 0, DISKS_MAX)?;
    let mut disks = BTreeMap::<String, u128>::new();
    for _ in 0..count {
        let offset = r.offset();
        let name = decode_text(r, "disk's name", 1, NAME_MAX)?;
        if disks.last_key_value().is_some_and(|(last, _)| *last >= name) {
            return fault(offset, Fault::Order("disks' names"));
        }
        disks.insert(name, u128::from_le_bytes(r.array("disk's copy")?));
    }
    let length = r.length("log header", 0, HEADER_MAX)?;
    let offset = r.offset();
    let mut header = Decoder::new();
    header.push(r.take(length, "log header")?);
    let identity = match header.identity() {
        Ok(identity) => identity.cloned(),
        Err(e) => return fault(offset + e.offset, Fault::Field(e.what)),
    };
    let Some(identity) = identity else { return fault(offset, Fault::Field(What::Short("log header"))) };
    if header.incomplete() != 0 {
        return fault(offset + header.offset(), Fault::Long);
    }
    Ok(Hello { vm, role, incarnation, disks, timeout_ns, buffer_bytes, identity })
}

fn decode_text(
    r: &mut Reader<'_>,
    what: &'static str,
    min: usize,
    max: usize,
) -> Result<String, MessageError> {
    let offset = r.offset();
    let bytes = r.counted(what, min, max)?;
    String::from_utf8(bytes).map_err(|_| MessageError { offset, fault: Fault::Field(What::Utf8 { what }) })
}
