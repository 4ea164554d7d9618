//! The host CPU's counter of retired conditional branches, through perf_event_open(2).
//!
//! It uses two events, both pinned and counting in guest mode only: a pure counter, which is never reset and never sampled
//! and is the only source of truth, and a sampler, which is armed for one overflow at a time to stop the guest near a
//! position. Guest-only events do not count outside the guest, so a reading between two runs is exact.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use perf_event_open_sys::{self as sys, bindings};

use super::landing::{LandingError, TickCounter};

pub mod events;
mod grace;

pub use grace::GracePeriod;

/// From asm-generic/fcntl.h: the commands that direct a descriptor's signal to one thread, and choose it.
const F_SETSIG: i32 = 10;
const F_SETOWN_EX: i32 = 15;
/// First field of `struct f_owner_ex`; the second is the thread.
const F_OWNER_TID: i32 = 0;

/// A period longer than any guest runs: a sampler with it does not overflow until it is armed.
const NEVER: u64 = 1 << 60;

/// Which event to count, and where.
#[derive(Clone, Copy, Debug)]
pub struct CounterConfig {
    /// `perf_event_attr.type`: raw, or on a hybrid CPU the type of the core.
    pub event_type: u32,
    /// `perf_event_attr.config`.
    pub config: u64,
    /// Count only in guest mode. `false`: count this thread in user mode only, for tests of the counter itself.
    pub guest: bool,
}

impl CounterConfig {
    /// A raw event in guest mode.
    pub fn guest(config: u64) -> CounterConfig {
        CounterConfig { event_type: bindings::PERF_TYPE_RAW, config, guest: true }
    }

    /// Opens the event for the calling thread. With a period it is a sampler, which is disabled until it is armed.
    fn open(self, period: Option<u64>) -> io::Result<OwnedFd> {
        let mut attr = bindings::perf_event_attr {
            type_: self.event_type,
            size: size_of::<bindings::perf_event_attr>() as u32,
            config: self.config,
            read_format: (bindings::PERF_FORMAT_TOTAL_TIME_ENABLED | bindings::PERF_FORMAT_TOTAL_TIME_RUNNING)
                as u64,
            ..Default::default()
        };
        attr.set_pinned(1);
        attr.set_exclude_host(u64::from(self.guest));
        attr.set_exclude_guest(u64::from(!self.guest));
        attr.set_exclude_kernel(u64::from(!self.guest));
        attr.set_exclude_hv(u64::from(!self.guest));
        if let Some(period) = period {
            attr.__bindgen_anon_1.sample_period = period;
            attr.set_disabled(1);
        }
        // SAFETY: `attr` is a valid perf_event_attr of the size it says; the call keeps no pointer to it.
        let fd = unsafe { sys::perf_event_open(&mut attr, 0, -1, -1, bindings::PERF_FLAG_FD_CLOEXEC as _) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call has returned a new descriptor that nothing else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

/// The two events. They belong to the thread that opened them, which must be the one that runs the vCPU.
pub struct PerfCounter {
    counter: OwnedFd,
    sampler: OwnedFd,
}

impl PerfCounter {
    /// Opens both events for the calling thread. An overflow of the sampler sends it `signal`.
    ///
    /// # Errors
    /// perf_event_open fails. EACCES: perf_event_paranoid must be at most 1, or the process needs CAP_PERFMON. ENOENT or
    /// EOPNOTSUPP: the host has no such counter, or a virtual machine with its own PMU occupies the counters.
    pub fn open(counting: CounterConfig, signal: i32) -> io::Result<PerfCounter> {
        let counter = counting.open(None)?;
        let sampler = counting.open(Some(NEVER))?;
        let owner = [F_OWNER_TID, thread_id()];
        // SAFETY: fcntl with a descriptor that is open and a structure that outlives the call.
        check(unsafe { libc::fcntl(sampler.as_raw_fd(), F_SETOWN_EX, owner.as_ptr()) })?;
        // SAFETY: fcntl with an open descriptor and integers.
        check(unsafe { libc::fcntl(sampler.as_raw_fd(), F_SETSIG, signal) })?;
        // SAFETY: as above.
        check(unsafe { libc::fcntl(sampler.as_raw_fd(), libc::F_SETFL, libc::O_ASYNC | libc::O_NONBLOCK) })?;
        Ok(PerfCounter { counter, sampler })
    }

    /// How many events have happened in the guest so far.
    ///
    /// # Errors
    /// The counter did not count all the time, because another event needed its hardware.
    pub fn count(&self) -> Result<u64, LandingError> {
        let mut values = [0u64; 3];
        // SAFETY: reads at most the size of `values`, for which any bytes are valid, into it.
        let read =
            unsafe { libc::read(self.counter.as_raw_fd(), values.as_mut_ptr().cast(), size_of_val(&values)) };
        let [count, enabled, running] = values;
        match read {
            24 if enabled == running => Ok(count),
            24 => Err(LandingError::Counter("did not count all the time: another event used its hardware")),
            0 => Err(LandingError::Counter(
                "does not count: another pinned event occupies its hardware (nmi_watchdog?)",
            )),
            _ => Err(LandingError::Counter("could not be read")),
        }
    }
}

impl TickCounter for PerfCounter {
    fn read(&mut self) -> Result<u64, LandingError> {
        self.count()
    }

    fn arm(&mut self, ticks: u64) -> Result<(), LandingError> {
        let fd = self.sampler.as_raw_fd();
        // SAFETY: the descriptor is an open perf event, and the period outlives the call.
        let period = unsafe { sys::ioctls::PERIOD(fd, ticks) };
        // SAFETY: the descriptor is an open perf event. After one overflow it is disabled again.
        let refresh = unsafe { sys::ioctls::REFRESH(fd, 1) };
        if period < 0 || refresh < 0 {
            return Err(LandingError::Counter("could not be armed"));
        }
        Ok(())
    }

    fn disarm(&mut self) -> Result<(), LandingError> {
        // SAFETY: the descriptor is an open perf event.
        if unsafe { sys::ioctls::DISABLE(self.sampler.as_raw_fd(), 0) } < 0 {
            return Err(LandingError::Counter("could not be disarmed"));
        }
        Ok(())
    }
}

/// A counter for whichever thread uses it: the count goes on when another thread takes over the vCPU.
pub struct ThreadCounter {
    config: CounterConfig,
    signal: i32,
    /// The sum of what the counters of earlier threads have counted.
    before: u64,
    open: Option<(libc::pid_t, PerfCounter)>,
}

impl ThreadCounter {
    /// Opens nothing yet. An overflow will send `signal` to the thread that armed the counter.
    pub fn new(config: CounterConfig, signal: i32) -> ThreadCounter {
        ThreadCounter { config, signal, before: 0, open: None }
    }

    /// The counter of the calling thread, opened if need be.
    fn for_this_thread(&mut self) -> Result<&mut PerfCounter, LandingError> {
        let thread = thread_id();
        if self.open.as_ref().is_none_or(|(of, _)| *of != thread) {
            if let Some((_, counter)) = self.open.take() {
                self.before += counter.count()?;
            }
            let counter = PerfCounter::open(self.config, self.signal).map_err(LandingError::Open)?;
            self.open = Some((thread, counter));
        }
        match &mut self.open {
            Some((_, counter)) => Ok(counter),
            None => unreachable!("opened above"),
        }
    }
}

impl TickCounter for ThreadCounter {
    fn read(&mut self) -> Result<u64, LandingError> {
        let count = self.for_this_thread()?.count()?;
        Ok(self.before + count)
    }

    fn arm(&mut self, ticks: u64) -> Result<(), LandingError> {
        self.for_this_thread()?.arm(ticks)
    }

    fn disarm(&mut self) -> Result<(), LandingError> {
        self.for_this_thread()?.disarm()
    }
}

/// The calling thread's id.
pub(super) fn thread_id() -> libc::pid_t {
    thread_local! {
        // SAFETY: the call takes no arguments and always succeeds.
        static ID: libc::pid_t = unsafe { libc::gettid() };
    }
    ID.with(|id| *id)
}

/// The error of a call that returned `result`, if that is negative.
fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
