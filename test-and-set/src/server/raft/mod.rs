//! The only module that names openraft: implements its traits with our types, and hides it behind a small handle.
//!
//! To all other modules openraft's entries, votes and messages are bytes. What Raft wants to have on the disk is there when the
//! call returns, except for what a leader appends: see [`crate::server::raft_log`].
#![allow(clippy::result_large_err, reason = "openraft's errors are large")]

mod log_store;
mod members;
mod network;
mod restored;
mod state_machine;
mod telling;
#[cfg(test)]
pub mod testing;
pub(crate) mod types;

use std::collections::BTreeMap;
use std::io::Cursor;
use std::sync::Arc;
use std::time::Duration;

use openraft::error::{CheckIsLeaderError, ClientWriteError, Fatal, ForwardToLeader, RaftError};
use openraft::raft::AppendEntriesRequest;
use openraft::{BasicNode, Config, ServerState, Snapshot, SnapshotPolicy};
use serde::Serialize;
use serde::de::DeserializeOwned;

use self::log_store::LogStore;
use self::network::PeerClients;
pub use self::restored::store_first_snapshot;
use self::state_machine::StoreMachine;
pub use self::types::VmCommand;
use self::types::{LoggedRequest, RaftWriteError, Types, decode, encode};
use crate::record::CommandReply;
use crate::server::audit::{Audit, AuditNote};
use crate::server::disk::MemberDisk;
use crate::server::disk_error::DiskError;
use crate::server::peers::OtherMembers;
use crate::server::raft_log::RaftLog;
use crate::state::StoreState;
use crate::wire::{MemberStatus, NodeId, PeerRequest, PeerResponse, RequestFailure};
use tracing::error;

/// How long the leader waits for a majority before it reports that it cannot reach one.
const QUORUM_PATIENCE: Duration = Duration::from_millis(350);

fn not_leader(to: ForwardToLeader<NodeId, BasicNode>) -> RequestFailure {
    RequestFailure::NotLeader(to.leader_node.map(|node| node.addr))
}

/// When a member suspects the leader, and when it compacts the log.
#[derive(Debug, Clone, Copy)]
pub struct RaftTiming {
    /// The interval of the leader's heartbeats in milliseconds. The leader is suspected after 7.5 to 10 intervals of silence.
    pub heartbeat_ms: u64,
    /// The number of commands between two snapshots.
    pub snapshot_every: u64,
}

impl Default for RaftTiming {
    fn default() -> Self {
        Self { heartbeat_ms: 40, snapshot_every: 10_000 }
    }
}

/// The number of commands before a snapshot that stay in the log, for members that lag a little.
const LOG_KEPT: u64 = 1000;

/// A member's Raft: the handle that the rest of the server uses.
#[derive(Clone)]
pub struct Raft {
    raft: openraft::Raft<Types>,
    machine: StoreMachine,
    disk: Arc<MemberDisk>,
    peers: Arc<OtherMembers>,
    /// The silence after which a leader is suspected.
    suspicion: Duration,
}

/// Why a member cannot start.
#[derive(Debug, thiserror::Error)]
pub enum RaftStartError {
    /// Its data cannot be read.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The audit's thread cannot be started.
    #[error("cannot start the audit's thread")]
    Audit(#[source] std::io::Error),
    /// openraft cannot start, for this reason.
    #[error("cannot start Raft: {0}")]
    Raft(String),
}

impl Raft {
    /// Starts the member with the data on its disk.
    pub async fn start(
        id: NodeId,
        disk: Arc<MemberDisk>,
        peers: Arc<OtherMembers>,
        timing: RaftTiming,
    ) -> Result<Self, RaftStartError> {
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
        let config = Arc::new(config.validate().map_err(|e| RaftStartError::Raft(e.to_string()))?);
        let log = Arc::new(RaftLog::new(disk.clone())?);
        let audit = Audit::start().map_err(RaftStartError::Audit)?;
        let machine = StoreMachine::load(log.clone(), disk.clone(), peers.clone(), audit)?;
        let store = LogStore { id, log: log.clone(), disk: disk.clone(), leads: Arc::default() };
        let raft = openraft::Raft::new(
            id,
            config,
            PeerClients { peers: peers.clone(), log },
            store,
            machine.clone(),
        )
        .await;
        let raft = raft.map_err(|e| RaftStartError::Raft(e.to_string()))?;
        let suspicion = Duration::from_millis(timing.heartbeat_ms * 10);
        Ok(Self { raft, machine, disk, peers, suspicion })
    }

    /// Whether this member may become a candidate; at the start it may.
    pub fn set_elections(&self, may_be: bool) {
        self.raft.runtime_config().elect(may_be);
    }

    /// Whether this is a member of the cluster, as far as is known here.
    pub fn is_member(&self, id: NodeId) -> bool {
        let metrics = self.raft.metrics();
        metrics.borrow().membership_config.membership().get_node(&id).is_some()
    }

    /// Whether a member with this number may connect: it is one of the cluster, or this member does not know the cluster yet.
    pub fn may_connect(&self, id: NodeId) -> bool {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        let config = metrics.membership_config.membership();
        config.nodes().next().is_none() || config.get_node(&id).is_some()
    }

    /// Forms the cluster, unless this member already belongs to one. Each of the first members does this with the same list.
    pub async fn initialize(&self, members: &BTreeMap<NodeId, String>) -> Result<(), RaftStartError> {
        let failed = |e: String| RaftStartError::Raft(e);
        if self.raft.is_initialized().await.map_err(|e| failed(e.to_string()))? {
            return Ok(());
        }
        let nodes: BTreeMap<_, _> =
            members.iter().map(|(id, address)| (*id, BasicNode::new(address))).collect();
        match self.raft.initialize(nodes).await {
            // `NotAllowed`: another member was faster, and its log has already arrived.
            Ok(()) | Err(RaftError::APIError(openraft::error::InitializeError::NotAllowed(_))) => Ok(()),
            Err(error) => Err(failed(error.to_string())),
        }
    }

    /// Applies a command, if this member is the leader and reaches a majority.
    pub async fn command(&self, command: VmCommand) -> Result<CommandReply, RequestFailure> {
        self.write(LoggedRequest::Command(command)).await
    }

    /// Writes a note into the audit of every member, if this member is the leader and reaches a majority.
    pub async fn note(&self, note: AuditNote) -> Result<(), RequestFailure> {
        self.write(LoggedRequest::Note(note)).await.map(drop)
    }

    async fn write(&self, request: LoggedRequest) -> Result<CommandReply, RequestFailure> {
        if self.disk.is_full() {
            return Err(RequestFailure::DiskFull);
        }
        match tokio::time::timeout(QUORUM_PATIENCE, self.raft.client_write(request)).await {
            Err(_) => Err(RequestFailure::NoQuorum),
            Ok(written) => written.map(|response| response.data).map_err(|e| self.write_failure(e)),
        }
    }

    /// Calls `look` with the current state, which includes every command that was answered before this call.
    pub async fn read<T>(&self, look: impl FnOnce(&StoreState) -> T) -> Result<T, RequestFailure> {
        match tokio::time::timeout(QUORUM_PATIENCE, self.raft.ensure_linearizable()).await {
            Ok(Ok(_)) => Ok(look(&self.machine.applied().state)),
            Err(_) | Ok(Err(RaftError::APIError(CheckIsLeaderError::QuorumNotEnough(_)))) => {
                Err(RequestFailure::NoQuorum)
            }
            Ok(Err(RaftError::APIError(CheckIsLeaderError::ForwardToLeader(to)))) => Err(not_leader(to)),
            Ok(Err(RaftError::Fatal(_))) => Err(self.stop_failure()),
        }
    }

    fn write_failure(&self, error: RaftWriteError) -> RequestFailure {
        match error {
            RaftError::APIError(ClientWriteError::ForwardToLeader(to)) => not_leader(to),
            RaftError::APIError(ClientWriteError::ChangeMembershipError(e)) => {
                RequestFailure::Members(e.to_string())
            }
            RaftError::Fatal(_) => self.stop_failure(),
        }
    }

    fn stop_failure(&self) -> RequestFailure {
        if self.disk.is_full() { RequestFailure::DiskFull } else { RequestFailure::Stopped }
    }

    /// The current view of Raft.
    pub fn view(&self) -> RaftView {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        let config = metrics.membership_config.membership();
        let matched = |id: &NodeId| metrics.replication.as_ref()?.get(id)?.map(|log_id| log_id.index);
        let remembered = self.peers.remembered();
        let members = config.nodes().map(|(id, node)| {
            let status = MemberStatus {
                address: node.addr.clone(),
                votes: config.voter_ids().any(|voter| voter == *id),
                matched_index: matched(id),
                remembered_change: remembered.get(id).map(|mark| mark.change),
            };
            (*id, status)
        });
        // A leader that has lost its majority stays one to itself until it hears of another.
        let quorum_silence = metrics.millis_since_quorum_ack.map(Duration::from_millis);
        let is_only_voter = config.voter_ids().count() == 1;
        let has_quorum = is_only_voter || quorum_silence.is_some_and(|silence| silence < self.suspicion);
        let lost_quorum = metrics.state == ServerState::Leader && !has_quorum;
        let role = match metrics.state {
            _ if metrics.running_state.is_err() => "stopped",
            ServerState::Learner => "learner",
            ServerState::Follower => "follower",
            ServerState::Candidate => "candidate",
            ServerState::Leader if lost_quorum => "leader without a majority",
            ServerState::Leader => "leader",
            ServerState::Shutdown => "stopped",
        };
        RaftView {
            role,
            term: metrics.current_term,
            leader: metrics.current_leader.filter(|_| !lost_quorum),
            members: members.collect(),
            last_log_index: metrics.last_log_index,
            applied_index: metrics.last_applied.map(|l| l.index),
            snapshot_index: metrics.snapshot.map(|l| l.index),
            purged_index: metrics.purged.map(|l| l.index),
            vms: self.machine.applied().state.len() as u64,
        }
    }

    /// The leader's number and address, if they are known.
    pub fn leader(&self) -> Option<(NodeId, String)> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        let id = metrics.current_leader?;
        Some((id, metrics.membership_config.membership().get_node(&id)?.addr.clone()))
    }

    /// Waits until Raft has stopped; returns the reason.
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
            error!("cannot stop Raft: {error}");
        }
    }
}

impl Raft {
    /// Answers another member's request. `snapshot` collects the parts of the snapshot that arrives on its connection.
    pub async fn answer(&self, request: PeerRequest, snapshot: &tokio::sync::Mutex<Vec<u8>>) -> PeerResponse {
        self.try_answer(request, snapshot).await.map_or_else(PeerResponse::Failed, PeerResponse::Done)
    }

    async fn try_answer(
        &self,
        request: PeerRequest,
        snapshot: &tokio::sync::Mutex<Vec<u8>>,
    ) -> Result<Vec<u8>, RequestFailure> {
        match request {
            PeerRequest::Append(bytes) => {
                let rpc: AppendEntriesRequest<Types> = decode_rpc(&bytes)?;
                if !rpc.entries.is_empty() && self.disk.is_full() {
                    return Err(RequestFailure::DiskFull);
                }
                self.encode_answer(self.raft.append_entries(rpc).await)
            }
            PeerRequest::Vote(bytes) => self.encode_answer(self.raft.vote(decode_rpc(&bytes)?).await),
            PeerRequest::Snapshot { offset, bytes, finish } => {
                let mut parts = snapshot.lock().await;
                if offset == 0 {
                    parts.clear();
                }
                if parts.len() as u64 != offset || self.disk.is_full() {
                    return Err(if self.disk.is_full() {
                        RequestFailure::DiskFull
                    } else {
                        RequestFailure::Stopped
                    });
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

    fn encode_answer<T: Serialize, E>(&self, answer: Result<T, E>) -> Result<Vec<u8>, RequestFailure> {
        let answer = answer.map_err(|_| self.stop_failure())?;
        encode(&answer).map_err(|_| RequestFailure::Stopped)
    }
}

fn decode_rpc<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, RequestFailure> {
    decode("request of another member", bytes).map_err(|error| {
        error!("cannot answer another member: {error}");
        RequestFailure::Stopped
    })
}

/// Raft's state at one moment; the fields are those of [`crate::wire::NodeStatus`].
#[derive(Debug)]
#[expect(missing_docs, reason = "described in wire::NodeStatus")]
pub struct RaftView {
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
