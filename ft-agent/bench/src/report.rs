//! What was measured: the content of `raw.json`, and the rows that are made from it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::rounds::{BenchRun, BenchSide, PairRun};
use crate::stats::{Median, center_of_ratios, median};
use crate::timeline::Timeline;
use crate::workloads::{BenchGuest, Load, Workload};
use crate::{BenchArgs, BenchError};

/// Everything that was measured: the content of `raw.json`.
#[derive(Debug, Serialize, Deserialize)]
pub struct BenchReport {
    /// The calls of `vmft bench` that added rounds.
    pub slices: Vec<Slice>,
    /// All runs.
    pub runs: Vec<BenchRun>,
    /// The pair over time.
    pub timeline: Option<Timeline>,
}

/// One call of `vmft bench`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Slice {
    /// Its options.
    pub args: BenchArgs,
    /// Facts about the host and the versions: name and text.
    pub about: Vec<(String, String)>,
}

/// A row of the table, from the rounds of one workload.
pub struct Row<'a> {
    /// The workload.
    pub workload: &'static Workload,
    /// Center of the rounds' ratios protected/unprotected.
    pub ratio: Option<Median>,
    /// The runs of each side that count.
    pub sides: [Vec<&'a BenchRun>; 2],
    /// The runs on the other virtual machines.
    pub peers: Vec<&'a BenchRun>,
}

impl Row<'_> {
    /// Median of a value over the runs of a side; NaN when no run has it.
    pub fn median_of(&self, side: BenchSide, value: impl Fn(&BenchRun) -> Option<f64>) -> f64 {
        median(self.sides[side as usize].iter().filter_map(|run| value(run))).map_or(f64::NAN, |m| m.median)
    }

    /// The row in `table.json`.
    pub fn json(&self) -> serde_json::Value {
        let rate = |side| median(self.sides[side as usize].iter().map(|run| run.rate()));
        let latency = |side, value: fn(&BenchRun) -> f64| {
            self.median_of(side, |run| Some(value(run)).filter(|us| *us > 0.0))
        };
        let side = |side| {
            serde_json::json!({
                "per_s": rate(side),
                "p50_us": latency(side, |run| run.p50_us),
                "p99_us": latency(side, |run| run.p99_us),
                "cpu_s_per_operation": self.median_of(side, BenchRun::cpu_s_per_operation),
            })
        };
        let peers: BTreeMap<_, _> =
            self.peer_names().into_iter().map(|name| (name, self.peer_rate(name))).collect();
        serde_json::json!({
            "workload": self.workload.name,
            "unprotected": side(BenchSide::Unprotected),
            "protected": side(BenchSide::Protected),
            "ratio": self.ratio,
            "cpu_ratio": self.cpu_ratio(),
            "bar": self.workload.bar,
            "paper": self.workload.paper,
            "log_mbit_per_s": self.log_mbit_per_s(),
            "peers_per_s": peers,
        })
    }

    /// Center of the ratios protected/unprotected of `value`, one ratio for each round.
    fn paired(&self, value: impl Fn(&[&BenchRun]) -> Option<f64>) -> Option<Median> {
        let by_round = |side: BenchSide| {
            let mut rounds: BTreeMap<usize, Vec<&BenchRun>> = BTreeMap::new();
            self.sides[side as usize].iter().for_each(|run| rounds.entry(run.round).or_default().push(run));
            rounds
        };
        let unprotected = by_round(BenchSide::Unprotected);
        let ratio =
            |(round, runs): (usize, Vec<&BenchRun>)| Some(value(&runs)? / value(unprotected.get(&round)?)?);
        center_of_ratios(by_round(BenchSide::Protected).into_iter().filter_map(ratio))
    }

    /// Ratio protected/unprotected of the CPU time of the guests' processes for an operation.
    pub fn cpu_ratio(&self) -> Option<Median> {
        self.paired(|runs| {
            let cpu: f64 = runs.iter().map(|run| run.cpu_s.first().copied()).sum::<Option<f64>>()?;
            Some(cpu / runs.iter().map(|run| run.operations).sum::<f64>())
        })
    }

    /// Median of a value over the runs of the pair; NaN when no run has it.
    pub fn median_of_pair(&self, value: impl Fn(&PairRun) -> f64) -> f64 {
        self.median_of(BenchSide::Protected, |run| run.pair.as_ref().map(&value))
    }

    /// Traffic of the channel, Mbit/s.
    pub fn log_mbit_per_s(&self) -> f64 {
        self.median_of_pair(|pair| pair.log_bytes as f64 * 8e-6 / pair.seconds)
    }

    /// What protection adds to the median latency, µs; NaN without latencies.
    pub fn added_us(&self) -> f64 {
        let p50 = |side| self.median_of(side, |run| Some(run.p50_us).filter(|us| *us > 0.0));
        p50(BenchSide::Protected) - p50(BenchSide::Unprotected)
    }

    /// Names of the other virtual machines that were measured.
    pub fn peer_names(&self) -> Vec<&str> {
        let names: BTreeSet<_> = self.peers.iter().filter_map(|run| run.peer.as_deref()).collect();
        names.into_iter().collect()
    }

    /// Operations a second on another virtual machine.
    pub fn peer_rate(&self, name: &str) -> Option<Median> {
        median(self.peers.iter().filter(|run| run.peer.as_deref() == Some(name)).map(|run| run.rate()))
    }
}

impl BenchReport {
    /// Opens the report in the directory, or starts an empty one.
    ///
    /// # Errors
    /// The directory cannot be made, or its `raw.json` is not that of this guest's report.
    pub fn open(args: &BenchArgs) -> Result<BenchReport, BenchError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| BenchError::File { path, source }
        };
        std::fs::create_dir_all(&args.out).map_err(failed(&args.out))?;
        let raw = args.out.join("raw.json");
        let mut report = BenchReport { slices: Vec::new(), runs: Vec::new(), timeline: None };
        if raw.exists() {
            let text = std::fs::read(&raw).map_err(failed(&raw))?;
            report = serde_json::from_slice(&text).map_err(|e| failed(&raw)(e.into()))?;
            if report.guest() != args.guest {
                return Err(failed(&raw)(std::io::Error::other(
                    "it has measurements of another guest; give another --out",
                )));
            }
        }
        let notes = args.notes.iter().map(|note| note.split_once('=').unwrap_or((note, "")));
        let notes = notes.map(|(what, text)| (what.into(), text.into()));
        let about = about().into_iter().chain(notes).collect();
        report.slices.push(Slice { args: args.clone(), about });
        Ok(report)
    }

    fn guest(&self) -> BenchGuest {
        self.slices.first().map_or(BenchGuest::default(), |slice| slice.args.guest)
    }

    /// The last slice with a setting.
    pub fn slice(&self, setting: &str) -> Option<&Slice> {
        self.slices.iter().rfind(|slice| slice.args.setting == setting)
    }

    /// Number of rounds with a setting so far.
    pub fn rounds(&self, setting: &str) -> usize {
        let runs = self.runs.iter().filter(|run| run.setting == setting);
        runs.map(|run| run.round + 1).max().unwrap_or(0)
    }

    /// All settings, in the order in which they first appeared.
    pub fn settings(&self) -> Vec<&str> {
        let mut settings: Vec<&str> = Vec::new();
        for slice in &self.slices {
            if !settings.contains(&slice.args.setting.as_str()) {
                settings.push(&slice.args.setting);
            }
        }
        settings
    }

    /// Writes `raw.json`.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn save(&self, folder: &Path) -> Result<(), BenchError> {
        let json = serde_json::to_vec(self).unwrap_or_else(|e| unreachable!("plain data: {e}"));
        write_file(folder, "raw.json", &json)
    }

    /// The rows for everything that was measured with a setting.
    pub fn rows(&self, setting: &str) -> Vec<Row<'_>> {
        let row = |workload: &'static Workload| {
            let runs = || {
                let of = move |run: &&BenchRun| {
                    run.setting == setting && run.workload == workload.name && !run.repeated
                };
                self.runs.iter().filter(of)
            };
            let side = |side| runs().filter(move |run| run.peer.is_none() && run.side == side).collect();
            let sides = [side(BenchSide::Unprotected), side(BenchSide::Protected)];
            let peers = runs().filter(|run| run.peer.is_some()).collect();
            let mut row = Row { workload, ratio: None, sides, peers };
            if workload.load != Load::Idle {
                let sum = |runs: &[&BenchRun], value: fn(&BenchRun) -> f64| {
                    runs.iter().map(|run| value(run)).sum::<f64>()
                };
                row.ratio = row.paired(|runs| Some(sum(runs, |r| r.operations) / sum(runs, |r| r.seconds)));
            }
            row
        };
        let all = self.guest().workloads().iter();
        all.map(row).filter(|row| !row.sides[1].is_empty()).collect()
    }

    /// The same rows without the points of curves.
    pub fn main_rows(&self, setting: &str) -> Vec<Row<'_>> {
        self.rows(setting).into_iter().filter(|row| row.workload.point.is_none()).collect()
    }
}

/// Writes a file of the report.
///
/// # Errors
/// It cannot be written.
pub fn write_file(folder: &Path, name: &str, bytes: &[u8]) -> Result<(), BenchError> {
    let path = folder.join(name);
    std::fs::write(&path, bytes).map_err(|source| BenchError::File { path, source })
}

/// Facts about this host: name and text.
fn about() -> Vec<(String, String)> {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    let cores = cpu.lines().filter(|line| line.starts_with("processor")).count();
    vec![
        ("CPU".into(), format!("{cores} × {}", model.trim_start_matches(['\t', ' ', ':']))),
        ("kernel".into(), read("/proc/version").trim().into()),
        ("load when it began".into(), read("/proc/loadavg").trim().into()),
        ("vmft".into(), env!("CARGO_PKG_VERSION").into()),
    ]
}
