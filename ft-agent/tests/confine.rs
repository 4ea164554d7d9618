//! What a replica may not do once it is confined, and that it needs no root.

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::libc::*;
use support::counter::Counter;
use support::inject::inject;
use support::net::ip;
use support::pair::{Host, Site};
use support::row::{BARE, LIVES, check_survivor, one_lives, pair_with};
use support::vm::{VMFT, Vm, under};
use support::{can_network, has, has_guest, has_kvm, image, skip};

/// The seccomp filters of every thread.
const PROCESS: u32 = 2;

/// The number of seccomp filters and the capabilities of each thread of a process, by the thread's name.
fn threads(process: u32) -> BTreeMap<String, (u32, u64)> {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).expect("threads");
    let mut threads = BTreeMap::new();
    for task in tasks.flatten() {
        // The thread may have ended meanwhile.
        let Ok(status) = std::fs::read_to_string(task.path().join("status")) else { continue };
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_else(|| panic!("no {name} in {status}")).trim().to_owned()
        };
        assert_eq!(field("NoNewPrivs:"), "1", "{status}");
        let filters = field("Seccomp_filters:").parse().expect("a number");
        let capabilities = u64::from_str_radix(&field("CapPrm:"), 16).expect("a number");
        threads.insert(field("Name:"), (filters, capabilities));
    }
    threads
}

#[test]
fn every_thread_is_confined_and_the_guests_thread_more() {
    const TEST: &str = "every_thread_is_confined_and_the_guests_thread_more";
    let Some((_site, mut a, mut b, client)) = pair_with(TEST, &[], &[]) else { return };
    for side in [&mut a, &mut b] {
        for who in ["process", "guest's thread"] {
            side.wait_for(&format!("{who} confined by landlock"), 20);
            side.wait_for(&format!("{who} confined by seccomp to "), 20);
        }
        let threads = threads(side.id());
        let more: Vec<&str> =
            threads.iter().filter(|(_, (n, _))| *n > PROCESS).map(|(name, _)| name.as_str()).collect();
        assert_eq!(more, ["guest"], "{threads:?}");
        assert!(threads.len() > 4 && threads.values().all(|(n, _)| *n >= PROCESS), "{threads:?}");
        assert!(threads.values().all(|(_, capabilities)| *capabilities == 0), "{threads:?}");
    }
    drop(a);
    check_survivor(client, b);
}

#[test]
fn run_record_and_replay_are_confined_too() {
    const TEST: &str = "run_record_and_replay_are_confined_too";
    if !has_guest(TEST, "bare") {
        return;
    }
    let dir = std::env::temp_dir().join(format!("vmft-confined-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("directory");
    let log = dir.join("log");
    let check = |args: &[&str], is_confined: bool| {
        let mut vm = Vm::start(Command::new(VMFT).args(args));
        vm.wait_for("only the console is served", 30);
        let status = std::fs::read_to_string(format!("/proc/{}/status", vm.id())).expect("status");
        assert_eq!(status.contains("Seccomp:\t2"), is_confined, "{args:?}: {status}");
        if is_confined {
            let threads = threads(vm.id());
            assert!(threads.values().all(|one| *one == (PROCESS, 0)), "{args:?}: {threads:?}");
            let made = dir.join("made");
            for (what, number, arguments) in ATTEMPTS {
                let path = if what == "make a file" { made.as_path() } else { Path::new("/proc/version") };
                let refused = inject(vm.id(), "vmft", number, path, &arguments);
                assert_eq!(refused, -i64::from(if number == SYS_openat { EACCES } else { EPERM }), "{what}");
            }
        }
    };
    let guest = [&BARE[..], &["--clock", "host"]].concat();
    check(&[&["run"], &guest[..]].concat(), true);
    check(&[&["run", "--no-confine"], &guest[..]].concat(), false);
    let recorded = [&["record", "--log", log.to_str().expect("a path")], &guest[..]].concat();
    check(&recorded, true);
    std::fs::remove_dir_all(&dir).expect("to remove");
}

/// A name, the number of a system call, and its arguments, given the address of a path.
type Attempt = (&'static str, c_long, fn(u64) -> [u64; 4]);

/// System calls that an intruder would want to make.
const ATTEMPTS: [Attempt; 6] = [
    ("read a file", SYS_openat, |path| [AT_FDCWD as u64, path, O_RDONLY as u64, 0]),
    ("make a file", SYS_openat, |path| [AT_FDCWD as u64, path, (O_CREAT | O_WRONLY) as u64, 0o600]),
    ("connect", SYS_socket, |_| [AF_INET as u64, SOCK_STREAM as u64, 0, 0]),
    ("make a file in memory", SYS_memfd_create, |path| [path, 0, 0, 0]),
    ("be another user", SYS_setuid, |_| [u64::MAX, 0, 0, 0]),
    ("unshare", SYS_unshare, |_| [CLONE_FS as u64, 0, 0, 0]),
];

/// Makes a thread of a replica do the [`ATTEMPTS`]. Returns for each whether it was allowed.
fn attempts(vm: &Vm, thread: &str, dir: &Path) -> Vec<(&'static str, bool)> {
    let made = dir.join(format!("made-by-{thread}"));
    let attempt = |(what, number, arguments): &Attempt| {
        let path = if *what == "make a file" { made.as_path() } else { Path::new("/proc/version") };
        let result = inject(vm.id(), thread, *number, path, arguments);
        let refused = [-i64::from(EPERM), -i64::from(EACCES)].contains(&result);
        assert!(refused || result >= 0 || *what == "be another user", "{what} on {thread}: {result}");
        (*what, !refused)
    };
    ATTEMPTS.iter().map(attempt).collect()
}

#[test]
fn a_confined_replica_is_refused_what_it_does_not_need() {
    const TEST: &str = "a_confined_replica_is_refused_what_it_does_not_need";
    for confined in [true, false] {
        let options: &[&str] = if confined { &[] } else { &["--no-confine"] };
        let Some((site, a, b, client)) = pair_with(TEST, options, &[]) else { return };
        // Outside the control socket's directory, in which the replica may create files.
        let elsewhere = PathBuf::from(format!("{}-elsewhere", site.dir.display()));
        std::fs::create_dir(&elsewhere).expect("directory");
        for thread in ["guest", "pump"] {
            let done: Vec<_> = attempts(&b, thread, &elsewhere)
                .into_iter()
                .filter(|(_, done)| *done)
                .map(|(what, _)| what)
                .collect();
            let expected = match (confined, thread) {
                (true, "guest") => vec![],
                (true, _) => vec!["connect"],
                (false, _) => ATTEMPTS.map(|(what, ..)| what).to_vec(),
            };
            assert_eq!(done, expected, "{thread}, confined: {confined}");
        }
        std::fs::remove_dir_all(&elsewhere).expect("directory");
        drop(a);
        check_survivor(client, b);
    }
}

#[test]
fn a_confined_replica_sees_a_removed_key_wherever_its_keys_are() {
    const TEST: &str = "a_confined_replica_sees_a_removed_key_wherever_its_keys_are";
    if !has_guest(TEST, "bare") || !can_network(TEST) {
        return;
    }
    let site = Site::new();
    // Beside neither the store's keys nor anything else that a replica may read.
    let elsewhere = PathBuf::from(format!("{}-keys", site.dir.display()));
    let copied = Command::new("cp").arg("-r").arg(site.keys("b")).arg(&elsewhere).status();
    assert!(copied.expect("cp").success());
    let replica = site.replica(Host::B, &BARE);
    let mut args: Vec<_> = replica.get_args().map(|arg| arg.to_owned()).collect();
    let keys = args.iter().position(|arg| arg == "--keys").expect("--keys");
    args[keys + 1] = elsewhere.clone().into();
    let mut b = Vm::start(Command::new(replica.get_program()).args(args));
    b.wait_for("waiting for a primary", 30);
    let mut a = Vm::start(&mut site.replica(Host::A, &BARE));
    a.wait_for("READY", 60);
    let client = Counter::bare(&site.ns("client"));
    client.wait_for(20, 20);
    std::fs::remove_file(elsewhere.join("peers/a.crt")).expect("to remove");
    b.wait_for("the peer's certificate is no longer accepted", 5);
    let (_, survivor) = one_lives(a, b);
    check_survivor(client, survivor);
    std::fs::remove_dir_all(&elsewhere).expect("to remove");
}

/// User and group without any rights.
const NOBODY: &str = "65534";

/// Runs a pair as the user nobody, who owns its taps and a device node for KVM.
fn without_root(test: &str, machine: &[&str]) {
    if !has_guest(test, "bare") || !can_network(test) {
        return;
    }
    for tool in ["setpriv", "mknod"] {
        if !has(tool) {
            return skip(test, &format!("needs {tool}"));
        }
    }
    let site = Site::new();
    let place = |file: &str| site.dir.join(file).display().to_string();
    for host in ["a", "b"] {
        let ns = site.ns(host);
        ip(&["-n", &ns, "link", "delete", "tap0"]);
        ip(&["-n", &ns, "tuntap", "add", "tap0", "mode", "tap", "user", NOBODY]);
        ip(&["-n", &ns, "link", "set", "tap0", "master", "br0", "up"]);
    }
    // Other users cannot read root's directories.
    std::fs::copy(VMFT, place("vmft")).expect("copy");
    std::fs::copy(image("bare", "kernel"), place("kernel")).expect("copy");
    let owned = Command::new("chown").args(["-R", NOBODY]).arg(&site.dir).status();
    assert!(owned.expect("chown").success());
    // Gives the user the devices, in case udev has given them to nobody else than root. The mounts of `ip
    // netns exec` end with it.
    let given = |device: &str, number: u32| {
        let node = place(&device.replace('/', "-"));
        let node = format!("{node}-$$");
        format!(
            "if [ -e {device} ]; then mknod {node} c 10 {number}; chown {NOBODY} {node}; mount --bind {node} {device}; fi"
        )
    };
    let as_nobody = format!(
        "{}; {}; shift; exec setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups {} \"$@\"",
        given("/dev/kvm", 232),
        given("/dev/net/tun", 200),
        place("vmft"),
    );
    let kernel = place("kernel");
    let options = [&["--kernel", &kernel, "--memory-mib", "32"][..], machine].concat();
    let side = |host| Vm::start(&mut under(site.replica(host, &options), &["sh", "-c", &as_nobody, "sh"]));
    let mut b = side(Host::B);
    b.wait_for("waiting for a primary", 30);
    let mut a = side(Host::A);
    a.wait_for("READY", 60);
    for side in [&a, &b] {
        let status = std::fs::read_to_string(format!("/proc/{}/status", side.id())).expect("status");
        let whose = status.lines().find_map(|line| line.strip_prefix("Uid:")).expect("a user");
        assert!(whose.split_whitespace().all(|id| id == NOBODY), "{whose}");
        assert!(status.contains("CapEff:\t0000000000000000"), "{status}");
    }
    let client = Counter::bare(&site.ns("client"));
    client.wait_for(20, 20);
    drop(a);
    b.wait_for(LIVES, 20);
    check_survivor(client, b);
}

#[test]
fn a_pair_needs_no_root() {
    without_root("a_pair_needs_no_root", &[]);
}

#[test]
fn a_pair_on_kvm_needs_no_root() {
    const TEST: &str = "a_pair_on_kvm_needs_no_root";
    if has_kvm(TEST) {
        without_root(TEST, &["--cpu", "kvm", "--positions", "sync"]);
    }
}
