//! The only file that names openraft: our types in its traits, and a small handle that hides it again.
//!
//! The entries, votes and messages of openraft are bytes to all other files. What Raft needs on the disk is there before its
//! call returns, but for what a leader appends: see [`crate::server::log`].
#![allow(clippy::result_large_err, reason = "openraft's errors are what they are")]

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io::{self, Cursor};
use std::ops::RangeBounds;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use openraft::error::{
    CheckIsLeaderError, ClientWriteError, Fatal, RPCError, RaftError, ReplicationClosed, StreamingError,
    Unreachable,
};
use openraft::network::{Backoff, RPCOption};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, InstallSnapshotResponse,
    SnapshotResponse, VoteRequest, VoteResponse,
};
use openraft::storage::{LogFlushed, RaftLogStorage, RaftStateMachine};
use openraft::{
    BasicNode, ChangeMembers, Config, EntryPayload, LogId, LogState, OptionalSend, RaftLogReader,
    RaftNetwork, RaftNetworkFactory, RaftSnapshotBuilder, ServerState, Snapshot, SnapshotMeta,
    SnapshotPolicy, StorageError, StorageIOError, StoredMembership, Vote,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::link::LinkError;
use crate::names::VmName;
use crate::record::{Command, Reply, State};
use crate::server::disk::{Disk, DiskError};
use crate::server::log::Log;
use crate::server::peers::{Peer, Peers};
use crate::wire::{self, CHUNK_BYTES, Failure, MemberStatus, NodeId, PeerAnswer, PeerAsk};

/// One command in the log.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Write {
    vm: VmName,
    command: Command,
}

openraft::declare_raft_types!(
    /// Our types in openraft's.
    Types: D = Write, R = Reply, Node = BasicNode
);

type Entry = openraft::Entry<Types>;
type Membership = StoredMembership<NodeId, BasicNode>;
type Meta = SnapshotMeta<NodeId, BasicNode>;
type Failed = StorageError<NodeId>;
type CallError = RPCError<NodeId, BasicNode, RaftError<NodeId>>;

/// How long the leader waits for a majority before it says that there is none.
const QUORUM_PATIENCE: Duration = Duration::from_millis(350);
/// How long adding or removing a member may take.
const MEMBERS_PATIENCE: Duration = Duration::from_secs(20);
/// How long one part of a snapshot may take, its installation included.
const CHUNK_PATIENCE: Duration = Duration::from_secs(10);
/// Pause before a member that cannot be reached is tried again.
const UNREACHABLE_PAUSE: Duration = Duration::from_millis(60);

fn encode(value: &impl Serialize) -> Result<Vec<u8>, DiskError> {
    postcard::to_stdvec(value).map_err(|source| DiskError::Decode { what: "value", source })
}

fn decode<T: DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, DiskError> {
    postcard::from_bytes(bytes).map_err(|source| DiskError::Decode { what, source })
}

fn reading(error: DiskError) -> Failed {
    StorageIOError::read(&error).into()
}

fn writing(error: DiskError) -> Failed {
    StorageIOError::write(&error).into()
}

/// The log and the vote of this member.
#[derive(Clone)]
struct LogStore {
    id: NodeId,
    log: Arc<Log>,
    disk: Arc<Disk>,
    /// Whether the vote is that of a leader, this member.
    leads: Arc<AtomicBool>,
}

impl LogStore {
    fn read<T: DeserializeOwned>(&self, name: &'static str) -> Result<Option<T>, Failed> {
        let bytes = self.disk.get(name).map_err(reading)?;
        bytes.map(|bytes| decode(name, &bytes)).transpose().map_err(reading)
    }
}

impl RaftLogReader<Types> for LogStore {
    async fn try_get_log_entries<B>(&mut self, range: B) -> Result<Vec<Entry>, Failed>
    where
        B: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let entries = self.log.read(range).map_err(reading)?;
        entries.iter().map(|bytes| decode("entry", bytes).map_err(reading)).collect()
    }
}

impl RaftLogStorage<Types> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<Types>, Failed> {
        let last_purged_log_id = self.read("purged")?;
        let last = self.disk.last().map_err(reading)?;
        let last: Option<Entry> = last.map(|bytes| decode("entry", &bytes)).transpose().map_err(reading)?;
        Ok(LogState {
            last_purged_log_id,
            last_log_id: last.map(|entry| entry.log_id).or(last_purged_log_id),
        })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote<NodeId>) -> Result<(), Failed> {
        let save = async { self.log.settle().await?.put("vote", &encode(vote)?) };
        save.await.map_err(|error| StorageIOError::write_vote(&error))?;
        self.leads.store(vote.committed && vote.leader_id.voted_for() == Some(self.id), Relaxed);
        Ok(())
    }

    /// A leader's vote is read as a candidate's. openraft 0.9 would resume the leadership of a member that restarts within its
    /// term, and then answer reads from the first entry of that term on, before it has applied the later ones that it
    /// acknowledged. A candidate has to be elected anew, and its first entry comes behind all of them.
    async fn read_vote(&mut self) -> Result<Option<Vote<NodeId>>, Failed> {
        let vote: Option<Vote<NodeId>> = self.read("vote")?;
        Ok(vote.map(|vote| Vote {
            committed: vote.committed && vote.leader_id.voted_for() != Some(self.id),
            ..vote
        }))
    }

    // The committed index is not saved: at start the snapshot is applied, and the rest of the log once it is known to be committed.

    async fn append<I>(&mut self, entries: I, flushed: LogFlushed<Types>) -> Result<(), Failed>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let encoded = entries.into_iter().map(|entry| Ok((entry.log_id.index, encode(&entry)?)));
        let encoded = encoded.collect::<Result<Vec<_>, _>>().map_err(writing)?;
        let written = if self.leads.load(Relaxed) {
            self.log.append_soon(encoded)
        } else {
            self.log.append(encoded).await
        };
        flushed.log_io_completed(written.map_err(io::Error::other));
        Ok(())
    }

    async fn truncate(&mut self, log_id: LogId<NodeId>) -> Result<(), Failed> {
        self.log.settle().await.and_then(|disk| disk.truncate(log_id.index)).map_err(writing)
    }

    async fn purge(&mut self, log_id: LogId<NodeId>) -> Result<(), Failed> {
        let purge = async { self.log.settle().await?.purge(log_id.index, &encode(&log_id)?) };
        purge.await.map_err(writing)
    }
}

/// The state and how far the log was applied to it.
#[derive(Default)]
struct Applied {
    state: State,
    last: Option<LogId<NodeId>>,
    membership: Membership,
}

/// The state machine: the pure rule, applied in log order.
#[derive(Clone)]
struct Machine {
    applied: Arc<RwLock<Applied>>,
    log: Arc<Log>,
    disk: Arc<Disk>,
    peers: Arc<Peers>,
}

impl Machine {
    fn load(log: Arc<Log>, disk: Arc<Disk>, peers: Arc<Peers>) -> Result<Self, DiskError> {
        let mut applied = Applied::default();
        if let Some(stored) = disk.snapshot()? {
            let meta: Meta = decode("snapshot's description", &stored.meta)?;
            applied = Applied {
                state: decode("snapshot", &stored.state)?,
                last: meta.last_log_id,
                membership: meta.last_membership,
            };
        }
        Ok(Self { applied: Arc::new(RwLock::new(applied)), log, disk, peers })
    }

    fn applied(&self) -> std::sync::RwLockReadGuard<'_, Applied> {
        self.applied.read().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn applied_mut(&self) -> std::sync::RwLockWriteGuard<'_, Applied> {
        self.applied.write().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Members that are gone may come back with other data.
    fn forget_removed(&self, before: &Membership, now: &Membership) -> Result<(), Failed> {
        let gone = before.nodes().filter(|(id, _)| now.membership().get_node(id).is_none());
        gone.map(|(id, _)| *id).try_for_each(|id| self.peers.data_of.forget(id)).map_err(writing)
    }
}

impl RaftStateMachine<Types> for Machine {
    type SnapshotBuilder = Self;

    async fn applied_state(&mut self) -> Result<(Option<LogId<NodeId>>, Membership), Failed> {
        let applied = self.applied();
        Ok((applied.last, applied.membership.clone()))
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<Reply>, Failed>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<_> = entries.into_iter().collect();
        if let Some(last) = entries.last() {
            self.log.flushed_to(last.log_id.index).await.map_err(writing)?;
        }
        let mut applied = self.applied_mut();
        let mut replies = vec![];
        for entry in entries {
            applied.last = Some(entry.log_id);
            replies.push(match entry.payload {
                EntryPayload::Blank => Reply::Done,
                EntryPayload::Normal(write) => applied.state.apply(&write.vm, &write.command),
                EntryPayload::Membership(membership) => {
                    let membership = StoredMembership::new(Some(entry.log_id), membership);
                    self.forget_removed(&applied.membership, &membership)?;
                    applied.membership = membership;
                    Reply::Done
                }
            });
        }
        Ok(replies)
    }

    async fn get_snapshot_builder(&mut self) -> Self {
        self.clone()
    }

    async fn begin_receiving_snapshot(&mut self) -> Result<Box<Cursor<Vec<u8>>>, Failed> {
        Ok(Box::default())
    }

    async fn install_snapshot(&mut self, meta: &Meta, snapshot: Box<Cursor<Vec<u8>>>) -> Result<(), Failed> {
        let state = decode("snapshot", snapshot.get_ref()).map_err(reading)?;
        encode(meta).and_then(|meta| self.disk.put_snapshot(&meta, snapshot.get_ref())).map_err(writing)?;
        let new = Applied { state, last: meta.last_log_id, membership: meta.last_membership.clone() };
        let old = std::mem::replace(&mut *self.applied_mut(), new);
        self.forget_removed(&old.membership, &meta.last_membership)
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot<Types>>, Failed> {
        let Some(stored) = self.disk.snapshot().map_err(reading)? else { return Ok(None) };
        let meta = decode("snapshot's description", &stored.meta).map_err(reading)?;
        Ok(Some(Snapshot { meta, snapshot: Box::new(Cursor::new(stored.state)) }))
    }
}

impl RaftSnapshotBuilder<Types> for Machine {
    async fn build_snapshot(&mut self) -> Result<Snapshot<Types>, Failed> {
        let machine = self.clone();
        let build = move || {
            let (meta, state) = {
                let applied = machine.applied();
                let id = format!("{}-{:08x}", applied.last.map_or(0, |l| l.index), rand::random::<u32>());
                let (last_log_id, last_membership) = (applied.last, applied.membership.clone());
                (Meta { last_log_id, last_membership, snapshot_id: id }, encode(&applied.state)?)
            };
            machine.disk.put_snapshot(&encode(&meta)?, &state)?;
            Ok(Snapshot { meta, snapshot: Box::new(Cursor::new(state)) })
        };
        let built = tokio::task::spawn_blocking(build).await;
        built.map_err(|e| StorageIOError::write_snapshot(None, &e))?.map_err(writing)
    }
}

/// Makes the callers for other members.
struct Callers {
    peers: Arc<Peers>,
    log: Arc<Log>,
}

/// Calls one other member.
struct Caller {
    peers: Arc<Peers>,
    peer: Arc<Peer>,
    log: Arc<Log>,
    /// The last committed id that the member was told.
    told: Option<LogId<NodeId>>,
}

impl RaftNetworkFactory<Types> for Callers {
    type Network = Caller;

    async fn new_client(&mut self, to: NodeId, node: &BasicNode) -> Caller {
        let (peers, log) = (self.peers.clone(), self.log.clone());
        Caller { peer: self.peers.get(to, &node.addr), peers, log, told: None }
    }
}

impl Caller {
    /// Every failure is "unreachable": the pause that openraft makes then is right for all of them.
    async fn call<T: DeserializeOwned>(&self, ask: &PeerAsk, patience: Duration) -> Result<T, Unreachable> {
        match self.peers.ask(&self.peer, ask, patience).await.map_err(|e| Unreachable::new(&e))? {
            PeerAnswer::Done(bytes) => {
                wire::decode(&bytes).map_err(|e| Unreachable::new(&LinkError::from(e)))
            }
            PeerAnswer::Failed(failure) => Err(Unreachable::new(&failure)),
        }
    }
}

fn bytes_for(body: &impl Serialize) -> Result<Vec<u8>, Unreachable> {
    wire::encode(body).map_err(|e| Unreachable::new(&e))
}

impl RaftNetwork<Types> for Caller {
    async fn append_entries(
        &mut self,
        mut rpc: AppendEntriesRequest<Types>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<NodeId>, CallError> {
        // openraft counts this member's own copy at once; the others hear of it when it is on the disk.
        let flushed = |index| self.log.first_unflushed().is_none_or(|first| first > index);
        if rpc.leader_commit.is_some_and(|commit| flushed(commit.index)) {
            self.told = rpc.leader_commit;
        }
        rpc.leader_commit = self.told;
        // openraft gives up at its own time, in which case this call's end is never seen: so it ends a little before.
        let patience = option.hard_ttl().mul_f64(0.9);
        Ok(self.call(&PeerAsk::Append(bytes_for(&rpc)?), patience).await?)
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<NodeId>,
        option: RPCOption,
    ) -> Result<VoteResponse<NodeId>, CallError> {
        Ok(self.call(&PeerAsk::Vote(bytes_for(&rpc)?), option.hard_ttl().mul_f64(0.9)).await?)
    }

    async fn install_snapshot(
        &mut self,
        _: InstallSnapshotRequest<Types>,
        _: RPCOption,
    ) -> Result<
        InstallSnapshotResponse<NodeId>,
        RPCError<NodeId, BasicNode, RaftError<NodeId, openraft::error::InstallSnapshotError>>,
    > {
        // `full_snapshot` below takes its place.
        Err(Unreachable::new(&LinkError::Ended).into())
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote<NodeId>,
        snapshot: Snapshot<Types>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _: RPCOption,
    ) -> Result<SnapshotResponse<NodeId>, StreamingError<Types, Fatal<NodeId>>> {
        let send = async {
            let state = snapshot.snapshot.get_ref();
            let whole = state.len() / CHUNK_BYTES * CHUNK_BYTES;
            for offset in (0..whole).step_by(CHUNK_BYTES) {
                let bytes = state[offset..offset + CHUNK_BYTES].to_vec();
                let part = PeerAsk::Snapshot { offset: offset as u64, bytes, finish: None };
                self.call::<()>(&part, CHUNK_PATIENCE).await?;
            }
            let finish = Some(bytes_for(&(&vote, &snapshot.meta))?);
            let last = PeerAsk::Snapshot { offset: whole as u64, bytes: state[whole..].to_vec(), finish };
            Ok(self.call(&last, CHUNK_PATIENCE).await?)
        };
        tokio::select! {
            sent = send => sent,
            closed = cancel => Err(closed.into()),
        }
    }

    fn backoff(&self) -> Backoff {
        Backoff::new(std::iter::repeat(UNREACHABLE_PAUSE))
    }
}

/// When to suspect the leader, and when to compact the log.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// The leader is heard at least so often, in milliseconds. It is suspected after 7.5 to 10 of these intervals.
    pub heartbeat_ms: u64,
    /// Commands between two snapshots.
    pub snapshot_every: u64,
}

impl Default for Timing {
    fn default() -> Self {
        Self { heartbeat_ms: 40, snapshot_every: 10_000 }
    }
}

/// Commands that stay in the log behind a snapshot, for members that are a little late.
const LOG_KEPT: u64 = 1000;

/// A member's Raft: the handle that the rest of the server uses.
#[derive(Clone)]
pub struct Raft {
    raft: openraft::Raft<Types>,
    machine: Machine,
    disk: Arc<Disk>,
}

/// How a member cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Its data cannot be read.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// openraft's reason.
    #[error("Raft cannot start: {0}")]
    Raft(String),
}

impl Raft {
    /// Starts the member with what its disk holds.
    pub async fn start(
        id: NodeId,
        disk: Arc<Disk>,
        peers: Arc<Peers>,
        timing: Timing,
    ) -> Result<Self, StartError> {
        let config = Config {
            cluster_name: "vmft".into(),
            heartbeat_interval: timing.heartbeat_ms,
            election_timeout_min: timing.heartbeat_ms * 5 / 2,
            election_timeout_max: timing.heartbeat_ms * 5,
            snapshot_policy: SnapshotPolicy::LogsSinceLast(timing.snapshot_every),
            replication_lag_threshold: timing.snapshot_every * 2,
            max_in_snapshot_log_to_keep: LOG_KEPT.min(timing.snapshot_every),
            ..Config::default()
        };
        let config = Arc::new(config.validate().map_err(|e| StartError::Raft(e.to_string()))?);
        let log = Arc::new(Log::new(disk.clone())?);
        let machine = Machine::load(log.clone(), disk.clone(), peers.clone())?;
        let store = LogStore { id, log: log.clone(), disk: disk.clone(), leads: Arc::default() };
        let raft = openraft::Raft::new(id, config, Callers { peers, log }, store, machine.clone()).await;
        Ok(Self { raft: raft.map_err(|e| StartError::Raft(e.to_string()))?, machine, disk })
    }

    /// Forms the cluster, unless this member is in one already. Every first member does so, with the same list.
    pub async fn form(&self, members: &BTreeMap<NodeId, String>) -> Result<(), StartError> {
        let failed = |e: String| StartError::Raft(e);
        if self.raft.is_initialized().await.map_err(|e| failed(e.to_string()))? {
            return Ok(());
        }
        let nodes: BTreeMap<_, _> =
            members.iter().map(|(id, address)| (*id, BasicNode::new(address))).collect();
        match self.raft.initialize(nodes).await {
            // Another member was faster, and its log is here already.
            Ok(()) | Err(RaftError::APIError(openraft::error::InitializeError::NotAllowed(_))) => Ok(()),
            Err(error) => Err(failed(error.to_string())),
        }
    }

    /// Applies a command, if this member leads and reaches a majority.
    pub async fn command(&self, vm: VmName, command: Command) -> Result<Reply, Failure> {
        if self.disk.is_full() {
            return Err(Failure::DiskFull);
        }
        match tokio::time::timeout(QUORUM_PATIENCE, self.raft.client_write(Write { vm, command })).await {
            Err(_) => Err(Failure::NoQuorum),
            Ok(Ok(response)) => Ok(response.data),
            Ok(Err(RaftError::APIError(ClientWriteError::ForwardToLeader(to)))) => {
                Err(Failure::NotLeader(to.leader_node.map(|node| node.addr)))
            }
            Ok(Err(RaftError::APIError(ClientWriteError::ChangeMembershipError(e)))) => {
                Err(Failure::Members(e.to_string()))
            }
            Ok(Err(RaftError::Fatal(_))) => Err(self.why_stopped()),
        }
    }

    /// Looks at the state as it is now: everything answered before the call is in it.
    pub async fn look<T>(&self, look: impl FnOnce(&State) -> T) -> Result<T, Failure> {
        match tokio::time::timeout(QUORUM_PATIENCE, self.raft.ensure_linearizable()).await {
            Ok(Ok(_)) => Ok(look(&self.machine.applied().state)),
            Err(_) | Ok(Err(RaftError::APIError(CheckIsLeaderError::QuorumNotEnough(_)))) => {
                Err(Failure::NoQuorum)
            }
            Ok(Err(RaftError::APIError(CheckIsLeaderError::ForwardToLeader(to)))) => {
                Err(Failure::NotLeader(to.leader_node.map(|node| node.addr)))
            }
            Ok(Err(RaftError::Fatal(_))) => Err(self.why_stopped()),
        }
    }

    fn why_stopped(&self) -> Failure {
        if self.disk.is_full() { Failure::DiskFull } else { Failure::Stopped }
    }

    /// Answers another member. `snapshot` collects the parts of a snapshot of one connection.
    pub async fn answer(&self, ask: PeerAsk, snapshot: &tokio::sync::Mutex<Vec<u8>>) -> PeerAnswer {
        self.try_answer(ask, snapshot).await.map_or_else(PeerAnswer::Failed, PeerAnswer::Done)
    }

    async fn try_answer(
        &self,
        ask: PeerAsk,
        snapshot: &tokio::sync::Mutex<Vec<u8>>,
    ) -> Result<Vec<u8>, Failure> {
        match ask {
            PeerAsk::Append(bytes) => {
                let rpc: AppendEntriesRequest<Types> = decode_rpc(&bytes)?;
                if !rpc.entries.is_empty() && self.disk.is_full() {
                    return Err(Failure::DiskFull);
                }
                self.encode_answer(self.raft.append_entries(rpc).await)
            }
            PeerAsk::Vote(bytes) => self.encode_answer(self.raft.vote(decode_rpc(&bytes)?).await),
            PeerAsk::Snapshot { offset, bytes, finish } => {
                let mut parts = snapshot.lock().await;
                if offset == 0 {
                    parts.clear();
                }
                if parts.len() as u64 != offset || self.disk.is_full() {
                    return Err(if self.disk.is_full() { Failure::DiskFull } else { Failure::Stopped });
                }
                parts.extend(bytes);
                let Some(finish) = finish else { return self.encode_answer::<_, Fatal<NodeId>>(Ok(())) };
                let (vote, meta) = decode_rpc(&finish)?;
                let snapshot =
                    Snapshot { meta, snapshot: Box::new(Cursor::new(std::mem::take(&mut *parts))) };
                self.encode_answer(self.raft.install_full_snapshot(vote, snapshot).await)
            }
        }
    }

    fn encode_answer<T: Serialize, E>(&self, answer: Result<T, E>) -> Result<Vec<u8>, Failure> {
        let answer = answer.map_err(|_| self.why_stopped())?;
        wire::encode(&answer).map_err(|_| Failure::Stopped)
    }

    /// Adds a member, first as a learner until it has caught up.
    pub async fn add_member(&self, id: NodeId, address: String) -> Result<(), Failure> {
        self.change_members(async {
            self.raft.add_learner(id, BasicNode::new(address), true).await?;
            self.raft.change_membership(ChangeMembers::AddVoterIds([id].into()), false).await
        })
        .await
    }

    /// Removes a member.
    pub async fn remove_member(&self, id: NodeId) -> Result<(), Failure> {
        let members = self.raft.metrics().borrow().membership_config.clone();
        if members.membership().get_node(&id).is_none() {
            return Err(Failure::Members(format!("{id} is not a member")));
        }
        let is_voter = members.membership().voter_ids().any(|voter| voter == id);
        let change = if is_voter {
            ChangeMembers::RemoveVoters([id].into())
        } else {
            ChangeMembers::RemoveNodes([id].into())
        };
        self.change_members(self.raft.change_membership(change, false)).await
    }

    async fn change_members<T>(
        &self,
        change: impl Future<Output = Result<T, RaftError<NodeId, ClientWriteError<NodeId, BasicNode>>>>,
    ) -> Result<(), Failure> {
        match tokio::time::timeout(MEMBERS_PATIENCE, change).await {
            Err(_) => {
                Err(Failure::Members(format!("not done within {MEMBERS_PATIENCE:?}; ask for the status")))
            }
            Ok(Ok(_)) => Ok(()),
            Ok(Err(RaftError::APIError(ClientWriteError::ForwardToLeader(to)))) => {
                Err(Failure::NotLeader(to.leader_node.map(|node| node.addr)))
            }
            Ok(Err(RaftError::APIError(ClientWriteError::ChangeMembershipError(e)))) => {
                Err(Failure::Members(e.to_string()))
            }
            Ok(Err(RaftError::Fatal(_))) => Err(self.why_stopped()),
        }
    }

    /// What Raft knows now.
    pub fn view(&self) -> View {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        let config = metrics.membership_config.membership();
        let matched = |id: &NodeId| metrics.replication.as_ref()?.get(id)?.map(|log_id| log_id.index);
        let members = config.nodes().map(|(id, node)| {
            let votes = config.voter_ids().any(|voter| voter == *id);
            (*id, MemberStatus { address: node.addr.clone(), votes, matched_index: matched(id) })
        });
        let role = match metrics.state {
            _ if metrics.running_state.is_err() => "stopped",
            ServerState::Learner => "learner",
            ServerState::Follower => "follower",
            ServerState::Candidate => "candidate",
            ServerState::Leader => "leader",
            ServerState::Shutdown => "stopped",
        };
        View {
            role,
            term: metrics.current_term,
            leader: metrics.current_leader,
            members: members.collect(),
            last_log_index: metrics.last_log_index,
            applied_index: metrics.last_applied.map(|l| l.index),
            snapshot_index: metrics.snapshot.map(|l| l.index),
            purged_index: metrics.purged.map(|l| l.index),
            vms: self.machine.applied().state.len() as u64,
        }
    }

    /// The leader's number and address, as far as it is known.
    pub fn leader(&self) -> Option<(NodeId, String)> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        let id = metrics.current_leader?;
        Some((id, metrics.membership_config.membership().get_node(&id)?.addr.clone()))
    }

    /// Waits until Raft has stopped, and says why.
    pub async fn stopped(&self) -> String {
        let mut metrics = self.raft.metrics();
        loop {
            if let Err(fatal) = &metrics.borrow_and_update().running_state {
                return fatal.to_string();
            }
            if metrics.changed().await.is_err() {
                return "it was shut down".into();
            }
        }
    }

    /// Stops the member.
    pub async fn stop(&self) {
        if let Err(error) = self.raft.shutdown().await {
            eprintln!("Raft did not stop well: {error}");
        }
    }
}

fn decode_rpc<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Failure> {
    wire::decode(bytes).map_err(|_| Failure::Stopped)
}

/// What Raft knows at one moment; the fields are those of [`crate::wire::Status`].
#[derive(Debug)]
#[expect(missing_docs, reason = "described in wire::Status")]
pub struct View {
    pub role: &'static str,
    pub term: u64,
    pub leader: Option<NodeId>,
    pub members: BTreeMap<NodeId, MemberStatus>,
    pub last_log_index: Option<u64>,
    pub applied_index: Option<u64>,
    pub snapshot_index: Option<u64>,
    pub purged_index: Option<u64>,
    pub vms: u64,
}

/// What other members would send, for tests of one member.
#[cfg(test)]
pub mod testing {
    use super::*;

    impl Raft {
        /// The member stays what it is.
        pub fn never_elect(&self) {
            self.raft.runtime_config().elect(false);
        }
    }

    fn at(term: u64, leader: NodeId, index: u64) -> LogId<NodeId> {
        LogId::new(openraft::CommittedLeaderId::new(term, leader), index)
    }

    /// A candidate that has a log up to this index asks for a vote.
    pub fn vote_ask(term: u64, candidate: NodeId, index: u64) -> PeerAsk {
        let rpc = VoteRequest::new(Vote::new(term, candidate), Some(at(term - 1, candidate, index)));
        PeerAsk::Vote(wire::encode(&rpc).unwrap())
    }

    /// Whether an answer to [`vote_ask`] grants the vote.
    pub fn is_granted(answer: &[u8]) -> bool {
        wire::decode::<VoteResponse<NodeId>>(answer).unwrap().vote_granted
    }

    /// A leader sends the entry of this index, at most 1 behind the last; the first follows the cluster's own at 0.
    pub fn append_ask(term: u64, leader: NodeId, index: u64, (vm, command): (VmName, Command)) -> PeerAsk {
        let previous = if index == 1 { LogId::default() } else { at(term, leader, index - 1) };
        let entry =
            Entry { log_id: at(term, leader, index), payload: EntryPayload::Normal(Write { vm, command }) };
        let vote = Vote::new_committed(term, leader);
        let rpc = AppendEntriesRequest::<Types> {
            vote,
            prev_log_id: Some(previous),
            entries: vec![entry],
            leader_commit: None,
        };
        PeerAsk::Append(wire::encode(&rpc).unwrap())
    }
}
