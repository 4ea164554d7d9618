//! Measures what protection costs: puts the same loads on a protected guest and on the same guest unprotected, in turns.
//!
//! A guest of the image `linux` answers on its web server, on redis and on ports that its workloads open; nothing in it
//! was written for this benchmark. The guest `bare` has services of its own. Both guests already run when [`run`] is called.
//! A round gives each workload to both guests in turns (`rounds`), so that whatever else the hosts do affects both equally.
//! Each round yields one ratio; the report gives the center of the rounds' ratios with its 95 % interval (`stats`).
//! Runs during which other programs used the host are repeated, whatever their result (`monitor::Disturbance`).

mod figures;
mod files;
mod growth;
mod load;
mod monitor;
mod plot;
mod report;
mod rounds;
mod stats;
mod tables;
mod timeline;
mod workloads;

use std::net::IpAddr;
use std::path::PathBuf;

use clap::Args;
use serde::{Deserialize, Serialize};

/// What to measure, and how.
#[derive(Args, Clone, Debug, Serialize, Deserialize)]
pub struct BenchArgs {
    /// Which of vmft's guests the machines run
    #[arg(long, value_enum, default_value_t)]
    pub guest: workloads::BenchGuest,
    /// Addresses of the protected guests
    #[arg(long, value_name = "ADDRESS,...", required = true, value_delimiter = ',')]
    pub protected: Vec<IpAddr>,
    /// Addresses of the same guests unprotected; those beyond --counted get the same load at the same time, in the place of
    /// the backups
    #[arg(long, value_name = "ADDRESS,...", required = true, value_delimiter = ',')]
    pub unprotected: Vec<IpAddr>,
    /// How many guests of each side are measured: the first N; the others only carry the same load
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub counted: usize,
    /// Another virtual machine with the same guest on this host, measured as well in the first rounds
    #[arg(long = "peer", value_name = "NAME=ADDRESS,PID")]
    pub peers: Vec<rounds::ComparisonVm>,
    /// In how many rounds the --peer machines are measured
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub peer_rounds: usize,
    /// Cores for the clients: the first one for the first guest of each side, the second one for the second guest, and so on
    #[arg(long, value_name = "CORE,...", value_delimiter = ',')]
    pub client_cores: Vec<usize>,
    /// What is varied between reports, as name=value: these runs become a point of a curve (if the value is a number) or their own table
    #[arg(long, value_name = "NAME=VALUE", default_value = "")]
    pub setting: String,
    /// Check the benchmark itself: both sides are set up alike, so every ratio should be 1
    #[arg(long)]
    pub same: bool,
    /// Processes of the pair that run on this host, the primary first: their CPU time is measured
    #[arg(long, value_name = "PID,...", value_delimiter = ',')]
    pub protected_pids: Vec<u32>,
    /// Processes of the unprotected guests that run on this host: their CPU time is measured
    #[arg(long, value_name = "PID,...", value_delimiter = ',')]
    pub unprotected_pids: Vec<u32>,
    /// Control sockets of the primary and the backup (forward another host's with ssh -L): lag and log traffic are measured
    #[arg(long, value_name = "FILE,...", value_delimiter = ',')]
    pub controls: Vec<PathBuf>,
    /// Number of rounds; each has two runs of each workload on each side
    #[arg(long, value_name = "N", default_value_t = 30)]
    pub rounds: usize,
    /// Length of a run, in seconds
    #[arg(long, value_name = "S", default_value_t = 0.25)]
    pub seconds: f64,
    /// Only workloads whose names begin with one of these
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    pub only: Vec<String>,
    /// Round trip of one byte by TCP between processes on the two hosts, in µs: sets the bar for the latency that protection
    /// adds
    #[arg(long, value_name = "US")]
    pub channel_rtt_us: Option<f64>,
    /// After the rounds, load the pair for this many seconds and record its log traffic, its lag and the round trips of
    /// bytes
    #[arg(long, value_name = "S")]
    pub timeline: Option<f64>,
    /// Kill this process (the primary) in the middle of the timeline
    #[arg(long, value_name = "PID", requires = "timeline")]
    pub kill: Option<i32>,
    /// A line for the report about how it was measured: what=text
    #[arg(long = "note", value_name = "WHAT=TEXT")]
    pub notes: Vec<String>,
    /// Directory of the report; rounds are added to those that are already in it
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

/// Why the benchmark failed.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A guest does not answer as it should.
    #[error(
        "cannot put load on guest {what}: {source}; check that it runs the image named by --guest, with its services"
    )]
    Guest {
        /// Which guest, and which load.
        what: String,
        /// The cause.
        source: std::io::Error,
    },
    /// A file of the report, or a file of this host under `/proc`, cannot be read or written.
    #[error("cannot read or write {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A process that is to be measured does not exist, or cannot be signalled.
    #[error("cannot measure process {pid}: {source}; it must run on this host as long as the benchmark does")]
    Process {
        /// Its id.
        pid: u32,
        /// The cause.
        source: std::io::Error,
    },
    /// A picture could not be drawn.
    #[error("cannot draw {0}: {1}")]
    Picture(PathBuf, String),
    /// No workload's name begins with what `--only` asks for.
    #[error("no workload's name begins with {0} (--only); the workloads are: {1}")]
    Only(String, String),
}

/// Runs the benchmark and writes the report.
///
/// # Errors
/// A guest does not answer, or the report cannot be written.
pub fn run(args: &BenchArgs) -> Result<(), BenchError> {
    let wanted = args.guest.select(&args.only)?;
    let mut report = report::BenchReport::open(args)?;
    rounds::prepare(args, if args.rounds > 0 { &wanted } else { &[] })?;
    let begin = report.rounds(&args.setting);
    for round in begin..begin + args.rounds {
        report.runs.extend(rounds::round(args, &wanted, round)?);
        report.save(&args.out)?;
        eprintln!("round {} of {}", round + 1 - begin, args.rounds);
    }
    if let Some(seconds) = args.timeline {
        report.timeline = Some(timeline::record_timeline(args, seconds)?);
    }
    report.save(&args.out)?;
    files::write(&report, &args.out)
}
