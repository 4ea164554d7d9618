//! `workload=disk`.

use crate::ram::Free;
use crate::virtio::blk::{CHUNK_LEN, Disk, Kind};
use crate::{cpu, println};
use bare::options::Options;
use bare::pattern::word;

const CHUNK_WORDS: u64 = CHUNK_LEN / 8;

/// Each pass writes the sequence of `seed + pass` over the disk, flushes, and reads it back.
pub fn run(options: &Options, mut free: Free) {
    let mut disk = Disk::find(&options.devices, &mut free).expect("no virtio-blk device on the command line");
    let chunks = disk.chunks.min(options.mib.saturating_mul((1 << 20) / CHUNK_LEN));
    for pass in 0..options.count.unwrap_or(u64::MAX) {
        let seed = options.seed.wrapping_add(pass);
        for chunk in 0..chunks {
            let slot = idle_slot(&mut disk, |_, _| {});
            fill(disk.buffer(slot), seed, chunk);
            disk.submit(slot, Kind::Write, chunk);
        }
        drain(&mut disk, |_, _| {});
        if disk.flushes() {
            disk.submit(0, Kind::Flush, 0);
            drain(&mut disk, |_, _| {});
        }
        let mut sum = 0u64;
        let mut check = |words: &[u64], chunk| sum = sum.wrapping_add(checked_sum(words, seed, chunk));
        for chunk in 0..chunks {
            let slot = idle_slot(&mut disk, &mut check);
            disk.submit(slot, Kind::Read, chunk);
        }
        drain(&mut disk, &mut check);
        println!("disk {} chunks={chunks} sum={sum:016x} ticks={}", pass + 1, cpu::ticks());
    }
}

fn fill(words: &mut [u64], seed: u64, chunk: u64) {
    for (index, value) in (chunk * CHUNK_WORDS..).zip(words) {
        *value = word(seed, index);
    }
}

/// The sum of `word * (2 * index + 1)` over a chunk.
///
/// # Panics
/// If a word is not what was written.
fn checked_sum(words: &[u64], seed: u64, chunk: u64) -> u64 {
    (chunk * CHUNK_WORDS..).zip(words).fold(0, |sum, (index, &value)| {
        assert_eq!(value, word(seed, index), "disk: word {index}");
        sum.wrapping_add(value.wrapping_mul(2 * index + 1))
    })
}

/// A slot for the next request; hands what finishes meanwhile to `done`.
fn idle_slot(disk: &mut Disk, mut done: impl FnMut(&[u64], u64)) -> usize {
    loop {
        collect(disk, &mut done);
        if let Some(slot) = disk.idle_slot() {
            return slot;
        }
        wait(disk);
    }
}

fn drain(disk: &mut Disk, mut done: impl FnMut(&[u64], u64)) {
    loop {
        collect(disk, &mut done);
        if disk.is_idle() {
            return;
        }
        wait(disk);
    }
}

fn collect(disk: &mut Disk, done: &mut impl FnMut(&[u64], u64)) {
    while let Some((slot, chunk)) = disk.finished() {
        done(disk.buffer(slot), chunk);
    }
}

fn wait(disk: &mut Disk) {
    disk.publish();
    cpu::wait(disk.irq());
    disk.acknowledge();
}
