//! The logging channel: it carries a primary's log to its backup, and the other messages between the two.
//!
//! Everything here is a state machine of events and time, without I/O. [`message`] has the messages and their
//! encoding (FORMAT.md, "The logging channel"), [`stream`] splits a connection's bytes into messages and
//! queues those to be sent, [`versions`] says which version of the protocol a connection speaks, [`sender`] is the primary's end of the log and [`receiver`] the backup's. This
//! crate knows entries, but no machine.
//!
//! ```text
//! append ─> Sender ─ blocks ─> Outbox ─ bytes ═══> MessageReader ─ messages ─> Receiver ─ records ─> replay
//!             ^ acked, replayed ════════════════════════════════════ Ack ─────────┘
//! ```
//!
//! Cursors are checked where they move: `released <= acked <= sent <= recorded` on the primary, `replayed <=
//! received` on the backup. They count from the log's start: `released` counts outputs, the others records.
#![forbid(unsafe_code)]

mod coalescing;
pub mod message;
pub mod message_error;
pub mod receiver;
pub mod sender;
pub mod stream;
pub mod versions;

use entry::log::{Entry, LoggedInput, Record};

/// The weight of a record without its payload: an upper bound of its size in memory.
pub const RECORD_WEIGHT: u64 = 128;
const _: () = assert!(size_of::<Record>() as u64 <= RECORD_WEIGHT);

/// The number of bytes that a record counts for in the buffers of both sides (FORMAT.md, "Flow control").
pub fn weight(record: &Record) -> u64 {
    let payload = match &record.entry {
        Entry::Input(LoggedInput::Frame { bytes, .. } | LoggedInput::Console { bytes, .. }) => bytes.len(),
        Entry::Answer(entry::Answer::Entropy(bytes)) => bytes.len(),
        _ => 0,
    };
    RECORD_WEIGHT + payload as u64
}

/// The other side violates the protocol. The connection cannot be used any more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChannelError {
    /// Bytes are not a valid message.
    #[error(transparent)]
    Message(#[from] message_error::MessageError),
    /// A block of the log is damaged, or is not the next one.
    #[error(transparent)]
    Log(#[from] entry::codec::DecodeError),
    /// A log message does not consist of exactly one block.
    #[error("a log message of {bytes} bytes is not exactly one block")]
    Block {
        /// Bytes of the message.
        bytes: usize,
    },
    /// A cursor moves back, or beyond its limit.
    #[error("the other side reports the cursor {cursor} at {value}, but it must be between {min} and {max}")]
    Cursor {
        /// Which one.
        cursor: &'static str,
        /// Where the other side says that it is.
        value: u64,
        /// Where it was.
        min: u64,
        /// Its limit.
        max: u64,
    },
    /// The other side sent more than the buffer holds.
    #[error(
        "the other side sent more than the buffer holds: {weight} bytes of records wait, at most {max} may"
    )]
    Overrun {
        /// Weight of the records that wait.
        weight: u64,
        /// Size of the buffer.
        max: u64,
    },
    /// A message came at the wrong time.
    #[error("the message {0:?} is not expected now")]
    Unexpected(&'static str),
}

/// Checks that a cursor of the other side neither moves back nor beyond its limit.
fn check_cursor(cursor: &'static str, value: u64, min: u64, max: u64) -> Result<u64, ChannelError> {
    if (min..=max).contains(&value) {
        Ok(value)
    } else {
        Err(ChannelError::Cursor { cursor, value, min, max })
    }
}
