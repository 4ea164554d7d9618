//! What the rows of the fault table share: a pair with a client that counts, and the checks at the end.

use std::time::{Duration, Instant};

use super::counter::Counter;
use super::pair::{Host, Site};
use super::vm::Vm;
use super::{can_network, has_guest, skip};

/// Options of the bare guest.
pub const BARE: [&str; 4] = ["--guest", "bare", "--memory-mib", "32"];
/// What a side logs that goes on alone.
pub const LIVES: &str = "this side lives";
/// A time longer than the timeout of a pair with default options.
pub const LONGER_THAN_TIMEOUT: Duration = Duration::from_millis(2500);

/// Starts a pair with a client that counts. `None`: the test cannot run here, and is skipped.
pub fn pair(test: &str) -> Option<(Site, Vm, Vm, Counter)> {
    pair_with(test, &[], &[])
}

/// [`pair`] with more options for both sides, and with failpoints for some sides.
pub fn pair_with(test: &str, more: &[&str], failpoints: &[(Host, &str)]) -> Option<(Site, Vm, Vm, Counter)> {
    if !has_guest(test, "bare") || !can_network(test) {
        return None;
    }
    if !failpoints.is_empty() && !cfg!(debug_assertions) {
        skip(test, "needs failpoints, which a release build does not have");
        return None;
    }
    let site = Site::new();
    let side = |host| {
        let mut command = site.replica(host, &[&BARE, more].concat());
        if let Some((_, name)) = failpoints.iter().find(|(at, _)| *at == host) {
            command.env("VMFT_FAILPOINT", format!("{name}:{}", site.dir.join(name).display()));
        }
        command
    };
    let mut b = Vm::start(&mut side(Host::B));
    b.wait_for("waiting for a primary", 30);
    let mut a = Vm::start(&mut side(Host::A));
    a.wait_for("READY", 60);
    let client = Counter::bare(&site.ns("client"));
    client.wait_for(20, 20);
    Some((site, a, b, client))
}

/// Triggers a failpoint, and waits until it is reached.
pub fn trigger(site: &Site, failpoint: &str) {
    let file = site.dir.join(failpoint);
    std::fs::write(&file, "").expect("failpoint");
    let deadline = Instant::now() + Duration::from_secs(20);
    while file.exists() {
        assert!(Instant::now() < deadline, "{failpoint} was not reached");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Checks that the client saw one history to the end, and that the survivor ends in order and without
/// divergence.
pub fn check_survivor(client: Counter, survivor: Vm) {
    client.wait_for(50, 30);
    let seen = client.finish().unwrap_or_else(|e| panic!("{e}\n{}", survivor.seen()));
    eprintln!("{} replies, longest gap {:?}", seen.replies, seen.gap);
    survivor.stop();
    let (status, output) = survivor.finish(30);
    assert!(status.success() && !output.contains("divergence"), "{output}");
}

/// Checks that a side reports that it was fenced, and has never lived.
pub fn check_fenced(loser: Vm) {
    let (status, output) = loser.finish(30);
    assert_eq!(status.code(), Some(6), "{output}");
    assert!(output.contains("fenced") && !output.contains(LIVES), "{output}");
}

/// Waits until exactly one of the two lives and the other is fenced. Returns the survivor.
pub fn one_lives(mut a: Vm, mut b: Vm) -> (Host, Vm) {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let lives = [&mut a, &mut b].map(|side| side.has_printed(LIVES));
        match lives {
            [true, true] => panic!("both live:\n{}\n{}", a.seen(), b.seen()),
            [true, false] if b.has_ended() => return (Host::A, after(b, a)),
            [false, true] if a.has_ended() => return (Host::B, after(a, b)),
            _ => {}
        }
        assert!(Instant::now() < deadline, "nobody lives, or both:\n{}\n{}", a.seen(), b.seen());
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn after(loser: Vm, winner: Vm) -> Vm {
    check_fenced(loser);
    winner
}
