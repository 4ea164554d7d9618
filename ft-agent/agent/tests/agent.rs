//! The agent's rules, each in a short scenario of two agents and a store.
#![allow(clippy::disallowed_methods)]

mod pair;

use agent::{Action, Event, GuestPace, Hello, NextRecord, Outcome, PeerRefusal, Phase, Role, Suspicion};
use entry::identity::Identity;
use entry::log::{EndReason, Entry, Record};
use entry::{End, Position, PositionUnit};
use logging_channel::versions::OURS;
use pair::{BACKUP_KEY, MS, Pair, TIMING, config, phase, take, take_bytes};
use store_rule::names::{Generation, Incarnation};
use store_rule::record::{Applied, Command, CommandReply, HostId, Verdict};

#[test]
fn an_output_leaves_when_the_backup_has_its_record() {
    let mut pair = Pair::protected();
    pair.pass_time(100 * MS);
    pair.emit_output();
    assert_eq!(pair.primary.release_limit(pair.now), 0);
    pair.exchange();
    assert_eq!(pair.primary.release_limit(pair.now), 1);
    assert_eq!(pair.primary_actions(), [Action::Release]);
    assert_eq!(pair.backup.release_limit(pair.now), 0, "a backup emits nothing");
    pair.release(1);
    pair.emit_output();
    pair.exchange();
    assert_eq!(pair.backup.drop_limit(), 1);
    assert_eq!(pair.backup_actions(), [Action::Drop]);
}

/// A process says hello to the backup on a second connection. Returns what the backup does.
fn claim(pair: &mut Pair, vm: &str, incarnation: u128, same_certificate: bool) -> Vec<Action> {
    let hello = Hello {
        versions: OURS,
        vm: vm.into(),
        role: Role::Primary,
        incarnation,
        disks: Default::default(),
        timeout_ns: TIMING.timeout_ns,
        buffer_bytes: 1,
        identity: Identity::new(PositionUnit::Instructions),
    };
    pair.backup.handle(pair.now, Event::Stranger { hello: &hello, same_certificate });
    pair.backup_actions()
}

#[test]
fn rule_1_a_peer_that_was_restarted_is_lost() {
    let mut pair = Pair::protected();
    pair.pass_time(100 * MS);
    pair.reachable = [true, false];
    pair.pass_time(TIMING.timeout_ns / 2);
    assert_eq!(claim(&mut pair, "another", 9, true), []);
    assert_eq!(claim(&mut pair, "trial", 1, true), []);
    let actions = claim(&mut pair, "trial", 9, true);
    assert_eq!(actions, [Action::Suspected(Suspicion::Restarted), Action::Close, take(2)]);
}

#[test]
fn rule_10_a_claim_never_beats_a_live_connection() {
    let mut pair = Pair::protected();
    let claim = |pair: &mut Pair, same_certificate| claim(pair, "trial", 9, same_certificate);
    for _ in 0..20 {
        pair.pass_time(70 * MS);
        assert_eq!(claim(&mut pair, false), []);
        assert_eq!(claim(&mut pair, true), [], "the peer is heard every 50 ms");
    }
    // A process that was stopped has not read yet what arrived meanwhile.
    pair.now += 600 * MS;
    assert_eq!(claim(&mut pair, true), []);
    pair.backup.handle(pair.now, Event::Tick);
    assert_eq!(claim(&mut pair, true), []);
    pair.pass_time(1000 * MS);
    // Silence is not enough without the peer's certificate.
    pair.reachable = [true, false];
    pair.pass_time(TIMING.timeout_ns / 2 - 50 * MS);
    assert_eq!(claim(&mut pair, true), [], "not yet quiet");
    pair.pass_time(50 * MS);
    assert_eq!(claim(&mut pair, false), []);
    assert_eq!(claim(&mut pair, true)[0], Action::Suspected(Suspicion::Restarted));
}

#[test]
fn rule_10_holds_before_the_guest_runs_and_when_the_pair_is_over() {
    let mut pair = Pair::new(config(Role::Primary, 1), config(Role::Backup, 2));
    pair.connect();
    let claim = |pair: &mut Pair, same_certificate| claim(pair, "trial", 9, same_certificate);
    // The primary opens the generation meanwhile, and would be left without a backup.
    pair.pass_time(200 * MS);
    assert_eq!(claim(&mut pair, true), []);
    let mut pair = Pair::protected();
    pair.backup.handle(pair.now, Event::Disconnected);
    pair.backup.handle(pair.now, Event::Verdict(Verdict::Won));
    pair.backup_actions();
    assert_eq!(claim(&mut pair, true), []);
}

#[test]
fn rule_2_silence_is_suspected_after_the_timeout() {
    let mut pair = Pair::protected();
    pair.pass_time(200 * MS);
    pair.reachable = [false, true];
    pair.pass_time(950 * MS);
    assert_eq!(phase(&pair.primary), Phase::Protected);
    pair.pass_time(100 * MS);
    let actions = pair.primary_actions();
    assert!(matches!(actions[0], Action::Suspected(Suspicion::Silent(_))), "{actions:?}");
    assert_eq!(actions[1..], [Action::Close, take(1)]);
}

#[test]
fn rule_2_a_side_that_was_stopped_listens_before_it_judges() {
    let mut pair = Pair::protected();
    pair.pass_time(100 * MS);
    pair.now += 10_000 * MS;
    pair.backup.handle(pair.now, Event::Tick);
    assert_eq!(phase(&pair.backup), Phase::Protected);
    pair.now += 700 * MS;
    pair.backup.handle(pair.now, Event::Received(&[]));
    pair.pass_time(500 * MS);
    assert_eq!(phase(&pair.backup), Phase::Protected);
}

#[test]
fn rule_2_a_wedged_guest_with_a_living_heartbeat_is_lost() {
    let mut pair = Pair::protected();
    let end = 6000 * MS;
    while pair.now < end {
        pair.now += 10 * MS;
        pair.backup.guest_loop_turned(pair.now, Position::default());
        pair.primary.handle(pair.now, Event::Tick);
        pair.backup.handle(pair.now, Event::Tick);
        pair.exchange();
    }
    let actions = pair.backup_actions();
    // First its outputs cannot leave (rule 12).
    assert!(matches!(actions[1], Action::Suspected(Suspicion::NoProgress(_))), "{actions:?}");
}

#[test]
fn rule_2_an_idle_backup_is_not_lost_for_having_nothing_to_replay() {
    let mut pair = Pair::protected();
    for _ in 0..1000 {
        pair.now += 10 * MS;
        pair.primary.guest_loop_turned(pair.now, Position::default());
        pair.primary.handle(pair.now, Event::Tick);
        pair.backup.handle(pair.now, Event::Tick);
        pair.exchange();
    }
    assert_eq!(phase(&pair.primary), Phase::Protected);
}

#[test]
fn rule_3_only_a_verdict_ends_a_suspicion() {
    let mut pair = Pair::protected();
    pair.pass_time(100 * MS);
    pair.emit_output();
    let late = take_bytes(&mut pair.primary);
    pair.backup.handle(pair.now, Event::Disconnected);
    pair.backup.handle(pair.now, Event::Received(&late));
    assert_eq!(pair.backup.outgoing(), b"", "nothing is acknowledged any more");
    assert_eq!(pair.backup_actions().last(), Some(&take(2)));
    pair.backup.handle(pair.now, Event::Verdict(Verdict::Unknown(())));
    assert_eq!(pair.backup.deadline(), Some(pair.now + TIMING.retry_ns));
    pair.backup.handle(pair.now + TIMING.retry_ns, Event::Tick);
    assert_eq!(pair.backup_actions(), [take(2)]);
    pair.backup.handle(pair.now, Event::Verdict(Verdict::Won));
    assert_eq!(pair.backup_actions(), [Action::GoLive]);
    assert_eq!(pair.backup.release_limit(pair.now), u64::MAX);
    pair.backup.handle(pair.now, Event::Verdict(Verdict::Stale));
    assert_eq!(phase(&pair.backup), Phase::Alone, "the second answer to a question that was asked twice");
}

#[test]
fn rule_4_a_backup_replays_everything_and_is_ready_before_it_takes() {
    let mut pair = Pair::new(config(Role::Primary, 1), config(Role::Backup, 2));
    pair.connect();
    pair.primary.handle(0, Event::Opened(Some(Applied::Done)));
    pair.exchange();
    pair.emit_output();
    pair.emit_output();
    pair.exchange();
    pair.backup_actions();
    pair.backup.handle(0, Event::Disconnected);
    assert_eq!(pair.backup_actions(), [Action::Suspected(Suspicion::Disconnected), Action::Close]);
    pair.replay();
    assert_eq!(pair.backup_actions(), [], "its tap is not ready");
    pair.backup.handle(0, Event::Ready);
    assert_eq!(pair.backup_actions(), [take(2)]);
    assert_eq!(pair.backup.next_record(), NextRecord::End);
}

#[test]
fn rule_4_a_backup_that_failed_says_so_and_never_takes() {
    let mut pair = Pair::protected();
    pair.backup.handle(0, Event::HostFailed("disk root: input/output error"));
    let failed = "disk root: input/output error".to_string();
    assert_eq!(pair.backup_actions(), [Action::Halt(Outcome::Failed(failed.clone()))]);
    pair.exchange();
    let suspected = Action::Suspected(Suspicion::Failed(failed));
    assert_eq!(pair.primary_actions(), [suspected, Action::Close, take(1)]);
    pair.backup.handle(0, Event::Disconnected);
    pair.backup.handle(TIMING.timeout_ns * 2, Event::Tick);
    assert_eq!(pair.backup_actions(), [Action::Close]);
}

#[test]
fn rule_4_a_primary_whose_guest_is_stuck_does_not_take() {
    let mut pair = Pair::protected();
    pair.pass_time(100 * MS);
    let stuck = pair.now;
    let tick = |pair: &mut Pair, until: u64| {
        while pair.now < until {
            pair.now += 10 * MS;
            pair.primary.handle(pair.now, Event::Tick);
        }
    };
    tick(&mut pair, stuck + 900 * MS);
    pair.primary.handle(pair.now, Event::Disconnected);
    let suspected = Action::Suspected(Suspicion::Disconnected);
    assert_eq!(pair.primary_actions(), [suspected, Action::Close]);
    tick(&mut pair, stuck + TIMING.progress_timeout_ns - 10 * MS);
    pair.primary.guest_loop_turned(pair.now, Position::default());
    assert_eq!(
        pair.primary_actions(),
        [take(1)],
        "its guest loop makes turns again, late, so that it could live"
    );
}

#[test]
fn a_side_whose_guest_stays_stuck_while_it_is_alone_gives_up() {
    let mut pair = Pair::protected();
    pair.pass_time(100 * MS);
    let stuck = pair.now;
    pair.backup.handle(pair.now, Event::Disconnected);
    pair.backup_actions();
    while pair.now < stuck + TIMING.progress_timeout_ns {
        assert_eq!(phase(&pair.backup), Phase::Deciding);
        pair.now += 10 * MS;
        pair.backup.handle(pair.now, Event::Tick);
    }
    let failed = Outcome::Failed("the guest loop is stuck".into());
    assert_eq!(pair.backup_actions().last(), Some(&Action::Halt(failed)));
}

#[test]
fn rule_5_nothing_leaves_when_the_peer_was_not_heard_for_half_the_timeout() {
    let mut pair = Pair::protected();
    pair.pass_time(100 * MS);
    pair.emit_output();
    pair.exchange();
    assert_eq!(
        pair.primary.release_limit(pair.now + 501 * MS),
        0,
        "the last turn and the last echo are too old"
    );
    let late = pair.now + 400 * MS;
    pair.primary.guest_loop_turned(late, Position::default());
    assert_eq!(pair.primary.release_limit(late), 1);
}

#[test]
fn rule_5_an_old_acknowledgement_that_is_read_late_does_not_renew_the_lease() {
    let mut pair = Pair::protected();
    pair.pass_time(100 * MS);
    pair.emit_output();
    let log = take_bytes(&mut pair.primary);
    pair.backup.handle(pair.now, Event::Received(&log));
    let ack = take_bytes(&mut pair.backup);
    // The primary was stopped, and finds the acknowledgement in its socket.
    pair.now += 2000 * MS;
    pair.primary.guest_loop_turned(pair.now, Position::default());
    pair.primary.handle(pair.now, Event::Received(&ack));
    assert_eq!(pair.primary.status(pair.now).cursors.outputs_acked, 1);
    assert_eq!(pair.primary.release_limit(pair.now), 0);
    // The output leaves once the backup is known to hear the primary again.
    pair.pass_time(200 * MS);
    assert_eq!(pair.primary.release_limit(pair.now), 1);
}

#[test]
fn rule_5_the_outputs_in_the_winners_gate_leave_and_the_losers_do_not() {
    for (verdict, limit) in [(Verdict::Won, u64::MAX), (Verdict::Stale, 0)] {
        let mut pair = Pair::protected();
        pair.pass_time(100 * MS);
        pair.emit_output();
        pair.primary.handle(pair.now, Event::Disconnected);
        assert_eq!(pair.primary.release_limit(pair.now), 0);
        assert_eq!(pair.primary.pace(pair.now), GuestPace::Stop);
        pair.primary.handle(pair.now, Event::Verdict(verdict));
        assert_eq!(pair.primary.release_limit(pair.now), limit);
    }
}

#[test]
fn rule_6_one_of_two_that_lost_each_other_lives() {
    let mut pair = Pair::protected();
    pair.primary.handle(0, Event::Disconnected);
    pair.backup.handle(0, Event::Disconnected);
    for (who, expected) in
        [(2, CommandReply::Won), (1, CommandReply::Lost(Incarnation::try_from(2).unwrap()))]
    {
        let who = Incarnation::try_from(who).unwrap();
        assert_eq!(pair.ask_store(&Command::Take { generation: Generation::FIRST, who }), expected);
    }
    pair.primary_actions();
    let holder = Incarnation::try_from(2).unwrap();
    pair.primary.handle(0, Event::Verdict(Verdict::Lost(holder)));
    assert_eq!(pair.primary_actions(), [Action::Halt(Outcome::Fenced(Some(holder)))]);
}

#[test]
fn rule_6_the_store_is_told_the_peers_key_and_its_refusal_ends_the_start() {
    let mut pair = Pair::new(config(Role::Primary, 1), config(Role::Backup, 2));
    pair.connect();
    let actions = pair.primary_actions();
    let [Action::Open { members, .. }] = &actions[..] else { panic!("{actions:?}") };
    assert_eq!(members.primary.host, None, "the host that asks");
    let backup = members.backup.as_ref().map(|backup| backup.host.clone());
    assert_eq!(backup, Some(Some(HostId::Key(BACKUP_KEY))));
    pair.primary.handle(0, Event::OpenRefused("the VM is bound to host c"));
    pair.exchange();
    let outcome = Outcome::OpenRefused("the VM is bound to host c".into());
    assert_eq!(pair.primary_actions(), [Action::Halt(outcome.clone())]);
    let told = Action::Refused(PeerRefusal::Told(outcome.to_string()));
    assert_eq!(pair.backup_actions(), [told, Action::Close]);
}

#[test]
fn rule_8_a_power_off_is_acknowledged_and_nobody_takes() {
    let mut pair = Pair::protected();
    pair.pass_time(100 * MS);
    pair.emit_output();
    let reason = EndReason::Guest(End::PowerOff);
    pair.primary
        .append(pair.now, &Record { position: Position::exact(pair.position), entry: Entry::End(reason) });
    pair.primary.handle(pair.now, Event::GuestEnded(reason));
    pair.exchange();
    assert_eq!(phase(&pair.backup), Phase::Protected, "the last output has not left");
    pair.release(1);
    pair.exchange();
    let end = |who| Action::End { generation: Generation::FIRST, who: Incarnation::try_from(who).unwrap() };
    assert_eq!(pair.primary_actions().last(), Some(&end(1)));
    pair.primary.handle(pair.now, Event::EndRecorded(true));
    assert_eq!(pair.primary_actions(), [Action::Halt(Outcome::Ended(reason))]);
    pair.backup.handle(pair.now, Event::Disconnected);
    pair.backup_actions();
    assert_eq!(pair.backup.release_limit(pair.now), 0);
    pair.replay();
    assert_eq!(pair.backup_actions(), [end(2)], "its disks are complete");
    pair.backup.handle(pair.now, Event::EndRecorded(true));
    assert_eq!(pair.backup_actions(), [Action::Halt(Outcome::Ended(reason))]);
}

#[test]
fn rule_8_a_backup_that_leaves_says_so() {
    let mut pair = Pair::protected();
    pair.backup.handle(0, Event::HandOver);
    assert_eq!(pair.backup_actions(), [Action::Halt(Outcome::Stopped)]);
    pair.exchange();
    assert_eq!(pair.primary_actions().last(), Some(&take(1)));
}
