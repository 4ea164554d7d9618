//! A pair from its operator's side: control sockets, the TOML file, a primary without a backup, forgetting a
//! VM.

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use support::counter::{Counter, tell_bare};
use support::pair::{Host, Site, inside};
use support::row::{BARE, LIVES};
use support::vm::{VMFT, Vm, vmft_in};
use support::{can_network, has_guest};

fn ready(test: &str) -> bool {
    has_guest(test, "bare") && can_network(test)
}

/// Runs a command to its end: exit code, standard output, standard error.
fn run(command: &mut Command) -> (i32, String, String) {
    let output = command.stdin(Stdio::null()).output().expect("vmft");
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    (output.status.code().expect("ended by a signal"), text(&output.stdout), text(&output.stderr))
}

/// `vmft VERB --control SOCKET …`.
fn ask(control: &Path, verb: &[&str]) -> (i32, String, String) {
    run(Command::new(VMFT).args(verb).arg("--control").arg(control))
}

/// The status of a replica as JSON, and the exit code.
fn report(control: &Path) -> (i32, serde_json::Value) {
    let (code, out, errors) = ask(control, &["status", "--json"]);
    (code, serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e} in {out:?}, {errors}")))
}

/// [`report`] once the peer's position is known, which its next heartbeat carries.
fn report_with_peer(control: &Path) -> (i32, serde_json::Value) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let (code, told) = report(control);
        if told["peer_position"] != 0 || Instant::now() > deadline {
            return (code, told);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The answer of a host to a scrape of its metrics.
fn scrape(site: &Site, host: Host, path: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
    let ask = move || {
        let mut tcp = TcpStream::connect("127.0.0.1:9100").expect("connect");
        let mut answer = String::new();
        tcp.write_all(request.as_bytes()).and_then(|()| tcp.read_to_string(&mut answer)).expect("scrape");
        answer
    };
    inside(&site.ns(host.name()), ask).join().expect("scrape")
}

/// Sends everything that is not a request, and checks that the socket belongs to its owner only.
fn talk_nonsense(control: &Path) {
    let mode = std::fs::metadata(control).expect("control socket").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    for nonsense in [&b"\n"[..], b"", b"\"Status\"\n", b"{\"status\":1}\n", &[0xff; 5000], &[b'"'; 64]] {
        let mut socket = UnixStream::connect(control).expect("connect");
        socket.set_read_timeout(Some(Duration::from_secs(10))).expect("timeout");
        // The replica may close the connection before all of it is written.
        socket.write_all(nonsense).and_then(|()| socket.shutdown(std::net::Shutdown::Write)).ok();
        let mut answer = Vec::new();
        socket.read_to_end(&mut answer).ok();
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.is_empty() || answer.contains("refused"), "{answer}");
    }
    // A client that sends nothing and stays connected.
    std::mem::forget(UnixStream::connect(control).expect("connect"));
}

/// What is asked of the wrong side, or without a confirmation, is refused in words that help.
fn check_refusals(at_a: &Path, at_b: &Path) {
    for words in [&["failover"][..], &["stop", "--yes"]] {
        let (code, _, errors) = ask(at_b, words);
        assert!(code == 2 && errors.contains("ask the primary: run `vmft"), "{errors}");
        assert!(errors.contains("on the host of the primary at 10.78.0.1:"), "{errors}");
    }
    let (code, _, errors) = ask(at_a, &["stop"]);
    assert!(code == 2 && errors.contains("this ends VM vm on all its hosts"), "{errors}");
}

/// A backup to which the VM was handed over says that it has no backup, and how it came to run the VM.
fn check_survivor_says_so(at_b: &Path) {
    let (code, _, errors) = ask(at_b, &["failover"]);
    assert!(code == 2 && errors.contains("no backup to hand the VM over to"), "{errors}");
    assert!(errors.contains("alone, without the primary at 10.78.0.1:"), "{errors}");
    let failover = &report(at_b).1["failover"];
    assert!(failover["planned"] == true && failover["running_ms"].is_number(), "{failover}");
    assert!(
        failover["reason"].as_str().expect("text").contains("handed over by the primary at"),
        "{failover}"
    );
    let (_, out, _) = ask(at_b, &["status"]);
    assert!(
        out.starts_with("UNPROTECTED: VM vm, survivor (alone, started as backup), generation 1"),
        "{out}"
    );
    assert!(out.contains("last failover (planned): handed over by the primary at 10.78.0.1:"), "{out}");
}

#[test]
fn a_pair_is_observed_and_handed_over_through_its_control_sockets() {
    if !ready("a_pair_is_observed_and_handed_over_through_its_control_sockets") {
        return;
    }
    let site = Site::new();
    let told_to = |role: &str| site.dir.join(format!("told-{role}"));
    // The command takes long, which must not delay anything.
    let hook = format!(
        "echo $VMFT_STATE $VMFT_VM $VMFT_PHASE $VMFT_GENERATION >>{}$VMFT_ROLE; sleep 1",
        told_to("").display()
    );
    let options = [&BARE[..], &["--hook", &hook, "--metrics", "127.0.0.1:9100"]].concat();
    let (a, mut b) = site.pair(&options);
    let (at_a, at_b) = (site.control(Host::A), site.control(Host::B));
    talk_nonsense(&at_a);
    talk_nonsense(&at_b);
    let client = Counter::bare(&site.ns("client"));
    client.wait_for(20, 20);

    let (code, out, _) = ask(&at_a, &["status"]);
    assert!(code == 0 && out.starts_with("PROTECTED: VM vm, primary (protected), generation 1"), "{out}");
    for (control, role) in [(&at_a, "primary"), (&at_b, "backup")] {
        let (code, told) = report_with_peer(control);
        assert_eq!((code, &told["role"], &told["protected"]), (0, &role.into(), &true.into()), "{told}");
        for count in ["recorded", "acked", "replayed", "outputs_recorded", "position", "peer_position"] {
            assert!(told[count].as_u64().expect(count) > 0, "{count} in {told}");
        }
    }
    let metrics = scrape(&site, Host::A, "/metrics");
    for expected in
        ["protected{vm=\"vm\"} 1\n", "is_primary{vm=\"vm\"} 1\n", "failovers_total{vm=\"vm\"} 0\n"]
    {
        assert!(metrics.contains(&format!("\nvmft_{expected}")), "{expected} in {metrics}");
    }
    assert!(scrape(&site, Host::A, "/").starts_with("HTTP/1.1 404"));
    let mut watch =
        Vm::start(Command::new(VMFT).args(["status", "--watch", "--json", "--control"]).arg(&at_a));
    watch.wait_for("}\n", 10);
    watch.wait_for_again("}\n", 10);
    drop(watch);

    check_refusals(&at_a, &at_b);
    let (code, out, errors) = ask(&at_a, &["failover"]);
    assert!(
        code == 0 && out.contains("the VM runs on the host of the backup at 10.78.0.2:7500"),
        "{out}{errors}"
    );
    b.wait_for(LIVES, 20);
    let (status, output) = a.finish(20);
    assert!(status.success() && output.contains("handed over"), "{output}");
    client.wait_for(50, 20);
    client.finish().unwrap_or_else(|e| panic!("{e}\n{}", b.seen()));
    let (code, told) = report(&at_b);
    assert_eq!((code, &told["phase"]), (1, &"alone".into()), "{told}");
    check_survivor_says_so(&at_b);
    let metrics = scrape(&site, Host::B, "/metrics");
    for expected in ["protected{vm=\"vm\"} 0\n", "is_alone{vm=\"vm\"} 1\n", "failovers_total{vm=\"vm\"} 1\n"]
    {
        assert!(metrics.contains(&format!("\nvmft_{expected}")), "{expected} in {metrics}");
    }
    assert_eq!(ask(&at_b, &["stop", "--yes"]).0, 0);
    let (status, output) = b.finish(20);
    assert!(status.success() && output.contains("the VM has ended: it was stopped"), "{output}");
    let read = |role| std::fs::read_to_string(told_to(role)).expect("what the hook was told");
    assert_eq!(read("primary"), "PROTECTED vm protected 1\n");
    assert_eq!(read("backup"), "PROTECTED vm protected 1\nUNPROTECTED vm alone 1\n");
    assert!(!at_a.exists() && !at_b.exists());
}

#[test]
fn stop_ends_both_sides_of_a_pair() {
    if !ready("stop_ends_both_sides_of_a_pair") {
        return;
    }
    let site = Site::new();
    let (a, b) = site.pair(&BARE);
    let (code, _, errors) = ask(&site.control(Host::A), &["stop", "--yes"]);
    assert_eq!(code, 0, "{errors}");
    for side in [a, b] {
        let (status, output) = side.finish(20);
        assert!(status.success() && output.contains("the VM has ended: it was stopped"), "{output}");
    }
    // The VM can be started again.
    let (a, b) = site.pair(&BARE);
    assert_eq!(report(&site.control(Host::A)).1["generation"], 2);
    drop((a, b));
}

#[test]
fn a_primary_from_a_file_runs_without_a_backup() {
    if !ready("a_primary_from_a_file_runs_without_a_backup") {
        return;
    }
    let site = Site::new();
    let control = site.control(Host::A);
    let file = site.dir.join("primary.toml");
    let text = format!(
        "name = 'vm'\nstore = '{}'\nkeys = '{}'\ncontrol = '{}'\nunprotected = true\n\
         [machine]\nguest = 'bare'\nmemory_mib = 32\ntap = 'tap0'\nip = '{}'\n",
        site.store_url("a"),
        site.keys("a").display(),
        control.display(),
        support::net::GUEST_IP
    );
    std::fs::write(&file, text).unwrap();
    let mut vm = Vm::start(vmft_in(&site.ns("a")).args(["primary", "--config"]).arg(&file));
    vm.wait_for("READY", 60);
    talk_nonsense(&control);
    let (code, out, errors) = ask(&control, &["status"]);
    assert!(code == 1 && out.starts_with("UNPROTECTED: VM vm, primary (alone), generation 1"), "{out}");
    assert!(errors.contains("not protected"), "{errors}");
    let (code, _, errors) = ask(&control, &["failover"]);
    assert!(code == 2 && errors.contains("no backup"), "{errors}");

    let mut console = Vm::start(Command::new(VMFT).args(["console", "--control"]).arg(&control));
    std::thread::sleep(Duration::from_millis(500));
    tell_bare(&site.ns("client"), "reboot");
    console.wait_for("READY", 20);
    console.type_in("text that the guest does not read\x01x");
    assert!(console.finish(10).0.success());

    let client = Counter::bare(&site.ns("client"));
    client.wait_for(20, 20);
    client.finish().unwrap_or_else(|e| panic!("{e}\n{}", vm.seen()));
    // A second primary does not take over the socket.
    let (code, _, errors) = run(vmft_in(&site.ns("b")).args(["primary", "--config"]).arg(&file));
    assert!(code != 0 && !errors.contains("READY"), "{errors}");
    assert_eq!(ask(&control, &["stop", "--yes"]).0, 0);
    let (status, output) = vm.finish(20);
    assert!(status.success() && output.contains("the VM has ended: it was stopped"), "{output}");
    let (code, _, errors) = ask(&control, &["status"]);
    assert!(code == 3 && errors.contains("control socket"), "{errors}");
}

#[test]
fn a_vm_whose_hosts_have_died_starts_again_once_it_is_forgotten() {
    if !ready("a_vm_whose_hosts_have_died_starts_again_once_it_is_forgotten") {
        return;
    }
    let site = Site::new();
    drop(site.pair(&BARE));
    let start = || Vm::start(&mut site.replica(Host::A, &BARE));
    let (status, output) = start().finish(30);
    assert_eq!(status.code(), Some(7), "{output}");
    assert!(output.contains("vmft forget --name vm --store 'raft://"), "{output}");
    let forget_as = |party: &str, name: &str, yes: &[&str]| {
        let store = site.store_url(party);
        run(vmft_in(&site.ns("a")).args(["forget", "--name", name, "--store", &store]).args(yes))
    };
    let forget = |name: &str, yes: &[&str]| forget_as("admin", name, yes);
    let (code, _, errors) = forget_as("a", "vm", &["--yes"]);
    assert!(code == 2 && errors.contains("use an operator's keys"), "{errors}");
    let (code, _, errors) = forget("vm", &[]);
    assert!(code == 2 && errors.contains("generation 1 of VM vm may run on host"), "{errors}");
    assert_eq!(start().finish(30).0.code(), Some(7));
    let (code, out, errors) = forget("vm", &["--yes"]);
    assert!(code == 0 && out.contains("it can be started"), "{out}{errors}");
    let (code, out, _) = forget("vm", &[]);
    assert!(code == 0 && out.contains("already forgotten"), "{out}");
    let (code, _, errors) = forget("nobody", &["--yes"]);
    assert!(code == 2 && errors.contains("knows no VM nobody"), "{errors}");
    let (a, b) = site.pair(&BARE);
    assert_eq!(report(&site.control(Host::B)).1["generation"], 2);
    drop((a, b));
}

#[test]
fn the_console_of_a_pair_takes_what_is_typed_on_the_side_that_lives() {
    const TEST: &str = "the_console_of_a_pair_takes_what_is_typed_on_the_side_that_lives";
    if !has_guest(TEST, "linux") || !can_network(TEST) {
        return;
    }
    let site = Site::new();
    let (a, mut b) = site.pair(&["--guest", "linux", "--cmdline", "vmft.noservices"]);
    let attach = |host| {
        let console = Vm::start(Command::new(VMFT).args(["console", "--control"]).arg(site.control(host)));
        std::thread::sleep(Duration::from_millis(500));
        console
    };
    let mut at_a = attach(Host::A);
    at_a.type_in("n=41; echo $((n * 100))\n");
    at_a.wait_for("4100", 30);
    // The backup ignores what is typed before it lives.
    let mut at_b = attach(Host::B);
    at_b.type_in("n=0\n");
    std::thread::sleep(Duration::from_millis(500));
    drop(a);
    b.wait_for("going live", 20);
    drop(at_a);
    // The shell is the same as before the failover.
    at_b.type_in("echo $((n + 1))\n");
    at_b.wait_for("\n42\r", 30);
    at_b.type_in("\x01x");
    assert!(at_b.finish(10).0.success());
    // Another client can attach, and end the run from the shell.
    let mut again = attach(Host::B);
    again.type_in("poweroff\n");
    again.finish(30);
    let (status, output) = b.finish(30);
    assert!(status.success() && output.contains("the VM has ended"), "{output}");
}
