//! The report's pictures.

use std::path::Path;

use plotters::coord::Shift;
use plotters::coord::ranged1d::ValueFormatter;
use plotters::prelude::*;

use crate::BenchError;
use crate::growth::{Curve, CurvePoint};
use crate::report::Row;
use crate::rounds::BenchSide;
use crate::stats::Histogram;
use crate::timeline::Timeline;

type Canvas<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type DrawResult = Result<(), Box<dyn std::error::Error>>;

const UNPROTECTED: RGBColor = RGBColor(110, 110, 110);
const PROTECTED: RGBColor = RGBColor(0, 90, 170);
/// Space for the legend under the ratios, in rows.
const LEGEND: f64 = 2.0;
const PAPER: RGBColor = RGBColor(200, 80, 0);
/// Workloads whose latencies are drawn.
const LATENCIES: &[&str] = &["ping-pong", "redis set c1", "redis set c50", "http small"];

fn draw(
    path: &Path,
    size: (u32, u32),
    picture: impl FnOnce(&Canvas) -> DrawResult,
) -> Result<(), BenchError> {
    let canvas = SVGBackend::new(path, size).into_drawing_area();
    let drawn = canvas.fill(&WHITE).map_err(Into::into).and_then(|()| picture(&canvas));
    drawn
        .and_then(|()| canvas.present().map_err(Into::into))
        .map_err(|e| BenchError::Picture(path.into(), e.to_string()))
}

/// Draws the ratios with their intervals, with the paper's ratios beside them.
pub fn ratios(path: &Path, rows: &[Row]) -> Result<(), BenchError> {
    let rows: Vec<_> = rows.iter().filter_map(|row| Some((row, row.ratio?))).collect();
    if rows.is_empty() {
        return Ok(());
    }
    let low = rows.iter().map(|(_, ratio)| ratio.low).fold(0.85, f64::min);
    let high = rows.iter().map(|(_, ratio)| ratio.high).fold(1.05, f64::max).min(1.5);
    draw(path, (900, 160 + 26 * rows.len() as u32), |canvas| {
        let mut chart = ChartBuilder::on(canvas)
            .caption("Protected over unprotected: median and 95 % interval", ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(32)
            .y_label_area_size(130)
            .build_cartesian_2d((low - 0.02)..(high + 0.02), (rows.len() as f64 + LEGEND)..-0.5)?;
        let name = |y: &f64| match rows.get(y.round() as usize) {
            Some((row, _)) if (y - y.round()).abs() < 0.01 && *y > -0.01 => row.workload.name.to_owned(),
            _ => String::new(),
        };
        chart
            .configure_mesh()
            .y_labels(2 * rows.len() + 6)
            .y_label_formatter(&name)
            .disable_y_mesh()
            .draw()?;
        let whole = rows.len() as f64;
        chart.draw_series(LineSeries::new([(1.0, -0.5), (1.0, whole - 0.5)], BLACK.mix(0.5)))?;
        for (y, (row, ratio)) in rows.iter().enumerate() {
            let y = y as f64;
            let line = PathElement::new([(ratio.low, y), (ratio.high, y)], PROTECTED.stroke_width(3));
            chart.draw_series([line])?;
            chart.draw_series([Circle::new((ratio.median, y), 5, PROTECTED.filled())])?;
            if let Some(bar) = row.workload.bar {
                chart.draw_series([PathElement::new(
                    [(bar, y - 0.4), (bar, y + 0.4)],
                    BLACK.stroke_width(1),
                )])?;
            }
            if let Some((paper, _)) = row.workload.paper {
                chart.draw_series([TriangleMarker::new((paper, y), 6, PAPER.filled())])?;
            }
        }
        let legend = |chart: &mut ChartContext<_, _>, text: &str, color: RGBColor| -> DrawResult {
            let none = std::iter::empty::<Circle<(f64, f64), i32>>();
            let mark = move |(x, y)| Circle::new((x + 8, y), 5, color.filled());
            chart.draw_series(none)?.label(text).legend(mark);
            Ok(())
        };
        legend(&mut chart, "vmft", PROTECTED)?;
        legend(&mut chart, "the paper of 2010, for a similar workload", PAPER)?;
        legend(&mut chart, "line: the bar", BLACK)?;
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerLeft)
            .background_style(WHITE.mix(0.8))
            .draw()?;
        Ok(())
    })
}

/// Draws the distributions of latencies: which share of operations took longer, with and without protection.
pub fn latencies(path: &Path, rows: &[Row]) -> Result<(), BenchError> {
    let rows: Vec<_> = rows.iter().filter(|row| LATENCIES.contains(&row.workload.name)).collect();
    if rows.is_empty() {
        return Ok(());
    }
    draw(path, (900, 240 * rows.len() as u32), |canvas| {
        for (row, area) in rows.iter().zip(canvas.split_evenly((rows.len(), 1))) {
            latency(&area, row)?;
        }
        Ok(())
    })
}

fn latency(area: &Canvas, row: &Row) -> DrawResult {
    let shares = [BenchSide::Unprotected, BenchSide::Protected].map(|side| {
        let mut all = Histogram::default();
        row.sides[side as usize].iter().for_each(|run| all.add(&run.latencies));
        all.shares_above()
    });
    let us = || shares.iter().flatten().map(|(us, _)| *us);
    // Whole decades, so that the labels are powers of ten.
    let decade = |us: f64, round: fn(f64) -> f64| 10f64.powf(round(us.max(1.0).log10()));
    let (from, to) =
        (decade(us().fold(f64::MAX, f64::min), f64::floor), decade(us().fold(10.0, f64::max), f64::ceil));
    let mut chart = ChartBuilder::on(area)
        .caption(format!("{}: share of operations that took longer", row.workload.name), ("sans-serif", 16))
        .margin(10)
        .x_label_area_size(34)
        .y_label_area_size(60)
        .build_cartesian_2d((from..to).log_scale(), (0.0001..1.0).log_scale())?;
    chart.configure_mesh().x_desc("µs").x_label_formatter(&|us| format!("{us:.0}")).draw()?;
    for (points, (name, color)) in shares.iter().zip([("unprotected", UNPROTECTED), ("protected", PROTECTED)])
    {
        let points = points.iter().map(|(us, share)| (*us, share.max(0.0001)));
        let line = LineSeries::new(points, color.stroke_width(2));
        chart
            .draw_series(line)?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color));
    }
    let labels = SeriesLabelPosition::LowerLeft;
    chart.configure_series_labels().position(labels).background_style(WHITE.mix(0.8)).draw()?;
    Ok(())
}

/// Draws the curves along an axis: ratios with their intervals, operations a second, and log traffic.
pub fn growth(path: &Path, axis: &str, curves: &[&Curve]) -> Result<(), BenchError> {
    type Value = fn(&CurvePoint) -> f64;
    let panels: [(&str, Value, Option<Value>); 3] = [
        ("protected over unprotected", |p| p.ratio.median, None),
        ("operations a second; grey: unprotected", |p| p.protected, Some(|p| p.unprotected)),
        ("log, Mbit/s", |p| p.log_mbit_per_s, None),
    ];
    draw(path, (900, 900), |canvas| {
        for (n, (area, (name, value, beside))) in canvas.split_evenly((3, 1)).iter().zip(panels).enumerate() {
            let (min, max) = if n == 0 { (0.8, 1.1) } else { (f64::MAX, 0.0) };
            let values = || {
                let all = curves.iter().flat_map(|c| &c.points);
                all.flat_map(|p| [value(p), beside.map_or(f64::NAN, |b| b(p))]).filter(|v| *v > 0.0)
            };
            let (low, high) = (values().fold(min, f64::min) * 0.95, values().fold(max, f64::max) * 1.05);
            if low >= high {
                continue;
            }
            let places = || curves.iter().flat_map(|c| &c.points).map(|p| p.at);
            let range = places().fold(f64::MAX, f64::min)..places().fold(0.0, f64::max);
            let mut builder = ChartBuilder::on(area);
            builder.caption(name, ("sans-serif", 16)).margin(10).x_label_area_size(34).y_label_area_size(60);
            let range = range.log_scale().base(2.0);
            // Operations and log differ by orders of magnitude, ratios do not.
            if n == 0 {
                let chart = builder.build_cartesian_2d(range, low..high)?;
                curves_on(chart, axis, curves, value, beside, true)?;
            } else {
                let chart = builder.build_cartesian_2d(range, (low..high).log_scale())?;
                curves_on(chart, axis, curves, value, beside, false)?;
            }
        }
        Ok(())
    })
}

fn curves_on<'a, X, Y>(
    mut chart: ChartContext<'a, SVGBackend<'a>, Cartesian2d<X, Y>>,
    axis: &str,
    curves: &[&Curve],
    value: fn(&CurvePoint) -> f64,
    beside: Option<fn(&CurvePoint) -> f64>,
    with_slope: bool,
) -> DrawResult
where
    X: Ranged<ValueType = f64> + ValueFormatter<f64>,
    Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    chart.configure_mesh().x_desc(axis).draw()?;
    for (n, curve) in curves.iter().enumerate() {
        let color = Palette99::pick(n).to_rgba();
        let line = |value: fn(&CurvePoint) -> f64| {
            curve.points.iter().map(move |p| (p.at, value(p))).filter(|(_, y)| *y > 0.0).collect::<Vec<_>>()
        };
        if let Some(beside) = beside {
            chart.draw_series(LineSeries::new(line(beside), UNPROTECTED.mix(0.6)))?;
        }
        let slope = curve.for_a_doubling(value).filter(|_| with_slope);
        let label =
            slope.map_or(curve.workload.clone(), |s| format!("{}: {s:+.4} a doubling", curve.workload));
        chart
            .draw_series(LineSeries::new(line(value), color.stroke_width(2)).point_size(3))?
            .label(label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color));
        if with_slope {
            let intervals = curve.points.iter().map(|p| [(p.at, p.ratio.low), (p.at, p.ratio.high)]);
            chart.draw_series(intervals.map(|ends| PathElement::new(ends, color)))?;
        }
    }
    let labels = SeriesLabelPosition::LowerLeft;
    chart.configure_series_labels().position(labels).background_style(WHITE.mix(0.8)).draw()?;
    Ok(())
}

/// Draws round trips, log traffic and lag over time.
pub fn timeline(path: &Path, timeline: &Timeline) -> Result<(), BenchError> {
    let end = timeline.round_trips.last().map_or(1.0, |(t, ms)| t + ms / 1e3);
    let trips: Vec<_> = timeline.round_trips.clone();
    let of_primary = || timeline.looks.iter().filter(|(_, role, ..)| role == "primary");
    let lags = of_primary().map(|(t, _, lag, _)| (*t, *lag)).collect();
    let looks: Vec<_> = of_primary().map(|(t, _, _, bytes)| (*t, *bytes as f64)).collect();
    let rate = |pair: &[(f64, f64)]| (pair[1].0, (pair[1].1 - pair[0].1) * 8e-6 / (pair[1].0 - pair[0].0));
    let rates = looks.windows(2).map(rate).collect();
    let panels =
        [("round trip of a byte, ms", trips), ("log, Mbit/s", rates), ("lag of the backup, ms", lags)];
    draw(path, (900, 660), |canvas| {
        for (area, (name, points)) in canvas.split_evenly((3, 1)).iter().zip(panels) {
            over_time(area, name, &points, end, timeline.killed_s)?;
        }
        Ok(())
    })
}

fn over_time(area: &Canvas, name: &str, points: &[(f64, f64)], end: f64, killed: Option<f64>) -> DrawResult {
    let top = points.iter().map(|(_, value)| *value).fold(0.0, f64::max).max(0.001) * 1.1;
    let mut chart = ChartBuilder::on(area)
        .caption(name, ("sans-serif", 16))
        .margin(10)
        .x_label_area_size(30)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..end, 0.0..top)?;
    chart.configure_mesh().x_desc("s").draw()?;
    chart.draw_series(points.iter().map(|point| Circle::new(*point, 1, PROTECTED.filled())))?;
    if let Some(killed) = killed {
        let line = LineSeries::new([(killed, 0.0), (killed, top)], PAPER.stroke_width(2));
        let mark = |(x, y)| PathElement::new([(x, y), (x + 16, y)], PAPER);
        chart.draw_series(line)?.label("the primary is killed").legend(mark);
        chart.configure_series_labels().background_style(WHITE.mix(0.8)).draw()?;
    }
    Ok(())
}
