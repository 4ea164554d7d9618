//! The project's own Linux kernel, rewritten for engines that cannot trap the instructions that read the time
//! or random numbers.

mod support;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::process::Command;

use entry::log::Entry;
use entry::{Answer, DiskRequest, Input, Output, Position, PositionUnit, Question};
use vmm::boot::rewrite::rewrite;
use vmm::guest_loop::Turn;
use vmm::machine::StateDigest;
use vmm::record::{LogIntervals, Recorder};
use vmm::source::{Live, Outside, PlannedStops};
use vmm::{BootFile, BootFiles, BootPlan, Engine, GuestLoop, Machine, MachineConfig};

use support::log::{MemoryLog, replay};

/// How often objdump, which is not our disassembler, finds each of the instructions.
fn objdump(kernel: &std::path::Path) -> BTreeMap<String, usize> {
    let output = Command::new("objdump").args(["-d", "--no-show-raw-insn"]).arg(kernel).output().unwrap();
    let mut found = BTreeMap::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let mnemonic = line.split('\t').nth(1).and_then(|i| i.split_whitespace().next()).unwrap_or_default();
        if ["rdtsc", "rdtscp", "rdrand", "rdseed", "rdpmc"].contains(&mnemonic) {
            *found.entry(mnemonic.to_owned()).or_default() += 1;
        }
    }
    found
}

#[test]
fn every_site_of_the_kernel_is_rewritten() {
    const TEST: &str = "every_site_of_the_kernel_is_rewritten";
    if !support::has_guest(TEST, "linux") {
        return;
    }
    let kernel = support::image("linux", "kernel");
    let (file, rewritten) = rewrite(&std::fs::read(&kernel).unwrap()).expect("a vmlinux");
    assert!(rewritten.not_rewritten.is_empty(), "{rewritten}");
    assert!(rewritten.instructions["rdtsc"] > 40, "{rewritten}");
    // The kernel copies its alternative instructions to their places, so there are more sites than
    // instructions.
    assert!(rewritten.sites.iter().count() > rewritten.instructions.values().sum::<usize>());
    assert!(rewrite(&file).unwrap().1.instructions.is_empty());
    if support::has("objdump") {
        let ours = rewritten.instructions.iter().map(|(name, n)| ((*name).to_owned(), *n));
        assert_eq!(ours.collect::<BTreeMap<_, _>>(), objdump(&kernel));
    }
}

/// An outside without a clock, which only answers the guest's questions.
#[derive(Default)]
struct QuietOutside {
    printed: Vec<u8>,
    asked: u64,
}

impl Outside for QuietOutside {
    type Error = Infallible;

    fn poll(&mut self, _takes: &mut dyn FnMut(&Input) -> bool) -> Result<Option<Input>, Infallible> {
        Ok(None)
    }

    fn stop_requested(&mut self) -> bool {
        false
    }

    fn time_ns(&mut self) -> Option<u64> {
        None
    }

    fn wait(&mut self, _until_ns: Option<u64>) -> Result<(), Infallible> {
        Ok(())
    }

    fn answer(&mut self, _at: Position, question: &Question) -> Result<Answer, Infallible> {
        self.asked += 1;
        Ok(Answer::Value(match question {
            Question::Time { time_ns } => time_ns + 700 + self.asked % 600,
            _ => self.asked.wrapping_mul(0x9e37_79b9_7f4a_7c15),
        }))
    }

    fn send(&mut self, output: Output) -> Result<(), Infallible> {
        if let Output::Console { bytes, .. } = output {
            self.printed.extend(bytes);
        }
        Ok(())
    }

    fn disk(&mut self, request: DiskRequest) -> Result<(), Infallible> {
        panic!("{request:?}")
    }

    fn digest(&mut self, _at: Position, _digest: StateDigest) -> Result<(), Infallible> {
        Ok(())
    }
}

/// How many instructions of the boot are run. By then the kernel has set itself up and replaced its
/// alternatives.
const BOOT: u64 = 250_000_000;

/// A machine with the kernel as an engine on KVM gets it, but on the software CPU.
fn machine() -> Machine {
    let kernel = support::image("linux", "kernel");
    let config =
        MachineConfig { engine: Engine::Soft, memory_bytes: 128 << 20, epoch_s: 0, slots: Vec::new() };
    let files = BootFiles {
        kernel: BootFile::new("linux", std::fs::read(kernel).unwrap()),
        initrd: None,
        command_line: "console=ttyS0 earlyprintk=ttyS0 panic=-1".into(),
        seed: Some([7; 32]),
        rewrite: true,
    };
    let plan = BootPlan::new(&files, &config).unwrap();
    Machine::new(config, plan).unwrap()
}

#[test]
fn the_rewritten_kernel_boots_and_is_replayed() {
    const TEST: &str = "the_rewritten_kernel_boots_and_is_replayed";
    if !support::has_guest(TEST, "linux") {
        return;
    }
    let stops = PlannedStops { pause: Some(Position::exact(BOOT)), ..PlannedStops::default() };
    let live = Live::new(QuietOutside::default(), PositionUnit::Instructions, stops);
    let source = Recorder::new(live, MemoryLog::default(), LogIntervals::FILE);
    let mut recorded = GuestLoop { machine: machine(), source };
    assert_eq!(recorded.run().unwrap(), Turn::Paused);
    recorded.source.stop(&mut recorded.machine).unwrap();
    let printed = std::mem::take(&mut recorded.source.live().outside().printed);
    let printed = String::from_utf8_lossy(&printed);
    let log = std::mem::take(&mut recorded.source.log().0);
    let told = log.iter().filter(|r| matches!(r.entry, Entry::Answer(Answer::Value(_)))).count();
    eprintln!("{TEST}: asked {told} times, {} bytes printed", printed.len());
    assert!(told > 100 && printed.contains("Linux version"), "{told} {printed}");
    let mut replay = replay(machine(), log);
    assert_eq!(replay.run().unwrap(), Turn::Paused);
    assert_eq!(replay.source.equal_until(), Some(recorded.machine.position()));
    assert!(replay.source.is_done());
}
