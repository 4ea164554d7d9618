//! The backup's side of the log: takes its blocks, acknowledges them on receipt, and hands the records to replay.

use std::collections::VecDeque;

use entry::block::{Decoder, Encoder};
use entry::identity::Identity;
use entry::log::{Entry, Record};

use crate::message::Ack;
use crate::{ChannelError, checked, weight};

/// How long after an acknowledgement records that no output is among may wait for the next.
const ACK_SPACING_NS: u64 = 10_000_000;

/// The backup's side of the log.
#[derive(Debug)]
pub struct Receiver {
    decoder: Decoder,
    queue: VecDeque<Record>,
    /// Weight of the records in the queue.
    weight: u64,
    buffer_bytes: u64,
    received: u64,
    replayed: u64,
    outputs_received: u64,
    released: u64,
    /// Records received, as last acknowledged; when, and how many outputs were among them.
    told: u64,
    told_at: u64,
    outputs_told: u64,
    /// Weight of the records taken for replay since then.
    freed: u64,
    closed: bool,
}

/// What there is to replay next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NextRecord {
    /// This record.
    Record(Record),
    /// Nothing yet.
    Wait,
    /// Nothing, and no more comes.
    End,
}

impl Receiver {
    /// Receives the log of the machine with the other side's identity, in a buffer for records of this weight.
    pub fn new(identity: &Identity, buffer_bytes: u64) -> Receiver {
        let mut decoder = Decoder::new();
        // The header came with the hello.
        decoder.push(&Encoder::new(identity).take());
        Receiver {
            decoder,
            queue: VecDeque::new(),
            weight: 0,
            buffer_bytes,
            received: 0,
            replayed: 0,
            outputs_received: 0,
            released: 0,
            told: 0,
            told_at: 0,
            outputs_told: 0,
            freed: 0,
            closed: false,
        }
    }

    /// Takes a block.
    ///
    /// # Errors
    /// It is damaged, not the next one, or more than the buffer holds.
    pub fn log(&mut self, block: &[u8]) -> Result<(), ChannelError> {
        if self.closed {
            return Err(ChannelError::Unexpected("log"));
        }
        self.decoder.push(block);
        let records = self.decoder.block()?.filter(|_| self.decoder.incomplete() == 0);
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

    /// The primary says how many outputs have left.
    ///
    /// # Errors
    /// It goes back, or counts outputs that were not received.
    pub fn released(&mut self, outputs: u64) -> Result<(), ChannelError> {
        self.released = checked("released", outputs, self.released, self.outputs_received)?;
        Ok(())
    }

    /// No more comes: what was received is all that is replayed. Nothing is acknowledged from here on.
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

    /// So many records have been replayed.
    ///
    /// # Panics
    /// When they were not taken, or it goes back.
    pub fn move_replayed(&mut self, replayed: u64) {
        let taken = self.received - self.queue.len() as u64;
        assert!((self.replayed..=taken).contains(&replayed), "replayed {replayed} of {taken}");
        self.replayed = replayed;
    }

    /// Acknowledges what was received: at once if there are outputs, which wait for it, or a good part of the buffer is free
    /// again; else when [`Receiver::deadline`] has come.
    pub fn ack(&mut self, now: u64, echo_ns: u64) -> Option<Ack> {
        let outputs = self.outputs_received > self.outputs_told;
        let due = self.deadline().is_some_and(|deadline| deadline <= now);
        if self.closed || !(outputs || due || self.freed > self.buffer_bytes / 4) {
            return None;
        }
        (self.told, self.told_at, self.outputs_told, self.freed) =
            (self.received, now, self.outputs_received, 0);
        Some(Ack { received: self.received, replayed: self.replayed, echo_ns })
    }

    /// When [`Receiver::ack`] has something to tell that is not urgent.
    pub fn deadline(&self) -> Option<u64> {
        (!self.closed && self.received > self.told).then(|| self.told_at + ACK_SPACING_NS)
    }

    /// Records received.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// Records replayed.
    pub fn replayed(&self) -> u64 {
        self.replayed
    }

    /// Everything received has been replayed.
    pub fn is_drained(&self) -> bool {
        self.replayed == self.received
    }

    /// Outputs received.
    pub fn outputs_received(&self) -> u64 {
        self.outputs_received
    }

    /// Outputs that the primary has said to have left.
    pub fn outputs_released(&self) -> u64 {
        self.released
    }
}
