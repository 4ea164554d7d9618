//! The pair with real processes: the guest survives `kill -9` of its host.

mod support;

use std::time::{Duration, Instant};

use support::counter::Counter;
use support::pair::{Host, Site};
use support::{can_network, has_guest};

const BARE: [&str; 4] = ["--guest", "bare", "--memory-mib", "32"];

#[test]
fn the_bare_guest_survives_the_kill_of_its_primary_under_load() {
    const TEST: &str = "the_bare_guest_survives_the_kill_of_its_primary_under_load";
    if !has_guest(TEST, "bare") || !can_network(TEST) {
        return;
    }
    let cases = std::env::var("VMFT_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(3);
    let site = Site::new();
    let mut gaps = Vec::new();
    for case in 0..cases {
        let (a, mut b) = site.pair(&BARE);
        let client = Counter::start(&site.ns("client"));
        client.wait_for(20, 20);
        std::thread::sleep(Duration::from_millis(case * 37 % 200));
        let killed = Instant::now();
        drop(a);
        b.wait_for("this side lives", 20);
        let alive = killed.elapsed();
        client.wait_for(50, 20);
        let seen = client.finish().unwrap_or_else(|e| panic!("case {case}: {e}\n{}", b.seen()));
        eprintln!("case {case}: alive after {alive:?}, {} replies, longest gap {:?}", seen.replies, seen.gap);
        gaps.push(seen.gap);
        b.terminate();
        let (status, output) = b.finish(20);
        assert!(status.success(), "{output}");
        assert!(!output.contains("diverge"), "{output}");
    }
    gaps.sort_unstable();
    eprintln!(
        "{cases} failovers: the longest gap {:?}, half of them within {:?}",
        gaps[gaps.len() - 1],
        gaps[gaps.len() / 2]
    );
    let _ = Host::A;
}
