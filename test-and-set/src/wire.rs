//! The protocol of `raft://`, version 2: the bytes between clients and members, and between members.
//!
//! Everything runs inside TLS 1.3, in which both sides check the other's certificate against pinned copies. All numbers are
//! little-endian; bodies are the [postcard](https://postcard.jamesmunns.com/wire-format) encoding of the types in this module.
//!
//! ```text
//! greeting, once in each direction; the side that connected sends first
//!   offset 0   4 bytes   magic "VMTS"
//!          4   u16       the newest version that the side knows
//!          6   u16       the oldest
//!          8   u16       length of the body, at most 1024
//!         10   body      StoreHello (from the side that connected) or Welcome (the answer)
//!
//! frame, after the greetings
//!   offset 0   u32       length of the rest: 8 to FRAME_BYTES_MAX (members) or CLIENT_FRAME_BYTES_MAX (clients)
//!          4   u64       request number, chosen by the sender of the request and repeated in the response
//!         12   body      StoreRequest (client to member), StoreResponse (back); PeerAsk, PeerAnswer (between members)
//! ```
//!
//! Frames are those of the newest version that both sides know; sides without a common version part after the greetings. A
//! greeting is read alike by all versions, so a body may only get new fields, after its last one. A reader ignores what follows
//! the last field that it knows, and takes a field that is missing for zeros: `None`, 0, false or an empty list. A variant of an
//! enumeration is sent only to a side whose version has it.
//!
//! The requests of a connection may be answered in any order. A side that receives invalid bytes closes the connection. No
//! buffer is allocated by a length that the peer sent: it grows as bytes arrive, up to the bound.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::names::{ClusterName, CopyId, KeyId, PartyName, RunId, VmName};
use crate::record::{Command, CommandReply, VmRecord};
use crate::versions::{OURS, StoreVersions, tail};

/// The first bytes of every connection.
pub const MAGIC: [u8; 4] = *b"VMTS";
/// The longest body of a greeting, in bytes.
pub const GREETING_BYTES_MAX: u16 = 1024;
/// The longest frame between members, in bytes without its length field.
pub const FRAME_BYTES_MAX: u32 = 4 << 20;
/// The longest frame that a client may send, in bytes without its length field.
pub const CLIENT_FRAME_BYTES_MAX: u32 = 64 << 10;
/// The number of snapshot bytes in a full [`PeerRequest::Snapshot`].
pub const CHUNK_BYTES: usize = 1 << 20;
/// A page of a list ends with the record that reaches this many bytes.
pub const PAGE_BYTES: usize = 256 << 10;

/// The number of a member, as given by `--id`.
pub type NodeId = u64;

/// The greeting of the side that connected.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StoreHello {
    /// The cluster that it wants to reach.
    pub cluster: ClusterName,
    /// `None` for a client.
    pub member: Option<MemberHello>,
}

/// The part of a greeting in which a member introduces itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MemberHello {
    /// Its number.
    pub id: NodeId,
    /// The member that it wants to reach.
    pub to: NodeId,
    /// How far its data has come.
    pub mark: DataMark,
    /// What it remembers of the member that it wants to reach.
    pub remembers: Option<DataMark>,
}

/// How far a member's data has come: the last change of it that is on the disk. Every vote and every entry that the member
/// acknowledges is a change, so data with less than another member remembers is an old copy, or its disk has lost writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataMark {
    /// The id of the data directory. A member that has lost its data has another one, and must not vote as before.
    pub data: CopyId,
    /// The member's run in which the change was made. An old copy does not know later runs, however many changes it makes.
    pub run: RunId,
    /// The number of the change, counted from the first of the data.
    pub change: u64,
}

/// The greeting of the side that was connected to.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Welcome {
    /// The cluster that answers.
    pub cluster: ClusterName,
    /// The member that answers.
    pub id: NodeId,
    /// How far the data of the member that answers has come.
    pub mark: DataMark,
    /// What it remembers of the member that connected; `None` for a client.
    pub remembers: Option<DataMark>,
    /// Why it refuses the connection, which it then closes; `None` if it serves.
    pub refused: Option<ConnectionRefusal>,
}

/// Why a connection is refused after its greeting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConnectionRefusal {
    /// This is a member of another cluster.
    WrongCluster,
    /// This is another member than the requested one.
    WrongMember,
    /// The certificate does not belong to the member that the other side claims to be.
    NotThatMember,
    /// The member with this number had another data directory before: remove the member and add it again.
    DataReplaced,
    /// The member lacks what it has acknowledged: its data is an old copy, or its disk has lost writes.
    RolledBack,
    /// Too many clients are connected.
    Busy,
    /// The certificate is neither a host's nor an operator's, but perhaps a member's.
    NotAClient,
    /// The cluster has no member with this number: it was removed, or is not added yet.
    NotAMember,
}

/// A client's request.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum StoreRequest {
    /// Apply a command to a VM's record.
    Command(VmName, Command),
    /// Read the record of a VM.
    Get(VmName),
    /// List a page of the VMs whose names follow this one; `None` for the first page.
    List(Option<VmName>),
    /// Ask for the leader. Also keeps the connection open.
    Ping,
    /// Read the status of this node.
    Status,
    /// Add a member at this address.
    AddMember(NodeId, String),
    /// Remove a member.
    RemoveMember(NodeId),
    /// As [`StoreRequest::List`], of all VMs, the forgotten ones included. Only for operators.
    Export(Option<VmName>),
    /// Ask which host has this key.
    HostOf(KeyId),
}

/// A member's response to a client.
#[expect(clippy::large_enum_variant, reason = "few live at once, and most are records")]
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum StoreResponse {
    /// To [`StoreRequest::Command`].
    Reply(CommandReply),
    /// To [`StoreRequest::Get`].
    Record(Option<VmRecord>),
    /// To [`StoreRequest::List`] and [`StoreRequest::Export`].
    Page(Vec<(VmName, VmRecord)>),
    /// To [`StoreRequest::Ping`]: the leader's address, if there is one.
    Leader(Option<String>),
    /// To [`StoreRequest::Status`].
    Status(Box<NodeStatus>),
    /// To [`StoreRequest::AddMember`] and [`StoreRequest::RemoveMember`].
    MembersChanged,
    /// The request could not be answered.
    Failed(RequestFailure),
    /// To [`StoreRequest::HostOf`].
    Host(Option<PartyName>),
}

/// Why a member could not answer a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum RequestFailure {
    /// It is not the leader. The address is the leader's, if it knows one.
    #[error("not the leader")]
    NotLeader(Option<String>),
    /// It cannot reach a majority of the members.
    #[error("cannot reach a majority of the members")]
    NoQuorum,
    /// Its disk is full.
    #[error("its disk is full")]
    DiskFull,
    /// Its storage has failed.
    #[error("its storage has failed; see its log")]
    Stopped,
    /// The members cannot be changed as requested, and why.
    #[error("cannot change the members: {0}")]
    Members(String),
    /// The one that asks has not the role for it, and which role that is.
    #[error("{0}")]
    NotAllowed(String),
}

/// One node's view of the cluster.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its number.
    pub id: NodeId,
    /// Its cluster.
    pub cluster: ClusterName,
    /// `leader`, `leader without a majority`, `follower`, `candidate`, `learner` or `stopped`.
    pub role: String,
    /// The term it is in.
    pub term: u64,
    /// The leader it knows, which is not itself while it does not reach a majority.
    pub leader: Option<NodeId>,
    /// All members by number.
    pub members: BTreeMap<NodeId, MemberStatus>,
    /// The last index in its log.
    pub last_log_index: Option<u64>,
    /// The last index applied to its state.
    pub applied_index: Option<u64>,
    /// The last index in its snapshot.
    pub snapshot_index: Option<u64>,
    /// The last index purged from its log.
    pub purged_index: Option<u64>,
    /// The number of known VMs, including forgotten ones.
    pub vms: u64,
    /// The number of commands that it has answered as the leader.
    pub commands: u64,
    /// The median and the 99th percentile of the time they took, in microseconds.
    pub command_us: (u64, u64),
    /// The version of the format of its data.
    pub data_format: u32,
    /// The number of the last change of its data.
    pub change: u64,
    /// Free bytes on its disk.
    pub disk_free_bytes: u64,
    /// The size of its data files in bytes.
    pub data_bytes: u64,
    /// Whether the disk is too full to accept commands.
    pub disk_full: bool,
}

/// A member in a [`NodeStatus`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MemberStatus {
    /// Where it listens.
    pub address: String,
    /// Whether it votes.
    pub votes: bool,
    /// On the leader: the last index that this member is known to have.
    pub matched_index: Option<u64>,
    /// The last change of this member's data that the answering one remembers.
    pub remembered_change: Option<u64>,
}

/// What one member sends to another.
#[derive(Debug, Serialize, Deserialize)]
pub struct PeerAsk {
    /// How far the sender's data has come.
    pub mark: DataMark,
    /// What the sender remembers of all members that it knows.
    pub remembers: BTreeMap<NodeId, DataMark>,
    /// The request.
    pub request: PeerRequest,
}

/// What the other member answers.
#[derive(Debug, Serialize, Deserialize)]
pub struct PeerAnswer {
    /// How far the data of the member that answers has come.
    pub mark: DataMark,
    /// The response.
    pub response: PeerResponse,
}

/// A request from one member to another; the byte strings are messages of the Raft library.
#[derive(Debug, Serialize, Deserialize)]
pub enum PeerRequest {
    /// Append entries, or take note of a heartbeat.
    Append(Vec<u8>),
    /// Vote for the sender.
    Vote(Vec<u8>),
    /// Receive the next part of a snapshot. The first part has offset 0.
    Snapshot {
        /// The offset of these bytes in the snapshot, which must be the end of the previous part.
        offset: u64,
        /// At most [`CHUNK_BYTES`].
        bytes: Vec<u8>,
        /// In the last part only: the vote and the snapshot's metadata.
        finish: Option<Vec<u8>>,
    },
}

/// The response to a [`PeerRequest`].
#[derive(Debug, Serialize, Deserialize)]
pub enum PeerResponse {
    /// The Raft library's answer; for an incomplete snapshot only that the part has arrived.
    Done(Vec<u8>),
    /// The request could not be answered.
    Failed(RequestFailure),
}

/// Why a message could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The connection ended or failed.
    #[error("the connection ended: {0}")]
    Io(#[from] std::io::Error),
    /// The first bytes do not belong to this protocol: another program is at the other end.
    #[error("offset 0: magic is {0:02x?}, not \"VMTS\": another program is at the other end")]
    Magic([u8; 4]),
    /// The two sides have no version in common: replace the older of the two releases.
    #[error(
        "offset 4: the other side speaks {0} of the store's protocol and this one {OURS}, so they have none in common: replace \
         the older of the two releases"
    )]
    Versions(StoreVersions),
    /// A greeting is longer than 1024 bytes.
    #[error("offset 8: the greeting has a length of {0} bytes, but at most {GREETING_BYTES_MAX} are allowed")]
    Greeting(u16),
    /// A frame is shorter or longer than allowed.
    #[error("offset 0: the frame has a length of {length} bytes, but only 8 to {most} are allowed")]
    Length {
        /// The length that the frame declares.
        length: u32,
        /// The largest length allowed.
        most: u32,
    },
    /// A body is not a valid encoding.
    #[error("the body of a message is not valid: {0}")]
    Body(#[from] postcard::Error),
    /// Bytes follow the end of a body.
    #[error("{0} bytes follow the end of a message's body")]
    Tail(usize),
}

/// Decodes the body of a frame of this version, which must fill `bytes` exactly.
pub fn decode<T: DeserializeOwned>(version: u16, bytes: &[u8]) -> Result<T, WireError> {
    let (body, rest) = postcard::take_from_bytes(bytes)?;
    if rest == tail(version) { Ok(body) } else { Err(WireError::Tail(rest.len())) }
}

/// Writes a greeting.
pub async fn write_greeting(
    to: &mut (impl AsyncWrite + Unpin),
    body: &impl Serialize,
) -> Result<(), WireError> {
    let body = postcard::to_stdvec(body)?;
    let length = u16::try_from(body.len()).unwrap_or(u16::MAX);
    if length > GREETING_BYTES_MAX {
        return Err(WireError::Greeting(length));
    }
    let mut bytes = MAGIC.to_vec();
    bytes.extend([OURS.newest, OURS.oldest, length].into_iter().flat_map(u16::to_le_bytes));
    bytes.extend(body);
    to.write_all(&bytes).await?;
    Ok(to.flush().await?)
}

/// Reads a greeting. Returns the version to speak, and the body.
pub async fn read_greeting<T: DeserializeOwned>(
    from: &mut (impl AsyncRead + Unpin),
) -> Result<(u16, T), WireError> {
    let mut magic = [0; 4];
    from.read_exact(&mut magic).await?;
    if magic != MAGIC {
        return Err(WireError::Magic(magic));
    }
    let newest = from.read_u16_le().await?;
    // Before version 2 there was one version only, and something else followed it.
    let oldest = if newest < OURS.oldest { newest } else { from.read_u16_le().await? };
    let theirs = StoreVersions { newest, oldest };
    let version = OURS.common(theirs).ok_or(WireError::Versions(theirs))?;
    let length = from.read_u16_le().await?;
    if length > GREETING_BYTES_MAX {
        return Err(WireError::Greeting(length));
    }
    // Fields that an older release does not send are zeros.
    let mut body = vec![0; GREETING_BYTES_MAX.into()];
    from.read_exact(&mut body[..length.into()]).await?;
    let (body, _) = postcard::take_from_bytes(&body)?;
    Ok((version, body))
}

/// Encodes a frame of this version with this request number.
pub fn frame(version: u16, number: u64, body: &impl Serialize) -> Result<Vec<u8>, WireError> {
    let mut bytes = postcard::to_extend(body, vec![0; 12])?;
    bytes.extend(tail(version));
    let length = u32::try_from(bytes.len() - 4).unwrap_or(u32::MAX);
    if length > FRAME_BYTES_MAX {
        return Err(WireError::Length { length, most: FRAME_BYTES_MAX });
    }
    bytes[..4].copy_from_slice(&length.to_le_bytes());
    bytes[4..12].copy_from_slice(&number.to_le_bytes());
    Ok(bytes)
}

/// Reads the length field of a frame; returns `None` if the connection ended before it.
pub async fn read_length(from: &mut (impl AsyncRead + Unpin), most: u32) -> Result<Option<u32>, WireError> {
    let mut head = [0; 4];
    if from.read(&mut head[..1]).await? == 0 {
        return Ok(None);
    }
    from.read_exact(&mut head[1..]).await?;
    let length = u32::from_le_bytes(head);
    if (8..=most).contains(&length) { Ok(Some(length)) } else { Err(WireError::Length { length, most }) }
}

/// Reads the rest of a frame after its length field: the request number and the body.
pub async fn read_rest(
    from: &mut (impl AsyncRead + Unpin),
    length: u32,
) -> Result<(u64, Vec<u8>), WireError> {
    let number = from.read_u64_le().await?;
    let most = u64::from(length) - 8;
    let mut body = Vec::with_capacity(most.min(4096) as usize);
    let got = from.take(most).read_to_end(&mut body).await?;
    if got as u64 == most {
        Ok((number, body))
    } else {
        Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into())
    }
}

#[cfg(test)]
mod tests;
