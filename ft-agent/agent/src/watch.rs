//! What the store's record of a VM means to a side that runs it, and when that side looks (rule 11).

use store_rule::names::{Generation, Incarnation};
use store_rule::record::{VmPhase, VmRecord};

use crate::config::PairTiming;

/// How many looks in a row get no answer before the store counts as silent. A process that was stopped finds
/// one look without an answer when it goes on.
const UNANSWERED_MAX: u32 = 3;

/// What the store's record of a VM means to a side that runs the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreView {
    /// The side is a member of the generation that is open, and the other side does not hold it.
    Ours,
    /// The VM was forgotten.
    Forgotten,
    /// The VM was opened again without this side: this is its generation.
    Overtaken(Generation),
    /// The other side holds the generation.
    HeldByOther(Incarnation),
    /// The store knows less than this side: it has no record of the VM, or one of an earlier generation, or from a backup.
    Unknown,
}

impl StoreView {
    /// What a VM's record (`None`: there is none) means to the side `who` of a generation.
    pub fn of(record: Option<&VmRecord>, generation: Generation, who: Incarnation) -> StoreView {
        let Some(record) = record.filter(|r| r.generation >= generation) else { return StoreView::Unknown };
        match &record.phase {
            VmPhase::Forgotten => StoreView::Forgotten,
            VmPhase::Open { members, .. }
                if record.generation > generation || members.find(who).is_none() =>
            {
                StoreView::Overtaken(record.generation)
            }
            VmPhase::Open { holder: Some(holder), .. } if *holder != who => StoreView::HeldByOther(*holder),
            // It is from a backup of the store, and gives no verdict.
            VmPhase::Open { holder: None, .. } if record.restored => StoreView::Unknown,
            VmPhase::Open { .. } => StoreView::Ours,
        }
    }
}

/// Why the store cannot decide which side lives, although this side runs the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreProblem {
    /// It has not answered for this time, ns.
    #[error("the store has not answered for {} s: without it neither side can go on alone; check its members", .0 / 1_000_000_000)]
    Silent(u64),
    /// It has lost its record of this pair.
    #[error(
        "the store has no record of this pair, or one from a backup, and neither side can go on alone: give it back its \
         data, or end the VM's run and start it again"
    )]
    Unknown,
}

/// When to look, and what was seen.
#[derive(Debug)]
pub(crate) struct StoreWatch {
    timing: PairTiming,
    /// When the next look is due; `None` while one is under way.
    pub(crate) next_at: Option<u64>,
    /// When the store last answered.
    answered_at: u64,
    /// Looks in a row without an answer.
    unanswered: u32,
    /// It has not answered for long.
    pub(crate) is_silent: bool,
    /// It has no record of this pair.
    pub(crate) is_unknown: bool,
}

impl StoreWatch {
    /// The store has just answered that this side may run.
    pub(crate) fn new(timing: PairTiming, now: u64) -> StoreWatch {
        let next_at = Some(now + timing.store_watch_ns);
        StoreWatch { timing, next_at, answered_at: now, unanswered: 0, is_silent: false, is_unknown: false }
    }

    /// When the next look is due.
    pub(crate) fn deadline(&self) -> Option<u64> {
        self.next_at
    }

    /// How long ago the store answered last, ns.
    pub(crate) fn answered_ago(&self, now: u64) -> u64 {
        now.saturating_sub(self.answered_at)
    }

    /// What is wrong, if anything is.
    pub(crate) fn problem(&self, now: u64) -> Option<StoreProblem> {
        let silent = self.is_silent.then(|| StoreProblem::Silent(now.saturating_sub(self.answered_at)));
        silent.or(self.is_unknown.then_some(StoreProblem::Unknown))
    }

    /// A look got no answer: the next one is soon.
    pub(crate) fn missed(&mut self, now: u64) {
        self.unanswered += 1;
        let silence = now.saturating_sub(self.answered_at);
        self.is_silent = self.unanswered >= UNANSWERED_MAX && silence >= 3 * self.timing.store_watch_ns;
        self.next_at = Some(now + self.timing.store_watch_ns / 10);
    }

    /// A look was answered.
    pub(crate) fn answered(&mut self, now: u64, is_unknown: bool) {
        self.next_at = Some(now + self.timing.store_watch_ns);
        (self.answered_at, self.unanswered) = (now, 0);
        (self.is_silent, self.is_unknown) = (false, is_unknown);
    }
}
