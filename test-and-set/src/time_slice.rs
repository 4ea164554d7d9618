//! A short time slice for the threads that a verdict passes through.
//!
//! On a busy CPU a thread that wakes up waits until the running thread's slice is over: some milliseconds, in each process that a
//! verdict passes through. Since Linux 6.12 a thread may choose its slice, and a thread with a shorter slice than the running one
//! runs as soon as it wakes up. Its share of the CPU stays the same; it is only divided into smaller, earlier pieces.
#![allow(unsafe_code)]

use std::io;

/// The shortest slice that Linux allows, in nanoseconds.
const SLICE_NS: u64 = 100_000;

fn answered(code: libc::c_long) -> io::Result<()> {
    if code == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Asks for a short slice for this thread and for all threads that it starts from now on. A thread with a real-time policy
/// stays as it is; older kernels ignore the request.
///
/// # Errors
/// A sandbox forbids it. The thread then works as before, only slower on a busy machine.
pub fn shorten() -> io::Result<()> {
    // SAFETY: all fields are integers, for which zero is a valid value.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    let size = size_of::<libc::sched_attr>() as u32;
    // SAFETY: the kernel writes at most `size` bytes to `attributes`, which is that large; 0 is the calling thread.
    answered(unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) })?;
    if attributes.sched_policy != libc::SCHED_OTHER as u32 {
        return Ok(());
    }
    attributes.sched_runtime = SLICE_NS;
    // SAFETY: the kernel reads `attributes.size` bytes of `attributes`; it has set that field to at most its size.
    answered(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) })
}
