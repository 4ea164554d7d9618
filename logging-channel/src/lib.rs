//! The logging channel: how a primary's log gets to its backup, and what the two tell each other beside it.
//!
//! Everything here is a state machine of events and time, without I/O: [`message`] has the messages and their bytes
//! (FORMAT.md, "Channel"), [`stream`] takes messages out of a connection's bytes and puts them in, [`sender`] is the
//! primary's side of the log and [`receiver`] the backup's. It moves entries and cannot name a VM.
//!
//! ```text
//! append ─> Sender ─ blocks ─> Outbox ─ bytes ═══> Inbox ─ messages ─> Receiver ─ records ─> replay
//!             ^ acked, replayed ════════════════════════════ Ack ─────────┘
//! ```
//!
//! Cursors, checked where they move: `released <= acked <= sent <= recorded` on the primary, `replayed <= received` on
//! the backup. They count records since the log's start, `released` counts outputs.
#![forbid(unsafe_code)]

pub mod message;
pub mod receiver;
pub mod sender;
mod spacing;
pub mod stream;

use entry::log::{Entry, LoggedInput, Record};

/// What a record weighs beside its payload: an upper bound of its size in memory.
pub const RECORD_WEIGHT: u64 = 128;
const _: () = assert!(size_of::<Record>() as u64 <= RECORD_WEIGHT);

/// What a record counts in the bounds of the buffers on both sides (FORMAT.md, "Flow control").
pub fn weight(record: &Record) -> u64 {
    let payload = match &record.entry {
        Entry::Input(LoggedInput::Frame { bytes, .. } | LoggedInput::Console { bytes, .. }) => bytes.len(),
        Entry::Answer(entry::Answer::Entropy(bytes)) => bytes.len(),
        _ => 0,
    };
    RECORD_WEIGHT + payload as u64
}

/// The other side does not keep to the protocol. The connection cannot be used any more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChannelError {
    /// Bytes that are no message.
    #[error(transparent)]
    Message(#[from] message::MessageError),
    /// A block of the log that is damaged or not the next one.
    #[error(transparent)]
    Log(#[from] entry::codec::DecodeError),
    /// A log message has other than one block.
    #[error("a log message of {bytes} bytes is not one whole block")]
    Block {
        /// Bytes of the message.
        bytes: usize,
    },
    /// A cursor that goes back, or past what there is.
    #[error("{cursor} is {value}, but between {min} and {max} is possible")]
    Cursor {
        /// Which one.
        cursor: &'static str,
        /// What the other side says.
        value: u64,
        /// Where it was.
        min: u64,
        /// How far it could be.
        max: u64,
    },
    /// More was sent than the buffer that was offered.
    #[error("records of {weight} bytes wait, but {max} were offered")]
    Overrun {
        /// What waits.
        weight: u64,
        /// The buffer.
        max: u64,
    },
    /// A message that has no place here.
    #[error("{0} is not expected now")]
    Unexpected(&'static str),
}

/// A cursor of the other side's, if it neither goes back nor past what there is.
fn checked(cursor: &'static str, value: u64, min: u64, max: u64) -> Result<u64, ChannelError> {
    if (min..=max).contains(&value) {
        Ok(value)
    } else {
        Err(ChannelError::Cursor { cursor, value, min, max })
    }
}
