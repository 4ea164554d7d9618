//! The report: a folder with the raw data, the table and the pictures, all made from `raw.json`.

use std::fmt::Write as _;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::rounds::{PairRun, Run, Side};
use crate::stats::{Median, median};
use crate::timeline::Timeline;
use crate::workloads::{Load, WORKLOADS, Workload};
use crate::{BenchArgs, Error, plot};

/// What the ping-pong may cost beside a round trip of the channel, µs.
const PING_PONG_BAR_US: f64 = 100.0;

/// All that was measured: `raw.json`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    /// The machine and the versions: what, text.
    pub about: Vec<(String, String)>,
    /// Options of the last slice.
    pub args: BenchArgs,
    /// Rounds made.
    pub rounds: usize,
    /// All runs.
    pub runs: Vec<Run>,
    /// The pair over time.
    pub timeline: Option<Timeline>,
}

/// A row of the table, from the rounds of one workload.
pub struct Row<'a> {
    /// The workload.
    pub workload: &'static Workload,
    /// Protected/unprotected of the rounds.
    pub ratio: Option<Median>,
    /// Runs of each side.
    pub sides: [Vec<&'a Run>; 2],
}

impl Row<'_> {
    /// Median over the runs of a side; NaN when there are none.
    pub fn of(&self, side: Side, value: impl Fn(&Run) -> Option<f64>) -> f64 {
        median(self.sides[side as usize].iter().filter_map(|run| value(run))).map_or(f64::NAN, |m| m.median)
    }

    fn json(&self) -> serde_json::Value {
        let rate = |side| median(self.sides[side as usize].iter().map(|run| run.rate()));
        let latency =
            |side, value: fn(&Run) -> f64| self.of(side, |run| Some(value(run)).filter(|us| *us > 0.0));
        let side = |side| {
            serde_json::json!({
                "per_s": rate(side),
                "p50_us": latency(side, |run| run.p50_us),
                "p99_us": latency(side, |run| run.p99_us),
                "cpu_s_per_operation": self.of(side, Run::cpu_s_per_operation),
            })
        };
        serde_json::json!({
            "workload": self.workload.name,
            "unprotected": side(Side::Unprotected),
            "protected": side(Side::Protected),
            "ratio": self.ratio,
            "cpu_ratio": self.paired(Run::cpu_s_per_operation),
            "bar": self.workload.bar,
            "paper": self.workload.paper,
            "log_mbit_per_s": self.of_pair(|pair| pair.log_bytes as f64 * 8e-6 / pair.seconds),
        })
    }

    /// Protected/unprotected, round by round.
    fn paired(&self, value: impl Fn(&Run) -> Option<f64>) -> Option<Median> {
        let partner = |run: &Run| self.sides[0].iter().find(|other| other.round == run.round);
        let ratio = |run: &&Run| Some(value(run)? / value(partner(run)?)?);
        median(self.sides[1].iter().filter_map(ratio))
    }

    fn of_pair(&self, value: impl Fn(&PairRun) -> f64) -> f64 {
        self.of(Side::Protected, |run| run.pair.as_ref().map(&value))
    }
}

impl Report {
    /// What the folder has so far, or an empty report.
    ///
    /// # Errors
    /// The folder cannot be made, or holds something else.
    pub fn open(args: &BenchArgs) -> Result<Report, Error> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::File { path, source }
        };
        std::fs::create_dir_all(&args.out).map_err(failed(&args.out))?;
        let raw = args.out.join("raw.json");
        let mut report =
            Report { about: about(), args: args.clone(), rounds: 0, runs: Vec::new(), timeline: None };
        if raw.exists() {
            let text = std::fs::read(&raw).map_err(failed(&raw))?;
            let old: Report = serde_json::from_slice(&text).map_err(|e| failed(&raw)(e.into()))?;
            (report.rounds, report.runs, report.timeline) = (old.rounds, old.runs, old.timeline);
        }
        let notes = args.notes.iter().map(|note| note.split_once('=').unwrap_or((note, "")));
        report.about.extend(notes.map(|(what, text)| (what.into(), text.into())));
        Ok(report)
    }

    /// Writes `raw.json`.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn save(&self, folder: &Path) -> Result<(), Error> {
        let json = serde_json::to_vec(self).unwrap_or_else(|e| unreachable!("plain data: {e}"));
        write(folder, "raw.json", &json)
    }

    /// Writes everything else.
    ///
    /// # Errors
    /// It cannot be written or drawn.
    pub fn write(&self, folder: &Path) -> Result<(), Error> {
        let rows = self.rows();
        write(folder, "report.md", self.text(&rows).as_bytes())?;
        let table = serde_json::to_vec_pretty(&rows.iter().map(Row::json).collect::<Vec<_>>());
        write(folder, "table.json", &table.unwrap_or_else(|e| unreachable!("plain data: {e}")))?;
        plot::ratios(&folder.join("ratios.svg"), &rows)?;
        plot::latencies(&folder.join("latency.svg"), &rows)?;
        match &self.timeline {
            Some(timeline) => plot::timeline(&folder.join("timeline.svg"), timeline),
            None => Ok(()),
        }
    }

    /// The rows of what was measured.
    pub fn rows(&self) -> Vec<Row<'_>> {
        let row = |workload: &'static Workload| {
            let side = |side| self.runs.iter().filter(move |r| r.workload == workload.name && r.side == side);
            let sides = [side(Side::Unprotected).collect::<Vec<_>>(), side(Side::Protected).collect()];
            let partner =
                |run: &Run| sides[0].iter().find(|other| other.round == run.round).map(|r| r.rate());
            let ratios = sides[1].iter().filter_map(|run| Some(run.rate() / partner(run)?));
            let ratio = if workload.load == Load::Idle { None } else { median(ratios) };
            Row { workload, ratio, sides }
        };
        WORKLOADS.iter().map(row).filter(|row| !row.sides[1].is_empty()).collect()
    }

    fn text(&self, rows: &[Row]) -> String {
        let mut out = String::new();
        self.tables(&mut out, rows).unwrap_or_else(|e| unreachable!("a String takes everything: {e}"));
        out
    }

    fn tables(&self, out: &mut String, rows: &[Row]) -> std::fmt::Result {
        let guests = self.args.unprotected.len();
        writeln!(out, "{} rounds; {guests} unprotected guest(s) in the pair's place.\n", self.rounds)?;
        writeln!(out, "| workload | unprotected | protected | ratio (95 % interval) | bar | paper 2010 |")?;
        writeln!(out, "|---|---|---|---|---|---|")?;
        for row in rows {
            self.speed(out, row)?;
        }
        writeln!(out, "\nCPU time is of the guest's process and, for the pair, of the backup's.\n")?;
        writeln!(
            out,
            "| workload | p50 µs | p99 µs | added p50 µs | CPU ms/op unprotected | primary | ratio | backup | \
             log Mbit/s | lag ms p50 | max |"
        )?;
        writeln!(out, "|---|---|---|---|---|---|---|---|---|---|---|")?;
        for row in rows {
            cost(out, row)?;
        }
        writeln!(
            out,
            "\nWhere the time of the protected guest's thread goes (the rest is guest code and exits), and what the \
             channel does for an output.\n"
        )?;
        writeln!(
            out,
            "| workload | guest and exits | recording | slowed | idle | outputs/s | held µs | writes/output | reads/output |"
        )?;
        writeln!(out, "|---|---|---|---|---|---|---|---|---|")?;
        for row in rows.iter().filter(|row| row.sides[1].iter().any(|run| run.pair.is_some())) {
            spent(out, row)?;
        }
        self.failover(out)?;
        writeln!(out, "\n| | |\n|---|---|")?;
        for (what, text) in &self.about {
            writeln!(out, "| {what} | {} |", text.replace('|', "\\|"))?;
        }
        Ok(())
    }

    fn speed(&self, out: &mut String, row: &Row) -> std::fmt::Result {
        let Some(ratio) = row.ratio else { return Ok(()) };
        let (unit, scale) = match row.workload.load {
            Load::Receive | Load::Transmit => ("Mbit/s", 1e-6),
            _ => ("/s", 1.0),
        };
        let rate = |side| number(row.of(side, |run| Some(run.rate() * scale)));
        let bar = match (row.workload.load, row.workload.bar, self.args.channel_rtt_us) {
            (Load::PingPong, _, Some(rtt)) => {
                let (added, bar) = (added_us(row), rtt + PING_PONG_BAR_US);
                let verdict = if added <= bar { "met" } else { "**missed**" };
                format!("added {added:.0} µs at most {bar:.0} µs: {verdict}")
            }
            (_, Some(bar), _) => format!("{bar:.2} {}", judged(ratio, bar)),
            _ => String::new(),
        };
        let paper = row.workload.paper.map_or(String::new(), |(ratio, what)| format!("{ratio:.2} {what}"));
        writeln!(
            out,
            "| {} | {} {unit} | {} {unit} | {} | {bar} | {paper} |",
            row.workload.name,
            rate(Side::Unprotected),
            rate(Side::Protected),
            interval(ratio)
        )
    }

    fn failover(&self, out: &mut String) -> std::fmt::Result {
        let Some((timeline, killed)) = self.timeline.as_ref().and_then(|t| Some((t, t.killed_s?))) else {
            return Ok(());
        };
        let longest = timeline.round_trips.iter().map(|(_, ms)| *ms).fold(0.0, f64::max);
        writeln!(
            out,
            "\nThe primary was killed {killed:.2} s into the timeline; on a connection that lived through it the longest \
             round trip was {longest:.0} ms."
        )
    }
}

fn judged(ratio: Median, bar: f64) -> &'static str {
    match ratio {
        r if r.low >= bar => "met",
        r if r.high >= bar => "not excluded by the interval",
        _ => "**missed**",
    }
}

fn interval(ratio: Median) -> String {
    format!("{:.3} ({:.3}–{:.3})", ratio.median, ratio.low, ratio.high)
}

fn added_us(row: &Row) -> f64 {
    row.of(Side::Protected, |run| Some(run.p50_us)) - row.of(Side::Unprotected, |run| Some(run.p50_us))
}

fn cost(out: &mut String, row: &Row) -> std::fmt::Result {
    // A megabit is the operation of bulk transfers, a second that of an idle guest.
    let scale = match row.workload.load {
        Load::Receive | Load::Transmit => 1e6,
        _ => 1.0,
    };
    let cpu = |side, process: usize| {
        let each = |run: &Run| Some(run.cpu_s.get(process)? * 1e3 * scale / run.operations);
        number(row.of(side, each))
    };
    let has_latency = row.sides[1].iter().any(|run| run.p50_us > 0.0);
    let latency = |value: fn(&Run) -> f64| {
        let of = |side| number(row.of(side, |run| Some(value(run))));
        if has_latency {
            format!("{} → {}", of(Side::Unprotected), of(Side::Protected))
        } else {
            String::new()
        }
    };
    let added = if has_latency { format!("{:.0}", added_us(row)) } else { String::new() };
    let lags =
        row.sides[1].iter().filter_map(|run| run.pair.as_ref()).flat_map(|pair| pair.lags_ms.iter().copied());
    let lags: Vec<f64> = lags.collect();
    writeln!(
        out,
        "| {} | {} | {} | {added} | {} | {} | {} | {} | {} | {} | {} |",
        row.workload.name,
        latency(|run| run.p50_us),
        latency(|run| run.p99_us),
        cpu(Side::Unprotected, 0),
        cpu(Side::Protected, 0),
        row.paired(Run::cpu_s_per_operation).map_or(String::new(), interval),
        cpu(Side::Protected, 1),
        number(row.of_pair(|pair| pair.log_bytes as f64 * 8e-6 / pair.seconds)),
        number(median(lags.iter().copied()).map_or(f64::NAN, |m| m.median)),
        number(lags.iter().copied().fold(f64::NAN, f64::max))
    )
}

fn spent(out: &mut String, row: &Row) -> std::fmt::Result {
    let share = |value: fn(&PairRun) -> f64| row.of_pair(|pair| value(pair) / pair.seconds / 10.0);
    let (recording, slowed, idle) = (share(|p| p.recording_ms), share(|p| p.slowed_ms), share(|p| p.idle_ms));
    let an_output =
        |value: fn(&PairRun) -> f64| number(row.of_pair(|pair| value(pair) / pair.outputs.max(1) as f64));
    writeln!(
        out,
        "| {} | {:.1} % | {recording:.1} % | {slowed:.1} % | {idle:.1} % | {} | {} | {} | {} |",
        row.workload.name,
        100.0 - recording - slowed - idle,
        number(row.of_pair(|pair| pair.outputs as f64 / pair.seconds)),
        an_output(|p| p.held_ms * 1e3),
        an_output(|p| p.writes),
        an_output(|p| p.reads)
    )
}

/// Three digits that count.
fn number(value: f64) -> String {
    match value.abs() {
        _ if value.is_nan() => "–".into(),
        a if a >= 100.0 => format!("{value:.0}"),
        a if a >= 10.0 => format!("{value:.1}"),
        a if a >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

fn write(folder: &Path, name: &str, bytes: &[u8]) -> Result<(), Error> {
    let path = folder.join(name);
    std::fs::write(&path, bytes).map_err(|source| Error::File { path, source })
}

/// What this host tells of itself.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_judged_by_the_interval() {
        let ratio = |low, high| Median { median: (low + high) / 2.0, low, high };
        assert_eq!(judged(ratio(0.96, 1.0), 0.95), "met");
        assert_eq!(judged(ratio(0.94, 0.96), 0.95), "not excluded by the interval");
        assert_eq!(judged(ratio(0.8, 0.9), 0.95), "**missed**");
    }

    #[test]
    fn numbers_have_three_digits_that_count() {
        let numbers = [1234.5, 12.34, 1.234, 0.0123, f64::NAN].map(number);
        assert_eq!(numbers, ["1234", "12.3", "1.23", "0.012", "–"]);
    }
}
