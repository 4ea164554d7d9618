//! Rows of the fault table in which a replica fails at a chosen place: stopped around the gate's decision, wedged while it is
//! heard, diverging.

mod support;

use std::collections::HashSet;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal::{SIGCONT, SIGSTOP};
use support::capture::{Capture, Frame};
use support::counter::Counter;
use support::pair::{Host, Site};
use support::row::{LIVES, end, fenced, pair, pair_with, set_off};
use support::vm::Vm;

/// How long a turn of a loser's loop takes at most on a busy machine.
const TURN: Duration = Duration::from_millis(500);

/// A primary is stopped, and goes on when the other side lives: what it then sends the survivor has sent, too, and nothing
/// more leaves it.
fn resumed(site: Site, a: Vm, mut b: Vm, client: Counter, place: Option<&str>) {
    let capture = Capture::start(&site);
    client.wait_for(20, 20);
    match place {
        Some(place) => set_off(&site, place),
        None => a.signal(SIGSTOP),
    }
    b.wait_for(LIVES, 20);
    client.wait_for(20, 20);
    let resumed = Instant::now();
    a.signal(SIGCONT);
    fenced(a);
    end(client, b);
    let frames = capture.finish();
    let of_b: HashSet<&[u8]> = frames.iter().filter(|f| f.host == Host::B).map(|f| &*f.bytes).collect();
    let late: Vec<&Frame> = frames.iter().filter(|f| f.host == Host::A && f.at >= resumed).collect();
    let late_max = if place == Some("before-write") { 1 } else { 0 };
    eprintln!("{} frames passed, {} of the loser after it went on", frames.len(), late.len());
    for frame in &late {
        assert!(frame.at < resumed + TURN, "the loser still sends {:?} after it went on", frame.at - resumed);
        assert!(of_b.contains(&*frame.bytes), "only the loser has sent {:02x?}", frame.bytes);
    }
    assert!(late.len() <= late_max, "the loser sent more than what it had decided on");
    assert!(frames.iter().any(|f| f.host == Host::A) && !of_b.is_empty(), "nothing was captured");
}

#[test]
fn a_resumed_loser_sends_nothing_of_its_own() {
    for _ in 0..support::cases(2) {
        let Some((site, a, b, client)) = pair("a_resumed_loser_sends_nothing_of_its_own") else { return };
        resumed(site, a, b, client, None);
    }
}

#[test]
fn a_loser_stopped_at_the_gate_sends_at_most_what_it_had_decided() {
    for place in ["before-decision", "before-write", "after-write"] {
        eprintln!("stopped {place}");
        let test = "a_loser_stopped_at_the_gate_sends_at_most_what_it_had_decided";
        let Some((site, a, b, client)) = pair_with(test, &[], &[(Host::A, place)]) else { return };
        resumed(site, a, b, client, Some(place));
    }
}

#[test]
fn a_primary_whose_guest_is_stuck_is_lost_although_it_is_heard() {
    let test = "a_primary_whose_guest_is_stuck_is_lost_although_it_is_heard";
    let Some((site, a, mut b, client)) = pair_with(test, &[], &[(Host::A, "guest")]) else { return };
    set_off(&site, "guest");
    b.wait_for("no progress", 20);
    b.wait_for(LIVES, 20);
    end(client, b);
    // It could not live, so it has not even asked.
    let (status, output) = a.finish(30);
    assert_eq!(status.code(), Some(3), "{output}");
    assert!(!output.contains("asking the store"), "{output}");
    assert!(output.contains("stuck") && !output.contains(LIVES), "{output}");
}

#[test]
fn a_backup_whose_guest_is_stuck_is_lost_although_it_is_heard() {
    let test = "a_backup_whose_guest_is_stuck_is_lost_although_it_is_heard";
    let Some((site, mut a, b, client)) = pair_with(test, &[], &[(Host::B, "guest")]) else { return };
    set_off(&site, "guest");
    a.wait_for("no progress", 20);
    a.wait_for(LIVES, 20);
    end(client, a);
    let (status, output) = b.finish(30);
    assert_eq!(status.code(), Some(3), "{output}");
    assert!(output.contains("stuck") && !output.contains(LIVES), "{output}");
}

/// A bit of a backup's RAM flips: it ends with these words and this exit code, and the primary, which is told, goes on alone.
fn flipped(test: &str, failpoint: &str, told: &str, says: &str, code: i32) {
    let Some((site, mut a, b, client)) = pair_with(test, &[], &[(Host::B, failpoint)]) else { return };
    set_off(&site, failpoint);
    // The scrub is once around these 32 MiB in 12 s.
    a.wait_for(LIVES, 60);
    assert!(a.seen().contains(&format!("it has failed: {told}")), "{}", a.seen());
    let (status, output) = b.finish(20);
    assert_eq!(status.code(), Some(code), "{output}");
    assert!(output.contains(says) && !output.contains(LIVES), "{output}");
    client.wait_for(50, 20);
    let seen = client.finish().unwrap_or_else(|e| panic!("{e}"));
    assert!(seen.gap < Duration::from_secs(2), "{seen:?}");
    a.terminate();
    assert!(a.finish(30).0.success());
}

#[test]
fn a_backup_that_diverges_says_where_and_never_lives() {
    let test = "a_backup_that_diverges_says_where_and_never_lives";
    flipped(test, "flip", "divergence at position", "the state's RAM differ", 5);
}

#[test]
fn a_page_that_is_changed_behind_the_guests_back_is_found_although_nobody_writes_it() {
    let test = "a_page_that_is_changed_behind_the_guests_back_is_found_although_nobody_writes_it";
    let found = "memory: page 4096 of the guest's RAM was changed";
    flipped(test, "flip-unseen", found, found, 3);
}
