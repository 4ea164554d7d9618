//! Runs many cases, in batches, on several threads.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use iced_x86::Instruction;

use crate::case::{Built, Case};
use crate::catalogue::{self, CatalogueEntry, RegisterFile};
use crate::compare::Comparison;
use crate::generate::generate;
use crate::native::{BATCH, NativeCpu, NativeError};
use crate::report::{CaseMismatch, RunSummary, describe};
use crate::rng::CaseRng;
use crate::shrink::{compare_outcomes, run_and_compare, shrink, without_instruction};
use crate::soft::Soft;
use crate::state::CaseOutcome;

/// One case in this many also runs in single steps on the soft CPU.
const STEPPED: u64 = 8;
/// Most mismatches of a batch that are shrunk; if there are more, something is fundamentally wrong.
const SHRUNK_MAX: u64 = 2000;

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct RunPlan {
    /// Seed of the whole run.
    pub seed: u64,
    /// Number of cases.
    pub cases: u64,
    /// Number of threads.
    pub jobs: usize,
    /// Use only instructions of this class (the same seeds then give other cases).
    pub class: Option<RegisterFile>,
}

/// The seed of case `index` of a run.
pub fn case_seed(seed: u64, index: u64) -> u64 {
    CaseRng::new(seed.rotate_left(32) ^ index).bits()
}

/// Runs a plan. `progress` is called from any thread with the number of cases done and of mismatches.
pub fn run(plan: &RunPlan, progress: impl Fn(u64, u64) + Sync) -> Result<RunSummary, NativeError> {
    let entries = entries(plan.class);
    let next = AtomicU64::new(0);
    let total = Mutex::new((RunSummary::default(), 0));
    std::thread::scope(|scope| {
        let worker = || -> Result<(), NativeError> {
            let mut pair = CpuPair {
                native: NativeCpu::new()?,
                soft: Soft::new(),
                translated: Soft::translated(),
                entries: &entries,
            };
            loop {
                let first = next.fetch_add(BATCH as u64, Ordering::Relaxed);
                if first >= plan.cases {
                    return Ok(());
                }
                let seeds = (first..plan.cases.min(first + BATCH as u64)).map(|i| case_seed(plan.seed, i));
                let part = pair.batch(seeds)?;
                let mut total = total.lock().expect("no thread panics with the lock");
                total.0.merge(part);
                progress(total.0.cases, total.0.different());
            }
        };
        let threads: Vec<_> = (0..plan.jobs.max(1)).map(|_| scope.spawn(worker)).collect();
        threads.into_iter().try_for_each(|t| t.join().expect("a worker panicked"))
    })?;
    Ok(total.into_inner().expect("no thread panics with the lock").0)
}

fn entries(class: Option<RegisterFile>) -> Vec<CatalogueEntry> {
    let mut entries = catalogue::entries();
    entries.retain(|e| class.is_none_or(|c| c == e.class));
    entries
}

/// Runs the case of `seed` in a run of `class`; returns its description and the result.
pub fn run_one(seed: u64, class: Option<RegisterFile>) -> Result<(String, Comparison), NativeError> {
    let entries = entries(class);
    let (mut native, mut soft) = (NativeCpu::new()?, Soft::new());
    let (case, built) = generate(seed, &entries, |_| ());
    let comparison = run_and_compare(&mut native, &mut soft, &built)?;
    let mut text = describe(&built);
    if let Some(mismatch) = shrink(&mut native, &mut soft, &case)? {
        text += "\nreduced:\n";
        text += &mismatch.text;
    }
    Ok((text, comparison))
}

/// The CPUs that a thread compares.
struct CpuPair<'a> {
    native: NativeCpu,
    soft: Soft,
    translated: Soft,
    entries: &'a [CatalogueEntry],
}

impl CpuPair<'_> {
    fn batch(&mut self, seeds: impl Iterator<Item = u64>) -> Result<RunSummary, NativeError> {
        let mut summary = RunSummary::default();
        let cases: Vec<(Case, Built)> = seeds
            .map(|seed| generate(seed, self.entries, |why| *summary.rejected.entry(why).or_default() += 1))
            .collect();
        let batch = self.native.start(cases.iter().map(|(_, built)| &built.start))?;
        let ours: Vec<CaseOutcome> =
            cases.iter().map(|(_, built)| self.soft.run(&built.start, false)).collect();
        let theirs = batch.finish().inspect_err(|e| {
            if let NativeError::Died { case, .. } = e {
                eprintln!(
                    "the native child died at:\nseed {:#x}\n{}",
                    cases[*case].0.seed,
                    describe(&cases[*case].1)
                );
            }
        })?;
        for (((case, built), ours), theirs) in cases.iter().zip(&ours).zip(&theirs) {
            summary.cases += 1;
            summary.add_coverage(built, theirs);
            self.check_other_ways(case, built, ours, &mut summary);
            match compare_outcomes(&mut self.soft, built, theirs, ours) {
                (Comparison::Same, _) => {}
                (Comparison::Skipped(why), culprit) => {
                    *summary.skipped.entry(why).or_default() += 1;
                    if let Some(ins) = culprit {
                        self.compare_without(case, ins, &mut summary)?;
                    }
                }
                (Comparison::Different(lines), _) => self.add_mismatch(case, built, &lines, &mut summary)?,
            }
        }
        Ok(summary)
    }

    /// Checks that the soft CPU does the same with translated code, and in single steps.
    fn check_other_ways(
        &mut self,
        case: &Case,
        built: &Built,
        whole: &CaseOutcome,
        summary: &mut RunSummary,
    ) {
        let mut differs = |how: &str, again: CaseOutcome| {
            if again != *whole {
                let text = format!(
                    "seed {:#x}: the soft CPU {how} differs from itself\n{}    whole {whole:x?}\n    again {again:x?}\n",
                    case.seed,
                    describe(built)
                );
                summary.add(CaseMismatch { seed: case.seed, code: iced_x86::Code::INVALID, text });
            }
        };
        differs("with translated code", self.translated.run(&built.start, false));
        if case.seed.is_multiple_of(STEPPED) {
            differs("in single steps", self.soft.run(&built.start, true));
        }
    }

    /// Compares the rest of a case, without an instruction that the host's vendor implements differently.
    fn compare_without(
        &mut self,
        case: &Case,
        ins: Instruction,
        summary: &mut RunSummary,
    ) -> Result<(), NativeError> {
        let Some((rest, built)) = without_instruction(case, &ins) else { return Ok(()) };
        summary.compared_in_part += 1;
        match run_and_compare(&mut self.native, &mut self.soft, &built)? {
            Comparison::Different(lines) => self.add_mismatch(&rest, &built, &lines, summary),
            _ => Ok(()),
        }
    }

    /// Adds a mismatch to the summary.
    fn add_mismatch(
        &mut self,
        case: &Case,
        built: &Built,
        lines: &[String],
        summary: &mut RunSummary,
    ) -> Result<(), NativeError> {
        let mismatch = self.reduce(case, built, lines, summary.different() < SHRUNK_MAX)?;
        summary.add(mismatch);
        Ok(())
    }

    fn reduce(
        &mut self,
        case: &Case,
        built: &Built,
        lines: &[String],
        shrink_it: bool,
    ) -> Result<CaseMismatch, NativeError> {
        if shrink_it && let Some(mismatch) = shrink(&mut self.native, &mut self.soft, case)? {
            return Ok(mismatch);
        }
        let text =
            format!("seed {:#x} (not reduced)\n{}    {}\n", case.seed, describe(built), lines.join("\n    "));
        Ok(CaseMismatch { seed: case.seed, code: iced_x86::Code::INVALID, text })
    }
}
