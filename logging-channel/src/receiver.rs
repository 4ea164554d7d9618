//! The backup's end of the log: it receives blocks, acknowledges them on receipt, and hands their records to
//! the replay.

use std::collections::VecDeque;

use entry::block::{Decoder, Encoder};
use entry::identity::Identity;
use entry::log::{Entry, Record};

use crate::message::Ack;
use crate::{ChannelError, check_cursor, weight};

/// How long after an acknowledgement the next one may be delayed if it covers no output.
const ACK_INTERVAL_NS: u64 = 10_000_000;

/// The backup's end of the log.
#[derive(Debug)]
pub struct Receiver {
    decoder: Decoder,
    /// Records that wait for replay.
    queue: VecDeque<Record>,
    /// Weight of the records in the queue.
    weight: u64,
    buffer_bytes: u64,
    received: u64,
    replayed: u64,
    outputs_received: u64,
    /// Outputs that have left at the primary.
    released: u64,
    /// Records in the last acknowledgement, when it was sent, and how many outputs were among them.
    acked: u64,
    acked_at: u64,
    outputs_acked: u64,
    /// Weight of the records taken for replay since then.
    freed: u64,
    closed: bool,
}

/// What to replay next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NextRecord {
    /// This record.
    Record(Record),
    /// Nothing yet: wait.
    Wait,
    /// Nothing: no more records will come.
    End,
}

impl Receiver {
    /// A receiver of the log of the machine with this identity. Its buffer holds records of this weight.
    pub fn new(identity: &Identity, buffer_bytes: u64) -> Receiver {
        let mut decoder = Decoder::new();
        // The header came with the hello.
        decoder.push(&Encoder::new(identity).take_bytes());
        Receiver {
            decoder,
            queue: VecDeque::new(),
            weight: 0,
            buffer_bytes,
            received: 0,
            replayed: 0,
            outputs_received: 0,
            released: 0,
            acked: 0,
            acked_at: 0,
            outputs_acked: 0,
            freed: 0,
            closed: false,
        }
    }

    /// Receives a block.
    ///
    /// # Errors
    /// The block is damaged, is not the next one, or exceeds the buffer; or the receiver is closed.
    pub fn receive_block(&mut self, block: &[u8]) -> Result<(), ChannelError> {
        if self.closed {
            return Err(ChannelError::Unexpected("log"));
        }
        self.decoder.push(block);
        let records = self.decoder.next_block()?.filter(|_| self.decoder.incomplete() == 0);
        let records = records.ok_or(ChannelError::Block { bytes: block.len() })?;
        let added: u64 = records.iter().map(weight).sum();
        let max = self.buffer_bytes.max(added);
        if self.weight + added > max {
            return Err(ChannelError::Overrun { weight: self.weight + added, max });
        }
        self.weight += added;
        self.received += records.len() as u64;
        self.outputs_received +=
            records.iter().filter(|r| matches!(r.entry, Entry::Output(_))).count() as u64;
        self.queue.extend(records);
        Ok(())
    }

    /// The primary reports how many outputs have left.
    ///
    /// # Errors
    /// The number is smaller than before, or counts outputs that were not received.
    pub fn released(&mut self, outputs: u64) -> Result<(), ChannelError> {
        self.released = check_cursor("released", outputs, self.released, self.outputs_received)?;
        Ok(())
    }

    /// Ends the log: only what was received so far is replayed. Nothing is acknowledged from here on.
    pub fn close(&mut self) {
        self.closed = true;
    }

    /// Whether [`Receiver::close`] was called.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Takes the next record for replay.
    pub fn next_record(&mut self) -> NextRecord {
        match self.queue.pop_front() {
            Some(record) => {
                self.weight -= weight(&record);
                self.freed += weight(&record);
                NextRecord::Record(record)
            }
            None if self.closed => NextRecord::End,
            None => NextRecord::Wait,
        }
    }

    /// Sets how many records have been replayed.
    ///
    /// # Panics
    /// If the number is smaller than before, or counts records that were not taken.
    pub fn move_replayed(&mut self, replayed: u64) {
        let taken = self.received - self.queue.len() as u64;
        assert!((self.replayed..=taken).contains(&replayed), "replayed {replayed} of {taken}");
        self.replayed = replayed;
    }

    /// Acknowledges what was received: at once if it contains outputs, which wait for that, or if a good part
    /// of the buffer has become free; otherwise once [`Receiver::deadline`] has come.
    pub fn ack_if_due(&mut self, now: u64, echo_ns: u64) -> Option<Ack> {
        let outputs = self.outputs_received > self.outputs_acked;
        let due = self.deadline().is_some_and(|deadline| deadline <= now);
        if self.closed || !(outputs || due || self.freed > self.buffer_bytes / 4) {
            return None;
        }
        (self.acked, self.acked_at, self.outputs_acked, self.freed) =
            (self.received, now, self.outputs_received, 0);
        Some(Ack { received: self.received, replayed: self.replayed, echo_ns })
    }

    /// When an acknowledgement that is not urgent is due from [`Receiver::ack_if_due`].
    pub fn deadline(&self) -> Option<u64> {
        (!self.closed && self.received > self.acked).then(|| self.acked_at + ACK_INTERVAL_NS)
    }

    /// Records received.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// Records replayed.
    pub fn replayed(&self) -> u64 {
        self.replayed
    }

    /// Whether everything received has been replayed.
    pub fn is_drained(&self) -> bool {
        self.replayed == self.received
    }

    /// Outputs received.
    pub fn outputs_received(&self) -> u64 {
        self.outputs_received
    }

    /// Outputs that have left, as the primary reports.
    pub fn outputs_released(&self) -> u64 {
        self.released
    }
}
