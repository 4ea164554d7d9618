//! One side of a pair at run time: the agent, its connection, its gate and its way out, under one mutex.
//!
//! Three threads meet here. The guest's appends records and holds outputs, and writes to the socket itself, so that no
//! thread is between an output and the wire. The pump reads the socket, and lets outputs go when the backup has
//! acknowledged them. The store's answers come on a thread of its client. Each tells the agent what has happened and does
//! what it asks for, in order, before it lets go of the mutex.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use agent::{
    Action, Agent, Event, Exit, Hello, NextRecord, Opened, Pace, Phase, Refusal, Role, Status, Verdict,
};
use entry::log::{EndReason, Entry, Record};
use entry::{Console, Output, Position};
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime};
use test_and_set::blocking::Blocking;
use test_and_set::names::{Generation, VmName};
use test_and_set::store::{Outcome, StoreError, chain};
use tracing::{debug, error, info, warn};
use vmm::gate::Gate;
use vmm::inbox::InboxSender;

use super::announce::Announcer;
use super::failpoint;
use super::hook::Hook;
use super::link::Link;
use super::spent::Spent;
use super::status::{Report, phase_name, role_name};
use super::story::Story;
use crate::error::Error;
use crate::outside::{ConsoleOut, Outlet};

/// How long a question to the store may take before it counts as not answered.
const STORE_PATIENCE: Duration = Duration::from_secs(1);
/// A guest's thread that waits makes a turn at least so often, so that its peer sees it alive.
pub const TURN_INTERVAL: Duration = Duration::from_millis(50);
/// How long the guest's thread may take to end once its side is out.
const END_PATIENCE: Duration = Duration::from_secs(10);
/// The longest that a guest that is slowed sleeps at once.
const SLOW_MAX_NS: u64 = 20_000_000;

/// What the guest's thread has to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Duty {
    /// Run the guest.
    Run,
    /// Run it alone.
    Alone,
    /// End its run: the user wants it.
    Stop,
    /// Say in the log how it stands, and that it goes on elsewhere.
    HandOver,
    /// Leave.
    Exit(Exit),
}

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
    closing: Vec<JoinHandle<()>>,
    looked_at: u64,
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
            closing: Vec::new(),
            looked_at: now_ns(),
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
            spent,
        });
        let pump = replica.clone();
        std::thread::Builder::new()
            .name("pump".into())
            .spawn(move || pump.pump())
            .map_err(Error::host("thread"))?;
        // An unprotected primary asks the store at once.
        replica.settle(replica.lock());
        Ok(replica)
    }

    fn lock(&self) -> Guard<'_> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the agent what has happened, and does what follows.
    pub fn handle(self: &Arc<Self>, event: Event<'_>) {
        let mut state = self.lock();
        state.agent.handle(now_ns(), event);
        self.settle(state);
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
        self.settle(state);
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
    fn settle(self: &Arc<Self>, mut state: Guard<'_>) {
        loop {
            while let Some(action) = state.agent.next_action() {
                self.act(&mut state, action);
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
                std::thread::spawn(move || {
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
                std::thread::spawn(move || {
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
            state.closing.retain(|thread| !thread.is_finished());
            state.closing.push(std::thread::spawn(move || link.close()));
        }
    }

    fn wake_pump(&self) {
        // It is full only when the pump has been woken already.
        self.wake.write(1).ok();
    }

    /// Reads the socket and lets time pass, until the replica is out.
    fn pump(self: Arc<Self>) {
        let mut bytes = Vec::new();
        loop {
            let (socket, wants_write, sleep) = {
                let mut state = self.lock();
                if state.exit.is_some() {
                    return self.end_if_stuck(state);
                }
                let deadline = state.deadline();
                state.sleeps_until = deadline;
                let link = state.link.as_ref();
                let wants_write = link.is_some_and(Link::wants_write);
                let sleep = Duration::from_nanos(deadline.saturating_sub(now_ns()));
                (link.map(|l| l.socket().clone()), wants_write, sleep.min(Duration::from_secs(1)))
            };
            self.sleep(socket.as_deref(), wants_write, sleep);
            let mut state = self.lock();
            let read = state.link.as_mut().map(|link| link.read(&mut bytes));
            let event = match read {
                Some(Ok(())) if !bytes.is_empty() => {
                    state.story.log_bytes += bytes.len() as u64;
                    self.spent.reads.add(1);
                    Event::Received(&bytes)
                }
                None | Some(Ok(())) => Event::Tick,
                Some(Err(e)) => {
                    debug!("connection: {e}");
                    state.link = None;
                    Event::Disconnected
                }
            };
            state.agent.handle(now_ns(), event);
            state.tick_announcer();
            self.settle(state);
            self.changed.notify_all();
        }
    }

    /// A guest's thread that is stuck must not keep what is another's to use now: the tap, the disks, the sockets.
    fn end_if_stuck(&self, state: Guard<'_>) {
        let waiting = self.changed.wait_timeout_while(state, END_PATIENCE, |state| !state.finished);
        let (state, waited) = waiting.unwrap_or_else(PoisonError::into_inner);
        if let Some(exit) = &state.exit
            && waited.timed_out()
        {
            let out = Error::Out(exit.clone());
            error!("{out}; the guest's thread is stuck, and is left behind");
            std::process::exit(out.code().into());
        }
    }

    fn sleep(&self, socket: Option<&std::net::TcpStream>, wants_write: bool, time: Duration) {
        let flags = if wants_write { PollFlags::POLLIN | PollFlags::POLLOUT } else { PollFlags::POLLIN };
        let wake = PollFd::new(self.wake.as_fd(), PollFlags::POLLIN);
        let socket = socket.map(|s| PollFd::new(s.as_fd(), flags));
        let mut fds: Vec<_> = std::iter::once(wake).chain(socket).collect();
        // A signal ends it early, as does a wake-up: both are looked at by the caller.
        ppoll(&mut fds, Some(TimeSpec::from_duration(time)), None).ok();
        // There is something to take only if the pump was woken.
        self.wake.read().ok();
    }

    /// From where the guest's thread is woken.
    pub fn set_guest(&self, guest: InboxSender) {
        let mut state = self.lock();
        state.guest = Some(guest);
        self.announce_change(&state);
    }

    /// Waits until the pair is open, the peer is refused (`None`), or this side is out.
    ///
    /// # Errors
    /// This side is out.
    pub fn wait_started(&self, until_refused: bool) -> Result<Option<Generation>, Exit> {
        let mut state = self.lock();
        loop {
            if let Some(exit) = &state.exit {
                return Err(exit.clone());
            }
            if state.started.is_some() {
                return Ok(state.started);
            }
            if until_refused && state.refused.is_some() {
                return Ok(None);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether the guest's thread has another duty than to run.
    pub fn needs_attention(&self) -> bool {
        self.attention.load(Ordering::Acquire)
    }

    /// What the guest's thread has to do, which waits here while its guest has to rest.
    pub fn attend(&self, alone_already: bool) -> Duty {
        let mut state = self.lock();
        loop {
            if let Some(exit) = &state.exit {
                return Duty::Exit(exit.clone());
            }
            if state.stop {
                state.stop = false;
                return Duty::Stop;
            }
            if state.alone {
                self.attention.store(false, Ordering::Release);
                state.paused = false;
                return if alone_already { Duty::Run } else { Duty::Alone };
            }
            if std::mem::take(&mut state.hand_over) {
                return Duty::HandOver;
            }
            if !state.paused {
                self.attention.store(false, Ordering::Release);
                return Duty::Run;
            }
            state = self.rest(state);
        }
    }

    /// Waits until the replica is out.
    pub fn wait_exit(&self) -> Exit {
        let mut state = self.lock();
        loop {
            if let Some(exit) = &state.exit {
                return exit.clone();
            }
            state = self.rest(state);
        }
    }

    /// Waits until this side lives or is out.
    pub fn wait_verdict(&self) -> Result<(), Exit> {
        let mut state = self.lock();
        loop {
            if let Some(exit) = &state.exit {
                return Err(exit.clone());
            }
            if state.alone {
                return Ok(());
            }
            state = self.rest(state);
        }
    }

    /// A turn of a guest's loop that has nothing to do.
    fn rest<'a>(&'a self, mut state: Guard<'a>) -> Guard<'a> {
        let at = state.agent.status(now_ns()).position;
        state.agent.turn(now_ns(), at);
        self.changed.wait_timeout(state, TURN_INTERVAL).unwrap_or_else(PoisonError::into_inner).0
    }

    /// Ends this side before its guest has run, or at once when there is nothing to lose.
    pub fn leave(&self, exit: Exit) {
        let mut state = self.lock();
        self.close(&mut state);
        state.exit.get_or_insert(exit);
        state.finished = true;
        self.announce_change(&state);
        drop(state);
        self.wake_pump();
    }

    /// The user ends the VM's run.
    pub fn stop(&self) {
        let mut state = self.lock();
        state.stop = true;
        self.announce_change(&state);
    }

    /// A primary lets the backup go on, as soon as its guest's thread has said in the log how the guest stands; a backup
    /// leaves.
    pub fn hand_over(self: &Arc<Self>) {
        let mut state = self.lock();
        if state.agent.status(now_ns()).role == Role::Backup {
            drop(state);
            return self.handle(Event::HandOver);
        }
        state.hand_over = true;
        self.announce_change(&state);
    }

    /// The guest's thread is done. Lets the connections end that were closed.
    pub fn finish(&self) {
        let closing = {
            let mut state = self.lock();
            state.finished = true;
            self.changed.notify_all();
            std::mem::take(&mut state.closing)
        };
        for thread in closing {
            // It does not panic, and if it did there would be nothing to close any more.
            thread.join().ok();
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

    /// What the agent tells of itself.
    pub fn status(&self) -> Status {
        self.lock().agent.status(now_ns())
    }

    /// What `vmft status` shows.
    pub fn report(&self) -> Report {
        let mut state = self.lock();
        let now = now_ns();
        let status = state.agent.status(now);
        let cursors = status.cursors;
        let log_bytes_per_s = state.story.log_rate(now);
        Report {
            name: self.vm.to_string(),
            role: role_name(status.role).into(),
            phase: phase_name(status.phase).into(),
            protected: status.phase == Phase::Protected,
            generation: status.generation.map(|g| g.0),
            incarnation: state.agent.incarnation().to_string(),
            peer: status.peer.map(|p| p.to_string()),
            recorded: cursors.recorded,
            sent: cursors.sent,
            acked: cursors.acked,
            replayed: cursors.replayed,
            outputs_recorded: state.gate.recorded(),
            outputs_released: state.gate.released(),
            outputs_held: state.gate.recorded() - state.gate.released(),
            lag_ms: status.lag_ns as f64 / 1e6,
            lag_bytes: status.lag_bytes,
            log_bytes_per_s,
            log_bytes: state.story.log_bytes,
            spent: self.spent.at(now, state.gate.recorded() - state.gate.released()),
            position: status.position.count,
            peer_position: status.peer_position.count,
            failovers: state.story.failovers,
            failover: state.story.failover.clone(),
        }
    }

    /// The guest runs on, after this side went live.
    pub fn runs_on(&self) {
        self.lock().story.running(now_ns());
    }

    /// This side will do nothing any more.
    pub fn is_out(&self) -> bool {
        self.lock().exit.is_some()
    }

    /// What the guest prints from now on.
    pub fn read_console(&self) -> Receiver<Arc<[u8]>> {
        match self.lock().outlet.console() {
            ConsoleOut::Readers(readers) => readers.add(),
            ConsoleOut::Printer(_) => unreachable!("a replica's console has readers"),
        }
    }

    /// Types on the guest's console, if it runs here.
    pub fn type_text(&self, console: Console, text: &[u8]) {
        let guest = self.lock().guest.clone();
        if let Some(guest) = guest {
            // A guest whose run is over takes nothing.
            guest.type_text(console, text).ok();
        }
    }

    /// Nothing is decided yet: no peer, or none that fits.
    pub fn is_starting(&self) -> bool {
        let state = self.lock();
        state.exit.is_none() && state.started.is_none()
    }

    /// A guest's thread that has waited makes a turn.
    pub fn turn(self: &Arc<Self>) {
        let mut state = self.lock();
        let at = state.agent.status(now_ns()).position;
        state.agent.turn(now_ns(), at);
        self.settle(state);
    }

    /// Primary: the guest's loop makes a turn; it waits here as long as its guest is too fast.
    pub fn look(self: &Arc<Self>, at: Position) {
        failpoint::wedge("guest");
        let (begin, mut rested) = (now_ns(), 0);
        let mut state = self.lock();
        loop {
            let now = now_ns();
            state.agent.turn(now, at);
            let pace = state.agent.pace(now);
            let ran = now.saturating_sub(state.looked_at);
            self.settle(state);
            let rest_begins = now_ns();
            match pace {
                _ if self.needs_attention() => break,
                Pace::Free => break,
                Pace::Share(share) => {
                    let rest = ran.saturating_mul(1000 - share) / share.max(1);
                    std::thread::sleep(Duration::from_nanos(rest.min(SLOW_MAX_NS)));
                    rested += now_ns() - rest_begins;
                    break;
                }
                Pace::Stop => {
                    let waiting = self.changed.wait_timeout(self.lock(), TURN_INTERVAL);
                    state = waiting.unwrap_or_else(PoisonError::into_inner).0;
                    rested += now_ns() - rest_begins;
                }
            }
        }
        let end = now_ns();
        self.lock().looked_at = end;
        self.spent.slowed_ns.add(rested);
        self.spent.recording_ns.add(end - begin - rested);
    }

    /// Primary: appends a record. An output's is sent at the next [`Replica::look`], together with those of the other
    /// outputs of the same exit.
    pub fn append(self: &Arc<Self>, record: &Record) {
        let begin = now_ns();
        let mut state = self.lock();
        state.agent.append(now_ns(), record);
        if !matches!(record.entry, Entry::Output(_)) {
            self.settle(state);
        }
        self.spent.recording_ns.add(now_ns() - begin);
    }

    /// Holds an output until it may leave.
    pub fn hold(self: &Arc<Self>, output: Output) {
        let begin = now_ns();
        let mut state = self.lock();
        state.gate.hold(output);
        self.spent.held_ns.sub(begin);
        state.drop_released();
        state.release();
        // Nobody looks at a guest that is alone; one with a backup is looked at before it runs on.
        if state.alone {
            self.settle(state);
        }
        self.spent.recording_ns.add(now_ns() - begin);
    }

    /// Backup: everything that was taken has been replayed, up to here; waits for the next record. `None`: there are no
    /// more.
    pub fn next_record(self: &Arc<Self>, replayed: u64, at: Position) -> Option<Record> {
        failpoint::wedge("guest");
        self.handle(Event::Replayed { records: replayed, position: at });
        let mut state = self.lock();
        loop {
            if state.exit.is_some() {
                return None;
            }
            state.agent.turn(now_ns(), at);
            match state.agent.next_record() {
                NextRecord::Record(record) => return Some(record),
                NextRecord::End => return None,
                NextRecord::Wait => {
                    let waiting = self.changed.wait_timeout(state, TURN_INTERVAL);
                    state = waiting.unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        }
    }

    /// The guest's run is over.
    pub fn guest_ended(self: &Arc<Self>, reason: EndReason) {
        self.handle(Event::GuestEnded(reason));
    }
}

impl State {
    fn write(&mut self) -> io::Result<()> {
        let Some(link) = &mut self.link else { return Ok(()) };
        let written = link.write(&mut self.agent).map(|bytes| {
            self.story.log_bytes += bytes;
            self.spent.writes.add(u64::from(bytes > 0));
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
            let Some(output) = self.gate.release(self.agent.release_limit(now_ns())) else { return };
            self.spent.held_ns.add(now_ns());
            failpoint::stop("before-write");
            if self.alone && matches!(output, Output::Frame { .. }) {
                self.story.frame(now_ns());
            }
            if let Err(e) = self.outlet.send(output) {
                warn!("an output is lost: {e}");
            }
            failpoint::stop("after-write");
            // Who lives alone has no log that counts them.
            if !self.alone {
                self.agent.released(now_ns(), self.gate.released());
            }
        }
    }

    /// Backup: what has left over there is of no use here.
    fn drop_released(&mut self) {
        while self.gate.release(self.agent.drop_limit()).is_some() {
            self.spent.held_ns.add(now_ns());
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
