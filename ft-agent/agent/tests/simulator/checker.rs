//! What must hold, told by what leaves the hosts.

use vmft_agent::{Rule, Suspicion};

use super::guest::Said;

/// A seed that broke an invariant.
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
             cargo run --release -p vmft-agent --example simulate -- --seed {}{without} --trace",
            self.seed,
            self.at_ns / 1000,
            self.what,
            self.seed
        )
    }
}

/// What has happened in a run, to show that it covered something.
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
    pub unknown_verdicts: u64,
    pub handed_over: u64,
    pub ended: u64,
    pub failed: u64,
    pub strangers: u64,
    pub dead: u64,
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
            (&mut self.unknown_verdicts, o.unknown_verdicts),
            (&mut self.handed_over, o.handed_over),
            (&mut self.ended, o.ended),
            (&mut self.failed, o.failed),
            (&mut self.strangers, o.strangers),
            (&mut self.dead, o.dead),
        ];
        pairs.into_iter().for_each(|(sum, n)| *sum += n);
    }
}

/// A backup closed its receiver.
#[derive(Clone, Copy, Debug)]
struct Closed {
    at: u64,
    /// By the clock: then the primary's gate was shut before.
    by_clock: bool,
    /// Outputs whose records it had.
    outputs: u64,
}

/// Who emits something.
#[derive(Clone, Copy, Debug)]
pub struct Emitter {
    pub is_primary: bool,
    pub is_alone: bool,
    pub is_protected: bool,
    /// When its gate let the output go; the write may be much later.
    pub decided_at: u64,
}

/// What was seen so far.
#[derive(Debug, Default)]
pub struct Checker {
    said: Vec<Said>,
    closed: Option<Closed>,
    pub counts: Counts,
}

impl Checker {
    /// Whether anything was seen at all.
    pub fn saw_something(&self) -> bool {
        !self.said.is_empty()
    }

    /// The backup suspects its primary.
    pub fn backup_closed(&mut self, at: u64, suspicion: Option<&Suspicion>, outputs: u64) {
        let by_clock = matches!(suspicion, Some(Suspicion::Silent(_) | Suspicion::NoProgress(_)));
        self.closed.get_or_insert(Closed { at, by_clock, outputs });
    }

    /// An output is on the wire.
    pub fn emitted(&mut self, said: Said, by: Emitter) -> Result<(), String> {
        self.counts.outputs += 1;
        match self.said.get(said.number as usize) {
            Some(before) if *before == said => self.counts.repeated += 1,
            Some(before) => return Err(format!("a contradiction: {before:?} was seen, now {said:?}")),
            None if said.number == self.said.len() as u64 => self.said.push(said),
            None => return Err(format!("outputs are lost: {said:?} follows {:?}", self.said.last())),
        }
        if by.is_alone {
            return Ok(());
        }
        if !by.is_primary {
            return Err(format!("a backup emits {said:?}"));
        }
        if !by.is_protected {
            return Err(format!("a replica that is not sure to live emits {said:?}"));
        }
        match self.closed {
            Some(closed) if said.number >= closed.outputs => {
                Err(format!("a loser emits {said:?}, which its survivor had not acknowledged: {closed:?}"))
            }
            Some(closed) if closed.by_clock && by.decided_at > closed.at => Err(format!(
                "a loser releases {said:?} at {} after its survivor closed: {closed:?}",
                by.decided_at
            )),
            _ => Ok(()),
        }
    }
}
