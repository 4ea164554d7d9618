//! Strangers at the ports of a pair: processes that say hello although the pair has met, connections that say
//! nothing, and two primaries at once.

mod support;

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use logging_channel::message::Message;
use logging_channel::stream::MessageReader;
use logging_channel::versions::ChannelVersions;
use nix::sys::signal::Signal::{SIGCONT, SIGSTOP};
use support::pair::{Host, Site, inside};
use support::row::{BARE, LIVES, check_fenced, check_survivor, pair, pair_with};
use support::stranger::{BACKUP, call, claim, say_hello};
use support::vm::{VMFT, Vm, vmft_in};
use support::{can_network, cases, has_guest};
use test_and_set::keys::{Keys, key_id};

/// Starts to claim, from host A, 20 times a second until told to stop.
fn claim_often(site: &Site, party: &str) -> impl FnOnce() -> u64 + use<> {
    let (keys, stop) = (site.keys(party), Arc::new(AtomicBool::new(false)));
    let stopped = stop.clone();
    let claims = inside(&site.ns("a"), move || {
        let mut claims = 0;
        while !stopped.load(Ordering::Relaxed) {
            claims += claim(&keys, 0x5eed_0000 + claims as u128).is_ok() as u64;
            sleep(Duration::from_millis(50));
        }
        claims
    });
    move || {
        stop.store(true, Ordering::Relaxed);
        claims.join().expect("claims")
    }
}

#[test]
fn a_strangers_hello_does_not_disturb_a_pair() {
    let Some((site, mut a, mut b, client)) = pair("a_strangers_hello_does_not_disturb_a_pair") else {
        return;
    };
    // Another host that the backup accepts, and a second process on the primary's host.
    for party in ["stranger", "a"] {
        let stop = claim_often(&site, party);
        client.wait_for(100, 20);
        sleep(Duration::from_secs(2));
        let claims = stop();
        assert!(claims > 5, "{claims}");
        for side in [&mut a, &mut b] {
            assert!(!side.has_ended() && !side.has_printed("the peer is lost"), "{}", side.seen());
        }
        assert!(b.has_printed("called, but this backup has a primary already"), "{}", b.seen());
    }
    drop(a);
    b.wait_for(LIVES, 20);
    check_survivor(client, b);
}

#[test]
fn the_peers_own_hello_is_believed_when_its_connection_is_silent() {
    const TEST: &str = "the_peers_own_hello_is_believed_when_its_connection_is_silent";
    let Some((site, a, mut b, client)) = pair_with(TEST, &["--timeout-ms", "8000"], &[]) else { return };
    a.signal(SIGSTOP);
    let stop = claim_often(&site, "stranger");
    sleep(Duration::from_secs(5));
    assert!(!b.has_printed("the peer is lost"), "{}", b.seen());
    stop();
    let stop = claim_often(&site, "a");
    b.wait_for("it was restarted and has lost the guest's state", 20);
    stop();
    b.wait_for(LIVES, 20);
    a.signal(SIGCONT);
    check_fenced(a);
    check_survivor(client, b);
}

/// `vmft primary` on A or `vmft backup` on B for a VM without a network, with a party's keys.
fn replica(site: &Site, host: Host, vm: &str, party: &str) -> Command {
    let mut command = vmft_in(&site.ns(host.name()));
    match host {
        Host::A => command.args(["primary", "--peer", BACKUP]),
        Host::B => command.args(["backup", "--listen", BACKUP]),
    };
    command.args(["--name", vm, "--store", &site.store_url(party), "--keys"]).arg(site.keys(party));
    command.args(BARE);
    command
}

/// A backup with the keys of this party, which waits for a primary.
fn waiting_backup(site: &Site, vm: &str, party: &str) -> Vm {
    let mut backup = Vm::start(&mut replica(site, Host::B, vm, party));
    backup.wait_for("waiting for a primary", 30);
    backup
}

/// A round: two primaries are started at once for a backup that waits.
fn two_primaries_at_once(site: &Site, round: u64) -> Result<(), String> {
    const OPEN: &str = "the pair is open";
    let vm = format!("vm-{round}");
    let mut backup = waiting_backup(site, &vm, "b");
    // On one host, or on two.
    let second = ["a", "stranger"][round as usize % 2];
    let mut primaries = ["a", second].map(|party| Vm::start(&mut replica(site, Host::A, &vm, party)));
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut opened_at = None;
    // The other one tries again each half second.
    while opened_at.is_none_or(|at: Instant| at.elapsed() < Duration::from_millis(1200)) {
        let open = primaries.each_mut().map(|p| p.has_printed(OPEN) && !p.has_ended());
        if open.iter().filter(|open| **open).count() == 1 && backup.has_printed(OPEN) {
            opened_at.get_or_insert_with(Instant::now);
        }
        if open == [true; 2] || Instant::now() > deadline {
            break;
        }
        sleep(Duration::from_millis(10));
    }
    let running = primaries.each_mut().map(|p| p.has_printed(OPEN) && !p.has_ended());
    let disturbed =
        [&mut primaries[0], &mut backup].iter_mut().any(|side| side.has_printed("the peer is lost"))
            || primaries[1].has_printed("the peer is lost");
    let one = running.iter().filter(|runs| **runs).count() == 1;
    if one && !disturbed && opened_at.is_some() && !backup.has_ended() {
        return Ok(());
    }
    let [first, second] = &primaries;
    Err(format!("round {round}: {running:?}\n{}\n\n{}\n\n{}", first.seen(), second.seen(), backup.seen()))
}

#[test]
fn of_two_primaries_that_are_started_at_once_exactly_one_runs() {
    const TEST: &str = "of_two_primaries_that_are_started_at_once_exactly_one_runs";
    if !has_guest(TEST, "bare") || !can_network(TEST) {
        return;
    }
    let site = Site::new();
    let rounds = cases(20);
    let failed: Vec<_> = (0..rounds).filter_map(|round| two_primaries_at_once(&site, round).err()).collect();
    eprintln!("{rounds} rounds, {} failed", failed.len());
    assert!(failed.is_empty(), "{} of {rounds} rounds:\n{}", failed.len(), failed.join("\n\n"));
}

#[test]
fn a_primary_that_is_refused_hears_why() {
    const TEST: &str = "a_primary_that_is_refused_hears_why";
    if !has_guest(TEST, "bare") || !can_network(TEST) {
        return;
    }
    let site = Site::new();
    let _backup = waiting_backup(&site, "vm", "b");
    // By a backup that waits: a primary of a later release.
    let (keys, versions) = (site.keys("a"), ChannelVersions { newest: 99, oldest: 98 });
    let said = inside(&site.ns("a"), move || say_hello(&keys, 1, versions)).join().expect("a call");
    let mut reader = MessageReader::new();
    reader.push(&said.expect("an answer"));
    let answer = reader.next_message().expect("a message");
    assert!(
        matches!(&answer, Some(Message::Failed { reason }) if reason.contains("speaks versions 98 to 99")),
        "{answer:?}"
    );
    // By a backup that has a primary: another one.
    let mut primary = Vm::start(&mut replica(&site, Host::A, "vm", "a"));
    primary.wait_for("the pair is open", 20);
    let mut other = Vm::start(&mut replica(&site, Host::A, "other", "stranger"));
    other.wait_for("the other side reports: ", 20);
    other.wait_for("this backup has a primary already", 5);
}

#[test]
fn hosts_with_the_same_keys_are_refused_on_both_sides() {
    const TEST: &str = "hosts_with_the_same_keys_are_refused_on_both_sides";
    if !has_guest(TEST, "bare") || !can_network(TEST) {
        return;
    }
    let site = Site::new();
    let mut backup = waiting_backup(&site, "vm", "a");
    let mut primary = Vm::start(&mut replica(&site, Host::A, "vm", "a"));
    for side in [&mut primary, &mut backup] {
        side.wait_for("own.crt is the peer's certificate", 20);
    }
    drop(primary);
    let mut primary = Vm::start(&mut replica(&site, Host::A, "vm", "stranger"));
    primary.wait_for("the pair is open", 20);
}

/// Ends a VM's run in order, so that it is bound to hosts a and b.
fn run_once(site: &Site) {
    let control = site.control(Host::A);
    let backup = waiting_backup(site, "vm", "b");
    let mut primary = Vm::start(replica(site, Host::A, "vm", "a").arg("--control").arg(&control));
    primary.wait_for("the pair is open", 20);
    let stopped = Command::new(VMFT).args(["stop", "--yes", "--control"]).arg(&control).status();
    assert!(stopped.expect("vmft stop").success());
    for side in [primary, backup] {
        let (status, output) = side.finish(30);
        assert!(status.success() && output.contains("the VM has ended"), "{output}");
    }
}

#[test]
fn a_vm_that_has_ended_starts_only_on_its_hosts() {
    const TEST: &str = "a_vm_that_has_ended_starts_only_on_its_hosts";
    if !has_guest(TEST, "bare") || !can_network(TEST) {
        return;
    }
    const WORDS: &str = "the VM is bound to hosts a and b";
    let site = Site::new();
    run_once(&site);
    let mut backup = waiting_backup(&site, "vm", "b");
    // Another host that the backup accepts calls all the time, and does not keep the right one out.
    let stop = claim_often(&site, "stranger");
    backup.wait_for("a host called that may not run VM vm", 20);
    backup.wait_for(WORDS, 20);
    let (status, output) = Vm::start(&mut replica(&site, Host::A, "vm", "stranger")).finish(30);
    assert_eq!(status.code(), Some(7), "{output}");
    assert!(output.contains(WORDS), "{output}");
    let mut primary = Vm::start(&mut replica(&site, Host::A, "vm", "a"));
    primary.wait_for("the pair is open", 20);
    assert!(stop() > 0);
    assert!(!backup.has_ended() && !backup.has_printed("the peer is lost"), "{}", backup.seen());
    drop((primary, backup));
    // An operator lets it start elsewhere.
    let mut forget = vmft_in(&site.ns("a"));
    forget.args(["forget", "--yes", "--name", "vm", "--store", &site.store_url("admin")]);
    assert!(forget.status().expect("vmft forget").success());
    let _backup = waiting_backup(&site, "vm", "b");
    let mut primary = Vm::start(&mut replica(&site, Host::A, "vm", "stranger"));
    primary.wait_for("the pair is open", 20);
}

#[test]
fn a_backup_that_the_store_does_not_know_is_named_by_its_key() {
    const TEST: &str = "a_backup_that_the_store_does_not_know_is_named_by_its_key";
    if !has_guest(TEST, "bare") || !can_network(TEST) {
        return;
    }
    let site = Site::new();
    let key = key_id(Keys::load(&site.keys("b")).expect("keys").own().certificate());
    site.rename_host("b", "b", None);
    let mut backup = waiting_backup(&site, "vm", "b");
    let (status, output) = Vm::start(&mut replica(&site, Host::A, "vm", "a")).finish(60);
    assert_eq!(status.code(), Some(7), "{output}");
    let words = format!("the store refuses to open the pair: no host has the key {key}");
    assert!(output.contains(&words) && output.contains("hosts/ of every member"), "{output}");
    backup.wait_for(&words, 20);
}

#[test]
fn a_refused_take_is_told_and_asked_again() {
    let Some((site, a, mut b, client)) = pair("a_refused_take_is_told_and_asked_again") else { return };
    // The store comes to know host b by another name, and b connects anew.
    let reconnect = || {
        site.set_store_mute(Host::B, true);
        sleep(Duration::from_secs(4));
        site.set_store_mute(Host::B, false);
    };
    site.rename_host("b", "b", Some("other"));
    reconnect();
    drop(a);
    b.wait_for("the store refuses this host, and is asked again: this side of the VM is on host b", 30);
    let status = Command::new(VMFT).args(["status", "--control"]).arg(site.control(Host::B)).output();
    let said = String::from_utf8_lossy(&status.expect("vmft status").stdout).into_owned();
    assert!(said.contains("no verdict yet: ") && said.contains("on host b"), "{said}");
    assert!(!b.has_printed(LIVES) && !b.has_ended(), "{}", b.seen());
    site.rename_host("b", "other", Some("b"));
    reconnect();
    b.wait_for(LIVES, 30);
    check_survivor(client, b);
}

/// Whether the other side has closed a connection that says nothing.
fn is_closed(mut tcp: &TcpStream) -> bool {
    let quiet = [ErrorKind::WouldBlock, ErrorKind::TimedOut];
    !matches!(tcp.read(&mut [0]), Err(e) if quiet.contains(&e.kind()))
}

/// Keeps 20 silent connections to the backup until told to stop: at most each 20 ms a new one for one that the
/// backup has closed. Tells when the first 20 are there.
fn stay_silent(stop: &AtomicBool, ready: &std::sync::Barrier) -> usize {
    let connect = || {
        let tcp = TcpStream::connect(BACKUP).expect("connect");
        tcp.set_read_timeout(Some(Duration::from_millis(1))).expect("timeout");
        tcp
    };
    let mut silent: Vec<_> = (0..20).map(|_| connect()).collect();
    let mut opened = silent.len();
    ready.wait();
    while !stop.load(Ordering::Relaxed) {
        if let Some(place) = silent.iter().position(is_closed) {
            silent[place] = connect();
            opened += 1;
        }
        sleep(Duration::from_millis(20));
    }
    opened
}

#[test]
fn silent_connections_do_not_keep_a_primary_out() {
    const TEST: &str = "silent_connections_do_not_keep_a_primary_out";
    if !has_guest(TEST, "bare") || !can_network(TEST) {
        return;
    }
    let site = Site::new();
    let mut backup = waiting_backup(&site, "vm", "b");
    let (stop, ready) = (Arc::new(AtomicBool::new(false)), Arc::new(std::sync::Barrier::new(2)));
    let (stopped, first) = (stop.clone(), ready.clone());
    let silent = inside(&site.ns("a"), move || stay_silent(&stopped, &first));
    ready.wait();
    // In less than a silent connection's time, so that none has ended by itself.
    let keys = site.keys("a");
    let called = inside(&site.ns("a"), move || (0..3).any(|_| call(&keys).is_ok()));
    assert!(called.join().expect("call"), "no handshake beside 20 silent connections");
    let mut primary = Vm::start(&mut replica(&site, Host::A, "vm", "a"));
    primary.wait_for("the pair is open", 20);
    stop.store(true, Ordering::Relaxed);
    let opened = silent.join().expect("silent connections");
    sleep(Duration::from_millis(1500));
    backup.has_printed("");
    let lines = backup.seen().lines().filter(|line| line.contains("connection refused")).count();
    eprintln!("{opened} silent connections, {lines} lines in the log");
    assert!(opened > 20 && lines <= 30, "{lines} lines for {opened} connections");
}

#[test]
fn slow_clients_blind_neither_the_metrics_nor_the_control_socket() {
    const TEST: &str = "slow_clients_blind_neither_the_metrics_nor_the_control_socket";
    if !has_guest(TEST, "bare") || !can_network(TEST) {
        return;
    }
    let site = Site::new();
    let mut command = replica(&site, Host::B, "vm", "b");
    command.args(["--metrics", "127.0.0.1:9100", "--control"]).arg(site.control(Host::B));
    let mut backup = Vm::start(&mut command);
    backup.wait_for("waiting for a primary", 30);
    // The control socket is the last to listen.
    while UnixStream::connect(site.control(Host::B)).is_err() {
        sleep(Duration::from_millis(20));
    }
    let scrapes = inside(&site.ns("b"), || {
        let connect = || TcpStream::connect("127.0.0.1:9100").expect("connect");
        let mut slow: Vec<_> = (0..8).map(|_| connect()).collect();
        for round in 0..10 {
            for (n, tcp) in slow.iter_mut().enumerate() {
                // One that was closed comes back.
                if tcp.write_all(b"G").is_err() && round % 8 == n {
                    *tcp = connect();
                }
            }
            let (mut tcp, mut answer) = (connect(), String::new());
            tcp.set_read_timeout(Some(Duration::from_secs(10))).expect("timeout");
            let asked = tcp.write_all(b"GET /metrics HTTP/1.1\r\n\r\n");
            let answered = asked.and_then(|()| tcp.read_to_string(&mut answer));
            assert!(answer.contains("vmft_protected"), "scrape {round}: {answered:?}");
            sleep(Duration::from_millis(400));
        }
        // A byte now and then does not keep a request alive.
        let deadline = Instant::now() + Duration::from_secs(10);
        for tcp in &mut slow {
            while tcp.write_all(b"E").is_ok() {
                assert!(Instant::now() < deadline, "a slow scrape goes on for ever");
                sleep(Duration::from_millis(200));
            }
        }
    });
    scrapes.join().expect("scrapes");
    let silent: Vec<_> =
        (0..40).map(|_| UnixStream::connect(site.control(Host::B)).expect("connect")).collect();
    let status = Command::new(VMFT).args(["status", "--control"]).arg(site.control(Host::B)).output();
    let said = String::from_utf8_lossy(&status.expect("vmft status").stdout).into_owned();
    assert!(said.contains("backup (waiting)"), "{said}");
    silent[0].set_read_timeout(Some(Duration::from_secs(1))).expect("timeout");
    assert!(matches!((&silent[0]).read(&mut [0]), Ok(0)), "the oldest is closed for the newest");
}

/// Opens silent connections to the backup, 2,000 a second as far as the machine allows, until told to stop. Keeps the
/// newest. Returns how many it has opened.
fn flood(stop: &AtomicBool) -> usize {
    let (begun, mut opened) = (Instant::now(), 0);
    let mut silent = VecDeque::new();
    while !stop.load(Ordering::Relaxed) {
        let due = begun.elapsed().as_micros() as usize / 500;
        while opened < due && !stop.load(Ordering::Relaxed) {
            silent.extend(TcpStream::connect(BACKUP).ok());
            opened += 1;
            if silent.len() > 500 {
                silent.pop_front();
            }
        }
        sleep(Duration::from_millis(1));
    }
    opened
}

#[test]
fn a_flood_from_another_address_does_not_keep_a_primary_out() {
    const TEST: &str = "a_flood_from_another_address_does_not_keep_a_primary_out";
    if !has_guest(TEST, "bare") || !can_network(TEST) {
        return;
    }
    let site = Site::new();
    let _backup = waiting_backup(&site, "vm", "b");
    let handshakes = || {
        let keys = site.keys("a");
        let calls = inside(&site.ns("a"), move || {
            let mut took: Vec<_> = (0..30)
                .map(|_| {
                    let asked = Instant::now();
                    call(&keys).map(|_| asked.elapsed())
                })
                .collect::<Result<_, _>>()?;
            took.sort_unstable();
            Ok::<_, std::io::Error>(took)
        });
        calls.join().expect("calls")
    };
    let usual = handshakes().expect("handshakes without a flood");
    let stop = Arc::new(AtomicBool::new(false));
    let (stopped, begun) = (stop.clone(), Instant::now());
    let flood = inside(&site.ns("store"), move || flood(&stopped));
    sleep(Duration::from_secs(1));
    let meanwhile = handshakes();
    let mut primary = Vm::start(&mut replica(&site, Host::A, "vm", "a"));
    primary.wait_for("the pair is open", 20);
    let took = begun.elapsed();
    stop.store(true, Ordering::Relaxed);
    let opened = flood.join().expect("the flood");
    eprintln!(
        "{opened} connections in {took:?}; handshakes took {usual:?} before and {meanwhile:?} meanwhile"
    );
    assert!(meanwhile.is_ok(), "each handshake beside a flood: {meanwhile:?}");
    // Ten times the places; a busy machine does not manage 2,000 a second.
    assert!(opened > 160, "{opened} connections are no flood");
}

#[test]
fn a_peer_that_is_refused_again_and_again_is_a_few_lines() {
    const TEST: &str = "a_peer_that_is_refused_again_and_again_is_a_few_lines";
    if !has_guest(TEST, "bare") || !can_network(TEST) {
        return;
    }
    let site = Site::new();
    let mut backup = Vm::start(replica(&site, Host::B, "vm", "b").args(["--timeout-ms", "1500"]));
    backup.wait_for("waiting for a primary", 30);
    let mut primary = Vm::start(&mut replica(&site, Host::A, "vm", "a"));
    for side in [&mut primary, &mut backup] {
        side.wait_for("give both the same --timeout-ms", 20);
    }
    // Sixteen attempts, of which each side logs those at 0, 1, 3 and 7 seconds.
    sleep(Duration::from_secs(8));
    for side in [&mut primary, &mut backup] {
        side.has_printed("");
        let lines = side.seen().lines().filter(|line| line.contains("the peer is refused")).count();
        assert!((2..=8).contains(&lines), "{lines} lines:\n{}", side.seen());
        assert!(side.seen().contains("left_out="), "{}", side.seen());
    }
}
