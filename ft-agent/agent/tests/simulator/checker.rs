//! What must hold, judged by the outputs that leave the hosts.

use agent::{Rule, Suspicion};
use store_rule::names::{Generation, Incarnation};

use super::guest::GuestOutput;
use super::process::{LAG_NS_MAX, TIMING};

/// A seed whose run broke an invariant.
#[derive(Clone, Debug)]
pub struct Failure {
    pub seed: u64,
    pub without: Option<Rule>,
    pub at_ns: u64,
    pub what: String,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let without = self.without.map(|rule| format!(" --without {rule:?}")).unwrap_or_default();
        write!(
            f,
            "seed {} at {} us: {}\n  again, with a trace: \
             cargo run --release -p agent --example simulate -- --seed {}{without} --trace",
            self.seed,
            self.at_ns / 1000,
            self.what,
            self.seed
        )
    }
}

/// Counts of what has happened in a run, to show what it covered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub runs: u64,
    pub outputs: u64,
    pub repeated: u64,
    pub replies: u64,
    pub suspicions: u64,
    pub won_by_primary: u64,
    pub won_by_backup: u64,
    pub fenced: u64,
    pub stood_down: u64,
    pub started_elsewhere: u64,
    pub revoked: u64,
    pub rolled_back: u64,
    pub unknown_verdicts: u64,
    pub handed_over: u64,
    pub called_off: u64,
    pub lost_after_yield: u64,
    pub ended: u64,
    pub failed: u64,
    pub strangers: u64,
    pub claims: u64,
    pub claims_believed: u64,
    pub dead: u64,
    /// Moments at which a backup was further behind than it may be.
    pub behind: u64,
}

impl Counts {
    pub fn add(&mut self, o: &Counts) {
        let pairs = [
            (&mut self.runs, o.runs),
            (&mut self.outputs, o.outputs),
            (&mut self.repeated, o.repeated),
            (&mut self.replies, o.replies),
            (&mut self.suspicions, o.suspicions),
            (&mut self.won_by_primary, o.won_by_primary),
            (&mut self.won_by_backup, o.won_by_backup),
            (&mut self.fenced, o.fenced),
            (&mut self.stood_down, o.stood_down),
            (&mut self.started_elsewhere, o.started_elsewhere),
            (&mut self.revoked, o.revoked),
            (&mut self.rolled_back, o.rolled_back),
            (&mut self.unknown_verdicts, o.unknown_verdicts),
            (&mut self.handed_over, o.handed_over),
            (&mut self.called_off, o.called_off),
            (&mut self.lost_after_yield, o.lost_after_yield),
            (&mut self.ended, o.ended),
            (&mut self.failed, o.failed),
            (&mut self.strangers, o.strangers),
            (&mut self.claims, o.claims),
            (&mut self.claims_believed, o.claims_believed),
            (&mut self.dead, o.dead),
            (&mut self.behind, o.behind),
        ];
        pairs.into_iter().for_each(|(sum, n)| *sum += n);
    }
}

/// A backup has closed its receiver.
#[derive(Clone, Copy, Debug)]
struct BackupClosed {
    at: u64,
    /// Because of a timeout; in that case the primary's gate must have been shut before.
    by_clock: bool,
    /// Outputs whose records it had received.
    outputs: u64,
}

/// A hello on a second connection.
#[derive(Clone, Copy, Debug)]
pub struct Claim {
    /// It has the certificate of the host's peer.
    pub same_certificate: bool,
    /// That certificate is revoked.
    pub is_revoked: bool,
    /// How long the host had read nothing from its peer, by its own clock.
    pub silence_ns: u64,
}

/// The side that emits an output.
#[derive(Clone, Copy, Debug)]
pub struct Emitter {
    pub is_primary: bool,
    pub is_alone: bool,
    pub is_protected: bool,
    /// When its gate let the output out; the write may be much later.
    pub decided_at: u64,
}

/// What the client has seen so far.
#[derive(Debug, Default)]
pub struct Checker {
    seen: Vec<GuestOutput>,
    closed: Option<BackupClosed>,
    winner: Option<(Generation, Incarnation)>,
    pub counts: Counts,
}

impl Checker {
    /// Whether the client has seen anything at all.
    pub fn saw_something(&self) -> bool {
        !self.seen.is_empty()
    }

    /// The backup suspects its primary, or goes live.
    pub fn backup_closed(&mut self, at: u64, suspicion: Option<&Suspicion>, outputs: u64) {
        let by_clock = matches!(suspicion, Some(Suspicion::Silent(_) | Suspicion::NoProgress(_)));
        self.closed.get_or_insert(BackupClosed { at, by_clock, outputs });
    }

    /// The store lets a side win.
    ///
    /// # Errors
    /// Another side has won the same generation before.
    pub fn won(&mut self, generation: Generation, who: Incarnation) -> Result<(), String> {
        match self.winner.replace((generation, who)) {
            Some((g, before)) if g == generation && before != who => {
                Err(format!("two winners of generation {g}: {before}, then {who}"))
            }
            _ => Ok(()),
        }
    }

    /// A side says of itself whether it is protected.
    ///
    /// # Errors
    /// It is not.
    pub fn words(&mut self, is_protected: bool, is_primary: bool, lag_ns: u64) -> Result<(), String> {
        let is_behind = is_primary && lag_ns > LAG_NS_MAX;
        self.counts.behind += u64::from(is_behind);
        if is_protected && is_behind {
            return Err(format!("a side says that it is protected, with a lag of {} us", lag_ns / 1000));
        }
        Ok(())
    }

    /// A host takes its peer to be lost because of a claim.
    ///
    /// # Errors
    /// The claim is not the peer's, or the peer was heard just before.
    pub fn claim_believed(&mut self, claim: Option<Claim>) -> Result<(), String> {
        self.counts.claims_believed += 1;
        match claim {
            Some(Claim { same_certificate: true, is_revoked: false, silence_ns })
                if silence_ns > 2 * TIMING.beat_interval_ns =>
            {
                Ok(())
            }
            _ => Err(format!("a stranger ends a live pair: {claim:?}")),
        }
    }

    /// An output is on the wire.
    ///
    /// # Errors
    /// It must not be there.
    pub fn emitted(&mut self, output: GuestOutput, by: Emitter) -> Result<(), String> {
        self.counts.outputs += 1;
        match self.seen.get(output.number as usize) {
            Some(before) if *before == output => self.counts.repeated += 1,
            Some(before) => return Err(format!("contradiction: the client saw {before:?}, now {output:?}")),
            None if output.number == self.seen.len() as u64 => self.seen.push(output),
            None => return Err(format!("outputs are lost: {output:?} follows {:?}", self.seen.last())),
        }
        if by.is_alone {
            return Ok(());
        }
        if !by.is_primary {
            return Err(format!("a backup emits {output:?}"));
        }
        if !by.is_protected {
            return Err(format!("a replica that may lose the verdict emits {output:?}"));
        }
        match self.closed {
            Some(closed) if output.number >= closed.outputs => {
                Err(format!("a loser emits {output:?}, which the survivor had not acknowledged: {closed:?}"))
            }
            Some(closed) if closed.by_clock && by.decided_at > closed.at => Err(format!(
                "a loser releases {output:?} at {} after the survivor closed its receiver: {closed:?}",
                by.decided_at
            )),
            _ => Ok(()),
        }
    }
}
