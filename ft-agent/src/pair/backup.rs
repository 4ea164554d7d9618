//! `vmft backup`: replays what its primary records, and goes live when that is lost.

use std::convert::Infallible;
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use agent::{Event, Exit, Hello, Role};
use entry::End;
use logging_channel::message::Message;
use logging_channel::stream::Inbox;
use rustls::ServerConfig;
use test_and_set::names::Generation;
use test_and_set::store::chain;
use tracing::{info, warn};
use vmm::guest_loop::{LoopError, Turn};
use vmm::replay::{ReplayError, Replayer};
use vmm::{GuestLoop, Machine, Slot};

use super::go_live::{end_beyond_the_log, go_live, run_alone};
use super::guest::{ChannelRecords, PairStandby, log_full_state};
use super::guest_thread::GuestThread;
use super::link::{Link, LinkError};
use super::options::PairPlan;
use super::replica::Replica;
use super::start::{Side, leave_on_signals};
use crate::error::Error;
use crate::failpoint;
use crate::guest::Guest;
use crate::outside::disk::Image;

/// How long a peer may take to shake hands and say hello.
const PATIENCE: Duration = Duration::from_secs(5);
/// Handshakes at one time; more are refused.
const HANDSHAKES_MAX: usize = 16;

/// Somebody who said hello.
struct Caller {
    link: Link,
    hello: Hello,
    /// What was read, the hello first.
    bytes: Vec<u8>,
}

/// Runs a backup to its end.
///
/// # Errors
/// As [`super::backup`].
pub fn run(plan: PairPlan) -> Result<(), Error> {
    let (mut guest, images) = Guest::new(&plan.machine, plan.clock())?;
    // The disks are read now, so that a primary does not wait for it.
    guest.identity()?;
    let side = Side::open(plan)?;
    let (door, callers) = Door::open(&side)?;
    let controlled = door.clone();
    let _control = side.control(move || controlled.replica())?;
    let (replica, generation) = loop {
        let Ok(caller) = callers.recv() else { return Ok(()) };
        guest.adopt(&caller.hello.identity);
        // The generation is the primary's to tell.
        let replica = side.replica(Role::Backup, guest.identity()?, Generation::FIRST)?;
        door.set(Some(replica.clone()));
        leave_on_signals(&replica)?;
        replica.handle(Event::Ready);
        replica.connected(caller.link, &caller.bytes);
        match replica.wait_started(true) {
            Ok(Some(generation)) => break (replica, generation),
            Ok(None) => {
                door.set(None);
                replica.leave(Exit::Stopped);
            }
            Err(exit) => {
                return super::ended(&side, None, &replica, exit, 0);
            }
        }
    };
    let slots = guest.config.slots.iter().enumerate();
    let slots = slots.filter(|(_, s)| matches!(s, Slot::Disk { .. })).map(|(n, _)| n as u8);
    side.sidecars.write(generation, true)?;
    let images = slots.zip(images).collect();
    let (machine, thread) = side.boot(guest)?;
    let (exit, position) = follow(&side, &replica, thread, machine, images);
    super::ended(&side, Some(generation), &replica, exit, position)
}

/// Replays until the log ends, then does what the verdict says.
fn follow(
    side: &Side,
    replica: &Arc<Replica>,
    thread: GuestThread,
    machine: Machine,
    images: Vec<(u8, Image)>,
) -> (Exit, u64) {
    let standby = PairStandby::new(replica.clone(), images.into_iter());
    let source = Replayer::new(ChannelRecords::new(replica.clone()), standby);
    let (end, guest) = thread.with(GuestLoop { machine, source }, replay);
    let at = guest.machine.position().count;
    let end = match end {
        Ok(end) => end,
        Err(e) => {
            replica.fail(failure(e));
            return (replica.wait_exit(), at);
        }
    };
    info!(position = at, "replayed to the end of the log");
    if let Err(exit) = replica.wait_verdict() {
        return (exit, at);
    }
    let (exit, machine) = live(side, replica, thread, guest, end);
    (exit, machine.map_or(at, |m| m.position().count))
}

type Replay = GuestLoop<Replayer<ChannelRecords, PairStandby>>;

/// Replays until the log, or the guest's run, ends.
fn replay(guest: &mut Replay) -> Result<Option<End>, LoopError<ReplayError<Infallible, Error>>> {
    let mut missed = 0;
    loop {
        for (flip, noted) in [("flip", true), ("flip-unseen", false)] {
            if failpoint::reached(flip) {
                let ram = guest.machine.ram();
                let page = ram.pages() / 2;
                ram.page(page)[0] ^= 1;
                if noted {
                    ram.note_written(page);
                }
            }
        }
        match guest.turn()? {
            Turn::Again => {
                let retries = guest.machine.counts().landings.retries;
                if std::mem::replace(&mut missed, retries) < retries {
                    warn!(
                        retries,
                        "the counter missed a position, which is sought again with twice the margin"
                    );
                }
            }
            Turn::Paused => return Ok(None),
            Turn::Finished(end) => return Ok(Some(end)),
        }
    }
}

fn live(
    side: &Side,
    replica: &Arc<Replica>,
    thread: GuestThread,
    guest: Replay,
    end: Option<End>,
) -> (Exit, Option<Machine>) {
    let GuestLoop { mut machine, source } = guest;
    match end_beyond_the_log(&mut machine, end) {
        Ok(None) => {}
        Ok(Some(reason)) => {
            replica.guest_ended(reason);
            return (replica.wait_exit(), Some(machine));
        }
        Err(e) => {
            replica.fail(e);
            return (replica.wait_exit(), None);
        }
    }
    let behind_ns = source.records().behind_ns(machine.time_ns());
    log_full_state(&mut machine);
    match go_live(side, replica, machine, source.into_standby(), behind_ns) {
        Ok(guest) => {
            let (exit, machine) = run_alone(replica, &thread, guest);
            (exit, Some(machine))
        }
        Err(e) => {
            replica.fail(e);
            (replica.wait_exit(), None)
        }
    }
}

fn failure<L: std::error::Error>(e: LoopError<ReplayError<L, Error>>) -> Error {
    match e {
        LoopError::Machine(e) => e.into(),
        LoopError::Source(ReplayError::Standby(e)) => e,
        LoopError::Source(ReplayError::Divergence(d)) => Error::Divergence(d),
        LoopError::Source(ReplayError::Log(e)) => {
            Error::Host { what: "log".into(), source: std::io::Error::other(e.to_string()) }
        }
    }
}

/// Where callers come in. The first that is let in is the primary; others are strangers to the replica that there is.
struct Door {
    tls: Arc<ServerConfig>,
    replica: Mutex<Option<Arc<Replica>>>,
    callers: SyncSender<Caller>,
    handshakes: AtomicUsize,
}

impl Door {
    fn open(side: &Side) -> Result<(Arc<Door>, Receiver<Caller>), Error> {
        let tls = test_and_set::tls::peer_server(&side.keys).map_err(|e| Error::config("keys", chain(&e)))?;
        let Some(address) = side.plan.listen else { return Err(Error::config("listen", "give --listen")) };
        let listener = TcpListener::bind(address).map_err(Error::host(format!("listen on {address}")))?;
        let (callers, wait) = sync_channel(0);
        let door = Arc::new(Door { tls, replica: Mutex::default(), callers, handshakes: 0.into() });
        let opened = door.clone();
        std::thread::Builder::new()
            .name("door".into())
            .spawn(move || opened.keep(&listener))
            .map_err(Error::host("thread"))?;
        info!(%address, "waiting for a primary");
        Ok((door, wait))
    }

    fn replica(&self) -> Option<Arc<Replica>> {
        self.replica.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, replica: Option<Arc<Replica>>) {
        *self.replica.lock().unwrap_or_else(PoisonError::into_inner) = replica;
    }

    fn keep(self: &Arc<Self>, listener: &TcpListener) {
        for tcp in listener.incoming() {
            let tcp = match tcp {
                Ok(tcp) => tcp,
                Err(e) => {
                    warn!("a connection cannot be accepted: {e}");
                    std::thread::sleep(Duration::from_millis(100));
                    continue;
                }
            };
            let from = tcp.peer_addr().map_or_else(|_| "somebody".into(), |a| a.to_string());
            if self.handshakes.fetch_add(1, Ordering::AcqRel) >= HANDSHAKES_MAX {
                warn!(%from, "refused: too many handshakes at once");
                self.handshakes.fetch_sub(1, Ordering::AcqRel);
                continue;
            }
            let door = self.clone();
            std::thread::spawn(move || {
                if let Err(why) = door.greet(tcp) {
                    warn!(%from, "refused: {why}");
                }
                door.handshakes.fetch_sub(1, Ordering::AcqRel);
            });
        }
    }

    fn greet(&self, tcp: TcpStream) -> Result<(), String> {
        let deadline = Instant::now() + PATIENCE;
        let caller = greet(tcp, self.tls.clone(), deadline)?;
        if let Some(replica) = self.replica() {
            replica.stranger(&caller.hello);
            return Err(format!(
                "a {:?} of {:?} calls, but there is a primary",
                caller.hello.role, caller.hello.vm
            ));
        }
        self.callers.try_send(caller).map_err(|_| "another primary is being met".to_owned())
    }
}

fn greet(tcp: TcpStream, tls: Arc<ServerConfig>, deadline: Instant) -> Result<Caller, String> {
    let text = |e: LinkError| e.to_string();
    let mut link = Link::accept(tcp, tls, PATIENCE).map_err(text)?;
    let (mut inbox, mut bytes) = (Inbox::new(), Vec::new());
    loop {
        let more = link.first_bytes(deadline).map_err(text)?;
        inbox.push(&more);
        bytes.extend(more);
        match inbox.message() {
            Ok(Some(Message::Hello(hello))) => return Ok(Caller { link, hello: *hello, bytes }),
            // The first message is a hello, or an error.
            Ok(_) => {}
            Err(e) => return Err(e.to_string()),
        }
    }
}
