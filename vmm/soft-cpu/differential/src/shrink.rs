//! Reduces a case on which the CPUs differ to the instructions that matter.

use iced_x86::Instruction;

use crate::case::{Built, Case};
use crate::compare::{Comparison, compare};
use crate::native::{NativeCpu, NativeError};
use crate::report::{CaseMismatch, describe};
use crate::soft::Soft;
use crate::state::{CaseEnd, CaseOutcome};
use crate::vendor::{self, Vendor};

/// Runs one case on both CPUs and compares the outcomes.
pub fn run_and_compare(
    native: &mut NativeCpu,
    soft: &mut Soft,
    built: &Built,
) -> Result<Comparison, NativeError> {
    let batch = native.start(std::iter::once(&built.start))?;
    let ours = soft.run(&built.start, false);
    let theirs = batch.finish().inspect_err(|_| eprintln!("at:\n{}", describe(built)))?.remove(0);
    Ok(compare_outcomes(soft, built, &theirs, &ours).0)
}

/// Compares the outcomes of a case. A case whose difference is due to this host's vendor is skipped, and the
/// instruction that causes it is returned.
pub fn compare_outcomes(
    soft: &mut Soft,
    built: &Built,
    theirs: &CaseOutcome,
    ours: &CaseOutcome,
) -> (Comparison, Option<Instruction>) {
    let vendor = Vendor::host();
    let comparison = compare(vendor, &built.start, &built.flow, theirs, ours);
    if let Comparison::Different(_) = comparison
        && !matches!(ours.end, CaseEnd::Broken(_))
        && let Some((quirk, ins)) = vendor::explain(vendor, soft, built, theirs, ours)
    {
        return (Comparison::Skipped(quirk.reason()), Some(ins));
    }
    (comparison, None)
}

/// A case without the instruction `ins`, because of which it was skipped: the other instructions may differ
/// on their own. `None` if there are no others.
pub fn without_instruction(case: &Case, ins: &Instruction) -> Option<(Case, Built)> {
    let mut rest = case.clone();
    rest.items.retain(|(_, item)| item.ins.code() != ins.code());
    let left_out = rest.items.len() < case.items.len() && !rest.items.is_empty();
    rest.build().ok().filter(|_| left_out).map(|built| (rest, built))
}

/// Leaves out instructions as long as the CPUs still differ, and describes the remaining case.
pub fn shrink(
    native: &mut NativeCpu,
    soft: &mut Soft,
    case: &Case,
) -> Result<Option<CaseMismatch>, NativeError> {
    let mut best = case.clone();
    let mut n = 0;
    while n < best.items.len() && best.items.len() > 1 {
        let mut smaller = best.clone();
        smaller.items.remove(n);
        let differs = match smaller.build() {
            Ok(built) => matches!(run_and_compare(native, soft, &built)?, Comparison::Different(_)),
            Err(_) => false,
        };
        if differs {
            best = smaller;
            n = 0;
        } else {
            n += 1;
        }
    }
    let Ok(built) = best.build() else { return Ok(None) };
    let Comparison::Different(lines) = run_and_compare(native, soft, &built)? else { return Ok(None) };
    let nodes = &built.flow.nodes;
    let end = built.start.rip + built.start.code.len() as u64;
    let last = nodes.range(..end).next_back().map(|(_, n)| n.ins.code());
    let text = format!("seed {:#x}\n{}    {}\n", case.seed, describe(&built), lines.join("\n    "));
    Ok(Some(CaseMismatch { seed: case.seed, code: last.unwrap_or_default(), text }))
}
