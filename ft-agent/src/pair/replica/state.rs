//! What the threads of a replica share, under its mutex.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, MutexGuard};

use agent::{Agent, Event, Outcome, PeerRefusal, Role};
use entry::Output;
use test_and_set::names::Generation;
use tracing::{debug, warn};
use vmm::gate::Gate;
use vmm::inbox::InboxSender;

use super::clock::now_ns;
use super::socket_owner::SocketOwner;
use crate::error::Error;
use crate::failpoint;
use crate::outside::Outlet;
use crate::pair::announce::Announcer;
use crate::pair::history::History;
use crate::pair::hook::Hook;
use crate::pair::link::PeerLink;
use crate::pair::time_accounting::TimeAccounting;
use crate::pair::worker::Worker;

/// The shared state of a replica.
pub(super) struct ReplicaState {
    pub(super) agent: Agent,
    /// The connection to the peer.
    pub(super) link: Option<PeerLink>,
    pub(super) gate: Gate,
    pub(super) outlet: Outlet,
    pub(super) announcer: Announcer,
    pub(super) hook: Option<Hook>,
    /// Gets the guest's thread out of the guest.
    pub(super) guest: Option<InboxSender>,
    /// What was typed since this side has won, for a guest that does not run here yet.
    pub(super) typed: Vec<u8>,
    /// The generation of the pair, once it is open.
    pub(super) started: Option<Generation>,
    /// This side runs the guest alone.
    pub(super) alone: bool,
    /// The guest must not run, because the agent hands over.
    pub(super) paused: bool,
    /// The user wants to end the VM's run.
    pub(super) stop: bool,
    /// The user wants to hand over.
    pub(super) hand_over: bool,
    /// How many handovers that the user wanted were called off.
    pub(super) called_off: u64,
    /// How many wait to be told how something went that they asked for.
    pub(super) askers: usize,
    /// The address of the peer of the last connection.
    pub(super) peer_address: Option<SocketAddr>,
    /// How this side ended, once it has.
    pub(super) outcome: Option<Outcome>,
    /// The guest's thread has seen the outcome, or there is no such thread.
    pub(super) finished: bool,
    /// Why the last peer was refused.
    pub(super) refused: Option<PeerRefusal>,
    /// Why the store has given no verdict when it was asked last.
    pub(super) no_verdict: Option<String>,
    /// The first failure of this host.
    pub(super) failed: Option<Error>,
    /// Until when the pump sleeps if it is not woken, ns.
    pub(super) pump_sleeps_until: u64,
    pub(super) socket_owner: SocketOwner,
    /// How many threads wait for a change.
    pub(super) waiting: usize,
    /// Does tasks that take long, or that the guest's thread may not do. `None` once the replica has
    /// finished.
    pub(super) worker: Option<Worker>,
    /// When the primary's guest was last paced, or last waited: close enough to the time of the records that
    /// it appends.
    pub(super) paced_at: u64,
    /// How many records were appended.
    pub(super) appended: u64,
    pub(super) history: History,
    pub(super) times: Arc<TimeAccounting>,
}

/// The locked state.
pub(super) type StateGuard<'a> = MutexGuard<'a, ReplicaState>;

impl ReplicaState {
    pub(super) fn new(
        agent: Agent,
        outlet: Outlet,
        announcer: Announcer,
        hook: Option<Hook>,
        times: Arc<TimeAccounting>,
    ) -> Result<ReplicaState, Error> {
        Ok(ReplicaState {
            agent,
            link: None,
            gate: Gate::default(),
            outlet,
            announcer,
            hook,
            guest: None,
            typed: Vec::new(),
            started: None,
            alone: false,
            paused: false,
            stop: false,
            hand_over: false,
            called_off: 0,
            askers: 0,
            peer_address: None,
            outcome: None,
            finished: false,
            refused: None,
            no_verdict: None,
            failed: None,
            pump_sleeps_until: 0,
            socket_owner: SocketOwner::default(),
            waiting: 0,
            worker: Some(Worker::start()?),
            paced_at: now_ns(),
            appended: 0,
            history: History::default(),
            times,
        })
    }

    /// The other side, for people.
    pub(super) fn peer_name(&self) -> String {
        let role = match self.agent.status(now_ns()).role {
            Role::Primary => "the backup",
            Role::Backup => "the primary",
        };
        self.peer_address.map_or(role.into(), |address| format!("{role} at {address}"))
    }

    /// Gives a task to the worker. Does nothing once the replica has finished.
    pub(super) fn run_on_worker(&self, task: impl FnOnce() + Send + 'static) {
        if let Some(worker) = &self.worker {
            worker.submit(task);
        }
    }

    /// Reads what has arrived from the peer, and passes it to the agent. False: nothing had arrived.
    pub(super) fn read_link(&mut self) -> bool {
        let Some(link) = &mut self.link else { return false };
        let now = now_ns();
        self.socket_owner.read_begins(now);
        let event = match link.read() {
            Ok([]) => return false,
            Ok(bytes) => {
                self.history.log_bytes += bytes.len() as u64;
                self.times.reads.add(1);
                self.socket_owner.bytes_moved(now, bytes.len() as u64);
                Event::Received(bytes)
            }
            Err(e) => {
                debug!("cannot read from the peer: {e}");
                self.link = None;
                Event::Disconnected
            }
        };
        self.agent.handle(now, event);
        true
    }

    /// Reads if the guest's thread owns the socket and its next read is due. To be called on that thread.
    pub(super) fn read_link_if_due(&mut self, now: u64) {
        if self.socket_owner.guest_reads_at(now).is_some_and(|due| due <= now) {
            self.read_link();
        }
    }

    /// Writes the agent's outgoing bytes, as far as the socket takes them.
    pub(super) fn write_link(&mut self) -> io::Result<()> {
        let Some(link) = &mut self.link else { return Ok(()) };
        let written = link.write_from(&mut self.agent).map(|bytes| {
            // This runs after every event, and often there is nothing to write.
            if bytes > 0 {
                self.history.log_bytes += bytes;
                self.socket_owner.bytes_moved(now_ns(), bytes);
                self.times.writes.add(1);
            }
        });
        if let Err(e) = &written {
            debug!("cannot write to the peer: {e}");
            self.link = None;
        }
        written
    }

    /// When the pump has something to do next.
    pub(super) fn deadline(&self) -> u64 {
        self.agent.deadline().into_iter().chain(self.announcer.deadline()).min().unwrap_or(u64::MAX)
    }

    /// Begins to announce to the network where the guest is.
    pub(super) fn start_announcing(&mut self) {
        self.announcer.start(now_ns());
        self.send_announcements();
    }

    /// Sends the announcement that is due, if the agent allows it.
    pub(super) fn send_announcements(&mut self) {
        let now = now_ns();
        self.announcer.send_due(now, || self.agent.may_announce(now));
    }

    pub(super) fn update_hook(&mut self) {
        if let Some(hook) = &mut self.hook {
            hook.update(&self.agent.status(now_ns()));
        }
    }

    /// Releases the outputs that may leave. The agent is asked before each of them.
    pub(super) fn release_outputs(&mut self) {
        loop {
            failpoint::stop("before-decision");
            let now = now_ns();
            let Some(output) = self.gate.release(self.agent.release_limit(now)) else { return };
            self.times.held_ns.add(now);
            failpoint::stop("before-write");
            if self.alone && matches!(output, Output::Frame { .. }) {
                self.history.frame_sent(now);
            }
            if let Err(e) = self.outlet.send(output) {
                warn!("an output of the guest is dropped: {e}");
            }
            failpoint::stop("after-write");
            // A side that is alone keeps no log, in which the agent would count the outputs.
            if !self.alone {
                self.agent.released(self.gate.released());
            }
        }
    }

    /// Backup: drops the outputs that have left at the primary.
    pub(super) fn drop_released_outputs(&mut self) {
        let limit = self.agent.drop_limit();
        if limit > self.gate.released() {
            let now = now_ns();
            while self.gate.release(limit).is_some() {
                self.times.held_ns.add(now);
            }
        }
    }
}
