//! Pairs of two builds, of which one knows one version of the channel and of the store's protocol more.

mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use support::counter::Counter;
use support::pair::{Host, Site};
use support::row::{BARE, LIVES, check_survivor};
use support::vm::{VMFT, Vm, with_program};
use support::{can_network, has_guest, skip};

/// The newer build of vmft. `None`: the test cannot run here, and is skipped.
fn newer_build(test: &str) -> Option<PathBuf> {
    if !has_guest(test, "bare") || !can_network(test) {
        return None;
    }
    if !Path::new(env!("CARGO")).exists() {
        skip(test, "needs cargo, to build the newer release");
        return None;
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/next-version");
    let built = Command::new(script).stderr(Stdio::inherit()).output().expect("scripts/next-version");
    assert!(built.status.success(), "scripts/next-version cannot build the newer release");
    let dir = String::from_utf8(built.stdout).expect("a path");
    Some(Path::new(dir.trim()).join("vmft"))
}

/// Starts a pair with these programs, and a client that counts.
fn pair_of(site: &Site, programs: [&Path; 2]) -> (Vm, Vm, Counter) {
    let start = |host, program| Vm::start(&mut with_program(site.replica(host, &BARE), program));
    let mut b = start(Host::B, programs[1]);
    b.wait_for("waiting for a primary", 30);
    let mut a = start(Host::A, programs[0]);
    a.wait_for("READY", 60);
    let client = Counter::bare(&site.ns("client"));
    client.wait_for(100, 20);
    (a, b, client)
}

/// Runs `end` with pairs of each mixture of the two builds.
fn for_each_mixture(test: &str, end: impl Fn(Vm, Vm, Counter)) {
    let Some(newer) = newer_build(test) else { return };
    let older = Path::new(VMFT);
    let site = Site::new();
    for programs in [[older, &newer], [&newer, older], [&newer, &newer]] {
        let (a, b, client) = pair_of(&site, programs);
        eprintln!("{} and {}:", programs[0].display(), programs[1].display());
        end(a, b, client);
    }
}

#[test]
fn a_pair_of_two_releases_hands_over() {
    for_each_mixture("a_pair_of_two_releases_hands_over", |a, mut b, client| {
        a.terminate();
        b.wait_for(LIVES, 20);
        let (status, output) = a.finish(10);
        assert!(status.success() && output.contains("handed over"), "{output}");
        check_survivor(client, b);
    });
}

#[test]
fn a_pair_of_two_releases_survives_its_primary() {
    for_each_mixture("a_pair_of_two_releases_survives_its_primary", |a, mut b, client| {
        drop(a);
        b.wait_for(LIVES, 20);
        check_survivor(client, b);
    });
}
