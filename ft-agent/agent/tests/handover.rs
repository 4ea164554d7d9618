//! The agent in a planned handover: rules 8 and 12.
#![allow(clippy::disallowed_methods)]

mod pair;

use agent::{Action, Event, Outcome, Phase, Suspicion};
use logging_channel::versions::{ChannelVersions, OURS};
use pair::{MS, Pair, TIMING, phase, take};
use store_rule::names::Incarnation;
use store_rule::record::Verdict;

/// A pair of the release before, whose handovers need the store's verdict.
fn pair_of_version_3() -> Pair {
    Pair::protected_speaking(ChannelVersions { newest: 3, ..OURS })
}

/// A handover whose backup still has an output to replay.
fn handing_over() -> Pair {
    let mut pair = Pair::protected();
    pair.pass_time(100 * MS);
    pair.emit_output();
    pair.primary.handle(pair.now, Event::HandOver);
    pair.exchange();
    assert_eq!(pair.primary_actions(), [Action::Pause, Action::Release]);
    pair.release(1);
    pair.exchange();
    assert_eq!(phase(&pair.backup), Phase::Protected, "its replay is not complete");
    pair
}

#[test]
fn rule_13_a_backup_lives_without_a_verdict_once_its_primary_has_yielded() {
    let mut pair = handing_over();
    pair.replay();
    pair.exchange();
    assert_eq!(pair.primary_actions(), [Action::Halt(Outcome::HandedOver)]);
    let actions = pair.backup_actions();
    assert_eq!(actions[actions.len() - 3..], [Action::HandoverReceived, Action::GoLive, take(2)]);
    assert_eq!((phase(&pair.backup), pair.backup.release_limit(pair.now)), (Phase::Alone, u64::MAX));
    // The store is asked until it has recorded it.
    pair.backup.handle(pair.now, Event::Verdict(Verdict::Unknown(())));
    pair.pass_time(TIMING.retry_ns);
    assert_eq!(pair.backup_actions().last(), Some(&take(2)));
    pair.backup.handle(pair.now, Event::Verdict(Verdict::Won));
    pair.pass_time(2 * TIMING.retry_ns);
    assert_eq!(pair.backup_actions(), []);
}

#[test]
fn rule_13_a_vm_that_was_forgotten_before_its_handover_ends() {
    let mut pair = handing_over();
    pair.replay();
    pair.exchange();
    pair.backup_actions();
    pair.backup.handle(pair.now, Event::Verdict(Verdict::Stale));
    assert_eq!(pair.backup_actions(), [Action::Halt(Outcome::Fenced(None))]);
    assert_eq!(pair.backup.release_limit(pair.now), 0);
}

#[test]
fn rule_13_a_primary_whose_backup_does_not_get_ready_goes_on() {
    let mut pair = handing_over();
    pair.pass_time(TIMING.timeout_ns);
    assert_eq!((pair.primary_actions(), phase(&pair.primary)), (vec![Action::Resume], Phase::Protected));
    // The answer comes too late, and counts for nothing.
    pair.replay();
    pair.exchange();
    pair.emit_output();
    pair.exchange();
    assert_eq!((phase(&pair.primary), phase(&pair.backup)), (Phase::Protected, Phase::Protected));
    pair.release(2);
    // The next handover finds the backup ready.
    pair.exchange();
    pair.primary.handle(pair.now, Event::HandOver);
    pair.exchange();
    pair.replay();
    pair.exchange();
    assert_eq!(pair.primary_actions().last(), Some(&Action::Halt(Outcome::HandedOver)));
}

#[test]
fn rule_13_a_primary_goes_on_if_its_backup_is_lost_before_it_yields() {
    let mut pair = handing_over();
    pair.primary.handle(pair.now, Event::Disconnected);
    let actions = pair.primary_actions();
    assert_eq!(actions, [Action::Suspected(Suspicion::Disconnected), Action::Close, take(1)]);
    pair.primary.handle(pair.now, Event::Verdict(Verdict::Won));
    assert_eq!(pair.primary_actions(), [Action::GoLive]);
}

#[test]
fn rule_13_a_primary_that_has_yielded_never_takes() {
    let mut pair = handing_over();
    pair.reachable[0] = false;
    pair.replay();
    pair.reachable = [false, true];
    // What the backup says to that does not arrive.
    let records = pair.primary.status(pair.now).cursors.recorded;
    pair.primary_hears(&logging_channel::message::Message::Prepared { records });
    pair.primary.handle(pair.now, Event::Disconnected);
    let actions = pair.primary_actions();
    assert_eq!(actions, [Action::Close, Action::Halt(Outcome::Yielded(Suspicion::Disconnected))]);
    pair.primary.handle(pair.now, Event::Verdict(Verdict::Won));
    assert_eq!((pair.primary_actions(), pair.primary.release_limit(pair.now)), (vec![], 1));
}

#[test]
fn rule_13_a_backup_does_not_leave_while_its_primary_may_yield() {
    let mut pair = handing_over();
    pair.backup.handle(pair.now, Event::HandOver);
    assert_eq!(phase(&pair.backup), Phase::Protected);
    pair.replay();
    pair.exchange();
    assert_eq!(phase(&pair.backup), Phase::Alone);

    // If the primary goes on, the backup leaves.
    let mut pair = handing_over();
    pair.backup.handle(pair.now, Event::HandOver);
    pair.pass_time(TIMING.timeout_ns);
    pair.emit_output();
    pair.exchange();
    assert_eq!(pair.backup_actions().last(), Some(&Action::Halt(Outcome::Stopped)));
    assert_eq!(pair.primary_actions().last(), Some(&take(1)));
}

#[test]
fn rule_8_a_handover_loses_nothing() {
    let mut pair = pair_of_version_3();
    pair.pass_time(100 * MS);
    pair.emit_output();
    pair.primary.handle(pair.now, Event::HandOver);
    pair.exchange();
    assert_eq!(pair.primary_actions(), [Action::Pause, Action::Release]);
    assert_eq!(phase(&pair.backup), Phase::Protected, "the output has not left");
    pair.release(1);
    pair.exchange();
    assert_eq!(phase(&pair.backup), Phase::Ending);
    pair.replay();
    assert_eq!(pair.backup_actions().last(), Some(&take(2)));
    pair.backup.handle(pair.now, Event::Verdict(Verdict::Won));
    pair.exchange();
    assert_eq!(pair.backup_actions(), [Action::GoLive]);
    assert_eq!(pair.primary_actions(), [Action::Halt(Outcome::HandedOver)]);
}

#[test]
fn rule_8_a_primary_whose_backup_gets_no_verdict_asks_for_one_itself() {
    let mut pair = pair_of_version_3();
    pair.pass_time(100 * MS);
    pair.primary.handle(pair.now, Event::HandOver);
    pair.exchange();
    pair.replay();
    assert_eq!(pair.backup_actions().last(), Some(&take(2)));
    assert_eq!(pair.primary_actions(), [Action::Pause]);
    pair.pass_time(TIMING.progress_timeout_ns - 100 * MS);
    assert_eq!((pair.primary_actions(), phase(&pair.primary)), (vec![], Phase::Ending), "it takes its time");
    pair.pass_time(200 * MS);
    let actions = pair.primary_actions();
    assert!(matches!(actions[0], Action::Suspected(Suspicion::NoProgress(_))), "{actions:?}");
    assert_eq!(actions[1..], [Action::Close, take(1)]);
    pair.primary.handle(pair.now, Event::Verdict(Verdict::Won));
    assert_eq!(pair.primary_actions(), [Action::GoLive]);
    let holder = Incarnation::try_from(2).unwrap();
    pair.primary.handle(pair.now, Event::Verdict(Verdict::Lost(holder)));
    assert_eq!(pair.primary_actions(), []);
}
