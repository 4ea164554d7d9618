//! `vmft record`, `replay` and `log`: what was recorded is replayed to the same state, and damage is found.

mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use support::net::{GUEST, GUEST_IP, Hosts};
use support::vm::{VMFT, Vm, vmft_in};
use support::{can_network, digests, has, has_guest, skip};

fn scratch(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("vmft-record-{}-{name}", std::process::id()));
    if path.exists() {
        std::fs::remove_file(&path).unwrap();
    }
    path
}

/// Runs vmft to its end: exit code, standard output, standard error.
fn vmft(args: &[&str]) -> (i32, String, String) {
    let output = Command::new(VMFT).args(args).stdin(Stdio::null()).output().expect("vmft");
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    (output.status.code().expect("ended by a signal"), text(&output.stdout), text(&output.stderr))
}

/// Replays a log. Panics unless everything was equal.
fn replays(log: &Path, extra: &[&str]) -> String {
    let (code, digests, errors) = vmft(&[&["replay", log.to_str().unwrap()], extra].concat());
    assert_eq!(code, 0, "{errors}");
    assert!(errors.contains("every output and every state was equal"), "{errors}");
    digests + &errors
}

/// Records the bare guest while lines are typed on its console, at moments that depend on the host's
/// scheduling.
fn record_bare(log: &Path, seed: u64) {
    let args = ["record", "--guest", "bare", "--memory-mib", "16", "--cmdline", "hz=19"];
    let mut vm = Vm::start(Command::new(VMFT).args(args).args(["--log", log.to_str().unwrap()]));
    vm.wait_for("only the console is served", 20);
    for n in 0..20 {
        vm.type_in(&format!("add {}\n", seed * 31 + n));
        std::thread::sleep(Duration::from_micros((seed * 7919 + n * 104_729) % 3000));
    }
    vm.type_in("poweroff\n");
    let (status, output) = vm.finish(30);
    assert!(status.success(), "{output}");
}

#[test]
fn typed_lines_at_random_moments_are_replayed() {
    if !has_guest("typed_lines_at_random_moments_are_replayed", "bare") {
        return;
    }
    let log = scratch("typed");
    for seed in 0..10 {
        record_bare(&log, seed);
        let errors = replays(&log, &[]);
        assert!(errors.contains("powered off"), "{errors}");
        std::fs::remove_file(&log).unwrap();
    }
}

#[test]
fn a_replay_stops_where_it_is_told_and_shows_the_same_digests() {
    const TEST: &str = "a_replay_stops_where_it_is_told_and_shows_the_same_digests";
    if !has_guest(TEST, "bare") {
        return;
    }
    let log = scratch("stops");
    let name = log.to_str().unwrap();
    let machine = ["--guest", "bare", "--memory-mib", "16", "--cmdline", "workload=mem mib=2"];
    let stops = ["--digest-at", "100000,2000000,30000000", "--stop-at", "40000000"];
    let (code, _, recorded) = vmft(&[&["record", "--log", name], &machine[..], &stops[..]].concat());
    assert_eq!(code, 0, "{recorded}");
    assert_eq!(digests(&recorded).len(), 3, "{recorded}");
    let replayed = replays(&log, &stops[..2]);
    assert_eq!(digests(&replayed), digests(&recorded));
    let (code, found, errors) = vmft(&["replay", name, "--to", "2000000", "--digest-at", "2000000"]);
    assert_eq!((code, digests(&found)), (0, digests(&recorded)[1..2].to_vec()), "{errors}");
    let (code, table, _) = vmft(&["log", "stat", name]);
    assert!(code == 0 && table.contains("state"), "{table}");
    let (code, lines, _) = vmft(&["log", "show", name, "--kind", "state"]);
    // One at the start, one every 10 M instructions, the three that were asked for, and the last.
    assert_eq!((code, lines.lines().count()), (0, 9), "{lines}");
    // A reader that has seen enough, like head, is no fault.
    for verb in ["stat", "show"] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let unread = Command::new(VMFT).args(["log", verb, name]).stdout(writer).output().expect("vmft");
        assert!(unread.status.success() && unread.stderr.is_empty(), "{unread:?}");
    }
    std::fs::remove_file(&log).unwrap();
}

#[test]
fn a_damaged_or_cut_log_is_never_replayed_silently() {
    const TEST: &str = "a_damaged_or_cut_log_is_never_replayed_silently";
    if !has_guest(TEST, "bare") {
        return;
    }
    let log = scratch("damaged");
    record_bare(&log, 5);
    let good = std::fs::read(&log).unwrap();
    // The codec's tests flip every byte; this test checks that the error reaches the user, with the offset.
    for at in [3, 9, 40, good.len() / 2, good.len() - 2] {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        std::fs::write(&log, &bad).unwrap();
        let (code, _, errors) = vmft(&["replay", log.to_str().unwrap()]);
        assert!(code == 2 && errors.contains("log: byte"), "byte {at}: {code} {errors}");
    }
    std::fs::write(&log, &good[..good.len() - 3]).unwrap();
    let (code, _, errors) = vmft(&["replay", log.to_str().unwrap()]);
    assert_eq!(code, 0, "{errors}");
    assert!(errors.contains("cut off"), "{errors}");
    std::fs::remove_file(&log).unwrap();
}

#[test]
fn damage_anywhere_in_a_large_log_is_detected() {
    const TEST: &str = "damage_anywhere_in_a_large_log_is_detected";
    if !has_guest(TEST, "bare") {
        return;
    }
    let log = scratch("large");
    let name = log.to_str().unwrap();
    let machine = ["--guest", "bare", "--memory-mib", "16", "--cmdline", "workload=random count=8000"];
    let (code, _, errors) = vmft(&[&["record", "--log", name], &machine[..]].concat());
    assert_eq!(code, 0, "{errors}");
    replays(&log, &[]);
    let good = std::fs::read(&log).unwrap();
    assert!(good.len() > 200_000, "{} bytes", good.len());
    let mut seed = 1u64;
    for _ in 0..40 {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let at = (seed >> 33) as usize % good.len();
        let mut bad = good.clone();
        bad[at] ^= 1 << (seed >> 30 & 7);
        std::fs::write(&log, &bad).unwrap();
        let (code, _, errors) = vmft(&["replay", name]);
        assert!(code == 2 && errors.contains("log: byte"), "byte {at}: {code} {errors}");
        let named = errors.split("log: byte ").nth(1).and_then(|t| t.split(':').next());
        let named: usize = named.and_then(|n| n.parse().ok()).unwrap();
        // A block is at most 128 KiB long.
        assert!(named <= at && at < named + (1 << 17), "byte {at}: {errors}");
    }
    std::fs::remove_file(&log).unwrap();
}

#[test]
fn two_replays_are_compared_side_by_side() {
    const TEST: &str = "two_replays_are_compared_side_by_side";
    if !has_guest(TEST, "bare") {
        return;
    }
    let log = scratch("bisect");
    record_bare(&log, 3);
    let (code, _, errors) = vmft(&["replay", log.to_str().unwrap(), "--bisect"]);
    assert_eq!(code, 0, "{errors}");
    assert!(errors.contains("no difference between two replays"), "{errors}");
    std::fs::remove_file(&log).unwrap();
}

#[test]
fn linux_under_network_and_disk_load_is_replayed() {
    const TEST: &str = "linux_under_network_and_disk_load_is_replayed";
    if !has_guest(TEST, "linux") || !can_network(TEST) {
        return;
    }
    if !has("mkfs.ext4") {
        return skip(TEST, "needs mkfs.ext4 (scripts/test installs e2fsprogs)");
    }
    let (log, disk, before) = (scratch("linux"), scratch("disk"), scratch("before"));
    std::fs::File::create(&disk).and_then(|f| f.set_len(64 << 20)).unwrap();
    let made = Command::new("mkfs.ext4").arg("-q").arg(&disk).status().unwrap();
    assert!(made.success());
    std::fs::copy(&disk, &before).unwrap();
    let hosts = Hosts::new();
    let args = ["record", "--guest", "linux", "--tap", "tap0", "--ip", GUEST_IP];
    let files = ["--disk", disk.to_str().unwrap(), "--log", log.to_str().unwrap()];
    let mut vm = Vm::start(vmft_in(&hosts.host).args(args).args(files));
    vm.wait_for("READY", 180);
    eprintln!("{TEST}: the guest is ready");
    hosts.client("redis-benchmark", &["-h", GUEST, "-t", "set,get", "-n", "3000", "-c", "20", "--csv"]);
    hosts.client("curl", &["-sSf", "-o", "/dev/null", &format!("http://{GUEST}/16M")]);
    vm.type_in("seq 1 100000 >/disk/numbers; sync; sha256sum /disk/numbers; poweroff\n");
    let (status, output) = vm.finish(120);
    assert!(status.success(), "{output}");
    eprintln!("{TEST}: recorded");
    let errors = replays(&log, &["--disk", before.to_str().unwrap()]);
    assert!(errors.contains("powered off"), "{errors}");
    // The disk has changed since the recording.
    let (code, _, errors) = vmft(&["replay", log.to_str().unwrap(), "--disk", disk.to_str().unwrap()]);
    assert!(code == 2 && errors.contains("disk-0"), "{errors}");
    for file in [log, disk, before] {
        std::fs::remove_file(file).unwrap();
    }
}
