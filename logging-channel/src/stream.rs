//! A connection's bytes: the messages in those that come in, and the order of those that go out.

use std::collections::VecDeque;

use entry::codec::{ByteReader, DecodeError, DecodeFault};

use crate::message::{Message, body_max, decode, encode, is_hello, is_refusal};
use crate::message_error::{MessageError, MessageFault};
use crate::versions::OURS;

/// Most bytes of a message before its body: its kind, and a varint of ten bytes.
const PREFIX_MAX: usize = 11;

/// Splits the bytes of one connection, which come in pieces of any size, into messages. It holds at most one
/// incomplete message besides the piece that was pushed last.
#[derive(Debug, Default)]
pub struct MessageReader {
    buffer: Vec<u8>,
    /// The bytes before this index have been consumed.
    start: usize,
    /// The offset in the connection of the buffer's first byte.
    base: u64,
    /// The version of the protocol that both sides speak, once the hello has come.
    version: Option<u16>,
    failed: Option<MessageError>,
}

impl MessageReader {
    /// A reader for a new connection.
    pub fn new() -> MessageReader {
        MessageReader::default()
    }

    /// Takes more bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.start);
        self.base += self.start as u64;
        self.start = 0;
        self.buffer.extend(bytes);
    }

    /// The version of the protocol that both sides speak: the newest that both know. `None` before the hello.
    pub fn version(&self) -> Option<u16> {
        self.version
    }

    /// The next message, once it is complete. The first message, and only the first, is a hello; a side that
    /// refuses the connection sends a failure in its place.
    ///
    /// # Errors
    /// The bytes are not a valid message, or not one that may come here. Every later call fails with the same
    /// error.
    pub fn next_message(&mut self) -> Result<Option<Message>, MessageError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let message = self.decode_next();
        if let Err(error) = &message {
            self.failed = Some(error.clone());
        }
        message
    }

    fn decode_next(&mut self) -> Result<Option<Message>, MessageError> {
        let bytes = &self.buffer[self.start..];
        let offset = self.base + self.start as u64;
        let Some(&kind) = bytes.first() else { return Ok(None) };
        let max = body_max(kind).map_err(|fault| MessageError { offset, fault })?;
        let may_come = is_hello(kind) != self.version.is_some() || is_refusal(kind);
        if !may_come {
            return Err(MessageError { offset, fault: MessageFault::Hello });
        }
        let mut prefix = ByteReader::new(&bytes[1..bytes.len().min(PREFIX_MAX)], offset + 1);
        let length = match prefix.length("message", 0, max) {
            Ok(length) => length,
            Err(DecodeError { fault: DecodeFault::Short(_), .. }) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let body_offset = prefix.offset();
        let body_start = (body_offset - offset) as usize;
        let Some(body) = bytes.get(body_start..body_start + length) else { return Ok(None) };
        let message = decode(self.version.unwrap_or(OURS.oldest), kind, body, body_offset)?;
        self.start += body_start + length;
        if let Message::Hello(hello) = &message {
            self.version = OURS.common(hello.versions);
        }
        Ok(Some(message))
    }

    /// Bytes that do not form a whole message yet.
    pub fn incomplete(&self) -> usize {
        self.buffer.len() - self.start
    }
}

/// The messages to be sent on one connection, in order, except that a beat overtakes the messages that wait.
///
/// The owner of the socket writes [`Outbox::front`] and reports with [`Outbox::wrote`] how much the socket
/// took. So that a beat is not delayed by bulk data, the owner writes no more than the socket takes at once,
/// and the socket's own buffer is small.
#[derive(Debug)]
pub struct Outbox {
    /// The version of the protocol in which messages are encoded.
    version: u16,
    /// The message that is being written, and how much of it is.
    front: Vec<u8>,
    written: usize,
    /// The latest beat whose writing has not begun. It replaces an older one.
    beat: Vec<u8>,
    /// Encoded messages, each with the index at which it begins.
    waiting: VecDeque<(Vec<u8>, usize)>,
}

impl Default for Outbox {
    fn default() -> Outbox {
        Outbox::new()
    }
}

impl Outbox {
    /// An outbox for a new connection.
    pub fn new() -> Outbox {
        Outbox {
            version: OURS.oldest,
            front: Vec::new(),
            written: 0,
            beat: Vec::new(),
            waiting: VecDeque::new(),
        }
    }

    /// Speaks this version of the protocol from now on: see [`MessageReader::version`].
    pub fn speak(&mut self, version: u16) {
        self.version = version;
    }

    /// The version of the protocol in which messages are encoded.
    pub fn version(&self) -> u16 {
        self.version
    }

    /// Queues a message. A beat goes before all messages that wait, and replaces a beat that waits.
    pub fn push(&mut self, message: &Message) {
        let mut bytes = Vec::new();
        encode(self.version, message, &mut bytes);
        if matches!(message, Message::Beat(_)) {
            self.beat = bytes
        } else {
            self.waiting.push_back((bytes, 0))
        }
        self.advance();
    }

    /// Queues an encoded message, which begins at index `start` of `bytes`.
    pub(crate) fn push_encoded(&mut self, bytes: Vec<u8>, start: usize) {
        self.waiting.push_back((bytes, start));
        self.advance();
    }

    /// The next bytes to write: the rest of one message; empty if there is nothing to write.
    pub fn front(&self) -> &[u8] {
        &self.front[self.written..]
    }

    /// The socket took `n` bytes of [`Outbox::front`].
    ///
    /// # Panics
    /// If that is more than there were.
    pub fn wrote(&mut self, n: usize) {
        self.written += n;
        assert!(self.written <= self.front.len(), "more was written than there is");
        self.advance();
    }

    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.front().is_empty()
    }

    /// Drops all messages.
    pub fn clear(&mut self) {
        *self = Outbox { version: self.version, ..Outbox::new() };
    }

    fn advance(&mut self) {
        if self.written < self.front.len() {
            return;
        }
        (self.front, self.written) = if self.beat.is_empty() {
            self.waiting.pop_front().unwrap_or_default()
        } else {
            (std::mem::take(&mut self.beat), 0)
        };
    }
}
