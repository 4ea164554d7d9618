//! Signals to replicas: none ends a side that runs the VM alone, and a backup that waits ends whatever it has refused.

mod support;

use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal::{
    self, SIGALRM, SIGHUP, SIGINT, SIGIO, SIGPROF, SIGPWR, SIGQUIT, SIGSTKFLT, SIGTERM, SIGUSR1, SIGUSR2,
    SIGVTALRM, SIGXCPU, SIGXFSZ,
};
use support::pair::{Host, Site};
use support::row::{BARE, LIVES, check_survivor, pair};
use support::vm::{VMFT, Vm};
use support::{can_network, has_guest};

/// All signals whose default is the end of the process, except SIGKILL, and those of the program's own faults.
const IGNORED: [Signal; 12] = [
    SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGALRM, SIGVTALRM, SIGPROF, SIGIO, SIGXCPU, SIGXFSZ, SIGPWR,
    SIGSTKFLT,
];

#[test]
fn no_signal_ends_a_vm_that_has_only_one_side() {
    let Some((_site, a, mut b, client)) = pair("no_signal_ends_a_vm_that_has_only_one_side") else { return };
    client.wait_for(20, 20);
    for side in [&a, &b] {
        for signal in IGNORED {
            side.signal(signal);
        }
    }
    client.wait_for(50, 20);
    assert!(!a.has_ended() && !b.has_ended() && !b.has_printed(LIVES), "{}", b.seen());
    drop(a);
    b.wait_for(LIVES, 20);
    for signal in [&IGNORED[..], &[SIGTERM, SIGINT]].concat() {
        b.signal(signal);
        client.wait_for(5, 20);
    }
    b.wait_for("SIGINT: VM vm runs on this side alone, and would end with it", 20);
    assert!(b.has_printed("end it with `vmft stop --yes --control"), "{}", b.seen());
    check_survivor(client, b);
}

#[test]
fn a_primary_without_a_backup_ends_on_sigterm_as_it_was_meant_to() {
    const TEST: &str = "a_primary_without_a_backup_ends_on_sigterm_as_it_was_meant_to";
    if !has_guest(TEST, "bare") || !can_network(TEST) {
        return;
    }
    let site = Site::new();
    let mut command = support::vm::vmft_in(&site.ns("a"));
    command.args(["primary", "--unprotected", "--name", "vm", "--store", &site.store_url("a"), "--keys"]);
    let mut alone = Vm::start(command.arg(site.keys("a")).args(BARE));
    alone.wait_for("only the console is served", 60);
    alone.signal(SIGHUP);
    alone.terminate();
    let (status, output) = alone.finish(20);
    assert!(status.success() && output.contains("the VM has ended"), "{output}");
}

/// Threads and open files of a process.
fn held(vm: &Vm) -> [usize; 2] {
    ["task", "fd"].map(|what| {
        let list = std::fs::read_dir(format!("/proc/{}/{what}", vm.id())).expect("a process");
        list.count()
    })
}

/// What a waiting backup tells an operator.
fn waiting_status(site: &Site) -> (Option<i32>, serde_json::Value) {
    let mut command = Command::new(VMFT);
    let output =
        command.args(["status", "--json", "--control"]).arg(site.control(Host::B)).output().expect("vmft");
    (output.status.code(), serde_json::from_slice(&output.stdout).expect("JSON"))
}

#[test]
fn a_backup_that_has_refused_primaries_keeps_nothing_of_them_and_ends_when_told() {
    const TEST: &str = "a_backup_that_has_refused_primaries_keeps_nothing_of_them_and_ends_when_told";
    if !has_guest(TEST, "bare") || !can_network(TEST) {
        return;
    }
    let site = Site::new();
    let mut b = Vm::start(&mut site.replica(Host::B, &BARE));
    b.wait_for("waiting for a primary", 20);
    let (code, told) = waiting_status(&site);
    assert_eq!(
        (code, &told["phase"], &told["role"]),
        (Some(1), &"waiting".into(), &"backup".into()),
        "{told}"
    );
    let refuse_one = || {
        let mut a = Vm::start(&mut site.replica(Host::A, &["--guest", "bare", "--memory-mib", "64"]));
        a.wait_for("memory-bytes", 20);
        a.terminate();
        assert!(a.finish(20).0.success());
    };
    refuse_one();
    let settled = |limit: [usize; 2]| {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let now = held(&b);
            if now[0] <= limit[0] && now[1] <= limit[1] {
                return now;
            }
            assert!(Instant::now() < deadline, "{now:?} threads and files are left, after {limit:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    // What is freed is freed after a while: the first refusal has shown what stays.
    std::thread::sleep(Duration::from_secs(1));
    let after_one = held(&b);
    for _ in 0..6 {
        refuse_one();
    }
    eprintln!("threads and files after one refusal {after_one:?}, after seven {:?}", settled(after_one));
    for signal in IGNORED {
        b.signal(signal);
    }
    b.terminate();
    let (status, output) = b.finish(20);
    assert!(status.success(), "{output}");
    assert!(!site.control(Host::B).exists());
}

#[test]
fn a_primary_that_is_refused_asks_ever_more_rarely_and_ends_when_told() {
    const TEST: &str = "a_primary_that_is_refused_asks_ever_more_rarely_and_ends_when_told";
    if !has_guest(TEST, "bare") || !can_network(TEST) {
        return;
    }
    let site = Site::new();
    let mut b = Vm::start(&mut site.replica(Host::B, &["--guest", "bare", "--memory-mib", "64"]));
    b.wait_for("waiting for a primary", 20);
    let mut a = Vm::start(site.replica(Host::A, &BARE).env("VMFT_LOG", "info,vmft::pair::replica=debug"));
    a.wait_for("memory-bytes", 20);
    std::thread::sleep(Duration::from_secs(7));
    a.has_printed("");
    let attempts = a.seen().matches("action=Refused").count();
    assert!((2..=5).contains(&attempts), "{attempts} attempts in 7 s:\n{}", a.seen());
    for side in [a, b] {
        side.signal(SIGINT);
        let (status, output) = side.finish(20);
        assert!(status.success(), "{output}");
    }
}
