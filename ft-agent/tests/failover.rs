//! The pair with real processes: the guest survives `kill -9` of its host.

mod support;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use rustls::{ClientConnection, ServerConnection, StreamOwned};
use support::counter::{ClientResult, Counter};
use support::pair::{Host, Site, inside};
use support::row::BARE;
use support::vm::Vm;
use support::{can_network, cases, has_guest, has_kvm};
use test_and_set::keys::Keys;
use test_and_set::tls::{peer_client, peer_server};

const LINUX: [&str; 2] = ["--guest", "linux"];

fn ready(test: &str, guest: &str) -> bool {
    has_guest(test, guest) && can_network(test)
}

/// Ends the client. Returns what it has seen; panics with the survivor's output if a reply was wrong.
fn client_result(client: Counter, survivor: &Vm) -> ClientResult {
    client.finish().unwrap_or_else(|e| panic!("{e}\n{}", survivor.seen()))
}

/// Ends a survivor in order, and checks that it has found nothing wrong.
fn check_end(survivor: Vm) {
    survivor.stop();
    let (status, output) = survivor.finish(30);
    assert!(status.success() && !output.contains("divergence"), "{output}");
}

fn kill_primary(guest: &[&str], client: fn(&str) -> Counter, cases: u64) {
    let site = Site::new();
    let (mut gaps, mut splits) = (Vec::new(), Vec::new());
    for case in 0..cases {
        let (a, mut b) = site.pair(guest);
        let client = client(&site.ns("client"));
        client.wait_for(20, 20);
        std::thread::sleep(Duration::from_millis(case * 37 % 200));
        let knocking = KnockingClient::new(&site.ns("client"));
        let killed = Instant::now();
        drop(a);
        b.wait_for("this side lives", 20);
        let alive = killed.elapsed();
        client.wait_for(50, 30);
        drop(knocking);
        splits.push(failover_steps_ms(&site));
        let seen = client_result(client, &b);
        eprintln!(
            "failover {case}: alive after {alive:?}, {} replies, longest gap {:?}",
            seen.replies, seen.gap
        );
        gaps.push(seen.gap);
        check_end(b);
    }
    gaps.sort_unstable();
    let middle = gaps[gaps.len() / 2];
    eprintln!(
        "{cases} failovers: the longest gap {:?}, half of them within {middle:?}",
        gaps[gaps.len() - 1]
    );
    for (n, step) in STEPS.iter().enumerate() {
        let mut times: Vec<f64> = splits.iter().map(|split| split[n]).collect();
        times.sort_unstable_by(f64::total_cmp);
        let at = |percent| times[(times.len() - 1) * percent / 100];
        eprintln!("  {step} after the loss: half within {:.1} ms, 99 % within {:.1} ms", at(50), at(99));
    }
}

/// Connects again and again to a port on which the guest does not listen: a frame about every 2 ms, which the
/// guest answers. So a guest that has just gone live has a frame to send at once. The counting client cannot
/// be relied on for that: its request may have been lost with the primary, and it repeats it only after its
/// own timeout, 200 ms later.
struct KnockingClient {
    done: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl KnockingClient {
    fn new(namespace: &str) -> KnockingClient {
        let done = Arc::new(AtomicBool::new(false));
        let stop = done.clone();
        let at = (support::net::GUEST.parse::<std::net::IpAddr>().expect("address"), 9).into();
        let thread = inside(namespace, move || {
            let pause = Duration::from_millis(2);
            while !stop.load(Ordering::Relaxed) {
                let answer = TcpStream::connect_timeout(&at, pause);
                assert!(answer.is_err(), "the guest listens on port 9");
                std::thread::sleep(pause);
            }
        });
        KnockingClient { done, thread: Some(thread) }
    }
}

impl Drop for KnockingClient {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(
            std::thread::panicking() || ended.is_some_and(|e| e.is_ok()),
            "the knocking client has failed"
        );
    }
}

/// The steps of a failover in `vmft status --json`.
const STEPS: [&str; 4] = ["asked_ms", "verdict_ms", "running_ms", "first_frame_ms"];

/// When each step of B's failover was done, ms after B declared its peer lost.
fn failover_steps_ms(site: &Site) -> [f64; 4] {
    let mut command = Command::new(support::vm::VMFT);
    let status = command.args(["status", "--json", "--control"]).arg(site.control(Host::B)).output();
    let status: serde_json::Value =
        serde_json::from_slice(&status.expect("vmft status").stdout).expect("JSON");
    STEPS.map(|step| status["failover"][step].as_f64().unwrap_or_else(|| panic!("no {step} in {status}")))
}

#[test]
fn the_bare_guest_survives_the_kill_of_its_primary_under_load() {
    if ready("the_bare_guest_survives_the_kill_of_its_primary_under_load", "bare") {
        kill_primary(&BARE, Counter::bare, cases(5));
    }
}

#[test]
fn the_bare_guest_on_kvm_survives_the_kill_of_its_primary_under_load() {
    const TEST: &str = "the_bare_guest_on_kvm_survives_the_kill_of_its_primary_under_load";
    if ready(TEST, "bare") && has_kvm(TEST) {
        let guest = [&BARE[..], &["--cpu", "kvm", "--positions", "sync"]].concat();
        kill_primary(&guest, Counter::bare, cases(3));
    }
}

#[test]
fn linux_with_redis_survives_the_kill_of_its_primary() {
    if ready("linux_with_redis_survives_the_kill_of_its_primary", "linux") {
        kill_primary(&LINUX, Counter::redis, cases(2).min(30));
    }
}

#[test]
fn the_primary_goes_on_alone_when_its_backup_is_killed() {
    if !ready("the_primary_goes_on_alone_when_its_backup_is_killed", "bare") {
        return;
    }
    let site = Site::new();
    let (mut a, b) = site.pair(&BARE);
    let client = Counter::bare(&site.ns("client"));
    client.wait_for(20, 20);
    drop(b);
    a.wait_for("this side lives", 20);
    client.wait_for(100, 20);
    let seen = client_result(client, &a);
    assert!(seen.gap < Duration::from_secs(1), "the gap is longer than the timeout: {seen:?}");
    check_end(a);
}

#[test]
fn a_cut_link_leaves_exactly_one_and_the_other_fences() {
    if !ready("a_cut_link_leaves_exactly_one_and_the_other_fences", "bare") {
        return;
    }
    let site = Site::new();
    let (a, b) = site.pair(&BARE);
    let client = Counter::bare(&site.ns("client"));
    client.wait_for(20, 20);
    site.set_port("log", Host::A, false);
    client.wait_for(100, 30);
    let seen = client.finish().unwrap_or_else(|e| panic!("{e}"));
    eprintln!("link cut: longest gap {:?}", seen.gap);
    // One of them ends by itself; the other lives until it is terminated.
    std::thread::sleep(Duration::from_secs(1));
    let mut both = [(Host::A, a), (Host::B, b)].map(|(host, vm)| (host, vm.has_ended(), vm));
    both.sort_by_key(|(_, ended, _)| !ended);
    let [(loser, true, fenced), (_, false, winner)] = both else {
        panic!("not exactly one of the two lives")
    };
    let (status, output) = fenced.finish(5);
    assert_eq!(status.code(), Some(6), "{loser:?}: {output}");
    assert!(output.contains("fenced"), "{output}");
    check_end(winner);
}

#[test]
fn a_planned_handover_loses_nothing() {
    if !ready("a_planned_handover_loses_nothing", "bare") {
        return;
    }
    let site = Site::new();
    for case in 0..cases(3) {
        let (a, mut b) = site.pair_with(&BARE, &[("VMFT_LOG", STATES)]);
        let client = Counter::bare(&site.ns("client"));
        client.wait_for(20, 20);
        a.terminate();
        b.wait_for("going live", 20);
        let (status, output) = a.finish(10);
        assert!(status.success() && output.contains("handed over"), "{output}");
        let full_state = |text: &str| lines(text, "full state").next().map(str::to_owned);
        let (there, here) = (full_state(&output), full_state(b.seen()));
        assert!(here.is_some() && here == there, "{there:?}, {here:?}");
        client.wait_for(50, 20);
        let seen = client_result(client, &b);
        eprintln!("handover {case}: longest gap {:?},{}", seen.gap, here.unwrap_or_default());
        check_end(b);
    }
}

/// VMFT_LOG for a side that logs the digests of its guest's state.
const STATES: &str = "info,vmft::pair::guest_io=debug";

/// What follows a word, in each line that has it.
fn lines<'a>(text: &'a str, word: &'a str) -> impl Iterator<Item = &'a str> {
    text.lines().filter_map(move |line| line.split_once(word).map(|(_, rest)| rest))
}

#[test]
fn the_states_of_a_primary_that_was_killed_are_those_its_backup_has_checked() {
    const TEST: &str = "the_states_of_a_primary_that_was_killed_are_those_its_backup_has_checked";
    if !ready(TEST, "bare") {
        return;
    }
    let site = Site::new();
    for case in 0..cases(2) {
        let (a, mut b) = site.pair_with(&BARE, &[("VMFT_LOG", STATES)]);
        let client = Counter::bare(&site.ns("client"));
        client.wait_for(200, 20);
        let killed = SystemTime::now();
        a.signal(nix::sys::signal::Signal::SIGKILL);
        let (_, there) = a.finish(10);
        b.wait_for("this side lives", 20);
        client_result(client, &b);
        let position = |text: &str| -> u64 {
            let at = text.split_whitespace().find_map(|word| word.strip_prefix("at="));
            at.and_then(|at| at.parse().ok()).unwrap_or_else(|| panic!("no position in {text:?}"))
        };
        let here: Vec<&str> = lines(b.seen(), "state checked").collect();
        let last = here.last().map(|text| position(text)).expect("no state was checked");
        let there: Vec<&str> = there.lines().filter(|line| line.contains("state recorded")).collect();
        // The last recorded state may not have left the host that died.
        let mut reached = there.iter().filter(|line| position(line) <= last);
        let recorded: Vec<&str> = reached.clone().flat_map(|line| lines(line, "state recorded")).collect();
        assert_eq!(recorded, here);
        assert!(
            there.len() - here.len() <= 1,
            "{} states were recorded, {} checked",
            there.len(),
            here.len()
        );
        let age = reached.next_back().map(|line| age_ms(line, killed)).expect("a state");
        eprintln!("kill {case}: {} states are equal, the last was {age} ms old", here.len());
        assert!(age < 1000, "the last state that was checked was {age} ms old at the kill");
        check_end(b);
    }
}

/// How old a line of the log was at the time `then`, ms, by the seconds of its time stamp.
fn age_ms(line: &str, then: SystemTime) -> u64 {
    let seconds = line.split_once('Z').and_then(|(time, _)| time.rsplit_once(':')).map(|(_, s)| s);
    let at_ms = seconds.and_then(|s| s.parse::<f64>().ok()).map(|s| (s * 1000.0) as u64);
    let then = then.duration_since(SystemTime::UNIX_EPOCH).expect("a time").as_millis() as u64 % 60_000;
    (then + 60_000 - at_ms.unwrap_or_else(|| panic!("no time in {line:?}"))) % 60_000
}

#[test]
fn power_off_ends_both_sides_and_reboot_resets_them_in_step() {
    if !ready("power_off_ends_both_sides_and_reboot_resets_them_in_step", "bare") {
        return;
    }
    let site = Site::new();
    let (mut a, b) = site.pair(&BARE);
    let ns = site.ns("client");
    support::counter::tell_bare(&ns, "reboot");
    a.wait_for_again("READY", 20);
    let client = Counter::bare(&ns);
    client.wait_for(20, 20);
    client_result(client, &a);
    support::counter::tell_bare(&ns, "poweroff");
    for side in [a, b] {
        let (status, output) = side.finish(20);
        assert!(status.success() && output.contains("the VM has ended"), "{output}");
    }
}

/// Round-trip times between the two hosts over a TLS connection like that of the channel, µs, sorted.
fn round_trips_us(site: &Site) -> Vec<u32> {
    let keys = |host| Arc::new(Keys::load(&site.keys(host)).expect("keys"));
    let (server, client) = (peer_server(&keys("b")).expect("TLS"), peer_client(&keys("a")).expect("TLS"));
    let listener = inside(&site.ns("b"), || TcpListener::bind("10.78.0.2:7600").expect("bind"));
    let listener = listener.join().expect("listener");
    let echo = inside(&site.ns("b"), move || {
        let (peer, _) = listener.accept().expect("accept");
        peer.set_nodelay(true).expect("nodelay");
        let mut peer = StreamOwned::new(ServerConnection::new(server).expect("TLS"), peer);
        let mut bytes = [0; 256];
        while peer.read_exact(&mut bytes).is_ok() && peer.write_all(&bytes[..64]).is_ok() {}
    });
    let ask = inside(&site.ns("a"), || {
        let peer = TcpStream::connect("10.78.0.2:7600").expect("connect");
        peer.set_nodelay(true).expect("nodelay");
        let name = "vmft".try_into().expect("name");
        let mut peer = StreamOwned::new(ClientConnection::new(client, name).expect("TLS"), peer);
        let mut time = || {
            let asked = Instant::now();
            peer.write_all(&[1; 256]).and_then(|()| peer.read_exact(&mut [0; 64])).expect("echo");
            asked.elapsed().as_micros() as u32
        };
        // The first round trip includes the handshake.
        time();
        (0..3000).map(|_| time()).collect::<Vec<_>>()
    });
    let mut times = ask.join().expect("client");
    echo.join().expect("echo");
    times.sort_unstable();
    times
}

#[test]
fn an_output_waits_for_about_a_round_trip() {
    if !ready("an_output_waits_for_about_a_round_trip", "bare") {
        return;
    }
    let site = Site::new();
    let link = round_trips_us(&site);
    let (mut a, b) = site.pair(&BARE);
    let parts = |times: &[u32]| (times[times.len() / 2], times[times.len() * 99 / 100]);
    let protected = parts(&echo_us(&site.ns("client")));
    drop(b);
    a.wait_for("this side lives", 20);
    let alone = parts(&echo_us(&site.ns("client")));
    let link = parts(&link);
    let added = protected.0.saturating_sub(alone.0);
    let added_99 = protected.1.saturating_sub(alone.1);
    eprintln!(
        "p50, p99 in µs: TLS {link:?}, protected {protected:?}, alone {alone:?}; added {added}, {added_99}; 1.5 round trips \
         and 100 µs are {}",
        link.0 * 3 / 2 + 100
    );
    assert!(added < link.0 * 3 / 2 + 5_000, "an output waits for {added} µs, a round trip is {} µs", link.0);
    check_end(a);
}

/// Round-trip times to the bare guest's echo service, µs, sorted.
fn echo_us(namespace: &str) -> Vec<u32> {
    let ask = inside(namespace, || {
        let mut guest = TcpStream::connect(format!("{}:7778", support::net::GUEST)).expect("connect");
        guest.set_nodelay(true).expect("nodelay");
        let time = |_| {
            let asked = Instant::now();
            guest.write_all(&[1; 16]).and_then(|()| guest.read_exact(&mut [0; 16])).expect("echo");
            asked.elapsed().as_micros() as u32
        };
        (0..3000).map(time).collect::<Vec<_>>()
    });
    let mut times = ask.join().expect("client");
    times.sort_unstable();
    times
}
