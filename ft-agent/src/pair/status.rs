//! `vmft status`: what a replica tells of itself, as text and as JSON.

use std::fmt;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use agent::{Phase, Role};
use clap::Args;
use serde::{Deserialize, Serialize};

use super::control::{Reply, Request, ask};
use super::spent::Times;
use crate::error::Error;

/// What a replica tells of itself. Cursors count records and outputs since the log's start.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// Name of the VM.
    pub name: String,
    /// As what this side started: `primary` or `backup`.
    pub role: String,
    /// `starting`, `protected`, `deciding`, `alone`, `ending` or `out`.
    pub phase: String,
    /// The loss of either host is survived.
    pub protected: bool,
    /// The pair's generation.
    pub generation: Option<u64>,
    /// This side's incarnation.
    pub incarnation: String,
    /// The other side's.
    pub peer: Option<String>,
    /// Records made or received.
    pub recorded: u64,
    /// Records sent.
    pub sent: u64,
    /// Records that the backup has.
    pub acked: u64,
    /// Records that the backup has replayed.
    pub replayed: u64,
    /// Outputs recorded.
    pub outputs_recorded: u64,
    /// Outputs that have left.
    pub outputs_released: u64,
    /// Outputs that wait in the gate.
    pub outputs_held: u64,
    /// How far the backup is behind, ms (known to the primary).
    pub lag_ms: f64,
    /// The same in bytes of records.
    pub lag_bytes: u64,
    /// The log's bytes a second, over the last seconds.
    pub log_bytes_per_s: f64,
    /// Bytes of the channel since its start.
    pub log_bytes: u64,
    /// Where the time of the guest's thread went.
    pub spent: Times,
    /// Position of this side's guest.
    pub position: u64,
    /// Position of the other side's at its last heartbeat.
    pub peer_position: u64,
    /// How often this side went on without the other, planned or not.
    pub failovers: u64,
    /// The last failover, if there was one.
    pub failover: Option<Failover>,
}

/// How a failover went. Times are in ms from the moment at which the peer was held for lost.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Failover {
    /// Why the peer was held for lost.
    pub reason: String,
    /// When, seconds since 1970.
    pub at_unix_s: f64,
    /// The rest of the log was replayed, and the store asked.
    pub asked_ms: Option<f64>,
    /// The verdict came; the gate's tail left and the guest's address was announced.
    pub verdict_ms: Option<f64>,
    /// The guest ran on.
    pub running_ms: Option<f64>,
    /// The guest's first new frame left.
    pub first_frame_ms: Option<f64>,
}

/// What a user is told.
pub fn word(protected: bool) -> &'static str {
    if protected { "PROTECTED" } else { "UNPROTECTED" }
}

/// Name of a phase.
pub fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Starting => "starting",
        Phase::Protected => "protected",
        Phase::Deciding => "deciding",
        Phase::Alone => "alone",
        Phase::Ending => "ending",
        Phase::Out => "out",
    }
}

/// Name of a role.
pub fn role_name(role: Role) -> &'static str {
    match role {
        Role::Primary => "primary",
        Role::Backup => "backup",
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = word(self.protected);
        let generation = self.generation.map_or("none yet".into(), |g| g.to_string());
        writeln!(f, "{word}: VM {}, {} ({}), generation {generation}", self.name, self.role, self.phase)?;
        writeln!(
            f,
            "lag {:.1} ms, {} bytes; log {:.1} kB/s; {} outputs held",
            self.lag_ms,
            self.lag_bytes,
            self.log_bytes_per_s / 1e3,
            self.outputs_held
        )?;
        writeln!(
            f,
            "records: {} recorded, {} sent, {} acknowledged, {} replayed; outputs: {} recorded, {} released",
            self.recorded, self.sent, self.acked, self.replayed, self.outputs_recorded, self.outputs_released
        )?;
        writeln!(f, "position {} here, {} there", self.position, self.peer_position)?;
        match &self.failover {
            None => Ok(()),
            Some(failover) => writeln!(f, "last failover: {failover}"),
        }
    }
}

impl fmt::Display for Failover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.reason)?;
        for (what, ms) in [
            ("store asked", self.asked_ms),
            ("verdict", self.verdict_ms),
            ("guest runs", self.running_ms),
            ("first frame", self.first_frame_ms),
        ] {
            if let Some(ms) = ms {
                write!(f, ", {what} after {ms:.1} ms")?;
            }
        }
        Ok(())
    }
}

/// What `vmft status` takes.
#[derive(Args, Debug)]
pub struct StatusArgs {
    #[command(flatten)]
    at: At,
    /// As JSON
    #[arg(long)]
    json: bool,
    /// Again every second, until interrupted
    #[arg(long)]
    watch: bool,
}

/// Which replica.
#[derive(Args, Debug)]
pub struct At {
    /// The replica's control socket
    #[arg(long, value_name = "FILE")]
    control: PathBuf,
}

/// Shows the status. Exit code 0: protected; 1: not.
///
/// # Errors
/// Nobody listens on the socket; the VM is not protected.
pub fn status(args: &StatusArgs) -> Result<(), Error> {
    loop {
        let (Reply::Status(report), _) = ask(&args.at.control, Request::Status)? else {
            return Err(Error::config("control", "another program listens there"));
        };
        let mut out = std::io::stdout().lock();
        let shown = if args.json {
            serde_json::to_writer(&mut out, &report)
                .map_err(std::io::Error::from)
                .and_then(|()| writeln!(out))
        } else {
            write!(out, "{report}")
        };
        shown.map_err(Error::host("standard output"))?;
        if !args.watch {
            return if report.protected { Ok(()) } else { Err(Error::Unprotected) };
        }
        drop(out);
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// `vmft failover`: the other side goes on.
///
/// # Errors
/// The replica refuses.
pub fn failover(at: &At) -> Result<(), Error> {
    ask(&at.control, Request::Failover).map(drop)
}

/// `vmft stop`: the VM's run ends on both sides.
///
/// # Errors
/// The replica refuses.
pub fn stop(at: &At) -> Result<(), Error> {
    ask(&at.control, Request::Stop).map(drop)
}

/// `vmft console`: the guest's console, until its end or `Ctrl-A x`.
///
/// # Errors
/// The replica refuses, or there is no terminal to use.
pub fn console(at: &At) -> Result<(), Error> {
    let (_, socket) = ask(&at.control, Request::Console)?;
    super::console::talk(socket)
}
