//! The text of `report.md`: its tables.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use crate::figures::{interval, number};
use crate::growth::{self, Curve};
use crate::report::{BenchReport, Row, Slice};
use crate::rounds::{BenchRun, BenchSide, PairRun};
use crate::stats::{Median, median};
use crate::workloads::Load;

/// How much more than a round trip of the channel protection may add to the ping-pong's latency, µs.
const PING_PONG_BAR_US: f64 = 100.0;

/// The whole text of the report.
pub fn text(report: &BenchReport, curves: &[Curve]) -> String {
    let mut out = String::new();
    report
        .sections(&mut out, curves)
        .unwrap_or_else(|e| unreachable!("writing to a String does not fail: {e}"));
    out
}

impl BenchReport {
    fn sections(&self, out: &mut String, curves: &[Curve]) -> std::fmt::Result {
        let is_point =
            |setting: &str| setting.split_once('=').is_some_and(|(_, at)| at.parse::<f64>().is_ok());
        for setting in self.settings().into_iter().filter(|setting| !is_point(setting)) {
            let rows = self.main_rows(setting);
            if rows.is_empty() {
                continue;
            }
            if !setting.is_empty() {
                writeln!(out, "\n## With {setting}\n")?;
            }
            self.ratios(out, &rows, setting)?;
            self.peers(out, &rows)?;
            costs(out, &rows)?;
            times(out, &rows)?;
        }
        growth::tables(out, curves)?;
        self.failover(out)?;
        self.origin(out)
    }

    /// The first table: speeds and ratios.
    fn ratios(&self, out: &mut String, rows: &[Row], setting: &str) -> std::fmt::Result {
        let mut runs: Vec<usize> = rows.iter().map(|row| row.sides[1].len()).collect();
        runs.sort_unstable();
        let (least, most) = (runs.first().unwrap_or(&0), runs.last().unwrap_or(&0));
        let runs = if least == most { least.to_string() } else { format!("{least} to {most}") };
        let Some(Slice { args, .. }) = self.slice(setting) else { return Ok(()) };
        let guests = args.unprotected.len();
        write!(out, "{runs} runs of each workload on each side, in turns; ")?;
        writeln!(out, "{guests} unprotected guest(s) on the other side. {}\n", self.disturbed(rows))?;
        writeln!(out, "| workload | unprotected | protected | ratio (95 % interval) | bar | paper 2010 |")?;
        writeln!(out, "|---|---|---|---|---|---|")?;
        for row in rows {
            speed(out, row, args.channel_rtt_us)?;
        }
        match args.same {
            true => own_check(out, rows),
            false => Ok(()),
        }
    }

    fn disturbed(&self, rows: &[Row]) -> String {
        let names: BTreeSet<_> = rows.iter().map(|row| row.workload.name).collect();
        let of = |run: &&BenchRun| names.contains(run.workload.as_str());
        let repeated = self.runs.iter().filter(of).filter(|run| run.repeated).count();
        let sides = || rows.iter().flat_map(|row| row.sides.iter().flatten());
        let disturbed = sides().filter(|run| run.disturbance.matters()).count();
        format!(
            "Other programs used the host during {repeated} more runs, which were repeated, and during {disturbed} of the \
             {} runs that count.",
            sides().count()
        )
    }

    /// The other virtual machines, beside the unprotected and the protected guest.
    fn peers(&self, out: &mut String, rows: &[Row]) -> std::fmt::Result {
        let names: BTreeSet<_> = rows.iter().flat_map(Row::peer_names).collect();
        if names.is_empty() {
            return Ok(());
        }
        let columns: Vec<_> = names.iter().copied().collect();
        writeln!(
            out,
            "\nPeers: other virtual machines with the same kernel and initramfs, on the primary's core.\n"
        )?;
        writeln!(out, "| workload | vmft | vmft protected | {} |", columns.join(" | "))?;
        writeln!(out, "|---|---|---|{}", "---|".repeat(columns.len()))?;
        for row in rows.iter().filter(|row| !row.peers.is_empty()) {
            let (unit, scale) = unit(row);
            let cell = |per_s: f64| format!("{} {unit}", number(per_s * scale));
            let own = [BenchSide::Unprotected, BenchSide::Protected]
                .map(|side| cell(row.median_of(side, |run| Some(run.rate()))));
            let peers =
                columns.iter().map(|name| row.peer_rate(name).map_or("–".into(), |m| cell(m.median)));
            let cells: Vec<_> = own.into_iter().chain(peers).collect();
            writeln!(out, "| {} | {} |", row.workload.name, cells.join(" | "))?;
        }
        Ok(())
    }

    /// The host and the versions of the last call of `vmft bench`, and the commands of all calls.
    fn origin(&self, out: &mut String) -> std::fmt::Result {
        writeln!(out, "\n| | |\n|---|---|")?;
        let last = self.slice("").or(self.slices.last());
        for (what, text) in last.iter().flat_map(|slice| &slice.about) {
            writeln!(out, "| {what} | {} |", text.replace('|', "\\|"))?;
        }
        let mut commands: BTreeSet<_> = self.slices.iter().map(Slice::command_and_commit).collect();
        if let Some(last) = last {
            commands.remove(&last.command_and_commit());
        }
        for (command, commit) in commands {
            writeln!(out, "| also | {command} ({commit}) |")?;
        }
        Ok(())
    }

    fn failover(&self, out: &mut String) -> std::fmt::Result {
        let Some((timeline, killed)) = self.timeline.as_ref().and_then(|t| Some((t, t.killed_s?))) else {
            return Ok(());
        };
        let longest = timeline.round_trips.iter().map(|(_, ms)| *ms).fold(0.0, f64::max);
        writeln!(
            out,
            "\nThe primary was killed {killed:.2} s into the timeline; on a connection that survived this the longest \
             round trip was {longest:.0} ms."
        )
    }
}

fn speed(out: &mut String, row: &Row, channel_rtt_us: Option<f64>) -> std::fmt::Result {
    let Some(ratio) = row.ratio else { return Ok(()) };
    let (unit, scale) = unit(row);
    let rate = |side| number(row.median_of(side, |run| Some(run.rate() * scale)));
    let bar = match (row.workload.load, row.workload.bar, channel_rtt_us) {
        (Load::PingPong, _, Some(rtt)) => {
            let (added, bar) = (row.added_us(), rtt + PING_PONG_BAR_US);
            let verdict = if added <= bar { "met" } else { "**missed**" };
            format!("added {added:.0} µs at most {bar:.0} µs: {verdict}")
        }
        (_, Some(bar), _) => format!("{bar:.2} {}", judgement(ratio, bar)),
        _ => String::new(),
    };
    let paper = row.workload.paper.map_or(String::new(), |(ratio, what)| format!("{ratio:.2} {what}"));
    writeln!(
        out,
        "| {} | {} {unit} | {} {unit} | {} | {bar} | {paper} |",
        row.workload.name,
        rate(BenchSide::Unprotected),
        rate(BenchSide::Protected),
        interval(ratio)
    )
}

fn judgement(ratio: Median, bar: f64) -> &'static str {
    match ratio {
        r if r.low >= bar => "met",
        r if r.high >= bar => "not excluded by the interval",
        _ => "**missed**",
    }
}

fn unit(row: &Row) -> (&'static str, f64) {
    match row.workload.load {
        Load::Receive | Load::Transmit => ("Mbit/s", 1e-6),
        _ => ("/s", 1.0),
    }
}

impl Slice {
    /// The command and the commit that were measured, from the notes.
    fn command_and_commit(&self) -> (&str, &str) {
        let note =
            |what| self.about.iter().find(|(name, _)| name == what).map_or("", |(_, text)| text.as_str());
        (note("command"), note("commit"))
    }
}

/// For a benchmark of two equal sides, says whether it found them equal.
fn own_check(out: &mut String, rows: &[Row]) -> std::fmt::Result {
    let ratios: Vec<_> = rows.iter().filter_map(|row| Some((row.workload.name, row.ratio?))).collect();
    let half = |ratio: &Median| (ratio.high - ratio.low) / 2.0;
    let wide =
        ratios.iter().filter(|(_, ratio)| half(ratio) > 0.03).map(|(name, _)| *name).collect::<Vec<_>>();
    let holds = |ratio: &Median| ratio.low <= 1.0 && ratio.high >= 1.0;
    let off = ratios.iter().filter(|(_, ratio)| !holds(ratio)).map(|(name, _)| *name).collect::<Vec<_>>();
    let listed = |names: &[&str]| if names.is_empty() { "none".into() } else { names.join(", ") };
    let widest = ratios.iter().map(|(_, ratio)| half(ratio)).fold(0.0, f64::max) * 100.0;
    writeln!(
        out,
        "\nBoth sides are set up alike. Of {} intervals, those without 1.00 (one in twenty by chance): {}; those wider \
         than ±3 %: {}; the widest is ±{widest:.1} %.",
        ratios.len(),
        listed(&off),
        listed(&wide)
    )
}

fn costs(out: &mut String, rows: &[Row]) -> std::fmt::Result {
    writeln!(
        out,
        "\nCPU time is that of the guest's process and, for the pair, also that of the backup's process.\n"
    )?;
    writeln!(
        out,
        "| workload | p50 µs | p99 µs | added p50 µs | CPU ms/op unprotected | primary | ratio | backup | \
         log Mbit/s | lag ms p50 | max |"
    )?;
    writeln!(out, "|---|---|---|---|---|---|---|---|---|---|---|")?;
    rows.iter().try_for_each(|row| cost(out, row))
}

fn times(out: &mut String, rows: &[Row]) -> std::fmt::Result {
    let known: Vec<_> = rows.iter().filter(|row| row.sides[1].iter().any(|run| run.pair.is_some())).collect();
    if known.is_empty() {
        return Ok(());
    }
    writeln!(
        out,
        "\nWhere the time of the protected guest's thread goes (the rest is guest code and exits), and what the channel \
         does for an output.\n"
    )?;
    writeln!(
        out,
        "| workload | guest and exits | recording | slowed | idle | outputs/s | held µs | writes/output | reads/output |"
    )?;
    writeln!(out, "|---|---|---|---|---|---|---|---|---|")?;
    known.into_iter().try_for_each(|row| spent(out, row))
}

fn cost(out: &mut String, row: &Row) -> std::fmt::Result {
    // The operation is a megabit for bulk transfers and a second for an idle guest.
    let scale = match row.workload.load {
        Load::Receive | Load::Transmit => 1e6,
        _ => 1.0,
    };
    let cpu = |side, process: usize| {
        let each = |run: &BenchRun| Some(run.cpu_s.get(process)? * 1e3 * scale / run.operations);
        number(row.median_of(side, each))
    };
    let has_latency = row.sides[1].iter().any(|run| run.p50_us > 0.0);
    let latency = |value: fn(&BenchRun) -> f64| {
        let of = |side| number(row.median_of(side, |run| Some(value(run))));
        if has_latency {
            format!("{} → {}", of(BenchSide::Unprotected), of(BenchSide::Protected))
        } else {
            String::new()
        }
    };
    let added = if has_latency { format!("{:.0}", row.added_us()) } else { String::new() };
    let lags =
        row.sides[1].iter().filter_map(|run| run.pair.as_ref()).flat_map(|pair| pair.lags_ms.iter().copied());
    let lags: Vec<f64> = lags.collect();
    writeln!(
        out,
        "| {} | {} | {} | {added} | {} | {} | {} | {} | {} | {} | {} |",
        row.workload.name,
        latency(|run| run.p50_us),
        latency(|run| run.p99_us),
        cpu(BenchSide::Unprotected, 0),
        cpu(BenchSide::Protected, 0),
        row.cpu_ratio().map_or(String::new(), interval),
        cpu(BenchSide::Protected, 1),
        number(row.log_mbit_per_s()),
        number(median(lags.iter().copied()).map_or(f64::NAN, |m| m.median)),
        number(lags.iter().copied().fold(f64::NAN, f64::max))
    )
}

fn spent(out: &mut String, row: &Row) -> std::fmt::Result {
    let share = |value: fn(&PairRun) -> f64| row.median_of_pair(|pair| value(pair) / pair.seconds / 10.0);
    let (recording, slowed, idle) = (share(|p| p.recording_ms), share(|p| p.slowed_ms), share(|p| p.idle_ms));
    let an_output = |value: fn(&PairRun) -> f64| {
        number(row.median_of_pair(|pair| value(pair) / pair.outputs.max(1) as f64))
    };
    writeln!(
        out,
        "| {} | {:.1} % | {recording:.1} % | {slowed:.1} % | {idle:.1} % | {} | {} | {} | {} |",
        row.workload.name,
        100.0 - recording - slowed - idle,
        number(row.median_of_pair(|pair| pair.outputs as f64 / pair.seconds)),
        an_output(|p| p.held_ms * 1e3),
        an_output(|p| p.writes),
        an_output(|p| p.reads)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_judged_by_the_interval() {
        let ratio = |low, high| Median { median: (low + high) / 2.0, low, high };
        assert_eq!(judgement(ratio(0.96, 1.0), 0.95), "met");
        assert_eq!(judgement(ratio(0.94, 0.96), 0.95), "not excluded by the interval");
        assert_eq!(judgement(ratio(0.8, 0.9), 0.95), "**missed**");
    }
}
