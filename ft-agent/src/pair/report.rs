//! A replica's report for `vmft status`, the metrics and the hook: as data, as JSON and as text.

use std::collections::BTreeMap;
use std::fmt;

use agent::{Phase, Protection, Role};
use serde::{Deserialize, Serialize};
use test_and_set::names::VmName;

use super::time_accounting::TimeTotals;
use crate::error::Error;
use crate::service;

/// What `vmft status` shows of a replica. Counts of records and outputs are from the log's start.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ReplicaReport {
    /// Name of the VM.
    pub name: String,
    /// The role in which this side was started: `primary` or `backup`.
    pub role: String,
    /// `starting`, `protected`, `deciding`, `alone`, `ending` or `out`.
    pub phase: String,
    /// Whether the VM survives the loss of either host.
    pub protected: bool,
    /// `PROTECTED`, `AT RISK` or `UNPROTECTED`; empty in a reply of vmft 0.2.
    #[serde(default)]
    pub state: String,
    /// Why it is not protected, if it is not.
    #[serde(default)]
    pub reason: Option<String>,
    /// Why the store could not decide which side lives: then the VM is not protected.
    pub store_problem: Option<String>,
    /// How long ago the store last answered a side that runs the guest, ms.
    #[serde(default)]
    pub store_answered_ago_ms: Option<f64>,
    /// How old the other side's last confirmation was when it came, ms. Outputs leave only while that is less than half
    /// of `--timeout-ms`.
    #[serde(default)]
    pub round_trip_ms: Option<f64>,
    /// Whether the store answers the looks of a side that runs the guest.
    pub store_answers: bool,
    /// The pair's generation.
    pub generation: Option<u64>,
    /// This side's incarnation.
    pub incarnation: String,
    /// The other side's incarnation.
    pub peer: Option<String>,
    /// The other side's address on the logging channel, once there was a connection.
    #[serde(default)]
    pub peer_address: Option<String>,
    /// How often each of this process's service threads has failed and was started again; empty if none has.
    #[serde(default)]
    pub failed_threads: BTreeMap<String, u64>,
    /// Records made (primary) or received (backup).
    pub recorded: u64,
    /// Records sent.
    pub sent: u64,
    /// Records that the backup has acknowledged.
    pub acked: u64,
    /// Records that the backup has replayed.
    pub replayed: u64,
    /// Outputs that the guest has made.
    pub outputs_recorded: u64,
    /// Outputs that have left.
    pub outputs_released: u64,
    /// Outputs that wait in the gate.
    pub outputs_held: u64,
    /// How far the backup lags, ms. A backup has it from its primary's last heartbeat.
    pub lag_ms: f64,
    /// How far the backup lags, in bytes of records.
    pub lag_bytes: u64,
    /// The log's rate over the last seconds, bytes per second.
    pub log_bytes_per_s: f64,
    /// Bytes of the channel's messages since its start.
    pub log_bytes: u64,
    /// Where the time of the guest's thread went.
    pub spent: TimeTotals,
    /// Position of this side's guest.
    pub position: u64,
    /// Position of the other side's guest at its last heartbeat.
    pub peer_position: u64,
    /// Why the store has given no verdict, while it is asked again.
    pub no_verdict: Option<String>,
    /// How often this side went on without the other, planned or not.
    pub failovers: u64,
    /// The last failover, if there was one.
    pub failover: Option<Failover>,
}

/// The steps of a failover. Times are in ms from the moment at which the peer was declared lost.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Failover {
    /// Why the peer was declared lost, or that it has handed over.
    pub reason: String,
    /// It was a handover: then the verdict is the primary's word that it never takes.
    #[serde(default)]
    pub planned: bool,
    /// When the peer was declared lost or handed over, seconds since 1970.
    pub at_unix_s: f64,
    /// When the rest of the log was replayed and the store was asked.
    pub asked_ms: Option<f64>,
    /// When the verdict came; the outputs left in the gate were sent and the guest's address was announced.
    pub verdict_ms: Option<f64>,
    /// When the guest ran on.
    pub running_ms: Option<f64>,
    /// When the guest's first new frame left.
    pub first_frame_ms: Option<f64>,
}

/// The word that the user sees for a VM that is protected, at risk or not protected.
pub fn protection_word(protection: &Protection) -> &'static str {
    match protection {
        Protection::Protected => "PROTECTED",
        Protection::AtRisk(_) => AT_RISK,
        Protection::Unprotected(_) => "UNPROTECTED",
    }
}

/// The word for a VM that both hosts run, and whose service is in danger.
const AT_RISK: &str = "AT RISK";

impl ReplicaReport {
    /// What a script is told by an exit code.
    ///
    /// # Errors
    /// The VM is not protected.
    pub fn check_protected(&self) -> Result<(), Error> {
        match self.protected {
            true => Ok(()),
            false if self.state == AT_RISK => Err(Error::AtRisk),
            false => Err(Error::Unprotected),
        }
    }

    /// The report of a backup that waits for its primary: there is no replica yet.
    pub fn waiting(vm: &VmName) -> ReplicaReport {
        ReplicaReport {
            name: vm.to_string(),
            role: role_name(Role::Backup).into(),
            phase: "waiting".into(),
            store_answers: true,
            failed_threads: service::failures(),
            ..ReplicaReport::default()
        }
    }

    /// What this side is: `primary (protected)`, `survivor (alone, started as backup)`.
    fn says_what_it_is(&self) -> String {
        let (role, phase) = (&self.role, &self.phase);
        match phase == phase_name(Phase::Alone) && self.peer.is_some() {
            true => format!("survivor ({phase}, started as {role})"),
            false => format!("{role} ({phase})"),
        }
    }
}

/// The name of a phase.
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

/// The name of a role.
pub fn role_name(role: Role) -> &'static str {
    match role {
        Role::Primary => "primary",
        Role::Backup => "backup",
    }
}

impl fmt::Display for ReplicaReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match (self.state.as_str(), self.protected) {
            ("", true) => "PROTECTED",
            ("", false) => "UNPROTECTED",
            (word, _) => word,
        };
        let generation = self.generation.map_or("none yet".into(), |g| g.to_string());
        writeln!(f, "{word}: VM {}, {}, generation {generation}", self.name, self.says_what_it_is())?;
        if let Some(reason) = &self.reason {
            writeln!(f, "{reason}")?;
        }
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
        writeln!(f, "position {} on this side, {} on the other", self.position, self.peer_position)?;
        if let Some(address) = &self.peer_address {
            writeln!(f, "the other side: {address}")?;
        }
        if let Some(problem) =
            self.store_problem.as_ref().filter(|problem| self.reason.as_ref() != Some(problem))
        {
            writeln!(f, "{problem}")?;
        }
        if let Some(why) = &self.no_verdict {
            writeln!(f, "no verdict yet: {why}")?;
        }
        for (thread, count) in &self.failed_threads {
            writeln!(
                f,
                "thread {thread:?} has failed and was started again: {count} times; please report this"
            )?;
        }
        match &self.failover {
            None => Ok(()),
            Some(failover) if failover.planned => writeln!(f, "last failover (planned): {failover}"),
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
