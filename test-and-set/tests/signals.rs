//! Signals to `vmft-store serve`.
#![allow(clippy::disallowed_methods)]

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use test_and_set::keys::make_set;

#[test]
fn a_member_ends_in_order_when_told_and_for_no_other_signal() {
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path();
    make_set(&dir.join("keys"), &[1], &["a".into()], &["admin".into()]).expect("keys");
    let port =
        std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").port();
    let address = format!("127.0.0.1:{port}");
    let mut member = Command::new(env!("CARGO_BIN_EXE_vmft-store"))
        .args(["serve", "--id", "1", "--listen", &address, "--peers", &format!("1={address}"), "--data"])
        .arg(dir.join("data"))
        .arg("--keys")
        .arg(dir.join("keys/1"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("vmft-store");
    // Either stream says when it serves; a line is enough to know that the signals are caught.
    let (sender, lines) = std::sync::mpsc::channel();
    let out = member.stdout.take().map(|s| Box::new(s) as Box<dyn std::io::Read + Send>);
    let err = member.stderr.take().map(|s| Box::new(s) as Box<dyn std::io::Read + Send>);
    for stream in [out, err].into_iter().flatten() {
        let sender = sender.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                sender.send(line).ok();
            }
        });
    }
    while !lines.recv_timeout(Duration::from_secs(20)).expect("the member serves").contains("serves on") {}
    let id = Pid::from_child(&member);
    for signal in [Signal::HUP, Signal::QUIT, Signal::USR1, Signal::USR2, Signal::ALARM, Signal::IO] {
        kill_process(id, signal).expect("kill");
    }
    std::thread::sleep(Duration::from_millis(300));
    assert!(member.try_wait().expect("wait").is_none(), "a signal has ended it");
    kill_process(id, Signal::TERM).expect("kill");
    let deadline = Instant::now() + Duration::from_secs(20);
    let status = loop {
        if let Some(status) = member.try_wait().expect("wait") {
            break status;
        }
        assert!(Instant::now() < deadline, "it does not end");
        std::thread::sleep(Duration::from_millis(10));
    };
    assert!(status.success(), "{status}");
}
