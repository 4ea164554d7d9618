//! Keys of the hosts of a pair that are removed or replaced while the pair runs.

mod support;

use std::fs;
use std::path::Path;
use std::time::Duration;

use support::pair::{Host, Site};
use support::row::{BARE, LIVES, check_survivor, one_lives, pair};
use support::vm::{Vm, vmft_in};
use support::{can_network, has_guest};
use test_and_set::keys::Keys;
use test_and_set::keys::manage::{self, AcceptedAs};
use test_and_set::names::{KeyId, PartyName};

fn name(name: &str) -> PartyName {
    name.parse().expect("a name")
}

#[test]
fn a_peer_whose_key_is_removed_is_lost_and_exactly_one_lives() {
    let Some((site, mut a, mut b, client)) =
        pair("a_peer_whose_key_is_removed_is_lost_and_exactly_one_lives")
    else {
        return;
    };
    // Another peer's key is no reason.
    manage::remove(&site.keys("b"), &AcceptedAs::Peer(name("stranger")), None).expect("to remove");
    std::thread::sleep(Duration::from_secs(2));
    for side in [&mut a, &mut b] {
        assert!(!side.has_printed("the peer is lost"), "{}", side.seen());
    }
    manage::remove(&site.keys("b"), &AcceptedAs::Peer(name("a")), None).expect("to remove");
    b.wait_for("the peer's certificate is no longer accepted", 5);
    let (_, survivor) = one_lives(a, b);
    check_survivor(client, survivor);
}

#[test]
fn a_peer_whose_key_is_removed_before_the_start_is_refused() {
    const TEST: &str = "a_peer_whose_key_is_removed_before_the_start_is_refused";
    if !has_guest(TEST, "bare") || !can_network(TEST) {
        return;
    }
    let site = Site::new();
    manage::remove(&site.keys("b"), &AcceptedAs::Peer(name("a")), None).expect("to remove");
    let mut b = Vm::start(&mut site.replica(Host::B, &BARE));
    b.wait_for("waiting for a primary", 30);
    let mut a = Vm::start(&mut site.replica(Host::A, &BARE));
    a.wait_for("waiting for the backup", 20);
    b.wait_for("connection refused", 20);
    // It tries again each half second.
    std::thread::sleep(Duration::from_secs(1));
    assert!(!a.has_printed("the pair is open") && !b.has_printed("the pair is open"), "{}", a.seen());
}

/// A host makes a new key and everybody else accepts it beside the old one, whose id is returned.
fn renew(site: &Site, host: &str, other: &str) -> KeyId {
    let own = site.keys(host);
    let old = Keys::load(&own).expect("keys").own().id();
    manage::renew(&own).expect("a new key");
    let new = own.join("own.new.crt");
    manage::accept(&site.keys(other), &AcceptedAs::Peer(name(host)), &new).expect("to accept");
    for member in ["1", "2", "3"] {
        manage::accept(&site.keys(member), &AcceptedAs::Host(name(host)), &new).expect("to accept");
    }
    old
}

/// Nobody accepts a host's old key any more.
fn remove_old(site: &Site, host: &str, other: &str, old: &KeyId) {
    manage::remove(&site.keys(other), &AcceptedAs::Peer(name(host)), Some(old)).expect("to remove");
    for member in ["1", "2", "3"] {
        manage::remove(&site.keys(member), &AcceptedAs::Host(name(host)), Some(old)).expect("to remove");
    }
}

#[test]
fn both_hosts_replace_their_keys_without_a_failover() {
    let Some((site, a, mut b, client)) = pair("both_hosts_replace_their_keys_without_a_failover") else {
        return;
    };
    let mut a = a;
    for host in ["a", "b"] {
        let other = if host == "a" { "b" } else { "a" };
        let old = renew(&site, host, other);
        manage::use_new(&site.keys(host)).expect("the new key in use");
        let (near, far) = if host == "a" { (&mut a, &mut b) } else { (&mut b, &mut a) };
        near.wait_for("this host's key was replaced, and the peer is shown the new one", 10);
        far.wait_for("the peer has replaced its key, and is known by the new one", 10);
        remove_old(&site, host, other, &old);
        // As long as a connection of the old key could last.
        std::thread::sleep(Duration::from_secs(3));
        client.wait_for(20, 20);
        for side in [&mut a, &mut b] {
            assert!(!side.has_ended() && !side.has_printed("the peer is lost"), "{}", side.seen());
        }
    }
    for side in [Host::A, Host::B] {
        let mut command = vmft_in(&site.ns(side.name()));
        let status = command.args(["status", "--control"]).arg(site.control(side)).output().expect("status");
        let text = String::from_utf8_lossy(&status.stdout).into_owned();
        assert!(text.contains("PROTECTED") && !text.contains("UNPROTECTED"), "{text}");
    }
    // kill -9; the store knows the survivor by its new key only.
    drop(a);
    b.wait_for(LIVES, 20);
    check_survivor(client, b);
}

#[test]
fn a_new_key_that_the_peer_does_not_accept_yet_is_kept_until_it_does() {
    const TEST: &str = "a_new_key_that_the_peer_does_not_accept_yet_is_kept_until_it_does";
    let Some((site, a, mut b, client)) = pair(TEST) else { return };
    let own = site.keys("a");
    manage::renew(&own).expect("a new key");
    manage::use_new(&own).expect("the new key in use");
    b.wait_for("which is not in peers/a.crt", 10);
    // The old one is replaced in one step.
    let (peers, new) = (site.keys("b").join("peers"), own.join("own.crt"));
    replace_file(&new, &peers.join("a.crt"));
    b.wait_for("the peer has replaced its key, and is known by the new one", 10);
    client.wait_for(20, 20);
    assert!(!b.has_printed("the peer is lost"), "{}", b.seen());
    // The new one counts now: it is the one whose removal ends the link.
    manage::remove(&site.keys("b"), &AcceptedAs::Peer(name("a")), None).expect("to remove");
    b.wait_for("the peer's certificate is no longer accepted", 5);
    let (_, survivor) = one_lives(a, b);
    check_survivor(client, survivor);
}

fn replace_file(from: &Path, to: &Path) {
    let draft = to.with_extension("draft");
    fs::copy(from, &draft).and_then(|_| fs::rename(&draft, to)).expect("to replace");
}
