//! The escape drill: threads of a running replica are made to try every system call and every path, as an intruder would who
//! has got out of the guest. What is left to them is the list in `docs/threat-model.md`.

mod support;

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::libc::*;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject;
use support::inject::HeldThread;
use support::pair::Host;
use support::row::{LIVES, check_survivor, pair_with};
use support::system_calls::SYSTEM_CALLS;
use support::vm::Vm;

/// Calls that every thread may make, and that cannot be tried: they end the thread, or wait.
const NOT_TRIED: [c_long; 5] = [SYS_rt_sigreturn, SYS_exit, SYS_exit_group, SYS_restart_syscall, SYS_futex];
/// An argument that is no pointer, no open file, no length, and has all flags.
const WRONG: u64 = u64::MAX;
/// Numbers that later kernels may give a meaning.
const NEWER: std::ops::Range<c_long> = 451..480;

fn is_refused(result: i64) -> bool {
    [-i64::from(EPERM), -i64::from(EACCES)].contains(&result)
}

/// The system calls that reach the kernel although all their arguments are wrong.
fn calls_left(vm: &Vm, thread: &str) -> BTreeSet<String> {
    let newer = NEWER.map(|number| (number, ""));
    let all: Vec<_> = SYSTEM_CALLS.iter().copied().chain(newer).collect();
    let mut left = BTreeSet::new();
    // A few at a time, so that the thread is never held long.
    for calls in all.chunks(40) {
        let held = HeldThread::new(vm.id(), thread);
        for (number, name) in calls {
            let reaches =
                || ![-i64::from(EPERM), -i64::from(ENOSYS)].contains(&held.call(*number, [WRONG; 6]));
            if NOT_TRIED.contains(number) || reaches() {
                left.insert(if name.is_empty() { number.to_string() } else { (*name).to_owned() });
            }
        }
    }
    left
}

/// The words of a row of the table in the document, of the column with system calls.
fn documented(row: &str) -> BTreeSet<String> {
    let document = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/threat-model.md");
    let document = std::fs::read_to_string(document).expect("docs/threat-model.md");
    let line = document.lines().find(|line| line.starts_with(&format!("| {row} |")));
    let line = line.unwrap_or_else(|| panic!("docs/threat-model.md has no row {row:?}"));
    line.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Calls whose arguments decide: what is tried, the call, its arguments, and whether the guest's thread may, and others.
#[rustfmt::skip]
fn with_arguments(own: u64, other: u64) -> Vec<(&'static str, c_long, [u64; 6], [bool; 2])> {
    let (map, unix, inet) = ((MAP_PRIVATE | MAP_ANONYMOUS) as u64, AF_UNIX as u64, AF_INET as u64);
    let (read_write, code) = ((PROT_READ | PROT_WRITE) as u64, (PROT_READ | PROT_EXEC) as u64);
    let thread = (CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD) as u64;
    let wrong_flags = (CLONE_PIDFD | CLONE_PARENT_SETTID) as u64;
    vec![
        ("memory", SYS_mmap, [0, 0, read_write, map, WRONG, 0], [true, true]),
        ("memory for code", SYS_mmap, [0, 4096, code, map, WRONG, 0], [false, false]),
        ("memory for code, with a length of 0", SYS_mmap, [0, 0, code | read_write, map, WRONG, 0], [false, false]),
        ("to make memory readable", SYS_mprotect, [1, 4096, PROT_READ as u64, 0, 0, 0], [true, true]),
        ("to make memory executable", SYS_mprotect, [1, 4096, code, 0, 0, 0], [false, false]),
        ("a signal to a thread of its own", SYS_tgkill, [own, WRONG, 0, 0, 0, 0], [true, true]),
        ("a signal to another process", SYS_tgkill, [other, other, 0, 0, 0, 0], [false, false]),
        ("to send where the socket is connected", SYS_sendto, [WRONG, 0, 0, 0, 0, 0], [true, true]),
        ("to send elsewhere", SYS_sendto, [WRONG, 0, 0, 0, 1, 16], [false, false]),
        ("a thread with flags that exclude each other", SYS_clone, [thread | wrong_flags, 0, 0, 0, 0, 0], [false, true]),
        ("a process", SYS_clone, [SIGCHLD as u64, 0, 0, 0, 0, 0], [false, false]),
        ("a process that shares memory", SYS_clone, [(CLONE_VM | CLONE_VFORK) as u64, 0, 0, 0, 0, 0], [false, false]),
        ("a user namespace", SYS_clone, [thread | CLONE_NEWUSER as u64, 0, 0, 0, 0, 0], [false, false]),
        ("a network namespace", SYS_clone, [thread | CLONE_NEWNET as u64, 0, 0, 0, 0, 0], [false, false]),
        ("a TCP socket of no protocol", SYS_socket, [inet, SOCK_STREAM as u64, 255, 0, 0, 0], [false, true]),
        ("a UDP socket", SYS_socket, [inet, SOCK_DGRAM as u64, 0, 0, 0, 0], [false, false]),
        ("a netlink socket", SYS_socket, [AF_NETLINK as u64, SOCK_RAW as u64, 0, 0, 0, 0], [false, false]),
        ("a raw socket", SYS_socket, [inet, SOCK_RAW as u64, 1, 0, 0, 0], [false, false]),
        ("a packet socket", SYS_socket, [AF_PACKET as u64, SOCK_RAW as u64, 0, 0, 0, 0], [false, false]),
        ("a Unix socket", SYS_socket, [unix, SOCK_STREAM as u64, 0, 0, 0, 0], [false, false]),
        ("a vsock", SYS_socket, [AF_VSOCK as u64, SOCK_STREAM as u64, 0, 0, 0, 0], [false, false]),
        ("a netlink socket for netfilter", SYS_socket, [AF_NETLINK as u64, SOCK_RAW as u64, 12, 0, 0, 0], [false, false]),
        ("a pair of sockets", SYS_socketpair, [unix, SOCK_STREAM as u64, 0, 1, 0, 0], [false, true]),
        ("a pair of datagram sockets", SYS_socketpair, [unix, SOCK_DGRAM as u64, 0, 1, 0, 0], [false, false]),
        ("its thread's name", SYS_prctl, [PR_SET_NAME as u64, 1, 0, 0, 0, 0], [false, true]),
        ("core dumps", SYS_prctl, [PR_SET_DUMPABLE as u64, 1, 0, 0, 0, 0], [false, false]),
        ("another process as its tracer", SYS_prctl, [PR_SET_PTRACER as u64, other, 0, 0, 0, 0], [false, false]),
        ("its memory's layout", SYS_prctl, [PR_SET_MM as u64, 1, 0, 0, 0, 0], [false, false]),
        ("its limits", SYS_prlimit64, [0, RLIMIT_NOFILE as u64, 0, 1, 0, 0], [false, true]),
        ("other limits", SYS_prlimit64, [0, RLIMIT_NOFILE as u64, 1, 0, 0, 0], [false, false]),
        ("another process' limits", SYS_prlimit64, [other, RLIMIT_NOFILE as u64, 0, 1, 0, 0], [false, false]),
        ("its scheduling", SYS_sched_getattr, [0, 0, 0, 0, 0, 0], [false, true]),
        ("another process' scheduling", SYS_sched_getattr, [other, 0, 0, 0, 0, 0], [false, false]),
        ("its time slice", SYS_sched_setattr, [0, 1, 0, 0, 0, 0], [false, true]),
        ("another process' time slice", SYS_sched_setattr, [other, 1, 0, 0, 0, 0], [false, false]),
        ("a file's blocking mode", SYS_ioctl, [WRONG, FIONBIO, 0, 0, 0, 0], [false, true]),
        ("a key for the user's terminal", SYS_ioctl, [WRONG, TIOCSTI, 0, 0, 0, 0], [false, false]),
        ("another tap", SYS_ioctl, [WRONG, 0x4004_54ca, 0, 0, 0, 0], [false, false]),
    ]
}

#[test]
fn an_intruder_has_the_system_calls_that_the_threat_model_lists() {
    const TEST: &str = "an_intruder_has_the_system_calls_that_the_threat_model_lists";
    let Some((_site, a, b, client)) = pair_with(TEST, &[], &[]) else { return };
    for (place, thread) in ["guest", "pump"].into_iter().enumerate() {
        let row = ["the guest's thread", "its other threads"][place];
        let mut all = documented("the guest's thread");
        all.extend(documented(row));
        // Of calls with conditions, those count that have the wrong arguments: none.
        let own = u64::from(b.id());
        let limited = with_arguments(own, u64::from(std::process::id()));
        let conditional: BTreeSet<c_long> = limited.iter().map(|(_, call, ..)| *call).collect();
        let names = SYSTEM_CALLS.iter().filter(|(number, _)| conditional.contains(number));
        let conditional: BTreeSet<_> = names.map(|(_, name)| (*name).to_owned()).collect();
        assert_eq!(calls_left(&b, thread), &all - &conditional, "the system calls left to {row}");
        let held = HeldThread::new(b.id(), thread);
        let mut some = BTreeSet::new();
        for (what, number, arguments, expected) in limited {
            let result = held.call(number, arguments);
            assert_eq!(!is_refused(result), expected[place], "{row} asks for {what}: {result}");
            if !is_refused(result) {
                some.extend(
                    SYSTEM_CALLS.iter().filter(|(n, _)| *n == number).map(|(_, name)| (*name).to_owned()),
                );
            }
        }
        assert_eq!(some, &all & &conditional, "the system calls left to {row} with some arguments");
    }
    drop(a);
    check_survivor(client, b);
}

/// Files and directories below this directory, to some depth; no links are followed.
fn below(dir: &Path, depth: u32, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten().take(400) {
        found.push(entry.path());
        if depth > 0 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            below(&entry.path(), depth - 1, found);
        }
    }
}

/// The paths of these that the thread can open so.
fn opened(vm: &Vm, thread: &str, paths: &[PathBuf], flags: i32) -> Vec<PathBuf> {
    let mut opened = Vec::new();
    for paths in paths.chunks(200) {
        let held = HeldThread::new(vm.id(), thread);
        for path in paths {
            let at = held.write(path);
            let file = held.call(SYS_openat, [AT_FDCWD as u64, at, (flags | O_NONBLOCK) as u64, 0, 0, 0]);
            if file >= 0 {
                held.call(SYS_close, [file as u64, 0, 0, 0, 0, 0]);
                opened.push(path.clone());
            }
        }
    }
    opened
}

#[test]
fn an_intruder_can_open_only_what_the_threat_model_lists() {
    const TEST: &str = "an_intruder_can_open_only_what_the_threat_model_lists";
    let Some((site, a, b, client)) = pair_with(TEST, &[], &[]) else { return };
    let mut paths = vec![PathBuf::from("/"), std::env::current_exe().expect("this program")];
    let dirs = [
        ("/", 0),
        ("/dev", 1),
        ("/etc", 2),
        ("/run", 1),
        ("/root", 1),
        ("/home", 2),
        ("/var", 2),
        ("/sys/kernel", 0),
    ];
    for (dir, depth) in dirs {
        below(Path::new(dir), depth, &mut paths);
    }
    below(&site.dir, 3, &mut paths);
    for process in ["self", "1", &b.id().to_string(), &std::process::id().to_string()] {
        below(&PathBuf::from(format!("/proc/{process}")), 0, &mut paths);
    }
    // Links to the streams of whoever opens them.
    paths.retain(|path| !path.to_string_lossy().starts_with("/dev/std") && !path.starts_with("/dev/fd"));
    // The test's own files change meanwhile, but there are enough.
    assert!(paths.len() > 1000, "{} paths", paths.len());
    for flags in [O_RDONLY, O_WRONLY] {
        assert_eq!(opened(&b, "guest", &paths, flags), [] as [PathBuf; 0], "by the guest's thread");
        let may = |path: &Path| flags == O_RDONLY && path == Path::new("/dev/urandom");
        let more: Vec<_> = opened(&b, "pump", &paths, flags).into_iter().filter(|path| !may(path)).collect();
        assert_eq!(more, [] as [PathBuf; 0], "by other threads");
    }
    drop(a);
    check_survivor(client, b);
}

/// The keeper of a replica.
fn keeper(vm: &Vm) -> u32 {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", vm.id())).expect("threads").flatten();
    let children = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    let children: Vec<u32> = children
        .flat_map(|ids| ids.split_whitespace().map(|id| id.parse().expect("a number")).collect::<Vec<_>>())
        .collect();
    let [keeper] = children[..] else { panic!("{children:?}") };
    keeper
}

/// Whether one of these is in the memory of a process.
fn has_in_memory(process: u32, secrets: &[Vec<u8>]) -> bool {
    let maps = std::fs::read_to_string(format!("/proc/{process}/maps")).expect("maps");
    let memory = std::fs::File::open(format!("/proc/{process}/mem")).expect("memory");
    maps.lines().filter(|line| line.contains(" rw") || line.contains(" r-")).any(|line| {
        let (from, to) = line.split_once(' ').and_then(|(range, _)| range.split_once('-')).expect("a range");
        let [from, to] = [from, to].map(|at| u64::from_str_radix(at, 16).expect("an address"));
        let mut bytes = vec![0; usize::try_from(to - from).expect("a length")];
        // The kernel's own pages, and those that are unmapped meanwhile, cannot be read.
        memory.read_exact_at(&mut bytes, from).is_ok()
            && secrets.iter().any(|secret| bytes.windows(secret.len()).any(|w| w == secret))
    })
}

#[test]
fn no_private_key_is_in_the_memory_of_a_replica() {
    const TEST: &str = "no_private_key_is_in_the_memory_of_a_replica";
    let Some((site, mut a, mut b, client)) = pair_with(TEST, &[], &[]) else { return };
    for (side, host) in [(&a, Host::A), (&b, Host::B)] {
        let file = site.keys(host.name()).join("own.key");
        let text = std::fs::read_to_string(&file).expect("a key");
        let der = PrivateKeyDer::from_pem_slice(text.as_bytes()).expect("a key").secret_der().to_vec();
        // The private number of a key of 256 bits follows the head of an octet string, the first of this length.
        let at = der.windows(2).position(|head| head == [4, 32]).expect("a private number") + 2;
        let number = der[at..at + 32].to_vec();
        let backwards = number.iter().rev().copied().collect();
        let encoded = text.lines().nth(1).expect("a line").as_bytes().to_vec();
        let secrets = [number, backwards, encoded];
        assert!(!has_in_memory(side.id(), &secrets), "{host:?}");
        assert!(has_in_memory(keeper(side), &secrets), "the search finds no key where one is");
    }
    // A side that has lost its keeper would get no verdict any more. It leaves the guest to the other side.
    let lost = Pid::from_raw(keeper(&a) as i32);
    nix::sys::signal::kill(lost, Signal::SIGKILL).expect("kill");
    b.wait_for(LIVES, 20);
    a.wait_for("the process that keeps its keys has ended", 20);
    check_survivor(client, b);
}
