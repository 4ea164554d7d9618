//! What the end-to-end tests share: hosts in network namespaces, running guests, and skipping a test.
#![allow(dead_code, reason = "each test binary uses only a part")]

pub mod capture;
pub mod counter;
#[path = "../../src/image_list.rs"]
mod image_list;
pub mod inject;
#[path = "../../../vmm/tests/guest/log.rs"]
pub mod log;
pub mod net;
pub mod pair;
pub mod relay;
pub mod row;
pub mod starve;
pub mod stranger;
pub mod system_calls;
pub mod vm;

use std::io::Write;
use std::path::PathBuf;

use vmm::record::RecordSink;
use vmm::replay::{Records, Replayer, Standby};
use vmm::{GuestLoop, Machine};

/// Reports that a test cannot run here. `scripts/test` lists and counts the lines of the file named by
/// VMFT_SKIPPED.
pub fn skip(test: &str, reason: &str) {
    eprintln!("SKIPPED {test}: {reason}");
    let Some(path) = std::env::var_os("VMFT_SKIPPED") else { return };
    let file = std::fs::OpenOptions::new().append(true).create(true).open(path);
    file.and_then(|mut f| writeln!(f, "{test}: {reason}")).expect("cannot write the list of skipped tests");
}

/// How often a test repeats: VMFT_CASES, or `default`.
pub fn cases(default: u64) -> u64 {
    std::env::var("VMFT_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(default)
}

/// Skips the test unless it can create network namespaces. `true`: the test can run.
pub fn can_network(test: &str) -> bool {
    if !nix::unistd::Uid::effective().is_root() {
        skip(test, "needs root for network namespaces");
        return false;
    }
    for tool in ["ip", "redis-benchmark", "curl"] {
        if !has(tool) {
            skip(test, &format!("needs {tool} (scripts/test installs it)"));
            return false;
        }
    }
    true
}

/// Whether a program is on the PATH.
pub fn has(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(tool).is_file())
}

/// Skips the test unless `guest-images/build` has made this guest. `true`: the test can run.
pub fn has_guest(test: &str, name: &str) -> bool {
    let found = image_list::path(name).is_file();
    if !found {
        skip(test, &format!("needs the {name} guest: guest-images/build {name}"));
    }
    found
}

/// A path in the guest's image list.
pub fn image(guest: &str, key: &str) -> PathBuf {
    let list = image_list::path(guest);
    let text = std::fs::read_to_string(&list).expect("guest images");
    let value = image_list::value(&text, guest, key);
    PathBuf::from(value.unwrap_or_else(|| panic!("{} has no {guest}.{key}", list.display())))
}

/// The digests that vmft has printed, each with its position.
pub fn digests(errors: &str) -> Vec<String> {
    errors.lines().filter_map(|l| l.trim().strip_prefix("digest ")).map(str::to_owned).collect()
}

/// Skips the test unless it can open `/dev/kvm`. `true`: the test can run.
pub fn has_kvm(test: &str) -> bool {
    let open = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    if let Err(e) = &open {
        skip(test, &format!("needs /dev/kvm: {e}"));
    }
    open.is_ok()
}
