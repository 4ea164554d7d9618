//! Nothing on a host's side is in the way of a take-over: whatever a replica's standard output and error are, who reads its
//! consoles or not, and what its hook does.

mod support;

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, PipeReader, PipeWriter, Read, Write, pipe};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use support::counter::Counter;
use support::pair::{Host, Site};
use support::row::BARE;
use support::vm::{Vm, under};
use support::{can_network, cases, has_guest};

/// What standard output and error of a process are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Taker {
    /// Closed at the start.
    Closed,
    /// A full disk.
    FullDisk,
    /// A pipe whose reader has died.
    DeadReader,
    /// A full pipe that nobody reads.
    FullPipe,
    /// The same, and somebody has made it non-blocking.
    NonBlocking,
    /// A pipe that nobody reads.
    Unread,
}

const TAKERS: [Taker; 6] =
    [Taker::Closed, Taker::FullDisk, Taker::DeadReader, Taker::FullPipe, Taker::NonBlocking, Taker::Unread];

/// A process whose output nobody reads. Killed on drop.
struct Unheard {
    child: Child,
    /// The other ends of its pipes.
    _readers: Vec<PipeReader>,
}

impl Unheard {
    fn start(command: Command, taker: Taker) -> Unheard {
        let mut command = match taker {
            Taker::Closed => under(command, &["sh", "-c", "exec \"$@\" >&- 2>&-", "sh"]),
            _ => command,
        };
        let (mut readers, null) = (Vec::new(), || Stdio::null());
        let mut output = || match taker {
            Taker::Closed => null(),
            Taker::FullDisk => OpenOptions::new().write(true).open("/dev/full").expect("/dev/full").into(),
            _ => {
                let (reader, mut writer) = pipe().expect("a pipe");
                match taker {
                    Taker::DeadReader => drop(reader),
                    _ => readers.push(reader),
                }
                if matches!(taker, Taker::FullPipe | Taker::NonBlocking) {
                    fill(&mut writer, taker == Taker::NonBlocking);
                }
                writer.into()
            }
        };
        let (out, err) = (output(), output());
        let child = command.stdin(null()).stdout(out).stderr(err).spawn().expect("vmft could not be started");
        Unheard { child, _readers: readers }
    }

    fn kill(&mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
    }

    fn finish(&mut self, seconds: u64) -> ExitStatus {
        let deadline = Instant::now() + Duration::from_secs(seconds);
        loop {
            match self.child.try_wait().expect("wait") {
                Some(status) => return status,
                None => assert!(Instant::now() < deadline, "it still runs after {seconds} s"),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Unheard {
    fn drop(&mut self) {
        // It may have ended already.
        self.child.kill().ok();
        self.child.wait().expect("wait");
    }
}

/// Writes to a pipe until it takes no more.
fn fill(pipe: &mut PipeWriter, leave_non_blocking: bool) {
    fcntl(&*pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).expect("fcntl");
    while pipe.write(&[b'.'; 4096]).is_ok() {}
    while pipe.write(b".").is_ok() {}
    if !leave_non_blocking {
        fcntl(&*pipe, FcntlArg::F_SETFL(OFlag::empty())).expect("fcntl");
    }
}

/// Sends a request to a control socket. Returns the connection, and the reply if there is one.
fn ask(control: &Path, request: &str) -> Option<(UnixStream, serde_json::Value)> {
    let mut socket = UnixStream::connect(control).ok()?;
    writeln!(socket, "\"{request}\"").ok()?;
    let mut reply = String::new();
    BufReader::new(socket.try_clone().expect("a handle")).read_line(&mut reply).ok()?;
    Some((socket, serde_json::from_str(&reply).ok()?))
}

fn wait_until(what: &str, seconds: u64, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(seconds);
    while !holds() {
        assert!(Instant::now() < deadline, "not after {seconds} s: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn phase(site: &Site, host: Host) -> Option<String> {
    let (_, reply) = ask(&site.control(host), "status")?;
    Some(reply["status"]["phase"].as_str()?.to_owned())
}

/// What happens to a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    PrimaryKilled,
    BackupKilled,
    HandedOver,
}

/// Runs a pair whose output goes nowhere, and one change of it. Returns how long the client waited at most.
fn change_with(site: &Site, change: Change, a_has: Taker, b_has: Taker) -> Duration {
    let mut b = Unheard::start(site.replica(Host::B, &BARE), b_has);
    wait_until("the backup waits", 30, || ask(&site.control(Host::B), "status").is_some());
    let mut a = Unheard::start(site.replica(Host::A, &BARE), a_has);
    wait_until("the pair is open", 30, || phase(site, Host::A).as_deref() == Some("protected"));
    let client = Counter::bare(&site.ns("client"));
    client.wait_for(20, 30);
    let survivor = match change {
        Change::PrimaryKilled => {
            a.kill();
            Host::B
        }
        Change::BackupKilled => {
            b.kill();
            Host::A
        }
        Change::HandedOver => {
            ask(&site.control(Host::A), "failover").expect("a reply");
            assert!(a.finish(20).success());
            Host::B
        }
    };
    client.wait_for(50, 30);
    let seen = client.finish().expect("the client's replies");
    wait_until("the survivor is alone", 10, || phase(site, survivor).as_deref() == Some("alone"));
    ask(&site.control(survivor), "stop").expect("a reply");
    let ended = if survivor == Host::A { &mut a } else { &mut b };
    assert!(ended.finish(20).success());
    seen.gap
}

#[test]
fn whatever_takes_a_replicas_output_the_guest_goes_on() {
    let test = "whatever_takes_a_replicas_output_the_guest_goes_on";
    if !has_guest(test, "bare") || !can_network(test) {
        return;
    }
    let site = Site::new();
    let mut gaps = Vec::new();
    // The takers of the two sides and the changes are of coprime numbers, so that every combination comes.
    for case in 0..cases(18) as usize {
        let change = [Change::PrimaryKilled, Change::BackupKilled, Change::HandedOver][case % 3];
        let taker = TAKERS[case / 3 % TAKERS.len()];
        let other = TAKERS[(case / 3 + case / 18) % TAKERS.len()];
        let gap = change_with(&site, change, taker, other);
        eprintln!("case {case}: {change:?}, A {taker:?}, B {other:?}: the longest wait {gap:?}");
        gaps.push(gap);
    }
    gaps.sort_unstable();
    let at = |percent: usize| gaps[(gaps.len() - 1) * percent / 100];
    eprintln!("{} changes: half of the waits within {:?}, the longest {:?}", gaps.len(), at(50), at(100));
    // The timeout is 1 s, and TCP repeats its segments after up to twice that.
    assert!(at(100) < Duration::from_secs(8), "{:?}", at(100));
}

/// The number of a process's threads.
fn threads(id: u32) -> usize {
    std::fs::read_dir(format!("/proc/{id}/task")).expect("a process that runs").count()
}

#[test]
fn consoles_that_are_closed_or_not_read_keep_no_thread() {
    let test = "consoles_that_are_closed_or_not_read_keep_no_thread";
    if !has_guest(test, "bare") || !can_network(test) {
        return;
    }
    let site = Site::new();
    let (a, _b) = site.pair(&BARE);
    let control = site.control(Host::A);
    let before = threads(a.id());
    for round in 0..4 {
        let consoles: Vec<_> = (0..50).filter_map(|_| ask(&control, "console")).collect();
        let taken = consoles.iter().filter(|(_, reply)| reply == "done").count();
        assert!((1..=16).contains(&taken), "round {round}: {taken} of {} consoles", consoles.len());
        assert!(threads(a.id()) <= before + 2 * 16 + 4);
        drop(consoles);
        wait_until("the threads end", 20, || threads(a.id()) <= before);
    }
    // One that only writes nothing more still reads.
    let (mut half, reply) = ask(&control, "console").expect("a reply");
    assert_eq!(reply, "done");
    half.shutdown(std::net::Shutdown::Write).expect("shutdown");
    half.set_read_timeout(Some(Duration::from_millis(1500))).expect("a timeout");
    let read = half.read(&mut [0; 16]);
    assert!(!matches!(read, Ok(0)), "its connection was closed: {read:?}");
}

#[test]
fn a_hook_that_hangs_is_killed_with_all_it_has_started_and_the_next_change_is_told() {
    let test = "a_hook_that_hangs_is_killed_with_all_it_has_started_and_the_next_change_is_told";
    if !has_guest(test, "bare") || !can_network(test) {
        return;
    }
    let site = Site::new();
    let told = site.dir.join("told");
    let hook = format!(
        "echo $VMFT_STATE >> {told}; test $VMFT_STATE = UNPROTECTED || {{ sleep 1000 & echo $! > {told}.pid; sleep 1000; }}",
        told = told.display()
    );
    let mut b = Vm::start(&mut site.replica(Host::B, &BARE));
    b.wait_for("waiting for a primary", 30);
    let mut a = Vm::start(site.replica(Host::A, &BARE).args(["--hook", &hook, "--hook-seconds", "1"]));
    a.wait_for("READY", 60);
    let changes = || std::fs::read_to_string(&told).unwrap_or_default();
    wait_until("the hook runs", 20, || changes() == "PROTECTED\n");
    drop(b);
    a.wait_for("was killed: it ran for 1s for PROTECTED", 20);
    wait_until("the next change is told", 20, || changes() == "PROTECTED\nUNPROTECTED\n");
    let child = std::fs::read_to_string(format!("{}.pid", told.display())).expect("the child's number");
    wait_until("what it has started is gone", 10, || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.trim())).unwrap_or_default();
        stat.is_empty() || stat.contains(") Z ")
    });
}

#[test]
fn each_line_of_a_log_in_json_says_when_how_grave_and_who() {
    let test = "each_line_of_a_log_in_json_says_when_how_grave_and_who";
    if !has_guest(test, "bare") || !can_network(test) {
        return;
    }
    let site = Site::new();
    let mut b = Vm::start(site.replica(Host::B, &BARE).args(["--log-format", "json"]));
    b.wait_for("waiting for a primary", 30);
    b.terminate();
    let (_, output) = b.finish(20);
    let lines: Vec<serde_json::Value> = output
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
        .collect();
    assert!(lines.len() > 1, "{output}");
    for line in &lines {
        assert!(line["time"].as_str().is_some_and(|time| time.ends_with('Z')), "{line}");
        assert!(line["level"].is_string() && line["message"].is_string(), "{line}");
        assert_eq!(line["vm"], "vm", "{line}");
        assert!(line["role"] == "backup" || line["role"] == "keeper", "{line}");
    }
    assert!(lines.iter().any(|line| line["role"] == "backup"), "{output}");
}
