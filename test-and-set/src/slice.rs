//! A short time slice for the threads that a verdict passes through.
//!
//! On a busy CPU a thread that wakes up waits until the running one has had its slice: some milliseconds, again in each process
//! that a verdict passes through. Since Linux 6.12 a thread may ask for a slice of its own, and one with a shorter slice than
//! the running thread's has its turn when it wakes up. It gets no larger share of the CPU for it, only smaller pieces earlier.
#![allow(unsafe_code)]

use std::io;

/// The shortest slice that Linux gives, in nanoseconds.
const SLICE_NS: u64 = 100_000;

fn answered(code: libc::c_long) -> io::Result<()> {
    if code == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Asks for a short slice for this thread and for all that it starts from now on.
///
/// A thread with a real-time policy keeps what it has. An older kernel does nothing; a sandbox may forbid it, which is the
/// only error. In both cases all works as before, and is slower on a busy machine only.
pub fn shorten() -> io::Result<()> {
    // SAFETY: a structure of integers, for which zero is a value.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    let size = size_of::<libc::sched_attr>() as u32;
    // SAFETY: writes at most `size` bytes to `attributes`, which has as many; 0 is the calling thread.
    answered(unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) })?;
    if attributes.sched_policy != libc::SCHED_OTHER as u32 {
        return Ok(());
    }
    attributes.sched_runtime = SLICE_NS;
    // SAFETY: reads `attributes.size` bytes of `attributes`, which the kernel has set to at most its size.
    answered(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) })
}
