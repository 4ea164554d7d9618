//! `vmft doctor`: tests what this host can do for a guest on KVM, and reports a verdict with its reasons.

use std::fmt;

use clap::Args;
use serde::Serialize;

use crate::error::Error;
use crate::report::print;

mod counting;
mod host;
mod micro;
mod semantics;

/// Options of `vmft doctor`.
#[derive(Args)]
pub struct DoctorArgs {
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

/// The result of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CheckOutcome {
    /// As it should be.
    Pass,
    /// Not as it should be.
    Fail,
    /// There was nothing to check, or no way to check it.
    NotApplicable,
}

/// One line of the report.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    name: &'static str,
    outcome: CheckOutcome,
    /// What was found, or why nothing was tested.
    reason: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Check {
    fn new(name: &'static str, outcome: CheckOutcome, reason: impl Into<String>) -> Check {
        Check { name, outcome, reason: reason.into(), remedy: None }
    }

    fn pass(name: &'static str, reason: impl Into<String>) -> Check {
        Check::new(name, CheckOutcome::Pass, reason)
    }

    fn fail(name: &'static str, reason: impl Into<String>, remedy: impl Into<String>) -> Check {
        Check { remedy: Some(remedy.into()), ..Check::new(name, CheckOutcome::Fail, reason) }
    }

    fn not_applicable(name: &'static str, reason: impl Into<String>) -> Check {
        Check::new(name, CheckOutcome::NotApplicable, reason)
    }

    /// Passes if `good`, and otherwise fails with `remedy`.
    fn passes(name: &'static str, good: bool, reason: impl Into<String>, remedy: &str) -> Check {
        if good { Check::pass(name, reason) } else { Check::fail(name, reason, remedy) }
    }
}

/// The positions at which a guest on this host's KVM can take inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PositionSupport {
    /// At any conditional branch, by the branch counter.
    Exact,
    /// The same; a replay may miss a position now and then, go back and try again.
    ExactWithRetry,
    /// Only at the guest's own exits.
    SyncOnly,
    /// At none: this host can run guests on the software CPU only.
    Unsupported,
}

impl PositionSupport {
    /// What the verdict means for guests on this host.
    fn meaning(self) -> &'static str {
        match self {
            PositionSupport::Exact => {
                "guests on KVM can take inputs at any conditional branch (--positions counter)"
            }
            PositionSupport::ExactWithRetry => {
                "guests on KVM can take inputs at any conditional branch (--positions counter); a replay may miss one now \
                 and then, and goes back and tries again"
            }
            PositionSupport::SyncOnly => EXITS_ONLY,
            PositionSupport::Unsupported => {
                "guests cannot run on KVM here; use the software CPU (--cpu soft)"
            }
        }
    }
}

impl fmt::Display for PositionSupport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PositionSupport::Exact => "exact",
            PositionSupport::ExactWithRetry => "exact-with-retry",
            PositionSupport::SyncOnly => "sync-only",
            PositionSupport::Unsupported => "unsupported",
        })
    }
}

/// All checks and the verdict that follows from them.
#[derive(Clone, Debug, Serialize)]
pub struct DoctorReport {
    checks: Vec<Check>,
    /// The counter's skid as measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    skid: Option<counting::MeasuredSkid>,
    verdict: PositionSupport,
    /// Names of the checks because of which the verdict is not better.
    because: Vec<&'static str>,
}

impl fmt::Display for DoctorReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for check in &self.checks {
            let outcome = match check.outcome {
                CheckOutcome::Pass => "pass",
                CheckOutcome::Fail => "FAIL",
                CheckOutcome::NotApplicable => "n/a",
            };
            writeln!(f, "{outcome:4}  {:27}{}", check.name, check.reason)?;
            if let Some(remedy) = &check.remedy {
                writeln!(f, "{:33}-> {remedy}", "")?;
            }
        }
        if let Some(skid) = &self.skid {
            writeln!(f, "skid: {skid}")?;
        }
        write!(f, "verdict: {}", self.verdict)?;
        if !self.because.is_empty() {
            write!(f, " (because of {})", self.because.join(", "))?;
        }
        write!(f, "\n{:9}{}", "", self.verdict.meaning())
    }
}

/// What remains of KVM where a check of the branch counter fails.
const EXITS_ONLY: &str = "guests on KVM can take inputs only at their own exits here (--positions sync)";

/// The checks that must pass for any guest on KVM. A check that is in neither list is reported and decides nothing.
const NEEDED_FOR_KVM: [&str; 4] = ["kvm", "capabilities", "exits", "replay by exits"];
/// The checks that must pass for a verdict better than [`PositionSupport::SyncOnly`].
const NEEDED_FOR_EXACT: [&str; 9] = [
    "cpu model",
    "counter permission",
    "counter",
    "counting in the guest",
    "counting with exits",
    "counting with interrupts",
    "counting with signals",
    "breakpoint",
    "SpecLockMap",
];

/// The verdict, and the checks because of which it is not better. `retries`: overflows may be later than any margin.
fn judge(checks: &[Check], retries: bool) -> (PositionSupport, Vec<&'static str>) {
    let lacking = |needed: &[&'static str], good: fn(CheckOutcome) -> bool| -> Vec<_> {
        let bad = |name: &&str| !checks.iter().any(|c| c.name == *name && good(c.outcome));
        needed.iter().copied().filter(bad).collect()
    };
    let any = lacking(&NEEDED_FOR_KVM, |o| o == CheckOutcome::Pass);
    if !any.is_empty() {
        return (PositionSupport::Unsupported, any);
    }
    let exact: Vec<_> = lacking(&NEEDED_FOR_EXACT, |o| o == CheckOutcome::Pass)
        .into_iter()
        // A defect that this CPU cannot have is not an obstacle.
        .filter(|name| {
            *name != "SpecLockMap" || !lacking(&["SpecLockMap"], |o| o != CheckOutcome::Fail).is_empty()
        })
        .collect();
    match exact.is_empty() {
        false => (PositionSupport::SyncOnly, exact),
        true if retries => (PositionSupport::ExactWithRetry, vec!["skid"]),
        true => (PositionSupport::Exact, Vec::new()),
    }
}

/// How much is tested.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Thoroughness {
    /// Enough to choose an engine: testing ends at the first check that rules out an exact counter.
    Brief,
    /// Everything, for the report.
    Thorough,
}

impl Thoroughness {
    /// Nothing more has to be tested, which saves a fraction of a second.
    fn can_stop(self, checks: &[Check]) -> bool {
        self == Thoroughness::Brief && obstacles(checks).next().is_some()
    }
}

/// The failed checks that rule out an exact counter.
fn obstacles(checks: &[Check]) -> impl Iterator<Item = &Check> {
    checks.iter().filter(|c| {
        c.outcome == CheckOutcome::Fail
            && (NEEDED_FOR_KVM.contains(&c.name) || NEEDED_FOR_EXACT.contains(&c.name))
    })
}

/// Tests this host.
fn examine(thoroughness: Thoroughness) -> DoctorReport {
    let mut checks = Vec::new();
    let (model, event) = host::cpu(&mut checks);
    host::settings(&mut checks, &model);
    let kvm = host::kvm(&mut checks);
    let mut skid = None;
    match &kvm {
        Some(kvm) => {
            skid = counting::check(&mut checks, kvm, event, thoroughness);
            if !thoroughness.can_stop(&checks) {
                semantics::check(&mut checks, kvm);
            }
        }
        None => {
            checks.push(Check::not_applicable("counter", "not tested: there is no KVM to run a guest on"))
        }
    }
    let retries = event.is_some_and(|e| e.unbounded);
    let (verdict, because) = judge(&checks, retries);
    DoctorReport { checks, skid, verdict, because }
}

/// Whether guests on this host's KVM can take inputs at any conditional branch, by an exact counter. `Ok`: the verdict.
///
/// # Errors
/// They cannot: which checks failed, and why.
pub fn check_exact_positions() -> Result<String, String> {
    let report = examine(Thoroughness::Brief);
    if matches!(report.verdict, PositionSupport::Exact | PositionSupport::ExactWithRetry) {
        return Ok(format!("vmft doctor: {}", report.verdict));
    }
    let against: Vec<_> = obstacles(&report.checks).map(|c| format!("{}: {}", c.name, c.reason)).collect();
    Err(against.join("; "))
}

/// Prints the report on this host.
///
/// # Errors
/// The report cannot be written.
pub fn run(args: &DoctorArgs) -> Result<(), Error> {
    let report = examine(Thoroughness::Thorough);
    let text = match args.json {
        true => serde_json::to_string_pretty(&report).unwrap_or_else(|e| unreachable!("plain data: {e}")),
        false => report.to_string(),
    };
    print(&format!("{text}\n")).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(outcome: impl Fn(&str) -> CheckOutcome) -> Vec<Check> {
        NEEDED_FOR_KVM
            .iter()
            .chain(&NEEDED_FOR_EXACT)
            .map(|name| Check::new(name, outcome(name), ""))
            .collect()
    }

    #[test]
    fn a_verdict_is_no_better_than_what_it_needs() {
        let good = all(|_| CheckOutcome::Pass);
        assert_eq!(judge(&good, false), (PositionSupport::Exact, vec![]));
        assert_eq!(judge(&good, true).0, PositionSupport::ExactWithRetry);
        for name in NEEDED_FOR_KVM {
            let bad = all(|n| if n == name { CheckOutcome::Fail } else { CheckOutcome::Pass });
            assert_eq!(judge(&bad, false), (PositionSupport::Unsupported, vec![name]));
        }
        for name in NEEDED_FOR_EXACT {
            let bad = all(|n| if n == name { CheckOutcome::Fail } else { CheckOutcome::Pass });
            assert_eq!(judge(&bad, false), (PositionSupport::SyncOnly, vec![name]));
        }
        // A check that was not made has not passed, except for a defect that this CPU cannot have.
        let unknown = all(|n| if n == "counter" { CheckOutcome::NotApplicable } else { CheckOutcome::Pass });
        assert_eq!(judge(&unknown, false), (PositionSupport::SyncOnly, vec!["counter"]));
        let intel =
            all(|n| if n == "SpecLockMap" { CheckOutcome::NotApplicable } else { CheckOutcome::Pass });
        assert_eq!(judge(&intel, false).0, PositionSupport::Exact);
        assert_eq!(judge(&[], false).0, PositionSupport::Unsupported);
    }
}
