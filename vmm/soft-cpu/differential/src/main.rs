//! Compares the soft CPU with the host's CPU on any number of random cases.

use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::Parser;
use differential::catalogue::{self, RegisterFile};
use differential::compare::Comparison;
use differential::report::RunSummary;
use differential::run::{RunPlan, run, run_one};

/// Compare vmft's software CPU with the host's CPU on random instruction sequences.
#[derive(Parser)]
struct DifferentialArgs {
    /// Number of cases.
    #[arg(long, default_value_t = 100_000)]
    cases: u64,
    /// Seed of the run [default: taken from the clock].
    #[arg(long, value_parser = number)]
    seed: Option<u64>,
    /// Number of threads.
    #[arg(long, default_value_t = 1)]
    jobs: usize,
    /// Run only the case with this seed, as printed for a mismatch (use the same --class).
    #[arg(long, value_parser = number, conflicts_with_all = ["cases", "jobs"])]
    case: Option<u64>,
    /// Use only instructions that mainly work on these registers.
    #[arg(long, value_enum)]
    class: Option<RegisterFile>,
    /// Print how often each encoding was executed.
    #[arg(long)]
    coverage: bool,
    /// Print at most this many mismatches in full.
    #[arg(long, default_value_t = 30)]
    show: usize,
}

fn number(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.map_err(|e| format!("{e}: give a decimal number, or a hexadecimal one that begins with 0x"))
}

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let options = DifferentialArgs::parse();
    let missing = catalogue::missing_on_host();
    if !missing.is_empty() {
        println!("skipped: this host's CPU lacks features that the soft CPU has: {missing:?}");
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(seed) = options.case {
        let (text, comparison) = run_one(seed, options.class)?;
        println!("{text}");
        match &comparison {
            Comparison::Different(lines) => println!("differs:\n    {}", lines.join("\n    ")),
            other => println!("{other:?}"),
        }
        return Ok(ExitCode::from(matches!(comparison, Comparison::Different(_)) as u8));
    }
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
    let plan = RunPlan {
        seed: options.seed.unwrap_or(clock),
        cases: options.cases,
        jobs: options.jobs,
        class: options.class,
    };
    println!("{} cases, --seed {:#x}, --jobs {}", plan.cases, plan.seed, plan.jobs);
    let begun = Instant::now();
    let last_print = Mutex::new(begun);
    let summary = run(&plan, |cases, different| {
        let mut last_print = last_print.lock().expect("printing does not panic");
        if last_print.elapsed() > Duration::from_secs(5) {
            *last_print = Instant::now();
            let rate = cases as f64 / begun.elapsed().as_secs_f64();
            eprintln!("{cases} of {} cases, {rate:.0}/s, {different} differ", plan.cases);
        }
    })?;
    print(&summary, &options)?;
    println!("{:.1} s", begun.elapsed().as_secs_f64());
    Ok(ExitCode::from((summary.different() != 0) as u8))
}

fn print(summary: &RunSummary, options: &DifferentialArgs) -> io::Result<()> {
    let mut out = io::stdout().lock();
    for mismatch in summary.mismatches.iter().take(options.show) {
        writeln!(out, "{}", mismatch.text)?;
    }
    if options.coverage {
        for e in catalogue::entries() {
            let n = summary.coverage.get(&(e.code as usize)).copied().unwrap_or_default();
            writeln!(out, "{:8} completed {:8} faulted  {:?}", n.completed, n.faulted, e.code)?;
        }
    }
    let mut counts: Vec<_> =
        catalogue::entries().iter().map(|e| (summary.executions(e.code), e.code)).collect();
    counts.sort_unstable_by_key(|(n, _)| *n);
    write!(out, "{summary}")?;
    let never: Vec<_> = counts.iter().filter(|(n, _)| *n == 0).map(|(_, c)| *c).collect();
    writeln!(out, "{} encodings, {} never executed: {never:?}", counts.len(), never.len())?;
    let least: Vec<_> = counts.iter().filter(|(n, _)| *n > 0).take(5).collect();
    writeln!(out, "executed least often: {least:?}")?;
    for why in catalogue::EXCLUDED.iter().map(|(why, _)| why) {
        let codes: Vec<_> =
            catalogue::excluded().into_iter().filter(|(_, w)| w == why).map(|(c, _)| c).collect();
        writeln!(out, "not compared, {why:?}: {codes:?}")?;
    }
    Ok(())
}
