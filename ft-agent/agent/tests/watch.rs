//! Rule 11: a running side watches the store.
#![allow(clippy::disallowed_methods)]

mod pair;

use agent::{Action, Agent, Event, Exposure, Outcome, Phase, Protection, Risk, Status, StoreView, Suspicion};
use entry::End;
use entry::log::EndReason;
use pair::{MS, Pair, TIMING, actions, phase, take};
use store_rule::names::{Generation, Incarnation};
use store_rule::record::{Command, Member, Members, Verdict, VmRecord};

const INTERVAL: u64 = TIMING.store_watch_ns;
const NEXT: Generation = Generation(2);

fn id(n: u128) -> Incarnation {
    Incarnation::try_from(n).unwrap()
}

fn look(who: u128) -> Action {
    Action::Look { generation: Generation::FIRST, who: id(who) }
}

/// The views that end a side, and how.
fn endings() -> [(StoreView, Outcome); 3] {
    [
        (StoreView::Forgotten, Outcome::Forgotten),
        (StoreView::Overtaken(NEXT), Outcome::Overtaken(NEXT)),
        (StoreView::HeldByOther(id(9)), Outcome::Fenced(Some(id(9)))),
    ]
}

fn seen(pair: &Pair, who: u128) -> StoreView {
    StoreView::of(pair.store.get(&"trial".parse().unwrap()), Generation::FIRST, id(who))
}

fn status(agent: &Agent, now: u64) -> Status {
    agent.status(now)
}

#[test]
fn a_record_means_what_it_says_to_each_side() {
    let mut pair = Pair::protected();
    assert_eq!([1, 2].map(|who| seen(&pair, who)), [StoreView::Ours; 2]);
    assert_eq!(
        seen(&pair, 9),
        StoreView::Overtaken(Generation::FIRST),
        "other members: a store started anew"
    );
    let record = pair.store.get(&"trial".parse().unwrap()).cloned().unwrap();
    let restored = VmRecord { restored: true, ..record };
    assert_eq!(StoreView::of(Some(&restored), Generation::FIRST, id(1)), StoreView::Unknown, "from a backup");
    pair.ask_store(&Command::Take { generation: Generation::FIRST, who: id(2) });
    assert_eq!([1, 2].map(|who| seen(&pair, who)), [StoreView::HeldByOther(id(2)), StoreView::Ours]);
    pair.ask_store(&Command::Forget { generation: Generation::FIRST });
    assert_eq!([1, 2].map(|who| seen(&pair, who)), [StoreView::Forgotten; 2]);
    let members = Members { primary: Member::new(id(3)), backup: None };
    pair.ask_store(&Command::Open { generation: NEXT, members });
    assert_eq!([1, 2].map(|who| seen(&pair, who)), [StoreView::Overtaken(NEXT); 2]);
    assert_eq!(StoreView::of(None, Generation::FIRST, id(1)), StoreView::Unknown);
    let record = pair.store.get(&"trial".parse().unwrap());
    assert_eq!(StoreView::of(record, Generation(3), id(1)), StoreView::Unknown, "an earlier generation");
}

#[test]
fn both_sides_look_at_intervals_and_soon_again_without_an_answer() {
    let mut pair = Pair::protected();
    pair.pass_time(INTERVAL - 10 * MS);
    assert_eq!((pair.primary_actions(), pair.backup_actions()), (vec![], vec![]));
    pair.pass_time(10 * MS);
    assert_eq!((pair.primary_actions(), pair.backup_actions()), (vec![look(1)], vec![look(2)]));
    pair.pass_time(INTERVAL);
    assert_eq!(pair.primary_actions(), [], "one look at a time");
    pair.primary.handle(pair.now, Event::Looked(None));
    pair.pass_time(INTERVAL / 10);
    assert_eq!(pair.primary_actions(), [look(1)]);
    pair.primary.handle(pair.now, Event::Looked(Some(StoreView::Ours)));
    pair.pass_time(INTERVAL - 10 * MS);
    assert_eq!(pair.primary_actions(), []);
    pair.pass_time(10 * MS);
    assert_eq!(pair.primary_actions(), [look(1)]);
}

#[test]
fn a_primary_that_is_out_at_the_store_emits_nothing_more_and_tells_its_backup() {
    for (view, outcome) in endings() {
        let mut pair = Pair::protected();
        pair.pass_time(100 * MS);
        pair.emit_output();
        pair.exchange();
        assert_eq!(pair.primary.release_limit(pair.now), 1);
        pair.primary_actions();
        pair.primary.handle(pair.now, Event::Looked(Some(view)));
        assert_eq!(pair.primary.release_limit(pair.now), 0, "before the action is done");
        assert!(!pair.primary.may_announce(pair.now));
        assert_eq!(pair.primary_actions(), [Action::Halt(outcome.clone())]);
        assert!(outcome.to_string().starts_with("fenced: "), "{outcome}");
        pair.exchange();
        let told = Action::Suspected(Suspicion::Failed(outcome.to_string()));
        assert_eq!(pair.backup_actions()[0], told);
    }
}

#[test]
fn a_backup_and_a_side_that_is_alone_are_out_too() {
    for (view, outcome) in endings() {
        let mut pair = Pair::protected();
        pair.backup.handle(pair.now, Event::Looked(Some(view)));
        assert_eq!(pair.backup_actions(), [Action::Halt(outcome.clone())]);
        pair.primary.handle(pair.now, Event::Disconnected);
        pair.primary.handle(pair.now, Event::Verdict(Verdict::Won));
        assert_eq!((phase(&pair.primary), pair.primary.release_limit(pair.now)), (Phase::Alone, u64::MAX));
        pair.primary_actions();
        pair.primary.handle(pair.now, Event::Looked(Some(view)));
        assert_eq!(pair.primary_actions(), [Action::Halt(outcome)]);
        assert_eq!(pair.primary.release_limit(pair.now), 0);
        assert!(!pair.primary.may_announce(pair.now));
        // Whatever comes later changes nothing.
        pair.primary.handle(pair.now, Event::Verdict(Verdict::Won));
        pair.pass_time(2 * INTERVAL);
        assert_eq!((actions(&mut pair.primary), pair.primary.release_limit(pair.now)), (vec![], 0));
    }
}

#[test]
fn an_answer_that_comes_when_the_pair_is_ending_or_has_asked_for_a_verdict_changes_nothing() {
    type Step = fn(&mut Pair);
    let steps: [(Step, Phase); 3] = [
        (
            |pair| pair.primary.handle(pair.now, Event::GuestEnded(EndReason::Guest(End::PowerOff))),
            Phase::Ending,
        ),
        (|pair| pair.primary.handle(pair.now, Event::HandOver), Phase::Ending),
        (|pair| pair.primary.handle(pair.now, Event::Disconnected), Phase::Deciding),
    ];
    for (step, expected) in steps {
        for (view, _) in endings() {
            let mut pair = Pair::protected();
            pair.pass_time(INTERVAL);
            step(&mut pair);
            pair.primary_actions();
            pair.primary.handle(pair.now, Event::Looked(Some(view)));
            assert_eq!((phase(&pair.primary), pair.primary_actions()), (expected, vec![]));
        }
    }
    // An answer from before this side's own verdict.
    let mut pair = Pair::protected();
    pair.pass_time(INTERVAL);
    pair.primary.handle(pair.now, Event::Disconnected);
    assert_eq!(pair.primary_actions().last(), Some(&take(1)));
    pair.primary.handle(pair.now, Event::Verdict(Verdict::Won));
    pair.primary_actions();
    pair.primary.handle(pair.now, Event::Looked(Some(StoreView::Ours)));
    assert_eq!((phase(&pair.primary), pair.primary_actions()), (Phase::Alone, vec![]));
}

#[test]
fn a_pair_is_at_risk_while_its_store_is_silent() {
    let mut pair = Pair::protected();
    let mut told = Vec::new();
    let mut unprotected_at = None;
    let start = pair.now;
    while pair.now < start + 4 * INTERVAL {
        pair.pass_time(10 * MS);
        for action in pair.primary_actions() {
            match action {
                Action::Look { .. } => pair.primary.handle(pair.now, Event::Looked(None)),
                action => told.push(action),
            }
        }
        if !status(&pair.primary, pair.now).is_protected() {
            unprotected_at.get_or_insert(pair.now);
        }
        told.extend(pair.primary_actions());
    }
    let at = unprotected_at.expect("it is noticed");
    assert!((3 * INTERVAL..3 * INTERVAL + INTERVAL / 5).contains(&(at - start)), "{at}");
    let [Action::ProtectionChanged(Protection::AtRisk(Risk::StoreSilent(_)))] = &told[..] else {
        panic!("{told:?}")
    };
    let problem = status(&pair.primary, pair.now).store_problem.expect("a problem").to_string();
    assert!(problem.starts_with("the store has not answered for 240 s"), "{problem}");
    assert_eq!(phase(&pair.primary), Phase::Protected, "the guest goes on");
    pair.primary.handle(pair.now, Event::Looked(Some(StoreView::Ours)));
    assert_eq!(pair.primary_actions(), [Action::ProtectionChanged(Protection::Protected)]);
    assert!(status(&pair.primary, pair.now).is_protected());
}

#[test]
fn one_look_without_an_answer_after_a_standstill_says_nothing_of_the_store() {
    let mut pair = Pair::protected();
    pair.now += 10 * INTERVAL;
    pair.primary.handle(pair.now, Event::Tick);
    assert_eq!(pair.primary_actions(), [look(1)]);
    pair.primary.handle(pair.now, Event::Looked(None));
    assert!(status(&pair.primary, pair.now).is_protected());
}

#[test]
fn a_pair_whose_record_is_lost_goes_on_without_protection() {
    let mut pair = Pair::protected();
    pair.backup.handle(pair.now, Event::Looked(Some(StoreView::Unknown)));
    assert_eq!(
        pair.backup_actions(),
        [Action::ProtectionChanged(Protection::Unprotected(Exposure::StoreUnknown))]
    );
    assert!(!status(&pair.backup, pair.now).is_protected());
    assert_eq!(phase(&pair.backup), Phase::Protected);
    pair.backup.handle(pair.now, Event::Looked(Some(StoreView::Unknown)));
    assert_eq!(pair.backup_actions(), [], "told once");
    pair.backup.handle(pair.now, Event::Looked(Some(StoreView::Ours)));
    assert_eq!(pair.backup_actions(), [Action::ProtectionChanged(Protection::Protected)]);
    assert!(status(&pair.backup, pair.now).is_protected());
}
