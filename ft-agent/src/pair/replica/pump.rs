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
        let mut bytes = Vec::new();
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

    fn sleep(&self, socket: Option<&TcpStream>, wants_write: bool, time: Duration) {
        let flags = if wants_write { PollFlags::POLLIN | PollFlags::POLLOUT } else { PollFlags::POLLIN };
        let wake = PollFd::new(self.wake.as_fd(), PollFlags::POLLIN);
        let socket = socket.map(|s| PollFd::new(s.as_fd(), flags));
        let mut fds: Vec<_> = std::iter::once(wake).chain(socket).collect();
        // A signal ends it early, as does a wake-up: both are looked at by the caller.
        ppoll(&mut fds, Some(TimeSpec::from_duration(time)), None).ok();
        // There is something to take only if the pump was woken.
        self.wake.read().ok();
    }
}
