//! The bytes of each version that was released, in `tests/golden`: a line has a name, and bytes in hexadecimal. The files are
//! never regenerated (CONTRIBUTING.md, "Versions and golden files").

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{Debug, Write};
use std::path::Path;

use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, VoteRequest, VoteResponse};
use openraft::{BasicNode, CommittedLeaderId, EntryPayload, LogId, Membership, StoredMembership, Vote};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::backup::StoreBackup;
use crate::cas;
use crate::names::{CopyId, Generation, Incarnation, KeyId, VmName};
use crate::record::{Asker, Command, CommandReply, HostId, Member, Members, Refusal, VmPhase, VmRecord};
use crate::server::audit::AuditNote;
use crate::server::journal::DiskChange;
use crate::server::raft::types::{self, LoggedRequest, RaftEntry, RaftSnapshotMeta, Types, VmCommand};
use crate::state::StoreState;
use crate::wire::{
    self, ConnectionRefusal, DataMark, MemberHello, MemberStatus, NodeStatus, PeerAnswer, PeerAsk,
    PeerRequest, PeerResponse, RequestFailure, StoreHello, StoreRequest, StoreResponse, Welcome,
};

/// What is encoded, as lines of a golden file.
#[derive(Default)]
struct GoldenLines(String);

impl GoldenLines {
    fn add(&mut self, name: impl Debug, bytes: &[u8]) {
        let name: String = format!("{name:?}").chars().filter(|c| !c.is_whitespace()).take(60).collect();
        write!(self.0, "{name} ").unwrap();
        bytes.iter().for_each(|byte| write!(self.0, "{byte:02x}").unwrap());
        self.0.push('\n');
    }

    /// Adds the body of a frame, which must decode to the same value.
    fn body<T: Serialize + DeserializeOwned + Debug>(&mut self, value: &T) {
        let frame = wire::frame(2, 0x0102, value).unwrap();
        let again: T = wire::decode(2, &frame[12..]).unwrap();
        assert_eq!(format!("{again:?}"), format!("{value:?}"));
        self.add(value, &frame);
    }

    fn greeting<T: Serialize + DeserializeOwned + Debug>(&mut self, value: &T) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let mut bytes = vec![];
        runtime.block_on(wire::write_greeting(&mut bytes, value)).unwrap();
        let (_, again) = runtime.block_on(wire::read_greeting::<T>(&mut &bytes[..])).unwrap();
        assert_eq!(format!("{again:?}"), format!("{value:?}"));
        // A build for tests of upgrades knows a version more.
        bytes[4] = 2;
        self.add(value, &bytes);
    }

    /// Adds what members store and send each other, which must decode to the same value.
    fn logged<T: Serialize + DeserializeOwned + Debug>(&mut self, name: &str, value: &T) {
        let bytes = types::encode(value).unwrap();
        let again: T = types::decode("value", &bytes).unwrap();
        assert_eq!(format!("{again:?}"), format!("{value:?}"));
        self.add(name, &bytes);
    }

    /// Compares all lines with the golden file. If they differ, writes them to a file beside the test's program.
    fn compare(&self, file: &str) {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(file);
        // Names are for the reader.
        let bytes = |lines: &str| -> Vec<String> {
            lines.lines().filter_map(|line| Some(line.rsplit_once(' ')?.1.to_owned())).collect()
        };
        if std::fs::read_to_string(&golden).is_ok_and(|golden| bytes(&golden) == bytes(&self.0)) {
            return;
        }
        let ours = std::env::current_exe().unwrap().with_file_name(file);
        std::fs::write(&ours, &self.0).unwrap();
        panic!("{} differs from {}, which this build encodes", golden.display(), ours.display());
    }
}

fn vm() -> VmName {
    "web".parse().unwrap()
}

fn incarnation(number: u128) -> Incarnation {
    number.try_into().unwrap()
}

fn copy(number: u128) -> CopyId {
    number.try_into().unwrap()
}

fn mark(change: u64) -> DataMark {
    DataMark { data: copy(0x0a0b), run: 0x0c0d.try_into().unwrap(), change }
}

fn key(byte: u8) -> KeyId {
    KeyId([byte; 32])
}

fn members() -> Members {
    let host = |name: &str| Some(HostId::Name(name.parse().unwrap()));
    let disks = BTreeMap::from([("root".parse().unwrap(), copy(0x0102))]);
    let primary = Member { incarnation: incarnation(7), host: host("host-a"), disks };
    let backup = Member { host: Some(HostId::Key(key(0xab))), ..Member::new(incarnation(8)) };
    Members { primary, backup: Some(backup) }
}

fn records() -> [VmRecord; 2] {
    let phase = VmPhase::Open { members: members(), holder: Some(incarnation(7)) };
    let disks = BTreeMap::from([("root".parse().unwrap(), BTreeSet::from([copy(0x0102)]))]);
    let hosts = BTreeSet::from(["host-a", "host-b"].map(|name| name.parse().unwrap()));
    let owner = Some("host-a".parse().unwrap());
    let open = VmRecord { generation: Generation(300), phase, disks, hosts, owner, restored: false };
    let forgotten = VmRecord {
        generation: Generation::FIRST,
        phase: VmPhase::Forgotten,
        disks: BTreeMap::new(),
        hosts: BTreeSet::new(),
        owner: None,
        restored: true,
    };
    [open, forgotten]
}

fn commands() -> [Command; 4] {
    let (generation, who) = (Generation(300), incarnation(7));
    [
        Command::Take { generation, who },
        Command::Open { generation, members: members() },
        Command::End { generation, who },
        Command::Forget { generation },
    ]
}

fn replies() -> Vec<CommandReply> {
    let refusals = [
        Refusal::OneIncarnationTwice,
        Refusal::TooManyDisks,
        Refusal::NotAHost,
        Refusal::NotAnOperator,
        Refusal::UnknownKey(key(0xcd)),
        Refusal::TooManyNames { host: "host-a".parse().unwrap(), most: 100 },
        Refusal::OtherHost(Some(HostId::Name("host-a".parse().unwrap()))),
        Refusal::Bound(BTreeSet::from(["host-a".parse().unwrap()])),
        Refusal::Restored,
    ];
    let plain =
        [CommandReply::Won, CommandReply::Lost(incarnation(8)), CommandReply::Done, CommandReply::Stale];
    plain.into_iter().chain(refusals.map(CommandReply::Refused)).collect()
}

fn log_id(index: u64) -> LogId<u64> {
    LogId::new(CommittedLeaderId::new(3, 1), index)
}

fn membership() -> Membership<u64, BasicNode> {
    let nodes: BTreeMap<_, _> = (1..=4).map(|id| (id, BasicNode::new(format!("10.0.0.{id}:7400")))).collect();
    Membership::new(vec![BTreeSet::from([1, 2, 3])], nodes)
}

fn entries() -> Vec<RaftEntry> {
    let asker = Some(Asker { host: Some("host-a".parse().unwrap()), operator: None });
    let logged = commands().map(|command| {
        let command = VmCommand { vm: vm(), command, asker: asker.clone(), names_max: 1000 };
        EntryPayload::Normal(LoggedRequest::Command(command))
    });
    let asker = Asker { host: None, operator: Some("admin".parse().unwrap()) };
    let note = AuditNote { asker, what: "add member 4".into(), verdict: "done".into() };
    let note = EntryPayload::Normal(LoggedRequest::Note(note));
    let others = [note, EntryPayload::Blank, EntryPayload::Membership(membership())];
    let payloads = logged.into_iter().chain(others).enumerate();
    payloads.map(|(n, payload)| RaftEntry { log_id: log_id(n as u64 + 1), payload }).collect()
}

#[test]
fn the_bytes_between_clients_and_members() {
    let mut lines = GoldenLines::default();
    let cluster: crate::names::ClusterName = "vmft".parse().unwrap();
    let member = MemberHello { id: 1, mark: mark(5), remembers: Some(mark(4)), to: 2 };
    for member in [None, Some(member)] {
        lines.greeting(&StoreHello { cluster: cluster.clone(), member });
    }
    for refused in [None, Some(ConnectionRefusal::Busy)] {
        let (cluster, mark, remembers) = (cluster.clone(), mark(6), refused.is_none().then_some(mark(5)));
        lines.greeting(&Welcome { cluster, id: 2, mark, remembers, refused });
    }
    for command in commands() {
        lines.body(&StoreRequest::Command(vm(), command));
    }
    let address = || "10.0.0.4:7400".to_owned();
    for request in [
        StoreRequest::Get(vm()),
        StoreRequest::List(None),
        StoreRequest::List(Some(vm())),
        StoreRequest::Ping,
        StoreRequest::Status,
        StoreRequest::AddMember(4, address()),
        StoreRequest::RemoveMember(4),
        StoreRequest::Export(None),
        StoreRequest::Export(Some(vm())),
    ] {
        lines.body(&request);
    }
    for reply in replies() {
        lines.body(&StoreResponse::Reply(reply));
    }
    let [open, forgotten] = records();
    for response in [
        StoreResponse::Record(None),
        StoreResponse::Record(Some(open.clone())),
        StoreResponse::Page(vec![(vm(), open), ("x".parse().unwrap(), forgotten)]),
        StoreResponse::Leader(Some(address())),
        StoreResponse::Status(Box::new(status(cluster))),
        StoreResponse::MembersChanged,
    ] {
        lines.body(&response);
    }
    for failure in failures() {
        lines.body(&StoreResponse::Failed(failure));
    }
    lines.compare("wire-2-clients.txt");
}

fn failures() -> Vec<RequestFailure> {
    vec![
        RequestFailure::NotLeader(Some("10.0.0.4:7400".into())),
        RequestFailure::NoQuorum,
        RequestFailure::DiskFull,
        RequestFailure::Stopped,
        RequestFailure::Members("why".into()),
        RequestFailure::NotAllowed("why".into()),
    ]
}

fn status(cluster: crate::names::ClusterName) -> NodeStatus {
    let address = "10.0.0.1:7400".into();
    let member = MemberStatus { address, votes: true, matched_index: Some(299), remembered_change: Some(9) };
    NodeStatus {
        id: 1,
        cluster,
        role: "leader".into(),
        term: 3,
        leader: Some(1),
        members: BTreeMap::from([(1, member)]),
        last_log_index: Some(300),
        applied_index: Some(300),
        snapshot_index: Some(200),
        purged_index: None,
        vms: 2,
        commands: 1000,
        command_us: (500, 900),
        data_format: 3,
        change: 400,
        disk_free_bytes: 1 << 30,
        data_bytes: 1 << 20,
        disk_full: false,
    }
}

#[test]
fn the_bytes_between_members() {
    let mut lines = GoldenLines::default();
    for request in [
        PeerRequest::Append(vec![1, 2, 3]),
        PeerRequest::Vote(vec![4, 5, 6]),
        PeerRequest::Snapshot { offset: 0, bytes: vec![7, 8], finish: None },
        PeerRequest::Snapshot { offset: 2, bytes: vec![9], finish: Some(vec![10]) },
    ] {
        let remembers = BTreeMap::from([(2, mark(6)), (3, mark(7))]);
        lines.body(&PeerAsk { mark: mark(5), remembers, request });
    }
    for response in [PeerResponse::Done(vec![1]), PeerResponse::Failed(RequestFailure::Stopped)] {
        lines.body(&PeerAnswer { mark: mark(8), response });
    }
    lines.compare("wire-2-members.txt");
}

#[test]
fn the_bytes_that_members_log_and_replicate() {
    let mut lines = GoldenLines::default();
    for entry in entries() {
        lines.logged(&format!("entry {}", entry.log_id.index), &entry);
    }
    let vote = Vote::<u64>::new_committed(3, 1);
    lines.logged("vote", &vote);
    lines.logged("purged", &log_id(200));
    let meta = RaftSnapshotMeta {
        last_log_id: Some(log_id(200)),
        last_membership: StoredMembership::new(Some(log_id(6)), membership()),
        snapshot_id: "200-00c0ffee".into(),
    };
    lines.logged("snapshot's metadata", &meta);
    lines.logged("snapshot's end", &(vote, meta));
    let mut state = StoreState::default();
    let asker = Asker { host: Some("host-a".parse().unwrap()), operator: None };
    for (name, backup) in [("web", members().backup), ("alone", None)] {
        let members = Members { backup: backup.map(|b| Member { host: None, ..b }), ..members() };
        let open = Command::Open { generation: Generation::FIRST, members };
        assert_eq!(state.apply(&name.parse().unwrap(), &open, Some(&asker)), CommandReply::Done);
    }
    lines.logged("snapshot", &state);
    let (prev_log_id, leader_commit) = (Some(log_id(0)), Some(log_id(5)));
    let append = AppendEntriesRequest::<Types> { vote, prev_log_id, entries: entries(), leader_commit };
    lines.logged("append", &append);
    for (name, answer) in [
        ("appended", AppendEntriesResponse::Success),
        ("appended in part", AppendEntriesResponse::PartialSuccess(Some(log_id(4)))),
        ("not appended", AppendEntriesResponse::Conflict),
        ("higher vote", AppendEntriesResponse::HigherVote(vote)),
    ] {
        lines.logged(name, &answer);
    }
    lines.logged("vote request", &VoteRequest::new(Vote::new(4, 2), Some(log_id(300))));
    lines.logged("vote response", &VoteResponse::<u64>::new(vote, Some(log_id(300)), true));
    lines.compare("logged-1.txt");
}

#[test]
fn the_changes_in_a_members_journal() {
    let mut lines = GoldenLines::default();
    for change in [
        DiskChange::Nothing,
        DiskChange::Identify { owner: "member 1 of cluster vmft".into(), data: 7 },
        DiskChange::Append(vec![(1, vec![2, 3]), (2, vec![4])]),
        DiskChange::Truncate(300),
        DiskChange::Purge { upto: 200, purged: vec![5] },
        DiskChange::Put { name: "vote".into(), value: vec![6] },
        DiskChange::Known { id: 2, mark: Some(mark(6)) },
        DiskChange::Known { id: 2, mark: None },
    ] {
        let bytes = postcard::to_stdvec(&change).unwrap();
        let again: DiskChange = postcard::from_bytes(&bytes).unwrap();
        assert_eq!(format!("{again:?}"), format!("{change:?}"));
        lines.add(change, &bytes);
    }
    lines.compare("data-3.txt");
}

#[test]
fn the_backup_of_a_store() {
    let mut lines = GoldenLines::default();
    let records = ["web", "x"].map(|vm| vm.parse().unwrap()).into_iter().zip(records()).collect();
    let backup = StoreBackup { cluster: "vmft".parse().unwrap(), begun_s: 1_796_000_000, records };
    let bytes = backup.to_bytes().unwrap();
    assert_eq!(StoreBackup::from_bytes(&bytes), Ok(backup));
    lines.add("backup", &bytes);
    lines.compare("backup-1.txt");
}

#[test]
fn the_records_in_etcd_and_zookeeper() {
    let mut lines = GoldenLines::default();
    for record in records() {
        let bytes = cas::encode(&record).unwrap();
        assert_eq!(cas::decode(&vm(), &bytes).unwrap(), record);
        lines.add(record.phase, &bytes);
    }
    lines.compare("record-1.txt");
}
