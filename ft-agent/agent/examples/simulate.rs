//! Runs many seeds of the simulator, or one with a trace:
//!
//! ```text
//! cargo run --release -p agent --example simulate -- --seeds 200000 [--from N] [--without RULE]
//! cargo run --release -p agent --example simulate -- --seed N [--without RULE] [--trace]
//! ```
#![allow(clippy::disallowed_methods)]

#[path = "../tests/simulator/mod.rs"]
mod simulator;

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use agent::Rule;
use simulator::{Counts, run};

/// The command line's arguments.
#[derive(Default)]
struct SimulateArgs {
    from: u64,
    seeds: u64,
    without: Option<Rule>,
    trace: bool,
}

fn arguments() -> Result<SimulateArgs, String> {
    let mut options = SimulateArgs { seeds: 5_000, ..SimulateArgs::default() };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or(format!("{word} needs a value"));
        let number = |text: String| text.parse::<u64>().map_err(|e| format!("{text:?} is not a number: {e}"));
        match word.as_str() {
            "--seeds" => options.seeds = number(value()?)?,
            "--from" => options.from = number(value()?)?,
            "--seed" => (options.from, options.seeds) = (number(value()?)?, 1),
            "--trace" => options.trace = true,
            "--without" => {
                let name = value()?;
                let rule = Rule::ALL.into_iter().find(|rule| format!("{rule:?}") == name);
                options.without =
                    Some(rule.ok_or(format!("there is no rule {name:?}; the rules are {:?}", Rule::ALL))?);
            }
            _ => return Err(format!("unknown option {word:?}")),
        }
    }
    Ok(options)
}

fn main() -> ExitCode {
    let options = match arguments() {
        Ok(options) => options,
        Err(what) => {
            eprintln!("{what}");
            return ExitCode::from(2);
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get() as u64).min(options.seeds);
    let (next, failed) = (AtomicU64::new(options.from), AtomicBool::new(false));
    let work = || {
        let mut sum = Counts::default();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= options.from + options.seeds {
                return sum;
            }
            match run(seed, options.without, options.trace) {
                Ok(counts) => sum.add(&counts),
                Err(failure) => {
                    println!("{failure}");
                    failed.store(true, Ordering::Relaxed);
                }
            }
        }
    };
    let mut sum = Counts::default();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().for_each(|thread| sum.add(&thread.join().expect("a thread panicked")));
    });
    println!("{sum:#?}");
    if failed.load(Ordering::Relaxed) { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
