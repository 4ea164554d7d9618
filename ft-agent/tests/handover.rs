//! Planned handovers that something disturbs: whatever happens, the VM answers, and the command says truly who runs it.

mod support;

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal::{SIGCONT, SIGSTOP};
use support::cases;
use support::counter::Counter;
use support::pair::{Host, Site};
use support::row::{LIVES, check_survivor, pair, pair_with, trigger};
use support::vm::{VMFT, Vm};

/// The longest time without a reply in a handover, even one that is called off: the timeout, and what a busy machine adds.
const GAP_MAX: Duration = Duration::from_millis(2500);

/// Begins `vmft failover` on the primary's host.
fn failover(site: &Site) -> Child {
    let mut command = Command::new(VMFT);
    command.args(["failover", "--control"]).arg(site.control(Host::A));
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("vmft failover")
}

/// Its exit code, and all that it says.
fn outcome(failover: Child) -> (i32, String) {
    let output = failover.wait_with_output().expect("vmft failover");
    let says = [output.stdout, output.stderr].concat();
    (output.status.code().expect("ended by a signal"), String::from_utf8_lossy(&says).into_owned())
}

/// Whether the store's answers reach the hosts.
fn mute_store(site: &Site, mute: bool) {
    for host in [Host::A, Host::B] {
        site.set_store_mute(host, mute);
    }
}

/// When the store's quorum is lost, measured from the beginning of the command.
#[derive(Clone, Copy, Debug)]
enum Lost {
    Before,
    During(Duration),
    After,
}

fn hand_over_while_the_store_is_lost(test: &str, lost: Lost) -> Option<(i32, Duration)> {
    let (site, mut a, mut b, client) = pair(test)?;
    client.wait_for(20, 20);
    if let Lost::Before = lost {
        mute_store(&site, true);
    }
    let begun = Instant::now();
    let command = failover(&site);
    if let Lost::During(after) = lost {
        std::thread::sleep(after);
        mute_store(&site, true);
    }
    let (code, says) = outcome(command);
    let took = begun.elapsed();
    if let Lost::After = lost {
        mute_store(&site, true);
    }
    // The guest answers although there is no quorum.
    client.wait_for(50, 20);
    let seen = client.finish().unwrap_or_else(|e| panic!("{e}\n{}\n{}", a.seen(), b.seen()));
    eprintln!("{lost:?}: exit code {code} in {took:?}, longest gap {:?}: {}", seen.gap, says.trim());
    assert!(seen.gap < GAP_MAX, "{lost:?}: {seen:?}");
    mute_store(&site, false);
    match code {
        0 => {
            assert!(says.contains("the VM runs on the host of the backup at 10.78.0.2:7500"), "{says}");
            b.wait_for(LIVES, 5);
            let (status, output) = a.finish(20);
            assert!(status.success() && output.contains("handed over"), "{output}");
            b.stop();
            assert!(b.finish(30).0.success());
        }
        2 => {
            assert!(
                says.contains("a handover needs the store") && says.contains("the VM goes on here"),
                "{says}"
            );
            assert!(!a.has_ended() && !b.has_printed(LIVES), "{says}");
            a.stop();
            a.wait_for("the VM has ended", 20);
        }
        _ => panic!("{lost:?}: exit code {code}: {says}"),
    }
    Some((code, seen.gap))
}

#[test]
fn a_handover_leaves_the_vm_answering_whenever_the_store_is_lost() {
    let test = "a_handover_leaves_the_vm_answering_whenever_the_store_is_lost";
    let mut gaps = Vec::new();
    for case in 0..cases(4) {
        let lost = match case % 4 {
            0 => Lost::Before,
            3 => Lost::After,
            _ => Lost::During(Duration::from_millis(case * 13 % 60)),
        };
        let Some((code, gap)) = hand_over_while_the_store_is_lost(test, lost) else { return };
        let expected: &[i32] = match lost {
            Lost::Before => &[2],
            Lost::During(_) => &[0, 2],
            Lost::After => &[0],
        };
        assert!(expected.contains(&code), "{lost:?}: exit code {code}");
        gaps.push(gap);
    }
    gaps.sort_unstable();
    eprintln!(
        "{} handovers: median gap {:?}, longest {:?}",
        gaps.len(),
        gaps[gaps.len() / 2],
        gaps[gaps.len() - 1]
    );
}

/// The primary's phase.
fn phase(site: &Site, host: Host) -> String {
    let mut command = Command::new(VMFT);
    let output = command
        .args(["status", "--json", "--control"])
        .arg(site.control(host))
        .output()
        .expect("vmft status");
    let report = serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap_or_default();
    report["phase"].as_str().unwrap_or_default().to_owned()
}

/// Checks that the VM goes on at the primary, and that the command says so.
fn check_stays(command: Child, expected: &str, mut a: Vm, client: Counter) {
    let (code, says) = outcome(command);
    assert_eq!(code, 1, "{says}");
    assert!(says.contains("not handed over") && says.contains(expected), "{says}");
    client.wait_for(50, 20);
    a.wait_for(LIVES, 20);
    check_survivor(client, a);
}

#[test]
fn a_primary_goes_on_if_its_backup_dies_during_a_handover() {
    let test = "a_primary_goes_on_if_its_backup_dies_during_a_handover";
    let Some((site, a, b, client)) = pair(test) else { return };
    client.wait_for(20, 20);
    b.signal(SIGSTOP);
    let command = failover(&site);
    let deadline = Instant::now() + Duration::from_secs(10);
    while phase(&site, Host::A) != "ending" {
        assert!(Instant::now() < deadline, "no handover has begun");
    }
    drop(b);
    check_stays(
        command,
        "the backup at 10.78.0.2:7500 was lost meanwhile, and the VM goes on here",
        a,
        client,
    );
}

/// Kills the backup at moments of which most are in the middle of a handover. The VM lives, unless the command had said
/// before the kill that it runs on the backup's host.
#[test]
fn a_backup_that_is_killed_at_any_moment_of_a_handover_does_not_take_the_vm_with_it() {
    let test = "a_backup_that_is_killed_at_any_moment_of_a_handover_does_not_take_the_vm_with_it";
    let mut ends = [0; 3];
    for case in 0..cases(3) {
        let Some((site, mut a, b, client)) = pair(test) else { return };
        client.wait_for(20, 20);
        let command = failover(&site);
        std::thread::sleep(Duration::from_micros(case * 2700 % 40_000));
        drop(b);
        let (code, says) = outcome(command);
        eprintln!("{case}: exit code {code}: {}", says.trim());
        match code {
            0 => ends[0] += 1,
            1 if says.contains("handed over, but the backup was lost") => ends[1] += 1,
            _ => {
                ends[2] += 1;
                a.wait_for(LIVES, 20);
                client.wait_for(50, 20);
                check_survivor(client, a);
            }
        }
    }
    eprintln!(
        "killed after the handover: {}; between the primary's word and the backup's: {}; before: {}",
        ends[0], ends[1], ends[2]
    );
}

#[test]
fn a_handover_to_a_backup_that_does_not_get_ready_is_called_off() {
    let test = "a_handover_to_a_backup_that_does_not_get_ready_is_called_off";
    let Some((site, a, b, client)) = pair_with(test, &[], &[(Host::B, "guest")]) else { return };
    client.wait_for(20, 20);
    trigger(&site, "guest");
    check_stays(
        failover(&site),
        "did not get ready within the timeout, and the VM goes on here, as before",
        a,
        client,
    );
    drop(b);
}

#[test]
fn sigterm_to_both_sides_ends_only_one() {
    let test = "sigterm_to_both_sides_ends_only_one";
    let rounds = cases(4);
    let mut by_a = 0;
    for round in 0..rounds {
        let Some((site, a, b, client)) = pair(test) else { return };
        client.wait_for(20, 20);
        let sides = if round % 2 == 0 { [&a, &b] } else { [&b, &a] };
        sides[0].terminate();
        std::thread::sleep(Duration::from_micros(15_000 * round / rounds));
        sides[1].terminate();
        let deadline = Instant::now() + Duration::from_secs(20);
        while !a.has_ended() && !b.has_ended() {
            assert!(Instant::now() < deadline, "neither side ends");
            std::thread::sleep(Duration::from_millis(1));
        }
        let (mut alone, ended) = if a.has_ended() { (b, a) } else { (a, b) };
        let (status, output) = ended.finish(20);
        assert!(status.success(), "round {round}: {output}");
        by_a += u64::from(output.contains("handed over"));
        alone.wait_for(LIVES, 20);
        // It was told to end before, or is told now.
        alone.terminate();
        alone.wait_for("runs on this side alone, and would end with it", 20);
        assert_eq!(phase(&site, if output.contains("handed over") { Host::B } else { Host::A }), "alone");
        check_survivor(client, alone);
    }
    eprintln!("{rounds} rounds: {by_a} handed over, in the others the backup has left");
}

#[test]
fn a_stopped_backup_that_goes_on_after_a_handover_was_called_off_is_told() {
    let test = "a_stopped_backup_that_goes_on_after_a_handover_was_called_off_is_told";
    let Some((site, mut a, b, client)) = pair(test) else { return };
    client.wait_for(20, 20);
    b.signal(SIGSTOP);
    let (code, says) = outcome(failover(&site));
    assert!(code == 1 && says.contains("not handed over"), "{says}");
    a.wait_for(LIVES, 20);
    b.signal(SIGCONT);
    let (status, output) = b.finish(20);
    assert_eq!(status.code(), Some(6), "{output}");
    check_survivor(client, a);
}

/// Two requests within some milliseconds: the second joins the first, waits for it, or is refused.
#[test]
fn requests_that_meet_leave_the_vm_answering_or_ended() {
    let test = "requests_that_meet_leave_the_vm_answering_or_ended";
    let rounds = cases(8);
    for round in 0..rounds {
        let Some((site, a, mut b, client)) = pair(test) else { return };
        client.wait_for(20, 20);
        let first = failover(&site);
        std::thread::sleep(Duration::from_micros(20_000 * (round / 2) / rounds));
        let mut second = Command::new(VMFT);
        match round % 2 {
            0 => second.arg("failover"),
            _ => second.args(["stop", "--yes"]),
        };
        let second = second.arg("--control").arg(site.control(Host::A));
        let second = second.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("vmft");
        let said = [outcome(first), outcome(second)];
        let (status, output) = a.finish(20);
        assert!(status.success(), "round {round}: {said:?}\n{output}");
        let is_handed_over = output.contains("handed over");
        eprintln!("round {round}: handed over: {is_handed_over}, {said:?}");
        if is_handed_over {
            b.wait_for(LIVES, 20);
            check_survivor(client, b);
        } else {
            let (status, output) = b.finish(20);
            assert!(status.success() && round % 2 == 1, "round {round}: {said:?}\n{output}");
        }
    }
}
