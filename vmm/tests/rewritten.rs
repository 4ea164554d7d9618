//! A guest that reads the time and random numbers, on engines that cannot trap these instructions: they were rewritten to be
//! exits, and their results are in the log.

mod guest;
mod vcpu;

use entry::log::Entry;
use entry::{Answer, End};
use iced_x86::code_asm::*;
use vmm::guest_loop::Turn;
use vmm::record::{LogIntervals, Recorder};
use vmm::source::{Live, PlannedStops};
use vmm::{Engine, GuestLoop, Machine};

use guest::log::{MemoryLog, replay};
use guest::world::World;
use guest::{BASE, assemble, machine_on, out, total};
use vcpu::has_kvm;

const RESULTS: u64 = 0x28_0000;
const ROUNDS: u64 = 5;

/// A guest that stores its results, round by round: RDTSC, RDTSCP with RCX, RDRAND with its flags, RDSEED of 16 bits, RDPMC.
fn image() -> Vec<u8> {
    assemble(BASE, |a| {
        a.mov(rsp, 0x30_0000u64)?;
        a.mov(rdi, RESULTS)?;
        a.mov(r15d, ROUNDS as u32)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        a.mov(qword_ptr(rdi), rax)?;
        a.rdtscp()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        a.mov(qword_ptr(rdi + 8), rax)?;
        a.mov(qword_ptr(rdi + 16), rcx)?;
        a.rdrand(r11)?;
        a.pushfq()?;
        a.pop(rbx)?;
        a.mov(qword_ptr(rdi + 24), r11)?;
        a.mov(qword_ptr(rdi + 32), rbx)?;
        a.rdseed(bx)?;
        a.mov(qword_ptr(rdi + 40), rbx)?;
        a.xor(ecx, ecx)?;
        a.rdpmc()?;
        a.mov(qword_ptr(rdi + 48), rax)?;
        // An OUT to the port that is not a rewritten instruction does nothing.
        a.out(0xeb, al)?;
        a.add(rdi, 56)?;
        a.dec(r15d)?;
        a.jnz(again)?;
        out(a, 0x604, 0x34)
    })
}

fn results(machine: &mut Machine) -> Vec<u64> {
    let at = RESULTS as usize;
    let bytes = machine.ram().as_mut_slice()[at..at + 56 * ROUNDS as usize].to_vec();
    bytes.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)).collect()
}

/// The results that the guest has stored, in a recording that was also replayed.
fn told(engine: Engine) -> Vec<u64> {
    let machine = machine_on(engine, &image(), Vec::new());
    let counts = machine.rewritten().unwrap().instructions.clone();
    assert_eq!(counts, [("rdtsc", 1), ("rdtscp", 1), ("rdrand", 1), ("rdseed", 1), ("rdpmc", 1)].into());
    let world = World { told: Some(0x1_0000_0001), ..World::default() };
    let live = Live::new(world, engine.unit(), PlannedStops::default());
    let mut recorded =
        GuestLoop { machine, source: Recorder::new(live, MemoryLog::default(), LogIntervals::FILE) };
    assert_eq!(recorded.run().unwrap(), Turn::Finished(End::PowerOff), "{engine:?}");
    let log = recorded.source.log().0.clone();
    let values = log.iter().filter(|r| matches!(r.entry, Entry::Answer(Answer::Value(_))));
    assert_eq!(values.count() as u64, 5 * ROUNDS, "{engine:?}");
    let mut again = replay(machine_on(engine, &image(), Vec::new()), log);
    assert_eq!(again.run().unwrap(), Turn::Finished(End::PowerOff), "{engine:?}");
    assert_eq!(total(&mut again.machine), total(&mut recorded.machine), "{engine:?}");
    results(&mut recorded.machine)
}

#[test]
fn the_results_of_rewritten_instructions_are_answers_in_the_log() {
    let soft = told(Engine::Soft);
    // Each answer moves guest time forward, also on engines on which nothing else does.
    let times: Vec<_> = soft.chunks(7).flat_map(|round| [round[0], round[1]]).collect();
    assert!(times.is_sorted() && times[0] > 0x1_0000_0000, "{times:x?}");
    assert!(
        soft.chunks(7)
            .all(|round| round[2] == 0 && round[4] & 0x8d5 == 1 && round[5] >> 16 == round[4] >> 16)
    );
    assert_eq!(told(Engine::SoftCounter), soft);
    if has_kvm("the_results_of_rewritten_instructions_are_answers_in_the_log") {
        for engine in [Engine::KvmSync, Engine::KvmStep, Engine::KvmStepCounter] {
            assert_eq!(told(engine), soft, "{engine:?}");
        }
    }
}
