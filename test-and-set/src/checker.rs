//! Checks that what clients observed is the history of one test-and-set store: linearizability, with unknown outcomes.
//!
//! The model is [`crate::record::decide`] itself. A client repeats a command within one call, so a call is one or more
//! applications of its command between its start and its end. The last application gives the answer, and by the rule all but one
//! of them change nothing. A call without an answer is one application at any time after its start, or none.
//!
//! The search is Wing and Gong's with Lowe's memoization: it tries the calls in every order that their times allow, and remembers
//! which sets of calls have already led to which record.

use std::collections::{BTreeMap, HashSet};

use crate::names::VmName;
use crate::record::{Asker, Command, CommandReply, VmRecord, decide};

/// What a client requested.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// To apply a command.
    Command(Command),
    /// To read the record.
    Get,
}

/// What a client was answered.
#[expect(clippy::large_enum_variant, reason = "few live at once, and most are records")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Observed {
    /// The reply to a command.
    Reply(CommandReply),
    /// The record that was read.
    Record(Option<VmRecord>),
}

/// One call of a client. All times are from one clock, in any unit.
#[derive(Clone, Debug)]
pub struct Operation {
    /// When the call started.
    pub begun: u64,
    /// When the answer came, and the answer; `None` if there was none.
    pub ended: Option<(u64, Observed)>,
    /// Who called; `None` in a store without roles.
    pub asker: Option<Asker>,
    /// What was requested.
    pub call: Call,
}

/// Says that a history is not one of a test-and-set store.
#[derive(Debug, thiserror::Error)]
#[error(
    "VM {vm}: no order of its {operations} calls explains their answers; at most {explained} of them can be explained"
)]
pub struct Violation {
    /// The VM that the calls are about.
    pub vm: VmName,
    /// The number of calls.
    pub operations: usize,
    /// The largest number of calls whose answers an order explains.
    pub explained: usize,
}

/// Checks the calls of each VM by themselves.
pub fn check(history: &BTreeMap<VmName, Vec<Operation>>) -> Result<(), Violation> {
    history.iter().try_for_each(|(vm, operations)| {
        let mut operations = operations.clone();
        operations.sort_by_key(|op| op.begun);
        let mut search = Search { operations: &operations, tried: HashSet::new(), explained: 0 };
        let start = SearchPoint {
            done: Bits::new(operations.len()),
            applied: Bits::new(operations.len()),
            record: None,
        };
        if search.explains(start) {
            return Ok(());
        }
        Err(Violation { vm: vm.clone(), operations: operations.len(), explained: search.explained })
    })
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Bits(Vec<u64>);

impl Bits {
    fn new(bits: usize) -> Self {
        Self(vec![0; bits.div_ceil(64)])
    }

    fn has(&self, bit: usize) -> bool {
        self.0[bit / 64] >> (bit % 64) & 1 == 1
    }

    fn with(&self, bit: usize) -> Self {
        let mut more = self.clone();
        more.0[bit / 64] |= 1 << (bit % 64);
        more
    }

    fn count(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }
}

/// A point in the search: which calls have been answered, which have been applied before their answer, and the record.
#[derive(Clone, PartialEq, Eq, Hash)]
struct SearchPoint {
    done: Bits,
    applied: Bits,
    record: Option<VmRecord>,
}

struct Search<'h> {
    operations: &'h [Operation],
    tried: HashSet<SearchPoint>,
    explained: usize,
}

impl Search<'_> {
    /// Whether some order of the remaining calls explains their answers. This keeps its own stack, because a history may be too long
    /// for recursion.
    fn explains(&mut self, start: SearchPoint) -> bool {
        let mut open = vec![start];
        while let Some(point) = open.pop() {
            if !self.tried.insert(point.clone()) {
                continue;
            }
            self.explained = self.explained.max(point.done.count());
            let waiting = |i: &usize| !point.done.has(*i);
            let ends =
                (0..self.operations.len()).filter(waiting).filter_map(|i| self.operations[i].ended.as_ref());
            // The next call must have started before the first of the unanswered calls ended.
            let Some(first_end) = ends.map(|(at, _)| *at).min() else { return true };
            let next =
                (0..self.operations.len()).filter(waiting).filter(|i| self.operations[*i].begun <= first_end);
            next.for_each(|i| self.step(&point, i, &mut open));
        }
        false
    }

    /// Adds the points that call `i` can lead to.
    fn step(&self, from: &SearchPoint, i: usize, open: &mut Vec<SearchPoint>) {
        let operation = &self.operations[i];
        let Call::Command(command) = &operation.call else {
            if matches!(&operation.ended, Some((_, Observed::Record(seen))) if *seen == from.record) {
                open.push(SearchPoint { done: from.done.with(i), ..from.clone() });
            }
            return;
        };
        let (changed, reply) = decide(from.record.as_ref(), command, operation.asker.as_ref());
        if changed.is_some() && !from.applied.has(i) {
            // An application whose answer was lost; the only one of a call without an answer.
            open.push(SearchPoint {
                done: from.done.clone(),
                applied: from.applied.with(i),
                record: changed.clone(),
            });
        }
        if matches!(&operation.ended, Some((_, Observed::Reply(seen))) if *seen == reply) {
            let record = changed.or_else(|| from.record.clone());
            open.push(SearchPoint { done: from.done.with(i), applied: from.applied.clone(), record });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::{Generation, Incarnation};
    use crate::record::{Member, Members};

    fn who(n: u128) -> Incarnation {
        Incarnation::try_from(n).unwrap()
    }

    fn pair(a: u128, b: u128) -> Members {
        Members { primary: Member::new(who(a)), backup: Some(Member::new(who(b))) }
    }

    fn open(generation: u64, a: u128, b: u128) -> Call {
        Call::Command(Command::Open { generation: Generation(generation), members: pair(a, b) })
    }

    fn take(generation: u64, n: u128) -> Call {
        Call::Command(Command::Take { generation: Generation(generation), who: who(n) })
    }

    fn forget(generation: u64) -> Call {
        Call::Command(Command::Forget { generation: Generation(generation) })
    }

    fn op(begun: u64, ended: u64, call: Call, reply: CommandReply) -> Operation {
        Operation { begun, ended: Some((ended, Observed::Reply(reply))), asker: None, call }
    }

    fn unknown(begun: u64, call: Call) -> Operation {
        Operation { begun, ended: None, asker: None, call }
    }

    fn saw_holder(
        begun: u64,
        ended: u64,
        generation: u64,
        pairing: Members,
        holder: Option<u128>,
    ) -> Operation {
        let open = Command::Open { generation: Generation(1), members: pairing };
        let (opened, _) = decide(None, &open, None);
        let mut record = opened.unwrap();
        record.generation = Generation(generation);
        if let Some(holder) = holder {
            let take = Command::Take { generation: Generation(generation), who: who(holder) };
            record = decide(Some(&record), &take, None).0.unwrap();
        }
        let seen = Observed::Record(Some(record));
        Operation { begun, ended: Some((ended, seen)), asker: None, call: Call::Get }
    }

    fn is_possible(operations: &[Operation]) -> bool {
        check(&BTreeMap::from([("vm".parse().unwrap(), operations.to_vec())])).is_ok()
    }

    fn opened() -> Operation {
        op(0, 1, open(1, 1, 2), CommandReply::Done)
    }

    #[test]
    fn possible_histories_are_accepted() {
        // One after the other.
        assert!(is_possible(&[
            opened(),
            op(2, 3, take(1, 1), CommandReply::Won),
            op(4, 5, take(1, 2), CommandReply::Lost(who(1)))
        ]));
        // Concurrently: the answers show in which order.
        assert!(is_possible(&[
            opened(),
            op(2, 9, take(1, 1), CommandReply::Lost(who(2))),
            op(3, 8, take(1, 2), CommandReply::Won)
        ]));
        // Repeated by the same member.
        assert!(is_possible(&[
            opened(),
            op(2, 3, take(1, 1), CommandReply::Won),
            op(4, 5, take(1, 1), CommandReply::Won)
        ]));
        // A take without an answer that was applied much later, or never.
        let late = [opened(), unknown(2, take(1, 2)), saw_holder(8, 9, 1, pair(1, 2), None)];
        assert!(is_possible(&late));
        assert!(is_possible(&[&late[..], &[op(10, 11, take(1, 1), CommandReply::Lost(who(2)))]].concat()));
        assert!(is_possible(&[&late[..], &[op(10, 11, take(1, 1), CommandReply::Won)]].concat()));
        // A take that was applied, but whose answer was lost, and which its call repeated after the VM was forgotten.
        let repeated = [
            opened(),
            op(2, 9, take(1, 1), CommandReply::Stale),
            saw_holder(3, 4, 1, pair(1, 2), Some(1)),
            op(5, 6, forget(1), CommandReply::Done),
        ];
        assert!(is_possible(&repeated));
    }

    #[test]
    fn two_winners_are_refused() {
        assert!(!is_possible(&[
            opened(),
            op(2, 9, take(1, 1), CommandReply::Won),
            op(3, 8, take(1, 2), CommandReply::Won)
        ]));
        assert!(!is_possible(&[
            opened(),
            op(2, 3, take(1, 1), CommandReply::Won),
            op(4, 5, take(1, 2), CommandReply::Won)
        ]));
        // Both lost.
        let lost = [
            op(2, 9, take(1, 1), CommandReply::Lost(who(2))),
            op(3, 8, take(1, 2), CommandReply::Lost(who(1))),
        ];
        assert!(!is_possible(&[&[opened()], &lost[..]].concat()));
    }

    #[test]
    fn a_forgotten_winner_is_refused() {
        let won = op(2, 3, take(1, 1), CommandReply::Won);
        // Nobody holds it afterwards.
        assert!(!is_possible(&[opened(), won.clone(), saw_holder(4, 5, 1, pair(1, 2), None)]));
        // The VM is unknown afterwards.
        let seen = Observed::Record(None);
        let gone = Operation { begun: 4, ended: Some((5, seen)), asker: None, call: Call::Get };
        assert!(!is_possible(&[opened(), won.clone(), gone]));
        // The generation can be opened again after the VM was forgotten.
        let again = op(6, 7, open(1, 3, 4), CommandReply::Done);
        assert!(!is_possible(&[opened(), won, op(4, 5, forget(1), CommandReply::Done), again]));
    }

    #[test]
    fn what_a_stranger_is_answered_is_checked() {
        let host = |name: &str| Asker { host: Some(name.parse().unwrap()), operator: None };
        let by = |asker: &str, operation: Operation| Operation { asker: Some(host(asker)), ..operation };
        let opened = by("a", opened());
        assert!(is_possible(&[opened.clone(), by("a", op(2, 3, take(1, 1), CommandReply::Won))]));
        assert!(!is_possible(&[opened.clone(), by("b", op(2, 3, take(1, 1), CommandReply::Won))]));
        // A stranger's take without an answer cannot have been applied.
        let strangers = by("b", unknown(2, take(1, 1)));
        let lost = by("a", op(4, 5, take(1, 2), CommandReply::Lost(who(1))));
        assert!(!is_possible(&[opened.clone(), strangers, lost.clone()]));
        assert!(is_possible(&[opened.clone(), by("a", unknown(2, take(1, 1))), lost]));
        assert!(!is_possible(&[opened, by("a", op(2, 3, forget(1), CommandReply::Done))]));
    }

    #[test]
    fn reads_of_the_past_and_of_the_future_are_refused() {
        let won = op(4, 5, take(1, 1), CommandReply::Won);
        // It was read as taken before anybody tried to take it.
        assert!(!is_possible(&[opened(), saw_holder(2, 3, 1, pair(1, 2), Some(1)), won.clone()]));
        // Of two reads the later one returns the older record.
        let reads = [saw_holder(6, 7, 1, pair(1, 2), Some(1)), saw_holder(8, 9, 1, pair(1, 2), None)];
        assert!(!is_possible(&[&[opened(), unknown(2, take(1, 1))], &reads[..]].concat()));
    }

    #[test]
    fn a_wrong_stale_is_refused() {
        assert!(!is_possible(&[opened(), op(2, 3, take(1, 1), CommandReply::Stale)]));
        // Impossible: a non-member that won, an opener that does not hold the last generation, and a take without an answer by a
        // non-member that took effect.
        assert!(!is_possible(&[opened(), op(2, 3, take(1, 9), CommandReply::Won)]));
        assert!(!is_possible(&[
            opened(),
            op(2, 3, take(1, 1), CommandReply::Won),
            op(4, 5, open(2, 2, 3), CommandReply::Done)
        ]));
        assert!(!is_possible(&[
            opened(),
            unknown(2, take(1, 9)),
            op(4, 5, take(1, 1), CommandReply::Lost(who(9)))
        ]));
    }
}
