//! The primary's side of the log: encodes records, decides when they leave, knows what the backup has, and how fast
//! the guest may run.

use std::collections::VecDeque;

use entry::block::Encoder;
use entry::identity::Identity;
use entry::log::{Entry, Record};

use crate::message::{Ack, LOG_ROOM, Message, encode_log};
use crate::spacing::Spacing;
use crate::stream::Outbox;
use crate::{ChannelError, checked, weight};

/// Bytes of entries from which on a block is closed although no output waits.
const BLOCK_BYTES: usize = 63 << 10;
/// From this part of a bound on, in per mille, the guest is slowed.
const SLOW_FROM: u64 = 250;
/// The least share of time, in per mille, that a guest gets whose backup is late but has room.
const SHARE_MIN: u64 = 50;

/// Bounds of what may be under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Weight of the records that the backup has not acknowledged; when it is reached the guest stops.
    pub unacked_bytes_max: u64,
    /// Weight of the records that the backup can hold, from its hello.
    pub peer_buffer_bytes: u64,
    /// How long the backup may be behind; the guest is slowed in proportion before that.
    pub lag_ns_max: u64,
    /// How long a record that no output waits for may wait for others.
    pub batch_ns: u64,
    /// For how long after outputs have left the next wait for each other, where many follow close upon one another.
    pub spacing_ns: u64,
}

impl Limits {
    /// How long an output waits at most for its guest to make a turn.
    fn output_wait_ns(&self) -> u64 {
        5 * self.spacing_ns
    }
}

/// How fast the guest may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// As it can.
    Free,
    /// This part of the time, in per mille (1 to 999).
    Share(u64),
    /// Not at all: a buffer is full, or there is a verdict to wait for.
    Stop,
}

/// Where the log has got to. One function moves each cursor, and checks its order with its neighbours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cursors {
    /// Records appended.
    pub recorded: u64,
    /// Records handed to the connection.
    pub sent: u64,
    /// Records that the backup has.
    pub acked: u64,
    /// Records that the backup has replayed.
    pub replayed: u64,
    /// Outputs appended.
    pub outputs_recorded: u64,
    /// Outputs whose records the backup has.
    pub outputs_acked: u64,
    /// Outputs that have left.
    pub outputs_released: u64,
}

/// A block on its way: where the log is behind it.
#[derive(Clone, Copy, Debug)]
struct Sent {
    records: u64,
    weight: u64,
    recorded_at: u64,
}

/// A closed block that the backup has no room for yet.
#[derive(Debug)]
struct Closed {
    /// It begins at `start`.
    message: Vec<u8>,
    start: usize,
    end: Sent,
}

/// The primary's side of the log. `now` is a monotonic clock in ns.
#[derive(Debug)]
pub struct Sender {
    limits: Limits,
    encoder: Encoder,
    cursors: Cursors,
    /// Weight of all records appended.
    weight: u64,
    weight_sent: u64,
    weight_acked: u64,
    weight_replayed: u64,
    /// When the open block's first record was appended.
    open_since: Option<u64>,
    /// When its first output was.
    output_since: Option<u64>,
    spacing: Spacing,
    /// Outputs that had waited have left lately. Whoever sleeps until [`Sender::deadline`] wakes once for all that follow in that
    /// time, and need not be woken for each.
    busy_until: Option<u64>,
    /// The guest waits, and makes no turns.
    rests: bool,
    closed: VecDeque<Closed>,
    unacked: VecDeque<Sent>,
    unreplayed: VecDeque<Sent>,
    /// For each output that is not acknowledged: how many records must be.
    outputs: VecDeque<u64>,
    told_released: u64,
    is_detached: bool,
}

impl Sender {
    /// The log of the machine with this identity, which the hello has told.
    pub fn new(identity: &Identity, limits: Limits) -> Sender {
        let mut encoder = Encoder::new(identity).with_room(LOG_ROOM);
        // The header went with the hello.
        encoder.take();
        Sender {
            limits,
            encoder,
            cursors: Cursors::default(),
            weight: 0,
            weight_sent: 0,
            weight_acked: 0,
            weight_replayed: 0,
            open_since: None,
            output_since: None,
            spacing: Spacing::new(),
            busy_until: None,
            rests: false,
            closed: VecDeque::new(),
            unacked: VecDeque::new(),
            unreplayed: VecDeque::new(),
            outputs: VecDeque::new(),
            told_released: 0,
            is_detached: false,
        }
    }

    /// Where the log has got to.
    pub fn cursors(&self) -> Cursors {
        self.cursors
    }

    /// Appends a record. An output, and all before it, leaves at [`Sender::turn`] or [`Sender::rest`]; other records when there
    /// are enough or [`Sender::deadline`] has come.
    pub fn append(&mut self, now: u64, record: &Record, out: &mut Outbox) {
        let is_output = matches!(record.entry, Entry::Output(_));
        self.cursors.recorded += 1;
        if self.is_detached {
            self.cursors.outputs_recorded += is_output as u64;
            return;
        }
        self.encoder.append(record);
        self.weight += weight(record);
        self.open_since.get_or_insert(now);
        if is_output {
            self.hold();
            self.output_since.get_or_insert(now);
        }
        if self.encoder.open_bytes() >= BLOCK_BYTES || self.encoder.open_bytes() == 0 {
            self.flush(out);
        }
    }

    /// The guest's loop makes a turn: outputs leave, at once or after a while ([`Limits::spacing_ns`]).
    pub fn turn(&mut self, now: u64, out: &mut Outbox) {
        self.rests = false;
        let (recorded, had_waited) = (self.cursors.outputs_recorded, self.spacing.has_waited());
        if !self.is_detached && self.spacing.may_leave(now, recorded, self.limits.spacing_ns) {
            if had_waited {
                self.busy_until = Some(now.saturating_add(self.limits.output_wait_ns()));
            }
            self.flush(out);
        }
        self.tick(now, out);
    }

    /// The guest is about to wait: outputs leave now.
    pub fn rest(&mut self, now: u64, out: &mut Outbox) {
        self.spacing.rest();
        self.turn(now, out);
        self.spacing.rest();
        self.rests = true;
    }

    /// The channel is closed for good: records are only counted from now on.
    pub fn detach(&mut self) {
        self.is_detached = true;
        (self.open_since, self.output_since, self.busy_until) = (None, None, None);
        self.closed.clear();
        self.unacked.clear();
        self.unreplayed.clear();
        self.outputs.clear();
    }

    /// An output is held until everything appended so far is acknowledged.
    fn hold(&mut self) {
        self.cursors.outputs_recorded += 1;
        self.outputs.push_back(self.cursors.recorded);
    }

    /// Holds an output that has no record of its own: a rule switched off, for the simulator.
    #[doc(hidden)]
    pub fn hold_unlogged(&mut self) {
        self.hold();
        if self.cursors.acked == self.cursors.recorded {
            self.move_acked(self.cursors.acked);
        }
    }

    /// Closes the open block and sends what the backup has room for.
    pub fn flush(&mut self, out: &mut Outbox) {
        if let Some(recorded_at) = self.open_since.take() {
            self.output_since = None;
            self.encoder.close_block();
            let mut message = self.encoder.take();
            let start = encode_log(&mut message);
            let end = Sent { records: self.cursors.recorded, weight: self.weight, recorded_at };
            self.closed.push_back(Closed { message, start, end });
        }
        self.send(out);
    }

    /// Hands closed blocks to the connection while the backup has room. A block that is larger than its whole buffer
    /// goes when the buffer is empty.
    fn send(&mut self, out: &mut Outbox) {
        while let Some(next) = self.closed.front() {
            let under_way = next.end.weight - self.weight_replayed;
            if under_way > self.limits.peer_buffer_bytes && self.weight_sent > self.weight_replayed {
                return;
            }
            let Some(Closed { message, start, end }) = self.closed.pop_front() else { return };
            if self.told_released < self.cursors.outputs_released {
                self.told_released = self.cursors.outputs_released;
                out.push(&Message::Released { outputs: self.told_released });
            }
            out.push_encoded(message, start);
            self.unacked.push_back(end);
            self.unreplayed.push_back(end);
            self.move_sent(end);
        }
    }

    /// Time has come to `now`: what has waited long enough leaves.
    pub fn tick(&mut self, now: u64, out: &mut Outbox) {
        let due = self.deadline().into_iter().chain(self.open_until()).min();
        if due.is_some_and(|due| due <= now) {
            self.busy_until = None;
            self.flush(out);
        }
    }

    /// When [`Sender::tick`] has something to do, or will soon have. Of records that no output waits for, the turns of a guest
    /// that runs take care: to wake another thread for them costs more than they are worth.
    pub fn deadline(&self) -> Option<u64> {
        let output = self.output_since.map(|since| since.saturating_add(self.limits.output_wait_ns()));
        let open = self.open_until().filter(|_| self.rests);
        [output, open, self.busy_until].into_iter().flatten().min()
    }

    /// Until when the open block waits for more.
    fn open_until(&self) -> Option<u64> {
        self.open_since.map(|since| since.saturating_add(self.limits.batch_ns))
    }

    /// The backup says what it has.
    ///
    /// # Errors
    /// It goes back, or has what was not sent.
    pub fn acked(&mut self, ack: &Ack, out: &mut Outbox) -> Result<(), ChannelError> {
        let received = checked("received", ack.received, self.cursors.acked, self.cursors.sent)?;
        self.move_acked(received);
        checked("replayed", ack.replayed, 0, received)?;
        self.replayed(ack.replayed, out);
        Ok(())
    }

    /// The backup has replayed so many records, as it says in an acknowledgement or a beat. Beats overtake
    /// acknowledgements, so either may be older than what is known.
    pub fn replayed(&mut self, replayed: u64, out: &mut Outbox) {
        let replayed = replayed.min(self.cursors.acked);
        if replayed > self.cursors.replayed {
            self.move_replayed(replayed);
            self.send(out);
        }
    }

    /// So many outputs have left.
    ///
    /// # Panics
    /// When they were not acknowledged: the gate let out what it must not.
    pub fn released(&mut self, outputs: u64) {
        let Cursors { outputs_released, outputs_recorded, .. } = self.cursors;
        assert!((outputs_released..=outputs_recorded).contains(&outputs), "released {outputs}");
        self.cursors.outputs_released = outputs;
    }

    /// How fast the guest may run: freely, slowed in proportion to the fullest bound, or not at all when a buffer is
    /// full.
    pub fn pace(&self, now: u64) -> Pace {
        let part = |value: u64, max: u64| value.saturating_mul(1000) / max.max(1);
        let unacked = part(self.weight - self.weight_acked, self.limits.unacked_bytes_max);
        if unacked >= 1000 {
            return Pace::Stop;
        }
        let lag = part(self.weight - self.weight_replayed, self.limits.peer_buffer_bytes);
        let late = part(self.lag_ns(now), self.limits.lag_ns_max);
        match unacked.max(lag).max(late) {
            fill if fill <= SLOW_FROM => Pace::Free,
            fill => {
                let share = 1000u64.saturating_sub(fill) * 1000 / (1000 - SLOW_FROM);
                Pace::Share(share.clamp(SHARE_MIN, 999))
            }
        }
    }

    /// How long ago the oldest record was made that the backup has not replayed.
    pub fn lag_ns(&self, now: u64) -> u64 {
        let closed = self.closed.front().map(|c| c.end.recorded_at);
        let oldest = self.unreplayed.front().map(|s| s.recorded_at).or(closed).or(self.open_since);
        oldest.map_or(0, |at| now.saturating_sub(at))
    }

    /// Weight of the records that the backup has not replayed.
    pub fn lag_bytes(&self) -> u64 {
        self.weight - self.weight_replayed
    }

    /// Everything was sent and acknowledged.
    pub fn is_settled(&self) -> bool {
        self.cursors.acked == self.cursors.recorded
    }

    fn move_sent(&mut self, end: Sent) {
        assert!(self.cursors.sent < end.records && end.records <= self.cursors.recorded, "sent {end:?}");
        self.cursors.sent = end.records;
        self.weight_sent = end.weight;
    }

    fn move_acked(&mut self, acked: u64) {
        assert!((self.cursors.acked..=self.cursors.sent).contains(&acked), "acked {acked}");
        self.cursors.acked = acked;
        while let Some(block) = self.unacked.front().filter(|b| b.records <= acked) {
            self.weight_acked = block.weight;
            self.unacked.pop_front();
        }
        while self.outputs.front().is_some_and(|records| *records <= acked) {
            self.cursors.outputs_acked += 1;
            self.outputs.pop_front();
        }
    }

    fn move_replayed(&mut self, replayed: u64) {
        assert!((self.cursors.replayed..=self.cursors.acked).contains(&replayed), "replayed {replayed}");
        self.cursors.replayed = replayed;
        while let Some(block) = self.unreplayed.front().filter(|b| b.records <= replayed) {
            self.weight_replayed = block.weight;
            self.unreplayed.pop_front();
        }
    }
}
