//! One side of a pair at run time: the agent, its connection, its gate and its way out, under one mutex.
//!
//! Three threads meet here. The guest's appends records and holds outputs, and writes to the socket itself, so that no
//! thread is between an output and the wire. The pump reads the socket and lets outputs go when the backup has acknowledged
//! them; in a bulk transfer the guest's thread does that too ([`polling`]). The store's answers come on a thread of its
//! client. Each tells the agent what has happened and does what it asks for, in order, before it lets go of the mutex.

mod guest_side;
mod operator;
mod polling;
mod pump;

pub use guest_side::Duty;
use polling::Polling;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agent::{Action, Agent, Event, Exit, Hello, Opened, Refusal, Role, Verdict};
use entry::Output;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::time::{ClockId, clock_gettime};
use test_and_set::blocking::Blocking;
use test_and_set::names::{Generation, VmName};
use test_and_set::store::{Outcome, StoreError, chain};
use tracing::{debug, info, warn};
use vmm::gate::Gate;
use vmm::inbox::InboxSender;

use super::announce::Announcer;
use super::errands::Errands;
use super::hook::Hook;
use super::link::Link;
use super::spent::Spent;
use super::story::Story;
use crate::error::Error;
use crate::failpoint;
use crate::outside::Outlet;

/// How long a question to the store may take before it counts as not answered.
const STORE_PATIENCE: Duration = Duration::from_secs(1);
/// A guest's thread that waits makes a turn at least so often, so that its peer sees it alive.
pub const TURN_INTERVAL: Duration = Duration::from_millis(50);

/// See the module.
pub struct Replica {
    vm: VmName,
    store: Blocking,
    state: Mutex<State>,
    /// Something that a waiting thread may have waited for.
    changed: Condvar,
    /// Wakes the pump.
    wake: EventFd,
    /// There is a [`Duty`] other than to run.
    attention: AtomicBool,
    /// When the primary's guest is due to be looked at.
    look_at: AtomicU64,
    /// Where the time goes.
    pub spent: Arc<Spent>,
}

struct State {
    agent: Agent,
    link: Option<Link>,
    gate: Gate,
    outlet: Outlet,
    announcer: Announcer,
    hook: Option<Hook>,
    /// Wakes the guest's thread out of the guest.
    guest: Option<InboxSender>,
    started: Option<Generation>,
    alone: bool,
    paused: bool,
    stop: bool,
    hand_over: bool,
    exit: Option<Exit>,
    /// The guest's thread has seen the exit, or there is none.
    finished: bool,
    refused: Option<Refusal>,
    /// The first failure of this host's own.
    failed: Option<Error>,
    /// Until when the pump sleeps, unless it is woken.
    sleeps_until: u64,
    polling: Polling,
    /// Threads that wait for a change.
    waiting: usize,
    /// What takes long, and needs a thread that may do more than the guest's.
    errands: Option<Errands>,
    /// When the primary's guest was last looked at, or had waited: near enough the time of what it appends.
    looked_at: u64,
    /// Records appended.
    appended: u64,
    story: Story,
    spent: Arc<Spent>,
}

type Guard<'a> = MutexGuard<'a, State>;

/// ns of a clock that goes on while the host sleeps.
pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).unwrap_or_else(|e| unreachable!("CLOCK_BOOTTIME: {e}"));
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}

impl Replica {
    /// A replica that waits for its peer.
    ///
    /// # Errors
    /// This host has no descriptor left.
    pub fn new(
        vm: VmName,
        store: Blocking,
        agent: Agent,
        outlet: Outlet,
        announcer: Announcer,
        hook: Option<Hook>,
    ) -> Result<Arc<Replica>, Error> {
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC);
        let wake = wake.map_err(|e| Error::host("eventfd")(e.into()))?;
        let spent = Arc::new(Spent::default());
        let state = State {
            agent,
            link: None,
            gate: Gate::default(),
            outlet,
            announcer,
            hook,
            guest: None,
            started: None,
            alone: false,
            paused: false,
            stop: false,
            hand_over: false,
            exit: None,
            finished: false,
            refused: None,
            failed: None,
            sleeps_until: 0,
            polling: Polling::default(),
            waiting: 0,
            errands: Some(Errands::start()?),
            looked_at: now_ns(),
            appended: 0,
            story: Story::default(),
            spent: spent.clone(),
        };
        let replica = Arc::new(Replica {
            vm,
            store,
            state: state.into(),
            changed: Condvar::new(),
            wake,
            attention: false.into(),
            look_at: 0.into(),
            spent,
        });
        let pump = replica.clone();
        std::thread::Builder::new()
            .name("pump".into())
            .spawn(move || pump.pump())
            .map_err(Error::host("thread"))?;
        // An unprotected primary asks the store at once.
        replica.settle(&mut replica.lock());
        Ok(replica)
    }

    fn lock(&self) -> Guard<'_> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the agent what has happened, and does what follows.
    pub fn handle(self: &Arc<Self>, event: Event<'_>) {
        let mut state = self.lock();
        state.agent.handle(now_ns(), event);
        self.settle(&mut state);
    }

    /// A connection to the peer, with the bytes that were read from it already.
    pub fn connected(self: &Arc<Self>, link: Link, bytes: &[u8]) {
        let mut state = self.lock();
        if let Err(e) = link.set_nonblocking() {
            return warn!("connection: {e}");
        }
        (state.link, state.refused) = (Some(link), None);
        state.agent.handle(now_ns(), Event::Connected);
        if !bytes.is_empty() {
            state.agent.handle(now_ns(), Event::Received(bytes));
        }
        self.settle(&mut state);
        self.wake_pump();
    }

    /// There is a connection.
    pub fn is_connected(&self) -> bool {
        self.lock().link.is_some()
    }

    /// Somebody said hello on another connection.
    pub fn stranger(self: &Arc<Self>, hello: &Hello) {
        self.handle(Event::Stranger(hello));
    }

    /// Does what the agent asks for and writes what it says.
    fn settle(self: &Arc<Self>, state: &mut State) {
        loop {
            while let Some(action) = state.agent.next_action() {
                self.act(state, action);
            }
            if state.write().is_ok() {
                break;
            }
            state.agent.handle(now_ns(), Event::Disconnected);
        }
        state.tell_hook();
        if state.deadline() < state.sleeps_until {
            self.wake_pump();
        }
    }

    fn act(self: &Arc<Self>, state: &mut State, action: Action) {
        debug!(?action);
        match action {
            Action::Close => self.close(state),
            Action::Refused(refusal) => {
                warn!("the peer is refused: {refusal}");
                state.refused = Some(refusal);
            }
            Action::Open { generation, members } => {
                let (replica, store, vm) = (self.clone(), self.store.clone(), self.vm.clone());
                state.send(move || {
                    let opened = opened(store.open(&vm, generation, &members, STORE_PATIENCE));
                    replica.handle(Event::Opened(opened));
                });
            }
            Action::Start { generation } => {
                info!(%generation, "the pair is open");
                state.started = Some(generation);
                // The switches may know the guest's address from an earlier run on another host.
                if state.agent.status(now_ns()).role == Role::Primary {
                    state.announce();
                }
            }
            Action::Release => state.release(),
            Action::Drop => state.drop_released(),
            Action::Suspected(suspicion) => {
                warn!("the peer is lost: {suspicion}");
                state.story.lost(now_ns(), suspicion.to_string());
            }
            Action::Take { generation, who } => {
                info!(%generation, "asking the store who lives");
                state.story.asked(now_ns());
                let replica = self.clone();
                let tell = move |v| replica.handle(Event::Verdict(verdict(v)));
                self.store.begin_take(self.vm.clone(), generation, who, STORE_PATIENCE, tell);
            }
            Action::GoLive => {
                state.release();
                state.alone = true;
                state.story.verdict(now_ns());
                // One that was started without a peer has not lost any.
                state.story.failovers += u64::from(state.agent.status(now_ns()).peer.is_some());
                warn!("this side lives, alone: UNPROTECTED");
                state.announce();
            }
            Action::Pause => state.paused = true,
            Action::Forget { generation } => {
                let (replica, store, vm) = (self.clone(), self.store.clone(), self.vm.clone());
                state.send(move || {
                    let forgotten = store.forget(&vm, generation, STORE_PATIENCE);
                    if let Err(e) = &forgotten {
                        warn!("the store has not forgotten {vm}: {}", chain(e));
                    }
                    replica.handle(Event::Forgotten(forgotten.is_ok()));
                });
            }
            Action::Halt(exit) => {
                info!("out: {exit}");
                // What is still to be said is said, or the connection is gone.
                state.write().ok();
                self.close(state);
                state.exit = Some(exit);
            }
        }
        self.announce_change(state);
    }

    /// Lets waiting threads, and that of the guest, look.
    fn announce_change(&self, state: &State) {
        let State { alone, paused, stop, hand_over, exit, .. } = state;
        if *alone || *paused || *stop || *hand_over || exit.is_some() {
            self.attention.store(true, Ordering::Release);
            if let Some(guest) = &state.guest {
                guest.nudge();
            }
        }
        self.changed.notify_all();
    }

    fn close(&self, state: &mut State) {
        // Broken or not, nothing more is to be had from it.
        state.write().ok();
        if let Some(link) = state.link.take() {
            state.send(move || link.close());
        }
    }

    /// Waits for a change, at most so long; the pump reads the socket meanwhile.
    fn wait<'a>(&'a self, mut state: Guard<'a>, patience: Duration) -> Guard<'a> {
        self.hand_back(&mut state);
        self.wait_for(state, patience)
    }

    /// Waits for a change, at most so long.
    fn wait_for<'a>(&'a self, mut state: Guard<'a>, patience: Duration) -> Guard<'a> {
        state.waiting += 1;
        let waiting = self.changed.wait_timeout(state, patience);
        state = waiting.unwrap_or_else(PoisonError::into_inner).0;
        state.waiting -= 1;
        state
    }

    /// The socket is the pump's again, for the guest's thread cannot read it for a while.
    fn hand_back(&self, state: &mut State) {
        if state.polling.end(now_ns()) {
            self.wake_pump();
        }
    }

    fn wake_pump(&self) {
        // It is full only when the pump has been woken already.
        self.wake.write(1).ok();
    }

    /// The guest's thread is done. Lets the connections end that were closed.
    pub fn finish(&self) {
        let errands = {
            let mut state = self.lock();
            state.finished = true;
            self.changed.notify_all();
            state.errands.take()
        };
        if let Some(errands) = errands {
            errands.finish();
        }
    }

    /// This host cannot run the guest.
    pub fn fail(self: &Arc<Self>, error: Error) {
        let reason = error.to_string();
        self.lock().failed.get_or_insert(error);
        self.handle(Event::HostFailed(&reason));
    }

    /// The failure of this host that ended it.
    pub fn take_failure(&self) -> Option<Error> {
        self.lock().failed.take()
    }
}

impl State {
    /// Sends somebody on an errand; when the replica has finished, nobody is left to go.
    fn send(&self, errand: impl FnOnce() + Send + 'static) {
        if let Some(errands) = &self.errands {
            errands.send(errand);
        }
    }

    /// Reads what has come from the peer, and tells the agent of it. False: nothing has.
    fn read(&mut self) -> bool {
        let Some(link) = &mut self.link else { return false };
        let now = now_ns();
        self.polling.reads(now);
        let event = match link.read() {
            Ok([]) => return false,
            Ok(bytes) => {
                self.story.log_bytes += bytes.len() as u64;
                self.spent.reads.add(1);
                self.polling.moved(now, bytes.len() as u64);
                Event::Received(bytes)
            }
            Err(e) => {
                debug!("connection: {e}");
                self.link = None;
                Event::Disconnected
            }
        };
        self.agent.handle(now, event);
        true
    }

    /// The guest's thread reads, if it is for it to do.
    fn poll(&mut self, now: u64) {
        if self.polling.due(now).is_some_and(|due| due <= now) {
            self.read();
        }
    }

    fn write(&mut self) -> io::Result<()> {
        let Some(link) = &mut self.link else { return Ok(()) };
        let written = link.write(&mut self.agent).map(|bytes| {
            // Often there is nothing: this comes after whatever has happened.
            if bytes > 0 {
                self.story.log_bytes += bytes;
                self.polling.moved(now_ns(), bytes);
                self.spent.writes.add(1);
            }
        });
        if let Err(e) = &written {
            debug!("connection: {e}");
            self.link = None;
        }
        written
    }

    /// When the pump has something to do.
    fn deadline(&self) -> u64 {
        self.agent.deadline().into_iter().chain(self.announcer.deadline()).min().unwrap_or(u64::MAX)
    }

    /// Begins to tell the network where the guest is.
    fn announce(&mut self) {
        self.announcer.start(now_ns());
        self.tick_announcer();
    }

    fn tell_hook(&mut self) {
        if let Some(hook) = &mut self.hook {
            hook.note(&self.agent.status(now_ns()));
        }
    }

    fn tick_announcer(&mut self) {
        let now = now_ns();
        self.announcer.tick(now, || self.agent.may_announce(now));
    }

    /// Lets out what may leave, asking before each.
    fn release(&mut self) {
        loop {
            failpoint::stop("before-decision");
            let now = now_ns();
            let Some(output) = self.gate.release(self.agent.release_limit(now)) else { return };
            self.spent.held_ns.add(now);
            failpoint::stop("before-write");
            if self.alone && matches!(output, Output::Frame { .. }) {
                self.story.frame(now);
            }
            if let Err(e) = self.outlet.send(output) {
                warn!("an output is lost: {e}");
            }
            failpoint::stop("after-write");
            // Who lives alone has no log that counts them.
            if !self.alone {
                self.agent.released(now, self.gate.released());
            }
        }
    }

    /// Backup: what has left over there is of no use here.
    fn drop_released(&mut self) {
        let limit = self.agent.drop_limit();
        if limit > self.gate.released() {
            let now = now_ns();
            while self.gate.release(limit).is_some() {
                self.spent.held_ns.add(now);
            }
        }
    }
}

fn verdict(verdict: test_and_set::store::Verdict) -> Verdict {
    use test_and_set::store::Verdict as Told;
    match verdict {
        Told::Won => Verdict::Won,
        Told::Lost(holder) => Verdict::Lost(holder),
        Told::Stale => Verdict::Stale,
        Told::Unknown(e) => {
            warn!("the store does not answer: {}", chain(&e));
            Verdict::Unknown
        }
    }
}

fn opened(opened: Result<Outcome, StoreError>) -> Opened {
    match opened {
        Ok(Outcome::Done) => Opened::Done,
        Ok(Outcome::Stale) => Opened::Stale,
        Err(e) => {
            warn!("the store does not answer: {}", chain(&e));
            Opened::Unknown
        }
    }
}
