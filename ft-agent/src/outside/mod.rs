//! The outside of a live machine: tap, disks, console, clock and entropy. All of vmft's I/O for a guest is here.

pub mod console;
pub mod disk;
mod starvation;
pub mod tap;
pub mod terminal;
pub mod until;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use entry::{Answer, Console, DiskRequest, Input, Output, Position, PositionUnit, Question};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;
use vmm::inbox::{Inbox, InboxSender, Origin};
use vmm::machine::StateDigest;
use vmm::source::{CLOCK_LAG_MAX_NS, Outside};

use crate::error::Error;
use crate::options::ClockMode;
use crate::service;
use console::{Printer, Readers};
use disk::{DiskThread, Image};
use starvation::{Starvation, Starved};
use tap::Tap;
use until::{LOOK_INTERVAL, Until};

/// How many inputs of one device (frames, keys or disk completions) may wait for the guest.
pub const INBOX_CAPACITY: usize = 1024;
/// The longest frame that a tap delivers, bytes.
const FRAME_MAX: usize = 65_536;
/// How often a thread that waits for its device checks whether the run is over, ms.
const POLL_MS: u8 = 100;

/// With the virtual clock, guest time that passes when an instruction reads the time, ns: so a guest that waits for a time
/// reaches it.
const TIME_READ_NS: u64 = 1000;

/// Counts for the summary.
#[derive(Clone, Copy, Debug, Default)]
pub struct Traffic {
    /// Frames sent to the network.
    pub frames_sent: u64,
    /// Frames that the tap did not accept.
    pub frames_dropped: u64,
    /// Time slept while the guest was idle.
    pub slept: Duration,
    /// Inputs that waited too long for an exit of the guest.
    pub starved: Starved,
}

/// The first failure of a device's thread, which ends the run.
type DeviceFailure = Arc<Mutex<Option<Error>>>;

/// Where a guest's inputs come from: taps, disks, keys, the clock and entropy.
pub struct Inlet {
    inbox: Inbox,
    sender: InboxSender,
    disks: BTreeMap<u8, DiskThread>,
    /// How many requests to disks are under way.
    disk_requests: Arc<AtomicUsize>,
    clock: Option<HostClock>,
    entropy: Entropy,
    failure: DeviceFailure,
    slept: Duration,
    starvation: Option<Starvation>,
}

/// Guest time, derived from the host's clock.
struct HostClock {
    start: Instant,
    /// Guest time at `start`, ns.
    base_ns: u64,
    /// How far guest time lagged behind the host's clock at `start`, ns.
    behind_ns: u64,
}

/// Guest time that lags is slewed by one part in this many, and never jumps.
const SLEW: u64 = 20;

impl HostClock {
    fn time_ns(&self, elapsed: Duration) -> u64 {
        let elapsed = elapsed.as_nanos() as u64;
        self.base_ns + elapsed + self.behind_ns.min(elapsed / SLEW)
    }
}

/// Where random numbers come from.
enum Entropy {
    Host(File),
    /// A fixed stream for each position (splitmix64), for runs in which nothing from the host enters the guest. It does not
    /// depend on earlier requests, so that a restored machine gets the same numbers.
    Fixed,
}

impl Inlet {
    /// An inlet without devices. `time_ns` is the guest time at which the clock continues, and `behind_ns` how far that lags
    /// behind the time that it should be by now.
    ///
    /// # Errors
    /// /dev/urandom cannot be opened.
    pub fn new(
        (inbox, sender): (Inbox, InboxSender),
        clock: ClockMode,
        time_ns: u64,
        behind_ns: u64,
    ) -> Result<Inlet, Error> {
        let (clock, entropy) = match clock {
            ClockMode::Host => {
                let random = File::open("/dev/urandom").map_err(Error::host("cannot open /dev/urandom"))?;
                let clock = HostClock { start: Instant::now(), base_ns: time_ns, behind_ns };
                (Some(clock), Entropy::Host(random))
            }
            ClockMode::Virtual => (None, Entropy::Fixed),
        };
        let (disks, disk_requests, failure) = Default::default();
        let (slept, starvation) = (Duration::ZERO, None);
        Ok(Inlet { inbox, sender, disks, disk_requests, clock, entropy, failure, slept, starvation })
    }

    /// Connects the network device in `slot` to the frames that come from a tap.
    pub fn attach_tap(&mut self, slot: u8, tap: Arc<Tap>) {
        let (failure, sender) = (self.failure.clone(), self.sender.clone());
        service::start_at_last("tap", move || {
            if let Err(e) = receive_frames(slot, &tap, &sender) {
                fail(&failure, tap.failed(e), &sender);
            }
        });
    }

    /// Connects the disk in `slot` to its image.
    pub fn attach_disk(&mut self, slot: u8, image: Image) {
        let (failure, sender) = (self.failure.clone(), self.sender.clone());
        let requests = self.disk_requests.clone();
        let disk = DiskThread::start(image, move |id, result| {
            requests.fetch_sub(1, Ordering::Relaxed);
            match result {
                // When the run is over nobody needs the result, but the requests that are left are still carried out.
                Ok(result) => {
                    sender.send(Origin::Disk(slot), Input::DiskDone { slot, id, result }).ok();
                    true
                }
                Err(e) => {
                    fail(&failure, e, &sender);
                    false
                }
            }
        });
        self.disks.insert(slot, disk);
    }

    /// The sender by which other threads put inputs in.
    pub fn sender(&self) -> &InboxSender {
        &self.sender
    }

    /// Nudges the guest regularly if its engine cannot stop it at any position, and counts inputs that wait longer than
    /// `limit` for an exit.
    pub fn watch_for_starvation(&mut self, unit: PositionUnit, limit: Duration) {
        // Nudges even when no input arrives, because the clock has to be read as well.
        let every = match unit {
            PositionUnit::SynchronousExits => Duration::from_millis(POLL_MS.into()),
            PositionUnit::Branches => Duration::from_nanos(CLOCK_LAG_MAX_NS),
            PositionUnit::Instructions | PositionUnit::Steps => return,
        };
        self.starvation = Some(Starvation::new(limit));
        let sender = self.sender.clone();
        service::start_at_last("nudge", move || {
            loop {
                std::thread::sleep(every);
                sender.wake();
            }
        });
    }

    /// Notes that an input waits for the guest's first exit after `at`.
    ///
    /// # Errors
    /// A device has failed.
    pub fn starving(&mut self, at: Position) -> Result<(), Error> {
        if let Some(starvation) = &mut self.starvation {
            starvation.observe(at);
        }
        self.check_failure()
    }

    /// The next waiting input that the machine accepts, according to `takes`.
    ///
    /// # Errors
    /// A device has failed.
    pub fn poll(&mut self, takes: &mut dyn FnMut(&Input) -> bool) -> Result<Option<Input>, Error> {
        self.check_failure()?;
        Ok(self.inbox.take_first(takes))
    }

    /// Whether the user asked to stop the run, or a device has failed.
    pub fn stop_requested(&self) -> bool {
        self.inbox.stop_requested()
    }

    /// Guest time by the host's clock; `None` with the virtual clock.
    pub fn time_ns(&self) -> Option<u64> {
        self.clock.as_ref().map(|c| c.time_ns(c.start.elapsed()))
    }

    /// Sleeps until an input arrives or guest time is `until_ns`, and at most for `longest`.
    pub fn wait(&mut self, until_ns: Option<u64>, longest: Option<Duration>) {
        let now = self.time_ns();
        let due = until_ns.zip(now).map(|(until, now)| Duration::from_nanos(until.saturating_sub(now)));
        let asleep = Instant::now();
        self.inbox.wait(due.into_iter().chain(longest).min());
        self.slept += asleep.elapsed();
    }

    /// The answer to a question that the guest asks at a position.
    ///
    /// # Errors
    /// /dev/urandom cannot be read.
    pub fn answer(&mut self, at: Position, question: &Question) -> Result<Answer, Error> {
        match question {
            Question::Entropy { len, .. } => {
                let mut bytes = vec![0; *len as usize];
                self.entropy.fill(at, &mut bytes)?;
                Ok(Answer::Entropy(bytes))
            }
            Question::Time { time_ns } => {
                let now_ns = self.time_ns().unwrap_or(time_ns + TIME_READ_NS);
                Ok(Answer::Value(now_ns.max(*time_ns)))
            }
            Question::Random => {
                let mut bytes = [0; 8];
                self.entropy.fill(at, &mut bytes)?;
                Ok(Answer::Value(u64::from_le_bytes(bytes)))
            }
        }
    }

    /// Starts a request to a disk.
    ///
    /// # Errors
    /// The disk has failed.
    pub fn disk(&mut self, request: DiskRequest) -> Result<(), Error> {
        self.disk_requests.fetch_add(1, Ordering::Relaxed);
        let sent = self.disks.get(&request.slot).map(|disk| disk.request(request));
        // If the thread has ended, its failure is returned.
        if sent == Some(true) { Ok(()) } else { self.check_failure() }
    }

    /// Waits until the disks have carried out what the guest has asked them for; to be called when it runs no more.
    ///
    /// # Errors
    /// A device has failed, now or before.
    pub fn finish(&mut self) -> Result<(), Error> {
        // Releases the threads that wait for room in the inbox.
        self.sender.stop();
        for (_, disk) in std::mem::take(&mut self.disks) {
            disk.stop();
        }
        self.check_failure()
    }

    fn check_failure(&self) -> Result<(), Error> {
        let failed = self.failure.lock().unwrap_or_else(PoisonError::into_inner).take();
        failed.map_or(Ok(()), Err)
    }
}

/// Where the guest's console output goes.
pub enum ConsoleOut {
    /// To standard output; the guest waits until it is written.
    Printer(Printer),
    /// To readers that the guest does not wait for.
    Readers(Readers),
}

impl ConsoleOut {
    fn print(&mut self, bytes: &[u8]) -> Result<(), Error> {
        match self {
            ConsoleOut::Printer(printer) => printer.print(bytes),
            ConsoleOut::Readers(readers) => {
                readers.print(bytes);
                Ok(())
            }
        }
    }
}

/// Where a guest's outputs go: taps and the console.
pub struct Outlet {
    taps: BTreeMap<u8, Arc<Tap>>,
    console: ConsoleOut,
    frames_sent: u64,
    frames_dropped: u64,
}

impl Outlet {
    /// An outlet without taps.
    pub fn new(console: ConsoleOut) -> Outlet {
        Outlet { taps: BTreeMap::new(), console, frames_sent: 0, frames_dropped: 0 }
    }

    /// Where the console's output goes, to change or to query it.
    pub fn console(&mut self) -> &mut ConsoleOut {
        &mut self.console
    }

    /// Connects the frames that the network device in `slot` sends to a tap.
    pub fn attach_tap(&mut self, slot: u8, tap: Arc<Tap>) {
        self.taps.insert(slot, tap);
    }

    /// Sends an output.
    ///
    /// # Errors
    /// Standard output cannot be written to.
    pub fn send(&mut self, output: Output) -> Result<(), Error> {
        match output {
            Output::Frame { slot, bytes } => {
                if let Some(tap) = self.taps.get(&slot) {
                    match tap.send(&bytes) {
                        Ok(()) => self.frames_sent += 1,
                        // As on a wire, a frame that is not delivered is lost; the summary counts it.
                        Err(_) => self.frames_dropped += 1,
                    }
                }
                Ok(())
            }
            Output::Console { console: Console::Serial, bytes } => self.console.print(&bytes),
            Output::Console { .. } => Ok(()),
        }
    }
}

/// The host as the outside of an unprotected guest, whose outputs leave at once.
pub struct Host {
    /// Where the guest's inputs come from.
    pub inlet: Inlet,
    /// Where the guest's outputs go.
    pub outlet: Outlet,
    /// The text that ends the run, if there is one.
    pub until: Option<Until>,
    /// Why the guest will not print that text.
    pub hopeless: Option<String>,
    /// The digests that were asked for.
    pub digests: Vec<DigestAt>,
}

/// The digest of a whole machine at a position.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DigestAt {
    /// The position.
    pub position: u64,
    /// The digest, in hexadecimal.
    pub digest: String,
}

impl Host {
    /// The counts so far.
    pub fn traffic(&self) -> Traffic {
        let Outlet { frames_sent, frames_dropped, .. } = self.outlet;
        let starved = self.inlet.starvation.as_ref().map(Starvation::counts).unwrap_or_default();
        Traffic { frames_sent, frames_dropped, slept: self.inlet.slept, starved }
    }
}

impl Outside for Host {
    type Error = Error;

    fn poll(&mut self, takes: &mut dyn FnMut(&Input) -> bool) -> Result<Option<Input>, Error> {
        self.inlet.poll(takes)
    }

    fn stop_requested(&mut self) -> bool {
        if self.inlet.stop_requested() {
            return true;
        }
        let (Some(until), ConsoleOut::Printer(printer)) = (&mut self.until, &self.outlet.console) else {
            return false;
        };
        let (slept, disk_works) = (self.inlet.slept, self.inlet.disk_requests.load(Ordering::Relaxed) > 0);
        self.hopeless = until.is_hopeless(Instant::now(), slept, printer.printed(), disk_works);
        printer.is_satisfied() || self.hopeless.is_some()
    }

    fn time_ns(&mut self) -> Option<u64> {
        self.inlet.time_ns()
    }

    fn wait(&mut self, until_ns: Option<u64>) -> Result<(), Error> {
        self.inlet.wait(until_ns, self.until.as_ref().map(|_| LOOK_INTERVAL));
        Ok(())
    }

    fn starving(&mut self, at: Position) -> Result<(), Error> {
        self.inlet.starving(at)
    }

    fn answer(&mut self, at: Position, question: &Question) -> Result<Answer, Error> {
        self.inlet.answer(at, question)
    }

    fn send(&mut self, output: Output) -> Result<(), Error> {
        self.outlet.send(output)
    }

    fn disk(&mut self, request: DiskRequest) -> Result<(), Error> {
        self.inlet.disk(request)
    }

    fn digest(&mut self, at: Position, digest: StateDigest) -> Result<(), Error> {
        let found = DigestAt { position: at.count, digest: digest.total().to_string() };
        // Standard output belongs to the guest's console; programs find the digests in the summary.
        host_log::say!("digest {} {}", found.position, found.digest);
        self.digests.push(found);
        Ok(())
    }
}

impl Entropy {
    fn fill(&mut self, at: Position, bytes: &mut [u8]) -> Result<(), Error> {
        match self {
            Entropy::Host(file) => file.read_exact(bytes).map_err(Error::host("cannot read /dev/urandom")),
            Entropy::Fixed => {
                let mut state = at.count;
                for chunk in bytes.chunks_mut(8) {
                    state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
                    let mut z = state;
                    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
                    chunk.copy_from_slice(&(z ^ z >> 31).to_le_bytes()[..chunk.len()]);
                }
                Ok(())
            }
        }
    }
}

/// Passes frames from the tap to the guest until the run is over.
fn receive_frames(slot: u8, tap: &Tap, sender: &InboxSender) -> std::io::Result<()> {
    let mut buffer = vec![0; FRAME_MAX];
    loop {
        match tap.receive(&mut buffer) {
            Ok(n) => {
                let bytes = buffer[..n].to_vec();
                if sender.send(Origin::Net(slot), Input::Frame { slot, bytes }).is_err() {
                    return Ok(());
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                poll(&mut [PollFd::new(tap.as_fd(), PollFlags::POLLIN)], PollTimeout::from(POLL_MS))?;
            }
            Err(e) => return Err(e),
        }
    }
}

/// Records a device's failure and ends the run.
fn fail(failure: &DeviceFailure, error: Error, sender: &InboxSender) {
    failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    sender.stop();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_time_that_is_behind_catches_up_without_a_jump() {
        let clock = HostClock { start: Instant::now(), base_ns: 1_000, behind_ns: 500 };
        let at = |ns| clock.time_ns(Duration::from_nanos(ns));
        assert_eq!((at(0), at(20), at(10_000), at(1_000_000)), (1_000, 1_021, 11_500, 1_001_500));
    }
}
