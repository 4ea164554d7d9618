//! Rows of the fault table with a disk: Linux writes to a file system, of which each host has a copy.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use support::pair::{Host, Site};
use support::row::{LIVES, trigger};
use support::vm::{Vm, under};
use support::{can_network, has, has_guest, skip};

/// How many files the guest writes, one after the other. It reports each after it has synchronised it.
const FILES: u32 = 60;
/// Lines in a file. All lines differ.
const LINES: u32 = 10_000;

/// Makes both hosts' copies of an empty file system. `None`: the test cannot run here, and is skipped.
fn disks(test: &str) -> Option<(Site, [PathBuf; 2])> {
    if !has_guest(test, "linux") || !can_network(test) {
        return None;
    }
    for tool in ["mkfs.ext4", "e2fsck", "debugfs"] {
        if !has(tool) {
            skip(test, &format!("needs {tool} (scripts/test installs e2fsprogs)"));
            return None;
        }
    }
    let site = Site::new();
    let disks = ["a", "b"].map(|host| site.dir.join(format!("{host}.img")));
    let blank = site.dir.join("blank.img");
    std::fs::File::create(&blank).and_then(|f| f.set_len(64 << 20)).expect("image");
    tool("mkfs.ext4", &["-q", "-E", "lazy_itable_init=0", &name(&blank)]);
    for disk in &disks {
        tool("cp", &["--sparse=always", &name(&blank), &name(disk)]);
    }
    Some((site, disks))
}

fn name(path: &Path) -> String {
    path.display().to_string()
}

fn tool(program: &str, args: &[&str]) -> Vec<u8> {
    let output = Command::new(program).args(args).output().expect(program);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program}: {}{said}", String::from_utf8_lossy(&output.stdout));
    output.stdout
}

/// The command of a side whose guest writes files.
fn writer(site: &Site, host: Host, disk: &Path) -> Command {
    let write = format!(
        "cd /disk; for i in $(seq 1 {FILES}); do seq $((i*{LINES})) $((i*{LINES}+{LINES}-1)) >f$i; sync; \
         echo WROTE $i; done; cd /; umount /disk"
    );
    let cmdline = format!("vmft.noservices vmft.exec=\"{write}\"");
    site.replica(host, &["--guest", "linux", "--disk", &name(disk), "--cmdline", &cmdline])
}

/// The command of a side whose disk image is on a file system that is soon full.
fn writer_on_a_small_host(site: &Site, host: Host, disk: &Path) -> Command {
    const ROOM_KIB: u64 = 1024;
    use std::os::unix::fs::MetadataExt;
    let used_kib = std::fs::metadata(disk).expect("image").blocks() / 2;
    let small = site.dir.join(format!("small-{}", host.name()));
    std::fs::create_dir(&small).expect("directory");
    let copy = small.join("disk.img");
    // `ip netns exec` gives its command a mount namespace of its own, so the mount ends with the command.
    let then = format!(
        "mount -t tmpfs -o size={}k tmpfs {small} && cp --sparse=always {disk} {copy} && exec \"$@\"",
        used_kib + ROOM_KIB,
        small = name(&small),
        disk = name(disk),
        copy = name(&copy)
    );
    under(writer(site, host, &copy), &["sh", "-c", &then, "sh"])
}

/// The numbers of the files that the guest has reported as written.
fn written(output: &str) -> Vec<u32> {
    let numbers = output.lines().filter_map(|line| line.trim().strip_prefix("WROTE "));
    numbers.filter_map(|n| n.parse().ok()).collect()
}

/// Checks that the guest has written everything and powered off, and that the survivor's copy has all files.
fn check_survivor(survivor: Vm, disk: &Path) -> String {
    let (status, output) = survivor.finish(120);
    assert!(status.success() && output.contains("EXIT 0"), "{output}");
    tool("e2fsck", &["-fn", &name(disk)]);
    for i in 1..=FILES {
        let file = tool("debugfs", &["-R", &format!("cat f{i}"), &name(disk)]);
        let wanted: String = (i * LINES..(i + 1) * LINES).map(|n| format!("{n}\n")).collect();
        assert!(file == wanted.as_bytes(), "file {i} is damaged");
    }
    output
}

fn sidecar(disk: &Path) -> String {
    std::fs::read_to_string(format!("{}.vmft", disk.display())).expect("sidecar")
}

#[test]
fn writes_that_are_in_flight_when_the_primary_dies_are_not_lost() {
    const TEST: &str = "writes_that_are_in_flight_when_the_primary_dies_are_not_lost";
    for case in 0..support::cases(2).min(30) {
        let Some((site, [disk_a, disk_b])) = disks(TEST) else { return };
        let mut b = Vm::start(&mut writer(&site, Host::B, &disk_b));
        b.wait_for("waiting for a primary", 30);
        let mut a = Vm::start(&mut writer(&site, Host::A, &disk_a));
        a.wait_for(&format!("WROTE {}", 3 + case * 7 % 40), 180);
        std::thread::sleep(Duration::from_millis(case * 13 % 50));
        a.signal(nix::sys::signal::Signal::SIGKILL);
        let (_, said) = a.finish(10);
        b.wait_for(LIVES, 20);
        let acknowledged = written(&said).last().copied().expect("a file");
        let output = check_survivor(b, &disk_b);
        let requests = output.lines().find_map(|l| l.split_once("requests=").map(|(_, n)| n.to_owned()));
        let went_on = written(&output);
        eprintln!("{acknowledged} files were acknowledged, {requests:?} requests issued again, {went_on:?}");
        assert!(went_on[0] <= acknowledged + 1, "{went_on:?} follows {acknowledged}");
        assert!(went_on.windows(2).all(|pair| pair[1] == pair[0] + 1), "{went_on:?}");
        assert!(sidecar(&disk_a).contains("\"in_use\": true"), "{}", sidecar(&disk_a));
        assert!(sidecar(&disk_b).contains("\"in_use\": false"), "{}", sidecar(&disk_b));
        let (status, output) = Vm::start(&mut writer(&site, Host::A, &disk_a)).finish(30);
        assert_eq!(status.code(), Some(2), "{output}");
        assert!(output.contains("the newest copy of disk-0"), "{output}");
    }
}

#[test]
fn a_backup_whose_disk_fails_says_so_and_never_lives() {
    const TEST: &str = "a_backup_whose_disk_fails_says_so_and_never_lives";
    let Some((site, [disk_a, disk_b])) = disks(TEST) else { return };
    let mut b = Vm::start(&mut writer_on_a_small_host(&site, Host::B, &disk_b));
    b.wait_for("waiting for a primary", 30);
    let mut a = Vm::start(&mut writer(&site, Host::A, &disk_a));
    a.wait_for(LIVES, 180);
    assert!(a.seen().contains("it has failed") && a.seen().contains("No space left"), "{}", a.seen());
    let (status, output) = b.finish(20);
    assert_eq!(status.code(), Some(3), "{output}");
    assert!(output.contains("No space left") && !output.contains(LIVES), "{output}");
    check_survivor(a, &disk_a);
}

#[test]
fn a_primary_whose_disk_fails_lets_its_backup_go_on() {
    const TEST: &str = "a_primary_whose_disk_fails_lets_its_backup_go_on";
    let Some((site, [disk_a, disk_b])) = disks(TEST) else { return };
    let mut b = Vm::start(&mut writer(&site, Host::B, &disk_b));
    b.wait_for("waiting for a primary", 30);
    let a = Vm::start(&mut writer_on_a_small_host(&site, Host::A, &disk_a));
    b.wait_for(LIVES, 180);
    let (status, output) = a.finish(20);
    assert_eq!(status.code(), Some(3), "{output}");
    assert!(output.contains("No space left") && !output.contains(LIVES), "{output}");
    check_survivor(b, &disk_b);
}

#[test]
fn a_request_that_is_in_flight_when_the_primary_dies_is_issued_again() {
    const TEST: &str = "a_request_that_is_in_flight_when_the_primary_dies_is_issued_again";
    let Some((site, [disk_a, disk_b])) = disks(TEST) else { return };
    if !cfg!(debug_assertions) {
        return skip(TEST, "needs failpoints, which a release build does not have");
    }
    let mut b = Vm::start(&mut writer(&site, Host::B, &disk_b));
    b.wait_for("waiting for a primary", 30);
    let caught = format!("disk:{}", site.dir.join("disk").display());
    let mut a = Vm::start(writer(&site, Host::A, &disk_a).env("VMFT_FAILPOINT", caught));
    a.wait_for("WROTE 5", 180);
    // From now on A's disk does not finish any request, and the guest waits for it.
    trigger(&site, "disk");
    std::thread::sleep(Duration::from_millis(300));
    a.signal(nix::sys::signal::Signal::SIGKILL);
    a.finish(10);
    b.wait_for("going live", 20);
    let requests = b.seen().lines().find_map(|line| line.split_once("requests=")).expect("a number").1;
    assert!(requests.trim().parse::<u32>().expect("a number") > 0, "no request was in flight");
    check_survivor(b, &disk_b);
}

/// Cuts a copy of the disk short while the guest writes: that host fails, and the other side has everything.
fn check_shortened_image(test: &str, victim: Host) {
    let Some((site, disks)) = disks(test) else { return };
    let mut b = Vm::start(&mut writer(&site, Host::B, &disks[1]));
    b.wait_for("waiting for a primary", 30);
    let mut a = Vm::start(&mut writer(&site, Host::A, &disks[0]));
    a.wait_for("WROTE 5", 180);
    let image = std::fs::OpenOptions::new().write(true).open(&disks[victim as usize]).expect("image");
    image.set_len(1 << 20).expect("shortened");
    let (loser, mut survivor) = match victim {
        Host::A => (a, b),
        Host::B => (b, a),
    };
    survivor.wait_for(LIVES, 60);
    let (status, output) = loser.finish(20);
    assert_eq!(status.code(), Some(3), "{output}");
    assert!(output.contains("it has 1048576 bytes, and had 67108864 at the start"), "{output}");
    assert!(!output.contains(LIVES), "{output}");
    check_survivor(survivor, &disks[1 - victim as usize]);
}

#[test]
fn a_primary_whose_image_is_shortened_lets_its_backup_go_on() {
    check_shortened_image("a_primary_whose_image_is_shortened_lets_its_backup_go_on", Host::A);
}

#[test]
fn a_backup_whose_image_is_shortened_never_lives() {
    check_shortened_image("a_backup_whose_image_is_shortened_never_lives", Host::B);
}

#[test]
fn an_image_that_was_cut_off_is_refused_at_the_start() {
    const TEST: &str = "an_image_that_was_cut_off_is_refused_at_the_start";
    let Some((site, [disk_a, disk_b])) = disks(TEST) else { return };
    let cut = |bytes| {
        let image = std::fs::OpenOptions::new().write(true).open(&disk_b).expect("image");
        image.set_len(bytes).expect("shortened");
    };
    cut((32 << 20) + 100);
    let (status, output) = Vm::start(&mut writer(&site, Host::B, &disk_b)).finish(30);
    assert_eq!(status.code(), Some(2), "{output}");
    assert!(output.contains("its size, 33554532 bytes, is not a positive multiple of 512"), "{output}");
    // A size in whole sectors is accepted, but the copies of the two sides differ.
    cut(32 << 20);
    let mut b = Vm::start(&mut writer(&site, Host::B, &disk_b));
    b.wait_for("waiting for a primary", 30);
    let mut a = Vm::start(&mut writer(&site, Host::A, &disk_a));
    for side in [&mut a, &mut b] {
        side.wait_for("its copy of disk-0 differs from this side's", 20);
    }
    assert!(!a.seen().contains("the pair is open") && !a.seen().contains("READY"), "{}", a.seen());
}
