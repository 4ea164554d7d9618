//! How the cost grows: what was measured at several values on an axis, as curves with their slopes.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;

use crate::figures::{interval, number};
use crate::report::{BenchReport, Row};
use crate::rounds::BenchSide;
use crate::stats::{Median, slope};

/// One workload along an axis.
#[derive(Debug, Serialize)]
pub struct Curve {
    /// What is varied.
    pub axis: String,
    /// Name of the workload.
    pub workload: String,
    /// The points, in ascending order.
    pub points: Vec<CurvePoint>,
}

/// What was measured at one value on an axis.
#[derive(Clone, Debug, Serialize)]
pub struct CurvePoint {
    /// The value on the axis.
    pub at: f64,
    /// Operations a second without protection, of all guests that are measured.
    pub unprotected: f64,
    /// Operations a second with protection, of all guests that are measured.
    pub protected: f64,
    /// Their ratio.
    pub ratio: Median,
    /// Ratio of the CPU time for an operation, if it was measured.
    pub cpu_ratio: Option<Median>,
    /// What protection adds to the median latency, µs; NaN without latencies.
    pub added_us: f64,
    /// Traffic of the channel, Mbit/s.
    pub log_mbit_per_s: f64,
}

impl CurvePoint {
    fn new(at: f64, row: &Row) -> Option<CurvePoint> {
        let rate = |side| row.median_of(side, |run| Some(run.rate()));
        Some(CurvePoint {
            at,
            unprotected: rate(BenchSide::Unprotected),
            protected: rate(BenchSide::Protected),
            ratio: row.ratio?,
            cpu_ratio: row.cpu_ratio(),
            added_us: row.added_us(),
            log_mbit_per_s: row.log_mbit_per_s(),
        })
    }
}

impl Curve {
    /// Change of `value` for each doubling of what is varied; `None` for fewer than two points with a value.
    pub fn for_a_doubling(&self, value: impl Fn(&CurvePoint) -> f64) -> Option<f64> {
        let points = self.points.iter().map(|p| (p.at.log2(), value(p)));
        slope(&points.filter(|(_, y)| y.is_finite()).collect::<Vec<_>>())
    }

    /// Change of `value` for each increase by 1 of what is varied; `None` for fewer than two points with a value.
    fn for_one_more(&self, value: impl Fn(&CurvePoint) -> f64) -> Option<f64> {
        let points = self.points.iter().map(|p| (p.at, value(p)));
        slope(&points.filter(|(_, y)| y.is_finite()).collect::<Vec<_>>())
    }
}

/// All curves that have more than one point.
pub fn curves(report: &BenchReport) -> Vec<Curve> {
    let mut all: BTreeMap<(String, String), Vec<CurvePoint>> = BTreeMap::new();
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
            all.entry((axis.into(), workload.into())).or_default().extend(CurvePoint::new(at, &row));
        }
    }
    let curve = |((axis, workload), mut points): ((String, String), Vec<CurvePoint>)| {
        points.sort_by(|a, b| a.at.total_cmp(&b.at));
        Curve { axis, workload, points }
    };
    all.into_iter().map(curve).filter(|curve| curve.points.len() > 1).collect()
}

/// The axes of the curves, without duplicates.
pub fn axes(curves: &[Curve]) -> Vec<&str> {
    let mut axes: Vec<&str> = curves.iter().map(|curve| curve.axis.as_str()).collect();
    axes.dedup();
    axes
}

/// Writes a table for each axis.
///
/// # Errors
/// `out` cannot be written to.
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
    let text = |slope: Option<f64>| slope.map_or("–".into(), |slope| format!("{slope:+.4}"));
    writeln!(
        out,
        "- {}: for each doubling of {} the ratio changes by {}, the CPU ratio by {}; each increase by one adds {} Mbit/s to a pair's log.",
        curve.workload,
        curve.axis,
        text(curve.for_a_doubling(|p| p.ratio.median)),
        text(curve.for_a_doubling(|p| p.cpu_ratio.map_or(f64::NAN, |m| m.median))),
        text(curve.for_one_more(|p| p.log_mbit_per_s))
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slopes_are_those_of_the_points() {
        let point = |at, ratio: f64, log_mbit_per_s| CurvePoint {
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
            out.contains("ratio changes by -0.1000, the CPU ratio by –; each increase by one adds +0.5000 Mbit/s to a pair's log"),
            "{out}"
        );
    }
}
