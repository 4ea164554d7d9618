//! What a replica puts around its guest: the outside and the log of one that records, the records and the standby of one
//! that replays.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use entry::log::{Entry, LoggedInput, Record};
use entry::{Answer, DiskRequest, DiskResult, Input, Output, Position, Question};
use tracing::{Level, debug};
use vmm::Machine;
use vmm::machine::StateDigest;
use vmm::record::Log;
use vmm::replay::{Records, Standby};
use vmm::source::Outside;

use super::replica::{Replica, TURN_INTERVAL, now_ns};
use crate::error::Error;
use crate::outside::Inlet;
use crate::outside::disk::{Disk, Image};

/// The host as the outside of a guest whose outputs wait in the replica's gate.
pub struct Guarded {
    /// The way in.
    pub inlet: Inlet,
    /// Has the way out.
    pub replica: Arc<Replica>,
}

impl Outside for Guarded {
    type Error = Error;

    fn poll(&mut self, takes: &mut dyn FnMut(&Input) -> bool) -> Result<Option<Input>, Error> {
        self.inlet.poll(takes)
    }

    fn stop_requested(&mut self) -> bool {
        // A device that has failed stops the inlet, and the next look for an input tells of it.
        self.replica.needs_attention()
    }

    fn time_ns(&mut self) -> Option<u64> {
        self.inlet.time_ns()
    }

    fn wait(&mut self, until_ns: Option<u64>) -> Result<(), Error> {
        self.replica.before_wait();
        let begin = now_ns();
        self.inlet.wait(until_ns, Some(TURN_INTERVAL));
        self.replica.spent.idle_ns.add(now_ns() - begin);
        self.replica.turn();
        Ok(())
    }

    fn starving(&mut self, at: Position) -> Result<(), Error> {
        // The guest runs, although it makes no exit.
        self.replica.turn();
        self.inlet.starving(at)
    }

    fn answer(&mut self, at: Position, question: &Question) -> Result<Answer, Error> {
        self.inlet.answer(at, question)
    }

    fn send(&mut self, output: Output) -> Result<(), Error> {
        self.replica.hold(output);
        Ok(())
    }

    fn disk(&mut self, request: DiskRequest) -> Result<(), Error> {
        self.inlet.disk(request)
    }

    fn digest(&mut self, at: Position, digest: StateDigest) -> Result<(), Error> {
        debug!(at = at.count, digest = %digest.total(), "state");
        Ok(())
    }
}

/// The log of a primary: the channel to its backup.
pub struct ChannelLog(pub Arc<Replica>);

impl Log for ChannelLog {
    type Error = Error;

    fn append(&mut self, record: &Record) -> Result<(), Error> {
        if let Entry::State(state) = &record.entry {
            debug!(at = record.position.count, vcpu = %state.vcpu, devices = %state.devices, ram = %state.ram, "state recorded");
        }
        self.0.append(record);
        Ok(())
    }

    fn look(&mut self, at: Position) -> Result<(), Error> {
        self.0.look(at);
        Ok(())
    }
}

/// The records of a backup, as they come over the channel.
pub struct ChannelRecords {
    replica: Arc<Replica>,
    taken: u64,
    at: Position,
    /// The last reading of guest time, and when it was replayed.
    time: Option<(u64, Instant)>,
    /// The record that was taken last, if it is a state: it has been checked when the next is asked for.
    state: Option<(Position, entry::log::StateDigest)>,
}

impl ChannelRecords {
    /// What the replica receives.
    pub fn new(replica: Arc<Replica>) -> ChannelRecords {
        ChannelRecords { replica, taken: 0, at: Position::default(), time: None, state: None }
    }

    /// How far guest time `time_ns` is behind what the primary's would be by now.
    pub fn behind_ns(&self, time_ns: u64) -> u64 {
        let due = self.time.map_or(0, |(last_ns, then)| last_ns + then.elapsed().as_nanos() as u64);
        due.saturating_sub(time_ns)
    }
}

impl Records for ChannelRecords {
    type Error = Infallible;

    fn next(&mut self) -> Result<Option<Record>, Infallible> {
        if let Some((at, state)) = self.state.take() {
            debug!(at = at.count, vcpu = %state.vcpu, devices = %state.devices, ram = %state.ram, "state checked");
        }
        let record = self.replica.next_record(self.taken, self.at);
        if let Some(Record { position, entry }) = &record {
            self.taken += 1;
            self.at = *position;
            if let Entry::State(state) = entry {
                self.state = Some((*position, *state));
            }
            if let Entry::Mark { time_ns } | Entry::Input(LoggedInput::Clock { time_ns }) = entry {
                self.time = Some((*time_ns, Instant::now()));
            }
        }
        Ok(record)
    }
}

/// Logs a digest of the whole state, RAM read from end to end, for who wants to compare the sides of a handover.
pub fn log_full_state(machine: &mut Machine) {
    if tracing::enabled!(Level::DEBUG) {
        let at = machine.position().count;
        match machine.full_digest() {
            Ok(digest) => debug!(at, digest = %digest.total(), "full state"),
            Err(e) => debug!(at, "no state: {e}"),
        }
    }
}

/// How long a backup waits for one request to its own disk.
const DISK_PATIENCE: Duration = Duration::from_secs(60);

type Done = (u64, DiskResult);

/// A backup's disks and gate.
pub struct PairStandby {
    replica: Arc<Replica>,
    disks: BTreeMap<u8, StandbyDisk>,
}

struct StandbyDisk {
    disk: Disk,
    done: Receiver<Done>,
    /// What has ended here, but not yet in the log.
    results: BTreeMap<u64, DiskResult>,
    /// Begun and not yet in `results`.
    pending: Vec<u64>,
}

impl PairStandby {
    /// Disks with these images, by slot.
    pub fn new(replica: Arc<Replica>, images: impl Iterator<Item = (u8, Image)>) -> PairStandby {
        let start = |(slot, image)| {
            let (tell, done): (Sender<Done>, _) = channel();
            let replica = replica.clone();
            // A disk that fails is told at once: the other side goes on alone, and this one never takes.
            let disk = Disk::start(image, move |id, result| match result {
                Ok(result) => tell.send((id, result)).is_ok(),
                Err(e) => {
                    replica.fail(e);
                    false
                }
            });
            (slot, StandbyDisk { disk, done, results: BTreeMap::new(), pending: Vec::new() })
        };
        let disks = images.map(start).collect();
        PairStandby { replica, disks }
    }

    /// The images, once all that was begun on them has ended.
    pub fn into_images(self) -> impl Iterator<Item = (u8, Image)> {
        self.disks.into_iter().map(|(slot, disk)| {
            let StandbyDisk { disk, done, .. } = disk;
            let image = disk.stop();
            drop(done);
            (slot, image)
        })
    }
}

impl Standby for PairStandby {
    type Error = Error;

    fn start(&mut self, request: DiskRequest) -> Result<(), Error> {
        if let Some(disk) = self.disks.get_mut(&request.slot) {
            disk.pending.push(request.id);
            // If its thread is gone, waiting for the request tells why.
            disk.disk.request(request);
        }
        Ok(())
    }

    fn finish(&mut self, slot: u8, id: u64) -> Result<Option<DiskResult>, Error> {
        let Some(disk) = self.disks.get_mut(&slot) else { return Ok(None) };
        loop {
            if let Some(result) = disk.results.remove(&id) {
                return Ok(Some(result));
            }
            if !disk.pending.contains(&id) {
                return Ok(None);
            }
            let late =
                |e| Error::Host { what: format!("disk in slot {slot}"), source: std::io::Error::other(e) };
            let (done, result) = disk.done.recv_timeout(DISK_PATIENCE).map_err(late)?;
            disk.pending.retain(|pending| *pending != done);
            disk.results.insert(done, result);
        }
    }

    fn output(&mut self, output: Output) -> Result<(), Error> {
        self.replica.hold(output);
        Ok(())
    }
}
