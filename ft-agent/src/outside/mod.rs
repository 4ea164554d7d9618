//! The world around a live machine: its tap, disks, console, clock and entropy. All of vmft's I/O for a guest.

pub mod console;
pub mod disk;
mod starvation;
pub mod tap;
pub mod terminal;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use entry::{Answer, Console, DiskRequest, Input, Output, Position, PositionUnit, Question};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm::inbox::{Inbox, InboxSender, Origin};
use vmm::machine::StateDigest;
use vmm::source::{LAG_MAX_NS, Outside};

use crate::error::Error;
use crate::options::ClockMode;
use crate::pair::Readers;
use console::Printer;
use disk::{Disk, Image};
use starvation::{Starvation, Starved};
use tap::Tap;

/// The longest frame that a tap gives: 64 KiB.
const FRAME_MAX: usize = 65_536;
/// A thread that waits for its device looks this often whether the run is over.
const LOOK_MS: u8 = 100;

/// Guest time that an instruction takes which asks for the time, ns, where nothing else moves it: one that waits gets on.
const ASKING_NS: u64 = 1000;

/// What was done, for the summary.
#[derive(Clone, Copy, Debug, Default)]
pub struct Traffic {
    /// Frames to the network.
    pub frames_sent: u64,
    /// Frames that the host's network did not take.
    pub frames_dropped: u64,
    /// Time slept while the guest was idle.
    pub slept: Duration,
    /// Inputs that waited too long for an exit of the guest.
    pub starved: Starved,
}

/// The first failure of a device thread: the run ends with it.
type Failure = Arc<Mutex<Option<Error>>>;

/// Where a guest's inputs come from: the way in from taps, disks and keys, the clock and the entropy.
pub struct Inlet {
    inbox: Inbox,
    sender: InboxSender,
    disks: BTreeMap<u8, Disk>,
    clock: Option<HostClock>,
    entropy: Entropy,
    failure: Failure,
    slept: Duration,
    starvation: Option<Starvation>,
}

/// Guest time as the host's clock has it.
struct HostClock {
    start: Instant,
    /// Guest time at `start`, ns.
    base_ns: u64,
    /// How far guest time was behind then, ns.
    behind_ns: u64,
}

/// A guest whose time is behind is slewed by this part: it never jumps.
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
    /// A fixed stream for each position (splitmix64), for runs that let nothing of the host in: what a restored
    /// machine is told does not depend on what was asked before.
    Fixed,
}

impl Inlet {
    /// A way in without devices. `time_ns` is the guest time from which the clock goes on, `behind_ns` how much later
    /// it should be.
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
                let random = File::open("/dev/urandom").map_err(Error::host("/dev/urandom"))?;
                let clock = HostClock { start: Instant::now(), base_ns: time_ns, behind_ns };
                (Some(clock), Entropy::Host(random))
            }
            ClockMode::Virtual => (None, Entropy::Fixed),
        };
        let (disks, failure) = Default::default();
        let (slept, starvation) = (Duration::ZERO, None);
        Ok(Inlet { inbox, sender, disks, clock, entropy, failure, slept, starvation })
    }

    /// Lets the frames of a tap in, for the network device in `slot`.
    pub fn attach_tap(&mut self, slot: u8, tap: Arc<Tap>) {
        let (failure, sender) = (self.failure.clone(), self.sender.clone());
        std::thread::spawn(move || {
            if let Err(e) = receive_frames(slot, &tap, &sender) {
                fail(&failure, Error::Host { what: "tap".into(), source: e }, &sender);
            }
        });
    }

    /// Connects the disk in `slot` to its image.
    pub fn attach_disk(&mut self, slot: u8, image: Image) {
        let (failure, sender) = (self.failure.clone(), self.sender.clone());
        let disk = Disk::start(image, move |id, result| match result {
            Ok(result) => sender.send(Origin::Disk(slot), Input::DiskDone { slot, id, result }).is_ok(),
            Err(e) => {
                fail(&failure, e, &sender);
                false
            }
        });
        self.disks.insert(slot, disk);
    }

    /// The way in for other threads.
    pub fn sender(&self) -> &InboxSender {
        &self.sender
    }

    /// Sees to a guest that does not come to a stop by itself, and notices when inputs wait longer than `limit` for an exit.
    pub fn watch_for_starvation(&mut self, unit: PositionUnit, limit: Duration) {
        // Looks even when nothing else comes: guest time waits as well.
        let every = match unit {
            PositionUnit::SynchronousExits => Duration::from_millis(LOOK_MS.into()),
            PositionUnit::Branches => Duration::from_nanos(LAG_MAX_NS),
            PositionUnit::Instructions | PositionUnit::Steps => return,
        };
        self.starvation = Some(Starvation::new(limit));
        let sender = self.sender.clone();
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(every);
                sender.nudge();
            }
        });
    }

    /// Something waits for the guest's exit behind `at`.
    ///
    /// # Errors
    /// A device has failed.
    pub fn starving(&mut self, at: Position) -> Result<(), Error> {
        if let Some(starvation) = &mut self.starvation {
            starvation.look(at);
        }
        self.check_failure()
    }

    /// The next input that waits and that the machine `takes`.
    ///
    /// # Errors
    /// A device has failed.
    pub fn poll(&mut self, takes: &mut dyn FnMut(&Input) -> bool) -> Result<Option<Input>, Error> {
        self.check_failure()?;
        Ok(self.inbox.take(takes))
    }

    /// Somebody asked the run to stop, or a device failed.
    pub fn stop_requested(&self) -> bool {
        self.inbox.stop_requested()
    }

    /// Guest time by the host's clock, `None` if it is virtual.
    pub fn time_ns(&self) -> Option<u64> {
        self.clock.as_ref().map(|c| c.time_ns(c.start.elapsed()))
    }

    /// Sleeps until something arrives or guest time is `until_ns`, at most for `longest`.
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
    /// The host has no entropy.
    pub fn answer(&mut self, at: Position, question: &Question) -> Result<Answer, Error> {
        match question {
            Question::Entropy { len, .. } => {
                let mut bytes = vec![0; *len as usize];
                self.entropy.fill(at, &mut bytes)?;
                Ok(Answer::Entropy(bytes))
            }
            Question::Time { time_ns } => {
                let now_ns = self.time_ns().unwrap_or(time_ns + ASKING_NS);
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
        let sent = self.disks.get(&request.slot).map(|disk| disk.request(request));
        // Without its thread there is a failure to tell.
        if sent == Some(true) { Ok(()) } else { self.check_failure() }
    }

    fn check_failure(&self) -> Result<(), Error> {
        let failed = self.failure.lock().unwrap_or_else(PoisonError::into_inner).take();
        failed.map_or(Ok(()), Err)
    }
}

/// Where what the guest prints goes.
pub enum ConsoleOut {
    /// To standard output, which is waited for.
    Printer(Printer),
    /// To those who read it, who are not waited for.
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

/// Where a guest's outputs go.
pub struct Outlet {
    taps: BTreeMap<u8, Arc<Tap>>,
    console: ConsoleOut,
    frames_sent: u64,
    frames_dropped: u64,
}

impl Outlet {
    /// A way out without taps.
    pub fn new(console: ConsoleOut) -> Outlet {
        Outlet { taps: BTreeMap::new(), console, frames_sent: 0, frames_dropped: 0 }
    }

    /// Where the console's output goes.
    pub fn console(&mut self) -> &mut ConsoleOut {
        &mut self.console
    }

    /// Lets the frames of the network device in `slot` out through a tap.
    pub fn attach_tap(&mut self, slot: u8, tap: Arc<Tap>) {
        self.taps.insert(slot, tap);
    }

    /// Sends an output.
    ///
    /// # Errors
    /// Standard output is gone.
    pub fn send(&mut self, output: Output) -> Result<(), Error> {
        match output {
            Output::Frame { slot, bytes } => {
                if let Some(tap) = self.taps.get(&slot) {
                    match tap.send(&bytes) {
                        Ok(()) => self.frames_sent += 1,
                        // As on a wire, a frame that does not get through is lost; the summary counts it.
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

/// The host as the outside of a guest that is not protected: outputs leave at once.
pub struct Host {
    /// The way in.
    pub inlet: Inlet,
    /// The way out.
    pub outlet: Outlet,
}

impl Host {
    /// What was done so far.
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
        let satisfied = matches!(&self.outlet.console, ConsoleOut::Printer(p) if p.is_satisfied());
        satisfied || self.inlet.stop_requested()
    }

    fn time_ns(&mut self) -> Option<u64> {
        self.inlet.time_ns()
    }

    fn wait(&mut self, until_ns: Option<u64>) -> Result<(), Error> {
        self.inlet.wait(until_ns, None);
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
        // Standard output is the guest's.
        eprintln!("digest {} {}", at.count, digest.total());
        Ok(())
    }
}

impl Entropy {
    fn fill(&mut self, at: Position, bytes: &mut [u8]) -> Result<(), Error> {
        match self {
            Entropy::Host(file) => file.read_exact(bytes).map_err(Error::host("/dev/urandom")),
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

/// Hands frames from the tap to the guest until the run is over.
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
                poll(&mut [PollFd::new(tap.as_fd(), PollFlags::POLLIN)], PollTimeout::from(LOOK_MS))?;
            }
            Err(e) => return Err(e),
        }
    }
}

/// Ends the run with a device's failure.
fn fail(failure: &Failure, error: Error, sender: &InboxSender) {
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
