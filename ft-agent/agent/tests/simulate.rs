//! Seeded simulations of the production agent with crashes, pauses, partitions and other faults.
#![allow(clippy::disallowed_methods)]

mod simulator;

use agent::Rule;
use simulator::{Counts, run};

/// Seeds in each run of the tests. `examples/simulate` runs more.
const SEEDS: u64 = 5_000;
/// Number of seeds among which one must fail while a rule is switched off.
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
fn the_checker_notices_every_rule_that_is_switched_off() {
    let unnoticed: Vec<_> = Rule::ALL
        .into_iter()
        .filter(|rule| (0..SEEDS_WITHOUT).all(|seed| run(seed, Some(*rule), false).is_ok()))
        .collect();
    assert!(unnoticed.is_empty(), "rules that were switched off without a failure: {unnoticed:?}");
}
