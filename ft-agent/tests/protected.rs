//! PROTECTED is true: what a pair says over bad links and with a starved backup, how far the backup is behind, and how
//! long it needs to live after a kill. `VMFT_WHOLE=1` runs the whole table, and prints it.

mod support;

use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use support::counter::Counter;
use support::pair::{Host, Site};
use support::relay::{Link, Relay};
use support::row::{BARE, LIVES};
use support::starve::Quota;
use support::vm::{VMFT, Vm};
use support::{can_network, has_guest, skip};

/// `--lag-max-ms` and `--lag-limit-ms` of the pairs with a starved backup.
const LAG: [&str; 4] = ["--lag-max-ms", "1000", "--lag-limit-ms", "3000"];
const LAG_MAX_MS: f64 = 1000.0;

fn whole() -> bool {
    std::env::var_os("VMFT_WHOLE").is_some()
}

/// `vmft status --json` of a side, if there is one yet.
fn status(site: &Site, host: Host) -> Option<serde_json::Value> {
    let output = Command::new(VMFT).args(["status", "--json", "--control"]).arg(site.control(host)).output();
    let output = output.expect("vmft status");
    let report = serde_json::from_slice::<serde_json::Value>(&output.stdout).ok()?;
    let code = match report["state"].as_str() {
        Some("PROTECTED") => 0,
        Some("AT RISK") => 8,
        _ => 1,
    };
    assert_eq!(output.status.code(), Some(code), "{report}");
    Some(report)
}

/// What was seen of a pair for a while.
#[derive(Debug, Default)]
struct Seen {
    /// Each state and reason that a side told, in order, without figures.
    told: Vec<String>,
    lag_ms_max: f64,
    /// The largest lag of a side that said PROTECTED.
    protected_lag_ms_max: f64,
    round_trip_ms_max: f64,
}

impl Seen {
    /// Looks at both sides for a while.
    fn watch(&mut self, site: &Site, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            for host in [Host::A, Host::B] {
                let Some(report) = status(site, host) else { continue };
                let lag = report["lag_ms"].as_f64().expect("a lag");
                self.lag_ms_max = self.lag_ms_max.max(lag);
                self.round_trip_ms_max =
                    self.round_trip_ms_max.max(report["round_trip_ms"].as_f64().unwrap_or(0.0));
                if report["state"] == "PROTECTED" {
                    self.protected_lag_ms_max = self.protected_lag_ms_max.max(lag);
                }
                let reason = report["reason"].as_str().unwrap_or_default();
                let reason: String =
                    reason.chars().take_while(|c| !c.is_ascii_digit() && *c != ':').collect();
                let told = format!("{} {} {}", host.name(), report["state"].as_str().unwrap_or("?"), reason);
                if !self.told.iter().rev().take(2).any(|last| *last == told.trim()) {
                    self.told.push(told.trim().into());
                }
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn has_told(&self, words: &str) -> bool {
        self.told.iter().any(|told| told.starts_with(words))
    }
}

/// Kills the primary. Returns after what time the backup lives.
fn live_after_kill(a: &Vm, b: &mut Vm, seconds: u64) -> Duration {
    a.signal(Signal::SIGKILL);
    let killed = Instant::now();
    b.wait_for(LIVES, seconds);
    killed.elapsed()
}

/// Starts a pair with the bare guest. The guest of the primary need not be ready.
fn start(site: &Site, more: &[&str]) -> (Vm, Vm) {
    let machine = [&BARE, more].concat();
    let mut b = Vm::start(&mut site.replica(Host::B, &machine));
    b.wait_for("waiting for a primary", 30);
    (Vm::start(&mut site.replica(Host::A, &machine)), b)
}

const GOOD: Link = Link { round_trip_ms: 1, mbit_per_s: 1000, loss_percent: 0 };

#[test]
fn a_link_that_is_too_slow_is_refused_at_the_start_and_puts_a_running_pair_at_risk() {
    const TEST: &str = "a_link_that_is_too_slow_is_refused_at_the_start_and_puts_a_running_pair_at_risk";
    if !has_guest(TEST, "bare") || !can_network(TEST) {
        return;
    }
    let site = Site::new();
    let slow = Link { round_trip_ms: 600, ..GOOD };
    let relay = Relay::start(&site, slow);
    let (mut a, mut b) = start(&site, &[]);
    for side in [&mut a, &mut b] {
        side.wait_for("ms old when they come, and no output leaves if they are older than 500 ms", 30);
    }
    assert!(!a.has_printed("the pair is open"), "{}", a.seen());
    relay.set(GOOD);
    a.wait_for("READY", 60);
    let client = Counter::bare(&site.ns("client"));
    client.wait_for(20, 20);
    let mut seen = Seen::default();
    seen.watch(&site, Duration::from_secs(1));
    assert_eq!(seen.told, ["a PROTECTED", "b PROTECTED"]);
    relay.set(slow);
    a.wait_for("AT RISK: the guest's outputs do not leave: the other side's confirmations are ", 20);
    b.wait_for("AT RISK: the guest's outputs do not leave the primary", 20);
    let before = client.replies();
    seen.watch(&site, Duration::from_secs(3));
    assert!(seen.has_told("a AT RISK the guest's outputs do not leave"), "{seen:?}");
    assert!(seen.has_told("b AT RISK the guest's outputs do not leave the primary"), "{seen:?}");
    assert_eq!(client.replies(), before, "this is what it says: the guest is mute");
    relay.set(GOOD);
    a.wait_for("PROTECTED again", 20);
    b.wait_for("PROTECTED again", 20);
    client.wait_for(20, 20);
    let live = live_after_kill(&a, &mut b, 20);
    client.wait_for(20, 20);
    client.finish().expect("one history");
    eprintln!("{seen:?}, live after {live:?}");
}

#[test]
fn over_no_link_is_a_pair_protected_whose_backup_is_too_far_behind() {
    const TEST: &str = "over_no_link_is_a_pair_protected_whose_backup_is_too_far_behind";
    if !has_guest(TEST, "bare") || !can_network(TEST) {
        return;
    }
    let all = [
        (1, 1000, 0),
        (10, 1000, 0),
        (50, 100, 0),
        (150, 100, 0),
        (300, 100, 0),
        (420, 100, 0),
        (480, 100, 0),
        (540, 100, 0),
        (600, 100, 0),
        (1, 100, 0),
        (1, 10, 0),
        (1, 1, 0),
        (50, 1, 0),
        (1, 1000, 1),
        (1, 1000, 5),
        (1, 1000, 10),
        (1, 1000, 20),
        (1, 1000, 30),
        (50, 10, 5),
        (150, 10, 10),
    ];
    let links = if whole() { &all[..] } else { &[(1, 1, 0)][..] };
    println!(
        "| round trip, ms | Mbit/s | loss, % | told | confirmations, ms | lag, ms | lag while PROTECTED, ms | replies/s | live after a kill, s |"
    );
    for &(round_trip_ms, mbit_per_s, loss_percent) in links {
        link_row(Link { round_trip_ms, mbit_per_s, loss_percent });
    }
}

fn link_row(link: Link) {
    let site = Site::new();
    let _relay = Relay::start(&site, link);
    let (mut a, mut b) = start(&site, &[]);
    let row = format!("| {} | {} | {} |", link.round_trip_ms, link.mbit_per_s, link.loss_percent);
    let deadline = Instant::now() + Duration::from_secs(30);
    while !a.has_printed("READY") {
        if a.has_printed("no output leaves if they are older than") || Instant::now() > deadline {
            let why = if a.has_printed("no output leaves") { "refused" } else { "no pair in 30 s" };
            return println!("{row} {why} | | | | | |");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let client = Counter::bare(&site.ns("client"));
    let (mut seen, begin) = (Seen::default(), Instant::now());
    seen.watch(&site, Duration::from_secs(10));
    let rate = client.replies() as f64 / begin.elapsed().as_secs_f64();
    let ended = a.has_printed(LIVES) || b.has_printed(LIVES);
    let live = match ended {
        true => "ended before".into(),
        false => format!("{:.2}", live_after_kill(&a, &mut b, 120).as_secs_f64()),
    };
    println!(
        "{row} {} | {:.0} | {:.0} | {:.0} | {rate:.1} | {live} |",
        seen.told.join(", "),
        seen.round_trip_ms_max,
        seen.lag_ms_max,
        seen.protected_lag_ms_max
    );
    // The default of --lag-max-ms, and a while between the two figures of a report.
    assert!(seen.protected_lag_ms_max <= 2000.0, "{seen:?}");
    client.finish().ok();
}

#[test]
fn a_starved_backup_stops_the_guest_or_is_given_up_and_is_never_called_protected_far_behind() {
    const TEST: &str =
        "a_starved_backup_stops_the_guest_or_is_given_up_and_is_never_called_protected_far_behind";
    if !has_guest(TEST, "bare") || !can_network(TEST) {
        return;
    }
    if Quota::new(50).is_none() {
        return skip(TEST, "needs control groups that limit CPU time");
    }
    let quotas = if whole() { &[3, 5, 10, 20, 35, 50][..] } else { &[5] };
    println!(
        "| share of a core, % | --at-lag-limit | told | lag, ms | lag while PROTECTED, ms | live after a kill, s |"
    );
    for quota in quotas {
        starved_row(*quota, "stop");
    }
    starved_row(5, "give-up");
}

fn starved_row(percent: u64, at_limit: &str) {
    // A guest that never rests.
    let spin = ["--cmdline", "workload=spin every=20000000 count=100000000000", "--at-lag-limit", at_limit];
    let site = Site::new();
    let quota = Quota::new(percent).expect("a control group");
    let (mut a, mut b) = start(&site, &[&spin[..], &LAG].concat());
    a.wait_for("the pair is open", 60);
    let mut seen = Seen::default();
    seen.watch(&site, Duration::from_secs(3));
    quota.add(b.id());
    let time = if whole() { 30 } else { 12 };
    seen.watch(&site, Duration::from_secs(time));
    assert!(seen.protected_lag_ms_max <= LAG_MAX_MS, "{seen:?}");
    assert!(percent > 10 || seen.has_told("a AT RISK the backup is"), "{seen:?}\n{}", a.seen());
    let live = match at_limit {
        "stop" => format!("{:.2}", live_after_kill(&a, &mut b, 180).as_secs_f64()),
        _ => {
            a.wait_for("and is given up for that", 20);
            a.wait_for(LIVES, 20);
            "the primary lives".into()
        }
    };
    println!(
        "| {percent} | {at_limit} | {} | {:.0} | {:.0} | {live} |",
        seen.told.join(", "),
        seen.lag_ms_max,
        seen.protected_lag_ms_max
    );
}
