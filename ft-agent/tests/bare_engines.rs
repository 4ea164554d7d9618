//! The bare guest runs on KVM and on the software CPU with the same inputs: at every exit both are in the
//! same state.

mod support;

use entry::{Answer, Console, DiskRequest, DiskResult, DiskWork, Input, Output, Position, Question};
use vmm::machine::Stop;
use vmm::vcpu::perf::events::CpuModel;
use vmm::{BootFile, BootFiles, BootPlan, Engine, Machine, MachineConfig, Slot};

const DISK_BYTES: usize = 256 << 10;
/// How many exits are compared.
const EXITS: u64 = 6_000;
/// After this many exits all of RAM is compared; at the others, the pages that were written.
const WHOLE_EVERY: u64 = 500;

/// A machine whose time stands still while its guest runs, as it does on KVM.
fn machine(engine: Engine, kernel: &[u8], command_line: &str) -> Machine {
    let slots = vec![
        Slot::Net { mac: [2, 0, 0, 0, 0, 1] },
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

/// Runs to the next exit of the guest, or to an earlier stop that has to be handled.
fn to_exit(machine: &mut Machine) -> Stop {
    let exits = |machine: &Machine| {
        let counts = machine.counts();
        counts.pio + counts.mmio + counts.halts
    };
    let before = exits(machine);
    loop {
        let next = Position::exact(machine.position().count + 1);
        // Only on KVM is an MSR access an exit.
        match machine.run(Some(next)).unwrap() {
            Stop::Reached if exits(machine) == before => {}
            stop => return stop,
        }
    }
}

/// The registers that must be equal on all engines. Positions, caches and the hidden parts of segments may
/// differ.
fn registers(machine: &Machine) -> Vec<(&'static str, u128)> {
    const OWN: [&str; 9] = [
        "other system registers",
        "x87",
        "tlb",
        "retired",
        "host",
        "interrupts since",
        "trace",
        "exits",
        "branches",
    ];
    let mut all = machine.vcpu_state().unwrap().registers();
    all.retain(|(name, _)| !OWN.contains(name));
    // The software CPU sets the status flags that the SDM leaves undefined as Intel's CPUs do.
    const STATUS: u128 = 0x8d5;
    let status = if CpuModel::host().vendor == "GenuineIntel" { 0 } else { STATUS };
    for (_, flags) in all.iter_mut().filter(|(name, _)| *name == "rflags") {
        *flags &= !status;
    }
    all
}

/// Parts of the machine's digest, without the vCPU.
fn parts(machine: &mut Machine, whole: bool) -> Vec<(&'static str, entry::Digest)> {
    let digest = if whole { machine.full_digest() } else { machine.digest() };
    let mut parts = digest.unwrap().parts;
    parts.retain(|(name, _)| *name != "vcpu");
    parts
}

fn perform(disk: &mut [u8], request: DiskRequest) -> Input {
    let result = match request.work {
        DiskWork::Read { offset, len } => DiskResult::Read(disk[offset as usize..][..len as usize].to_vec()),
        DiskWork::Write { offset, data } => {
            disk[offset as usize..][..data.len()].copy_from_slice(&data);
            DiskResult::Done
        }
        DiskWork::Flush => DiskResult::Done,
    };
    Input::DiskDone { slot: request.slot, id: request.id, result }
}

/// The input that arrives after the exit with this number.
fn input(exit: u64) -> Option<Input> {
    let line = |text: String| Input::Console { console: Console::Serial, bytes: text.into_bytes() };
    match exit % 97 {
        13 => Some(line(format!("add {exit}\n"))),
        // Who has 10.0.0.2?
        50 => Some(Input::Frame {
            slot: 0,
            bytes: [
                &[0xff; 6][..],
                &[2, 0, 0, 0, 0, 9, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 9, 10, 0, 0, 1],
                &[0, 0, 0, 0, 0, 0, 10, 0, 0, 2],
            ]
            .concat(),
        }),
        _ => None,
    }
}

/// Compares a workload on both engines. Returns the number of exits, outputs and disk requests.
fn compare(kernel: &[u8], command_line: &str) -> (u64, usize, usize) {
    let mut both = [Engine::KvmSync, Engine::SoftCounter].map(|engine| machine(engine, kernel, command_line));
    let mut disk = vec![0x5a; DISK_BYTES];
    let (mut outputs, mut requests) = (0, 0);
    for exit in 0..EXITS {
        let stops = both.each_mut().map(to_exit);
        assert_eq!(stops[0], stops[1], "{command_line}, exit {exit}");
        if let Stop::Question(Question::Entropy { len, .. }) = &stops[0] {
            for machine in &mut both {
                machine.answer(Answer::Entropy(vec![exit as u8; *len as usize])).unwrap();
                assert_eq!(machine.finish_instruction().unwrap().filter(|s| *s != Stop::Outputs), None);
            }
        }
        let said: [Vec<Output>; 2] = both.each_mut().map(Machine::take_outputs);
        assert_eq!(said[0], said[1], "{command_line}, exit {exit}");
        outputs += said[0].len();
        let asked = both.each_mut().map(Machine::take_disk_requests);
        assert_eq!(asked[0], asked[1], "{command_line}, exit {exit}");
        requests += asked[0].len();
        let [asked, _] = asked;
        let done = asked.into_iter().map(|request| perform(&mut disk, request));
        for input in done.chain(input(exit)).collect::<Vec<_>>() {
            both.iter_mut().for_each(|machine| machine.apply(input.clone()));
        }
        assert_eq!(registers(&both[0]), registers(&both[1]), "{command_line}, exit {exit}");
        let [kvm, soft] = both.each_mut().map(|machine| parts(machine, exit % WHOLE_EVERY == 0));
        assert_eq!(kvm, soft, "{command_line}, exit {exit}");
        if matches!(stops[0], Stop::End(_)) {
            return (exit, outputs, requests);
        }
    }
    (EXITS, outputs, requests)
}

#[test]
fn the_bare_guest_is_in_the_same_state_at_every_exit() {
    const TEST: &str = "the_bare_guest_is_in_the_same_state_at_every_exit";
    if !support::has_kvm(TEST) || !support::has_guest(TEST, "bare") {
        return;
    }
    let kernel = std::fs::read(support::image("bare", "kernel")).unwrap();
    let ip = "ip=10.0.0.2:::255.255.255.0";
    let serve = compare(&kernel, &format!("workload=serve seed=3 hz=100 {ip}"));
    let disk = compare(&kernel, "workload=disk mib=1 seed=5 hz=250");
    eprintln!("{TEST}: (exits, outputs, disk requests) {serve:?} {disk:?}");
    assert!(serve.0 == EXITS && serve.1 > 50 && disk.0 == EXITS && disk.2 > 5, "{serve:?} {disk:?}");
}
