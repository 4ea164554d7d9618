//! Kicks with a grace period: most guests soon make an exit anyway, and a replay stops at an exit at no cost.

use std::io;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A timer that turns a kick into a signal to the vCPU's thread if the guest makes no exit in time.
pub struct GracePeriod {
    timer: libc::timer_t,
    period: Duration,
    pending: AtomicBool,
}

// SAFETY: a POSIX timer's id may be used from any thread of the process.
unsafe impl Send for GracePeriod {}
// SAFETY: timer_settime is thread-safe (POSIX), and the flag is atomic.
unsafe impl Sync for GracePeriod {}

impl GracePeriod {
    /// A grace period at whose end `signal` is sent to the calling thread, which must be the vCPU's.
    ///
    /// # Errors
    /// The system has no timer left.
    pub fn new(period: Duration, signal: i32) -> io::Result<GracePeriod> {
        // SAFETY: sigevent is plain data for which zeros are valid.
        let mut event: libc::sigevent = unsafe { MaybeUninit::zeroed().assume_init() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = signal;
        event.sigev_notify_thread_id = super::thread_id();
        let mut timer = MaybeUninit::uninit();
        // SAFETY: `event` and `timer` outlive the call, which writes `timer` when it succeeds.
        super::check(unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, timer.as_mut_ptr()) })?;
        // SAFETY: written by the call above.
        let timer = unsafe { timer.assume_init() };
        Ok(GracePeriod { timer, period, pending: AtomicBool::new(false) })
    }

    /// Asks the guest to stop at its next exit, or at the end of the period if it makes none before.
    ///
    /// # Errors
    /// The period is a century or longer.
    pub fn kick(&self) -> io::Result<()> {
        if self.pending.swap(true, Ordering::AcqRel) {
            // The period has begun with the first kick.
            return Ok(());
        }
        self.set_timer(self.period)
    }

    /// Takes the kick of a guest that has made an exit, and stops the timer. `true`: there was a kick.
    ///
    /// # Errors
    /// The same as for [`GracePeriod::kick`].
    pub fn take_kick(&self) -> io::Result<bool> {
        let was = self.pending.swap(false, Ordering::AcqRel);
        if was {
            self.set_timer(Duration::ZERO)?;
        }
        Ok(was)
    }

    /// Starts the timer; zero stops it.
    fn set_timer(&self, after: Duration) -> io::Result<()> {
        let it_value =
            libc::timespec { tv_sec: after.as_secs() as i64, tv_nsec: i64::from(after.subsec_nanos()) };
        let once = libc::itimerspec { it_interval: libc::timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
        // SAFETY: this value owns the timer, and the structure outlives the call.
        super::check(unsafe { libc::timer_settime(self.timer, 0, &once, std::ptr::null_mut()) })
    }
}

impl Drop for GracePeriod {
    fn drop(&mut self) {
        // SAFETY: this value owns the timer, and nothing uses it any more.
        let deleted = unsafe { libc::timer_delete(self.timer) };
        debug_assert_eq!(deleted, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks `signal`, and returns whether it comes to this thread within this time.
    fn comes(signal: i32, within: Duration) -> bool {
        // SAFETY: sigset_t is plain data that sigemptyset initialises; all pointers outlive their calls.
        unsafe {
            let mut set = MaybeUninit::uninit();
            libc::sigemptyset(set.as_mut_ptr());
            libc::sigaddset(set.as_mut_ptr(), signal);
            libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
            let wait = libc::timespec { tv_sec: 0, tv_nsec: i64::from(within.subsec_nanos()) };
            libc::sigtimedwait(set.as_ptr(), std::ptr::null_mut(), &wait) == signal
        }
    }

    #[test]
    fn a_kick_becomes_a_signal_unless_it_is_taken() {
        let signal = libc::SIGRTMIN() + 7;
        assert!(!comes(signal, Duration::ZERO));
        let grace = GracePeriod::new(Duration::from_millis(20), signal).unwrap();
        grace.kick().unwrap();
        assert!(comes(signal, Duration::from_millis(900)));
        assert!(grace.take_kick().unwrap() && !grace.take_kick().unwrap());
        grace.kick().unwrap();
        assert!(grace.take_kick().unwrap());
        assert!(!comes(signal, Duration::from_millis(100)));
    }
}
