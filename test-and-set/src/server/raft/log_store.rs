//! The log and the vote, behind openraft's storage trait.

use std::fmt::Debug;
use std::io;
use std::ops::RangeBounds;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use openraft::storage::{LogFlushed, RaftLogStorage};
use openraft::{LogId, LogState, OptionalSend, RaftLogReader, StorageIOError, Vote};
use serde::de::DeserializeOwned;

use super::types::{RaftEntry, RaftStorageError, Types, decode, encode, reading, writing};
use crate::server::disk::MemberDisk;
use crate::server::raft_log::RaftLog;
use crate::wire::NodeId;

/// The log and the vote of this member.
#[derive(Clone)]
pub struct LogStore {
    pub id: NodeId,
    pub log: Arc<RaftLog>,
    pub disk: Arc<MemberDisk>,
    /// Whether the stored vote makes this member the leader.
    pub leads: Arc<AtomicBool>,
}

impl LogStore {
    fn read<T: DeserializeOwned>(&self, name: &'static str) -> Result<Option<T>, RaftStorageError> {
        let bytes = self.disk.get(name).map_err(reading)?;
        bytes.map(|bytes| decode(name, &bytes)).transpose().map_err(reading)
    }
}

impl RaftLogReader<Types> for LogStore {
    async fn try_get_log_entries<B>(&mut self, range: B) -> Result<Vec<RaftEntry>, RaftStorageError>
    where
        B: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let entries = self.log.read(range).map_err(reading)?;
        entries.iter().map(|bytes| decode("entry", bytes).map_err(reading)).collect()
    }
}

impl RaftLogStorage<Types> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<Types>, RaftStorageError> {
        let last_purged_log_id = self.read("purged")?;
        let last = self.disk.last().map_err(reading)?;
        let last: Option<RaftEntry> =
            last.map(|bytes| decode("entry", &bytes)).transpose().map_err(reading)?;
        Ok(LogState {
            last_purged_log_id,
            last_log_id: last.map(|entry| entry.log_id).or(last_purged_log_id),
        })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote<NodeId>) -> Result<(), RaftStorageError> {
        let save = async { self.log.flushed_disk().await?.put("vote", &encode(vote)?) };
        save.await.map_err(|error| StorageIOError::write_vote(&error))?;
        self.leads.store(vote.committed && vote.leader_id.voted_for() == Some(self.id), Relaxed);
        Ok(())
    }

    /// Returns this member's vote as a leader as that of a candidate. openraft 0.9 would let a leader that restarts within its term
    /// resume its leadership, and answer reads as soon as the first entry of that term is applied, before the later entries that
    /// it acknowledged. A candidate has to be elected again, and its first entry follows all of them.
    async fn read_vote(&mut self) -> Result<Option<Vote<NodeId>>, RaftStorageError> {
        let vote: Option<Vote<NodeId>> = self.read("vote")?;
        Ok(vote.map(|vote| Vote {
            committed: vote.committed && vote.leader_id.voted_for() != Some(self.id),
            ..vote
        }))
    }

    // The commit index is not saved: at start the snapshot is applied, and the rest of the log when it is known to be committed.

    async fn append<I>(&mut self, entries: I, flushed: LogFlushed<Types>) -> Result<(), RaftStorageError>
    where
        I: IntoIterator<Item = RaftEntry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let encoded = entries.into_iter().map(|entry| Ok((entry.log_id.index, encode(&entry)?)));
        let encoded = encoded.collect::<Result<Vec<_>, _>>().map_err(writing)?;
        let written = if self.leads.load(Relaxed) {
            self.log.append_unflushed(encoded)
        } else {
            self.log.append(encoded).await
        };
        flushed.log_io_completed(written.map_err(io::Error::other));
        Ok(())
    }

    async fn truncate(&mut self, log_id: LogId<NodeId>) -> Result<(), RaftStorageError> {
        self.log.flushed_disk().await.and_then(|disk| disk.truncate(log_id.index)).map_err(writing)
    }

    async fn purge(&mut self, log_id: LogId<NodeId>) -> Result<(), RaftStorageError> {
        let purge = async { self.log.flushed_disk().await?.purge(log_id.index, &encode(&log_id)?) };
        purge.await.map_err(writing)
    }
}
