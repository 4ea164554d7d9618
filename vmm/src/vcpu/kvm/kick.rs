//! Kicks: a signal makes KVM_RUN return, and `immediate_exit` makes a KVM_RUN that has not begun yet return at once.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, Ordering};
use std::sync::{Mutex, Once, PoisonError};
use std::time::Duration;

use kvm_ioctls::VcpuFd;

use super::super::Kick;
use super::super::perf::{GracePeriod, thread_id};

thread_local! {
    /// `immediate_exit` of the vCPU that this thread is running; null: none.
    static RUNNING: Cell<*mut u8> = const { Cell::new(null_mut()) };
}

/// The kicks of a vCPU: what it shares with the threads that kick it.
#[derive(Default)]
pub struct VcpuKicks {
    /// A kick has come that was not answered with `Exit::Kicked` yet.
    pending: AtomicBool,
    /// A kick has come for which the guest was not interrupted yet.
    is_new: AtomicBool,
    /// The thread that is in KVM_RUN or about to enter it; 0: none.
    thread: AtomicI32,
    /// With a grace period, a kicked guest is interrupted only at its end.
    grace: Option<GraceTimer>,
}

/// How long a kicked guest may run on, and the timer that then interrupts the thread that runs the vCPU.
struct GraceTimer {
    period: Duration,
    /// The timer, and the thread to which its signal goes.
    timer: Mutex<Option<(i32, GracePeriod)>>,
}

impl GraceTimer {
    /// Calls `with` with the timer. `false`: there is none, or the call returned `false` or an error.
    fn timer(&self, with: impl FnOnce(&GracePeriod) -> std::io::Result<bool>) -> bool {
        let timer = self.timer.lock().unwrap_or_else(PoisonError::into_inner);
        timer.as_ref().is_some_and(|(_, timer)| with(timer).unwrap_or(false))
    }

    /// Makes sure that the timer's signal goes to the calling thread.
    fn move_to_this_thread(&self) {
        let thread = thread_id();
        let mut timer = self.timer.lock().unwrap_or_else(PoisonError::into_inner);
        if timer.as_ref().is_none_or(|(of, _)| *of != thread) {
            // Without a timer a kick interrupts at once.
            *timer = GracePeriod::new(self.period, signal()).ok().map(|timer| (thread, timer));
        }
    }
}

impl Kick for VcpuKicks {
    fn kick(&self) {
        self.pending.store(true, Ordering::SeqCst);
        self.is_new.store(true, Ordering::SeqCst);
        let thread = self.thread.load(Ordering::SeqCst);
        if thread != 0 {
            self.interrupt(thread);
        }
    }
}

impl VcpuKicks {
    /// Kicks that let the guest run on for `period`.
    pub fn with_grace_period(period: Duration) -> VcpuKicks {
        VcpuKicks { grace: Some(GraceTimer { period, timer: Mutex::default() }), ..VcpuKicks::default() }
    }

    /// Makes the thread leave KVM_RUN: at once, or at the end of the grace period.
    fn interrupt(&self, thread: i32) {
        let waits = self.grace.as_ref().is_some_and(|grace| grace.timer(|timer| timer.kick().map(|()| true)));
        if !waits {
            // SAFETY: the signal goes to a thread of this process, and `install` has set a handler for it. A thread that has left
            // KVM_RUN meanwhile runs the handler without effect; for one that has ended the call fails, which is harmless.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal()) };
        }
    }

    /// Whether a kick has to be answered.
    pub fn pending(&self) -> bool {
        self.pending.load(Ordering::SeqCst)
    }

    /// Takes the pending kick. To be called at a position, where it is answered. `true`: there was one.
    pub fn take(&self) -> bool {
        let kicked = self.pending.load(Ordering::SeqCst) && self.pending.swap(false, Ordering::SeqCst);
        if kicked && let Some(grace) = &self.grace {
            self.is_new.store(false, Ordering::SeqCst);
            grace.timer(GracePeriod::take_kick);
        }
        kicked
    }

    /// Whether a kick came since the last call.
    pub fn take_new(&self) -> bool {
        self.is_new.swap(false, Ordering::SeqCst)
    }

    /// Calls `run`, which enters KVM_RUN, so that a kick that comes from now on ends it.
    pub fn while_running<T>(&self, vcpu: &mut VcpuFd, run: impl FnOnce(&mut VcpuFd) -> T) -> T {
        let flag = &raw mut vcpu.get_kvm_run().immediate_exit;
        RUNNING.set(flag);
        if let Some(grace) = &self.grace {
            grace.move_to_this_thread();
        }
        self.thread.store(thread_id(), Ordering::SeqCst);
        // A kick that came too early to see the thread is handled here.
        if self.is_new.load(Ordering::SeqCst) {
            self.interrupt(thread_id());
        }
        let result = run(vcpu);
        self.thread.store(0, Ordering::SeqCst);
        RUNNING.set(null_mut());
        vcpu.set_kvm_immediate_exit(0);
        result
    }
}

/// Sets `immediate_exit`.
fn set_immediate_exit(flag: *mut u8) {
    // SAFETY: `flag` is `immediate_exit` in the mapping of a vCPU that is borrowed by `while_running` now; the kernel reads
    // it concurrently, so the store is atomic.
    unsafe { AtomicU8::from_ptr(flag) }.store(1, Ordering::SeqCst);
}

extern "C" fn on_signal(_: libc::c_int) {
    let flag = RUNNING.get();
    if !flag.is_null() {
        set_immediate_exit(flag);
    }
}

/// The signal that kicks use.
pub fn signal() -> libc::c_int {
    libc::SIGRTMIN() + 3
}

/// Sets the handler of the signal that kicks use, once for the process.
pub fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: an all-zero sigaction is valid: no flags, so that KVM_RUN is not restarted, and an empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_signal as extern "C" fn(libc::c_int) as usize;
        // SAFETY: `action` is initialised, and the handler accesses only a thread-local pointer and what that points to.
        let failed = unsafe { libc::sigaction(signal(), &action, null_mut()) };
        assert_eq!(failed, 0, "a handler can be set for a real-time signal");
    });
}
