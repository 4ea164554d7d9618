//! The pump: the thread that reads the socket and tells the agent that time passes.

use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use agent::Event;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use tracing::{debug, error};

use super::state::StateGuard;
use super::{Replica, now_ns};
use crate::error::Error;
use crate::failpoint;
use crate::pair::link::PeerLink;

/// How long the guest's thread may take to finish once this side has ended.
const END_PATIENCE: Duration = Duration::from_secs(10);

impl Replica {
    /// Reads the socket and tells the agent that time passes, until this side has ended.
    pub(super) fn pump(self: Arc<Self>) {
        // Outputs wait for this thread, and it may share a CPU with the guest's.
        if let Err(e) = test_and_set::time_slice::shorten() {
            debug!("cannot shorten the pump's time slice, so outputs may wait longer on a busy host: {e}");
        }
        loop {
            failpoint::panic("pump");
            let (socket, wants_write, sleep) = {
                let mut state = self.lock();
                if state.outcome.is_some() {
                    return self.end_if_stuck(state);
                }
                let now = now_ns();
                let polled = state.socket_owner.guest_owns_until(now);
                let deadline = state.deadline().min(polled.unwrap_or(u64::MAX));
                state.pump_sleeps_until = deadline;
                let link = state.link.as_ref().filter(|_| polled.is_none());
                let wants_write = link.is_some_and(PeerLink::wants_write);
                let sleep = Duration::from_nanos(deadline.saturating_sub(now));
                (link.map(|l| l.socket().clone()), wants_write, sleep.min(Duration::from_secs(1)))
            };
            let readable = self.sleep(socket.as_deref(), wants_write, sleep);
            let mut state = self.lock();
            if !(readable && state.read_link()) {
                state.agent.handle(now_ns(), Event::Tick);
            }
            state.send_announcements();
            self.process_actions(&mut state);
            let waited_for = state.waiting > 0;
            // The threads that are woken need the mutex.
            drop(state);
            if waited_for {
                self.changed.notify_all();
            }
        }
    }

    /// The pump has panicked. What the agent knows may be half of something, so the other side is the better one to go
    /// on, if there is one.
    pub(super) fn pump_has_failed(self: &Arc<Self>) {
        let source = std::io::Error::other("its thread has panicked");
        self.fail_unless(|state| state.alone, Error::Host { what: "the pump has failed".into(), source });
    }

    /// Ends the process if the guest's thread is stuck: it must not keep the tap, the disks and the sockets
    /// from whoever uses them next.
    fn end_if_stuck(&self, state: StateGuard<'_>) {
        let waiting = self.changed.wait_timeout_while(state, END_PATIENCE, |state| !state.finished);
        let (state, waited) = waiting.unwrap_or_else(PoisonError::into_inner);
        if let Some(outcome) = &state.outcome
            && waited.timed_out()
        {
            let out = Error::Out(outcome.clone());
            error!(
                "{out}; the guest's thread is stuck and has not finished in {END_PATIENCE:?}: exiting without it"
            );
            drop(state);
            host_log::flush();
            std::process::exit(out.code().into());
        }
    }

    /// Sleeps until there is something to do, for `time` at most. Returns whether the socket has become
    /// readable or writable.
    fn sleep(&self, socket: Option<&TcpStream>, wants_write: bool, time: Duration) -> bool {
        let flags = if wants_write { PollFlags::POLLIN | PollFlags::POLLOUT } else { PollFlags::POLLIN };
        let wake = PollFd::new(self.wake.as_fd(), PollFlags::POLLIN);
        let socket = socket.map(|s| PollFd::new(s.as_fd(), flags));
        let mut fds: Vec<_> = std::iter::once(wake).chain(socket).collect();
        // A signal or a wake-up ends it early: the caller checks what there is to do in any case.
        if ppoll(&mut fds, Some(TimeSpec::from_duration(time)), None).is_err() {
            return false;
        }
        let [woken, readable] = [0, 1].map(|n| fds.get(n).is_some_and(|fd| fd.any() == Some(true)));
        if woken {
            self.wake.read().ok();
        }
        readable
    }
}
