//! The wall clock of a host is stepped: a pair decides nothing by it.

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use support::counter::Counter;
use support::pair::{Host, Site};
use support::row::{BARE, LIVES, check_survivor};
use support::vm::{Vm, under};
use support::{can_network, has, has_guest, skip};

/// A library that adds to each reading of a process's wall clock the number of seconds in a file.
const STEPPED_CLOCK: &str = r#"
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
static int file = -1;
__attribute__((constructor)) static void begin(void) { file = open(getenv("STEPPED_BY"), O_RDONLY | O_CLOEXEC); }
int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    char text[32] = "";
    if (!failed && clock == CLOCK_REALTIME && pread(file, text, sizeof text - 1, 0) > 0) now->tv_sec += atol(text);
    return failed;
}
"#;

fn library(site: &Site) -> PathBuf {
    let (source, library) = (site.dir.join("stepped.c"), site.dir.join("stepped.so"));
    std::fs::write(&source, STEPPED_CLOCK).expect("source");
    let built =
        Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(&source).status();
    assert!(built.expect("cc").success());
    library
}

/// The hour in the time stamp of the last line that a side has logged.
fn hour(side: &Vm) -> u32 {
    let mut times = side.seen().lines().filter_map(|line| line.split_once('T')?.1.get(..2)?.parse().ok());
    times.next_back().unwrap_or_else(|| panic!("no time in {}", side.seen()))
}

#[test]
fn steps_of_the_wall_clock_change_nothing() {
    const TEST: &str = "steps_of_the_wall_clock_change_nothing";
    if !has_guest(TEST, "bare") || !can_network(TEST) {
        return;
    }
    for tool in ["cc", "unshare"] {
        if !has(tool) {
            return skip(TEST, &format!("needs {tool}"));
        }
    }
    let site = Site::new();
    let library = library(&site);
    let steps = ["a", "b"].map(|host| site.dir.join(format!("steps-{host}")));
    // Overwrites the number in a single write: a concurrent reader sees either the old or the new one.
    let step = |file: &Path, hours: i64| {
        let file = File::options().write(true).open(file).expect("step");
        file.write_all_at(format!("{:+08}", hours * 3600).as_bytes(), 0).expect("step");
    };
    steps.iter().for_each(|file| std::fs::write(file, "+0000000").expect("step"));
    let side = |host| {
        // The monotonic clocks of the two sides differ too, by eleven days.
        let boot = ["0", "1000000"][host as usize];
        let wrapper = ["unshare", "--time", "--monotonic", boot, "--boottime", boot];
        // A confined guest's thread could not read the file.
        let options = [&BARE[..], &["--no-confine"]].concat();
        let mut command = under(site.replica(host, &options), &wrapper);
        Vm::start(command.env("LD_PRELOAD", &library).env("STEPPED_BY", &steps[host as usize]))
    };
    let mut b = side(Host::B);
    b.wait_for("waiting for a primary", 30);
    let mut a = side(Host::A);
    a.wait_for("READY", 60);
    // This client also checks that the guest's clock does not go back.
    let client = Counter::bare(&site.ns("client"));
    client.wait_for(20, 20);
    let before = hour(&b);
    for hours in [1, -1, 0, -1, 1] {
        steps.iter().for_each(|file| step(file, hours));
        client.wait_for(100, 20);
        std::thread::sleep(Duration::from_millis(1500));
    }
    assert!(
        !a.has_printed("the peer is lost") && !b.has_printed("the peer is lost"),
        "{}{}",
        a.seen(),
        b.seen()
    );
    // The same with a failover.
    step(&steps[1], 5);
    drop(a);
    b.wait_for(LIVES, 20);
    let after = hour(&b);
    step(&steps[1], -5);
    client.wait_for(100, 20);
    assert!([4, 5, 6].contains(&((after + 24 - before) % 24)), "the clock was not stepped: {}", b.seen());
    check_survivor(client, b);
}
