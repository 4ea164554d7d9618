//! Rows of the fault table in which a replica fails at a chosen place: it is stopped around the gate's
//! decision, its guest is stuck while its heartbeats go on, or it diverges.

mod support;

use std::collections::HashSet;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal::{SIGCONT, SIGSTOP};
use support::capture::{Capture, CapturedFrame};
use support::counter::Counter;
use support::pair::{Host, Site};
use support::row::{LIVES, check_fenced, check_survivor, pair, pair_with, trigger};
use support::vm::Vm;

/// The longest time that a turn of a loser's loop takes on a busy machine.
const TURN: Duration = Duration::from_millis(500);

/// Stops a primary, and lets it go on when the backup lives. Then it may send only frames that the survivor
/// has sent too, and only those that it had decided to send before it was stopped.
fn check_resumed_primary(site: Site, a: Vm, mut b: Vm, client: Counter, place: Option<&str>) {
    let capture = Capture::start(&site);
    client.wait_for(20, 20);
    match place {
        Some(place) => trigger(&site, place),
        None => a.signal(SIGSTOP),
    }
    b.wait_for(LIVES, 20);
    client.wait_for(20, 20);
    let resumed = Instant::now();
    a.signal(SIGCONT);
    check_fenced(a);
    check_survivor(client, b);
    let frames = capture.finish();
    let of_b: HashSet<&[u8]> = frames.iter().filter(|f| f.host == Host::B).map(|f| &*f.bytes).collect();
    let late: Vec<&CapturedFrame> = frames.iter().filter(|f| f.host == Host::A && f.at >= resumed).collect();
    let late_max = if place == Some("before-write") { 1 } else { 0 };
    eprintln!("{} frames passed, {} of the loser after it went on", frames.len(), late.len());
    for frame in &late {
        assert!(frame.at < resumed + TURN, "the loser still sends {:?} after it went on", frame.at - resumed);
        assert!(of_b.contains(&*frame.bytes), "the survivor has not sent {:02x?}", frame.bytes);
    }
    assert!(late.len() <= late_max, "the loser sent more than it had decided to send");
    assert!(frames.iter().any(|f| f.host == Host::A) && !of_b.is_empty(), "nothing was captured");
}

#[test]
fn a_resumed_loser_sends_nothing_of_its_own() {
    for _ in 0..support::cases(2) {
        let Some((site, a, b, client)) = pair("a_resumed_loser_sends_nothing_of_its_own") else { return };
        check_resumed_primary(site, a, b, client, None);
    }
}

#[test]
fn a_loser_stopped_at_the_gate_sends_at_most_what_it_had_decided() {
    for place in ["before-decision", "before-write", "after-write"] {
        eprintln!("stopped {place}");
        let test = "a_loser_stopped_at_the_gate_sends_at_most_what_it_had_decided";
        let Some((site, a, b, client)) = pair_with(test, &[], &[(Host::A, place)]) else { return };
        check_resumed_primary(site, a, b, client, Some(place));
    }
}

#[test]
fn a_primary_whose_guest_is_stuck_is_lost_although_it_is_heard() {
    let test = "a_primary_whose_guest_is_stuck_is_lost_although_it_is_heard";
    let Some((site, a, mut b, client)) = pair_with(test, &[], &[(Host::A, "guest")]) else { return };
    trigger(&site, "guest");
    b.wait_for("no progress", 20);
    b.wait_for(LIVES, 20);
    check_survivor(client, b);
    // It could not have gone on with the VM, so it has not asked the store.
    let (status, output) = a.finish(30);
    assert_eq!(status.code(), Some(3), "{output}");
    assert!(!output.contains("asking the store"), "{output}");
    assert!(output.contains("stuck") && !output.contains(LIVES), "{output}");
}

#[test]
fn a_backup_whose_guest_is_stuck_is_lost_although_it_is_heard() {
    let test = "a_backup_whose_guest_is_stuck_is_lost_although_it_is_heard";
    let Some((site, mut a, b, client)) = pair_with(test, &[], &[(Host::B, "guest")]) else { return };
    trigger(&site, "guest");
    a.wait_for("no progress", 20);
    a.wait_for(LIVES, 20);
    check_survivor(client, a);
    let (status, output) = b.finish(30);
    assert_eq!(status.code(), Some(3), "{output}");
    assert!(output.contains("stuck") && !output.contains(LIVES), "{output}");
}

/// Flips a bit of a backup's RAM. The backup ends with the message `says` and the exit code `code`, and
/// reports `told` to its primary, which goes on alone.
fn check_flipped_bit(test: &str, failpoint: &str, told: &str, says: &str, code: i32) {
    let Some((site, mut a, b, client)) = pair_with(test, &[], &[(Host::B, failpoint)]) else { return };
    trigger(&site, failpoint);
    // The scrub goes through these 32 MiB once in 12 s.
    a.wait_for(LIVES, 60);
    assert!(a.seen().contains(&format!("it has failed: {told}")), "{}", a.seen());
    let (status, output) = b.finish(20);
    assert_eq!(status.code(), Some(code), "{output}");
    assert!(output.contains(says) && !output.contains(LIVES), "{output}");
    client.wait_for(50, 20);
    let seen = client.finish().unwrap_or_else(|e| panic!("{e}"));
    assert!(seen.gap < Duration::from_secs(2), "{seen:?}");
    a.stop();
    assert!(a.finish(30).0.success());
}

#[test]
fn a_backup_that_diverges_says_where_and_never_lives() {
    let test = "a_backup_that_diverges_says_where_and_never_lives";
    check_flipped_bit(test, "flip", "divergence at position", "the state's RAM differ", 5);
}

#[test]
fn a_page_that_is_changed_behind_the_guests_back_is_found_although_nobody_writes_it() {
    let test = "a_page_that_is_changed_behind_the_guests_back_is_found_although_nobody_writes_it";
    let found = "memory: page 4096 of the guest's RAM was changed";
    check_flipped_bit(test, "flip-unseen", found, found, 3);
}

/// The status of a replica, asked until it answers.
fn status_at_last(site: &Site, host: Host) -> serde_json::Value {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let mut command = std::process::Command::new(support::vm::VMFT);
        let output =
            command.args(["status", "--json", "--control"]).arg(site.control(host)).output().expect("vmft");
        if let Ok(report) = serde_json::from_slice(&output.stdout) {
            return report;
        }
        assert!(Instant::now() < deadline, "{}", String::from_utf8_lossy(&output.stderr));
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_listener_that_has_failed_is_told_and_started_again() {
    let test = "a_listener_that_has_failed_is_told_and_started_again";
    let Some((site, a, b, client)) = pair_with(test, &[], &[(Host::A, "panic-control")]) else { return };
    assert!(status_at_last(&site, Host::A)["failed_threads"].as_object().expect("a map").is_empty());
    // The thread fails at the next connection.
    let file = site.dir.join("panic-control");
    std::fs::write(&file, "").expect("failpoint");
    while file.exists() {
        status_at_last(&site, Host::A);
    }
    let report = status_at_last(&site, Host::A);
    assert_eq!(report["failed_threads"]["control"], 1, "{report}");
    client.wait_for(20, 20);
    drop(b);
    check_survivor(client, a);
}

#[test]
fn a_pair_whose_pump_fails_goes_on_at_the_other_side() {
    let test = "a_pair_whose_pump_fails_goes_on_at_the_other_side";
    let Some((site, a, mut b, client)) = pair_with(test, &[], &[(Host::A, "panic-pump")]) else { return };
    trigger(&site, "panic-pump");
    b.wait_for("it has failed: the pump has failed", 20);
    b.wait_for(LIVES, 20);
    check_survivor(client, b);
    let (status, output) = a.finish(30);
    assert_eq!(status.code(), Some(3), "{output}");
}
