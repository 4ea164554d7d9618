//! Requests as other members would send them, for tests of a single member.

use openraft::raft::{AppendEntriesRequest, VoteRequest, VoteResponse};
use openraft::{EntryPayload, LogId, Vote};

use super::types::{LoggedRequest, RaftEntry, Types, VmCommand, decode, encode};
use crate::names::VmName;
use crate::record::Command;
use crate::wire::{NodeId, PeerRequest};

fn at(term: u64, leader: NodeId, index: u64) -> LogId<NodeId> {
    LogId::new(openraft::CommittedLeaderId::new(term, leader), index)
}

/// The request for a vote from a candidate whose log ends at this index.
pub fn vote_ask(term: u64, candidate: NodeId, index: u64) -> PeerRequest {
    let rpc = VoteRequest::new(Vote::new(term, candidate), Some(at(term - 1, candidate, index)));
    PeerRequest::Vote(encode(&rpc).unwrap())
}

/// Whether an answer to [`vote_ask`] grants the vote.
pub fn is_granted(answer: &[u8]) -> bool {
    decode::<VoteResponse<NodeId>>("answer", answer).unwrap().vote_granted
}

/// The request of a leader to append the entry with this index. The previous entry is its own, or for index 1 the cluster's first
/// entry at index 0.
pub fn append_ask(term: u64, leader: NodeId, index: u64, (vm, command): (VmName, Command)) -> PeerRequest {
    let previous = if index == 1 { LogId::default() } else { at(term, leader, index - 1) };
    let entry = RaftEntry {
        log_id: at(term, leader, index),
        payload: EntryPayload::Normal(LoggedRequest::Command(VmCommand {
            vm,
            command,
            asker: None,
            names_max: u64::MAX,
        })),
    };
    let vote = Vote::new_committed(term, leader);
    let rpc = AppendEntriesRequest::<Types> {
        vote,
        prev_log_id: Some(previous),
        entries: vec![entry],
        leader_commit: None,
    };
    PeerRequest::Append(encode(&rpc).unwrap())
}
