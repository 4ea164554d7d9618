//! The system calls that each layer allows.

use std::collections::BTreeMap;

use nix::libc::*;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use super::ConfineError;

/// Calls that every thread makes: memory, waiting, time, signals within the process, and I/O on open files.
#[rustfmt::skip]
const EVERY: &[c_long] = &[
    SYS_brk, SYS_mmap, SYS_munmap, SYS_mremap, SYS_mprotect, SYS_madvise,
    SYS_futex, SYS_sched_yield, SYS_clock_gettime, SYS_clock_nanosleep, SYS_nanosleep, SYS_restart_syscall,
    SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_sigaltstack, SYS_getpid, SYS_gettid, SYS_tgkill,
    SYS_read, SYS_write, SYS_writev, SYS_sendto, SYS_recvfrom, SYS_close, SYS_getrandom, SYS_exit, SYS_exit_group,
];

/// Additional calls of all threads but the guest's: files, sockets, threads, and confining the guest's thread.
#[rustfmt::skip]
const PROCESS: &[c_long] = &[
    SYS_openat, SYS_newfstatat, SYS_fstat, SYS_stat, SYS_lstat, SYS_statx, SYS_lseek, SYS_getdents64, SYS_access, SYS_readlink,
    SYS_pread64, SYS_pwrite64, SYS_readv, SYS_fsync, SYS_fdatasync, SYS_fcntl, SYS_rename, SYS_unlink, SYS_fchmod,
    SYS_poll, SYS_ppoll, SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_wait, SYS_epoll_pwait, SYS_eventfd2,
    SYS_socket, SYS_socketpair, SYS_connect, SYS_bind, SYS_listen, SYS_accept4, SYS_getsockname, SYS_getpeername,
    SYS_setsockopt, SYS_getsockopt, SYS_sendmsg, SYS_sendmmsg, SYS_recvmsg, SYS_shutdown,
    SYS_clone, SYS_clone3, SYS_set_robust_list, SYS_rseq, SYS_prctl, SYS_sched_getaffinity, SYS_sched_getattr, SYS_sched_setattr, SYS_prlimit64, SYS_uname,
    SYS_rt_sigaction, SYS_seccomp, SYS_landlock_create_ruleset, SYS_landlock_restrict_self, SYS_getuid, SYS_geteuid,
];

/// Additional calls (besides [`KVM_IOCTLS`]) to count a guest's instructions on KVM and to stop it.
const KVM: &[c_long] =
    &[SYS_perf_event_open, SYS_fcntl, SYS_timer_create, SYS_timer_settime, SYS_timer_delete];

/// A set of ioctls: a mask of bits of the request number, and the value that these bits have.
type Ioctl = (u64, u64);

/// The ioctls of KVM and of performance counters, by the type field of the request number.
const KVM_IOCTLS: [Ioctl; 2] = [(0xff00, 0xae00), (0xff00, 0x2400)];
/// Setting a file non-blocking, and the standard library's check whether a file is a terminal.
const IOCTLS: [Ioctl; 2] = [(0xffff_ffff, FIONBIO), (0xffff_ffff, TCGETS)];

/// Confines the calling thread, and all threads that it starts later, to the calls of the process. Returns their number.
pub fn process(kvm: bool) -> Result<usize, ConfineError> {
    let (calls, ioctls) = for_engine(kvm);
    apply(&[EVERY, PROCESS, calls].concat(), &[&IOCTLS, ioctls].concat())
}

/// Confines the calling thread to the calls of the guest's thread. Returns their number.
pub fn guest(kvm: bool) -> Result<usize, ConfineError> {
    let (calls, ioctls) = for_engine(kvm);
    apply(&[EVERY, calls].concat(), ioctls)
}

fn for_engine(kvm: bool) -> (&'static [c_long], &'static [Ioctl]) {
    if kvm { (KVM, &KVM_IOCTLS) } else { (&[], &[]) }
}

fn apply(calls: &[c_long], ioctls: &[Ioctl]) -> Result<usize, ConfineError> {
    let ioctl = |(mask, number): &Ioctl| {
        let op = SeccompCmpOp::MaskedEq(*mask);
        SeccompRule::new(vec![SeccompCondition::new(1, SeccompCmpArgLen::Dword, op, *number)?])
    };
    let build = || -> Result<(BpfProgram, usize), seccompiler::BackendError> {
        let ioctls = ioctls.iter().map(ioctl).collect::<Result<Vec<_>, _>>()?;
        let mut rules: BTreeMap<_, _> = calls.iter().map(|call| (*call, vec![])).collect();
        if !ioctls.is_empty() {
            rules.insert(SYS_ioctl, ioctls);
        }
        let count = rules.len();
        let refused = SeccompAction::Errno(EPERM as u32);
        let filter = SeccompFilter::new(rules, refused, SeccompAction::Allow, TargetArch::x86_64)?;
        Ok((filter.try_into()?, count))
    };
    let (program, count) = build().map_err(seccompiler::Error::from)?;
    seccompiler::apply_filter(&program)?;
    Ok(count)
}
