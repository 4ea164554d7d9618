//! The state machine and its snapshots, behind openraft's traits.

use std::io::Cursor;
use std::sync::{Arc, RwLock};

use openraft::storage::RaftStateMachine;
use openraft::{
    EntryPayload, LogId, OptionalSend, RaftSnapshotBuilder, Snapshot, StorageIOError, StoredMembership,
};

use super::types::{
    LoggedRequest, RaftEntry, RaftMembership, RaftSnapshotMeta, RaftStorageError, Types, VmCommand, decode,
    encode, reading, writing,
};
use crate::record::CommandReply;
use crate::server::audit::Audit;
use crate::server::disk::MemberDisk;
use crate::server::disk_error::DiskError;
use crate::server::peers::OtherMembers;
use crate::server::raft_log::RaftLog;
use crate::state::StoreState;
use crate::wire::NodeId;

/// The state, and the last entry of the log that was applied to it.
#[derive(Default)]
pub struct AppliedState {
    pub state: StoreState,
    last: Option<LogId<NodeId>>,
    membership: RaftMembership,
}

/// The state machine: applies the store's rule in log order.
#[derive(Clone)]
pub struct StoreMachine {
    applied: Arc<RwLock<AppliedState>>,
    log: Arc<RaftLog>,
    disk: Arc<MemberDisk>,
    peers: Arc<OtherMembers>,
    audit: Audit,
}

impl StoreMachine {
    pub fn load(
        log: Arc<RaftLog>,
        disk: Arc<MemberDisk>,
        peers: Arc<OtherMembers>,
        audit: Audit,
    ) -> Result<Self, DiskError> {
        let mut applied = AppliedState::default();
        if let Some(stored) = disk.snapshot()? {
            let meta: RaftSnapshotMeta = decode("snapshot's metadata", &stored.meta)?;
            applied = AppliedState {
                state: decode("snapshot", &stored.state)?,
                last: meta.last_log_id,
                membership: meta.last_membership,
            };
        }
        Ok(Self { applied: Arc::new(RwLock::new(applied)), log, disk, peers, audit })
    }

    pub fn applied(&self) -> std::sync::RwLockReadGuard<'_, AppliedState> {
        self.applied.read().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn applied_mut(&self) -> std::sync::RwLockWriteGuard<'_, AppliedState> {
        self.applied.write().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Forgets the data of members that were removed, because they may be added again with other data.
    fn forget_removed(&self, before: &RaftMembership, now: &RaftMembership) -> Result<(), RaftStorageError> {
        let gone = before.nodes().filter(|(id, _)| now.membership().get_node(id).is_none());
        gone.map(|(id, _)| *id).try_for_each(|id| self.peers.forget(id)).map_err(writing)
    }
}

impl RaftStateMachine<Types> for StoreMachine {
    type SnapshotBuilder = Self;

    async fn applied_state(&mut self) -> Result<(Option<LogId<NodeId>>, RaftMembership), RaftStorageError> {
        let applied = self.applied();
        Ok((applied.last, applied.membership.clone()))
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<CommandReply>, RaftStorageError>
    where
        I: IntoIterator<Item = RaftEntry> + OptionalSend,
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
                EntryPayload::Blank => CommandReply::Done,
                EntryPayload::Normal(LoggedRequest::Command(request)) => {
                    let VmCommand { vm, command, asker, names_max } = &request;
                    let reply = applied.state.apply_within(*names_max, vm, command, asker.as_ref());
                    if let Some(asker) = asker {
                        self.audit.command(entry.log_id.index, asker, vm, command, &reply);
                    }
                    reply
                }
                EntryPayload::Normal(LoggedRequest::Note(note)) => {
                    self.audit.note(entry.log_id.index, &note);
                    CommandReply::Done
                }
                EntryPayload::Membership(membership) => {
                    let membership = StoredMembership::new(Some(entry.log_id), membership);
                    self.forget_removed(&applied.membership, &membership)?;
                    applied.membership = membership;
                    CommandReply::Done
                }
            });
        }
        Ok(replies)
    }

    async fn get_snapshot_builder(&mut self) -> Self {
        self.clone()
    }

    async fn begin_receiving_snapshot(&mut self) -> Result<Box<Cursor<Vec<u8>>>, RaftStorageError> {
        Ok(Box::default())
    }

    async fn install_snapshot(
        &mut self,
        meta: &RaftSnapshotMeta,
        snapshot: Box<Cursor<Vec<u8>>>,
    ) -> Result<(), RaftStorageError> {
        let state = decode("snapshot", snapshot.get_ref()).map_err(reading)?;
        encode(meta).and_then(|meta| self.disk.put_snapshot(&meta, snapshot.get_ref())).map_err(writing)?;
        let new = AppliedState { state, last: meta.last_log_id, membership: meta.last_membership.clone() };
        let old = std::mem::replace(&mut *self.applied_mut(), new);
        self.forget_removed(&old.membership, &meta.last_membership)
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot<Types>>, RaftStorageError> {
        let Some(stored) = self.disk.snapshot().map_err(reading)? else { return Ok(None) };
        let meta = decode("snapshot's metadata", &stored.meta).map_err(reading)?;
        Ok(Some(Snapshot { meta, snapshot: Box::new(Cursor::new(stored.state)) }))
    }
}

impl RaftSnapshotBuilder<Types> for StoreMachine {
    async fn build_snapshot(&mut self) -> Result<Snapshot<Types>, RaftStorageError> {
        let machine = self.clone();
        let build = move || {
            let (meta, state) = {
                let applied = machine.applied();
                let id = format!("{}-{:08x}", applied.last.map_or(0, |l| l.index), rand::random::<u32>());
                let (last_log_id, last_membership) = (applied.last, applied.membership.clone());
                (RaftSnapshotMeta { last_log_id, last_membership, snapshot_id: id }, encode(&applied.state)?)
            };
            machine.disk.put_snapshot(&encode(&meta)?, &state)?;
            Ok(Snapshot { meta, snapshot: Box::new(Cursor::new(state)) })
        };
        let built = tokio::task::spawn_blocking(build).await;
        built.map_err(|e| StorageIOError::write_snapshot(None, &e))?.map_err(writing)
    }
}
