//! The documents' command blocks do what they say.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use support::{can_network, has_guest};

#[test]
fn the_command_blocks_of_readme_and_getting_started_run() {
    const TEST: &str = "the_command_blocks_of_readme_and_getting_started_run";
    if !can_network(TEST) || !has_guest(TEST, "linux") {
        return;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let vmft = PathBuf::from(env!("CARGO_BIN_EXE_vmft"));
    let programs = vmft.parent().expect("a folder");
    if !programs.join("vmft-store").exists() {
        let built =
            Command::new(env!("CARGO")).args(["build", "--bin", "vmft-store"]).current_dir(&root).status();
        assert!(built.is_ok_and(|status| status.success()), "cargo build --bin vmft-store failed");
    }
    let ran = Command::new(root.join("scripts/run-blocks"))
        .arg("--bin")
        .arg(programs)
        .args(["README.md", "docs/getting-started.md"])
        .current_dir(&root)
        .status();
    assert!(ran.expect("scripts/run-blocks").success());
}
