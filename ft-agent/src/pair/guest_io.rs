//! The guest loop's connections to the replica: the outside and the log of a guest that is recorded, the
//! records and the standby of a guest that is replayed.

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
use vmm::record::RecordSink;
use vmm::replay::{Records, Standby};
use vmm::source::Outside;

use super::replica::{Replica, TURN_INTERVAL, now_ns};
use crate::error::Error;
use crate::outside::Inlet;
use crate::outside::disk::{DiskThread, Image};

/// The outside of a guest on this host. Its inputs come from the inlet; its outputs wait in the replica's
/// gate.
pub struct GatedOutside {
    /// Where the inputs come from.
    pub inlet: Inlet,
    /// The replica, whose gate the outputs go through.
    pub replica: Arc<Replica>,
}

impl Outside for GatedOutside {
    type Error = Error;

    fn poll(&mut self, takes: &mut dyn FnMut(&Input) -> bool) -> Result<Option<Input>, Error> {
        self.inlet.poll(takes)
    }

    fn stop_requested(&mut self) -> bool {
        // If a device has failed, the inlet reports it at the next poll.
        self.replica.needs_attention()
    }

    fn time_ns(&mut self) -> Option<u64> {
        self.inlet.time_ns()
    }

    fn wait(&mut self, until_ns: Option<u64>) -> Result<(), Error> {
        self.replica.before_wait();
        let begin = now_ns();
        self.inlet.wait(until_ns, Some(TURN_INTERVAL));
        self.replica.times.idle_ns.add(now_ns() - begin);
        self.replica.report_alive();
        Ok(())
    }

    fn starving(&mut self, at: Position) -> Result<(), Error> {
        // The guest runs, although it makes no exits.
        self.replica.report_alive();
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

/// A primary's log: the channel to its backup.
pub struct ChannelLog(pub Arc<Replica>);

impl RecordSink for ChannelLog {
    type Error = Error;

    fn append(&mut self, record: &Record) -> Result<(), Error> {
        if let Entry::State(state) = &record.entry {
            let at = record.position.count;
            debug!(at, vcpu = %state.vcpu, devices = %state.devices, ram = %state.ram, "state recorded");
        }
        self.0.append(record);
        Ok(())
    }

    fn on_turn(&mut self, at: Position) -> Result<(), Error> {
        self.0.pace_guest(at);
        Ok(())
    }
}

/// A backup's records, as they arrive over the channel.
pub struct ChannelRecords {
    replica: Arc<Replica>,
    /// How many records were taken.
    taken: u64,
    /// Position of the record that was taken last.
    at: Position,
    /// The last guest time in a record, and when that record was taken.
    time: Option<(u64, Instant)>,
    /// The record that was taken last, if it is a state. It has been checked by the time the next record is
    /// taken.
    state: Option<(Position, entry::log::StateCheck)>,
}

impl ChannelRecords {
    /// The records that the replica receives.
    pub fn new(replica: Arc<Replica>) -> ChannelRecords {
        ChannelRecords { replica, taken: 0, at: Position::default(), time: None, state: None }
    }

    /// How far guest time `time_ns` lags behind what the primary's would be by now, ns.
    pub fn behind_ns(&self, time_ns: u64) -> u64 {
        let due = self.time.map_or(0, |(last_ns, then)| last_ns + then.elapsed().as_nanos() as u64);
        due.saturating_sub(time_ns)
    }
}

impl Records for ChannelRecords {
    type Error = Infallible;

    fn next(&mut self) -> Result<Option<Record>, Infallible> {
        if let Some((at, state)) = self.state.take() {
            let at = at.count;
            debug!(at, vcpu = %state.vcpu, devices = %state.devices, ram = %state.ram, "state checked");
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

/// Logs, at debug level, a digest of the whole state with all of RAM, so that the two sides of a handover can
/// be compared.
pub fn log_full_state(machine: &mut Machine) {
    if tracing::enabled!(Level::DEBUG) {
        let at = machine.position().count;
        match machine.full_digest() {
            Ok(digest) => debug!(at, digest = %digest.total(), "full state"),
            Err(e) => debug!(at, "cannot take the full state: {e}"),
        }
    }
}

/// How long a backup waits for one request to its own disk image.
const DISK_PATIENCE: Duration = Duration::from_secs(60);

type FinishedRequest = (u64, DiskResult);

/// A backup's disks and gate.
pub struct BackupStandby {
    replica: Arc<Replica>,
    disks: BTreeMap<u8, StandbyDisk>,
}

struct StandbyDisk {
    disk: DiskThread,
    done: Receiver<FinishedRequest>,
    /// Results of requests that have finished here, but not yet in the log.
    results: BTreeMap<u64, DiskResult>,
    /// Ids of the requests that were started and are not yet in `results`.
    pending: Vec<u64>,
}

impl BackupStandby {
    /// Starts the disks with these images, by slot.
    pub fn new(replica: Arc<Replica>, images: impl Iterator<Item = (u8, Image)>) -> BackupStandby {
        let start = |(slot, image)| {
            let (sender, done): (Sender<FinishedRequest>, _) = channel();
            let replica = replica.clone();
            // A failure is reported at once: the primary goes on alone, and this side never asks for a
            // verdict.
            let disk = DiskThread::start(image, move |id, result| match result {
                Ok(result) => sender.send((id, result)).is_ok(),
                Err(e) => {
                    replica.fail(e);
                    false
                }
            });
            (slot, StandbyDisk { disk, done, results: BTreeMap::new(), pending: Vec::new() })
        };
        let disks = images.map(start).collect();
        BackupStandby { replica, disks }
    }

    /// Waits until all requests have finished, and returns the images.
    pub fn into_images(self) -> impl Iterator<Item = (u8, Image)> {
        self.disks.into_iter().map(|(slot, disk)| {
            let StandbyDisk { disk, done, .. } = disk;
            let image = disk.stop();
            drop(done);
            (slot, image)
        })
    }
}

impl Standby for BackupStandby {
    type Error = Error;

    fn start(&mut self, request: DiskRequest) -> Result<(), Error> {
        if let Some(disk) = self.disks.get_mut(&request.slot) {
            disk.pending.push(request.id);
            // If the disk's thread is gone, `finish` reports it.
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
            let late = |e| Error::Host {
                what: format!("the disk in slot {slot} does not answer"),
                source: std::io::Error::other(e),
            };
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
