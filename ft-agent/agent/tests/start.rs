//! The start of a pair (rule 7), one case at a time.

mod pair;

use agent::{Action, Agent, Config, Event, GuestPace, Hello, Outcome, PeerRefusal, Phase, Role};
use entry::PositionUnit;
use entry::identity::Identity;
use logging_channel::message::{Message, encode};
use logging_channel::stream::MessageReader;
use logging_channel::versions::{ChannelVersions, OURS};
use pair::{Pair, TIMING, actions, config, phase, take, take_bytes};
use store_rule::names::{Generation, Incarnation};
use store_rule::record::{Applied, Member, Verdict};

#[test]
fn rule_7_another_machine_is_refused_and_the_field_named() {
    let mut other = config(Role::Backup, 2);
    other.identity = Identity::new(PositionUnit::Instructions).field("kernel", "k2");
    let mut pair = Pair::new(config(Role::Primary, 1), other);
    pair.connect();
    let actions = pair.primary_actions();
    let [Action::Refused(refusal), Action::Close] = &actions[..] else { panic!("{actions:?}") };
    assert!(
        refusal.to_string().starts_with("its machine differs in kernel (\"k2\" there, \"k1\" here);"),
        "{refusal}"
    );
    assert_eq!(phase(&pair.primary), Phase::Starting, "another peer may come");
}

#[test]
fn a_peer_without_a_common_version_is_refused_and_told() {
    let mut primary = Agent::new(config(Role::Primary, 1), 0);
    primary.handle(0, Event::Connected { peer_key: None });
    let hello = Hello {
        versions: ChannelVersions { newest: 99, oldest: 98 },
        vm: "trial".into(),
        role: Role::Backup,
        incarnation: 2,
        disks: Default::default(),
        timeout_ns: TIMING.timeout_ns,
        buffer_bytes: 1,
        identity: config(Role::Backup, 2).identity,
    };
    let mut bytes = Vec::new();
    encode(OURS.oldest, &Message::Hello(Box::new(hello)), &mut bytes);
    primary.handle(0, Event::Received(&bytes));
    let mut reader = MessageReader::new();
    reader.push(&take_bytes(&mut primary));
    assert!(matches!(reader.next_message(), Ok(Some(Message::Hello(_)))));
    let told = reader.next_message().unwrap();
    assert!(
        matches!(&told, Some(Message::Failed { reason }) if reason.contains("versions 98 to 99")),
        "{told:?}"
    );
    let actions = actions(&mut primary);
    assert!(
        matches!(&actions[..], [Action::Refused(PeerRefusal::Protocol(_)), Action::Close]),
        "{actions:?}"
    );
}

#[test]
fn a_peer_that_refuses_in_place_of_its_hello_is_heard() {
    let mut primary = Agent::new(config(Role::Primary, 1), 0);
    primary.handle(0, Event::Connected { peer_key: None });
    let mut bytes = Vec::new();
    encode(OURS.oldest, &Message::Failed { reason: "occupied".into() }, &mut bytes);
    primary.handle(0, Event::Received(&bytes));
    assert_eq!(actions(&mut primary), [Action::Refused(PeerRefusal::Told("occupied".into())), Action::Close]);
    assert_eq!(phase(&primary), Phase::Starting, "another peer may come");
}

#[test]
fn rule_7_name_role_and_timeout_have_to_match() {
    let refused = |change: fn(&mut Config)| {
        let mut theirs = config(Role::Backup, 2);
        change(&mut theirs);
        let mut pair = Pair::new(config(Role::Primary, 1), theirs);
        pair.connect();
        match pair.primary_actions().remove(0) {
            Action::Refused(refusal) => refusal,
            action => panic!("{action:?}"),
        }
    };
    assert!(matches!(refused(|c| c.vm = "other".parse().unwrap()), PeerRefusal::Vm { .. }));
    assert_eq!(refused(|c| c.role = Role::Primary), PeerRefusal::Role(Role::Primary));
    assert!(matches!(refused(|c| c.timing.timeout_ns += 1), PeerRefusal::Timeout { .. }));
    let same = refused(|c| c.me = Member::new(Incarnation::try_from(1).unwrap()));
    assert_eq!(same, PeerRefusal::Invalid("incarnation"));
}

#[test]
fn rule_7_garbage_is_refused() {
    let mut agent = Agent::new(config(Role::Primary, 1), 0);
    agent.handle(0, Event::Connected { peer_key: None });
    agent.handle(0, Event::Received(b"GET / HTTP/1.1\r\n"));
    let actions = actions(&mut agent);
    assert!(matches!(actions[..], [Action::Refused(PeerRefusal::Protocol(_)), Action::Close]), "{actions:?}");
}

#[test]
fn rule_7_the_guest_does_not_run_in_a_generation_that_cannot_be_opened() {
    let mut pair = Pair::new(config(Role::Primary, 1), config(Role::Backup, 2));
    pair.connect();
    assert_eq!(pair.primary.pace(0), GuestPace::Stop);
    pair.primary_actions();
    pair.primary.handle(0, Event::Opened(None));
    pair.primary.handle(TIMING.retry_ns, Event::Tick);
    assert!(matches!(pair.primary_actions()[..], [Action::Open { .. }]));
    pair.primary.handle(TIMING.retry_ns, Event::Opened(Some(Applied::Stale)));
    assert_eq!(pair.primary_actions(), [Action::Halt(Outcome::NotOpened)]);
}

#[test]
fn rule_7_an_unprotected_primary_takes_and_is_alone() {
    let mut agent = Agent::new(Config { unprotected: true, ..config(Role::Primary, 1) }, 0);
    let opened = actions(&mut agent);
    assert!(matches!(&opened[..], [Action::Open { members, .. }] if members.backup.is_none()));
    agent.handle(0, Event::Opened(Some(Applied::Done)));
    assert_eq!(actions(&mut agent), [take(1)]);
    agent.handle(0, Event::Verdict(Verdict::Won));
    assert_eq!(actions(&mut agent), [Action::Start { generation: Generation::FIRST }, Action::GoLive]);
    assert_eq!((agent.pace(0), agent.release_limit(0)), (GuestPace::Free, u64::MAX));
}
