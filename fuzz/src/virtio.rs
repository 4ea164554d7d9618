//! The virtio devices, used by a driver whose program is the fuzzer's bytes.

use entry::{Answer, Console, DiskResult, DiskWork, Input, Output, Question};
use vm_memory::{Bytes, GuestAddress};
use vmm::Slot;
use vmm::devices::virtio::VirtioMmio;
use vmm::devices::{DeviceContext, Effects};
use vmm::ram::Ram;

const RAM: u64 = 0x20000;
const SLOT: u8 = 1;

struct Program<'a>(&'a [u8]);

impl Program<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn number(&mut self, bytes: usize) -> u64 {
        (0..bytes).fold(0, |value, i| value | (self.byte().unwrap_or(0) as u64) << (8 * i))
    }
}

struct Driver {
    ram: Ram,
    device: VirtioMmio,
    effects: Effects,
    avail: [u16; 2],
}

impl Driver {
    fn new(config: &Slot) -> Driver {
        let ram = Ram::new(RAM).unwrap();
        let mut driver =
            Driver { ram, device: VirtioMmio::new(SLOT, config), effects: Effects::default(), avail: [0; 2] };
        driver.start(1 << 32);
        driver
    }

    fn cx<R>(&mut self, work: impl FnOnce(&mut VirtioMmio, &mut DeviceContext<'_>) -> R) -> R {
        let mut cx = DeviceContext { now_ns: 0, memory: self.ram.memory(), effects: &mut self.effects };
        work(&mut self.device, &mut cx)
    }

    fn set(&mut self, offset: u64, value: u32) {
        self.cx(|device, cx| device.write(offset, 4, value.into(), cx));
    }

    /// A well-behaved start: queue `q` of 16 entries with its rings from 0x1000 + 0x2000 q on.
    fn start(&mut self, features: u64) {
        self.avail = [0; 2];
        self.set(0x70, 0);
        self.set(0x70, 3);
        for half in 0..2 {
            self.set(0x24, half);
            self.set(0x20, (features >> (32 * half)) as u32);
        }
        self.set(0x70, 11);
        for queue in 0..2 {
            let rings = 0x1000 + 0x2000 * queue;
            let registers = [
                (0x30, queue),
                (0x38, 16),
                (0x80, rings),
                (0x90, rings + 0x800),
                (0xa0, rings + 0x1000),
                (0x44, 1),
            ];
            registers.into_iter().for_each(|(offset, value)| self.set(offset, value));
        }
        self.set(0x70, 15);
    }

    fn poke(&self, at: u64, bytes: &[u8]) {
        // A write that does not fit into RAM is left out.
        if let Err(error) = self.ram.memory().write_slice(bytes, GuestAddress(at)) {
            assert!(at + bytes.len() as u64 > RAM, "{error}");
        }
    }

    fn offer(&mut self, queue: usize, head: u16) {
        let ring = 0x1800 + 0x2000 * queue as u64;
        self.poke(ring + 4 + 2 * (self.avail[queue] as u64 % 16), &head.to_le_bytes());
        self.avail[queue] = self.avail[queue].wrapping_add(1);
        self.poke(ring + 2, &self.avail[queue].to_le_bytes());
        self.set(0x50, queue as u32);
    }

    /// Runs one step of the program. Returns false at its end.
    fn step(&mut self, program: &mut Program<'_>) -> bool {
        let Some(op) = program.byte() else { return false };
        match op % 9 {
            0 => {
                let offset = program.number(1) * 4;
                self.set(offset, program.number(4) as u32);
            }
            1 => {
                let (at, value) = (program.number(3) % RAM, program.number(8));
                self.poke(at, &value.to_le_bytes());
            }
            2 => {
                // A descriptor: 3 bytes of address, 2 of length, flags, next; in a queue's table or an indirect one.
                let (table, index) = (program.number(1), program.number(1) % 32);
                let table = [0x1000, 0x3000, 0x8000, 0x9000][table as usize % 4];
                let addr = program.number(3) % (RAM + 0x1000);
                let (len, flags, next) =
                    (program.number(2) as u32, program.number(1) as u16 & 7, program.number(1) as u16 % 34);
                let bytes =
                    [&addr.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()]
                        .concat();
                self.poke(table + 16 * index, &bytes);
            }
            3 => self.offer((program.number(1) & 1) as usize, program.number(1) as u16 % 18),
            4 => {
                let bytes = vec![7; program.number(2) as usize % 1600];
                self.cx(|device, cx| device.apply(Input::Frame { slot: SLOT, bytes }, cx));
            }
            5 => {
                let bytes = vec![8; program.number(1) as usize];
                let console = Console::Virtio(SLOT);
                self.cx(|device, cx| device.apply(Input::Console { console, bytes }, cx));
            }
            6 => self.complete(program.number(1) as u8),
            7 => self.start(1 << 32 | (program.number(1) & 3) << 28),
            _ => {
                let (offset, size) =
                    (program.number(2) % 0x200, [1, 2, 4, 8][program.number(1) as usize % 4]);
                self.device.read(offset, size);
                let saved = postcard::to_stdvec(&self.device).unwrap();
                assert!(postcard::from_bytes::<VirtioMmio>(&saved).unwrap() == self.device);
            }
        }
        true
    }

    /// Completes a disk request, rightly or wrongly.
    fn complete(&mut self, how: u8) {
        let requests = self.device.unfinished();
        let Some(request) = requests.get(how as usize % requests.len().max(1)) else { return };
        let result = match (how >> 6, &request.work) {
            (0, _) => DiskResult::Failed,
            (1, _) => DiskResult::Read(vec![1; 5]),
            (_, DiskWork::Read { len, .. }) => DiskResult::Read(vec![9; *len as usize]),
            _ => DiskResult::Done,
        };
        let id = request.id;
        self.cx(|device, cx| device.apply(Input::DiskDone { slot: SLOT, id, result }, cx));
    }

    /// Checks that what left the machine is within its bounds, and answers questions.
    fn check(&mut self) {
        while let Some(question) = self.effects.question.take() {
            let Question::Entropy { slot, len } = question else { panic!("{question:?}") };
            assert!(slot == SLOT && (1..=4096).contains(&len));
            assert!(self.cx(|device, cx| device.answer(
                &question,
                Answer::Entropy(vec![6; len as usize]),
                cx
            )));
        }
        for output in self.effects.outputs.drain(..) {
            match output {
                Output::Frame { bytes, .. } => assert!((14..=1518).contains(&bytes.len())),
                Output::Console { bytes, .. } => assert!((1..=4096).contains(&bytes.len())),
            }
        }
        for request in self.effects.disk.drain(..) {
            let (offset, len) = match &request.work {
                DiskWork::Read { offset, len } => (*offset, *len as u64),
                DiskWork::Write { offset, data } => (*offset, data.len() as u64),
                DiskWork::Flush => (0, 0),
            };
            assert!(len <= 4 << 20 && offset + len <= 1 << 20 && len % 512 == 0 && offset % 512 == 0);
        }
    }
}

/// Runs a driver's program twice: it never panics, stays within bounds and comes to the same state.
fn virtio(config: &Slot, data: &[u8]) {
    let run = || {
        let mut driver = Driver::new(config);
        let mut program = Program(data);
        for _ in 0..300 {
            if !driver.step(&mut program) {
                break;
            }
            driver.check();
        }
        (driver.ram.digest(), driver.device)
    };
    assert!(run() == run());
}

/// The network device: a driver runs the program twice, which must not panic and must come to the same state.
///
/// # Panics
/// The device misbehaves.
pub fn virtio_net(data: &[u8]) {
    virtio(&Slot::Net { mac: [2; 6] }, data);
}

/// The block device: a driver runs the program twice, which must not panic and must come to the same state.
///
/// # Panics
/// The device misbehaves.
pub fn virtio_blk(data: &[u8]) {
    virtio(&Slot::Disk { bytes: 1 << 20, read_only: false }, data);
}

/// The entropy device: a driver runs the program twice, which must not panic and must come to the same state.
///
/// # Panics
/// The device misbehaves.
pub fn virtio_rng(data: &[u8]) {
    virtio(&Slot::Entropy, data);
}

/// The console: a driver runs the program twice, which must not panic and must come to the same state.
///
/// # Panics
/// The device misbehaves.
pub fn virtio_console(data: &[u8]) {
    virtio(&Slot::Console, data);
}
