//! The thread that reads the socket and lets time pass.

use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use agent::Event;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use tracing::{debug, error};

use super::{Guard, Replica, now_ns};
use crate::error::Error;
use crate::pair::link::Link;

/// How long the guest's thread may take to end once its side is out.
const END_PATIENCE: Duration = Duration::from_secs(10);

impl Replica {
    /// Reads the socket and lets time pass, until the replica is out.
    pub(super) fn pump(self: Arc<Self>) {
        // An output waits for this thread, maybe on the guest's CPU.
        if let Err(e) = test_and_set::slice::shorten() {
            debug!("slower on a busy machine, without a short time slice: {e}");
        }
        loop {
            let (socket, wants_write, sleep) = {
                let mut state = self.lock();
                if state.exit.is_some() {
                    return self.end_if_stuck(state);
                }
                let now = now_ns();
                let polled = state.polling.until(now);
                let deadline = state.deadline().min(polled.unwrap_or(u64::MAX));
                state.sleeps_until = deadline;
                let link = state.link.as_ref().filter(|_| polled.is_none());
                let wants_write = link.is_some_and(Link::wants_write);
                let sleep = Duration::from_nanos(deadline.saturating_sub(now));
                (link.map(|l| l.socket().clone()), wants_write, sleep.min(Duration::from_secs(1)))
            };
            let readable = self.sleep(socket.as_deref(), wants_write, sleep);
            let mut state = self.lock();
            if !(readable && state.read()) {
                state.agent.handle(now_ns(), Event::Tick);
            }
            state.tick_announcer();
            self.settle(&mut state);
            let waited_for = state.waiting > 0;
            // Who is woken needs the mutex.
            drop(state);
            if waited_for {
                self.changed.notify_all();
            }
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

    /// Sleeps until there is something to do; whether there is something to read.
    fn sleep(&self, socket: Option<&TcpStream>, wants_write: bool, time: Duration) -> bool {
        let flags = if wants_write { PollFlags::POLLIN | PollFlags::POLLOUT } else { PollFlags::POLLIN };
        let wake = PollFd::new(self.wake.as_fd(), PollFlags::POLLIN);
        let socket = socket.map(|s| PollFd::new(s.as_fd(), flags));
        let mut fds: Vec<_> = std::iter::once(wake).chain(socket).collect();
        // A signal ends it early, as does a wake-up: both are looked at by the caller.
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
