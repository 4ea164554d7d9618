//! Crashes, pauses, partitions and the rest, by seed, around the production agent.
#![allow(clippy::disallowed_methods)]

mod simulator;

use agent::Rule;
use simulator::{Counts, run};

/// Seeds of every test run. `examples/simulate` runs more.
const SEEDS: u64 = 5_000;
/// Seeds until a rule that is switched off has to be noticed.
const SEEDS_WITHOUT: u64 = 4_000;

#[test]
fn what_the_client_saw_is_one_history() {
    let mut sum = Counts::default();
    for seed in 0..SEEDS {
        match run(seed, None, false) {
            Ok(counts) => sum.add(&counts),
            Err(failure) => panic!("{failure}"),
        }
    }
    println!("{sum:#?}");
}

#[test]
fn without_any_one_rule_it_is_not() {
    let unnoticed: Vec<_> = Rule::ALL
        .into_iter()
        .filter(|rule| (0..SEEDS_WITHOUT).all(|seed| run(seed, Some(*rule), false).is_ok()))
        .collect();
    assert!(unnoticed.is_empty(), "switched off and not noticed: {unnoticed:?}");
}
