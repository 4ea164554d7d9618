//! Sender and receiver of the log, each as its caller sees it.
#![allow(clippy::disallowed_methods)]

use entry::identity::Identity;
use entry::log::{Entry, LoggedInput, LoggedOutput, OutputTo, Record};
use entry::{Digest, Position, PositionUnit};
use logging_channel::message::{Ack, Beat, Hello, Message, Role};
use logging_channel::receiver::{NextRecord, Receiver};
use logging_channel::sender::{Cursors, GuestPace, Limits, Sender};
use logging_channel::stream::{MessageReader, Outbox};
use logging_channel::versions::OURS;
use logging_channel::{ChannelError, RECORD_WEIGHT, weight};

const MS: u64 = 1_000_000;

const LIMITS: Limits = Limits {
    unacked_bytes_max: 1 << 20,
    peer_buffer_bytes: 1 << 20,
    lag_ns_max: 1000 * MS,
    lag_ns_bound: 3000 * MS,
    batch_ns: 5 * MS,
    coalescing_ns: MS,
};

fn identity() -> Identity {
    Identity::new(PositionUnit::Instructions)
}

fn mark(count: u64) -> Record {
    Record { position: Position::exact(count), entry: Entry::Mark { time_ns: count } }
}

fn frame(count: u64, len: usize) -> Record {
    let entry = Entry::Input(LoggedInput::Frame { slot: 0, bytes: vec![count as u8; len] });
    Record { position: Position::exact(count), entry }
}

fn output(count: u64) -> Record {
    let entry = Entry::Output(LoggedOutput { to: OutputTo::Net(0), len: 60, digest: Digest(count as u128) });
    Record { position: Position::exact(count), entry }
}

/// The primary's end of the log, and a reader for the messages that it sends.
struct Primary {
    sender: Sender,
    outbox: Outbox,
    reader: MessageReader,
}

impl Primary {
    fn new(limits: Limits) -> Primary {
        let (mut outbox, mut reader) = (Outbox::new(), MessageReader::new());
        let hello = Hello {
            versions: OURS,
            vm: "a".into(),
            role: Role::Primary,
            incarnation: 1,
            disks: Default::default(),
            timeout_ns: 1,
            buffer_bytes: 1,
            identity: identity(),
        };
        outbox.push(&Message::Hello(Box::new(hello)));
        drain(&mut outbox, &mut reader);
        assert!(matches!(reader.next_message(), Ok(Some(Message::Hello(_)))));
        outbox.speak(OURS.newest);
        Primary { sender: Sender::new(&identity(), limits), outbox, reader }
    }

    fn append(&mut self, now: u64, record: &Record) {
        self.sender.append(now, record, &mut self.outbox);
        self.sender.guest_loop_waits(now, &mut self.outbox);
    }

    fn acked(&mut self, received: u64, replayed: u64) {
        let ack = Ack { received, replayed, echo_ns: 0 };
        self.sender.acked(&ack, &mut self.outbox).expect("a good acknowledgement");
    }

    /// The messages sent since the last call.
    fn sent(&mut self) -> Vec<Message> {
        drain(&mut self.outbox, &mut self.reader);
        std::iter::from_fn(|| self.reader.next_message().expect("our own messages")).collect()
    }

    fn blocks(&mut self) -> Vec<Vec<u8>> {
        let block = |m| if let Message::Log(block) = m { Some(block) } else { None };
        self.sent().into_iter().filter_map(block).collect()
    }

    fn cursors(&self) -> Cursors {
        self.sender.cursors()
    }
}

fn drain(outbox: &mut Outbox, reader: &mut MessageReader) {
    while !outbox.is_empty() {
        let bytes = outbox.front().to_vec();
        reader.push(&bytes);
        outbox.wrote(bytes.len());
    }
}

fn records(receiver: &mut Receiver) -> Vec<Record> {
    let next = || if let NextRecord::Record(r) = receiver.next_record() { Some(r) } else { None };
    std::iter::from_fn(next).collect()
}

#[test]
fn an_output_takes_everything_before_it_along_at_once() {
    let mut primary = Primary::new(LIMITS);
    primary.append(0, &mark(1));
    primary.append(0, &frame(2, 60));
    assert_eq!(primary.sent(), []);
    primary.append(0, &output(3));
    let blocks = primary.blocks();
    assert_eq!(blocks.len(), 1, "one message for the three");
    let mut receiver = Receiver::new(&identity(), 1 << 20);
    receiver.receive_block(&blocks[0]).unwrap();
    assert_eq!(records(&mut receiver), [mark(1), frame(2, 60), output(3)]);
}

#[test]
fn records_that_no_output_waits_for_are_batched_for_a_while() {
    let mut primary = Primary::new(LIMITS);
    primary.append(10 * MS, &mark(1));
    assert_eq!(primary.sender.deadline(), Some(15 * MS));
    primary.sender.tick(14 * MS, &mut primary.outbox);
    assert_eq!(primary.sent(), []);
    primary.sender.tick(15 * MS, &mut primary.outbox);
    assert_eq!(primary.blocks().len(), 1);
    assert_eq!(primary.sender.deadline(), None);
}

#[test]
fn the_turns_of_a_running_guest_send_records_that_no_output_waits_for() {
    let mut primary = Primary::new(LIMITS);
    primary.sender.guest_loop_turned(10 * MS, &mut primary.outbox);
    primary.sender.append(10 * MS, &mark(1), &mut primary.outbox);
    assert_eq!(primary.sender.deadline(), None, "no other thread is woken for it");
    primary.sender.guest_loop_turned(14 * MS, &mut primary.outbox);
    assert_eq!(primary.sent(), []);
    primary.sender.guest_loop_turned(15 * MS, &mut primary.outbox);
    assert_eq!(primary.blocks().len(), 1);
    // If the guest makes no turn for a long time, the next tick of any thread sends it.
    primary.sender.append(16 * MS, &mark(2), &mut primary.outbox);
    primary.sender.tick(40 * MS, &mut primary.outbox);
    assert_eq!(primary.blocks().len(), 1);
}

#[test]
fn outputs_of_a_busy_guest_wait_for_each_other_for_a_while() {
    let mut primary = Primary::new(LIMITS);
    let mut turn = |now: u64, records: &[Record]| {
        records.iter().for_each(|record| primary.sender.append(now, record, &mut primary.outbox));
        primary.sender.guest_loop_turned(now, &mut primary.outbox);
        (primary.blocks().len(), primary.sender.deadline())
    };
    let at = |us: u64| 10 * MS + us * 1000;
    // An answer of two frames leaves as one block.
    assert_eq!(turn(at(0), &[output(1), output(2)]), (1, None));
    assert_eq!(turn(at(100), &[output(3)]).0, 1);
    assert_eq!(turn(at(200), &[output(4)]).0, 0);
    assert_eq!(turn(at(300), &[output(5)]).0, 0);
    assert_eq!(turn(at(1100), &[]).0, 1, "both together, an interval after the last departure");
    // If the guest makes no more turns, the deadline comes in time, and is not moved by each output.
    let deadline = turn(at(1200), &[output(6)]).1;
    assert_eq!(deadline, Some(at(1100) + 5 * MS));
    primary.sender.tick(at(1100) + 5 * MS, &mut primary.outbox);
    assert_eq!(primary.blocks().len(), 1);
}

#[test]
fn an_output_may_leave_when_its_own_record_is_acknowledged() {
    let mut primary = Primary::new(LIMITS);
    primary.append(0, &output(1));
    primary.append(0, &mark(2));
    primary.append(0, &output(3));
    primary.acked(1, 0);
    assert_eq!(primary.cursors().outputs_acked, 1);
    primary.acked(2, 0);
    assert_eq!(primary.cursors().outputs_acked, 1);
    primary.acked(3, 3);
    let expected = Cursors {
        recorded: 3,
        sent: 3,
        acked: 3,
        replayed: 3,
        outputs_recorded: 2,
        outputs_acked: 2,
        outputs_released: 0,
    };
    assert_eq!(primary.cursors(), expected);
    assert!(primary.sender.is_fully_acked());
}

#[test]
fn the_backup_cannot_have_records_that_were_not_sent_or_lose_those_it_had() {
    let mut primary = Primary::new(LIMITS);
    primary.append(0, &output(1));
    primary.acked(1, 0);
    let mut tell = |received, replayed| {
        let ack = Ack { received, replayed, echo_ns: 0 };
        primary.sender.acked(&ack, &mut primary.outbox).unwrap_err().to_string()
    };
    assert_eq!(tell(2, 0), "the other side reports the cursor received at 2, but it must be between 1 and 1");
    assert_eq!(tell(0, 0), "the other side reports the cursor received at 0, but it must be between 1 and 1");
    assert_eq!(tell(1, 2), "the other side reports the cursor replayed at 2, but it must be between 0 and 1");
}

#[test]
#[should_panic(expected = "released 2")]
fn an_output_that_was_not_recorded_cannot_be_released() {
    let mut primary = Primary::new(LIMITS);
    primary.append(0, &output(1));
    primary.sender.released(2);
}

#[test]
fn the_backup_learns_with_the_next_block_which_outputs_have_left() {
    let mut primary = Primary::new(LIMITS);
    primary.append(0, &output(1));
    primary.acked(1, 1);
    primary.sender.released(1);
    primary.sent();
    primary.append(0, &output(2));
    assert_eq!(primary.sent()[0], Message::Released { outputs: 1 });
}

#[test]
fn the_guest_slows_in_proportion_and_stops_at_a_full_buffer() {
    let record = |n| frame(n, 1024 - RECORD_WEIGHT as usize);
    assert_eq!(weight(&record(1)), 1024);
    let limits = Limits { unacked_bytes_max: 10 << 10, peer_buffer_bytes: 100 << 10, ..LIMITS };
    let mut primary = Primary::new(limits);
    let mut paces = Vec::new();
    for n in 1..=10 {
        primary.append(0, &record(n));
        paces.push(primary.sender.pace(0));
    }
    assert_eq!(paces[..2], [GuestPace::Free, GuestPace::Free]);
    let share =
        |pace: &GuestPace| if let GuestPace::Share(share) = pace { *share } else { panic!("{pace:?}") };
    let shares: Vec<_> = paces[2..9].iter().map(share).collect();
    assert!(shares.is_sorted_by(|a, b| a > b), "{shares:?}");
    assert_eq!(paces[9], GuestPace::Stop);
    primary.sender.flush(&mut primary.outbox);
    primary.acked(10, 10);
    assert_eq!(primary.sender.pace(0), GuestPace::Free);
}

#[test]
fn a_late_backup_slows_the_guest_and_stops_it_at_the_bound() {
    let mut primary = Primary::new(LIMITS);
    primary.append(0, &output(1));
    primary.acked(1, 0);
    assert_eq!(primary.sender.lag_ns(100 * MS), 100 * MS);
    assert_eq!(primary.sender.pace(100 * MS), GuestPace::Free);
    assert_eq!(primary.sender.pace(625 * MS), GuestPace::Share(500));
    assert_eq!(primary.sender.pace(2999 * MS), GuestPace::Share(50));
    assert_eq!(primary.sender.pace(3000 * MS), GuestPace::Stop);
    primary.sender.replayed(1, &mut primary.outbox);
    assert_eq!(primary.sender.pace(3600 * 1000 * MS), GuestPace::Free);
}

#[test]
fn no_more_is_sent_than_the_backup_has_room_for() {
    let room = 3 * weight(&output(0));
    let mut primary = Primary::new(Limits { peer_buffer_bytes: room, ..LIMITS });
    let mut receiver = Receiver::new(&identity(), room);
    (1..=5).for_each(|n| primary.append(0, &output(n)));
    let first = primary.blocks();
    assert_eq!((first.len(), primary.cursors().sent), (3, 3));
    first.iter().for_each(|block| receiver.receive_block(block).unwrap());
    primary.acked(3, 0);
    assert_eq!(primary.sent(), [], "the records are received, but not replayed");
    primary.acked(3, 2);
    let second = primary.blocks();
    assert_eq!(second.len(), 2);
    assert_eq!(
        receiver.receive_block(&second[0]),
        Err(ChannelError::Overrun { weight: 4 * RECORD_WEIGHT, max: room })
    );
}

#[test]
fn a_record_larger_than_the_buffer_goes_alone() {
    let mut primary = Primary::new(Limits { peer_buffer_bytes: 100, ..LIMITS });
    let mut receiver = Receiver::new(&identity(), 100);
    primary.append(0, &frame(1, 1400));
    primary.append(0, &output(2));
    let blocks = primary.blocks();
    assert_eq!(blocks.len(), 1);
    receiver.receive_block(&blocks[0]).unwrap();
}

#[test]
fn a_beat_goes_before_the_log_but_not_into_a_message() {
    let mut primary = Primary::new(LIMITS);
    (1..=3).for_each(|n| primary.append(0, &output(n)));
    let half = primary.outbox.front()[..10].to_vec();
    primary.outbox.wrote(10);
    primary.reader.push(&half);
    let beat = |stamp_ns| Message::Beat(Beat { stamp_ns, ..Beat::default() });
    primary.outbox.push(&beat(1));
    primary.outbox.push(&beat(2));
    let names: Vec<_> = primary.sent().iter().map(Message::name).collect();
    assert_eq!(names, ["log", "beat", "log", "log"]);
}

#[test]
fn a_closed_channel_only_counts() {
    let mut primary = Primary::new(LIMITS);
    primary.append(0, &output(1));
    primary.outbox.clear();
    primary.sender.detach();
    primary.append(0, &output(2));
    assert!(primary.outbox.is_empty());
    assert_eq!(primary.cursors().outputs_recorded, 2);
    assert_eq!(primary.cursors().outputs_acked, 0);
}

fn sent_block(records: &[Record]) -> Vec<u8> {
    let mut primary = Primary::new(LIMITS);
    records.iter().for_each(|r| primary.append(0, r));
    primary.sender.flush(&mut primary.outbox);
    primary.blocks().remove(0)
}

#[test]
fn receipt_is_acknowledged_before_replay() {
    let mut receiver = Receiver::new(&identity(), 1 << 20);
    assert_eq!(receiver.ack_if_due(0, 7), None);
    receiver.receive_block(&sent_block(&[mark(1), output(2)])).unwrap();
    assert_eq!(receiver.ack_if_due(0, 7), Some(Ack { received: 2, replayed: 0, echo_ns: 7 }));
    assert_eq!(receiver.ack_if_due(0, 7), None);
    assert!(!receiver.is_drained());
    assert_eq!(receiver.next_record(), NextRecord::Record(mark(1)));
    receiver.move_replayed(1);
    assert_eq!(receiver.next_record(), NextRecord::Record(output(2)));
    receiver.move_replayed(2);
    assert!(receiver.is_drained());
    assert_eq!(receiver.next_record(), NextRecord::Wait);
}

#[test]
fn records_that_no_output_waits_for_are_acknowledged_together() {
    let (mut primary, mut receiver) = (Primary::new(LIMITS), Receiver::new(&identity(), 1 << 20));
    let mut receive = |record: &Record| {
        primary.sender.append(0, record, &mut primary.outbox);
        primary.sender.flush(&mut primary.outbox);
        primary.blocks().iter().for_each(|block| receiver.receive_block(block).unwrap());
        receiver.ack_if_due(10 * MS, 0).map(|ack| ack.received)
    };
    assert_eq!(receive(&output(1)), Some(1));
    assert_eq!(receive(&mark(2)), None);
    assert_eq!(receive(&mark(3)), None);
    let due = receiver.deadline().unwrap();
    assert_eq!((due, receiver.ack_if_due(due - 1, 0)), (20 * MS, None));
    assert_eq!(receiver.ack_if_due(due, 0).map(|ack| ack.received), Some(3));
    assert_eq!(receiver.deadline(), None);
}

#[test]
fn free_room_in_the_buffer_is_reported() {
    let mut receiver = Receiver::new(&identity(), 4 * RECORD_WEIGHT);
    receiver.receive_block(&sent_block(&[mark(1), mark(2), mark(3)])).unwrap();
    receiver.ack_if_due(10 * MS, 0).unwrap();
    receiver.next_record();
    receiver.move_replayed(1);
    assert_eq!(
        receiver.ack_if_due(10 * MS, 0),
        None,
        "a quarter of the buffer is not worth an acknowledgement yet"
    );
    receiver.next_record();
    receiver.move_replayed(2);
    assert_eq!(receiver.ack_if_due(10 * MS, 0), Some(Ack { received: 3, replayed: 2, echo_ns: 0 }));
}

#[test]
fn a_closed_receiver_acknowledges_nothing_and_ends_after_the_records_it_has() {
    let mut receiver = Receiver::new(&identity(), 1 << 20);
    receiver.receive_block(&sent_block(&[output(1)])).unwrap();
    receiver.close();
    assert_eq!(receiver.ack_if_due(10 * MS, 0), None);
    assert_eq!(receiver.receive_block(&[]), Err(ChannelError::Unexpected("log")));
    assert_eq!(receiver.next_record(), NextRecord::Record(output(1)));
    assert_eq!(receiver.next_record(), NextRecord::End);
}

#[test]
fn damaged_repeated_and_cut_blocks_are_refused() {
    let block = sent_block(&[mark(1), output(2)]);
    let new = || Receiver::new(&identity(), 1 << 20);
    for at in 0..block.len() {
        let mut damaged = block.clone();
        damaged[at] ^= 1;
        assert!(new().receive_block(&damaged).is_err(), "byte {at}");
    }
    assert_eq!(new().receive_block(&block[..4]), Err(ChannelError::Block { bytes: 4 }));
    let mut receiver = new();
    receiver.receive_block(&block).unwrap();
    assert!(matches!(receiver.receive_block(&block), Err(ChannelError::Log(_))));
    let more = [block.clone(), vec![0]].concat();
    assert_eq!(new().receive_block(&more), Err(ChannelError::Block { bytes: more.len() }));
}

#[test]
fn released_outputs_must_have_been_received() {
    let mut receiver = Receiver::new(&identity(), 1 << 20);
    receiver.receive_block(&sent_block(&[output(1), mark(1)])).unwrap_or_else(|e| panic!("{e}"));
    receiver.released(1).unwrap();
    assert_eq!(receiver.outputs_released(), 1);
    assert_eq!(
        receiver.released(2).unwrap_err().to_string(),
        "the other side reports the cursor released at 2, but it must be between 1 and 1"
    );
    assert!(receiver.released(0).is_err());
}
