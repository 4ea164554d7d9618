//! The primary's end of the log: it encodes records, decides when they are sent, and knows what the backup
//! has and how fast the guest may run.

use std::collections::VecDeque;

use entry::block::Encoder;
use entry::identity::Identity;
use entry::log::{Entry, Record};

use crate::coalescing::OutputCoalescing;
use crate::message::{Ack, LOG_PREFIX_MAX, Message, encode_log};
use crate::stream::Outbox;
use crate::{ChannelError, check_cursor, weight};

/// A block is closed once it has this many bytes of entries, even if no output waits.
const BLOCK_BYTES: usize = 63 << 10;
/// The guest is slowed from this part of a bound on, in per mille.
const SLOW_FROM: u64 = 250;
/// The smallest share of time, in per mille, for a guest whose backup lags but has room in its buffer.
const SHARE_MIN: u64 = 50;

/// Bounds on the records and outputs that are under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Weight of the records that the backup has not acknowledged at which the guest stops.
    pub unacked_bytes_max: u64,
    /// Weight of the records that the backup can hold, from its hello.
    pub peer_buffer_bytes: u64,
    /// How far the backup may lag. The guest is slowed in proportion before that.
    pub lag_ns_max: u64,
    /// The lag at which the guest stops, until the backup has caught up so far.
    pub lag_ns_bound: u64,
    /// How long a record that no output waits for may wait for others.
    pub batch_ns: u64,
    /// For how long after a departure the next outputs are held back, so that outputs in quick succession
    /// leave together.
    pub coalescing_ns: u64,
}

impl Limits {
    /// How long an output waits for its guest loop to make a turn, at most.
    fn output_wait_ns(&self) -> u64 {
        5 * self.coalescing_ns
    }
}

/// How fast the guest may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestPace {
    /// At full speed.
    Free,
    /// For this share of the time, in per mille (1 to 999).
    Share(u64),
    /// Not at all: a buffer is full, the backup is too far behind, or a verdict is pending.
    Stop,
}

/// How far the log has got. One function moves each cursor, and checks that it stays in order with its
/// neighbours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cursors {
    /// Records appended.
    pub recorded: u64,
    /// Records handed to the connection.
    pub sent: u64,
    /// Records that the backup has acknowledged.
    pub acked: u64,
    /// Records that the backup has replayed.
    pub replayed: u64,
    /// Outputs appended.
    pub outputs_recorded: u64,
    /// Outputs whose records the backup has acknowledged.
    pub outputs_acked: u64,
    /// Outputs that have left the primary.
    pub outputs_released: u64,
}

/// The end of a block that is under way: the totals of the log up to there.
#[derive(Clone, Copy, Debug)]
struct BlockEnd {
    records: u64,
    weight: u64,
    recorded_at: u64,
}

/// A closed block that waits until the backup has room for it.
#[derive(Debug)]
struct ClosedBlock {
    /// The encoded log message, which begins at index `start`.
    message: Vec<u8>,
    start: usize,
    end: BlockEnd,
}

/// The primary's end of the log. `now` is a monotonic clock, in ns.
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
    /// When the open block's first output was appended.
    output_since: Option<u64>,
    coalescing: OutputCoalescing,
    /// Set after a departure of outputs that had been held back. Until then [`Sender::deadline`] stays the
    /// same, so that the thread that waits for it wakes up once for all outputs in that time and need not be
    /// woken for each.
    busy_until: Option<u64>,
    /// The guest loop waits, and makes no turns.
    guest_waits: bool,
    closed: VecDeque<ClosedBlock>,
    /// Blocks sent and not acknowledged, and blocks sent and not replayed.
    unacked: VecDeque<BlockEnd>,
    unreplayed: VecDeque<BlockEnd>,
    /// For each unacknowledged output, the number of records that must be acknowledged before it may leave.
    unacked_outputs: VecDeque<u64>,
    /// [`Cursors::outputs_released`] as last sent to the backup.
    released_sent: u64,
    is_detached: bool,
}

impl Sender {
    /// Begins the log of the machine with this identity, which the peer knows from the hello.
    pub fn new(identity: &Identity, limits: Limits) -> Sender {
        let mut encoder = Encoder::new(identity).with_room(LOG_PREFIX_MAX);
        // The header went with the hello.
        encoder.take_bytes();
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
            coalescing: OutputCoalescing::new(),
            busy_until: None,
            guest_waits: false,
            closed: VecDeque::new(),
            unacked: VecDeque::new(),
            unreplayed: VecDeque::new(),
            unacked_outputs: VecDeque::new(),
            released_sent: 0,
            is_detached: false,
        }
    }

    /// How far the log has got.
    pub fn cursors(&self) -> Cursors {
        self.cursors
    }

    /// Appends a record. An output's record, and all records before it, are sent at
    /// [`Sender::guest_loop_turned`] or [`Sender::guest_loop_waits`]; other records once there are enough or
    /// [`Sender::deadline`] has come.
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
            self.hold_output();
            self.output_since.get_or_insert(now);
        }
        if self.encoder.open_bytes() >= BLOCK_BYTES || self.encoder.open_bytes() == 0 {
            self.flush(out);
        }
    }

    /// The guest loop has made a turn: the records of outputs are sent, at once or after a while
    /// ([`Limits::coalescing_ns`]).
    pub fn guest_loop_turned(&mut self, now: u64, out: &mut Outbox) {
        self.guest_waits = false;
        let (recorded, held_back) = (self.cursors.outputs_recorded, self.coalescing.holds_back());
        if !self.is_detached && self.coalescing.leave_if_due(now, recorded, self.limits.coalescing_ns) {
            if held_back {
                self.busy_until = Some(now.saturating_add(self.limits.output_wait_ns()));
            }
            self.flush(out);
        }
        self.tick(now, out);
    }

    /// The guest loop is about to wait: the records of outputs are sent now.
    pub fn guest_loop_waits(&mut self, now: u64, out: &mut Outbox) {
        self.coalescing.guest_loop_waits();
        self.guest_loop_turned(now, out);
        self.coalescing.guest_loop_waits();
        self.guest_waits = true;
    }

    /// The channel is closed for good: records are only counted from now on.
    pub fn detach(&mut self) {
        self.is_detached = true;
        (self.open_since, self.output_since, self.busy_until) = (None, None, None);
        self.closed.clear();
        self.unacked.clear();
        self.unreplayed.clear();
        self.unacked_outputs.clear();
    }

    /// Holds an output until everything appended so far is acknowledged.
    fn hold_output(&mut self) {
        self.cursors.outputs_recorded += 1;
        self.unacked_outputs.push_back(self.cursors.recorded);
    }

    /// Holds an output that has no record of its own. For the simulator, which switches off the rule that
    /// each has one.
    #[cfg(feature = "ablation")]
    pub fn hold_unlogged(&mut self) {
        self.hold_output();
        if self.cursors.acked == self.cursors.recorded {
            self.move_acked(self.cursors.acked);
        }
    }

    /// Closes the open block and sends the blocks for which the backup has room.
    pub fn flush(&mut self, out: &mut Outbox) {
        if let Some(recorded_at) = self.open_since.take() {
            self.output_since = None;
            self.encoder.close_block();
            let mut message = self.encoder.take_bytes();
            let start = encode_log(&mut message);
            let end = BlockEnd { records: self.cursors.recorded, weight: self.weight, recorded_at };
            self.closed.push_back(ClosedBlock { message, start, end });
        }
        self.send(out);
    }

    /// Hands closed blocks to the connection while the backup has room. A block that is larger than the whole
    /// buffer is sent when the buffer is empty.
    fn send(&mut self, out: &mut Outbox) {
        while let Some(next) = self.closed.front() {
            let under_way = next.end.weight - self.weight_replayed;
            if under_way > self.limits.peer_buffer_bytes && self.weight_sent > self.weight_replayed {
                return;
            }
            let Some(ClosedBlock { message, start, end }) = self.closed.pop_front() else { return };
            if self.released_sent < self.cursors.outputs_released {
                self.released_sent = self.cursors.outputs_released;
                out.push(&Message::Released { outputs: self.released_sent });
            }
            out.push_encoded(message, start);
            self.unacked.push_back(end);
            self.unreplayed.push_back(end);
            self.move_sent(end);
        }
    }

    /// Time has advanced to `now`: sends the records that have waited long enough.
    pub fn tick(&mut self, now: u64, out: &mut Outbox) {
        let due = self.deadline().into_iter().chain(self.open_until()).min();
        if due.is_some_and(|due| due <= now) {
            self.busy_until = None;
            self.flush(out);
        }
    }

    /// When [`Sender::tick`] has something to do, or soon will. The turns of a running guest loop see to the
    /// records that no output waits for: waking another thread for those is not worth its cost.
    pub fn deadline(&self) -> Option<u64> {
        let output = self.output_since.map(|since| since.saturating_add(self.limits.output_wait_ns()));
        let open = self.open_until().filter(|_| self.guest_waits);
        [output, open, self.busy_until].into_iter().flatten().min()
    }

    /// Until when the open block waits for more records.
    fn open_until(&self) -> Option<u64> {
        self.open_since.map(|since| since.saturating_add(self.limits.batch_ns))
    }

    /// The backup acknowledges records.
    ///
    /// # Errors
    /// A number is smaller than before, or counts records that were not sent.
    pub fn acked(&mut self, ack: &Ack, out: &mut Outbox) -> Result<(), ChannelError> {
        let received = check_cursor("received", ack.received, self.cursors.acked, self.cursors.sent)?;
        self.move_acked(received);
        check_cursor("replayed", ack.replayed, 0, received)?;
        self.replayed(ack.replayed, out);
        Ok(())
    }

    /// The backup reports how many records it has replayed, in an acknowledgement or a beat. Because beats
    /// overtake acknowledgements, the number may be out of date.
    pub fn replayed(&mut self, replayed: u64, out: &mut Outbox) {
        let replayed = replayed.min(self.cursors.acked);
        if replayed > self.cursors.replayed {
            self.move_replayed(replayed);
            self.send(out);
        }
    }

    /// Sets how many outputs have left.
    ///
    /// # Panics
    /// If the number is smaller than before, or counts outputs that were not recorded: the gate is broken.
    pub fn released(&mut self, outputs: u64) {
        let Cursors { outputs_released, outputs_recorded, .. } = self.cursors;
        assert!((outputs_released..=outputs_recorded).contains(&outputs), "released {outputs}");
        self.cursors.outputs_released = outputs;
    }

    /// How fast the guest may run: at full speed, slowed in proportion to the bound that is nearest to being
    /// reached, or not at all if a buffer is full or the lag has reached its bound.
    pub fn pace(&self, now: u64) -> GuestPace {
        let part = |value: u64, max: u64| value.saturating_mul(1000) / max.max(1);
        let unacked = part(self.weight - self.weight_acked, self.limits.unacked_bytes_max);
        let lag_ns = self.lag_ns(now);
        if unacked >= 1000 || lag_ns >= self.limits.lag_ns_bound {
            return GuestPace::Stop;
        }
        let lag = part(self.weight - self.weight_replayed, self.limits.peer_buffer_bytes);
        let late = part(lag_ns, self.limits.lag_ns_max);
        match unacked.max(lag).max(late) {
            fill if fill <= SLOW_FROM => GuestPace::Free,
            fill => {
                let share = 1000u64.saturating_sub(fill) * 1000 / (1000 - SLOW_FROM);
                GuestPace::Share(share.clamp(SHARE_MIN, 999))
            }
        }
    }

    /// The age of the oldest record that the backup has not replayed, in ns.
    pub fn lag_ns(&self, now: u64) -> u64 {
        let closed = self.closed.front().map(|c| c.end.recorded_at);
        let oldest = self.unreplayed.front().map(|s| s.recorded_at).or(closed).or(self.open_since);
        oldest.map_or(0, |at| now.saturating_sub(at))
    }

    /// Weight of the records that the backup has not replayed.
    pub fn lag_bytes(&self) -> u64 {
        self.weight - self.weight_replayed
    }

    /// Whether all records are sent and acknowledged.
    pub fn is_fully_acked(&self) -> bool {
        self.cursors.acked == self.cursors.recorded
    }

    fn move_sent(&mut self, end: BlockEnd) {
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
        while self.unacked_outputs.front().is_some_and(|records| *records <= acked) {
            self.cursors.outputs_acked += 1;
            self.unacked_outputs.pop_front();
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
