//! What protection costs: the same loads on a protected guest and on the same guest unprotected, in turns.
//!
//! A guest of the image `linux` answers on its web server, on redis and on ports that its workloads open; nothing in it
//! is made for this. The guest `bare` has services of its own. Both guests run already when [`run`] is called. A round
//! gives each workload to both of them in turns ([`rounds`]), so that what the hosts do beside it falls on both alike;
//! a round's ratio is one value, and what is reported is the center of the rounds' with its 95 % interval ([`stats`]).
//! Runs during which others had the machine are made again, whatever came out ([`watch::Disturbance`]).

mod growth;
mod load;
mod plot;
mod report;
mod rounds;
mod stats;
mod tables;
mod timeline;
mod watch;
mod workloads;

use std::net::IpAddr;
use std::path::PathBuf;

use clap::Args;
use serde::{Deserialize, Serialize};

/// What is measured, and how.
#[derive(Args, Clone, Debug, Serialize, Deserialize)]
pub struct BenchArgs {
    /// What the guests are
    #[arg(long, value_enum, default_value_t)]
    pub guest: workloads::Guest,
    /// The protected guest
    #[arg(long, value_name = "ADDRESS", required = true, value_delimiter = ',')]
    pub protected: Vec<IpAddr>,
    /// The same guest unprotected; a second one gets the same load at the same time, in the place that the backup has
    #[arg(long, value_name = "ADDRESS,...", required = true, value_delimiter = ',')]
    pub unprotected: Vec<IpAddr>,
    /// How many of each side are measured: so many of the first ones. The others only have the same to do
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub counted: usize,
    /// Another machine with the same guest, on this host, measured beside them in the first rounds
    #[arg(long = "peer", value_name = "NAME=ADDRESS,PID")]
    pub peers: Vec<rounds::Peer>,
    /// In how many rounds
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub peer_rounds: usize,
    /// Cores for the clients of the first guest of a side, of its second...
    #[arg(long, value_name = "CORE,...", value_delimiter = ',')]
    pub client_cores: Vec<usize>,
    /// What is varied, as name=value: the runs become a point of a curve, or a table of their own
    #[arg(long, value_name = "NAME=VALUE", default_value = "")]
    pub setting: String,
    /// Both sides are the same: judge the benchmark
    #[arg(long)]
    pub same: bool,
    /// Processes of the pair if they run on this host, the primary first: their CPU time is measured
    #[arg(long, value_name = "PID,...", value_delimiter = ',')]
    pub protected_pids: Vec<u32>,
    /// Processes of the unprotected guests if they run on this host
    #[arg(long, value_name = "PID,...", value_delimiter = ',')]
    pub unprotected_pids: Vec<u32>,
    /// Control sockets of primary and backup (those of other hosts through ssh -L): lag and log are measured
    #[arg(long, value_name = "FILE,...", value_delimiter = ',')]
    pub controls: Vec<PathBuf>,
    /// Rounds; each has two runs of each workload on each side
    #[arg(long, value_name = "N", default_value_t = 30)]
    pub rounds: usize,
    /// Length of a run
    #[arg(long, value_name = "S", default_value_t = 0.25)]
    pub seconds: f64,
    /// Only workloads whose name begins with one of these
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    pub only: Vec<String>,
    /// Round trip of the channel in µs, of a byte by TCP between processes on both hosts: judges the latency that protection
    /// adds
    #[arg(long, value_name = "US")]
    pub channel_rtt_us: Option<f64>,
    /// After the rounds, show the log and the latency of redis for so long
    #[arg(long, value_name = "S")]
    pub timeline: Option<f64>,
    /// Kill this process (the primary) in the timeline's middle
    #[arg(long, value_name = "PID", requires = "timeline")]
    pub kill: Option<i32>,
    /// Something to be told in the report: what=text
    #[arg(long = "note", value_name = "WHAT=TEXT")]
    pub notes: Vec<String>,
    /// Folder of the report; rounds are added to those that it has
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A guest does not answer as it should; see that it runs the image `linux` with its services.
    #[error("{what}: {source}")]
    Guest {
        /// Which, and what for.
        what: String,
        /// How it failed.
        source: std::io::Error,
    },
    /// A file of the report, or one of this host's own, cannot be used.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// How it failed.
        source: std::io::Error,
    },
    /// A process that is measured is gone.
    #[error("process {pid}: {source}")]
    Process {
        /// Which.
        pid: u32,
        /// How it failed.
        source: std::io::Error,
    },
    /// A picture could not be drawn.
    #[error("{0}: {1}")]
    Picture(PathBuf, String),
    /// No workload has such a name.
    #[error("--only {0}: no such workload; there are: {1}")]
    Only(String, String),
}

/// Measures and writes the report.
///
/// # Errors
/// A guest does not answer, or the report cannot be written.
pub fn run(args: &BenchArgs) -> Result<(), Error> {
    let wanted = args.guest.select(&args.only)?;
    let mut report = report::Report::open(args)?;
    rounds::prepare(args, if args.rounds > 0 { &wanted } else { &[] })?;
    let begin = report.rounds(&args.setting);
    for round in begin..begin + args.rounds {
        report.runs.extend(rounds::round(args, &wanted, round)?);
        report.save(&args.out)?;
        eprintln!("round {} of {}", round + 1 - begin, args.rounds);
    }
    if let Some(seconds) = args.timeline {
        report.timeline = Some(timeline::record(args, seconds)?);
    }
    report.save(&args.out)?;
    report.write(&args.out)
}
