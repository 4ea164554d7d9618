//! Who may do what to a VM's record, for random commands of random askers, beside a model of a few lines.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use store_rule::names::{Generation, Incarnation, KeyId, PartyName, VmName};
use store_rule::record::{
    Asker, Command, CommandReply, HostId, Member, Members, Refusal, VmPhase, VmRecord, decide,
};
use store_rule::state::StoreState;

fn party(name: &str) -> PartyName {
    name.parse().unwrap()
}

fn host(name: &str) -> Asker {
    Asker { host: Some(party(name)), operator: None }
}

fn operator() -> Asker {
    Asker { host: None, operator: Some(party("admin")) }
}

fn who(n: u128) -> Incarnation {
    Incarnation::try_from(n).unwrap()
}

fn on(n: u128, host: &str) -> Member {
    Member { host: Some(HostId::Name(party(host))), ..Member::new(who(n)) }
}

fn open(generation: u64, primary: Member, backup: Option<Member>) -> Command {
    Command::Open { generation: Generation(generation), members: Members { primary, backup } }
}

fn take(generation: u64, n: u128) -> Command {
    Command::Take { generation: Generation(generation), who: who(n) }
}

fn end(generation: u64, n: u128) -> Command {
    Command::End { generation: Generation(generation), who: who(n) }
}

fn forget(generation: u64) -> Command {
    Command::Forget { generation: Generation(generation) }
}

/// A record, and what each command to it gets.
#[derive(Default)]
struct OneVm(Option<VmRecord>);

impl OneVm {
    /// The pair 1 on host a, 2 on host b.
    fn pair() -> OneVm {
        let mut vm = OneVm::default();
        assert_eq!(vm.ask(&open(1, on(1, "a"), Some(on(2, "b"))), &host("a")), CommandReply::Done);
        vm
    }

    fn ask(&mut self, command: &Command, asker: &Asker) -> CommandReply {
        let (changed, reply) = decide(self.0.as_ref(), command, Some(asker));
        self.0 = changed.or(self.0.take());
        reply
    }

    fn refusal(&mut self, command: &Command, asker: &Asker) -> Refusal {
        let before = self.0.clone();
        let CommandReply::Refused(refusal) = self.ask(command, asker) else {
            panic!("{command:?} of {asker} is not refused")
        };
        assert_eq!(self.0, before);
        refusal
    }
}

fn other_host(name: &str) -> Refusal {
    Refusal::OtherHost(Some(HostId::Name(party(name))))
}

#[test]
fn only_the_hosts_of_the_members_take() {
    let mut vm = OneVm::pair();
    // A stranger does not even learn whether somebody holds it.
    assert_eq!(vm.refusal(&take(1, 1), &host("c")), other_host("a"));
    assert_eq!(vm.refusal(&take(1, 1), &host("b")), other_host("a"));
    assert_eq!(vm.refusal(&take(1, 1), &operator()), Refusal::NotAHost);
    assert_eq!(vm.refusal(&take(1, 1), &Asker::default()), Refusal::NotAHost);
    assert_eq!(vm.ask(&take(1, 2), &host("b")), CommandReply::Won);
    assert_eq!(vm.refusal(&take(1, 2), &host("c")), other_host("b"));
    assert_eq!(vm.refusal(&take(1, 1), &host("c")), other_host("a"));
    assert_eq!(vm.ask(&take(1, 2), &host("b")), CommandReply::Won);
    assert_eq!(vm.ask(&take(1, 1), &host("a")), CommandReply::Lost(who(2)));
}

#[test]
fn a_member_without_a_host_is_on_the_host_that_asks() {
    let mut vm = OneVm::default();
    assert_eq!(
        vm.ask(&open(1, Member::new(who(1)), Some(Member::new(who(2)))), &host("a")),
        CommandReply::Done
    );
    let record = vm.0.clone().unwrap();
    assert_eq!(record.hosts, [party("a")].into());
    assert_eq!(record.owner, Some(party("a")));
    assert_eq!(
        vm.ask(&open(1, on(1, "a"), Some(on(2, "a"))), &host("a")),
        CommandReply::Done,
        "the same members"
    );
    assert_eq!(vm.refusal(&take(1, 2), &host("b")), other_host("a"));
    assert_eq!(vm.ask(&take(1, 2), &host("a")), CommandReply::Won);
}

#[test]
fn a_pair_is_opened_from_its_primarys_host() {
    let mut vm = OneVm::default();
    let pair = open(1, on(1, "a"), Some(on(2, "b")));
    assert_eq!(vm.refusal(&pair, &host("b")), other_host("a"));
    assert_eq!(vm.refusal(&pair, &operator()), Refusal::NotAHost);
    // Keys are replaced by names before the rule sees a command: a key that is left is nobody's.
    let unnamed = Member { host: Some(HostId::Key(KeyId([7; 32]))), ..Member::new(who(1)) };
    let unnamed_backup = open(1, on(1, "a"), Some(Member { incarnation: who(2), ..unnamed.clone() }));
    assert_eq!(vm.refusal(&unnamed_backup, &host("a")), Refusal::UnknownKey(KeyId([7; 32])));
    assert_eq!(vm.refusal(&open(1, unnamed, None), &host("a")), Refusal::UnknownKey(KeyId([7; 32])));
    assert_eq!(vm.ask(&pair, &host("a")), CommandReply::Done);
    assert_eq!(vm.ask(&take(1, 2), &host("b")), CommandReply::Won);
    // The next generation is the holder's, on its own host: another host cannot open it with the holder's incarnation.
    assert_eq!(vm.refusal(&open(2, on(2, "c"), None), &host("c")), other_host("b"));
    assert_eq!(vm.refusal(&open(2, on(2, "b"), None), &host("c")), other_host("b"));
    assert_eq!(vm.ask(&open(2, on(1, "a"), None), &host("a")), CommandReply::Stale);
    assert_eq!(vm.ask(&open(2, on(2, "b"), Some(on(3, "c"))), &host("b")), CommandReply::Done);
    assert_eq!(vm.0.unwrap().hosts, [party("b"), party("c")].into());
}

#[test]
fn an_ended_vm_stays_with_its_hosts_until_an_operator_forgets_it() {
    let mut vm = OneVm::pair();
    assert_eq!(vm.refusal(&end(1, 1), &host("b")), other_host("a"));
    assert_eq!(vm.refusal(&end(1, 1), &operator()), Refusal::NotAHost);
    assert_eq!(vm.ask(&end(1, 9), &host("a")), CommandReply::Stale);
    assert_eq!(vm.ask(&end(1, 1), &host("a")), CommandReply::Done);
    // Both sides record the end.
    assert_eq!(vm.ask(&end(1, 2), &host("b")), CommandReply::Done);
    let bound = Refusal::Bound([party("a"), party("b")].into());
    assert_eq!(vm.refusal(&end(1, 1), &host("c")), bound);
    assert_eq!(vm.ask(&take(1, 1), &host("a")), CommandReply::Stale);
    assert_eq!(vm.refusal(&open(2, on(5, "c"), None), &host("c")), bound);
    assert!(bound.to_string().contains("hosts a and b"), "{bound}");
    assert_eq!(vm.refusal(&forget(1), &host("a")), Refusal::NotAnOperator);
    assert_eq!(vm.ask(&forget(1), &operator()), CommandReply::Done);
    assert_eq!(vm.ask(&forget(1), &operator()), CommandReply::Done);
    assert_eq!(vm.ask(&open(2, on(5, "c"), None), &host("c")), CommandReply::Done);
    assert_eq!(vm.0.unwrap().owner, Some(party("a")), "the name still counts as the first host's");
}

#[test]
fn the_loser_of_a_verdict_cannot_end_the_winners_run() {
    let mut vm = OneVm::pair();
    assert_eq!(vm.ask(&take(1, 2), &host("b")), CommandReply::Won);
    assert_eq!(vm.ask(&end(1, 1), &host("a")), CommandReply::Stale);
    assert_eq!(vm.ask(&end(1, 2), &host("b")), CommandReply::Done);
}

#[test]
fn names_are_counted_by_the_host_that_opened_them_first() {
    let mut state = StoreState::default();
    let name = |i: u32| format!("vm-{i}").parse::<VmName>().unwrap();
    for i in 0..5 {
        let asker = host(if i < 3 { "a" } else { "b" });
        state.apply(&name(i), &open(1, Member::new(who(1)), None), Some(&asker));
        state.apply(&name(i), &open(1, Member::new(who(1)), None), Some(&asker));
    }
    state.apply(&name(0), &forget(1), Some(&operator()));
    state.apply(&name(0), &open(2, Member::new(who(2)), None), Some(&host("b")));
    let more = state.apply_within(3, &name(9), &open(1, Member::new(who(1)), None), Some(&host("a")));
    assert_eq!(more, CommandReply::Refused(Refusal::TooManyNames { host: party("a"), most: 3 }));
    let old = state.apply_within(3, &name(1), &open(1, Member::new(who(1)), None), Some(&host("a")));
    assert_eq!(old, CommandReply::Done);
    let counts = |state: &StoreState| ["a", "b", "c"].map(|host| state.names_of(&party(host)));
    assert_eq!(counts(&state), [3, 2, 0]);
    let stored: StoreState = postcard::from_bytes(&postcard::to_stdvec(&state).unwrap()).unwrap();
    assert_eq!(counts(&stored), [3, 2, 0]);
    assert_eq!(stored, state);
}

const HOSTS: [&str; 3] = ["a", "b", "c"];

fn askers() -> impl Strategy<Value = Asker> {
    let role = |names: &'static [&str]| prop::option::of(prop::sample::select(names).prop_map(party));
    (role(&HOSTS), role(&["admin"])).prop_map(|(host, operator)| Asker { host, operator })
}

fn members() -> impl Strategy<Value = Member> {
    let host = prop_oneof![
        Just(None),
        prop::sample::select(&HOSTS[..]).prop_map(|name| Some(HostId::Name(party(name)))),
        Just(Some(HostId::Key(KeyId([1; 32])))),
    ];
    (1..5u128, host).prop_map(|(n, host)| Member { host, ..Member::new(who(n)) })
}

fn commands() -> impl Strategy<Value = Command> {
    let generation = (1..5u64).prop_map(Generation);
    let who = (1..5u128).prop_map(who);
    prop_oneof![
        4 => (generation.clone(), members(), prop::option::of(members())).prop_map(|(generation, primary, backup)| {
            Command::Open { generation, members: Members { primary, backup } }
        }),
        4 => (generation.clone(), who.clone()).prop_map(|(generation, who)| Command::Take { generation, who }),
        2 => (generation.clone(), who).prop_map(|(generation, who)| Command::End { generation, who }),
        1 => generation.prop_map(|generation| Command::Forget { generation }),
    ]
}

/// The host of a member in a record.
fn host_of(record: &VmRecord, who: Incarnation) -> Option<PartyName> {
    let VmPhase::Open { members, .. } = &record.phase else { return None };
    match &members.find(who)?.host {
        Some(HostId::Name(name)) => Some(name.clone()),
        _ => None,
    }
}

/// What must hold of every step, whatever came before it.
fn check_step(
    before: Option<&VmRecord>,
    command: &Command,
    asker: &Asker,
    after: Option<&VmRecord>,
    reply: &CommandReply,
) {
    let asks_for_member = |who| before.is_some_and(|r| asker.host.is_some() && host_of(r, who) == asker.host);
    match (command, reply) {
        (Command::Take { who, .. }, CommandReply::Won | CommandReply::Lost(_)) => {
            assert!(asks_for_member(*who))
        }
        (Command::Open { members, .. }, CommandReply::Done) => {
            let record = after.expect("a record");
            assert_eq!(host_of(record, members.primary.incarnation), asker.host);
            assert!(asker.host.is_some());
            if let Some(ended) = before.filter(|r| r.phase == VmPhase::Forgotten && !r.hosts.is_empty()) {
                assert!(ended.hosts.contains(asker.host.as_ref().expect("a host")));
            }
        }
        (Command::End { who, .. }, CommandReply::Done) => {
            let before = before.expect("a record");
            assert!(before.phase == VmPhase::Forgotten || asks_for_member(*who));
            assert!(before.holder().is_none_or(|holder| holder == *who));
        }
        (Command::Forget { .. }, CommandReply::Done) => {
            assert!(asker.operator.is_some() && after.is_some_and(|r| r.hosts.is_empty()));
        }
        (_, CommandReply::Stale | CommandReply::Refused(_)) => assert_eq!(before, after),
        (command, reply) => panic!("{reply:?} to {command:?}"),
    }
    if let (Some(before), Some(after)) = (before, after) {
        assert!(before.generation <= after.generation && after.generation.0 <= before.generation.0 + 1);
        assert_eq!(before.owner, after.owner);
        let same = before.generation == after.generation;
        assert!(
            !same
                || before.holder().is_none()
                || after.phase == VmPhase::Forgotten
                || before.holder() == after.holder()
        );
        assert!(!same || before.phase != VmPhase::Forgotten || after.phase == VmPhase::Forgotten);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn whoever_asks_gets_only_what_its_role_allows(
        steps in prop::collection::vec((commands(), askers()), 1..60)
    ) {
        let mut record: Option<VmRecord> = None;
        let mut winners: BTreeMap<Generation, BTreeSet<Incarnation>> = BTreeMap::new();
        for (command, asker) in &steps {
            let (changed, reply) = decide(record.as_ref(), command, Some(asker));
            let after = changed.clone().or_else(|| record.clone());
            check_step(record.as_ref(), command, asker, after.as_ref(), &reply);
            // A repetition changes nothing and gets the same reply.
            prop_assert_eq!(decide(after.as_ref(), command, Some(asker)), (None, reply.clone()));
            if let (Command::Take { generation, who }, CommandReply::Won) = (command, &reply) {
                winners.entry(*generation).or_default().insert(*who);
            }
            record = after;
        }
        prop_assert!(winners.values().all(|winners| winners.len() == 1), "{:?}", winners);
    }
}
