//! Where vmft's output cannot go, and devices that fail: a command says so and does not panic.

mod support;

use std::fs::{File, OpenOptions, Permissions};
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use support::net::{GUEST_IP, Hosts, ip};
use support::vm::{VMFT, Vm, vmft_in};
use support::{can_network, has_guest, skip};

const BARE: [&str; 5] = ["--guest", "bare", "--memory-mib", "16", "--cmdline"];

/// A directory that is removed with what is in it.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("vmft-output-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

fn full() -> Stdio {
    OpenOptions::new().write(true).open("/dev/full").unwrap().into()
}

/// A pipe whose reader is gone.
fn closed() -> Stdio {
    std::io::pipe().unwrap().1.into()
}

fn bare<'a>(command: &'a str, cmdline: &'a str) -> Vec<&'a str> {
    [&[command][..], &BARE, &[cmdline]].concat()
}

/// The exit code with these as standard output and standard error.
fn code(args: &[&str], out: Stdio, errors: Stdio) -> i32 {
    let mut vmft = Command::new(VMFT);
    let status = vmft.args(args).stdin(Stdio::null()).stdout(out).stderr(errors).status().unwrap();
    status.code().expect("ended by a signal")
}

#[test]
fn a_closed_pipe_ends_quietly_and_a_full_file_with_an_error() {
    const TEST: &str = "a_closed_pipe_ends_quietly_and_a_full_file_with_an_error";
    if !has_guest(TEST, "bare") {
        return;
    }
    let dir = Scratch::new("pipes");
    let log = dir.path("log");
    let record =
        [&bare("record", "workload=mem mib=1")[..], &["--stop-at", "5000000", "--log", &log]].concat();
    assert_eq!(code(&record, Stdio::null(), Stdio::null()), 0);
    let to_stdout: [&[&str]; 7] = [
        &["log", "show", &log],
        &["log", "stat", &log],
        &["log", "stat", "--json", &log],
        &["doctor"],
        &["doctor", "--json"],
        &["--help"],
        &["replay", &log, "--digest-at", "100000"],
    ];
    for args in to_stdout {
        assert_eq!(code(args, closed(), Stdio::null()), 0, "{args:?}");
        assert_eq!(code(args, full(), Stdio::null()), 3, "{args:?}");
        assert_eq!(code(args, full(), full()), 3, "{args:?}");
    }
    let run = bare("run", "workload=hello");
    let other = dir.path("again");
    let again = [&bare("record", "workload=hello")[..], &["--log", &other]].concat();
    let to_stderr: [&[&str]; 3] = [&run, &again, &["replay", &log]];
    for args in to_stderr {
        assert_eq!(code(args, Stdio::null(), full()), 3, "{args:?}");
    }
    // What fails keeps its code.
    assert_eq!(code(&bare("run", "workload=panic"), Stdio::null(), full()), 4);
    assert_eq!(code(&["log", "stat", "/nonexistent"], full(), full()), 2);
    assert_eq!(code(&["--nonexistent"], full(), full()), 2);
    assert_eq!(code(&["replay", &log], Stdio::null(), closed()), 0);
    assert_eq!(code(&run, Stdio::null(), closed()), 0);
}

#[test]
fn a_full_pipe_that_others_made_non_blocking_is_waited_for() {
    const TEST: &str = "a_full_pipe_that_others_made_non_blocking_is_waited_for";
    if !has_guest(TEST, "bare") {
        return;
    }
    let (mut reader, writer) = std::io::pipe().unwrap();
    let writer = OwnedFd::from(writer);
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    let full = writer.try_clone().unwrap();
    // The guest prints more than the pipe holds before it is read.
    let args = [&bare("run", "workload=spin every=100")[..], &["--stop-at", "30000000"]].concat();
    // The command, with its copy of the pipe, is dropped here.
    let vmft = {
        let mut vmft = Command::new(VMFT);
        vmft.args(args).stdin(Stdio::null()).stdout(writer).stderr(Stdio::piped()).spawn().unwrap()
    };
    let mut printed = Vec::new();
    // Nothing is read until the pipe is full: this end of it, which is non-blocking as well, then takes nothing more.
    let pipe_bytes = 65_536;
    while poll(&mut [PollFd::new(full.as_fd(), PollFlags::POLLOUT)], PollTimeout::ZERO).unwrap() > 0 {
        std::thread::yield_now();
    }
    drop(full);
    reader.read_to_end(&mut printed).unwrap();
    let output = vmft.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(printed.len() > 2 * pipe_bytes, "{} bytes", printed.len());
}

#[test]
fn a_run_whose_disk_or_log_fails_ends_with_three_and_the_cause() {
    const TEST: &str = "a_run_whose_disk_or_log_fails_ends_with_three_and_the_cause";
    if !has_guest(TEST, "bare") {
        return;
    }
    if !nix::unistd::geteuid().is_root() {
        return skip(TEST, "needs root, to mount a small file system");
    }
    let dir = Scratch::new("full");
    // The image is larger than the file system that it is in.
    let small = |command: &str| {
        let script = format!(
            "mount -t tmpfs -o size=512k none {0} && truncate -s 4M {0}/disk && exec {VMFT} {command}",
            dir.0.display()
        );
        let output =
            Command::new("unshare").args(["--mount", "sh", "-c", &script]).stdin(Stdio::null()).output();
        let output = output.unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let machine = "--guest bare --memory-mib 32 --cmdline 'workload=disk mib=4'";
    let (disk, log) = (dir.path("disk"), dir.path("log"));
    let run = format!("run {machine} --disk {disk}");
    let logs = Scratch::new("logs");
    for round in 0..4 {
        // What is seen first, the failure or the end of the guest's wait, depends on the moment.
        let record = format!("record {machine} --disk {disk} --log {}", logs.path(&round.to_string()));
        for command in [&run, &record] {
            let (code, errors) = small(command);
            assert_eq!(code, Some(3), "{errors}");
            assert!(errors.contains("disk") && errors.contains("No space left"), "{errors}");
        }
    }
    let spin = "--guest bare --memory-mib 16 --cmdline 'workload=spin every=100'";
    let (code, errors) = small(&format!("record {spin} --log {log} >/dev/null"));
    assert_eq!(code, Some(3), "{errors}");
    assert!(errors.contains("cannot write log") && errors.contains("No space left"), "{errors}");
}

#[test]
fn a_disk_that_is_cut_ends_the_run_with_three() {
    const TEST: &str = "a_disk_that_is_cut_ends_the_run_with_three";
    if !has_guest(TEST, "bare") {
        return;
    }
    let dir = Scratch::new("cut");
    let disk = dir.path("disk");
    let make = || File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    for command in ["run", "record"] {
        make();
        let mut vmft = Command::new(VMFT);
        vmft.args(bare(command, "workload=disk mib=1")).args(["--disk", &disk]);
        if command == "record" {
            vmft.args(["--log", &dir.path("log")]);
        }
        let mut vm = Vm::start(&mut vmft);
        vm.wait_for("disk 1", 20);
        OpenOptions::new().write(true).open(&disk).unwrap().set_len(4096).unwrap();
        let (status, output) = vm.finish(20);
        assert_eq!(status.code(), Some(3), "{output}");
        assert!(output.contains("it has 4096 bytes"), "{output}");
    }
    assert!(Path::new(&dir.path("log")).exists());
}

#[test]
fn a_tap_that_is_deleted_ends_the_run_with_three() {
    const TEST: &str = "a_tap_that_is_deleted_ends_the_run_with_three";
    if !can_network(TEST) || !has_guest(TEST, "bare") {
        return;
    }
    let dir = Scratch::new("tap");
    for command in ["run", "record"] {
        let hosts = Hosts::new();
        let mut vmft = vmft_in(&hosts.host);
        vmft.args(bare(command, "hz=19")).args(["--tap", "tap0", "--ip", GUEST_IP]);
        if command == "record" {
            vmft.args(["--log", &dir.path("log")]);
        }
        let mut vm = Vm::start(&mut vmft);
        vm.wait_for("READY", 20);
        ip(&["-n", &hosts.host, "link", "delete", "tap0"]);
        let (status, output) = vm.finish(20);
        assert_eq!(status.code(), Some(3), "{output}");
        assert!(output.contains("tap tap0 cannot be used any more"), "{output}");
    }
}

#[test]
fn a_guest_that_cannot_print_the_text_ends_the_run_with_the_reason() {
    const TEST: &str = "a_guest_that_cannot_print_the_text_ends_the_run_with_the_reason";
    if !has_guest(TEST, "bare") {
        return;
    }
    let until = |cmdline: &str, more: &[&str]| {
        let args = [&bare("run", cmdline)[..], &["--until", "READY"], more].concat();
        let output = Command::new(VMFT).args(args).stdin(Stdio::null()).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    for (cmdline, more, reason) in [
        ("hz=19", &[][..], "it has no network, and standard input has ended"),
        ("hz=19", &["--within", "1"], "not within 1 s"),
        ("workload=hello", &[], "it has ended"),
        ("workload=spin", &["--stop-at", "1000000"], "the run was stopped"),
    ] {
        let (code, errors) = until(cmdline, more);
        assert_eq!(code, Some(9), "{cmdline}: {errors}");
        assert!(errors.contains("\"READY\"") && errors.contains(reason), "{cmdline}: {errors}");
    }
    let (code, errors) = until("workload=panic", &[]);
    assert_eq!(code, Some(4), "{errors}");
}

#[test]
fn digests_are_in_the_summary_and_those_that_were_not_reached_are_named() {
    const TEST: &str = "digests_are_in_the_summary_and_those_that_were_not_reached_are_named";
    if !has_guest(TEST, "bare") {
        return;
    }
    let dir = Scratch::new("digests");
    let json = dir.path("summary");
    let args =
        [&bare("run", "workload=hello")[..], &["--digest-at", "1000,900000000", "--summary-json", &json]];
    let output = Command::new(VMFT).args(args.concat()).stdin(Stdio::null()).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let summary: serde_json::Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    let found = summary["digests"].as_array().unwrap();
    let line = format!("1000 {}", found[0]["digest"].as_str().unwrap());
    assert_eq!((found.len(), found[0]["position"].as_u64()), (1, Some(1000)));
    assert_eq!(support::digests(&errors), [line]);
    assert!(errors.contains("no digest at 900000000"), "{errors}");
}

/// The permissions of a file.
fn mode(path: &str) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn logs_and_saved_machines_are_private_whatever_the_umask_is() {
    const TEST: &str = "logs_and_saved_machines_are_private_whatever_the_umask_is";
    if !has_guest(TEST, "bare") {
        return;
    }
    let dir = Scratch::new("private");
    for umask in ["000", "077", "777"] {
        let (log, saved) = (dir.path(&format!("log-{umask}")), dir.path("saved"));
        std::fs::write(&saved, "old").unwrap();
        std::fs::set_permissions(&saved, Permissions::from_mode(0o666)).unwrap();
        let script = format!("umask {umask} && exec \"$@\"");
        let output = Command::new("sh")
            .args(["-c", &script, "sh", VMFT])
            .args(bare("record", "workload=spin"))
            .args(["--log", &log, "--save-at", "100000", "--save", &saved, "--stop-at", "200000"])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!((mode(&log), mode(&saved)), (0o600, 0o600), "umask {umask}");
    }
}

#[test]
fn what_a_log_names_is_opened_only_if_it_is_a_file_and_shown_without_control_characters() {
    const TEST: &str = "what_a_log_names_is_opened_only_if_it_is_a_file_and_shown_without_control_characters";
    if !has_guest(TEST, "bare") {
        return;
    }
    let dir = Scratch::new("named");
    let (log, kernel) = (dir.path("log"), dir.path("kernel\x1b[2Jevil"));
    std::fs::copy(support::image("bare", "kernel"), &kernel).unwrap();
    let record =
        ["record", "--kernel", &kernel, "--memory-mib", "16", "--cmdline", "workload=hello", "--log", &log];
    assert_eq!(code(&record, Stdio::null(), Stdio::null()), 0);
    let output = |args: &[&str]| {
        let output = Command::new(VMFT).args(args).stdin(Stdio::null()).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        assert!(!text.contains(&0x1b), "{args:?}");
        (output.status.code(), String::from_utf8(text).unwrap())
    };
    let (code, text) = output(&["log", "stat", &log]);
    assert!(code == Some(0) && text.contains("\\u{1b}[2Jevil"), "{text}");
    assert_eq!(output(&["replay", &log]).0, Some(0));
    std::fs::remove_file(&kernel).unwrap();
    nix::unistd::mkfifo(kernel.as_str(), nix::sys::stat::Mode::S_IRUSR).unwrap();
    for elsewhere in
        [&[][..], &["--kernel", "/dev/zero"], &["--initrd", "/dev/zero"], &["--disk", "/dev/zero"]]
    {
        let (code, text) = output(&[&["replay", &log], elsewhere].concat());
        assert!(code == Some(2) && text.contains("is no regular file"), "{elsewhere:?}: {text}");
    }
    // Errors do not show them either.
    let (code, text) = output(&["log", "stat", "/nonexistent\x1b[2J"]);
    assert!(code == Some(2) && text.contains("\\u{1b}[2J"), "{text}");
}

#[test]
fn a_crash_leaves_no_core_dump() {
    const TEST: &str = "a_crash_leaves_no_core_dump";
    if !has_guest(TEST, "bare") {
        return;
    }
    let mut shell = Command::new("sh");
    let shell = shell.args(["-c", "ulimit -c unlimited && exec \"$@\"", "sh", VMFT]);
    let mut vm = Vm::start(shell.args(bare("run", "hz=19")));
    vm.wait_for("only the console is served", 20);
    vm.signal(nix::sys::signal::Signal::SIGABRT);
    let (status, output) = vm.finish(20);
    assert_eq!((status.code(), status.core_dumped()), (None, false), "{output}");
}
