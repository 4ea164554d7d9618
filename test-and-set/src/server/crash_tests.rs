//! A member that is stopped at the k-th write or fsync, for every k of a session, restarts with everything that it acknowledged.
//!
//! The simulated disk is harsher than a killed process: any part of what was not synced may be lost, in any order.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use redb::StorageBackend;

use crate::names::{Generation, Incarnation, VmName};
use crate::record::{Command, CommandReply, Member, Members};
use crate::server::disk::{DataFiles, MemberDisk};
use crate::server::disk_error::DiskError;
use crate::server::peers::OtherMembers;
use crate::server::raft::testing::{append_ask, is_granted, vote_ask};
use crate::server::raft::{Raft, RaftTiming, VmCommand};
use crate::wire::{DataMark, NodeId, PeerRequest, PeerResponse};

const SECTOR: usize = 512;
/// The size of a page of redb.
pub const BLOCK: usize = 4096;

/// A file: its bytes as the process sees them, the bytes that are synced, and the writes since then.
#[derive(Debug, Default, Clone)]
pub struct SimFile {
    pub seen: Vec<u8>,
    pub synced: Vec<u8>,
    since: Vec<(usize, Vec<u8>)>,
    /// The bytes of each block before the last sync that changed it.
    pub before: BTreeMap<usize, Vec<u8>>,
    /// The bytes before the last sync that changed something, of each block that it changed, with their offsets.
    pub last_sync: Vec<(usize, Vec<u8>)>,
}

impl SimFile {
    fn sync(&mut self) {
        let old = self.synced.clone();
        for (at, bytes) in std::mem::take(&mut self.since) {
            write_at(&mut self.synced, at, &bytes);
        }
        let blocks = old.chunks(BLOCK).zip(self.synced.chunks(BLOCK)).enumerate();
        let changed = blocks.filter(|(_, (old, new))| old != new);
        let changed: Vec<_> = changed.map(|(block, (old, _))| (block, old.to_vec())).collect();
        if !changed.is_empty() {
            self.last_sync = changed.iter().map(|(block, old)| (block * BLOCK, old.clone())).collect();
        }
        self.before.extend(changed);
    }
}

#[derive(Debug)]
pub struct Sim {
    pub files: [SimFile; 3],
    steps: u64,
    stop_at: u64,
}

impl Sim {
    /// Counts a write or an fsync; fails from number `stop_at` on.
    fn step(&mut self) -> io::Result<()> {
        self.steps += 1;
        if self.steps >= self.stop_at { Err(io::Error::other("the power is off")) } else { Ok(()) }
    }

    /// What is on the disk afterwards: everything that was synced, and random sectors of the rest.
    fn survivors(&self, random: &mut StdRng) -> [SimFile; 3] {
        self.files.clone().map(|file| {
            let mut disk = file.synced;
            for (at, bytes) in file.since {
                for (i, sector) in bytes.chunks(SECTOR).enumerate().filter(|_| random.random_bool(0.5)) {
                    write_at(&mut disk, at + i * SECTOR, sector);
                }
            }
            SimFile { seen: disk.clone(), synced: disk, ..SimFile::default() }
        })
    }
}

fn write_at(bytes: &mut Vec<u8>, at: usize, data: &[u8]) {
    let end = at + data.len();
    bytes.resize(bytes.len().max(end), 0);
    bytes[at..end].copy_from_slice(data);
}

#[derive(Debug, Clone)]
pub struct Backend {
    pub sim: Arc<Mutex<Sim>>,
    pub file: usize,
}

impl Backend {
    fn with<T>(&self, use_file: impl FnOnce(&mut SimFile) -> T) -> T {
        use_file(&mut self.sim.lock().unwrap().files[self.file])
    }
}

impl StorageBackend for Backend {
    fn len(&self) -> io::Result<u64> {
        Ok(self.with(|f| f.seen.len() as u64))
    }

    fn read(&self, at: u64, out: &mut [u8]) -> io::Result<()> {
        let at = at as usize;
        self.with(|f| {
            let bytes = f.seen.get(at..at + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
            out.copy_from_slice(bytes);
            Ok(())
        })
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.sim.lock().unwrap().step()?;
        // As on a journalling file system, a new size takes effect at once; new bytes are zero.
        self.with(|f| {
            f.seen.resize(len as usize, 0);
            f.synced.resize(len as usize, 0);
            f.since.retain(|(at, bytes)| at + bytes.len() <= len as usize);
        });
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.sim.lock().unwrap().step()?;
        self.with(SimFile::sync);
        Ok(())
    }

    fn write(&self, at: u64, data: &[u8]) -> io::Result<()> {
        let stopped = self.sim.lock().unwrap().step();
        self.with(|f| {
            // The write during which the power fails may be on the disk in part.
            f.since.push((at as usize, data.to_vec()));
            write_at(&mut f.seen, at as usize, data);
        });
        stopped
    }
}

/// A simulated disk with these files, which fails from step `stop_at` on.
pub fn sim(files: [SimFile; 3], stop_at: u64) -> Arc<Mutex<Sim>> {
    Arc::new(Mutex::new(Sim { files, steps: 0, stop_at }))
}

/// Starts member 1 of `members` on a simulated disk.
async fn start(
    sim: &Arc<Mutex<Sim>>,
    members: &[NodeId],
    timing: RaftTiming,
) -> Result<(Raft, Arc<MemberDisk>), String> {
    let backend = |file| Backend { sim: sim.clone(), file };
    let files = DataFiles { log: backend(0), snapshots: backend(1), journal: backend(2) };
    let opened = MemberDisk::open_on(files, &"crash".parse().unwrap(), 1);
    let disk = Arc::new(opened.map_err(|e: DiskError| e.to_string())?);
    let peers = Arc::new(OtherMembers::new(1, disk.clone(), None));
    let raft = Raft::start(1, disk.clone(), peers, timing).await.map_err(|e| e.to_string())?;
    let members: BTreeMap<_, _> = members.iter().map(|id| (*id, format!("nowhere:{id}"))).collect();
    match raft.initialize(&members).await {
        Ok(()) => Ok((raft, disk)),
        Err(error) => {
            raft.stop().await;
            Err(error.to_string())
        }
    }
}

/// Runs a session for each k on a disk that fails at step k, and checks what survived, until a session ends before step k. Returns
/// the number of steps.
fn at_every_step<S: Default>(
    session: impl AsyncFn(&Arc<Mutex<Sim>>, &mut S),
    check: impl AsyncFn(&Arc<Mutex<Sim>>, &S),
) -> u64 {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for k in 1.. {
        let stopped = sim(Default::default(), k);
        let mut acknowledged = S::default();
        runtime.block_on(session(&stopped, &mut acknowledged));
        let ended = stopped.lock().unwrap().steps < k;
        let survivors = stopped.lock().unwrap().survivors(&mut StdRng::seed_from_u64(k));
        runtime.block_on(check(&sim(survivors, u64::MAX), &acknowledged));
        if ended {
            return k - 1;
        }
    }
    unreachable!("a session ends")
}

const QUICK: RaftTiming = RaftTiming { heartbeat_ms: 10, snapshot_every: 8 };

fn members_of(who: Incarnation) -> Members {
    Members { primary: Member::new(who), backup: None }
}

/// Applies a command, and repeats it while there is no leader.
async fn command(raft: &Raft, vm: &VmName, command: Command) -> Option<CommandReply> {
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(20) {
        let request =
            VmCommand { vm: vm.clone(), command: command.clone(), asker: None, names_max: u64::MAX };
        match raft.command(request).await {
            Ok(reply) => return Some(reply),
            Err(crate::wire::RequestFailure::NotLeader(_) | crate::wire::RequestFailure::NoQuorum) => {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            Err(_) => return None,
        }
    }
    panic!("no leader within 20 s");
}

#[test]
fn no_committed_verdict_is_lost() {
    let session = async |sim: &Arc<Mutex<Sim>>, (won, told): &mut (Vec<(VmName, Incarnation)>, Told)| {
        let Ok((raft, disk)) = start(sim, &[1], QUICK).await else { return };
        for i in 0..12 {
            let (vm, who): (VmName, _) = (format!("vm-{i}").parse().unwrap(), Incarnation::random());
            let open = Command::Open { generation: Generation::FIRST, members: members_of(who) };
            let take = Command::Take { generation: Generation::FIRST, who };
            if command(&raft, &vm, open).await.is_none() || command(&raft, &vm, take).await.is_none() {
                break;
            }
            won.push((vm, who));
            told.push(disk.mark());
        }
        told.push(disk.mark());
        raft.stop().await;
    };
    let check = async |sim: &Arc<Mutex<Sim>>, (won, told): &(Vec<(VmName, Incarnation)>, Told)| {
        let (raft, disk) = start(sim, &[1], QUICK).await.expect("the member must come back");
        assert!(told.iter().all(|mark| disk.has(mark)), "it looks as if it had lost something: {told:?}");
        for (vm, who) in won {
            let other = Incarnation::random();
            let again = command(&raft, vm, Command::Take { generation: Generation::FIRST, who: *who }).await;
            assert_eq!(again, Some(CommandReply::Won), "{vm} of {} verdicts", won.len());
            let stale = command(&raft, vm, Command::Take { generation: Generation::FIRST, who: other }).await;
            assert_eq!(stale, Some(CommandReply::Stale));
        }
        raft.stop().await;
    };
    let steps = at_every_step(session, check);
    assert!(steps > 100, "the session has only {steps} steps");
    println!("stopped at each of {steps} writes and fsyncs");
}

/// What a follower has acknowledged: the terms in which it voted for member 3, and the index up to which it has member 3's log.
///
/// In openraft a term is a number and a candidate: a vote for member 3 may follow one for member 2 with the same number, as if it
/// were of a later term. A vote for member 2 after one for member 3 would be the second in a term.
#[derive(Default)]
struct Promises {
    votes: Vec<u64>,
    index: u64,
    told: Told,
}

/// How far the member's data had come, as the others were told with each answer.
type Told = Vec<DataMark>;

#[test]
fn no_vote_is_given_twice_and_no_acknowledged_entry_is_lost() {
    let ask = async |raft: &Raft, ask: PeerRequest| match raft.answer(ask, &Default::default()).await {
        PeerResponse::Done(bytes) => Some(bytes),
        PeerResponse::Failed(_) => None,
    };
    let timing = RaftTiming { heartbeat_ms: 10, snapshot_every: 1000 };
    let session = async |sim: &Arc<Mutex<Sim>>, promised: &mut Promises| {
        let Ok((raft, disk)) = start(sim, &[1, 2, 3], timing).await else { return };
        raft.set_elections(false);
        for term in 2..8 {
            let Some(answer) = ask(&raft, vote_ask(term, 3, 1000)).await else { break };
            assert!(is_granted(&answer), "term {term}");
            promised.votes.push(term);
            // What is heard of others is stored beside, and costs none of the member's own.
            disk.note(|all| all.hear_of(2, DataMark { change: term, ..disk.mark() }));
            if disk.write_known().is_err() {
                break;
            }
            promised.told.push(disk.mark());
            let other = ask(&raft, vote_ask(term, 2, 1000)).await;
            assert!(!other.is_some_and(|answer| is_granted(&answer)), "a second vote in term {term}");
        }
        for index in 1..6 {
            let write =
                (format!("vm-{index}").parse().unwrap(), Command::Forget { generation: Generation::FIRST });
            if ask(&raft, append_ask(7, 3, index, write)).await.is_none() {
                break;
            }
            promised.index = index;
            promised.told.push(disk.mark());
        }
        promised.told.push(disk.mark());
        raft.stop().await;
    };
    let check = async |sim: &Arc<Mutex<Sim>>, promised: &Promises| {
        let (raft, disk) = start(sim, &[1, 2, 3], timing).await.expect("the member must come back");
        raft.set_elections(false);
        assert!(promised.told.iter().all(|mark| disk.has(mark)), "it looks as if it had lost something");
        let entries = disk.read(1..).unwrap().len() as u64;
        assert!(entries >= promised.index, "{entries} entries are left of {}", promised.index);
        for term in &promised.votes {
            let answer = ask(&raft, vote_ask(*term, 2, 1000)).await.expect("an answer");
            assert!(!is_granted(&answer), "a second vote in term {term}");
        }
        // It does not refuse everybody.
        let begun = Instant::now();
        while !is_granted(&ask(&raft, vote_ask(100, 3, 1000)).await.expect("an answer")) {
            assert!(begun.elapsed() < Duration::from_secs(20), "no vote in a new term");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        raft.stop().await;
    };
    let steps = at_every_step(session, check);
    assert!(steps > 50, "the session has only {steps} steps");
    println!("stopped at each of {steps} writes and fsyncs");
}
