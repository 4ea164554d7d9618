//! Compares the soft CPU with the host's on as many random cases as one likes.

use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::Parser;
use vmft_cpu_differential::catalogue::{self, Class};
use vmft_cpu_differential::compare::Verdict;
use vmft_cpu_differential::report::Summary;
use vmft_cpu_differential::run::{Plan, run, run_one};

/// Compares vmft's software CPU with the host's on random instruction sequences.
#[derive(Parser)]
struct Options {
    /// How many cases.
    #[arg(long, default_value_t = 100_000)]
    cases: u64,
    /// Seed of the run [default: from the clock].
    #[arg(long, value_parser = number)]
    seed: Option<u64>,
    /// Threads.
    #[arg(long, default_value_t = 1)]
    jobs: usize,
    /// Runs only the case with this seed, as a mismatch printed it (with the same --class).
    #[arg(long, value_parser = number, conflicts_with_all = ["cases", "jobs"])]
    case: Option<u64>,
    /// Only instructions that mainly work on these registers.
    #[arg(long, value_enum)]
    class: Option<Class>,
    /// Prints how often each encoding was executed.
    #[arg(long)]
    coverage: bool,
    /// Prints only so many mismatches in full.
    #[arg(long, default_value_t = 30)]
    show: usize,
}

fn number(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.map_err(|e| format!("{e}: wants a number, or hexadecimal after 0x"))
}

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let options = Options::parse();
    let missing = catalogue::missing_on_host();
    if !missing.is_empty() {
        println!("skipped: this host's CPU lacks {missing:?}");
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(seed) = options.case {
        let (text, verdict) = run_one(seed, options.class)?;
        println!("{text}");
        match &verdict {
            Verdict::Different(lines) => println!("differs:\n    {}", lines.join("\n    ")),
            other => println!("{other:?}"),
        }
        return Ok(ExitCode::from(matches!(verdict, Verdict::Different(_)) as u8));
    }
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
    let plan = Plan {
        seed: options.seed.unwrap_or(clock),
        cases: options.cases,
        jobs: options.jobs,
        class: options.class,
    };
    println!("{} cases, --seed {:#x}, --jobs {}", plan.cases, plan.seed, plan.jobs);
    let begun = Instant::now();
    let said = Mutex::new(begun);
    let summary = run(&plan, |cases, different| {
        let mut said = said.lock().expect("printing does not panic");
        if said.elapsed() > Duration::from_secs(5) {
            *said = Instant::now();
            let rate = cases as f64 / begun.elapsed().as_secs_f64();
            eprintln!("{cases} of {} cases, {rate:.0}/s, {different} differ", plan.cases);
        }
    })?;
    print(&summary, &options)?;
    println!("{:.1} s", begun.elapsed().as_secs_f64());
    Ok(ExitCode::from((summary.different() != 0) as u8))
}

fn print(summary: &Summary, options: &Options) -> io::Result<()> {
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
    writeln!(out, "least often: {least:?}")?;
    for why in catalogue::EXCLUDED.iter().map(|(why, _)| why) {
        let codes: Vec<_> =
            catalogue::excluded().into_iter().filter(|(_, w)| w == why).map(|(c, _)| c).collect();
        writeln!(out, "left out, {why:?}: {codes:?}")?;
    }
    Ok(())
}
