//! The fault table of the pair, each row with real processes: who lives, who fences, and what the client sees.

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use nix::sys::signal::Signal::{SIGCONT, SIGSTOP};
use support::counter::Counter;
use support::pair::{Host, Site, inside};
use support::vm::{Vm, vmft_in};
use support::{can_network, has_guest};

const BARE: [&str; 4] = ["--guest", "bare", "--memory-mib", "32"];
const LIVES: &str = "this side lives";
/// Longer than the timeout of a pair with default options.
const LONG: Duration = Duration::from_millis(2500);

/// A pair with a client that counts, unless the test cannot run here.
fn pair(test: &str) -> Option<(Site, Vm, Vm, Counter)> {
    if !has_guest(test, "bare") || !can_network(test) {
        return None;
    }
    let site = Site::new();
    let (a, b) = site.pair(&BARE);
    let client = Counter::bare(&site.ns("client"));
    client.wait_for(20, 20);
    Some((site, a, b, client))
}

/// The client was right to the end, and so was the one that lives.
fn end(client: Counter, survivor: Vm) {
    client.wait_for(50, 30);
    let seen = client.finish().unwrap_or_else(|e| panic!("{e}\n{}", survivor.seen()));
    eprintln!("{} replies, longest gap {:?}", seen.replies, seen.gap);
    survivor.terminate();
    let (status, output) = survivor.finish(30);
    assert!(status.success() && !output.contains("divergence"), "{output}");
}

fn fenced(loser: Vm) {
    let (status, output) = loser.finish(20);
    assert_eq!(status.code(), Some(6), "{output}");
    assert!(output.contains("fenced") && !output.contains(LIVES), "{output}");
}

#[test]
fn a_primary_that_was_stopped_is_fenced_when_it_goes_on() {
    let Some((_site, a, mut b, client)) = pair("a_primary_that_was_stopped_is_fenced_when_it_goes_on") else {
        return;
    };
    a.signal(SIGSTOP);
    b.wait_for(LIVES, 20);
    client.wait_for(50, 20);
    a.signal(SIGCONT);
    fenced(a);
    end(client, b);
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
    fenced(b);
    end(client, a);
}

#[test]
fn a_primary_that_is_cut_off_from_everything_is_silent_until_it_is_fenced() {
    const TEST: &str = "a_primary_that_is_cut_off_from_everything_is_silent_until_it_is_fenced";
    let Some((site, a, mut b, client)) = pair(TEST) else { return };
    let pull = |up| ["br0", "ctl", "log"].map(|bridge| site.set_port(bridge, Host::A, up));
    pull(false);
    b.wait_for(LIVES, 20);
    client.wait_for(50, 20);
    assert!(!a.has_ended(), "it cannot know");
    pull(true);
    fenced(a);
    end(client, b);
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
    fenced(b);
    end(client, a);
}

#[test]
fn without_a_quorum_nobody_lives_until_it_is_back() {
    let Some((mut site, a, mut b, client)) = pair("without_a_quorum_nobody_lives_until_it_is_back") else {
        return;
    };
    site.stop_store(1);
    site.stop_store(2);
    client.wait_for(50, 20);
    drop(a);
    b.wait_for("asking the store", 20);
    let replies = client.replies();
    std::thread::sleep(LONG);
    assert_eq!(client.replies(), replies, "somebody answers without a verdict");
    site.start_store(1);
    b.wait_for(LIVES, 30);
    end(client, b);
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
    end(client, b);
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

#[test]
fn callers_that_are_no_peer_do_not_disturb_a_pair() {
    let Some((site, a, mut b, client)) = pair("callers_that_are_no_peer_do_not_disturb_a_pair") else {
        return;
    };
    let attempts = std::env::var("VMFT_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(200);
    let calls = inside(&site.ns("a"), move || {
        let mut silent = Vec::new();
        for n in 0..attempts {
            let Ok(mut tcp) = TcpStream::connect("10.78.0.2:7500") else { continue };
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
    });
    calls.join().expect("calls");
    b.wait_for("refused", 20);
    // One with a certificate that nobody has pinned, and one of another VM.
    let keys = site.dir.join("other-keys");
    test_and_set::keys::make_set(&keys, &[1], &["x".into(), "y".into()]).expect("keys");
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
    end(client, a);
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
    b.terminate();
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
