//! How far each member's data has come, as the members remember it of each other and of themselves.
//!
//! Each change of a member's data has a number, and each run of the member has a random id. A member tells both with every message,
//! once the change is on its disk, and the others remember the highest. So data with less than another member remembers is an old
//! copy, or its disk has lost writes as a whole: it may lack votes and verdicts. Numbers alone do not show that, because an old copy
//! makes changes, too, while it reaches nobody; but it does not know the runs in which the later changes were made.
//!
//! What nobody remembers is not found. If the only member that knows what a restored one has acknowledged is down, and no other
//! has heard of it, the restored member and the others form a majority that has forgotten it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::names::RunId;
use crate::wire::{DataMark, NodeId};

/// The number of runs that a member knows of itself.
const RUNS_MAX: usize = 4096;

/// The runs of a member with this data, from the oldest on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunList(Vec<MemberRun>);

/// One run of a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct MemberRun {
    id: RunId,
    /// The number of the last change before it.
    after: u64,
}

impl RunList {
    /// Adds a run, which begins after the change with this number.
    pub fn begin(&mut self, id: RunId, after: u64) {
        self.0.push(MemberRun { id, after });
        let surplus = self.0.len().saturating_sub(RUNS_MAX);
        self.0.drain(..surplus);
    }

    /// Whether this data has a change, if the last one has the number `last`.
    pub fn have(&self, mark: &DataMark, last: u64) -> bool {
        match self.0.iter().position(|run| run.id == mark.run) {
            Some(at) => mark.change <= self.0.get(at + 1).map_or(last, |next| next.after),
            // A run that is unknown because it is too long ago.
            None => self.0.first().is_some_and(|oldest| mark.change <= oldest.after),
        }
    }
}

/// What a member remembers of the others.
#[derive(Debug, Clone, Default)]
pub struct KnownMembers {
    all: BTreeMap<NodeId, DataMark>,
    is_written: bool,
}

impl KnownMembers {
    /// What is stored.
    pub fn stored(all: BTreeMap<NodeId, DataMark>) -> Self {
        Self { all, is_written: true }
    }

    /// What is known, by member.
    pub fn all(&self) -> &BTreeMap<NodeId, DataMark> {
        &self.all
    }

    /// Whether all of it is stored.
    pub fn is_written(&self) -> bool {
        self.is_written
    }

    /// Stores or forgets what is known of a member, whatever was known before.
    pub fn set(&mut self, id: NodeId, mark: Option<DataMark>) {
        match mark {
            Some(mark) => drop(self.all.insert(id, mark)),
            None => drop(self.all.remove(&id)),
        }
    }

    /// Notes how far a known member's data has come. Other data than the known is ignored, and so is less than is known.
    pub fn note(&mut self, id: NodeId, mark: DataMark) {
        let known = self.all.get_mut(&id);
        if let Some(known) = known.filter(|known| known.data == mark.data && known.change < mark.change) {
            *known = mark;
            self.is_written = false;
        }
    }

    /// As [`KnownMembers::note`], also of a member that is not known yet.
    pub fn hear_of(&mut self, id: NodeId, mark: DataMark) {
        if self.all.contains_key(&id) {
            return self.note(id, mark);
        }
        self.all.insert(id, mark);
        self.is_written = false;
    }

    /// Notes that this much is stored.
    pub fn set_written(&mut self, stored: &BTreeMap<NodeId, DataMark>) {
        self.is_written = self.all == *stored;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::CopyId;

    #[test]
    fn an_old_copy_lacks_what_was_acknowledged_however_many_changes_it_makes() {
        let (data, [first, second, third]) = (CopyId::random(), [(); 3].map(|()| RunId::random()));
        let at = |run, change| DataMark { data, run, change };
        let mut runs = RunList::default();
        runs.begin(first, 1);
        let copy = runs.clone();
        runs.begin(second, 100);
        assert!(runs.have(&at(first, 100), 150) && runs.have(&at(second, 150), 150));
        assert!(!runs.have(&at(first, 101), 150) && !runs.have(&at(second, 151), 150));
        // The copy was taken at change 50, and is started twice.
        let (mut restored, later) = (copy, RunId::random());
        restored.begin(third, 50);
        restored.begin(later, 500);
        assert!(restored.have(&at(first, 50), 1000));
        assert!(!restored.have(&at(first, 51), 1000) && !restored.have(&at(second, 101), 1000));
    }

    #[test]
    fn runs_that_are_too_long_ago_are_no_evidence() {
        let mut runs = RunList::default();
        let (oldest, data) = (RunId::random(), CopyId::random());
        runs.begin(oldest, 1);
        for n in 0..RUNS_MAX as u64 {
            runs.begin(RunId::random(), 10 + n);
        }
        assert!(runs.have(&DataMark { data, run: oldest, change: 10 }, 10_000));
        assert!(!runs.have(&DataMark { data, run: oldest, change: 11 }, 10_000));
        assert_eq!(runs.0.len(), RUNS_MAX);
    }

    #[test]
    fn less_and_other_data_are_not_noted() {
        let mut known = KnownMembers::default();
        let (data, run) = (CopyId::random(), RunId::random());
        known.note(2, DataMark { data, run, change: 8 });
        assert!(known.all().is_empty());
        known.hear_of(2, DataMark { data, run, change: 7 });
        known.note(2, DataMark { data, run, change: 6 });
        known.note(2, DataMark { data: CopyId::random(), run, change: 9 });
        assert_eq!(known.all()[&2].change, 7);
        known.set(2, None);
        assert!(known.all().is_empty());
    }
}
