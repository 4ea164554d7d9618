//! Runs many cases, in batches, on several threads.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use iced_x86::Instruction;

use crate::case::{Built, Case};
use crate::catalogue::{self, Class, Entry};
use crate::compare::Verdict;
use crate::generate::generate;
use crate::native::{BATCH, Native, NativeError};
use crate::report::{Mismatch, Summary, describe};
use crate::rng::Rng;
use crate::shrink::{judge, shrink, verdict, without};
use crate::soft::Soft;
use crate::state::Outcome;

/// One case in so many also runs an instruction at a time on the soft CPU.
const STEPPED: u64 = 8;
/// Mismatches of a thread that are shrunk; with more, something is wrong altogether.
const SHRUNK_MAX: u64 = 2000;

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Seed of the whole run.
    pub seed: u64,
    /// How many cases.
    pub cases: u64,
    /// On how many threads.
    pub jobs: usize,
    /// Only instructions of this class (which makes other cases of the same seeds).
    pub class: Option<Class>,
}

/// The seed of case `index` of a run.
pub fn case_seed(seed: u64, index: u64) -> u64 {
    Rng::new(seed.rotate_left(32) ^ index).bits()
}

/// Runs a plan. `progress` hears the number of cases done and of mismatches, from any thread.
pub fn run(plan: &Plan, progress: impl Fn(u64, u64) + Sync) -> Result<Summary, NativeError> {
    let entries = entries(plan.class);
    let next = AtomicU64::new(0);
    let total = Mutex::new((Summary::default(), 0));
    std::thread::scope(|scope| {
        let worker = || -> Result<(), NativeError> {
            let mut pair = Pair {
                native: Native::new()?,
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

fn entries(class: Option<Class>) -> Vec<Entry> {
    let mut entries = catalogue::entries();
    entries.retain(|e| class.is_none_or(|c| c == e.class));
    entries
}

/// Runs the one case of `seed` in a run of `class`, and says all about it.
pub fn run_one(seed: u64, class: Option<Class>) -> Result<(String, Verdict), NativeError> {
    let entries = entries(class);
    let (mut native, mut soft) = (Native::new()?, Soft::new());
    let (case, built) = generate(seed, &entries, |_| ());
    let verdict = judge(&mut native, &mut soft, &built)?;
    let mut text = describe(&built);
    if let Some(mismatch) = shrink(&mut native, &mut soft, &case)? {
        text += "\nreduced:\n";
        text += &mismatch.text;
    }
    Ok((text, verdict))
}

struct Pair<'a> {
    native: Native,
    soft: Soft,
    translated: Soft,
    entries: &'a [Entry],
}

impl Pair<'_> {
    fn batch(&mut self, seeds: impl Iterator<Item = u64>) -> Result<Summary, NativeError> {
        let mut summary = Summary::default();
        let cases: Vec<(Case, Built)> = seeds
            .map(|seed| generate(seed, self.entries, |why| *summary.rejected.entry(why).or_default() += 1))
            .collect();
        let batch = self.native.start(cases.iter().map(|(_, built)| &built.start))?;
        let ours: Vec<Outcome> = cases.iter().map(|(_, built)| self.soft.run(&built.start, false)).collect();
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
            summary.cover(built, theirs);
            self.again(case, built, ours, &mut summary);
            match verdict(&mut self.soft, built, theirs, ours) {
                (Verdict::Same, _) => {}
                (Verdict::Skipped(why), culprit) => {
                    *summary.skipped.entry(why).or_default() += 1;
                    if let Some(ins) = culprit {
                        self.rest(case, ins, &mut summary)?;
                    }
                }
                (Verdict::Different(lines), _) => self.differs(case, built, &lines, &mut summary)?,
            }
        }
        Ok(summary)
    }

    /// The soft CPU must do the same with translated code, and when it is stopped after each instruction.
    fn again(&mut self, case: &Case, built: &Built, whole: &Outcome, summary: &mut Summary) {
        let mut differs = |how: &str, again: Outcome| {
            if again != *whole {
                let text = format!(
                    "seed {:#x}: the soft CPU {how} differs from itself\n{}    whole {whole:x?}\n    again {again:x?}\n",
                    case.seed,
                    describe(built)
                );
                summary.add(Mismatch { seed: case.seed, code: iced_x86::Code::INVALID, text });
            }
        };
        differs("with translated code", self.translated.run(&built.start, false));
        if case.seed.is_multiple_of(STEPPED) {
            differs("in single steps", self.soft.run(&built.start, true));
        }
    }

    /// Compares what is left of a case without an instruction that the host's vendor does differently.
    fn rest(&mut self, case: &Case, ins: Instruction, summary: &mut Summary) -> Result<(), NativeError> {
        let Some((rest, built)) = without(case, &ins) else { return Ok(()) };
        summary.rests += 1;
        match judge(&mut self.native, &mut self.soft, &built)? {
            Verdict::Different(lines) => self.differs(&rest, &built, &lines, summary),
            _ => Ok(()),
        }
    }

    fn differs(
        &mut self,
        case: &Case,
        built: &Built,
        lines: &[String],
        summary: &mut Summary,
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
    ) -> Result<Mismatch, NativeError> {
        if shrink_it && let Some(mismatch) = shrink(&mut self.native, &mut self.soft, case)? {
            return Ok(mismatch);
        }
        let text =
            format!("seed {:#x} (not reduced)\n{}    {}\n", case.seed, describe(built), lines.join("\n    "));
        Ok(Mismatch { seed: case.seed, code: iced_x86::Code::INVALID, text })
    }
}
