//! Makes another process do a system call.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::libc::{c_long, user_regs_struct};
use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

/// Makes the thread of this name in a process do a system call, and returns the result. `arguments` gets the
/// address of `path` in the process.
pub fn inject(
    process: u32,
    thread: &str,
    number: c_long,
    path: &Path,
    arguments: &dyn Fn(u64) -> [u64; 4],
) -> i64 {
    let held = HeldThread::new(process, thread);
    let [a, b, c, d] = arguments(held.write(path));
    held.call(number, [a, b, c, d, 0, 0])
}

/// A thread of another process that is stopped in a system call of its own, which it continues when this is dropped.
pub struct HeldThread {
    thread: Pid,
    before: user_regs_struct,
}

impl HeldThread {
    /// Stops the thread of this name.
    pub fn new(process: u32, thread: &str) -> HeldThread {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            assert!(Instant::now() < deadline, "thread {thread} of {process} is never in a system call");
            let thread = find(process, thread);
            ptrace::attach(thread).expect("attach");
            wait_until_stopped(thread);
            let before = ptrace::getregs(thread).expect("registers");
            // The thread is in a system call, or after an interrupted one.
            if before.orig_rax as i64 >= 0 {
                return HeldThread { thread, before };
            }
            ptrace::detach(thread, None).expect("detach");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Writes a path into its memory, where the next one replaces it. Returns the address.
    pub fn write(&self, path: &Path) -> u64 {
        let at = self.before.rsp - 8192;
        write(self.thread, at, path);
        at
    }

    /// Makes it do a system call, and returns the result.
    pub fn call(&self, number: c_long, [rdi, rsi, rdx, r10, r8, r9]: [u64; 6]) -> i64 {
        let before = self.before;
        let (rip, rax, orig_rax) = (before.rip - 2, number as u64, u64::MAX);
        let call = user_regs_struct { rip, rax, orig_rax, rdi, rsi, rdx, r10, r8, r9, ..before };
        ptrace::setregs(self.thread, call).expect("registers");
        // The first step may stop before the call.
        let mut after = call;
        while after.rip == rip {
            ptrace::step(self.thread, None).expect("step");
            wait_until_stopped(self.thread);
            after = ptrace::getregs(self.thread).expect("registers");
        }
        assert_eq!(after.rip, before.rip, "the thread is elsewhere after call {number}");
        after.rax as i64
    }
}

impl Drop for HeldThread {
    fn drop(&mut self) {
        ptrace::setregs(self.thread, self.before).expect("registers");
        ptrace::detach(self.thread, None).expect("detach");
    }
}

fn find(process: u32, name: &str) -> Pid {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).expect("threads").flatten();
    let mut named = tasks
        .filter(|task| std::fs::read_to_string(task.path().join("comm")).is_ok_and(|n| n.trim() == name));
    let task = named.next().unwrap_or_else(|| panic!("no thread {name}")).file_name();
    Pid::from_raw(task.to_str().and_then(|id| id.parse().ok()).expect("a number"))
}

fn wait_until_stopped(thread: Pid) {
    waitpid(thread, Some(WaitPidFlag::__WALL)).expect("wait");
}

/// Writes a C string into the memory of a stopped thread.
fn write(thread: Pid, at: u64, text: &Path) {
    let mut bytes = text.as_os_str().as_bytes().to_vec();
    bytes.resize(bytes.len() / 8 * 8 + 8, 0);
    for (n, word) in bytes.chunks_exact(8).enumerate() {
        let word = i64::from_le_bytes(word.try_into().expect("eight bytes"));
        ptrace::write(thread, (at + 8 * n as u64) as ptrace::AddressType, word).expect("write");
    }
}
