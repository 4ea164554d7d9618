//! The types with which openraft is instantiated, and the encoding of what is stored.

use std::io::Cursor;

use openraft::error::{ClientWriteError, RaftError};
use openraft::{BasicNode, SnapshotMeta, StorageError, StorageIOError, StoredMembership};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::names::VmName;
use crate::record::{Asker, Command, CommandReply};
use crate::server::audit::AuditNote;
use crate::server::disk_error::DiskError;
use crate::wire::NodeId;

/// What the log's entries say.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum LoggedRequest {
    /// A change to a VM's record.
    Command(VmCommand),
    /// Something for the audit, which changes nothing.
    Note(AuditNote),
}

/// A command, as the leader puts it into the log.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VmCommand {
    /// The VM whose record it changes.
    pub vm: VmName,
    /// The change.
    pub command: Command,
    /// Who asked for it.
    pub asker: Option<Asker>,
    /// How many VM names the host that asks may have, by the leader's settings.
    pub names_max: u64,
}

openraft::declare_raft_types!(
    /// The types with which openraft is instantiated.
    pub Types: D = LoggedRequest, R = CommandReply, Node = BasicNode
);

pub type RaftEntry = openraft::Entry<Types>;
pub type RaftMembership = StoredMembership<NodeId, BasicNode>;
pub type RaftSnapshotMeta = SnapshotMeta<NodeId, BasicNode>;
pub type RaftStorageError = StorageError<NodeId>;
pub type RaftWriteError = RaftError<NodeId, ClientWriteError<NodeId, BasicNode>>;

/// The encoding of entries, snapshots and votes, which stands before each of them, on the disk and in requests to other members.
///
/// Members of two releases share a log while they are upgraded, and each must be able to go back to the release before. So a
/// release that reads a new encoding, or applies a new [`Command`], does not write it yet: that is for the release after it. What
/// a command does to a record never changes; what is to be done otherwise is a new command.
const ENCODING: u8 = 1;

pub fn encode(value: &impl Serialize) -> Result<Vec<u8>, DiskError> {
    postcard::to_extend(value, vec![ENCODING]).map_err(|source| DiskError::Decode { what: "value", source })
}

pub fn decode<T: DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, DiskError> {
    let (encoding, value) = bytes.split_first().ok_or(DiskError::Encoding { what, found: None })?;
    if *encoding != ENCODING {
        return Err(DiskError::Encoding { what, found: Some(*encoding) });
    }
    postcard::from_bytes(value).map_err(|source| DiskError::Decode { what, source })
}

pub fn reading(error: DiskError) -> RaftStorageError {
    StorageIOError::read(&error).into()
}

pub fn writing(error: DiskError) -> RaftStorageError {
    StorageIOError::write(&error).into()
}
