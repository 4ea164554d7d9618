//! The world around a live machine: its tap, disks, console, clock and entropy. All of vmft's I/O for a guest.

pub mod console;
pub mod disk;
pub mod tap;
pub mod terminal;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use entry::{Answer, Console, DiskRequest, Input, Output, Position, Question};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm::inbox::{Inbox, InboxSender, Origin};
use vmm::machine::StateDigest;
use vmm::source::Outside;

use crate::error::Error;
use crate::options::ClockMode;
use console::Printer;
use tap::Tap;

/// The longest frame that a tap gives: 64 KiB.
const FRAME_MAX: usize = 65_536;
/// A thread that waits for its device looks this often whether the run is over.
const LOOK_MS: u8 = 100;

/// What was done, for the summary.
#[derive(Clone, Copy, Debug, Default)]
pub struct Traffic {
    /// Frames to the network.
    pub frames_sent: u64,
    /// Frames that the host's network did not take.
    pub frames_dropped: u64,
    /// Time slept while the guest was idle.
    pub slept: Duration,
}

/// The first failure of a device thread: the run ends with it.
type Failure = Arc<Mutex<Option<Error>>>;

/// The host as a guest's outside.
pub struct Host {
    inbox: Inbox,
    printer: Printer,
    taps: BTreeMap<u8, Arc<Tap>>,
    disks: BTreeMap<u8, Sender<DiskRequest>>,
    clock: Option<HostClock>,
    entropy: Entropy,
    failure: Failure,
    traffic: Traffic,
}

/// Guest time as the host's clock has it.
struct HostClock {
    start: Instant,
    /// Guest time at `start`, ns.
    base_ns: u64,
}

/// Where random numbers come from.
enum Entropy {
    Host(File),
    /// A fixed stream for each position (splitmix64), for runs that let nothing of the host in: what a restored
    /// machine is told does not depend on what was asked before.
    Fixed,
}

impl Host {
    /// An outside without devices. `time_ns` is the guest time from which the clock goes on.
    ///
    /// # Errors
    /// /dev/urandom cannot be opened.
    pub fn new(inbox: Inbox, printer: Printer, clock: ClockMode, time_ns: u64) -> Result<Host, Error> {
        let (clock, entropy) = match clock {
            ClockMode::Host => {
                let random = File::open("/dev/urandom").map_err(Error::host("/dev/urandom"))?;
                (Some(HostClock { start: Instant::now(), base_ns: time_ns }), Entropy::Host(random))
            }
            ClockMode::Virtual => (None, Entropy::Fixed),
        };
        Ok(Host {
            inbox,
            printer,
            taps: BTreeMap::new(),
            disks: BTreeMap::new(),
            clock,
            entropy,
            failure: Failure::default(),
            traffic: Traffic::default(),
        })
    }

    /// Connects the network device in `slot` to a tap, whose frames come in through `sender`.
    pub fn attach_tap(&mut self, slot: u8, tap: Tap, sender: InboxSender) {
        let tap = Arc::new(tap);
        self.taps.insert(slot, tap.clone());
        let failure = self.failure.clone();
        std::thread::spawn(move || {
            if let Err(e) = receive_frames(slot, &tap, &sender) {
                fail(&failure, Error::Host { what: "tap".into(), source: e }, &sender);
            }
        });
    }

    /// Connects the disk in `slot` to its image.
    pub fn attach_disk(&mut self, slot: u8, image: disk::Image, sender: InboxSender) {
        let (requests, work) = channel();
        self.disks.insert(slot, requests);
        let failure = self.failure.clone();
        std::thread::spawn(move || {
            // Requests run one after the other, so those that overlap run in their order.
            for request in work {
                match image.perform(&request) {
                    Ok(result) => {
                        let done = Input::DiskDone { slot, id: request.id, result };
                        if sender.send(Origin::Disk(slot), done).is_err() {
                            return;
                        }
                    }
                    Err(e) => return fail(&failure, e, &sender),
                }
            }
        });
    }

    /// Tells the user how far a silent guest is, now and then.
    pub fn show_progress(&mut self, instructions: u64) {
        self.printer.show_progress(instructions);
    }

    /// What was done so far.
    pub fn traffic(&self) -> Traffic {
        self.traffic
    }

    fn check_failure(&self) -> Result<(), Error> {
        let failed = self.failure.lock().unwrap_or_else(PoisonError::into_inner).take();
        failed.map_or(Ok(()), Err)
    }
}

impl Outside for Host {
    type Error = Error;

    fn poll(&mut self, takes: &mut dyn FnMut(&Input) -> bool) -> Result<Option<Input>, Error> {
        self.check_failure()?;
        Ok(self.inbox.take(takes))
    }

    fn stop_requested(&mut self) -> bool {
        self.printer.is_satisfied() || self.inbox.stop_requested()
    }

    fn time_ns(&mut self) -> Option<u64> {
        self.clock.as_ref().map(|c| c.base_ns + c.start.elapsed().as_nanos() as u64)
    }

    fn wait(&mut self, until_ns: Option<u64>) -> Result<(), Error> {
        let now = self.time_ns();
        let timeout = until_ns.zip(now).map(|(until, now)| Duration::from_nanos(until.saturating_sub(now)));
        let asleep = Instant::now();
        self.inbox.wait(timeout);
        self.traffic.slept += asleep.elapsed();
        Ok(())
    }

    fn answer(&mut self, at: Position, question: &Question) -> Result<Answer, Error> {
        match question {
            Question::Entropy { len, .. } => {
                let mut bytes = vec![0; *len as usize];
                self.entropy.fill(at, &mut bytes)?;
                Ok(Answer::Entropy(bytes))
            }
        }
    }

    fn send(&mut self, output: Output) -> Result<(), Error> {
        match output {
            Output::Frame { slot, bytes } => {
                if let Some(tap) = self.taps.get(&slot) {
                    match tap.send(&bytes) {
                        Ok(()) => self.traffic.frames_sent += 1,
                        // As on a wire, a frame that does not get through is lost; the summary counts it.
                        Err(_) => self.traffic.frames_dropped += 1,
                    }
                }
                Ok(())
            }
            Output::Console { console: Console::Serial, bytes } => self.printer.print(&bytes),
            Output::Console { .. } => Ok(()),
        }
    }

    fn disk(&mut self, request: DiskRequest) -> Result<(), Error> {
        let sent = self.disks.get(&request.slot).map(|disk| disk.send(request));
        // Without its thread there is a failure to tell.
        if sent.is_none_or(|s| s.is_err()) { self.check_failure() } else { Ok(()) }
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
