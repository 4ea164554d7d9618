//! Kicks: a signal makes KVM_RUN return, and `immediate_exit` makes one that has not begun yet return at once.
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
    /// `immediate_exit` of the vCPU that this thread is running.
    static RUNNING: Cell<*mut u8> = const { Cell::new(null_mut()) };
}

/// What a vCPU and its kickers share.
#[derive(Default)]
pub struct Kicks {
    /// A kick has not been answered with `Exit::Kicked` yet.
    pending: AtomicBool,
    /// The same, and the guest was not interrupted for it yet.
    news: AtomicBool,
    /// The thread that is in KVM_RUN, or about to be; 0: none.
    thread: AtomicI32,
    /// A kicked guest is interrupted when this is over, not at once.
    grace: Option<Grace>,
}

/// How long a kicked guest may go on, and the timer that ends it, of the thread that runs the vCPU.
struct Grace {
    period: Duration,
    timer: Mutex<Option<(i32, GracePeriod)>>,
}

impl Grace {
    /// Calls `with` with the timer, if there is one. `false`: there is none, or it fails.
    fn timer(&self, with: impl FnOnce(&GracePeriod) -> std::io::Result<bool>) -> bool {
        let timer = self.timer.lock().unwrap_or_else(PoisonError::into_inner);
        timer.as_ref().is_some_and(|(_, timer)| with(timer).unwrap_or(false))
    }

    /// Makes the timer this thread's.
    fn move_here(&self) {
        let thread = thread_id();
        let mut timer = self.timer.lock().unwrap_or_else(PoisonError::into_inner);
        if timer.as_ref().is_none_or(|(of, _)| *of != thread) {
            // Without a timer a kick interrupts at once.
            *timer = GracePeriod::new(self.period, signal()).ok().map(|timer| (thread, timer));
        }
    }
}

impl Kick for Kicks {
    fn kick(&self) {
        self.pending.store(true, Ordering::SeqCst);
        self.news.store(true, Ordering::SeqCst);
        let thread = self.thread.load(Ordering::SeqCst);
        if thread != 0 {
            self.interrupt(thread);
        }
    }
}

impl Kicks {
    /// Kicks that let the guest go on for `period`.
    pub fn after(period: Duration) -> Kicks {
        Kicks { grace: Some(Grace { period, timer: Mutex::default() }), ..Kicks::default() }
    }

    /// The thread is to leave KVM_RUN: now, or when its time is over.
    fn interrupt(&self, thread: i32) {
        let waits = self.grace.as_ref().is_some_and(|grace| grace.timer(|timer| timer.kick().map(|()| true)));
        if !waits {
            // SAFETY: a signal to a thread of this process, for which `install` has set a handler. A thread that has left
            // KVM_RUN meanwhile runs the handler for nothing; one that has ended makes the call fail, which is as well.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal()) };
        }
    }

    /// A kick waits to be taken.
    pub fn pending(&self) -> bool {
        self.pending.load(Ordering::SeqCst)
    }

    /// Takes the pending kick, to be called at a position.
    pub fn take(&self) -> bool {
        let kicked = self.pending.load(Ordering::SeqCst) && self.pending.swap(false, Ordering::SeqCst);
        if kicked && let Some(grace) = &self.grace {
            self.news.store(false, Ordering::SeqCst);
            grace.timer(GracePeriod::take);
        }
        kicked
    }

    /// A kick came since the last call.
    pub fn take_news(&self) -> bool {
        self.news.swap(false, Ordering::SeqCst)
    }

    /// Calls `run`, which enters KVM_RUN, so that a kick from now on ends it.
    pub fn while_running<T>(&self, vcpu: &mut VcpuFd, run: impl FnOnce(&mut VcpuFd) -> T) -> T {
        let flag = &raw mut vcpu.get_kvm_run().immediate_exit;
        RUNNING.set(flag);
        if let Some(grace) = &self.grace {
            grace.move_here();
        }
        self.thread.store(thread_id(), Ordering::SeqCst);
        // A kicker that came too early to see the thread is seen here.
        if self.news.load(Ordering::SeqCst) {
            self.interrupt(thread_id());
        }
        let result = run(vcpu);
        self.thread.store(0, Ordering::SeqCst);
        RUNNING.set(null_mut());
        vcpu.set_kvm_immediate_exit(0);
        result
    }
}

fn set(flag: *mut u8) {
    // SAFETY: `flag` is `immediate_exit` in the mapping of a vCPU that is borrowed by `while_running` now; the kernel reads
    // it concurrently, so the store is atomic.
    unsafe { AtomicU8::from_ptr(flag) }.store(1, Ordering::SeqCst);
}

extern "C" fn on_signal(_: libc::c_int) {
    let flag = RUNNING.get();
    if !flag.is_null() {
        set(flag);
    }
}

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
        // SAFETY: `action` is whole, and the handler touches nothing but a thread-local pointer and what that points to.
        let failed = unsafe { libc::sigaction(signal(), &action, null_mut()) };
        assert_eq!(failed, 0, "a real-time signal takes a handler");
    });
}
