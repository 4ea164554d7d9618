//! The Linux guest: it boots to its services, is used from another host, keeps its files, and is
//! deterministic.

mod support;

use std::process::{Command, Stdio};

use support::net::{GUEST, GUEST_IP, Hosts};
use support::vm::{VMFT, Vm, vmft_in};
use support::{can_network, digests, has, has_guest, skip};

fn scratch(name: &str) -> std::path::PathBuf {
    std::env::temp_dir().join(format!("vmft-linux-{}-{name}", std::process::id()))
}

#[test]
fn redis_and_the_web_server_are_used_from_another_host() {
    const TEST: &str = "redis_and_the_web_server_are_used_from_another_host";
    if !has_guest(TEST, "linux") || !can_network(TEST) {
        return;
    }
    let hosts = Hosts::new();
    let args = ["run", "--guest", "linux", "--tap", "tap0", "--ip", GUEST_IP];
    let mut vm = Vm::start(vmft_in(&hosts.host).args(args));
    vm.wait_for("READY", 120);
    eprintln!("{TEST}: the guest is ready");
    let set = ["-h", GUEST, "-t", "set,get,incr", "-n", "20000", "-c", "10", "--csv"];
    let result = hosts.client("redis-benchmark", &set);
    assert_eq!(result.lines().count(), 4, "{result}");
    let file = scratch("50M");
    let url = format!("http://{GUEST}/50M");
    hosts.client("curl", &["-sSf", "-o", file.to_str().unwrap(), &url]);
    let got = std::fs::read(&file).unwrap();
    assert_eq!(got.len(), 50 << 20);
    assert!(got.iter().all(|b| *b == 0), "the download is damaged");
    std::fs::remove_file(file).unwrap();
    vm.type_in("poweroff\n");
    let (status, output) = vm.finish(60);
    assert!(status.success(), "{output}");
}

#[test]
fn a_file_on_ext4_survives_a_reboot() {
    const TEST: &str = "a_file_on_ext4_survives_a_reboot";
    if !has_guest(TEST, "linux") {
        return;
    }
    for tool in ["mkfs.ext4", "e2fsck"] {
        if !has(tool) {
            return skip(TEST, &format!("needs {tool} (scripts/test installs e2fsprogs)"));
        }
    }
    let disk = scratch("disk");
    let image = disk.to_str().unwrap();
    std::fs::File::create(&disk).and_then(|f| f.set_len(64 << 20)).unwrap();
    let run = |program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{program}: {text}{}", String::from_utf8_lossy(&output.stderr));
    };
    run("mkfs.ext4", &["-q", image]);
    // The first boot writes the file and reboots, the second checks it.
    let script = "if [ -f /disk/sum ]; then cd /disk; sha256sum -c sum && echo INTACT; \
                  else seq 1 200000 >/disk/file; cd /disk; sha256sum file >sum; cd /; umount /disk; reboot -f; fi";
    let cmdline = format!("vmft.noservices vmft.exec=\"{script}\"");
    let args = ["run", "--guest", "linux", "--disk", image, "--cmdline", &cmdline];
    let vm = Vm::start(Command::new(VMFT).args(args));
    let (status, output) = vm.finish(180);
    assert!(status.success() && output.contains("INTACT"), "{output}");
    run("e2fsck", &["-fn", image]);
    std::fs::remove_file(disk).unwrap();
}

#[test]
fn two_boots_and_a_restored_one_have_the_same_digests() {
    const TEST: &str = "two_boots_and_a_restored_one_have_the_same_digests";
    if !has_guest(TEST, "linux") {
        return;
    }
    const STOPS: &str =
        "1000000,10000000,20000000,50000000,100000000,150000000,200000000,300000000,400000000,500000000";
    let file = scratch("saved");
    let file = file.to_str().unwrap();
    let boot = |extra: &[&str]| {
        let args = ["run", "--guest", "linux", "--digest-at", STOPS, "--stop-at", "500000000"];
        let output = Command::new(VMFT).args(args).args(extra).stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        eprintln!("{TEST}: a run of 500 M instructions is done");
        digests(&String::from_utf8_lossy(&output.stderr))
    };
    let first = boot(&[]);
    assert_eq!(first.len(), 10, "{first:?}");
    assert_eq!(boot(&["--save-at", "200000000", "--save", file]), first);
    // The interpreter continues what translated code has begun, with the same digests.
    let rest = boot(&["--restore", file, "--cpu", "interpreter"]);
    assert_eq!(rest, first[6..]);
    std::fs::remove_file(file).unwrap();
}
