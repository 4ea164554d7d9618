//! Damage of a member's files, one place at a time: the member refuses them, or has everything that it acknowledged.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};

use crate::names::{CopyId, RunId};
use crate::server::crash_tests::{BLOCK, Backend, Sim, SimFile, sim};
use crate::server::disk::{DataFiles, MemberDisk};
use crate::server::disk_error::DiskError;
use crate::wire::DataMark;

/// What a member has acknowledged, and must still have.
#[derive(Debug, Default, PartialEq, Eq)]
struct Acknowledged {
    data: u128,
    log: BTreeMap<u64, Vec<u8>>,
    values: BTreeMap<&'static str, Vec<u8>>,
    known: BTreeMap<u64, DataMark>,
    snapshot: Option<(Vec<u8>, Vec<u8>)>,
}

fn open(sim: &Arc<Mutex<Sim>>) -> Result<MemberDisk, DiskError> {
    let file = |file| Backend { sim: sim.clone(), file };
    let files = DataFiles { log: file(0), snapshots: file(1), journal: file(2) };
    MemberDisk::open_on(files, &"damage".parse().unwrap(), 1)
}

impl Acknowledged {
    fn of(disk: &MemberDisk) -> Result<Self, DiskError> {
        let index = |entry: &Vec<u8>| u64::from_le_bytes(entry[..8].try_into().unwrap());
        let mut values = BTreeMap::new();
        for name in ["vote", "purged"] {
            values.extend(disk.get(name)?.map(|value| (name, value)));
        }
        Ok(Self {
            data: disk.data().into(),
            log: disk.read(..)?.into_iter().map(|entry| (index(&entry), entry)).collect(),
            values,
            known: disk.known_members(),
            snapshot: disk.snapshot()?.map(|stored| (stored.meta, stored.state)),
        })
    }

    /// Makes a random change, on the disk and here.
    fn step(&mut self, disk: &MemberDisk, random: &mut StdRng) -> Result<(), DiskError> {
        let next = self.log.last_key_value().map_or(1, |(last, _)| last + 1);
        let bytes = |random: &mut StdRng| (0..random.random_range(1..200)).map(|_| random.random()).collect();
        match random.random_range(0..12) {
            0 => {
                let vote: Vec<u8> = bytes(random);
                disk.put("vote", &vote)?;
                self.values.insert("vote", vote);
            }
            1 if next > 3 => {
                disk.truncate(next - 2)?;
                self.log.split_off(&(next - 2));
            }
            2 => {
                let (id, change) = (random.random_range(2..4), random.random());
                let mark = DataMark { data: CopyId::random(), run: RunId::random(), change };
                disk.set_known(id, Some(mark))?;
                self.known.insert(id, mark);
            }
            3 if !self.known.is_empty() => {
                // More is heard of a member, which may be lost with the newest page.
                let id = *self.known.keys().next().expect("a member");
                let mark = self.known.get_mut(&id).expect("its mark");
                mark.change = mark.change.saturating_add(random.random_range(1..9));
                disk.note(|all| all.note(id, *mark));
                if random.random_bool(0.5) {
                    disk.write_known()?;
                }
            }
            4 if self.log.len() > 6 => {
                let (meta, state): (Vec<u8>, Vec<u8>) = (bytes(random), bytes(random));
                disk.put_snapshot(&meta, &state)?;
                self.snapshot = Some((meta, state));
                let (upto, purged) = (next - 4, bytes(random));
                disk.purge(upto, &purged)?;
                self.values.insert("purged", purged);
                self.log = self.log.split_off(&(upto + 1));
            }
            _ => {
                let entry = |index: u64, random: &mut StdRng| {
                    let rest: Vec<u8> = bytes(random);
                    (index, [&index.to_le_bytes()[..], &rest].concat())
                };
                let entries: Vec<_> =
                    (next..next + random.random_range(1..4)).map(|index| entry(index, random)).collect();
                disk.append(&entries)?;
                self.log.extend(entries);
            }
        }
        Ok(())
    }
}

#[derive(Debug, Clone, Copy)]
enum BlockFault {
    Flip,
    Zero,
    LostWrite,
    Misdirected,
    /// Everything is lost that the last sync of the block's file had to write.
    LostSync,
}

const FAULTS: [BlockFault; 6] = [
    BlockFault::Flip,
    BlockFault::Flip,
    BlockFault::Zero,
    BlockFault::LostWrite,
    BlockFault::Misdirected,
    BlockFault::LostSync,
];

/// Causes a fault in a block; `None` if it would change nothing.
fn damaged(
    files: &[SimFile; 3],
    (file, block): (usize, usize),
    fault: BlockFault,
    random: &mut StdRng,
) -> Option<[SimFile; 3]> {
    let mut files = files.clone();
    let old = files[file].before.get(&block).cloned();
    let bytes = &mut files[file].seen;
    let range = block * BLOCK..bytes.len().min((block + 1) * BLOCK);
    let now = bytes[range.clone()].to_vec();
    let written: Vec<_> =
        bytes.chunks(BLOCK).enumerate().filter(|(_, b)| b.iter().any(|b| *b != 0)).collect();
    match fault {
        BlockFault::Flip => {
            // Half of the flips hit the start of the block, where headers are.
            let most = if random.random_bool(0.5) { range.len().min(320) } else { range.len() };
            bytes[range.start + random.random_range(0..most)] ^= 1 << random.random_range(0..8);
        }
        BlockFault::Zero => bytes[range.clone()].fill(0),
        BlockFault::LostWrite => bytes[range.clone()].copy_from_slice(&old?[..range.len()]),
        BlockFault::Misdirected => {
            let other = written.choose(random)?.0 * BLOCK;
            bytes[range.clone()].copy_from_slice(&old?[..range.len()]);
            let end = bytes.len().min(other + BLOCK);
            bytes[other..end].copy_from_slice(&now[..end - other]);
        }
        BlockFault::LostSync if block > 0 => return None,
        BlockFault::LostSync => {
            let lost = files[file].last_sync.clone();
            for (at, old) in lost {
                // The file may be shorter now.
                let still = files[file].seen.get_mut(at..at + old.len());
                still.into_iter().for_each(|bytes| bytes.copy_from_slice(&old));
            }
            files[file].synced = files[file].seen.clone();
            return Some(files);
        }
    }
    files[file].synced = files[file].seen.clone();
    (files[file].seen[range] != now || matches!(fault, BlockFault::Misdirected)).then_some(files)
}

/// The blocks that hold something or were ever written.
fn blocks(files: &[SimFile; 3]) -> Vec<(usize, usize)> {
    let used = |file: &SimFile| {
        let filled = file.seen.chunks(BLOCK).enumerate().filter(|(_, b)| b.iter().any(|b| *b != 0));
        let mut used: Vec<_> = filled.map(|(block, _)| block).chain(file.before.keys().copied()).collect();
        used.sort_unstable();
        used.dedup();
        used.retain(|block| block * BLOCK < file.seen.len());
        used
    };
    files
        .iter()
        .enumerate()
        .flat_map(|(i, file)| used(file).into_iter().map(move |block| (i, block)))
        .collect()
}

/// Starts with damaged files. Returns whether they were refused; what is accepted must be complete, now and after another start.
fn is_refused(files: [SimFile; 3], acknowledged: &Acknowledged, at: &str) -> bool {
    let disk = sim(files, u64::MAX);
    for start in 1..=2 {
        match open(&disk) {
            Err(DiskError::Damaged { .. }) if start == 1 => return true,
            Err(error) => panic!("start {start} after {at}: {error}"),
            Ok(opened) => {
                let mut has = Acknowledged::of(&opened).unwrap_or_else(|error| panic!("{at}: {error}"));
                for (id, mark) in &mut has.known {
                    let heard = acknowledged.known.get(id).map_or(0, |known| known.change);
                    assert!(mark.change <= heard, "start {start} after {at}: {mark:?} was never heard of");
                    mark.change = heard;
                }
                assert_eq!(has, *acknowledged, "start {start} after {at}");
            }
        }
    }
    false
}

#[test]
fn other_formats_are_refused_in_words() {
    let member = "node 1 of cluster damage";
    let older = "made before the first release";
    for (owner, format, words) in [
        (member.to_owned(), 1, older),
        (format!("{member}, data format 3"), 3, older),
        (format!("{member}, data format 5"), 5, "made by a newer release"),
    ] {
        let disk = sim(Default::default(), u64::MAX);
        open(&disk).unwrap().put("owner", owner.as_bytes()).unwrap();
        let said = open(&disk).err().unwrap().to_string();
        assert!(said.contains(&format!("the data has format {format}")) && said.contains(words), "{said}");
    }
}

/// The damage of this many histories is tried; `VMFT_SEEDS` asks for more.
fn seeds() -> u64 {
    std::env::var("VMFT_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(8)
}

#[test]
fn damage_is_refused_or_repaired_and_never_silent() {
    let (mut refused, mut whole) = (BTreeMap::<String, u32>::new(), BTreeMap::<String, u32>::new());
    for seed in 0..seeds() {
        let mut random = StdRng::seed_from_u64(seed);
        let running = sim(Default::default(), u64::MAX);
        let disk = open(&running).unwrap();
        let mut acknowledged = Acknowledged::of(&disk).unwrap();
        for _ in 0..random.random_range(1..60) {
            acknowledged.step(&disk, &mut random).unwrap();
        }
        // Every other member is closed in order, the rest lose their power.
        if seed % 2 == 0 {
            drop(disk);
        }
        let files = running.lock().unwrap().files.clone();
        assert!(!is_refused(files.clone(), &acknowledged, "no fault"));
        for place in blocks(&files) {
            for fault in FAULTS {
                let Some(files) = damaged(&files, place, fault, &mut random) else { continue };
                let at = format!("seed {seed}: {fault:?} at (file, block) {place:?}");
                let counts = if is_refused(files, &acknowledged, &at) { &mut refused } else { &mut whole };
                *counts.entry(format!("{fault:?}")).or_default() += 1;
            }
        }
    }
    println!("refused: {refused:?}; complete: {whole:?}");
    let all: u32 = refused.values().chain(whole.values()).sum();
    assert!(all > 1000, "only {all} faults");
}
