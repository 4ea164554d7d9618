//! How cost grows: what was measured at several places of an axis, as curves with their slopes.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;

use crate::report::{Report, Row};
use crate::rounds::Side;
use crate::stats::{Median, slope};
use crate::tables::{interval, number};

/// One workload along an axis.
#[derive(Debug, Serialize)]
pub struct Curve {
    /// What is varied.
    pub axis: String,
    /// What is done.
    pub workload: String,
    /// From the least to the most.
    pub points: Vec<Point>,
}

/// What was measured at one place of an axis.
#[derive(Clone, Debug, Serialize)]
pub struct Point {
    /// Where.
    pub at: f64,
    /// Operations a second without protection, of all guests that are measured.
    pub unprotected: f64,
    /// And with it.
    pub protected: f64,
    /// Their ratio.
    pub ratio: Median,
    /// Ratio of the CPU time for an operation, where it is known.
    pub cpu_ratio: Option<Median>,
    /// What protection adds to the median latency, µs; NaN without latencies.
    pub added_us: f64,
    /// The channel's traffic.
    pub log_mbit_per_s: f64,
}

impl Point {
    fn new(at: f64, row: &Row) -> Option<Point> {
        let rate = |side| row.of(side, |run| Some(run.rate()));
        Some(Point {
            at,
            unprotected: rate(Side::Unprotected),
            protected: rate(Side::Protected),
            ratio: row.ratio?,
            cpu_ratio: row.cpu_ratio(),
            added_us: row.added_us(),
            log_mbit_per_s: row.log_mbit_per_s(),
        })
    }
}

impl Curve {
    /// Change for each doubling of what is varied. `None` where it is not known.
    pub fn for_a_doubling(&self, value: impl Fn(&Point) -> f64) -> Option<f64> {
        let points = self.points.iter().map(|p| (p.at.log2(), value(p)));
        slope(&points.filter(|(_, y)| y.is_finite()).collect::<Vec<_>>())
    }

    /// Change for each one more of what is varied.
    fn for_one_more(&self, value: impl Fn(&Point) -> f64) -> Option<f64> {
        let points = self.points.iter().map(|p| (p.at, value(p)));
        slope(&points.filter(|(_, y)| y.is_finite()).collect::<Vec<_>>())
    }
}

/// The curves of all axes that have several points.
pub fn curves(report: &Report) -> Vec<Curve> {
    let mut all: BTreeMap<(String, String), Vec<Point>> = BTreeMap::new();
    for setting in report.settings() {
        let varied = setting.split_once('=').and_then(|(axis, at)| Some((axis, at.parse::<f64>().ok()?)));
        for row in report.rows(setting) {
            let name = row.workload.name;
            let (axis, workload, at) = match (varied, row.workload.point) {
                (Some((axis, at)), _) => (axis, name, at),
                (None, Some((axis, at))) if setting.is_empty() => {
                    (axis, name.trim_end_matches(|c: char| c.is_ascii_digit()).trim(), at)
                }
                (None, _) => continue,
            };
            all.entry((axis.into(), workload.into())).or_default().extend(Point::new(at, &row));
        }
    }
    let curve = |((axis, workload), mut points): ((String, String), Vec<Point>)| {
        points.sort_by(|a, b| a.at.total_cmp(&b.at));
        Curve { axis, workload, points }
    };
    all.into_iter().map(curve).filter(|curve| curve.points.len() > 1).collect()
}

/// The axes of some curves, each once.
pub fn axes(curves: &[Curve]) -> Vec<&str> {
    let mut axes: Vec<&str> = curves.iter().map(|curve| curve.axis.as_str()).collect();
    axes.dedup();
    axes
}

/// The tables of all axes.
///
/// # Errors
/// `out` takes no more.
pub fn tables(out: &mut String, curves: &[Curve]) -> std::fmt::Result {
    for axis in axes(curves) {
        writeln!(out, "\n## By {axis}\n")?;
        writeln!(
            out,
            "| workload | {axis} | unprotected /s | protected /s | ratio (95 % interval) | CPU ratio | added p50 µs | log of a pair, Mbit/s |"
        )?;
        writeln!(out, "|---|---|---|---|---|---|---|---|")?;
        for curve in curves.iter().filter(|curve| curve.axis == axis) {
            for point in &curve.points {
                writeln!(
                    out,
                    "| {} | {} | {} | {} | {} | {} | {} | {} |",
                    curve.workload,
                    point.at,
                    number(point.unprotected),
                    number(point.protected),
                    interval(point.ratio),
                    point.cpu_ratio.map_or(String::new(), interval),
                    number(point.added_us),
                    number(point.log_mbit_per_s)
                )?;
            }
        }
        writeln!(out)?;
        for curve in curves.iter().filter(|curve| curve.axis == axis) {
            slopes(out, curve)?;
        }
    }
    Ok(())
}

fn slopes(out: &mut String, curve: &Curve) -> std::fmt::Result {
    let told = |slope: Option<f64>| slope.map_or("–".into(), |slope| format!("{slope:+.4}"));
    writeln!(
        out,
        "- {}: for each doubling of {} the ratio changes by {}, the CPU ratio by {}; each one more adds {} Mbit/s to a pair's log.",
        curve.workload,
        curve.axis,
        told(curve.for_a_doubling(|p| p.ratio.median)),
        told(curve.for_a_doubling(|p| p.cpu_ratio.map_or(f64::NAN, |m| m.median))),
        told(curve.for_one_more(|p| p.log_mbit_per_s))
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slopes_are_those_of_the_points() {
        let point = |at, ratio: f64, log_mbit_per_s| Point {
            at,
            unprotected: 1.0,
            protected: ratio,
            ratio: Median { median: ratio, low: ratio, high: ratio },
            cpu_ratio: None,
            added_us: f64::NAN,
            log_mbit_per_s,
        };
        let points = vec![point(1.0, 1.0, 0.5), point(2.0, 0.9, 1.0), point(4.0, 0.8, 2.0)];
        let curve = Curve { axis: "pairs".into(), workload: "packets".into(), points };
        assert!((curve.for_a_doubling(|p| p.ratio.median).unwrap() + 0.1).abs() < 1e-12);
        let mut out = String::new();
        tables(&mut out, &[curve]).unwrap();
        assert!(
            out.contains("ratio changes by -0.1000, the CPU ratio by –; each one more adds +0.5000 Mbit/s to a pair's log"),
            "{out}"
        );
    }
}
