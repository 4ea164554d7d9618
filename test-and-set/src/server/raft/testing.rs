//! What other members would send, for tests of one member.

use openraft::raft::{AppendEntriesRequest, VoteRequest, VoteResponse};
use openraft::{EntryPayload, LogId, Vote};

use super::Raft;
use super::types::{LoggedCommand, RaftEntry, Types};
use crate::names::VmName;
use crate::record::Command;
use crate::wire::{self, NodeId, PeerRequest};

impl Raft {
    /// The member stays what it is.
    pub fn disable_elections(&self) {
        self.raft.runtime_config().elect(false);
    }
}

fn at(term: u64, leader: NodeId, index: u64) -> LogId<NodeId> {
    LogId::new(openraft::CommittedLeaderId::new(term, leader), index)
}

/// A candidate that has a log up to this index asks for a vote.
pub fn vote_ask(term: u64, candidate: NodeId, index: u64) -> PeerRequest {
    let rpc = VoteRequest::new(Vote::new(term, candidate), Some(at(term - 1, candidate, index)));
    PeerRequest::Vote(wire::encode(&rpc).unwrap())
}

/// Whether an answer to [`vote_ask`] grants the vote.
pub fn is_granted(answer: &[u8]) -> bool {
    wire::decode::<VoteResponse<NodeId>>(answer).unwrap().vote_granted
}

/// A leader sends the entry of this index, at most 1 behind the last; the first follows the cluster's own at 0.
pub fn append_ask(term: u64, leader: NodeId, index: u64, (vm, command): (VmName, Command)) -> PeerRequest {
    let previous = if index == 1 { LogId::default() } else { at(term, leader, index - 1) };
    let entry = RaftEntry {
        log_id: at(term, leader, index),
        payload: EntryPayload::Normal(LoggedCommand { vm, command }),
    };
    let vote = Vote::new_committed(term, leader);
    let rpc = AppendEntriesRequest::<Types> {
        vote,
        prev_log_id: Some(previous),
        entries: vec![entry],
        leader_commit: None,
    };
    PeerRequest::Append(wire::encode(&rpc).unwrap())
}
