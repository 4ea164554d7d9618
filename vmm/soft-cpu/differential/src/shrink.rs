//! Reduces a case on which the CPUs differ to the instructions that matter.

use iced_x86::Instruction;

use crate::case::{Built, Case};
use crate::compare::{Verdict, compare};
use crate::native::{Native, NativeError};
use crate::report::{Mismatch, describe};
use crate::soft::Soft;
use crate::state::{End, Outcome};
use crate::vendor::{self, Vendor};

/// Runs one case on both CPUs.
pub fn judge(native: &mut Native, soft: &mut Soft, built: &Built) -> Result<Verdict, NativeError> {
    let batch = native.start(std::iter::once(&built.start))?;
    let ours = soft.run(&built.start, false);
    let theirs = batch.finish().inspect_err(|_| eprintln!("at:\n{}", describe(built)))?.remove(0);
    Ok(verdict(soft, built, &theirs, &ours).0)
}

/// Compares the outcomes of a case. A difference that this host's vendor makes is skipped, and the instruction that
/// made it is named.
pub fn verdict(
    soft: &mut Soft,
    built: &Built,
    theirs: &Outcome,
    ours: &Outcome,
) -> (Verdict, Option<Instruction>) {
    let vendor = Vendor::host();
    let verdict = compare(vendor, &built.start, &built.flow, theirs, ours);
    if let Verdict::Different(_) = verdict
        && !matches!(ours.end, End::Broken(_))
        && let Some((quirk, ins)) = vendor::explain(vendor, soft, built, theirs, ours)
    {
        return (Verdict::Skipped(quirk.reason()), Some(ins));
    }
    (verdict, None)
}

/// A case that was skipped for what the host's vendor does with `ins`, without that instruction, if there is more in
/// it: the others may differ on their own.
pub fn without(case: &Case, ins: &Instruction) -> Option<(Case, Built)> {
    let mut rest = case.clone();
    rest.items.retain(|(_, item)| item.ins.code() != ins.code());
    let left_out = rest.items.len() < case.items.len() && !rest.items.is_empty();
    rest.build().ok().filter(|_| left_out).map(|built| (rest, built))
}

/// Leaves out instructions as long as the CPUs differ, and describes what is left.
pub fn shrink(native: &mut Native, soft: &mut Soft, case: &Case) -> Result<Option<Mismatch>, NativeError> {
    let mut best = case.clone();
    let mut n = 0;
    while n < best.items.len() && best.items.len() > 1 {
        let mut smaller = best.clone();
        smaller.items.remove(n);
        let differs = match smaller.build() {
            Ok(built) => matches!(judge(native, soft, &built)?, Verdict::Different(_)),
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
    let Verdict::Different(lines) = judge(native, soft, &built)? else { return Ok(None) };
    let nodes = &built.flow.nodes;
    let end = built.start.rip + built.start.code.len() as u64;
    let last = nodes.range(..end).next_back().map(|(_, n)| n.ins.code());
    let text = format!("seed {:#x}\n{}    {}\n", case.seed, describe(&built), lines.join("\n    "));
    Ok(Some(Mismatch { seed: case.seed, code: last.unwrap_or_default(), text }))
}
