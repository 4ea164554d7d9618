//! The system calls that each layer allows, and with which arguments.

use std::collections::BTreeMap;

use nix::libc::*;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use super::ConfineError;

/// Calls that every thread makes: memory, waiting, time, signals, and I/O on open files.
#[rustfmt::skip]
const EVERY: &[c_long] = &[
    SYS_brk, SYS_munmap, SYS_mremap, SYS_madvise,
    SYS_futex, SYS_sched_yield, SYS_clock_gettime, SYS_clock_nanosleep, SYS_nanosleep, SYS_restart_syscall,
    SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_sigaltstack, SYS_getpid, SYS_gettid,
    SYS_read, SYS_write, SYS_writev, SYS_recvfrom, SYS_close, SYS_getrandom, SYS_exit, SYS_exit_group,
];

/// Additional calls of all threads but a pair's guest's: files, signals, other threads.
#[rustfmt::skip]
const THREADS: &[c_long] = &[
    SYS_openat, SYS_newfstatat, SYS_fstat, SYS_stat, SYS_lstat, SYS_statx, SYS_lseek, SYS_getdents64, SYS_access, SYS_readlink,
    SYS_pread64, SYS_pwrite64, SYS_readv, SYS_fsync, SYS_fdatasync, SYS_ftruncate, SYS_fcntl, SYS_rename, SYS_unlink, SYS_fchmod,
    SYS_poll, SYS_ppoll, SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_wait, SYS_epoll_pwait, SYS_eventfd2,
    SYS_sendmsg, SYS_recvmsg, SYS_set_robust_list, SYS_rseq, SYS_sched_getaffinity, SYS_uname,
    SYS_rt_sigaction, SYS_getuid, SYS_geteuid,
];

/// Additional calls of a pair's threads but the guest's: sockets, and confining the guest's thread.
#[rustfmt::skip]
const PAIR: &[c_long] = &[
    SYS_connect, SYS_bind, SYS_listen, SYS_accept4, SYS_getsockname, SYS_getpeername, SYS_setsockopt, SYS_getsockopt,
    SYS_sendmmsg, SYS_shutdown, SYS_seccomp, SYS_landlock_create_ruleset, SYS_landlock_restrict_self, SYS_capget, SYS_capset,
];

/// Additional calls of `vmft run`, `record` and `replay`, for the user's terminal.
const TERMINAL: &[c_long] = &[SYS_getpgrp, SYS_getpgid, SYS_getppid, SYS_rt_sigtimedwait, SYS_signalfd4];

/// Additional calls to count a guest's instructions on KVM and to stop it.
const KVM: &[c_long] = &[SYS_fcntl, SYS_timer_create, SYS_timer_settime, SYS_timer_delete];

/// What an argument has to be: its number, the bits that are looked at, and the value that these bits have. Only the lower half
/// of an argument is looked at, unless the bits are all 64.
type Condition = (u8, u64, u64);

/// A call that is allowed if all conditions hold. A call that is listed several times is allowed if one of them fits.
type Limited = (c_long, Vec<Condition>);

const ALL: u64 = u32::MAX as u64;
const POINTER: u64 = u64::MAX;

/// The flags of a new thread of this process, and those that make something else of it: a process, or a namespace.
const THREAD: i32 = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD;
const NO_THREAD: i32 = CLONE_NEWNS
    | CLONE_NEWCGROUP
    | CLONE_NEWUTS
    | CLONE_NEWIPC
    | CLONE_NEWUSER
    | CLONE_NEWPID
    | CLONE_NEWNET
    | CLONE_VFORK
    | CLONE_PTRACE
    | CLONE_PARENT
    | CLONE_UNTRACED;

/// Conditions for every thread: memory is never executable, signals stay in this process, and what is sent goes to where the
/// socket is connected.
fn every() -> Vec<Limited> {
    let no_code = vec![(2, PROT_EXEC as u64, 0)];
    vec![
        (SYS_mmap, no_code.clone()),
        (SYS_mprotect, no_code),
        (SYS_tgkill, vec![(0, ALL, u64::from(std::process::id()))]),
        (SYS_sendto, vec![(4, POINTER, 0)]),
    ]
}

/// Conditions for [`THREADS`]: new threads, but no processes and namespaces.
fn threads() -> Vec<Limited> {
    vec![
        (SYS_clone, vec![(0, (THREAD | NO_THREAD) as u64, THREAD as u64)]),
        (SYS_prctl, vec![(0, ALL, PR_SET_NAME as u64)]),
        (SYS_prlimit64, vec![(0, ALL, 0), (2, POINTER, 0)]),
        (SYS_sched_getattr, vec![(0, ALL, 0)]),
        (SYS_sched_setattr, vec![(0, ALL, 0)]),
        // A datagram socket could send to a Unix socket of another program.
        (SYS_socketpair, vec![(0, ALL, AF_UNIX as u64), (1, 0xf, SOCK_STREAM as u64)]),
        (SYS_ioctl, vec![(1, ALL, FIONBIO)]),
        // The standard library's check whether a file is a terminal.
        (SYS_ioctl, vec![(1, ALL, TCGETS)]),
    ]
}

/// A socket of this domain and kind.
fn socket(domain: c_int, kind: c_int) -> Limited {
    (SYS_socket, vec![(0, ALL, domain as u64), (1, 0xf, kind as u64)])
}

/// Conditions for [`PAIR`]: TCP.
fn pair() -> Vec<Limited> {
    vec![
        socket(AF_INET, SOCK_STREAM),
        socket(AF_INET6, SOCK_STREAM),
        (SYS_prctl, vec![(0, ALL, PR_SET_NO_NEW_PRIVS as u64)]),
    ]
}

/// Further conditions for a keeper: what it takes to look up a host's name.
fn resolver() -> Vec<Limited> {
    vec![
        socket(AF_INET, SOCK_DGRAM),
        socket(AF_INET6, SOCK_DGRAM),
        (SYS_socket, vec![(0, ALL, AF_NETLINK as u64), (2, ALL, NETLINK_ROUTE as u64)]),
    ]
}

/// Conditions for [`TERMINAL`]: the modes of the user's terminal, and stopping with the shell's job.
fn terminal() -> Vec<Limited> {
    let ioctls = [TCSETS, TCSETSW, TCSETSF, TCGETS2, TCSETS2, TCSETSW2, TCSETSF2, TIOCGPGRP, TIOCGWINSZ];
    let own = (SYS_kill, vec![(0, ALL, u64::from(std::process::id()))]);
    ioctls.into_iter().map(|number| (SYS_ioctl, vec![(1, ALL, number)])).chain([own]).collect()
}

/// Conditions for [`KVM`]: the ioctls of KVM and of performance counters, by their type; counters of the calling thread only.
fn kvm() -> Vec<Limited> {
    vec![
        (SYS_ioctl, vec![(1, 0xff00, 0xae00)]),
        (SYS_ioctl, vec![(1, 0xff00, 0x2400)]),
        (SYS_perf_event_open, vec![(1, ALL, 0)]),
    ]
}

/// Confines the calling thread, and all threads that it starts later, to the calls of a pair's process. Returns their number.
pub fn process(is_kvm: bool) -> Result<usize, ConfineError> {
    no_clone3()?;
    let (calls, limited) = for_engine(is_kvm);
    apply(&[EVERY, THREADS, PAIR, calls].concat(), [every(), threads(), pair(), limited].concat())
}

/// Confines the calling thread, and all threads that it starts later, to the calls of a keeper. Returns their number.
pub fn keeper() -> Result<usize, ConfineError> {
    no_clone3()?;
    apply(&[EVERY, THREADS, PAIR].concat(), [every(), threads(), pair(), resolver()].concat())
}

/// Confines the calling thread to the calls of a pair's guest's thread. Returns their number.
pub fn guest(is_kvm: bool) -> Result<usize, ConfineError> {
    let (calls, limited) = for_engine(is_kvm);
    apply(&[EVERY, calls].concat(), [every(), limited].concat())
}

/// Confines the calling thread, and all threads that it starts later, to the calls of a process without a pair.
pub fn lone(is_kvm: bool) -> Result<usize, ConfineError> {
    no_clone3()?;
    let (calls, limited) = for_engine(is_kvm);
    apply(&[EVERY, THREADS, TERMINAL, calls].concat(), [every(), threads(), terminal(), limited].concat())
}

fn for_engine(is_kvm: bool) -> (&'static [c_long], Vec<Limited>) {
    if is_kvm { (KVM, kvm()) } else { (&[], vec![]) }
}

/// Hides `clone3`, whose flags are in memory, where a filter cannot look: the C library then uses `clone`.
fn no_clone3() -> Result<(), ConfineError> {
    let rules = BTreeMap::from([(SYS_clone3, vec![])]);
    load(rules, SeccompAction::Allow, SeccompAction::Errno(ENOSYS as u32))
}

fn apply(calls: &[c_long], limited: Vec<Limited>) -> Result<usize, ConfineError> {
    let mut rules: BTreeMap<_, _> = calls.iter().map(|call| (*call, vec![])).collect();
    // The other filter answers it.
    rules.insert(SYS_clone3, vec![]);
    for (call, conditions) in limited {
        rules.entry(call).or_default().push(rule(conditions).map_err(seccompiler::Error::from)?);
    }
    let count = rules.len() - 1;
    load(rules, SeccompAction::Errno(EPERM as u32), SeccompAction::Allow)?;
    Ok(count)
}

fn rule(conditions: Vec<Condition>) -> Result<SeccompRule, seccompiler::BackendError> {
    let condition = |(argument, bits, value)| {
        let size = if bits == POINTER { SeccompCmpArgLen::Qword } else { SeccompCmpArgLen::Dword };
        SeccompCondition::new(argument, size, SeccompCmpOp::MaskedEq(bits), value)
    };
    SeccompRule::new(conditions.into_iter().map(condition).collect::<Result<_, _>>()?)
}

fn load(
    rules: BTreeMap<c_long, Vec<SeccompRule>>,
    other: SeccompAction,
    listed: SeccompAction,
) -> Result<(), ConfineError> {
    let filter = SeccompFilter::new(rules, other, listed, TargetArch::x86_64);
    let program: BpfProgram = filter.and_then(BpfProgram::try_from).map_err(seccompiler::Error::from)?;
    Ok(seccompiler::apply_filter(&program)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A call with conditions must not be in a list without.
    #[test]
    fn no_condition_is_made_void_by_a_list() {
        let free = [EVERY, THREADS, PAIR, TERMINAL, KVM].concat();
        for (call, _) in [every(), threads(), pair(), resolver(), terminal(), kvm()].concat() {
            assert!(!free.contains(&call), "system call {call}");
        }
    }
}
