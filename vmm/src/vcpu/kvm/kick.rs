//! Kicks: a signal makes KVM_RUN return, and `immediate_exit` makes one that has not begun yet return at once.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ptr::null_mut;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, Ordering};

use kvm_ioctls::VcpuFd;

use super::super::Kick;

thread_local! {
    /// `immediate_exit` of the vCPU that this thread is running.
    static RUNNING: Cell<*mut u8> = const { Cell::new(null_mut()) };
    /// This thread's id, once it was asked for.
    static THREAD: Cell<i32> = const { Cell::new(0) };
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
}

impl Kick for Kicks {
    fn kick(&self) {
        self.pending.store(true, Ordering::SeqCst);
        self.news.store(true, Ordering::SeqCst);
        let thread = self.thread.load(Ordering::SeqCst);
        if thread != 0 {
            // SAFETY: a signal to a thread of this process, for which `install` has set a handler. A thread that has left
            // KVM_RUN meanwhile runs the handler for nothing; one that has ended makes the call fail, which is as well.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal()) };
        }
    }
}

impl Kicks {
    /// A kick waits to be taken.
    pub fn pending(&self) -> bool {
        self.pending.load(Ordering::SeqCst)
    }

    /// Takes the pending kick, to be called at a position.
    pub fn take(&self) -> bool {
        self.pending.swap(false, Ordering::SeqCst)
    }

    /// A kick came since the last call.
    pub fn take_news(&self) -> bool {
        self.news.swap(false, Ordering::SeqCst)
    }

    /// Calls `run`, which enters KVM_RUN, so that a kick from now on ends it.
    pub fn while_running<T>(&self, vcpu: &mut VcpuFd, run: impl FnOnce(&mut VcpuFd) -> T) -> T {
        let flag = &raw mut vcpu.get_kvm_run().immediate_exit;
        RUNNING.set(flag);
        self.thread.store(thread_id(), Ordering::SeqCst);
        // A kicker that came too early to see the thread is seen here.
        if self.news.load(Ordering::SeqCst) {
            set(flag);
        }
        let result = run(vcpu);
        self.thread.store(0, Ordering::SeqCst);
        RUNNING.set(null_mut());
        vcpu.set_kvm_immediate_exit(0);
        result
    }
}

fn thread_id() -> i32 {
    if THREAD.get() == 0 {
        // SAFETY: it has no arguments and always succeeds.
        THREAD.set(unsafe { libc::gettid() });
    }
    THREAD.get()
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

fn signal() -> libc::c_int {
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
