//! A side that runs its guest watches the store: what happens when the VM is forgotten meanwhile, and when the
//! store is away or has lost its data.

mod support;

use std::process::Command;
use std::time::{Duration, Instant};

use support::capture::Capture;
use support::counter::Counter;
use support::net::{GUEST_IP, GUEST_MAC, ip};
use support::pair::{Host, Site};
use support::row::{BARE, LIVES, pair, pair_with};
use support::vm::{VMFT, Vm, vmft_in};

/// A look each 5 s, and time for the answer and the end on a busy host.
const STOPS_WITHIN: Duration = Duration::from_secs(8);
/// What a side says whose pair is over at the store.
const OVER: [&str; 3] = [
    "fenced: the VM was forgotten at the store while it ran here",
    "fenced: the VM was started elsewhere, as generation 2",
    "fenced: the store knows this pair no longer",
];

/// The VM on a third host, whose process runs beside B's: an unprotected primary with a tap of its own.
fn elsewhere(site: &Site) -> Vm {
    let ns = site.ns("b");
    ip(&["-n", &ns, "tuntap", "add", "tap1", "mode", "tap"]);
    ip(&["-n", &ns, "link", "set", "tap1", "master", "br0", "up"]);
    let mut command = vmft_in(&ns);
    command.args(["primary", "--unprotected", "--name", "vm", "--store", &site.store_url("stranger")]);
    command
        .arg("--keys")
        .arg(site.keys("stranger"))
        .args(["--tap", "tap1", "--ip", GUEST_IP, "--mac", GUEST_MAC])
        .args(BARE);
    Vm::start(&mut command)
}

#[test]
fn both_sides_of_a_pair_that_is_forgotten_stop_and_the_vm_runs_elsewhere() {
    const TEST: &str = "both_sides_of_a_pair_that_is_forgotten_stop_and_the_vm_runs_elsewhere";
    let Some((site, a, b, client)) = pair(TEST) else { return };
    let capture = Capture::start(&site);
    let mut forget = vmft_in(&site.ns("a"));
    forget.args(["forget", "--name", "vm", "--store", &site.store_url("admin"), "--yes"]);
    assert!(forget.status().expect("vmft forget").success());
    let forgotten = Instant::now();
    let mut third = elsewhere(&site);
    for (side, vm) in [("A", a), ("B", b)] {
        let (status, output) = vm.finish(30);
        eprintln!("{side} has ended {:?} after the VM was forgotten", forgotten.elapsed());
        assert!(forgotten.elapsed() < STOPS_WITHIN, "{output}");
        assert_eq!(status.code(), Some(6), "{output}");
        assert!(OVER.iter().any(|text| output.contains(text)) && !output.contains(LIVES), "{output}");
    }
    let ended = Instant::now();
    // Its connection ended with the guest, or with a frame of the guest that has its address now.
    client.finish().ok();
    third.wait_for("READY", 60);
    let client = Counter::bare(&site.ns("client"));
    client.wait_for(50, 20);
    client.finish().expect("one history");
    let frames = capture.finish();
    assert!(frames.iter().any(|frame| frame.host == Host::A), "the primary's frames are seen");
    let late = frames.iter().filter(|frame| frame.host == Host::A && frame.at > ended).count();
    assert_eq!(late, 0, "frames of a side that has ended");
}

/// `vmft status --json` of a side.
fn status(site: &Site, host: Host) -> serde_json::Value {
    let output = Command::new(VMFT).args(["status", "--json", "--control"]).arg(site.control(host)).output();
    serde_json::from_slice(&output.expect("vmft status").stdout).expect("JSON")
}

/// Waits until a side says that the VM is protected, or not. Returns its status.
fn wait_protected(site: &Site, host: Host, protected: bool, seconds: u64) -> serde_json::Value {
    let deadline = Instant::now() + Duration::from_secs(seconds);
    loop {
        let report = status(site, host);
        if report["protected"] == protected {
            return report;
        }
        assert!(Instant::now() < deadline, "{report}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_pair_is_at_risk_while_its_store_is_away_and_its_clients_do_not_notice() {
    const TEST: &str = "a_pair_is_at_risk_while_its_store_is_away_and_its_clients_do_not_notice";
    let hook = ["--hook", "echo \"hook: $VMFT_STATE $VMFT_PHASE $VMFT_REASON\" >&2"];
    let Some((mut site, mut a, mut b, client)) = pair_with(TEST, &hook, &[]) else { return };
    let stopped = Instant::now();
    for id in [1, 2] {
        site.stop_store(id);
    }
    for (side, host) in [(&mut a, Host::A), (&mut b, Host::B)] {
        let report = wait_protected(&site, host, false, 30);
        eprintln!("{host:?} is at risk after {:?}", stopped.elapsed());
        let problem = report["store_problem"].as_str().expect("a problem");
        assert!(problem.starts_with("the store has not answered for "), "{problem}");
        assert_eq!((&report["phase"], &report["store_answers"]), (&"protected".into(), &false.into()));
        assert_eq!((&report["state"], &report["reason"]), (&"AT RISK".into(), &report["store_problem"]));
        assert!(report["store_answered_ago_ms"].as_f64().is_some_and(|ms| ms >= 15_000.0), "{report}");
        side.wait_for("AT RISK: the store has not answered for ", 10);
        side.wait_for("hook: AT_RISK protected the store has not answered for ", 10);
    }
    for id in [1, 2] {
        site.start_store(id);
    }
    for (side, host) in [(&mut a, Host::A), (&mut b, Host::B)] {
        let report = wait_protected(&site, host, true, 30);
        assert!(report["store_problem"].is_null(), "{report}");
        side.wait_for("PROTECTED again", 10);
        assert!(!side.has_printed("the peer is lost"), "{}", side.seen());
    }
    client.wait_for(50, 20);
    let seen = client.finish().unwrap_or_else(|e| panic!("{e}\n{}", a.seen()));
    eprintln!("{} replies, longest gap {:?}", seen.replies, seen.gap);
    assert!(seen.gap < Duration::from_secs(1), "{:?}", seen.gap);
}

#[test]
fn a_pair_whose_store_has_lost_its_data_goes_on_unprotected_until_it_is_back() {
    const TEST: &str = "a_pair_whose_store_has_lost_its_data_goes_on_unprotected_until_it_is_back";
    let Some((mut site, mut a, mut b, client)) = pair(TEST) else { return };
    let data = |site: &Site, id: u64| site.dir.join(format!("store-{id}"));
    let kept = |site: &Site, id: u64| site.dir.join(format!("kept-{id}"));
    for id in [1, 2, 3] {
        site.stop_store(id);
    }
    for id in 1..=3 {
        std::fs::rename(data(&site, id), kept(&site, id)).expect("rename");
    }
    for id in [1, 2, 3] {
        site.start_store(id);
    }
    for (side, host) in [(&mut a, Host::A), (&mut b, Host::B)] {
        side.wait_for("UNPROTECTED: the store has no record of this pair", 30);
        let report = status(&site, host);
        assert_eq!((&report["protected"], &report["phase"]), (&false.into(), &"protected".into()));
    }
    // A handover would end the VM: neither side could win.
    let failover = Command::new(VMFT).args(["failover", "--control"]).arg(site.control(Host::A)).output();
    let refused = String::from_utf8_lossy(&failover.expect("vmft failover").stderr).into_owned();
    assert!(refused.contains("a handover needs the store"), "{refused}");
    for id in [1, 2, 3] {
        site.stop_store(id);
    }
    for id in 1..=3 {
        std::fs::remove_dir_all(data(&site, id)).expect("remove");
        std::fs::rename(kept(&site, id), data(&site, id)).expect("rename");
    }
    for id in [1, 2, 3] {
        site.start_store(id);
    }
    for host in [Host::A, Host::B] {
        wait_protected(&site, host, true, 30);
    }
    client.wait_for(50, 20);
    client.finish().unwrap_or_else(|e| panic!("{e}\n{}", a.seen()));
}
