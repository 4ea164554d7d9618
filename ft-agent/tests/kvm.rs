//! The KVM engine as a user sees it: the bare guest runs, is recorded under load, and is replayed.

mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use support::net::{GUEST, GUEST_IP, Hosts};
use support::vm::{VMFT, Vm, vmft_in};
use support::{can_network, has_guest, has_kvm, skip};

/// Requests of all clients together.
const REQUESTS: u32 = 10_000;
const CLIENTS: u32 = 4;
const REPLAYS: u32 = 10;

fn scratch(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("vmft-kvm-{}-{name}", std::process::id()));
    if path.exists() {
        std::fs::remove_file(&path).unwrap();
    }
    path
}

fn vmft(args: &[&str]) -> (i32, String) {
    let output = Command::new(VMFT).args(args).stdin(Stdio::null()).output().expect("vmft");
    let text = [output.stdout, output.stderr].concat();
    (output.status.code().expect("ended by a signal"), String::from_utf8_lossy(&text).into_owned())
}

fn replays(log: &Path, times: u32) -> String {
    let (code, text) = vmft(&["replay", log.to_str().unwrap(), "--until-divergence", &times.to_string()]);
    assert_eq!(code, 0, "{text}");
    assert_eq!(text.matches("every output and every state was equal").count(), times as usize, "{text}");
    text
}

/// A bash script: a client that adds 1 `count` times over one connection, and prints the last reply.
fn requests(count: u32) -> String {
    format!(
        "exec 3<>/dev/tcp/{GUEST}/7777; for ((n = 0; n < {count}; n++)); do echo add 1 >&3; read -r reply <&3; done; \
         echo \"$reply\""
    )
}

#[test]
fn the_bare_guest_serves_is_recorded_and_replayed_ten_times() {
    const TEST: &str = "the_bare_guest_serves_is_recorded_and_replayed_ten_times";
    if !has_kvm(TEST) || !has_guest(TEST, "bare") || !can_network(TEST) {
        return;
    }
    let log = scratch("serve");
    let hosts = Hosts::new();
    let args = ["record", "--cpu", "kvm", "--positions", "sync", "--guest", "bare", "--memory-mib", "16"];
    let mut command = vmft_in(&hosts.host);
    command.args(args).args(["--tap", "tap0", "--ip", GUEST_IP, "--log", log.to_str().unwrap()]);
    let mut vm = Vm::start(&mut command);
    vm.wait_for("READY", 30);
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let mut client = hosts.on_client("bash");
            client.args(["-c", &requests(REQUESTS / CLIENTS)]).stdout(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for client in clients {
        let reply = client.wait_with_output().unwrap();
        assert!(reply.status.success() && reply.stdout.starts_with(b"ok "), "{reply:?}");
    }
    let reply = hosts.client("bash", &["-c", &requests(1)]);
    assert!(reply.starts_with(&format!("ok {0} {0} ", REQUESTS + 1)), "{reply}");
    vm.type_in("poweroff\n");
    let (status, output) = vm.finish(30);
    assert!(status.success(), "{output}");
    assert!(output.contains("engine: kvm-sync (as asked for)"), "{output}");
    // The last replays run while other processes compete for the CPUs.
    replays(&log, REPLAYS - 3);
    let load: Vec<_> =
        (0..4).map(|_| Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap()).collect();
    let replayed = std::panic::catch_unwind(|| replays(&log, 3));
    for mut busy in load {
        busy.kill().unwrap();
        busy.wait().unwrap();
    }
    replayed.unwrap();
    std::fs::remove_file(&log).unwrap();
}

#[test]
fn a_guest_that_makes_no_exits_is_reported_and_can_be_stopped() {
    const TEST: &str = "a_guest_that_makes_no_exits_is_reported_and_can_be_stopped";
    if !has_kvm(TEST) || !has_guest(TEST, "bare") {
        return;
    }
    let log = scratch("starving");
    let args = ["record", "--cpu", "kvm", "--guest", "bare", "--memory-mib", "16", "--starvation-ms", "300"];
    let spin = ["--cmdline", "workload=spin every=1000000000000", "--log", log.to_str().unwrap()];
    let mut vm = Vm::start(Command::new(VMFT).args(args).args(spin));
    vm.wait_for("has made no exit for 0.", 20);
    let stopped = Command::new("kill").arg(vm.id().to_string()).status().unwrap();
    assert!(stopped.success());
    let (status, output) = vm.finish(20);
    assert!(status.success(), "{output}");
    assert!(output.contains("1 times an input waited for the guest's next exit"), "{output}");
    let (code, text) = vmft(&["replay", log.to_str().unwrap()]);
    assert!(code == 0 && text.contains("stopped here"), "{text}");
    std::fs::remove_file(&log).unwrap();
}

/// Records and replays positions by a counter, with a simulated counter, since not every host has a real one.
#[test]
fn counted_branches_are_recorded_and_replayed() {
    const TEST: &str = "counted_branches_are_recorded_and_replayed";
    if !has_guest(TEST, "bare") {
        return;
    }
    let log = scratch("counted");
    let args = ["record", "--cpu", "soft", "--positions", "counter", "--guest", "bare", "--memory-mib", "16"];
    let spin = ["--cmdline", "workload=spin every=100000", "--log", log.to_str().unwrap()];
    let mut vm = Vm::start(Command::new(VMFT).args(args).args(spin));
    vm.wait_for("engine: soft-counter (a simulated counter, for tests)", 20);
    std::thread::sleep(std::time::Duration::from_secs(5));
    vm.terminate();
    let (status, output) = vm.finish(20);
    assert!(status.success() && output.contains("kicks stopped at a branch"), "{output}");
    let text = replays(&log, 3);
    // Inputs arrived between two exits, and some positions were sought again because the counter was later
    // than expected.
    let numbers =
        |line: &str| -> Vec<u64> { line.split([' ', ';']).filter_map(|word| word.parse().ok()).collect() };
    for line in text.lines().filter(|line| line.contains("landed on by counter")) {
        let [landed, missed] = numbers(line)[..] else { panic!("{line}") };
        assert!(landed > 100 && missed > 0, "{text}");
    }
    std::fs::remove_file(&log).unwrap();
}

#[test]
fn a_counter_is_used_where_there_is_one_and_refused_with_the_reason_elsewhere() {
    const TEST: &str = "a_counter_is_used_where_there_is_one_and_refused_with_the_reason_elsewhere";
    if !has_guest(TEST, "bare") {
        return;
    }
    let (_, report) = vmft(&["doctor"]);
    let exact = report.contains("verdict: exact");
    let log = scratch("counter");
    let args = ["record", "--cpu", "kvm", "--positions", "counter", "--guest", "bare", "--memory-mib", "16"];
    let stop = ["--stop-at", "300", "--log", log.to_str().unwrap()];
    let (code, text) = vmft(&[&args[..], &stop].concat());
    if exact {
        assert_eq!(code, 0, "{text}");
        assert!(text.contains("engine: kvm-counter (vmft doctor: exact"), "{text}");
        replays(&log, 10);
        std::fs::remove_file(&log).unwrap();
    } else {
        skip(TEST, "this host has no exact counter: no replay by it was run");
        assert_eq!(code, 2, "{text}");
        // The reason is one of the doctor's.
        let reason = text
            .split("this host has no exact counter: ")
            .nth(1)
            .expect(&text)
            .split([';', '\n'])
            .next()
            .unwrap();
        let (name, reason) = reason.split_once(": ").expect(&text);
        assert!(
            report.lines().any(|l| l.starts_with("FAIL") && l.contains(name) && l.contains(reason)),
            "{text}{report}"
        );
    }
    let (_, text) = vmft(&["run", "--guest", "bare", "--memory-mib", "16", "--stop-at", "300"]);
    let chosen =
        if exact { "engine: kvm-counter (" } else { "engine: soft (KVM is not exact on this host: " };
    assert!(text.contains(chosen), "{text}");
}
