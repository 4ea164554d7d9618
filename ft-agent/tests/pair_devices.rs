//! A pair whose host takes something from it: a tap, the keys of its console.

mod support;

use std::process::Command;

use nix::sys::signal::Signal::SIGKILL;
use support::net::ip;
use support::pair::Host;
use support::row::{LIVES, check_survivor, pair, pair_with};
use support::vm::{VMFT, Vm};

#[test]
fn a_backup_whose_tap_is_deleted_says_so_and_leaves() {
    let Some((site, mut a, b, client)) = pair("a_backup_whose_tap_is_deleted_says_so_and_leaves") else {
        return;
    };
    ip(&["-n", &site.ns("b"), "link", "delete", "tap0"]);
    let (status, output) = b.finish(20);
    assert_eq!(status.code(), Some(3), "{output}");
    assert!(output.contains("tap tap0 cannot be used any more"), "{output}");
    a.wait_for(LIVES, 20);
    assert!(a.seen().contains("tap tap0 cannot be used any more"), "{}", a.seen());
    check_survivor(client, a);
}

#[test]
fn a_primary_whose_tap_is_deleted_says_so_and_its_backup_lives() {
    let test = "a_primary_whose_tap_is_deleted_says_so_and_its_backup_lives";
    let Some((site, a, mut b, client)) = pair(test) else { return };
    ip(&["-n", &site.ns("a"), "link", "delete", "tap0"]);
    let (status, output) = a.finish(20);
    assert_eq!(status.code(), Some(3), "{output}");
    assert!(output.contains("tap tap0 cannot be used any more"), "{output}");
    b.wait_for(LIVES, 20);
    check_survivor(client, b);
}

#[test]
fn keys_that_are_typed_between_verdict_and_going_live_reach_the_guest() {
    let test = "keys_that_are_typed_between_verdict_and_going_live_reach_the_guest";
    let Some((site, a, mut b, client)) = pair_with(test, &[], &[(Host::B, "going-live")]) else { return };
    // The counter is one for all clients, and the next is at the console.
    client.wait_for(50, 30);
    client.finish().expect("one history");
    let mut console = Vm::start(Command::new(VMFT).args(["console", "--control"]).arg(site.control(Host::B)));
    console.type_in("add 7000\n");
    // The backup goes live a second later than it could.
    std::fs::write(site.dir.join("going-live"), "").expect("failpoint");
    a.signal(SIGKILL);
    b.wait_for(LIVES, 20);
    console.type_in("add 5\n");
    // The line that was typed when the guest ran elsewhere is not among those that it has got.
    console.wait_for("ok ", 20);
    assert!(!site.dir.join("going-live").exists(), "the failpoint was not reached");
    console.type_in("add 6\n");
    console.wait_for_again("ok ", 20);
    b.stop();
    let (status, output) = b.finish(30);
    assert!(status.success() && !output.contains("divergence"), "{output}");
}
