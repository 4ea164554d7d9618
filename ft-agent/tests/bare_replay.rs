//! The bare guest in this process, with random inputs at random moments: what is recorded is replayed to the
//! same state.
//!
//! VMFT_CASES is the number of cases (2,000 by default), VMFT_FIRST_CASE the number of the first: a case
//! depends on its number alone.

mod support;

use std::collections::VecDeque;
use std::convert::Infallible;

use entry::{
    Answer, Console, DiskRequest, DiskResult, DiskWork, Input, Output, Position, PositionUnit, Question,
};
use vmm::guest_loop::Turn;
use vmm::machine::StateDigest;
use vmm::record::{LogIntervals, Recorder};
use vmm::replay::{Replayer, Standby};
use vmm::source::{Live, Outside, PlannedStops};
use vmm::{BootFile, BootFiles, BootPlan, Engine, GuestLoop, Machine, MachineConfig, Slot};

use support::log::{MemoryLog, MemoryRecords};

const NET: u8 = 0;
const DISK: u8 = 1;
const DISK_BYTES: usize = 256 << 10;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// Splitmix64.
#[derive(Clone)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn bytes(&mut self, len: u64) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// A disk image in memory.
struct MemoryDisk(Vec<u8>);

impl MemoryDisk {
    fn perform(&mut self, work: &DiskWork) -> DiskResult {
        match work {
            DiskWork::Read { offset, len } => {
                DiskResult::Read(self.0[*offset as usize..][..*len as usize].to_vec())
            }
            DiskWork::Write { offset, data } => {
                self.0[*offset as usize..][..data.len()].copy_from_slice(data);
                DiskResult::Done
            }
            DiskWork::Flush => DiskResult::Done,
        }
    }
}

/// An outside that does, at random, everything that an outside may do.
struct RandomOutside {
    random: Random,
    disk: MemoryDisk,
    /// Completions that have not arrived yet. They arrive in any order.
    done: Vec<Input>,
    waiting: VecDeque<Input>,
    /// How many more inputs may arrive; zero for a quiet outside.
    inputs_left: u64,
    now_ns: u64,
    clock: bool,
}

impl RandomOutside {
    /// Lets an input arrive, now and then.
    fn arrive(&mut self) {
        let r = &mut self.random;
        if self.inputs_left > 0 && r.one_in(3) {
            self.inputs_left -= 1;
            self.waiting.push_back(if r.one_in(2) { typed(r) } else { frame(r) });
        }
        if !self.done.is_empty() && r.one_in(2) {
            let at = r.below(self.done.len() as u64) as usize;
            self.waiting.push_back(self.done.swap_remove(at));
        }
    }
}

/// A line for the counter, or part of one, or random bytes.
fn typed(r: &mut Random) -> Input {
    let bytes = match r.below(40) {
        0 => b"reboot\n".to_vec(),
        1 => b"poweroff\n".to_vec(),
        2..20 => format!("add {}\n", r.below(1000)).into_bytes(),
        20..30 => b"get\n"[r.below(4) as usize..].to_vec(),
        _ => {
            let len = 1 + r.below(64);
            r.bytes(len)
        }
    };
    Input::Console { console: Console::Serial, bytes }
}

/// A frame that the guest answers, or one that is slightly damaged, or random bytes.
fn frame(r: &mut Random) -> Input {
    let mut bytes = match r.below(4) {
        0 => {
            let len = 14 + r.below(1505);
            r.bytes(len)
        }
        1 => [
            // Who has 10.0.0.2?
            &[0xff; 6][..],
            &[2, 0, 0, 0, 0, 9, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 9, 10, 0, 0, 1],
            &[0, 0, 0, 0, 0, 0, 10, 0, 0, 2],
        ]
        .concat(),
        _ => ping(r),
    };
    if r.one_in(8) {
        let at = r.below(bytes.len() as u64) as usize;
        bytes[at] ^= 1 << r.below(8);
    }
    Input::Frame { slot: NET, bytes }
}

/// An ICMP echo request.
fn ping(r: &mut Random) -> Vec<u8> {
    let data_len = 2 * r.below(200);
    let len = (28 + data_len) as u16;
    let mut ip =
        [&[0x45, 0][..], &len.to_be_bytes(), &[0, 7, 0, 0, 64, 1, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]].concat();
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum);
    let mut icmp = [&[8, 0, 0, 0, 0, 1, 0, 2][..], &r.bytes(data_len)].concat();
    let sum = checksum(&icmp);
    icmp[2..4].copy_from_slice(&sum);
    [&MAC[..], &[2, 0, 0, 0, 0, 9, 8, 0], &ip, &icmp].concat()
}

fn checksum(bytes: &[u8]) -> [u8; 2] {
    let sum = bytes.chunks_exact(2).fold(0u32, |sum, b| sum + u32::from(u16::from_be_bytes([b[0], b[1]])));
    let sum = (sum >> 16) + (sum & 0xffff);
    (!(sum + (sum >> 16)) as u16).to_be_bytes()
}

impl Outside for RandomOutside {
    type Error = Infallible;

    fn poll(&mut self, takes: &mut dyn FnMut(&Input) -> bool) -> Result<Option<Input>, Infallible> {
        self.arrive();
        Ok(if self.waiting.front().is_some_and(takes) { self.waiting.pop_front() } else { None })
    }

    fn stop_requested(&mut self) -> bool {
        false
    }

    fn time_ns(&mut self) -> Option<u64> {
        self.now_ns += self.random.below(3_000_000);
        self.clock.then_some(self.now_ns)
    }

    fn wait(&mut self, until_ns: Option<u64>) -> Result<(), Infallible> {
        let far = until_ns.map_or(1_000_000, |until| until.saturating_sub(self.now_ns) + 1);
        self.now_ns += 1 + self.random.below(far);
        Ok(())
    }

    fn answer(&mut self, _at: Position, question: &Question) -> Result<Answer, Infallible> {
        let Question::Entropy { len, .. } = question else { panic!("{question:?}") };
        Ok(Answer::Entropy(self.random.bytes((*len).into())))
    }

    fn send(&mut self, _output: Output) -> Result<(), Infallible> {
        Ok(())
    }

    fn disk(&mut self, request: DiskRequest) -> Result<(), Infallible> {
        let result = self.disk.perform(&request.work);
        self.done.push(Input::DiskDone { slot: DISK, id: request.id, result });
        Ok(())
    }

    fn digest(&mut self, _at: Position, _digest: StateDigest) -> Result<(), Infallible> {
        Ok(())
    }
}

/// The replaying side's copy of the disk.
struct DiskCopy {
    disk: MemoryDisk,
    results: Vec<(u64, DiskResult)>,
}

impl Standby for DiskCopy {
    type Error = Infallible;

    fn start(&mut self, request: DiskRequest) -> Result<(), Infallible> {
        self.results.push((request.id, self.disk.perform(&request.work)));
        Ok(())
    }

    fn finish(&mut self, _slot: u8, id: u64) -> Result<Option<DiskResult>, Infallible> {
        let at = self.results.iter().position(|(i, _)| *i == id);
        Ok(at.map(|at| self.results.swap_remove(at).1))
    }

    fn output(&mut self, _output: Output) -> Result<(), Infallible> {
        Ok(())
    }
}

fn machine(engine: Engine, kernel: &[u8], command_line: &str) -> Machine {
    let slots = vec![
        Slot::Net { mac: MAC },
        Slot::Disk { bytes: DISK_BYTES as u64, read_only: false },
        Slot::Entropy,
    ];
    let config = MachineConfig { engine, memory_bytes: 16 << 20, epoch_s: 0, slots };
    let kernel = BootFile::new("bare", kernel.to_vec());
    let (initrd, command_line, seed) = (None, command_line.into(), Some([7; 32]));
    let files = BootFiles { kernel, initrd, command_line, seed, rewrite: false };
    let plan = BootPlan::new(&files, &config).unwrap();
    Machine::new(config, plan).unwrap()
}

/// Runs to position `end` or to the guest's end, with pauses on the way at which nothing is done.
fn run<S>(
    guest: &mut GuestLoop<S>,
    pause_at: impl Fn(&mut S, Option<Position>),
    mut pauses: Random,
    end: Option<u64>,
) -> Turn
where
    S: vmm::source::Source,
{
    let pausing = pauses.one_in(2);
    loop {
        let at = guest.machine.position().count;
        if end.is_some_and(|end| at >= end) {
            return Turn::Paused;
        }
        let pause = pausing.then(|| at + 1 + pauses.below(30_000));
        let pause = pause.into_iter().chain(end).min();
        pause_at(&mut guest.source, pause.map(Position::exact));
        match guest.run().unwrap() {
            Turn::Paused if pause == Some(guest.machine.position().count) => {}
            turn => return turn,
        }
    }
}

/// Runs a case. Returns the number of records, the number of instructions, and whether the guest ended by
/// itself.
fn case(number: u64, kernel: &[u8]) -> (usize, u64, bool) {
    let mut r = Random(number);
    let workload = ["serve", "serve", "serve", "disk mib=1", "random", "mem mib=1", "spin every=20000"];
    let workload = workload[r.below(7) as usize];
    let command_line = format!(
        "workload={workload} seed={} hz={} ip=10.0.0.2:::255.255.255.0",
        r.below(99),
        19 + r.below(980)
    );
    let disk: Vec<u8> = r.bytes(64).into_iter().cycle().take(DISK_BYTES).collect();
    let clock = r.one_in(2);
    let world = RandomOutside {
        random: Random(r.next()),
        disk: MemoryDisk(disk.clone()),
        done: Vec::new(),
        waiting: VecDeque::new(),
        inputs_left: r.below(60),
        now_ns: 0,
        clock,
    };
    let mut digests: Vec<u64> = (0..r.below(5)).map(|_| r.below(1_500_000)).collect();
    digests.sort_unstable();
    let stops = PlannedStops { digests: digests.into_iter().map(Position::exact).collect(), pause: None };
    let live = Live::new(world, PositionUnit::Instructions, stops);
    let pace = if r.one_in(2) { LogIntervals::FILE } else { LogIntervals::BACKUP };
    let source = Recorder::new(live, MemoryLog::default(), pace);
    let mut recording = GuestLoop { machine: machine(Engine::Soft, kernel, &command_line), source };
    let end = 50_000 + r.below(1_500_000);
    let turn = run(&mut recording, |s, at| s.live().pause_at(at), Random(r.next()), Some(end));
    if turn == Turn::Paused {
        recording.source.stop(&mut recording.machine).unwrap();
    }
    let log = std::mem::take(&mut recording.source.log().0);
    let records = log.len();
    let copy = DiskCopy { disk: MemoryDisk(disk), results: Vec::new() };
    let source = Replayer::new(MemoryRecords(log.into_iter()), copy);
    // The interpreter has to replay what translated code has recorded.
    let engine = if number.is_multiple_of(2) { Engine::Soft } else { Engine::Interpreter };
    let mut replay = GuestLoop { machine: machine(engine, kernel, &command_line), source };
    let replayed = run(&mut replay, Replayer::pause_at, Random(r.next()), None);
    assert_eq!(replayed, turn);
    assert!(replay.source.is_done());
    let at = recording.machine.position();
    assert_eq!((replay.machine.position(), replay.source.equal_until()), (at, Some(at)));
    let (ours, theirs) = (replay.machine.full_digest().unwrap(), recording.machine.full_digest().unwrap());
    assert_eq!(ours.differences(&theirs), [""; 0]);
    (records, at.count, turn != Turn::Paused)
}

#[test]
fn random_inputs_at_random_moments_are_replayed() {
    const TEST: &str = "random_inputs_at_random_moments_are_replayed";
    if !support::has_guest(TEST, "bare") {
        return;
    }
    let kernel = &std::fs::read(support::image("bare", "kernel")).unwrap();
    let number = |name| std::env::var(name).ok().and_then(|n| n.parse().ok());
    let (first, cases) = (number("VMFT_FIRST_CASE").unwrap_or(0), number("VMFT_CASES").unwrap_or(2000));
    let threads = std::thread::available_parallelism().map_or(1, usize::from) as u64;
    let work = |thread: u64| {
        let (mut records, mut instructions, mut ended) = (0, 0, 0);
        for n in (first..first + cases).filter(|n| n % threads == thread) {
            let result = std::panic::catch_unwind(|| case(n, kernel));
            let (r, i, e) = result.unwrap_or_else(|_| panic!("case {n} (VMFT_FIRST_CASE={n} VMFT_CASES=1)"));
            (records, instructions, ended) = (records + r, instructions + i, ended + u64::from(e));
        }
        (records, instructions, ended)
    };
    let (records, instructions, ended) = std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|thread| scope.spawn(move || work(thread))).collect();
        let results = running.into_iter().map(|t| t.join().expect("a case failed"));
        results.fold((0, 0, 0), |a, b| (a.0 + b.0, a.1 + b.1, a.2 + b.2))
    });
    eprintln!("{TEST}: {cases} cases, {records} records, {instructions} instructions, {ended} guests ended");
    assert!(records > 20 * cases as usize && (cases < 100 || ended > 0));
}
