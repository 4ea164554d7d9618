//! Whether what clients saw is the history of one test-and-set store: linearizability, with unknown outcomes.
//!
//! The model is [`crate::record::decide`] itself. A client repeats a command inside one call, so a call is one or more
//! applications of its command between its begin and its end, the last of which gives the answer; all but one of them change
//! nothing, by the rule. A call without an answer is an application at any time after its begin, or none.
//!
//! The search is that of Wing and Gong with the memory of Lowe: it tries the calls in every order that time allows, and
//! remembers which sets of calls have led to which record already.

use std::collections::{BTreeMap, HashSet};

use crate::names::VmName;
use crate::record::{Command, CommandReply, VmRecord, decide};

/// What was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// A command.
    Command(Command),
    /// The record.
    Get,
}

/// What was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Observed {
    /// To a command.
    Reply(CommandReply),
    /// To a get.
    Record(Option<VmRecord>),
}

/// One call of a client. Times are of one clock, in any unit.
#[derive(Clone, Debug)]
pub struct Operation {
    /// When the client asked.
    pub begun: u64,
    /// When it had the answer, and what it was; `None` if it never had one.
    pub ended: Option<(u64, Observed)>,
    /// What it asked.
    pub call: Call,
}

/// A history that no test-and-set store can have.
#[derive(Debug, thiserror::Error)]
#[error(
    "{vm}: no order of its {operations} calls explains the answers; at most {explained} can be explained"
)]
pub struct Violation {
    /// The VM whose calls they are.
    pub vm: VmName,
    /// How many calls there are.
    pub operations: usize,
    /// How many of them the longest order explained that was found.
    pub explained: usize,
}

/// Checks the calls of every VM; each VM is a register of its own.
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

/// A place in the search: which calls have had their answer, which have been applied before it, and what the record is.
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
    /// Whether some order of the rest explains its answers. The stack is a list: histories may be longer than a thread's stack.
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
            // Whatever comes next must have begun before the first of the waiting calls ended.
            let Some(first_end) = ends.map(|(at, _)| *at).min() else { return true };
            let next =
                (0..self.operations.len()).filter(waiting).filter(|i| self.operations[*i].begun <= first_end);
            next.for_each(|i| self.step(&point, i, &mut open));
        }
        false
    }

    /// Where one call can lead from here.
    fn step(&self, from: &SearchPoint, i: usize, open: &mut Vec<SearchPoint>) {
        let operation = &self.operations[i];
        let Call::Command(command) = &operation.call else {
            if matches!(&operation.ended, Some((_, Observed::Record(seen))) if *seen == from.record) {
                open.push(SearchPoint { done: from.done.with(i), ..from.clone() });
            }
            return;
        };
        let (changed, reply) = decide(from.record.as_ref(), command);
        if changed.is_some() && !from.applied.has(i) {
            // An application whose answer was lost; for a call without an answer, its only one.
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
        Operation { begun, ended: Some((ended, Observed::Reply(reply))), call }
    }

    fn unknown(begun: u64, call: Call) -> Operation {
        Operation { begun, ended: None, call }
    }

    fn saw_holder(
        begun: u64,
        ended: u64,
        generation: u64,
        pairing: Members,
        holder: Option<u128>,
    ) -> Operation {
        let (opened, _) = decide(None, &Command::Open { generation: Generation(1), members: pairing });
        let mut record = opened.unwrap();
        record.generation = Generation(generation);
        if let Some(holder) = holder {
            record = decide(
                Some(&record),
                &Command::Take { generation: Generation(generation), who: who(holder) },
            )
            .0
            .unwrap();
        }
        Operation { begun, ended: Some((ended, Observed::Record(Some(record)))), call: Call::Get }
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
        // At once: the answers say in which order.
        assert!(is_possible(&[
            opened(),
            op(2, 9, take(1, 1), CommandReply::Lost(who(2))),
            op(3, 8, take(1, 2), CommandReply::Won)
        ]));
        // Asked again by the same one.
        assert!(is_possible(&[
            opened(),
            op(2, 3, take(1, 1), CommandReply::Won),
            op(4, 5, take(1, 1), CommandReply::Won)
        ]));
        // An unknown take that was done much later, or never.
        let late = [opened(), unknown(2, take(1, 2)), saw_holder(8, 9, 1, pair(1, 2), None)];
        assert!(is_possible(&late));
        assert!(is_possible(&[&late[..], &[op(10, 11, take(1, 1), CommandReply::Lost(who(2)))]].concat()));
        assert!(is_possible(&[&late[..], &[op(10, 11, take(1, 1), CommandReply::Won)]].concat()));
        // A take that was done, whose answer was lost, and which was repeated inside its call after the VM was forgotten.
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
        let gone = Operation { begun: 4, ended: Some((5, Observed::Record(None))), call: Call::Get };
        assert!(!is_possible(&[opened(), won.clone(), gone]));
        // Its number comes again after it was forgotten.
        let again = op(6, 7, open(1, 3, 4), CommandReply::Done);
        assert!(!is_possible(&[opened(), won, op(4, 5, forget(1), CommandReply::Done), again]));
    }

    #[test]
    fn reads_of_the_past_and_of_the_future_are_refused() {
        let won = op(4, 5, take(1, 1), CommandReply::Won);
        // It was read as taken before anybody asked for it.
        assert!(!is_possible(&[opened(), saw_holder(2, 3, 1, pair(1, 2), Some(1)), won.clone()]));
        // Two reads, the later of which is older.
        let reads = [saw_holder(6, 7, 1, pair(1, 2), Some(1)), saw_holder(8, 9, 1, pair(1, 2), None)];
        assert!(!is_possible(&[&[opened(), unknown(2, take(1, 1))], &reads[..]].concat()));
    }

    #[test]
    fn a_wrong_stale_is_refused() {
        assert!(!is_possible(&[opened(), op(2, 3, take(1, 1), CommandReply::Stale)]));
        // A stranger that won, an opener that does not hold the last generation, an unknown call that cannot have done it.
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
