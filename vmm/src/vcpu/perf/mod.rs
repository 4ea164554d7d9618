//! The counter of retired conditional branches of real hosts, through perf_event_open(2).
//!
//! Two events, both pinned and counting in guest mode only: a pure counter that is never reset or sampled, the one
//! source of truth; and a sampler that is armed for one overflow of a seek. Guest-only events stand still outside the
//! guest, so that a reading between two runs is exact.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use perf_event_open_sys::{self as sys, bindings};

use super::landing::{LandingError, TickCounter};

pub mod events;
mod grace;

pub use grace::GracePeriod;

/// Of asm-generic/fcntl.h: a signal for one thread, and which.
const F_SETSIG: i32 = 10;
const F_SETOWN_EX: i32 = 15;
/// First field of `struct f_owner_ex`; the second is the thread.
const F_OWNER_TID: i32 = 0;

/// Longer than any guest runs: a sampler with this period never overflows by itself.
const NEVER: u64 = 1 << 60;

/// Which event to count, and for whom.
#[derive(Clone, Copy, Debug)]
pub struct Counting {
    /// `perf_event_attr.type`: raw, or the core's of a hybrid CPU.
    pub kind: u32,
    /// `perf_event_attr.config`.
    pub config: u64,
    /// Count in the guest and nowhere else; `false` is for tests of the counter itself on this thread in user mode.
    pub guest: bool,
}

impl Counting {
    /// A raw event in guest mode.
    pub fn guest(config: u64) -> Counting {
        Counting { kind: bindings::PERF_TYPE_RAW, config, guest: true }
    }

    /// Opens it for the calling thread. With a period it samples, disabled until it is armed.
    fn open(self, period: Option<u64>) -> io::Result<OwnedFd> {
        let mut attr = bindings::perf_event_attr {
            type_: self.kind,
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
        // SAFETY: the call gave a new descriptor that nobody else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

/// See the module. It belongs to the thread that opened it, which must be the one that runs the vCPU.
pub struct PerfCounter {
    counter: OwnedFd,
    sampler: OwnedFd,
}

impl PerfCounter {
    /// Opens both events for the calling thread. An overflow of the sampler sends it `signal`.
    ///
    /// # Errors
    /// What perf_event_open says: EACCES wants perf_event_paranoid at most 1 or CAP_PERFMON; ENOENT or EOPNOTSUPP is a
    /// host without such a counter, or one whose counters a virtual machine with its own PMU has taken.
    pub fn open(counting: Counting, signal: i32) -> io::Result<PerfCounter> {
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

    /// Events in the guest so far.
    ///
    /// # Errors
    /// The counter was taken away for a while (pinned events are not shared: another one wanted it).
    pub fn count(&self) -> Result<u64, LandingError> {
        let mut values = [0u64; 3];
        // SAFETY: reads at most the size of `values`, for which any bytes are valid, into it.
        let read =
            unsafe { libc::read(self.counter.as_raw_fd(), values.as_mut_ptr().cast(), size_of_val(&values)) };
        let [count, enabled, running] = values;
        match read {
            24 if enabled == running => Ok(count),
            24 => {
                Err(LandingError::Counter("it was shared with another event and did not count all the time"))
            }
            0 => Err(LandingError::Counter(
                "it could not be scheduled: another pinned event has it (nmi_watchdog?)",
            )),
            _ => Err(LandingError::Counter("it could not be read")),
        }
    }
}

impl TickCounter for PerfCounter {
    fn read(&mut self) -> Result<u64, LandingError> {
        self.count()
    }

    fn arm(&mut self, ticks: u64) -> Result<(), LandingError> {
        let fd = self.sampler.as_raw_fd();
        // SAFETY: an open perf event, and a period that outlives the call.
        let period = unsafe { sys::ioctls::PERIOD(fd, ticks) };
        // SAFETY: an open perf event; one overflow, then it is disabled.
        let refresh = unsafe { sys::ioctls::REFRESH(fd, 1) };
        if period < 0 || refresh < 0 {
            return Err(LandingError::Counter("its sampler could not be armed"));
        }
        Ok(())
    }

    fn disarm(&mut self) -> Result<(), LandingError> {
        // SAFETY: an open perf event.
        if unsafe { sys::ioctls::DISABLE(self.sampler.as_raw_fd(), 0) } < 0 {
            return Err(LandingError::Counter("its sampler could not be disarmed"));
        }
        Ok(())
    }
}

/// A counter of the thread that asks: it goes on counting where another thread takes the vCPU over.
pub struct ThreadCounter {
    counting: Counting,
    signal: i32,
    /// What counters of other threads have counted.
    before: u64,
    open: Option<(libc::pid_t, PerfCounter)>,
}

impl ThreadCounter {
    /// Opens nothing yet. An overflow sends `signal` to the thread that armed it.
    pub fn new(counting: Counting, signal: i32) -> ThreadCounter {
        ThreadCounter { counting, signal, before: 0, open: None }
    }

    fn here(&mut self) -> Result<&mut PerfCounter, LandingError> {
        let thread = thread_id();
        if self.open.as_ref().is_none_or(|(of, _)| *of != thread) {
            if let Some((_, counter)) = self.open.take() {
                self.before += counter.count()?;
            }
            let counter = PerfCounter::open(self.counting, self.signal).map_err(LandingError::Open)?;
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
        let count = self.here()?.count()?;
        Ok(self.before + count)
    }

    fn arm(&mut self, ticks: u64) -> Result<(), LandingError> {
        self.here()?.arm(ticks)
    }

    fn disarm(&mut self) -> Result<(), LandingError> {
        self.here()?.disarm()
    }
}

/// This thread's id.
pub(super) fn thread_id() -> libc::pid_t {
    thread_local! {
        // SAFETY: it takes nothing and always succeeds.
        static ID: libc::pid_t = unsafe { libc::gettid() };
    }
    ID.with(|id| *id)
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
