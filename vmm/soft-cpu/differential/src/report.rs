//! The results of a run: counts, coverage, mismatches.

use std::collections::BTreeMap;
use std::fmt::{self, Write};

use iced_x86::{Code, FlowControl, Formatter, NasmFormatter};

use crate::case::Built;
use crate::flow::Reject;
use crate::state::{CaseEnd, CaseOutcome};

/// Mismatches of one culprit that are shown in full.
const SHOWN: usize = 3;

/// How often an encoding was executed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Executions that completed.
    pub completed: u64,
    /// Executions that faulted.
    pub faulted: u64,
}

/// A case on which the CPUs differ, after shrinking.
#[derive(Clone, Debug)]
pub struct CaseMismatch {
    /// Seed of the whole case.
    pub seed: u64,
    /// The last instruction of the shrunk case: the likely culprit.
    pub code: Code,
    /// Disassembly, state and differences.
    pub text: String,
}

/// The result of a run.
#[derive(Clone, Debug, Default)]
pub struct RunSummary {
    /// Number of cases run.
    pub cases: u64,
    /// How many of them could not be compared, by reason.
    pub skipped: BTreeMap<&'static str, u64>,
    /// How many of the skipped cases, because only one instruction was the reason (see [`crate::vendor`]), were
    /// compared without it.
    pub compared_in_part: u64,
    /// Draws that could not be used as cases, by reason.
    pub rejected: BTreeMap<Reject, u64>,
    /// How often cases ended with each vector on the host.
    pub endings: BTreeMap<u8, u64>,
    /// Executions by encoding (`Code as usize`), up to the first branch of each case.
    pub coverage: BTreeMap<usize, Count>,
    /// Number of cases on which the CPUs differ, by culprit.
    pub culprits: BTreeMap<usize, (Code, u64)>,
    /// The first few mismatches of each culprit.
    pub mismatches: Vec<CaseMismatch>,
}

impl RunSummary {
    /// Cases on which the CPUs differ.
    pub fn different(&self) -> u64 {
        self.culprits.values().map(|(_, n)| n).sum()
    }

    /// Adds a mismatch.
    pub fn add(&mut self, mismatch: CaseMismatch) {
        let count = self.culprits.entry(mismatch.code as usize).or_insert((mismatch.code, 0));
        count.1 += 1;
        if count.1 <= SHOWN as u64 {
            self.mismatches.push(mismatch);
        }
    }

    /// Counts the instructions that ran before the first branch, and how the case ended.
    pub fn add_coverage(&mut self, built: &Built, native: &CaseOutcome) {
        if let CaseEnd::Exception { vector, .. } = native.end {
            *self.endings.entry(vector).or_default() += 1;
        }
        let mut ip = built.start.rip;
        while let Some(node) = built.flow.nodes.get(&ip) {
            let count = self.coverage.entry(node.ins.code() as usize).or_default();
            if ip == native.rip {
                count.faulted += 1;
                return;
            }
            count.completed += 1;
            if node.ins.flow_control() != FlowControl::Next {
                return;
            }
            ip = node.ins.next_ip();
        }
    }

    /// Adds the results of another part of the run.
    pub fn merge(&mut self, other: RunSummary) {
        fn sum<K: Ord>(into: &mut BTreeMap<K, u64>, from: BTreeMap<K, u64>) {
            from.into_iter().for_each(|(k, n)| *into.entry(k).or_default() += n);
        }
        self.cases += other.cases;
        self.compared_in_part += other.compared_in_part;
        sum(&mut self.skipped, other.skipped);
        sum(&mut self.rejected, other.rejected);
        sum(&mut self.endings, other.endings);
        for (code, n) in other.coverage {
            let count = self.coverage.entry(code).or_default();
            count.completed += n.completed;
            count.faulted += n.faulted;
        }
        for (key, (code, n)) in other.culprits {
            self.culprits.entry(key).or_insert((code, 0)).1 += n;
        }
        self.mismatches.extend(other.mismatches);
    }

    /// Executions of an encoding, including those that faulted.
    pub fn executions(&self, code: Code) -> u64 {
        self.coverage.get(&(code as usize)).map_or(0, |n| n.completed + n.faulted)
    }
}

/// A list of counts in one line.
fn counts<K: fmt::Debug>(map: &BTreeMap<K, u64>) -> String {
    map.iter().map(|(k, n)| format!("{k:?} {n}")).collect::<Vec<_>>().join(", ")
}

impl fmt::Display for RunSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let skipped: u64 = self.skipped.values().sum();
        let compared = self.cases - skipped;
        writeln!(f, "{} cases, {compared} compared, {} differ", self.cases, self.different())?;
        writeln!(f, "not compared: {skipped} ({})", counts(&self.skipped))?;
        if self.compared_in_part != 0 {
            writeln!(
                f,
                "of these, compared without the instruction that differs: {}",
                self.compared_in_part
            )?;
        }
        writeln!(f, "drawn again: {}", counts(&self.rejected))?;
        writeln!(f, "ended by vector: {}", counts(&self.endings))?;
        let mut culprits: Vec<_> = self.culprits.values().collect();
        culprits.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
        for (code, n) in culprits {
            writeln!(f, "  {n:6} differ at {code:?} ({})", code.op_code().instruction_string())?;
        }
        Ok(())
    }
}

/// The case's instructions with addresses and bytes, and the registers it starts with.
pub fn describe(built: &Built) -> String {
    let mut text = String::new();
    let mut formatter = NasmFormatter::new();
    let start = &built.start;
    let end = start.rip + start.code.len() as u64;
    for (ip, node) in built.flow.nodes.range(..end) {
        let mut line = String::new();
        formatter.format(&node.ins, &mut line);
        let at = (ip - start.rip) as usize;
        let bytes = start.code[at..(at + node.ins.len()).min(start.code.len())].iter();
        let hex: String = bytes.map(|b| format!("{b:02x}")).collect();
        writeln!(text, "    {ip:x} {hex:24} {line}").expect("writing to a string");
    }
    let gpr: Vec<_> = start.gpr.iter().map(|v| format!("{v:x}")).collect();
    writeln!(text, "    gpr {}", gpr.join(" ")).expect("writing to a string");
    let fx = &start.fx;
    writeln!(
        text,
        "    rflags {:x} fcw {:x} fsw {:x} ftw {:x} mxcsr {:x}",
        start.rflags, fx.fcw, fx.fsw, fx.in_use, fx.mxcsr
    )
    .expect("writing to a string");
    for p in &start.planted {
        let hex: String = p.bytes[..p.len as usize].iter().rev().map(|b| format!("{b:02x}")).collect();
        writeln!(text, "    planted {:x}: 0x{hex}", p.at).expect("writing to a string");
    }
    text
}
