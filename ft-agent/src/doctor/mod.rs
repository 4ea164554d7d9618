//! What this host can do for a guest on KVM, found out by trying.

use std::fmt;

use clap::Args;
use serde::Serialize;

use crate::error::Error;

mod counting;
mod host;
mod micro;
mod semantics;

/// Options of `vmft doctor`.
#[derive(Args)]
pub struct DoctorArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What came of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// As it should be.
    Pass,
    /// Not as it should be.
    Fail,
    /// There is nothing to check, or no way to.
    NotApplicable,
}

/// One line of the report.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    name: &'static str,
    outcome: Outcome,
    /// What was found, or why nothing was looked for.
    reason: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Check {
    fn new(name: &'static str, outcome: Outcome, reason: impl Into<String>) -> Check {
        Check { name, outcome, reason: reason.into(), remedy: None }
    }

    fn pass(name: &'static str, reason: impl Into<String>) -> Check {
        Check::new(name, Outcome::Pass, reason)
    }

    fn fail(name: &'static str, reason: impl Into<String>, remedy: impl Into<String>) -> Check {
        Check { remedy: Some(remedy.into()), ..Check::new(name, Outcome::Fail, reason) }
    }

    fn not_applicable(name: &'static str, reason: impl Into<String>) -> Check {
        Check::new(name, Outcome::NotApplicable, reason)
    }

    /// As it is, or with what to do when it failed.
    fn passes(name: &'static str, good: bool, reason: impl Into<String>, remedy: &str) -> Check {
        if good { Check::pass(name, reason) } else { Check::fail(name, reason, remedy) }
    }
}

/// What positions a guest on this host's KVM can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Any, by the branch counter.
    Exact,
    /// Any; a replay may overshoot now and then and go back.
    ExactWithRetry,
    /// The guest's own exits only.
    SyncOnly,
    /// None: the soft engine is for this host.
    Unsupported,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Verdict::Exact => "exact",
            Verdict::ExactWithRetry => "exact-with-retry",
            Verdict::SyncOnly => "sync-only",
            Verdict::Unsupported => "unsupported",
        })
    }
}

/// All checks and what follows from them.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    checks: Vec<Check>,
    /// The counter's skid as measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    skid: Option<counting::Skid>,
    verdict: Verdict,
    /// Names of the checks that decided it.
    because: Vec<&'static str>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for check in &self.checks {
            let outcome = match check.outcome {
                Outcome::Pass => "pass",
                Outcome::Fail => "FAIL",
                Outcome::NotApplicable => "n/a",
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
        match self.because.as_slice() {
            [] => Ok(()),
            because => write!(f, " (because of {})", because.join(", ")),
        }
    }
}

/// Which checks a verdict needs. What is in neither list is told and decides nothing.
const FOR_ANY: [&str; 4] = ["kvm", "capabilities", "exits", "replay by exits"];
const FOR_EXACT: [&str; 9] = [
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

/// What the checks amount to, and which of them stand against more.
fn decide(checks: &[Check], retries: bool) -> (Verdict, Vec<&'static str>) {
    let against = |needed: &[&'static str], good: fn(Outcome) -> bool| -> Vec<_> {
        let bad = |name: &&str| !checks.iter().any(|c| c.name == *name && good(c.outcome));
        needed.iter().copied().filter(bad).collect()
    };
    let any = against(&FOR_ANY, |o| o == Outcome::Pass);
    if !any.is_empty() {
        return (Verdict::Unsupported, any);
    }
    let exact: Vec<_> = against(&FOR_EXACT, |o| o == Outcome::Pass)
        .into_iter()
        // What the CPU cannot have is no obstacle.
        .filter(|name| {
            *name != "SpecLockMap" || !against(&["SpecLockMap"], |o| o != Outcome::Fail).is_empty()
        })
        .collect();
    match exact.is_empty() {
        false => (Verdict::SyncOnly, exact),
        true if retries => (Verdict::ExactWithRetry, vec!["skid"]),
        true => (Verdict::Exact, Vec::new()),
    }
}

/// How closely to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Care {
    /// To choose an engine: no further than to what stands against an exact counter.
    Brief,
    /// All there is to tell.
    Thorough,
}

impl Care {
    /// Nothing more need be tried: guests on KVM cost a fraction of a second.
    fn is_satisfied(self, checks: &[Check]) -> bool {
        self == Care::Brief && obstacles(checks).next().is_some()
    }
}

/// The checks that stand against an exact counter.
fn obstacles(checks: &[Check]) -> impl Iterator<Item = &Check> {
    checks
        .iter()
        .filter(|c| c.outcome == Outcome::Fail && (FOR_ANY.contains(&c.name) || FOR_EXACT.contains(&c.name)))
}

/// Looks at the host.
fn examine(care: Care) -> Report {
    let mut checks = Vec::new();
    let (model, event) = host::cpu(&mut checks);
    host::settings(&mut checks, &model);
    let kvm = host::kvm(&mut checks);
    let mut skid = None;
    match &kvm {
        Some(kvm) => {
            skid = counting::check(&mut checks, kvm, event, care);
            if !care.is_satisfied(&checks) {
                semantics::check(&mut checks, kvm);
            }
        }
        None => checks.push(Check::not_applicable("counter", "there is no KVM to count a guest of")),
    }
    let retries = event.is_some_and(|e| e.unbounded);
    let (verdict, because) = decide(&checks, retries);
    Report { checks, skid, verdict, because }
}

/// Whether guests on this host's KVM can have any position, by an exact counter.
///
/// # Errors
/// Why not.
pub fn exact() -> Result<String, String> {
    let report = examine(Care::Brief);
    if matches!(report.verdict, Verdict::Exact | Verdict::ExactWithRetry) {
        return Ok(format!("vmft doctor: {}", report.verdict));
    }
    let against: Vec<_> = obstacles(&report.checks).map(|c| format!("{}: {}", c.name, c.reason)).collect();
    Err(against.join("; "))
}

/// Prints what this host can do.
///
/// # Errors
/// The report cannot be written.
pub fn run(args: &DoctorArgs) -> Result<(), Error> {
    let report = examine(Care::Thorough);
    if args.json {
        let text = serde_json::to_string_pretty(&report).map_err(std::io::Error::other);
        println!("{}", text.map_err(Error::host("report"))?);
    } else {
        println!("{report}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(outcome: impl Fn(&str) -> Outcome) -> Vec<Check> {
        FOR_ANY.iter().chain(&FOR_EXACT).map(|name| Check::new(name, outcome(name), "")).collect()
    }

    #[test]
    fn a_verdict_is_no_better_than_what_it_needs() {
        let good = all(|_| Outcome::Pass);
        assert_eq!(decide(&good, false), (Verdict::Exact, vec![]));
        assert_eq!(decide(&good, true).0, Verdict::ExactWithRetry);
        for name in FOR_ANY {
            let bad = all(|n| if n == name { Outcome::Fail } else { Outcome::Pass });
            assert_eq!(decide(&bad, false), (Verdict::Unsupported, vec![name]));
        }
        for name in FOR_EXACT {
            let bad = all(|n| if n == name { Outcome::Fail } else { Outcome::Pass });
            assert_eq!(decide(&bad, false), (Verdict::SyncOnly, vec![name]));
        }
        // Not looked at is not passed, but for what this CPU cannot have.
        let unknown = all(|n| if n == "counter" { Outcome::NotApplicable } else { Outcome::Pass });
        assert_eq!(decide(&unknown, false), (Verdict::SyncOnly, vec!["counter"]));
        let intel = all(|n| if n == "SpecLockMap" { Outcome::NotApplicable } else { Outcome::Pass });
        assert_eq!(decide(&intel, false).0, Verdict::Exact);
        assert_eq!(decide(&[], false).0, Verdict::Unsupported);
    }
}
