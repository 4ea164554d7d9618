//! The requests that openraft sends to other members.

use std::sync::Arc;
use std::time::{Duration, Instant};

use openraft::error::{Fatal, RPCError, RaftError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{Backoff, RPCOption};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, InstallSnapshotResponse,
    SnapshotResponse, VoteRequest, VoteResponse,
};
use openraft::{BasicNode, LogId, OptionalSend, RaftNetwork, RaftNetworkFactory, Snapshot, Vote};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::types::{Types, decode, encode};
use crate::connection::ConnectionError;
use crate::server::peers::{OtherMember, OtherMembers};
use crate::server::raft_log::RaftLog;
use crate::wire::{CHUNK_BYTES, NodeId, PeerRequest, PeerResponse};

type CallError = RPCError<NodeId, BasicNode, RaftError<NodeId>>;

/// How long one part of a snapshot may take, including its installation.
const CHUNK_PATIENCE: Duration = Duration::from_secs(10);
/// The pause before a member that cannot be reached is tried again.
const UNREACHABLE_PAUSE: Duration = Duration::from_millis(60);

/// Makes the clients for other members.
pub struct PeerClients {
    pub peers: Arc<OtherMembers>,
    pub log: Arc<RaftLog>,
}

/// Sends requests to one other member.
pub struct PeerClient {
    peers: Arc<OtherMembers>,
    peer: Arc<OtherMember>,
    log: Arc<RaftLog>,
    /// The last commit index that was sent to the member.
    told: Option<LogId<NodeId>>,
    /// When the member last confirmed that its log agrees with this leader's, and up to which entry.
    confirmed: Option<(Instant, Option<LogId<NodeId>>)>,
}

impl RaftNetworkFactory<Types> for PeerClients {
    type Network = PeerClient;

    async fn new_client(&mut self, to: NodeId, node: &BasicNode) -> PeerClient {
        let (peers, log) = (self.peers.clone(), self.log.clone());
        PeerClient { peer: self.peers.get(to, &node.addr), peers, log, told: None, confirmed: None }
    }
}

impl PeerClient {
    /// Sends a request. Every failure is reported as "unreachable", because the pause that openraft then makes suits all of them.
    async fn call<T: DeserializeOwned>(
        &self,
        request: PeerRequest,
        patience: Duration,
    ) -> Result<T, Unreachable> {
        match self.peers.ask(&self.peer, request, patience).await.map_err(|e| Unreachable::new(&e))? {
            PeerResponse::Done(bytes) => decode("member's answer", &bytes).map_err(|e| Unreachable::new(&e)),
            PeerResponse::Failed(failure) => Err(Unreachable::new(&failure)),
        }
    }
}

fn bytes_for(body: &impl Serialize) -> Result<Vec<u8>, Unreachable> {
    encode(body).map_err(|e| Unreachable::new(&e))
}

impl RaftNetwork<Types> for PeerClient {
    async fn append_entries(
        &mut self,
        mut rpc: AppendEntriesRequest<Types>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<NodeId>, CallError> {
        // openraft sends each commit index at once, in a separate request for which the next entry would have to wait. If the
        // member has answered recently, that request is left out: the member learns the index with the next entry or heartbeat.
        let is_fresh =
            |(at, upto): &(Instant, _)| *upto == rpc.prev_log_id && at.elapsed() < option.hard_ttl() / 2;
        if rpc.entries.is_empty() && self.confirmed.as_ref().is_some_and(is_fresh) {
            return Ok(AppendEntriesResponse::Success);
        }
        // openraft counts this member's copy of an entry at once. The others are told that it is committed only when this copy is
        // on the disk.
        let flushed = |index| self.log.first_unflushed().is_none_or(|first| first > index);
        if rpc.leader_commit.is_some_and(|commit| flushed(commit.index)) {
            self.told = rpc.leader_commit;
        }
        rpc.leader_commit = self.told;
        // openraft drops this future at its own deadline, and `confirmed` would not be updated: so this ends a little earlier.
        let patience = option.hard_ttl().mul_f64(0.9);
        let answer = self.call(PeerRequest::Append(bytes_for(&rpc)?), patience).await?;
        let upto = rpc.entries.last().map_or(rpc.prev_log_id, |entry| Some(entry.log_id));
        self.confirmed = matches!(answer, AppendEntriesResponse::Success).then(|| (Instant::now(), upto));
        Ok(answer)
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<NodeId>,
        option: RPCOption,
    ) -> Result<VoteResponse<NodeId>, CallError> {
        Ok(self.call(PeerRequest::Vote(bytes_for(&rpc)?), option.hard_ttl().mul_f64(0.9)).await?)
    }

    async fn install_snapshot(
        &mut self,
        _: InstallSnapshotRequest<Types>,
        _: RPCOption,
    ) -> Result<
        InstallSnapshotResponse<NodeId>,
        RPCError<NodeId, BasicNode, RaftError<NodeId, openraft::error::InstallSnapshotError>>,
    > {
        // Never called: `full_snapshot` below replaces it.
        Err(Unreachable::new(&ConnectionError::Ended).into())
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
                let part = PeerRequest::Snapshot { offset: offset as u64, bytes, finish: None };
                self.call::<()>(part, CHUNK_PATIENCE).await?;
            }
            let finish = Some(bytes_for(&(&vote, &snapshot.meta))?);
            let last = PeerRequest::Snapshot { offset: whole as u64, bytes: state[whole..].to_vec(), finish };
            Ok(self.call(last, CHUNK_PATIENCE).await?)
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
