//! Rule 12: a pair is called protected only while the loss of either side would be survived, and its outputs leave.
#![allow(clippy::disallowed_methods)]

mod pair;

use agent::{
    Action, Agent, Buffers, Config, Event, Exposure, GuestPace, LagLimitAction, PeerRefusal, Phase,
    Protection, Risk, Role, StoreView, Suspicion,
};
use pair::{BACKUP_KEY, MS, Pair, TIMING, config, take, take_bytes};

fn protection(agent: &Agent, now: u64) -> Protection {
    agent.status(now).protection
}

/// A pair whose messages need a while, each way.
struct SlowLink {
    primary: Agent,
    backup: Agent,
    now: u64,
    one_way: u64,
    /// Bytes under way to the primary and to the backup, with the time of their arrival.
    under_way: [Vec<(u64, Vec<u8>)>; 2],
    /// All actions of the primary but looks.
    told: Vec<Action>,
}

impl SlowLink {
    fn new(one_way: u64) -> SlowLink {
        let [mut primary, mut backup] =
            [config(Role::Primary, 1), config(Role::Backup, 2)].map(|config| Agent::new(config, 0));
        primary.handle(0, Event::Connected { peer_key: Some(BACKUP_KEY) });
        backup.handle(0, Event::Connected { peer_key: None });
        backup.handle(0, Event::Ready);
        SlowLink { primary, backup, now: 0, one_way, under_way: [vec![], vec![]], told: vec![] }
    }

    fn pass_time(&mut self, ns: u64) {
        let end = self.now + ns;
        while self.now < end {
            self.now += 10 * MS;
            for (to, from) in [(0, 1), (1, 0)] {
                let agents = [&mut self.primary, &mut self.backup];
                let due = self.under_way[to].iter().take_while(|(at, _)| *at <= self.now).count();
                for (_, bytes) in self.under_way[to].drain(..due) {
                    agents[to].handle(self.now, Event::Received(&bytes));
                }
                agents[to].guest_loop_turned(self.now, Default::default());
                agents[to].handle(self.now, Event::Tick);
                let bytes = take_bytes(agents[to]);
                if !bytes.is_empty() {
                    self.under_way[from].push((self.now + self.one_way, bytes));
                }
            }
            while let Some(action) = self.primary.next_action() {
                if let Action::Open { .. } = action {
                    let done = Event::Opened(Some(store_rule::record::Applied::Done));
                    self.primary.handle(self.now, done);
                }
                self.told.push(action);
            }
        }
    }
}

#[test]
fn a_link_over_which_no_output_could_leave_is_refused_before_the_guest_runs() {
    let mut link = SlowLink::new(270 * MS);
    link.pass_time(3000 * MS);
    let refused = |action: &Action| matches!(action, Action::Refused(PeerRefusal::RoundTrip { .. }));
    let Some(Action::Refused(refusal)) = link.told.iter().find(|a| refused(a)) else {
        panic!("{:?}", link.told)
    };
    let words = refusal.to_string();
    assert!(words.starts_with("its confirmations are 5") && words.contains("older than 500 ms"), "{words}");
    assert!(words.contains("give both sides --timeout-ms 1"), "{words}");
    assert_eq!(link.primary.status(link.now).phase, Phase::Starting);
    // One that is fast enough is not.
    let mut link = SlowLink::new(200 * MS);
    link.pass_time(3000 * MS);
    assert_eq!(link.primary.status(link.now).phase, Phase::Protected, "{:?}", link.told);
    assert_eq!(protection(&link.primary, link.now), Protection::Protected);
    let measured = link.primary.status(link.now).round_trip_ns.unwrap();
    assert!((400 * MS..=460 * MS).contains(&measured), "{measured}");
}

#[test]
fn a_pair_whose_outputs_cannot_leave_is_at_risk_on_both_sides_and_says_why() {
    let mut link = SlowLink::new(50 * MS);
    link.pass_time(2000 * MS);
    assert_eq!(protection(&link.primary, link.now), Protection::Protected);
    link.told.clear();
    link.one_way = 300 * MS;
    link.pass_time(3000 * MS);
    let Protection::AtRisk(Risk::RoundTrip { round_trip_ns, limit_ns }) = protection(&link.primary, link.now)
    else {
        panic!("{:?}", link.primary.status(link.now))
    };
    assert!((600 * MS..=660 * MS).contains(&round_trip_ns) && limit_ns == 500 * MS, "{round_trip_ns}");
    assert_eq!(protection(&link.backup, link.now), Protection::AtRisk(Risk::PeerHoldsOutputs));
    let [Action::ProtectionChanged(Protection::AtRisk(risk))] = &link.told[..] else {
        panic!("{:?}", link.told)
    };
    assert!(risk.to_string().contains("ms old when they come, and may be 500 ms"), "{risk}");
    link.one_way = 50 * MS;
    link.pass_time(3000 * MS);
    assert_eq!(protection(&link.primary, link.now), Protection::Protected);
    assert_eq!(protection(&link.backup, link.now), Protection::Protected);
    assert_eq!(link.told.len(), 2, "told once each: {:?}", link.told);
}

#[test]
fn a_process_that_was_stopped_itself_does_not_take_that_for_a_risk() {
    let mut pair = Pair::protected();
    pair.pass_time(1000 * MS);
    pair.now += 20_000 * MS;
    pair.primary.handle(pair.now, Event::Tick);
    assert_eq!(protection(&pair.primary, pair.now), Protection::Protected);
}

/// A protected pair whose backup does not replay.
fn starved(at_lag_limit: LagLimitAction) -> Pair {
    let buffers =
        Buffers { lag_ns_max: 500 * MS, lag_ns_limit: 1500 * MS, at_lag_limit, ..Buffers::default() };
    let with = |role, id| Config { buffers, ..config(role, id) };
    Pair::protected_with(with(Role::Primary, 1), with(Role::Backup, 2))
}

#[test]
fn the_guest_stops_when_the_backups_lag_has_reached_its_limit_and_goes_on_when_it_has_caught_up() {
    let mut pair = starved(LagLimitAction::StopGuest);
    pair.emit_output();
    pair.pass_time(500 * MS);
    assert_eq!(protection(&pair.primary, pair.now), Protection::Protected);
    pair.pass_time(100 * MS);
    let told = pair.primary_actions();
    let risk = Protection::AtRisk(Risk::Behind { lag_ns: 510 * MS, max_ns: 500 * MS });
    assert!(told.contains(&Action::ProtectionChanged(risk)), "from the first excess: {told:?}");
    let Protection::AtRisk(Risk::PeerSaysBehind(lag)) = protection(&pair.backup, pair.now) else {
        panic!("{:?}", pair.backup.status(pair.now))
    };
    assert!((500 * MS..=600 * MS).contains(&lag) && pair.backup.status(pair.now).lag_ns == lag, "{lag}");
    pair.pass_time(890 * MS);
    assert_eq!(pair.primary.pace(pair.now), GuestPace::Share(50));
    pair.pass_time(10 * MS);
    assert_eq!(pair.primary.pace(pair.now), GuestPace::Stop);
    pair.replay();
    pair.pass_time(100 * MS);
    assert_eq!(pair.primary.pace(pair.now), GuestPace::Free);
    for agent in [&pair.primary, &pair.backup] {
        assert_eq!(protection(agent, pair.now), Protection::Protected);
    }
}

#[test]
fn a_backup_that_is_to_be_given_up_at_the_limit_counts_as_lost_there() {
    let mut pair = starved(LagLimitAction::GiveUpBackup);
    pair.emit_output();
    pair.pass_time(1490 * MS);
    assert_eq!(pair.primary.status(pair.now).phase, Phase::Protected);
    pair.primary_actions();
    pair.pass_time(10 * MS);
    let suspected = Action::Suspected(Suspicion::Behind(1500));
    assert_eq!(pair.primary_actions()[1..], [suspected, Action::Close, take(1)], "the store decides");
    // A primary that was stopped itself has not read yet what its backup sent meanwhile.
    let mut pair = starved(LagLimitAction::GiveUpBackup);
    pair.emit_output();
    pair.now += 10_000 * MS;
    pair.primary.handle(pair.now, Event::Tick);
    assert_eq!(pair.primary.status(pair.now).phase, Phase::Protected);
}

#[test]
fn each_side_knows_what_the_store_is_to_the_other() {
    let mut pair = Pair::protected();
    let silence = 4 * TIMING.store_watch_ns;
    let end = pair.now + silence;
    while pair.now < end {
        pair.pass_time(10 * MS);
        for action in pair.backup_actions() {
            if let Action::Look { .. } = action {
                pair.backup.handle(pair.now, Event::Looked(None));
            }
        }
        for action in pair.primary_actions() {
            if let Action::Look { .. } = action {
                pair.primary.handle(pair.now, Event::Looked(Some(StoreView::Ours)));
            }
        }
    }
    let Protection::AtRisk(Risk::StoreSilent(_)) = protection(&pair.backup, pair.now) else {
        panic!("{:?}", pair.backup.status(pair.now))
    };
    assert_eq!(protection(&pair.primary, pair.now), Protection::AtRisk(Risk::StoreSilentToPeer));
    let ages = [&pair.primary, &pair.backup].map(|side| side.status(pair.now).store_answered_ago_ns.unwrap());
    assert!(ages[0] <= TIMING.store_watch_ns && ages[1] >= silence - TIMING.store_watch_ns, "{ages:?}");
    pair.backup.handle(pair.now, Event::Looked(Some(StoreView::Unknown)));
    pair.pass_time(100 * MS);
    for agent in [&pair.primary, &pair.backup] {
        assert_eq!(protection(agent, pair.now), Protection::Unprotected(Exposure::StoreUnknown));
    }
    pair.backup.handle(pair.now, Event::Looked(Some(StoreView::Ours)));
    pair.pass_time(100 * MS);
    for agent in [&pair.primary, &pair.backup] {
        assert_eq!(protection(agent, pair.now), Protection::Protected);
    }
}
