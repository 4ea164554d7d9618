//! The report's files: tables and pictures, all made from what was measured.

use std::collections::BTreeMap;
use std::path::Path;

use crate::growth::{axes, curves};
use crate::report::{BenchReport, Row, write_file};
use crate::{BenchError, plot, tables};

/// Writes tables and pictures.
///
/// # Errors
/// It cannot be written or drawn.
pub fn write(report: &BenchReport, folder: &Path) -> Result<(), BenchError> {
    let curves = curves(report);
    write_file(folder, "report.md", tables::text(report, &curves).as_bytes())?;
    let settings = report.settings().into_iter();
    let tables = settings.map(|s| (s, report.rows(s).iter().map(Row::json).collect::<Vec<_>>()));
    let tables: BTreeMap<_, _> = tables.collect();
    let table = serde_json::to_vec_pretty(&serde_json::json!({ "tables": tables, "curves": curves }));
    write_file(folder, "table.json", &table.unwrap_or_else(|e| unreachable!("plain data: {e}")))?;
    let rows = report.main_rows("");
    plot::ratios(&folder.join("ratios.svg"), &rows)?;
    plot::latencies(&folder.join("latency.svg"), &rows)?;
    for axis in axes(&curves) {
        let name = axis.split(' ').next().unwrap_or_default();
        let curves: Vec<_> = curves.iter().filter(|curve| curve.axis == axis).collect();
        plot::growth(&folder.join(format!("growth-{name}.svg")), axis, &curves)?;
    }
    match &report.timeline {
        Some(timeline) => plot::timeline(&folder.join("timeline.svg"), timeline),
        None => Ok(()),
    }
}
