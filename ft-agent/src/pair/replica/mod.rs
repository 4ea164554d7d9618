//! One side of a pair at run time: the agent, its connection, its gate and its outlet, under one mutex.
//!
//! Three threads meet here. The guest's thread appends records, holds outputs, and writes to the socket
//! itself, so that no other thread is between an output and the wire. The pump reads the socket, and releases
//! outputs when the backup has acknowledged them; during a bulk transfer the guest's thread does that too
//! ([`socket_owner`]). The store's answers come on a thread of the store's client. Each thread tells the
//! agent what has happened, and carries out the agent's actions, in order, before it unlocks the mutex.

mod clock;
mod guest_side;
mod key_watch;
mod operator;
mod pump;
mod socket_owner;
mod state;

pub use clock::now_ns;
pub use guest_side::Duty;
pub use operator::RequestProgress;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use agent::{Action, Agent, Event, Hello, Outcome, Role, StoreView};
use nix::sys::eventfd::{EfdFlags, EventFd};
use rustls::pki_types::CertificateDer;
use test_and_set::blocking::BlockingStore;
use test_and_set::keys::key_id;
use test_and_set::names::{Generation, Incarnation, VmName};
use test_and_set::record::{Verdict, VmRecord};
use test_and_set::refusal_log::RefusalReasons;
use test_and_set::store::{StoreError, chain};
use tracing::{debug, error, info, warn};

use super::announce::Announcer;
use super::hook::Hook;
use super::link::PeerLink;
use super::report::protection_word;
use super::time_accounting::TimeAccounting;
use crate::error::Error;
use crate::outside::Outlet;
use crate::service;
use state::{ReplicaState, StateGuard};

/// How long the store may take to answer; after that the answer counts as unknown.
const STORE_PATIENCE: Duration = Duration::from_secs(1);
/// A guest's thread that waits reports at least this often that it is alive.
pub const TURN_INTERVAL: Duration = Duration::from_millis(50);

/// One side of a pair.
pub struct Replica {
    vm: VmName,
    store: BlockingStore,
    peer_refusals: Arc<RefusalReasons>,
    state: Mutex<ReplicaState>,
    /// Notified when something has changed that a thread may wait for.
    changed: Condvar,
    /// Wakes the pump.
    wake: EventFd,
    /// The guest's thread has a [`Duty`] other than to run the guest.
    attention: AtomicBool,
    /// When the primary's guest has to be paced next, ns.
    pace_due: AtomicU64,
    /// Where the time of the guest's thread goes.
    pub times: Arc<TimeAccounting>,
}

impl Replica {
    /// Makes a replica that waits for its peer, and starts its threads.
    ///
    /// # Errors
    /// A thread or an eventfd cannot be created.
    pub fn new(
        vm: VmName,
        store: BlockingStore,
        agent: Agent,
        outlet: Outlet,
        announcer: Announcer,
        hook: Option<Hook>,
        peer_refusals: Arc<RefusalReasons>,
    ) -> Result<Arc<Replica>, Error> {
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC);
        let wake = wake.map_err(|e| Error::host("cannot create an eventfd")(e.into()))?;
        let times = Arc::new(TimeAccounting::default());
        let state = ReplicaState::new(agent, outlet, announcer, hook, times.clone())?;
        let replica = Arc::new(Replica {
            vm,
            store,
            peer_refusals,
            state: state.into(),
            changed: Condvar::new(),
            wake,
            attention: false.into(),
            pace_due: 0.into(),
            times,
        });
        let pump = replica.clone();
        let failed_before = AtomicBool::new(false);
        service::start("pump", move || {
            if failed_before.swap(true, Ordering::Relaxed) {
                pump.pump_has_failed();
            }
            pump.clone().pump();
        })?;
        // The agent of an unprotected primary asks the store at once.
        replica.process_actions(&mut replica.lock());
        Ok(replica)
    }

    fn lock(&self) -> StateGuard<'_> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the agent what has happened, and carries out its actions.
    pub fn handle(self: &Arc<Self>, event: Event<'_>) {
        let mut state = self.lock();
        state.agent.handle(now_ns(), event);
        self.process_actions(&mut state);
    }

    /// A connection to the peer has come up; `bytes` were read from it already.
    pub fn connected(self: &Arc<Self>, link: PeerLink, bytes: &[u8]) {
        let mut state = self.lock();
        if let Err(e) = link.set_nonblocking() {
            return warn!("cannot use the connection to the peer: {e}");
        }
        let peer_key = Some(key_id(link.keys.peer()));
        state.peer_address = link.socket().peer_addr().ok();
        (state.link, state.refused) = (Some(link), None);
        state.agent.handle(now_ns(), Event::Connected { peer_key });
        if !bytes.is_empty() {
            state.agent.handle(now_ns(), Event::Received(bytes));
        }
        self.process_actions(&mut state);
        self.wake_pump();
    }

    /// Whether there is a connection to a peer.
    pub fn is_connected(&self) -> bool {
        self.lock().link.is_some()
    }

    /// Another process, with this certificate, has said hello on a second connection.
    pub fn stranger_called(self: &Arc<Self>, hello: &Hello, certificate: &CertificateDer<'_>) {
        let mut state = self.lock();
        // The peer's silence is judged only when its socket is drained; reading anything at all ends it.
        state.read_link();
        let same_certificate = state.link.as_ref().is_some_and(|l| l.keys.peer() == certificate);
        state.agent.handle(now_ns(), Event::Stranger { hello, same_certificate });
        self.process_actions(&mut state);
        self.changed.notify_all();
    }

    /// Carries out the agent's actions, and writes its outgoing bytes.
    fn process_actions(self: &Arc<Self>, state: &mut ReplicaState) {
        loop {
            while let Some(action) = state.agent.next_action() {
                self.execute(state, action);
            }
            if state.write_link().is_ok() {
                break;
            }
            state.agent.handle(now_ns(), Event::Disconnected);
        }
        state.update_hook();
        if state.deadline() < state.pump_sleeps_until {
            self.wake_pump();
        }
    }

    fn execute(self: &Arc<Self>, state: &mut ReplicaState, action: Action) {
        debug!(?action);
        match action {
            Action::Close => self.close_link(state),
            Action::Refused(refusal) => {
                match self.peer_refusals.refused(&refusal.to_string(), Instant::now()) {
                    Some(0) => warn!("the peer is refused: {refusal} ({})", state.peer_name()),
                    Some(left_out) => {
                        warn!(left_out, "the peer is refused: {refusal} ({})", state.peer_name())
                    }
                    None => {}
                }
                state.refused = Some(refusal);
            }
            Action::Open { generation, members } => {
                let (replica, store, vm) = (self.clone(), self.store.clone(), self.vm.clone());
                state.run_on_worker(move || match store.open(&vm, generation, &members, STORE_PATIENCE) {
                    Err(StoreError::Refused(why)) => replica.handle(Event::OpenRefused(&why.to_string())),
                    opened => replica.handle(Event::Opened(opened.inspect_err(log_no_answer).ok())),
                });
            }
            Action::Start { generation } => {
                info!(%generation, "the pair is open");
                state.started = Some(generation);
                // The switches may know the guest's address from an earlier run on another host.
                if state.agent.status(now_ns()).role == Role::Primary {
                    state.start_announcing();
                }
            }
            Action::Release => state.release_outputs(),
            Action::Drop => state.drop_released_outputs(),
            Action::Suspected(suspicion) => {
                let reason = format!("{suspicion} ({})", state.peer_name());
                warn!("the peer is lost: {reason}");
                state.history.peer_lost(now_ns(), reason);
            }
            Action::Take { generation, who } => self.ask_for_verdict(state, generation, who),
            Action::Look { generation, who } => self.look(generation, who),
            Action::ProtectionChanged(protection) => match protection.reason() {
                None => info!("PROTECTED again: what was the matter is over"),
                Some(reason) => warn!("{}: {reason}", protection_word(&protection)),
            },
            Action::GoLive => Self::goes_live(state),
            Action::Pause => (state.paused, state.hand_over) = (true, false),
            Action::Resume => {
                warn!("not handed over: {} does not get ready, and the VM goes on here", state.peer_name());
                (state.paused, state.called_off) = (false, state.called_off + 1);
            }
            Action::HandoverReceived => {
                info!("{} hands the VM over to this side", state.peer_name());
                let reason = format!("handed over by {}", state.peer_name());
                state.history.handover_begins(now_ns(), reason);
            }
            Action::End { generation, who } => self.ask_to_record_end(state, generation, who),
            Action::PeerKey(proof) => key_watch::peer_key(state, proof),
            Action::Halt(outcome) => self.ends(state, outcome),
        }
        self.notify_waiters(state);
    }

    /// This side runs the VM alone from now on.
    fn goes_live(state: &mut ReplicaState) {
        state.release_outputs();
        (state.alone, state.hand_over) = (true, false);
        state.history.verdict_won(now_ns());
        // A primary that was started without a backup has not lost one.
        state.history.failovers += u64::from(state.agent.status(now_ns()).peer.is_some());
        warn!("this side lives and runs the VM alone: UNPROTECTED against the loss of this host");
        state.start_announcing();
    }

    /// This side has ended.
    fn ends(&self, state: &mut ReplicaState, outcome: Outcome) {
        match outcome {
            Outcome::Fenced(_) | Outcome::Forgotten | Outcome::Overtaken(_) | Outcome::Yielded(_) => {
                error!("this side ends: {outcome}; the other side was {}", state.peer_name())
            }
            _ => info!("this side ends: {outcome}"),
        }
        // If this fails the connection is gone, and the last messages cannot be sent.
        state.write_link().ok();
        self.close_link(state);
        state.outcome = Some(outcome);
    }

    /// Asks the store for a verdict.
    fn ask_for_verdict(self: &Arc<Self>, state: &mut ReplicaState, generation: Generation, who: Incarnation) {
        match state.alone {
            true => info!(%generation, "telling the store that this side runs the VM"),
            false => info!(%generation, "asking the store which side lives"),
        }
        state.history.store_asked(now_ns());
        let replica = self.clone();
        let answer = move |verdict: Verdict<StoreError>| {
            let no_verdict = match &verdict {
                Verdict::Unknown(e) => Some(chain(e)),
                Verdict::Won | Verdict::Lost(_) | Verdict::Stale => None,
            };
            replica.lock().no_verdict = no_verdict;
            replica.handle(Event::Verdict(verdict.map_unknown(|e| log_no_answer(&e))));
        };
        self.store.begin_take(self.vm.clone(), generation, who, STORE_PATIENCE, answer);
    }

    /// Reads the VM's record, to see whether the store still knows this side.
    fn look(self: &Arc<Self>, generation: Generation, who: Incarnation) {
        let replica = self.clone();
        let answer = move |record: Result<Option<VmRecord>, StoreError>| {
            let view = record.inspect_err(|e| debug!("a look at the store: {}", chain(e)));
            let view = view.ok().map(|record| StoreView::of(record.as_ref(), generation, who));
            replica.handle(Event::Looked(view));
        };
        self.store.begin_get(self.vm.clone(), STORE_PATIENCE, answer);
    }

    /// Asks the store to record that the VM has ended.
    fn ask_to_record_end(self: &Arc<Self>, state: &ReplicaState, generation: Generation, who: Incarnation) {
        let (replica, store, vm) = (self.clone(), self.store.clone(), self.vm.clone());
        state.run_on_worker(move || {
            let ended = store.end(&vm, generation, who, STORE_PATIENCE);
            match &ended {
                Ok(_) => {}
                // It would be refused again.
                Err(StoreError::Refused(why)) => error!(
                    "VM {vm} has ended, but the store refuses to record that: {why}; before the VM can be \
                     started again an operator has to forget it (`vmft forget`)"
                ),
                Err(e) => {
                    warn!(
                        "the store has not confirmed that VM {vm} has ended, and is asked again: {}",
                        chain(e)
                    );
                }
            }
            let settled = matches!(ended, Ok(_) | Err(StoreError::Refused(_)));
            replica.handle(Event::EndRecorded(settled));
        });
    }

    /// Wakes the threads that wait for a change, and gets the guest's thread out of the guest if it has a new
    /// duty.
    fn notify_waiters(&self, state: &ReplicaState) {
        let ReplicaState { alone, paused, stop, hand_over, outcome, .. } = state;
        if *alone || *paused || *stop || *hand_over || outcome.is_some() {
            self.attention.store(true, Ordering::Release);
            if let Some(guest) = &state.guest {
                guest.wake();
            }
        }
        self.changed.notify_all();
    }

    fn close_link(&self, state: &mut ReplicaState) {
        // If this fails the connection is broken, and is closed anyway.
        state.write_link().ok();
        if let Some(link) = state.link.take() {
            state.run_on_worker(move || link.close());
        }
    }

    /// Waits for a change, for `patience` at most. The pump reads the socket meanwhile.
    fn release_socket_and_wait<'a>(
        &'a self,
        mut state: StateGuard<'a>,
        patience: Duration,
    ) -> StateGuard<'a> {
        self.return_socket_to_pump(&mut state);
        self.wait_for_change(state, patience)
    }

    /// Waits for a change, for `patience` at most.
    fn wait_for_change<'a>(&'a self, mut state: StateGuard<'a>, patience: Duration) -> StateGuard<'a> {
        state.waiting += 1;
        let waiting = self.changed.wait_timeout(state, patience);
        state = waiting.unwrap_or_else(PoisonError::into_inner).0;
        state.waiting -= 1;
        state
    }

    /// Gives the socket to the pump, because the guest's thread cannot read it for a while.
    fn return_socket_to_pump(&self, state: &mut ReplicaState) {
        if state.socket_owner.return_to_pump(now_ns()) {
            self.wake_pump();
        }
    }

    fn wake_pump(&self) {
        // Writing fails only if the counter is full, and then the pump has been woken already.
        self.wake.write(1).ok();
    }

    /// The guest's thread has finished. Waits until the connections that were closed have ended.
    pub fn guest_thread_done(&self) {
        let worker = {
            let mut state = self.lock();
            state.finished = true;
            self.changed.notify_all();
            state.worker.take()
        };
        if let Some(worker) = worker {
            worker.join();
        }
    }

    /// This host cannot run the guest.
    pub fn fail(self: &Arc<Self>, error: Error) {
        self.fail_unless(|_| false, error);
    }

    /// The same, unless this side must go on with the guest although it has failed.
    fn fail_unless(self: &Arc<Self>, must_go_on: impl FnOnce(&ReplicaState) -> bool, error: Error) {
        let reason = error.to_string();
        let mut state = self.lock();
        if must_go_on(&state) {
            return;
        }
        state.failed.get_or_insert(error);
        state.agent.handle(now_ns(), Event::HostFailed(&reason));
        self.process_actions(&mut state);
    }

    /// The first failure of this host, if there was one.
    pub fn take_failure(&self) -> Option<Error> {
        self.lock().failed.take()
    }
}

fn log_no_answer(error: &StoreError) {
    if let StoreError::Refused(why) = error {
        return warn!("the store refuses this host, and is asked again: {why}");
    }
    warn!(
        "the store does not answer: {}; check that a majority of its nodes run and are reachable",
        chain(error)
    );
}
