//! `vmft log`: shows what is in a log.

use std::collections::BTreeMap;
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;

use clap::Subcommand;
use entry::PositionUnit;
use entry::codec::encode;
use entry::identity::Identity;
use entry::log::{Entry, KINDS, LoggedInput, Record};
use serde::Serialize;
use vmm::replay::Records;

use crate::error::Error;
use crate::log_file::LogReader;
use crate::report::{Escaped, printed, stdout};

/// What to show of a log.
#[derive(Subcommand, Debug)]
pub enum LogCommand {
    /// Count entries and bytes by kind, and bytes per second of guest time
    Stat {
        /// The log
        file: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// Count only from this guest time on, in seconds (precise to one second); use it to leave out the boot
        #[arg(long, value_name = "S", default_value_t = 0.0)]
        from_s: f64,
    },
    /// Print the entries, one line each
    Show {
        /// The log
        file: PathBuf,
        /// Only entries of these kinds, named as in FORMAT.md
        #[arg(long, value_name = "KIND,...", value_delimiter = ',')]
        kind: Vec<String>,
        /// Only entries at this position or later ones
        #[arg(long, value_name = "POSITION", default_value_t = 0)]
        from: u64,
        /// Only entries before this position [default: to the end]
        #[arg(long, value_name = "POSITION", default_value_t = u64::MAX, hide_default_value = true)]
        to: u64,
    },
}

#[derive(Default, Serialize)]
struct KindStat {
    entries: u64,
    bytes: u64,
}

#[derive(Serialize)]
struct LogStat {
    identity: BTreeMap<String, String>,
    kinds: BTreeMap<&'static str, KindStat>,
    entries: u64,
    /// Size of the file, with its header and the frames of its blocks; from `--from-s` on, if that is given.
    bytes: u64,
    /// Bytes after the last whole block.
    cut_off_bytes: usize,
    last_position: u64,
    guest_s: f64,
    kbit_per_guest_s: f64,
    /// Bytes of the network frames that came in.
    frame_bytes: u64,
}

/// Runs `vmft log`.
///
/// # Errors
/// The log is damaged; everything before the damage is shown.
pub fn run(command: LogCommand) -> Result<(), Error> {
    let mut out = BufWriter::new(stdout());
    match command {
        LogCommand::Stat { file, json, from_s } => {
            let (reader, identity) = LogReader::open(&file)?;
            let (stat, damage) = stat(reader, &identity, (from_s * 1e9) as u64);
            let shown = if json {
                let text =
                    serde_json::to_string_pretty(&stat).unwrap_or_else(|e| unreachable!("plain data: {e}"));
                writeln!(out, "{text}")
            } else {
                write_table(&mut out, &stat)
            };
            printed(shown.and_then(|()| out.flush()))?;
            damage
        }
        LogCommand::Show { file, kind, from, to } => {
            check_kinds(&kind)?;
            if from >= to {
                return Err(Error::config("to", format!("there is nothing before {to} from {from} on")));
            }
            let (mut reader, _) = LogReader::open(&file)?;
            let wanted = |record: &Record| {
                let of_kind = kind.is_empty() || kind.iter().any(|k| k == record.entry.kind());
                of_kind && (from..to).contains(&record.position.count)
            };
            let damage = loop {
                match reader.next() {
                    Ok(Some(record)) if !wanted(&record) => {}
                    Ok(Some(record)) => {
                        if !printed(writeln!(out, "{}", Escaped(record)))? {
                            return Ok(());
                        }
                    }
                    Ok(None) => break Ok(()),
                    Err(e) => break Err(e),
                }
            };
            printed(out.flush())?;
            warn_if_cut_off(&reader);
            damage
        }
    }
}

/// Refuses kinds that no entry has.
fn check_kinds(kinds: &[String]) -> Result<(), Error> {
    match kinds.iter().find(|kind| !KINDS.contains(&kind.as_str())) {
        Some(kind) => Err(Error::config(
            "kind",
            format!("no entry is of kind {kind:?}; give some of {}", KINDS.join(", ")),
        )),
        None => Ok(()),
    }
}

/// Prints a line if a crash of the recorder has cut off the log's last block.
pub fn warn_if_cut_off(reader: &LogReader) {
    if reader.cut_off() > 0 {
        let (bytes, offset) = (reader.cut_off(), reader.offset());
        host_log::say!(
            "the log was cut off by a crash of the recorder: {bytes} bytes after its last complete block, which ends at byte \
             {offset}, are ignored"
        );
    }
}

fn stat(mut reader: LogReader, identity: &Identity, from_ns: u64) -> (LogStat, Result<(), Error>) {
    let unit = identity.unit();
    let mut stat = LogStat {
        identity: identity.fields().map(|(n, v)| (n.to_owned(), v.to_owned())).collect(),
        kinds: BTreeMap::new(),
        entries: 0,
        bytes: reader.bytes(),
        cut_off_bytes: 0,
        last_position: 0,
        guest_s: 0.0,
        kbit_per_guest_s: 0.0,
        frame_bytes: 0,
    };
    let mut last = entry::Position::default();
    let mut clock = (0, 0);
    // Guest time and offset in the file from which counting starts.
    let mut start = (0, 0);
    let mut bytes = Vec::new();
    let damage = loop {
        let record = match reader.next() {
            Ok(Some(record)) => record,
            Ok(None) => break Ok(()),
            Err(e) => break Err(e),
        };
        bytes.clear();
        encode(unit, &mut last, &record, &mut bytes);
        let kind = stat.kinds.entry(record.entry.kind()).or_default();
        kind.entries += 1;
        kind.bytes += bytes.len() as u64;
        stat.entries += 1;
        match &record.entry {
            Entry::Input(LoggedInput::Clock { time_ns }) | Entry::Mark { time_ns } => {
                clock = (record.position.count, *time_ns);
                if clock.1 >= from_ns && start.0 < from_ns {
                    start = (clock.1, reader.offset());
                    (stat.entries, stat.frame_bytes) = (0, 0);
                    stat.kinds.clear();
                }
            }
            Entry::Input(LoggedInput::Frame { bytes, .. }) => stat.frame_bytes += bytes.len() as u64,
            _ => {}
        }
    };
    stat.last_position = last.count;
    stat.cut_off_bytes = reader.cut_off();
    // There is a mark every second of guest time; after the last one, only instructions give the time.
    let since = if unit == PositionUnit::Instructions { last.count - clock.0 } else { 0 };
    stat.guest_s = (clock.1 + since - start.0) as f64 / 1e9;
    stat.bytes -= start.1;
    stat.kbit_per_guest_s = rate(stat.bytes, stat.guest_s) * 8.0 / 1000.0;
    (stat, damage)
}

/// Bytes per second; 0 for a log in which no time passes.
fn rate(bytes: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { bytes as f64 / seconds } else { 0.0 }
}

fn write_table(out: &mut impl Write, stat: &LogStat) -> io::Result<()> {
    for (name, value) in &stat.identity {
        writeln!(out, "{:20} {}", Escaped(name).to_string(), Escaped(value))?;
    }
    writeln!(out, "\n{:12} {:>10} {:>12} {:>14}", "kind", "entries", "bytes", "bytes/guest s")?;
    for (name, kind) in &stat.kinds {
        let rate = rate(kind.bytes, stat.guest_s);
        writeln!(out, "{name:12} {:>10} {:>12} {rate:>14.1}", kind.entries, kind.bytes)?;
    }
    writeln!(
        out,
        "\n{} entries, {} bytes with header and blocks, to position {}, {:.3} guest s: {:.2} kbit/s",
        stat.entries, stat.bytes, stat.last_position, stat.guest_s, stat.kbit_per_guest_s
    )?;
    if stat.frame_bytes > 0 {
        let over = (stat.bytes - stat.frame_bytes) as f64 * 100.0 / stat.frame_bytes as f64;
        writeln!(
            out,
            "network frames that came in: {} bytes; the log is {over:.2} % larger",
            stat.frame_bytes
        )?;
    }
    if stat.cut_off_bytes > 0 {
        writeln!(out, "cut off: {} bytes after the last complete block", stat.cut_off_bytes)?;
    }
    Ok(())
}
