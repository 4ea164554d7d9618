use entry::{Console, DiskRequest, DiskResult, DiskWork, Output};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::devices::Effects;
use crate::ram::Ram;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// The rings of the queues lie from here on, 0x2000 bytes for each; buffers lie from [`DATA`] on.
const RINGS: u64 = 0x1000;
const DATA: u64 = 0x8000;
const RAM: u64 = 0x40000;

/// A driver that does what a test tells it to do, right or wrong.
struct Driver {
    ram: Ram,
    device: VirtioMmio,
    effects: Effects,
    avail: [u16; 2],
}

impl Driver {
    fn new(config: Slot) -> Driver {
        let ram = Ram::new(RAM).unwrap();
        let mut driver =
            Driver { ram, device: VirtioMmio::new(3, &config), effects: Effects::default(), avail: [0; 2] };
        driver.start(VERSION_1);
        driver
    }

    fn start(&mut self, features: u64) {
        self.avail = [0; 2];
        for (offset, value) in [(register::STATUS, 0), (register::STATUS, 3)] {
            self.set(offset, value);
        }
        for half in 0..2 {
            self.set(register::DRIVER_FEATURES_SEL, half);
            self.set(register::DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
        self.set(register::STATUS, 3 | status::FEATURES_OK);
        for queue in 0..self.device.queues.len() as u32 {
            let rings = (RINGS + 0x2000 * queue as u64) as u32;
            self.set(register::QUEUE_SEL, queue);
            self.set(register::QUEUE_NUM, 16);
            self.set(register::QUEUE_DESC_LOW, rings);
            self.set(register::QUEUE_DRIVER_LOW, rings + 0x800);
            self.set(register::QUEUE_DEVICE_LOW, rings + 0x1000);
            self.set(register::QUEUE_READY, 1);
            self.ram.memory().write_slice(&[0; 0x2000], GuestAddress(rings as u64)).unwrap();
        }
        self.set(register::STATUS, 3 | status::FEATURES_OK | status::DRIVER_OK);
    }

    fn cx<R>(&mut self, work: impl FnOnce(&mut VirtioMmio, &mut DeviceContext<'_>) -> R) -> R {
        let mut cx = DeviceContext { now_ns: 0, memory: self.ram.memory(), effects: &mut self.effects };
        work(&mut self.device, &mut cx)
    }

    fn set(&mut self, offset: u64, value: u32) {
        self.cx(|device, cx| device.write(offset, 4, value.into(), cx));
    }

    fn get(&self, offset: u64) -> u32 {
        self.device.read(offset, 4) as u32
    }

    fn poke(&self, at: u64, bytes: &[u8]) {
        self.ram.memory().write_slice(bytes, GuestAddress(at)).unwrap();
    }

    fn peek(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.memory().read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn descriptor(&self, queue: u64, index: u16, (addr, len, flags, next): (u64, u32, u16, u16)) {
        let bytes =
            [&addr.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat();
        self.poke(RINGS + 0x2000 * queue + 16 * index as u64, &bytes);
    }

    /// Makes the chain that begins with descriptor `head` available, and notifies the device.
    fn offer(&mut self, queue: usize, head: u16) {
        let ring = RINGS + 0x2000 * queue as u64 + 0x800;
        self.poke(ring + 4 + 2 * (self.avail[queue] as u64 % 16), &head.to_le_bytes());
        self.avail[queue] += 1;
        self.poke(ring + 2, &self.avail[queue].to_le_bytes());
        self.set(register::QUEUE_NOTIFY, queue as u32);
    }

    /// Makes buffers available as one chain from descriptor `head` on: address, length, whether the device writes.
    fn chain(&mut self, queue: usize, head: u16, buffers: &[(u64, u32, bool)]) {
        for (i, (addr, len, write)) in buffers.iter().enumerate() {
            let more = if i + 1 < buffers.len() { NEXT } else { 0 };
            let flags = more | if *write { WRITE } else { 0 };
            let index = head + i as u16;
            self.descriptor(queue as u64, index, (*addr, *len, flags, index + 1));
        }
        self.offer(queue, head);
    }

    /// The used ring: heads of chains, and bytes written.
    fn used(&self, queue: u64) -> Vec<(u32, u32)> {
        let ring = RINGS + 0x2000 * queue + 0x1000;
        let count = u16::from_le_bytes(self.peek(ring + 2, 2).try_into().unwrap());
        let word = |at| u32::from_le_bytes(self.peek(at, 4).try_into().unwrap());
        (0..count as u64).map(|i| (word(ring + 4 + 8 * i), word(ring + 8 + 8 * i))).collect()
    }

    fn is_broken(&self) -> bool {
        self.get(register::STATUS) & status::NEEDS_RESET != 0
    }
}

fn net() -> Driver {
    Driver::new(Slot::Net { mac: [2, 0, 0, 0, 0, 7] })
}

fn disk() -> Driver {
    Driver::new(Slot::Disk { bytes: 64 * 512, read_only: false })
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

#[test]
fn features_are_negotiated_and_configuration_is_read() {
    let mut driver = net();
    assert_eq!((driver.get(0), driver.get(4), driver.get(8)), (0x7472_6976, 2, 1));
    driver.set(register::DEVICE_FEATURES_SEL, 1);
    assert_eq!(driver.get(register::DEVICE_FEATURES), 1);
    assert_eq!(driver.device.read(0x100, 4), 2);
    assert_eq!((driver.device.read(0x105, 1), driver.device.read(0x106, 2)), (7, 1));
    assert_eq!(driver.get(register::QUEUE_NUM_MAX), 256);
    // A feature that was not offered is refused, and so is a driver that knows only the legacy interface.
    for features in [VERSION_1 | 1 << 3, 0] {
        driver.start(features);
        assert_eq!(driver.get(register::STATUS) & status::FEATURES_OK, 0);
    }
}

#[test]
fn frames_go_out() {
    let mut driver = net();
    driver.poke(DATA, &[0xee; 12]);
    driver.poke(DATA + 0x100, &[0x55; 60]);
    driver.chain(1, 0, &[(DATA, 12, false), (DATA + 0x100, 60, false)]);
    assert_eq!(driver.effects.outputs, [Output::Frame { slot: 3, bytes: vec![0x55; 60] }]);
    assert_eq!(driver.used(1), [(0, 0)]);
    assert_eq!((driver.device.irq(), driver.get(register::INTERRUPT_STATUS)), (true, 1));
    driver.set(register::INTERRUPT_ACK, 1);
    assert!(!driver.device.irq());
    // Frames that are too small or too large are dropped, and their chains given back.
    driver.chain(1, 2, &[(DATA, 20, false)]);
    driver.chain(1, 3, &[(DATA, 12 + 1519, false)]);
    assert_eq!((driver.effects.outputs.len(), driver.used(1).len()), (1, 3));
    assert!(!driver.is_broken());
}

#[test]
fn frames_come_in() {
    let mut driver = net();
    let frame = || Input::Frame { slot: 3, bytes: vec![9; 100] };
    assert!(!driver.device.has_room_for(&frame(), driver.ram.memory()));
    driver.chain(0, 0, &[(DATA, 60, true), (DATA + 0x1000, 1500, true)]);
    assert!(driver.device.has_room_for(&frame(), driver.ram.memory()));
    driver.cx(|device, cx| device.apply(frame(), cx));
    assert_eq!(driver.used(0), [(0, 112)]);
    assert_eq!(driver.peek(DATA, 14), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 9, 9]);
    assert_eq!(driver.peek(DATA + 0x1000, 53), [&[9; 52][..], &[0]].concat());
    // Without a buffer a frame is lost, and also with one that is too small.
    driver.cx(|device, cx| device.apply(frame(), cx));
    driver.chain(0, 2, &[(DATA, 60, true)]);
    driver.cx(|device, cx| device.apply(frame(), cx));
    assert_eq!(driver.used(0), [(0, 112), (2, 0)]);
}

#[test]
fn a_disk_reads_writes_flushes_and_has_a_serial_number() {
    let mut driver = disk();
    let (status_at, data) = (DATA + 0x800, DATA + 0x1000);
    driver.poke(DATA, &header(0, 3));
    driver.chain(0, 0, &[(DATA, 16, false), (data, 1024, true), (status_at, 1, true)]);
    driver.poke(DATA + 0x100, &header(1, 62));
    driver.poke(data + 0x1000, &[7; 1024]);
    driver.chain(0, 3, &[(DATA + 0x100, 16, false), (data + 0x1000, 1024, false), (status_at + 1, 1, true)]);
    driver.poke(DATA + 0x200, &header(4, 0));
    driver.chain(0, 6, &[(DATA + 0x200, 16, false), (status_at + 2, 1, true)]);
    driver.poke(DATA + 0x300, &header(8, 0));
    driver.chain(0, 8, &[(DATA + 0x300, 16, false), (data + 0x2000, 20, true), (status_at + 3, 1, true)]);
    let request = |id, work| DiskRequest { slot: 3, id, work };
    let expected = [
        request(0, DiskWork::Read { offset: 3 * 512, len: 1024 }),
        request(1, DiskWork::Write { offset: 62 * 512, data: vec![7; 1024].into() }),
        request(2, DiskWork::Flush),
    ];
    assert_eq!(driver.effects.disk, expected);
    assert_eq!(driver.device.unfinished(), expected);
    assert_eq!(driver.used(0), [(8, 21)]);
    assert_eq!(driver.peek(data + 0x2000, 4), b"vmft");
    driver.poke(status_at, &[0xff; 3]);
    // When the guest changes its memory meanwhile, a write in flight is not affected.
    driver.poke(data + 0x1000, &[8; 1024]);
    assert_eq!(driver.device.unfinished(), expected);
    for (id, result) in [(1, DiskResult::Done), (0, DiskResult::Read(vec![5; 1024])), (2, DiskResult::Failed)]
    {
        driver.cx(|device, cx| device.apply(Input::DiskDone { slot: 3, id, result }, cx));
    }
    assert_eq!(driver.used(0)[1..], [(3, 1), (0, 1025), (6, 1)]);
    assert_eq!((driver.peek(data, 1024), driver.peek(status_at, 3)), (vec![5; 1024], vec![0, 0, 1]));
    // A completion without a request is ignored.
    let stray = Input::DiskDone { slot: 3, id: 0, result: DiskResult::Done };
    driver.cx(|device, cx| device.apply(stray, cx));
    assert_eq!((driver.used(0).len(), driver.is_broken()), (4, false));
}

#[test]
fn wrong_disk_requests_end_with_a_status() {
    let mut driver = disk();
    let status_at = DATA + 0x800;
    let cases = [
        (header(0, 64), 512, true, 1),
        (header(0, u64::MAX), 512, true, 1),
        (header(1, 63), 1024, false, 1),
        (header(0, 0), 100, true, 1),
        (header(8, 0), 4, true, 1),
        (header(77, 0), 512, true, 2),
    ];
    for (i, (header, len, write, code)) in cases.into_iter().enumerate() {
        driver.poke(DATA, &header);
        driver.poke(status_at, &[0xff]);
        driver.chain(0, 0, &[(DATA, 16, false), (DATA + 0x1000, len, write), (status_at, 1, true)]);
        assert_eq!((driver.peek(status_at, 1), driver.used(0).len()), (vec![code], i + 1));
    }
    assert_eq!((driver.effects.disk.len(), driver.is_broken()), (0, false));
    // Without a header, or without room for the status, the device cannot answer.
    for buffers in [&[(DATA, 15, false), (DATA, 1, true)][..], &[(DATA, 16, false)]] {
        let mut driver = disk();
        driver.chain(0, 0, buffers);
        assert!(driver.is_broken());
    }
}

#[test]
fn a_read_only_disk_is_not_written_and_requests_with_much_data_wait() {
    let mut driver = Driver::new(Slot::Disk { bytes: 1 << 30, read_only: true });
    driver.poke(DATA, &header(1, 0));
    driver.chain(0, 0, &[(DATA, 16, false), (DATA, 512, false), (DATA + 0x800, 1, true)]);
    assert_eq!((driver.peek(DATA + 0x800, 1), driver.effects.disk.len()), (vec![1], 0));
    // 1 MiB in one request, by using the same memory eight times; 8 MiB is the most in flight.
    driver.poke(DATA, &header(0, 0));
    let mut table = Vec::new();
    let all = (0..16).map(|_| (DATA, 0x4000 * 8, WRITE | NEXT)).collect::<Vec<_>>();
    for (i, (addr, len, flags)) in [(DATA, 16, NEXT)]
        .into_iter()
        .chain(all[..8].iter().copied())
        .chain([(DATA + 0x800, 1, WRITE)])
        .enumerate()
    {
        table.extend([&addr.to_le_bytes()[..], &(len as u32).to_le_bytes(), &flags.to_le_bytes()].concat());
        table.extend((i as u16 + 1).to_le_bytes());
    }
    driver.poke(0x30000, &table);
    for head in 1..12 {
        driver.descriptor(0, head, (0x30000, table.len() as u32, INDIRECT, 0));
        driver.offer(0, head);
    }
    let bytes: u64 = driver
        .effects
        .disk
        .iter()
        .map(|r| match r.work {
            DiskWork::Read { len, .. } => len as u64,
            _ => 0,
        })
        .sum();
    assert_eq!((bytes, driver.effects.disk.len()), (8 << 20, 8));
    driver.cx(|device, cx| {
        device.apply(Input::DiskDone { slot: 3, id: 0, result: DiskResult::Read(vec![0; 1 << 20]) }, cx)
    });
    assert_eq!((driver.effects.disk.len(), driver.is_broken()), (9, false));
}

#[test]
fn a_reset_forgets_the_requests_in_flight() {
    let mut driver = disk();
    driver.poke(DATA, &header(4, 0));
    driver.chain(0, 0, &[(DATA, 16, false), (DATA + 0x800, 1, true)]);
    driver.start(VERSION_1);
    driver.cx(|device, cx| device.apply(Input::DiskDone { slot: 3, id: 0, result: DiskResult::Done }, cx));
    assert_eq!((driver.used(0).len(), driver.device.unfinished().len()), (0, 0));
    driver.poke(DATA, &header(4, 0));
    driver.chain(0, 0, &[(DATA, 16, false), (DATA + 0x800, 1, true)]);
    assert_eq!(driver.effects.disk[1].id, 1, "the numbers go on");
}

#[test]
fn entropy_is_asked_for_and_given() {
    let mut driver = Driver::new(Slot::Entropy);
    driver.chain(0, 0, &[(DATA, 10, true), (DATA + 0x100, 6, true)]);
    driver.chain(0, 2, &[(DATA + 0x200, 0x8000, true)]);
    let first = Question::Entropy { slot: 3, len: 16 };
    assert_eq!(driver.effects.question.take(), Some(first.clone()));
    assert!(!driver.cx(|device, cx| device.answer(&first, Answer::Entropy(vec![1; 15]), cx)));
    assert!(driver.cx(|device, cx| device.answer(&first, Answer::Entropy((0..16).collect()), cx)));
    assert_eq!((driver.used(0), driver.peek(DATA + 0x100, 6)), (vec![(0, 16)], (10..16).collect()));
    let second = driver.effects.question.take().unwrap();
    assert_eq!(second, Question::Entropy { slot: 3, len: 4096 });
    assert!(driver.cx(|device, cx| device.answer(&second, Answer::Entropy(vec![3; 4096]), cx)));
    assert_eq!((driver.used(0)[1], driver.effects.question.is_none()), ((2, 4096), true));
}

#[test]
fn a_console_prints_and_takes_what_is_typed() {
    let mut driver = Driver::new(Slot::Console);
    driver.poke(DATA, b"hello");
    driver.chain(1, 0, &[(DATA, 5, false)]);
    let console = Console::Virtio(3);
    assert_eq!(driver.effects.outputs, [Output::Console { console, bytes: b"hello".to_vec() }]);
    driver.chain(0, 0, &[(DATA, 4, true)]);
    driver.chain(0, 1, &[(DATA + 0x10, 4, true)]);
    driver.cx(|device, cx| device.apply(Input::Console { console, bytes: b"abcdef".to_vec() }, cx));
    assert_eq!(
        (driver.used(0), driver.peek(DATA, 4), driver.peek(DATA + 0x10, 2)),
        (vec![(0, 4), (1, 2)], b"abcd".to_vec(), b"ef".to_vec())
    );
}

#[test]
fn chains_that_make_no_sense_need_a_reset() {
    type Setup = fn(&mut Driver);
    let cases: [(&str, Setup); 9] = [
        ("a loop", |d| d.descriptor(1, 0, (DATA, 64, NEXT, 0))),
        ("outside of RAM", |d| d.descriptor(1, 0, (RAM - 10, 64, 0, 0))),
        ("in the device windows", |d| d.descriptor(1, 0, (0xd000_0000, 64, 0, 0))),
        ("an address that wraps", |d| d.descriptor(1, 0, (u64::MAX - 10, 64, 0, 0))),
        ("a next that does not exist", |d| d.descriptor(1, 0, (DATA, 64, NEXT, 16))),
        ("read after write", |d| {
            d.descriptor(1, 0, (DATA, 64, NEXT | WRITE, 1));
            d.descriptor(1, 1, (DATA, 64, 0, 0));
        }),
        ("an indirect table of an odd size", |d| d.descriptor(1, 0, (DATA, 17, INDIRECT, 0))),
        ("an indirect table in an indirect table", |d| {
            d.descriptor(1, 0, (DATA, 16, INDIRECT, 0));
            d.poke(DATA, &[&DATA.to_le_bytes()[..], &[16, 0, 0, 0, 4, 0, 0, 0]].concat());
        }),
        ("an indirect table longer than the queue", |d| {
            d.descriptor(1, 0, (DATA, 17 * 16, INDIRECT, 0));
            for i in 0..17u16 {
                let flags = if i < 16 { NEXT } else { 0 };
                let entry = [
                    &0x100u64.to_le_bytes()[..],
                    &64u32.to_le_bytes(),
                    &flags.to_le_bytes(),
                    &(i + 1).to_le_bytes(),
                ];
                d.poke(DATA + 16 * i as u64, &entry.concat());
            }
        }),
    ];
    for (what, setup) in cases {
        let mut driver = net();
        setup(&mut driver);
        driver.offer(1, 0);
        assert!(driver.is_broken(), "{what}");
        assert_eq!(
            (driver.effects.outputs.len(), driver.get(register::INTERRUPT_STATUS) & 2),
            (0, 2),
            "{what}"
        );
        // Nothing happens until the reset; after it the device works again.
        driver.descriptor(1, 0, (DATA, 64, 0, 0));
        driver.offer(1, 0);
        assert_eq!(driver.used(1).len(), 0, "{what}");
        driver.start(VERSION_1);
        driver.chain(1, 0, &[(DATA, 64, false)]);
        assert_eq!((driver.is_broken(), driver.effects.outputs.len()), (false, 1), "{what}");
    }
}

#[test]
fn rings_that_make_no_sense_need_a_reset() {
    let mut driver = net();
    // More chains than the ring holds.
    driver.avail[1] = 100;
    driver.offer(1, 0);
    assert!(driver.is_broken());
    for (offset, value) in [
        (register::QUEUE_DESC_HIGH, 1),
        (register::QUEUE_DRIVER_LOW, RAM as u32 - 4),
        (register::QUEUE_DEVICE_LOW, 0xd000_0000),
    ] {
        let mut driver = net();
        driver.set(register::QUEUE_SEL, 1);
        driver.set(register::QUEUE_READY, 0);
        driver.set(offset, value);
        driver.set(register::QUEUE_READY, 1);
        driver.set(register::QUEUE_NOTIFY, 1);
        assert!(driver.is_broken(), "{offset:#x}");
    }
}

#[test]
fn with_event_idx_the_driver_gets_interrupts_when_it_asked_for_them() {
    let mut driver = net();
    driver.start(VERSION_1 | EVENT_IDX);
    let used_event = RINGS + 0x2000 + 0x800 + 4 + 2 * 16;
    driver.poke(used_event, &1u16.to_le_bytes());
    driver.chain(1, 0, &[(DATA, 72, false)]);
    assert!(!driver.device.irq(), "not yet");
    driver.chain(1, 1, &[(DATA, 72, false)]);
    assert!(driver.device.irq());
    let avail_event = driver.peek(RINGS + 0x2000 + 0x1000 + 4 + 8 * 16, 2);
    assert_eq!(avail_event, [2, 0], "the device wants to be notified of the next chain");
}

#[test]
fn chains_given_back_before_event_idx_was_negotiated_do_not_count() {
    let run = |save: bool| {
        let mut driver = net();
        for head in 0..3 {
            driver.chain(1, head, &[(DATA, 72, false)]);
        }
        driver.set(register::INTERRUPT_ACK, 1);
        if save {
            let saved = postcard::to_stdvec(&driver.device).unwrap();
            driver.device = postcard::from_bytes(&saved).unwrap();
        }
        // The driver negotiates again without a reset.
        driver.set(register::STATUS, 3);
        driver.set(register::DRIVER_FEATURES_SEL, 0);
        driver.set(register::DRIVER_FEATURES, EVENT_IDX as u32);
        driver.set(register::QUEUE_SEL, 1);
        driver.set(register::QUEUE_READY, 0);
        driver.set(register::QUEUE_READY, 1);
        driver.set(register::STATUS, 15);
        driver.chain(1, 3, &[(DATA, 72, false)]);
        driver.device.irq()
    };
    assert_eq!(run(false), run(true));
}

proptest! {
    /// Whatever is in the rings: no panic, bounded outputs, the same result twice, and saving changes nothing.
    #[test]
    fn any_memory_is_survived(
        kind in 0usize..4,
        writes in prop::collection::vec((0u64..0x6000, any::<u64>()), 0..60),
        descriptors in prop::collection::vec((0u16..16, 0u64..RAM + 0x100, 0u32..0x900, 0u16..8, 0u16..18), 0..24),
        heads in prop::collection::vec((0usize..2, 0u16..18), 1..20),
    ) {
        let run = || {
            let config = [Slot::Net { mac: [0; 6] }, Slot::Disk { bytes: 1 << 20, read_only: false }, Slot::Entropy, Slot::Console];
            let mut driver = Driver::new(config[kind].clone());
            let queues = driver.device.queues.len();
            for &(at, value) in &writes {
                driver.poke(RINGS + at, &value.to_le_bytes());
            }
            for &(index, addr, len, flags, next) in &descriptors {
                (0..queues as u64).for_each(|queue| driver.descriptor(queue, index, (addr, len, flags, next)));
            }
            for &(queue, head) in &heads {
                driver.offer(queue % queues, head);
                driver.cx(|device, cx| device.apply(Input::Frame { slot: 3, bytes: vec![1; 99] }, cx));
                driver.cx(|device, cx| device.apply(Input::Console { console: Console::Virtio(3), bytes: vec![2; 50] }, cx));
                if let Some(question) = driver.effects.question.take() {
                    let Question::Entropy { len, .. } = question else { panic!("{question:?}") };
                    driver.cx(|device, cx| device.answer(&question, Answer::Entropy(vec![4; len as usize]), cx));
                }
                for request in std::mem::take(&mut driver.effects.disk) {
                    let result = match request.work {
                        DiskWork::Read { len, .. } => DiskResult::Read(vec![3; len as usize]),
                        _ => DiskResult::Done,
                    };
                    driver.cx(|device, cx| device.apply(Input::DiskDone { slot: 3, id: request.id, result }, cx));
                }
                let saved = postcard::to_stdvec(&driver.device).unwrap();
                driver.device = postcard::from_bytes(&saved).unwrap();
            }
            (driver.ram.digest(), driver.device, driver.effects.outputs)
        };
        let (first, second) = (run(), run());
        prop_assert!(first == second);
        prop_assert!(first.2.len() <= 1024 * 16);
    }
}
