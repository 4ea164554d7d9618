//! The fault table of the pair, each row with real processes: which side lives, which is fenced, and what the
//! client sees.

mod support;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal::{SIGCONT, SIGSTOP};
use support::pair::{Host, Site, inside};
use support::row::{
    BARE, LIVES, LONGER_THAN_TIMEOUT, check_fenced, check_survivor, one_lives, pair, pair_with,
};
use support::vm::{Vm, vmft_in};
use support::{can_network, has_guest};
use test_and_set::blocking::BlockingStore;

#[test]
fn a_primary_that_was_stopped_is_fenced_when_it_goes_on() {
    let Some((_site, a, mut b, client)) = pair("a_primary_that_was_stopped_is_fenced_when_it_goes_on") else {
        return;
    };
    a.signal(SIGSTOP);
    b.wait_for(LIVES, 20);
    client.wait_for(50, 20);
    a.signal(SIGCONT);
    check_fenced(a);
    check_survivor(client, b);
}

#[test]
fn a_backup_that_was_stopped_is_fenced_when_it_goes_on() {
    let Some((_site, mut a, b, client)) = pair("a_backup_that_was_stopped_is_fenced_when_it_goes_on") else {
        return;
    };
    b.signal(SIGSTOP);
    a.wait_for(LIVES, 20);
    client.wait_for(50, 20);
    b.signal(SIGCONT);
    check_fenced(b);
    check_survivor(client, a);
}

#[test]
fn a_primary_that_is_cut_off_from_everything_is_silent_until_it_is_fenced() {
    const TEST: &str = "a_primary_that_is_cut_off_from_everything_is_silent_until_it_is_fenced";
    let Some((site, a, mut b, client)) = pair(TEST) else { return };
    let pull = |up| ["br0", "ctl", "log"].map(|bridge| site.set_port(bridge, Host::A, up));
    pull(false);
    b.wait_for(LIVES, 20);
    client.wait_for(50, 20);
    assert!(!a.has_ended(), "a primary that cannot reach the store cannot know that it has lost");
    pull(true);
    check_fenced(a);
    check_survivor(client, b);
}

#[test]
fn a_backup_that_is_cut_off_from_everything_is_fenced() {
    let Some((site, mut a, b, client)) = pair("a_backup_that_is_cut_off_from_everything_is_fenced") else {
        return;
    };
    let pull = |up| ["br0", "ctl", "log"].map(|bridge| site.set_port(bridge, Host::B, up));
    pull(false);
    a.wait_for(LIVES, 20);
    pull(true);
    check_fenced(b);
    check_survivor(client, a);
}

/// A fault while the store has no quorum: no side lives and no output leaves until the quorum is back, and
/// then exactly one side lives. `fault` returns the sides that still run; `heal` undoes it.
fn without_a_quorum(
    test: &str,
    fault: impl FnOnce(&Site, Vm, Vm) -> [Option<Vm>; 2],
    heal: impl FnOnce(&Site),
) {
    let Some((mut site, a, b, client)) = pair(test) else { return };
    site.stop_store(1);
    site.stop_store(2);
    client.wait_for(50, 20);
    let mut sides = fault(&site, a, b);
    for side in sides.iter_mut().flatten() {
        side.wait_for("asking the store", 20);
    }
    let replies = client.replies();
    std::thread::sleep(LONGER_THAN_TIMEOUT);
    assert_eq!(client.replies(), replies, "a side answers the client without a verdict");
    assert!(sides.iter_mut().flatten().all(|side| !side.has_printed(LIVES) && !side.has_ended()));
    site.start_store(1);
    match sides {
        [Some(a), Some(b)] => {
            std::thread::sleep(LONGER_THAN_TIMEOUT);
            heal(&site);
            let (host, survivor) = one_lives(a, b);
            eprintln!("{host:?} lives");
            check_survivor(client, survivor);
        }
        [survivor, other] => {
            let mut survivor = survivor.or(other).expect("a side");
            survivor.wait_for(LIVES, 30);
            check_survivor(client, survivor);
        }
    }
}

#[test]
fn without_a_quorum_a_killed_primary_is_not_replaced_until_it_is_back() {
    let test = "without_a_quorum_a_killed_primary_is_not_replaced_until_it_is_back";
    without_a_quorum(test, |_, _, b| [None, Some(b)], |_| ());
}

#[test]
fn without_a_quorum_a_primary_whose_backup_is_killed_is_silent_until_it_is_back() {
    let test = "without_a_quorum_a_primary_whose_backup_is_killed_is_silent_until_it_is_back";
    without_a_quorum(test, |_, a, _| [Some(a), None], |_| ());
}

#[test]
fn without_a_quorum_both_sides_of_a_cut_link_are_silent_until_it_is_back() {
    let cut = |site: &Site, a, b| {
        site.set_port("log", Host::A, false);
        [Some(a), Some(b)]
    };
    without_a_quorum("without_a_quorum_both_sides_of_a_cut_link_are_silent_until_it_is_back", cut, |_| ());
}

#[test]
fn without_a_quorum_the_sides_of_an_isolated_primary_are_silent_until_it_is_back() {
    let pull = |site: &Site, up| {
        ["br0", "ctl", "log"].into_iter().for_each(|bridge| site.set_port(bridge, Host::A, up))
    };
    let cut = |site: &Site, a, b| {
        pull(site, false);
        [Some(a), Some(b)]
    };
    let test = "without_a_quorum_the_sides_of_an_isolated_primary_are_silent_until_it_is_back";
    without_a_quorum(test, cut, |site| pull(site, true));
}

#[test]
fn a_verdict_whose_reply_is_lost_is_the_same_when_it_is_asked_for_again() {
    const TEST: &str = "a_verdict_whose_reply_is_lost_is_the_same_when_it_is_asked_for_again";
    let Some((site, a, mut b, client)) = pair(TEST) else { return };
    // The store hears B, and B does not hear the store.
    site.set_store_mute(Host::B, true);
    drop(a);
    b.wait_for("the store does not answer", 20);
    let url = site.store_url("a");
    let store =
        inside(&site.ns("a"), move || BlockingStore::connect(&url)).join().expect("thread").expect("store");
    let holder = || {
        store
            .get(&"vm".parse().expect("name"), LONGER_THAN_TIMEOUT)
            .expect("record")
            .and_then(|record| record.holder())
    };
    let told = holder().expect("B has won");
    std::thread::sleep(LONGER_THAN_TIMEOUT);
    assert!(!b.has_printed(LIVES) && !b.has_ended(), "{}", b.seen());
    site.set_store_mute(Host::B, false);
    b.wait_for(LIVES, 20);
    assert_eq!(holder(), Some(told));
    check_survivor(client, b);
}

#[test]
fn acknowledgements_that_come_after_the_suspicion_change_nothing() {
    let test = "acknowledgements_that_come_after_the_suspicion_change_nothing";
    for mute in [Host::B, Host::A] {
        let Some((site, a, b, client)) = pair(test) else { return };
        site.set_mute(mute, true);
        client.wait_for(100, 30);
        // Acknowledgements that were delayed arrive now.
        site.set_mute(mute, false);
        let (host, survivor) = one_lives(a, b);
        eprintln!("{mute:?} was not heard, {host:?} lives");
        check_survivor(client, survivor);
    }
}

#[test]
fn a_log_that_stalls_under_load_slows_the_guest_and_goes_on() {
    let test = "a_log_that_stalls_under_load_slows_the_guest_and_goes_on";
    let options = ["--timeout-ms", "5000", "--buffer-mib", "1"];
    let Some((site, mut a, mut b, client)) = pair_with(test, &options, &[]) else { return };
    // Frames that the guest discards fill the log.
    let (stop, load) = flood(&site);
    for stall in 0..3 {
        client.wait_for(50, 60);
        match stall {
            0 => b.signal(SIGSTOP),
            _ => site.set_port("log", Host::A, false),
        }
        std::thread::sleep(Duration::from_secs(2));
        let held = status(&site);
        match stall {
            0 => b.signal(SIGCONT),
            _ => site.set_port("log", Host::A, true),
        }
        let lag = held["lag_bytes"].as_u64().expect("bytes");
        eprintln!("stall {stall}: lag {lag} bytes, {} outputs held", held["outputs_held"]);
        assert!((256 << 10..2 << 20).contains(&lag), "{lag} bytes of log wait, the buffer has 1 MiB");
    }
    client.wait_for(50, 60);
    stop.store(true, Ordering::Relaxed);
    load.join().expect("load");
    assert_eq!(status(&site)["protected"], true);
    assert!(
        !a.has_printed("the peer is lost") && !b.has_printed("the peer is lost"),
        "{}{}",
        a.seen(),
        b.seen()
    );
    drop(a);
    b.wait_for(LIVES, 30);
    check_survivor(client, b);
}

/// Sends datagrams from the client to the guest until it is stopped.
fn flood(site: &Site) -> (Arc<AtomicBool>, JoinHandle<()>) {
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let load = inside(&site.ns("client"), move || {
        let socket = UdpSocket::bind("10.77.0.1:0").expect("bind");
        while !stopped.load(Ordering::Relaxed) {
            // The guest refuses them; the next call may report that.
            socket.send_to(&[7; 1400], (support::net::GUEST, 9)).ok();
            std::thread::sleep(Duration::from_micros(200));
        }
    });
    (stop, load)
}

/// The output of `vmft status --json` for the primary.
fn status(site: &Site) -> serde_json::Value {
    let mut command = Command::new(support::vm::VMFT);
    let status = command.args(["status", "--json", "--control"]).arg(site.control(Host::A)).output();
    let output = status.expect("vmft status");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[test]
fn a_primary_that_is_started_again_at_once_is_a_stranger() {
    let Some((site, a, mut b, client)) = pair("a_primary_that_is_started_again_at_once_is_a_stranger") else {
        return;
    };
    drop(a);
    let again = Vm::start(&mut site.replica(Host::A, &BARE));
    let (status, output) = again.finish(20);
    assert_eq!(status.code(), Some(7), "{output}");
    assert!(output.contains("another generation"), "{output}");
    b.wait_for(LIVES, 20);
    check_survivor(client, b);
}

#[test]
fn sides_that_differ_are_refused_with_the_field_named() {
    const TEST: &str = "sides_that_differ_are_refused_with_the_field_named";
    if !has_guest(TEST, "bare") || !can_network(TEST) {
        return;
    }
    let site = Site::new();
    let mut b = Vm::start(&mut site.replica(Host::B, &["--guest", "bare", "--memory-mib", "64"]));
    b.wait_for("waiting for a primary", 20);
    let mut a = Vm::start(&mut site.replica(Host::A, &BARE));
    for side in [&mut a, &mut b] {
        side.wait_for("memory-bytes", 20);
    }
    assert!(!a.seen().contains("READY") && !a.seen().contains("the pair is open"), "{}", a.seen());
    a.terminate();
    assert!(a.finish(20).0.success());
}

/// How often a backup has refused a connection, by the reason that is logged. A line counts for those that were
/// left out since the line before.
fn reasons(backup: &mut Vm) -> BTreeMap<String, usize> {
    let mut reasons = BTreeMap::new();
    backup.has_printed("");
    for (_, why) in backup.seen().lines().filter_map(|line| line.split_once("refused: ")) {
        let left_out = why.split_once("left_out=").map_or(0, |(_, n)| n.trim().parse().expect("a number"));
        let why = why.split(" from=").next().unwrap_or(why);
        *reasons.entry(why.to_owned()).or_default() += 1 + left_out;
    }
    reasons
}

#[test]
fn connections_that_are_not_from_the_peer_do_not_disturb_a_pair() {
    let Some((site, a, mut b, client)) = pair("connections_that_are_not_from_the_peer_do_not_disturb_a_pair")
    else {
        return;
    };
    let attempts = support::cases(200);
    let calls = inside(&site.ns("a"), move || {
        let (mut silent, mut called) = (Vec::new(), 0);
        for n in 0..attempts {
            let Ok(mut tcp) = TcpStream::connect("10.78.0.2:7500") else { continue };
            called += 1;
            tcp.set_read_timeout(Some(Duration::from_secs(2))).expect("timeout");
            match n % 4 {
                // Garbage, in one piece or two.
                0 => drop(tcp.write_all(&[n as u8; 700])),
                // The beginning of TLS, and then nothing.
                1 => drop(tcp.write_all(&[22, 3, 1, 2, 0, 1, 0])),
                // Half open, for a while.
                2 if silent.len() < 8 => silent.push(tcp),
                _ => drop(
                    tcp.shutdown(std::net::Shutdown::Write).and_then(|()| tcp.read(&mut [0; 64]).map(drop)),
                ),
            }
        }
        called
    });
    let called = calls.join().expect("calls");
    // Each is refused, and counted in the log.
    let deadline = Instant::now() + Duration::from_secs(60);
    while reasons(&mut b).values().sum::<usize>() < called && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(100));
    }
    let reasons = reasons(&mut b);
    eprintln!("{called} connections: {reasons:#?}");
    assert_eq!(reasons.values().sum::<usize>(), called);
    // A primary whose certificate is not pinned, and one of another VM.
    let keys = site.dir.join("other-keys");
    test_and_set::keys::make_set(&keys, &[1], &["x".into(), "y".into()], &[]).expect("keys");
    for keys in [keys.join("x"), site.keys("a")] {
        let mut command = vmft_in(&site.ns("a"));
        command.args([
            "primary",
            "--name",
            "other",
            "--peer",
            "10.78.0.2:7500",
            "--store",
            &site.store_url("a"),
        ]);
        let mut stranger = Vm::start(command.arg("--keys").arg(keys).args(BARE));
        stranger.wait_for("waiting for the backup", 20);
        b.wait_for_again("refused", 20);
        std::thread::sleep(Duration::from_millis(200));
        stranger.terminate();
        let (_, output) = stranger.finish(20);
        assert!(!output.contains("the pair is open"), "{output}");
    }
    assert!(!a.has_ended() && !b.has_ended());
    client.wait_for(50, 20);
    drop(b);
    check_survivor(client, a);
}

#[test]
fn an_older_copy_of_a_disk_is_refused() {
    const TEST: &str = "an_older_copy_of_a_disk_is_refused";
    if !has_guest(TEST, "bare") || !can_network(TEST) {
        return;
    }
    let site = Site::new();
    let disks = ["a", "b"].map(|host| site.dir.join(format!("{host}.img")).display().to_string());
    for disk in &disks {
        std::fs::write(disk, vec![0; 1 << 20]).unwrap();
    }
    let options = |disk| [&BARE[..], &["--disk", disk]].concat();
    let mut b = Vm::start(&mut site.replica(Host::B, &options(&disks[1])));
    b.wait_for("waiting for a primary", 20);
    let mut a = Vm::start(&mut site.replica(Host::A, &options(&disks[0])));
    a.wait_for("READY", 20);
    drop(a);
    b.wait_for(LIVES, 20);
    b.stop();
    assert!(b.finish(20).0.success());
    let again = |more: &[&str]| {
        let mut command = site.replica(Host::A, &options(&disks[0]));
        Vm::start(command.args(more))
    };
    let (status, output) = again(&[]).finish(20);
    assert_eq!(status.code(), Some(2), "{output}");
    assert!(output.contains("the newest copy of disk-0"), "{output}");
    let mut discarding = again(&["--discard-newer"]);
    discarding.wait_for("waiting for the backup", 20);
    discarding.terminate();
    assert!(discarding.finish(20).0.success());
}
