//! The logging channel's messages and its receiver.

use logging_channel::message::{Message, encode};
use logging_channel::message_error::MessageError;
use logging_channel::receiver::{NextRecord, Receiver};
use logging_channel::stream::MessageReader;
use logging_channel::versions::OURS;

/// Decodes any bytes, cut into any pieces: the messages or the error do not depend on the cuts; what decodes encodes to
/// bytes that decode alike; and a log's messages go through a receiver without a panic.
///
/// # Panics
/// The decoder or the receiver misbehaves.
pub fn channel(data: &[u8]) {
    let Some((&piece, bytes)) = data.split_first() else { return };
    let (messages, error) = read(bytes, bytes.len());
    assert_eq!((messages.clone(), error), read(bytes, piece as usize));
    let mut again = Vec::new();
    messages.iter().for_each(|m| encode(OURS.oldest, m, &mut again));
    assert_eq!(
        read(&again, again.len()),
        (messages.clone(), None),
        "what was decoded encodes to something else"
    );
    receive(messages);
}

fn read(bytes: &[u8], piece: usize) -> (Vec<Message>, Option<MessageError>) {
    let (mut inbox, mut messages) = (MessageReader::new(), Vec::new());
    for piece in bytes.chunks(piece.max(1)) {
        inbox.push(piece);
        loop {
            match inbox.next_message() {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break,
                Err(error) => return (messages, Some(error)),
            }
        }
    }
    (messages, None)
}

fn receive(messages: Vec<Message>) {
    let Some(Message::Hello(hello)) = messages.first() else { return };
    let mut receiver = Receiver::new(&hello.identity, hello.buffer_bytes.min(1 << 20));
    let mut replayed = 0;
    for message in &messages {
        let taken = match message {
            Message::Log(block) => receiver.receive_block(block),
            Message::Released { outputs } => receiver.released(*outputs),
            _ => Ok(()),
        };
        if taken.is_err() {
            return;
        }
        while let NextRecord::Record(_) = receiver.next_record() {
            replayed += 1;
        }
        receiver.move_replayed(replayed);
        receiver.ack_if_due(0, 0);
    }
}
