//! A connection's bytes: messages out of what comes in, and what goes out in its order.

use std::collections::VecDeque;

use entry::codec::{DecodeError, Reader, What};

use crate::message::{Fault, Message, MessageError, body_max, decode, encode, is_hello};

/// Most bytes of a message in front of its body.
const PREFIX_MAX: usize = 11;

/// Takes messages out of one connection's bytes, which come in any pieces. Holds at most one message that is not
/// complete, beside the piece that was pushed last.
#[derive(Debug, Default)]
pub struct Inbox {
    buffer: Vec<u8>,
    /// What lies before this in the buffer has been taken.
    start: usize,
    /// Offset in the connection of the buffer's first byte.
    base: u64,
    greeted: bool,
    failed: Option<MessageError>,
}

impl Inbox {
    /// An inbox for a new connection.
    pub fn new() -> Inbox {
        Inbox::default()
    }

    /// Takes more bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.start);
        self.base += self.start as u64;
        self.start = 0;
        self.buffer.extend(bytes);
    }

    /// The next message, when it has come whole. The first is a hello, and no other.
    ///
    /// # Errors
    /// The bytes are no message, or not one that may come here. Every later call fails alike.
    pub fn message(&mut self) -> Result<Option<Message>, MessageError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let message = self.next();
        if let Err(error) = &message {
            self.failed = Some(error.clone());
        }
        message
    }

    fn next(&mut self) -> Result<Option<Message>, MessageError> {
        let bytes = &self.buffer[self.start..];
        let offset = self.base + self.start as u64;
        let Some(&kind) = bytes.first() else { return Ok(None) };
        let max = body_max(kind).map_err(|fault| MessageError { offset, fault })?;
        if is_hello(kind) == self.greeted {
            return Err(MessageError { offset, fault: Fault::Hello });
        }
        let mut prefix = Reader::new(&bytes[1..bytes.len().min(PREFIX_MAX)], offset + 1);
        let length = match prefix.length("the message's length", 0, max) {
            Ok(length) => length,
            Err(DecodeError { what: What::Short(_), .. }) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let body_offset = prefix.offset();
        let body_start = (body_offset - offset) as usize;
        let Some(body) = bytes.get(body_start..body_start + length) else { return Ok(None) };
        let message = decode(kind, body, body_offset)?;
        self.start += body_start + length;
        self.greeted = true;
        Ok(Some(message))
    }

    /// Bytes that are not yet a whole message.
    pub fn incomplete(&self) -> usize {
        self.buffer.len() - self.start
    }
}

/// What goes out on one connection: whole messages in order, but a beat goes before the log's messages that wait.
///
/// Whoever owns the socket writes [`Outbox::front`] and says with [`Outbox::wrote`] how much the socket took. So that
/// a beat is never long behind bulk data, it writes no more than the socket takes at once, and the socket's own
/// buffer is small.
#[derive(Debug, Default)]
pub struct Outbox {
    /// Partly written.
    front: Vec<u8>,
    written: usize,
    /// The latest beat that has not begun; an older one is of no use.
    beat: Vec<u8>,
    /// Messages, and where they begin.
    waiting: VecDeque<(Vec<u8>, usize)>,
}

impl Outbox {
    /// An outbox for a new connection.
    pub fn new() -> Outbox {
        Outbox::default()
    }

    /// Puts a message behind those that wait; a beat in front of them, in place of one that waits.
    pub fn push(&mut self, message: &Message) {
        let mut bytes = Vec::new();
        encode(message, &mut bytes);
        if matches!(message, Message::Beat(_)) {
            self.beat = bytes
        } else {
            self.waiting.push_back((bytes, 0))
        }
        self.advance();
    }

    /// Puts an encoded message, which is there from `start` on, behind those that wait.
    pub(crate) fn push_encoded(&mut self, bytes: Vec<u8>, start: usize) {
        self.waiting.push_back((bytes, start));
        self.advance();
    }

    /// The next bytes to write: the rest of one message, empty when there is nothing.
    pub fn front(&self) -> &[u8] {
        &self.front[self.written..]
    }

    /// The socket took `n` bytes of [`Outbox::front`].
    ///
    /// # Panics
    /// When that is more than there were.
    pub fn wrote(&mut self, n: usize) {
        self.written += n;
        assert!(self.written <= self.front.len(), "more was written than there is");
        self.advance();
    }

    /// Nothing is to be written.
    pub fn is_empty(&self) -> bool {
        self.front().is_empty()
    }

    /// Drops everything.
    pub fn clear(&mut self) {
        *self = Outbox::default();
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
