//! A hundred thousand cases, always the same; more with `cargo run --release -p differential`.

use std::fs::OpenOptions;
use std::io::Write;
use std::thread::available_parallelism;

use differential::catalogue;
use differential::run::{RunPlan, run};

const CASES: u64 = 100_000;
const SEED: u64 = 1;
/// Every encoding is executed at least so often.
const EXECUTIONS_MIN: u64 = 20;

#[test]
fn the_soft_cpu_does_what_the_hosts_does() {
    let missing = catalogue::missing_on_host();
    if !missing.is_empty() {
        skip(&format!("all {CASES} cases of the CPU's differential test: this host's CPU lacks {missing:?}"));
        return;
    }
    let plan = RunPlan {
        seed: SEED,
        cases: CASES,
        jobs: available_parallelism().map_or(1, |n| n.get()),
        class: None,
    };
    println!("seed {SEED:#x}");
    let summary = run(&plan, |_, _| ()).expect("the harness works on this host");
    let texts: Vec<_> = summary.mismatches.iter().take(20).map(|m| m.text.as_str()).collect();
    println!("{}\n{summary}", texts.join("\n"));
    assert_eq!(summary.different(), 0, "the CPUs differ; `--case SEED` runs one case again");
    let skipped: u64 = summary.skipped.values().sum();
    assert!(skipped < CASES / 50, "{skipped} of {CASES} cases were not compared");
    let rare: Vec<_> = catalogue::entries()
        .iter()
        .map(|e| e.code)
        .filter(|c| summary.executions(*c) < EXECUTIONS_MIN)
        .collect();
    assert!(rare.is_empty(), "executed fewer than {EXECUTIONS_MIN} times: {rare:?}");
}

/// Says what is skipped, also in the list that `scripts/test` prints at its end.
fn skip(what: &str) {
    println!("skipped: {what}");
    if let Some(path) = std::env::var_os("VMFT_SKIPPED") {
        let mut list = OpenOptions::new().append(true).open(path).expect("the list of skipped tests");
        writeln!(list, "{what}").expect("writing to the list of skipped tests");
    }
}
