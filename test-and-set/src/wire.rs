//! The bytes between clients, members and servers of `raft://`, version 1.
//!
//! Everything runs inside TLS 1.3 with both certificates pinned. All numbers are little-endian; bodies are
//! [postcard](https://postcard.jamesmunns.com/wire-format) of the types in this module.
//!
//! ```text
//! greeting, once in each direction, the side that connected first
//!   offset 0   4 bytes   magic "VMTS"
//!          4   u16       version, 1
//!          6   u16       length of the body, at most 1024
//!          8   body      Hello (from the side that connected) or Welcome
//!
//! frame, from then on
//!   offset 0   u32       length of the rest: 8 to FRAME_BYTES_MAX (members) or CLIENT_FRAME_BYTES_MAX (clients)
//!          4   u64       request number, chosen by the asker; the response carries the same
//!         12   body      a client's Ask or the Answer to it; between members a PeerAsk or a PeerAnswer
//! ```
//!
//! Requests of one connection are answered in any order. A side that finds a fault in what it receives closes the connection.
//! Nothing is allocated by a number that the peer sent: a buffer grows as bytes arrive, up to the bound.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::names::{ClusterName, CopyId, VmName};
use crate::record::{Command, Record, Reply};

/// First bytes of every connection.
pub const MAGIC: [u8; 4] = *b"VMTS";
/// The version of this module's bytes.
pub const VERSION: u16 = 1;
/// Longest body of a greeting, in bytes.
pub const GREETING_BYTES_MAX: u16 = 1024;
/// Longest frame between members, in bytes without its length field.
pub const FRAME_BYTES_MAX: u32 = 4 << 20;
/// Longest frame that a client may send, in bytes without its length field.
pub const CLIENT_FRAME_BYTES_MAX: u32 = 64 << 10;
/// Snapshot bytes in one [`PeerAsk::Snapshot`].
pub const CHUNK_BYTES: usize = 1 << 20;
/// A page of a list ends with the record that reaches this many bytes.
pub const PAGE_BYTES: usize = 256 << 10;

/// The number of a member, given by `--id`.
pub type NodeId = u64;

/// What the side that connected says first.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Hello {
    /// The cluster it wants.
    pub cluster: ClusterName,
    /// `None` for a client.
    pub member: Option<MemberHello>,
}

/// How a member introduces itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MemberHello {
    /// Its number.
    pub id: NodeId,
    /// The id of its data directory: a member that lost it must not vote as the one it was.
    pub data: CopyId,
    /// The member that it wants to reach.
    pub to: NodeId,
}

/// The answer to [`Hello`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Welcome {
    /// The cluster that answers.
    pub cluster: ClusterName,
    /// The member that answers.
    pub id: NodeId,
    /// The data directory of the member that answers.
    pub data: CopyId,
    /// Why it will not serve; the connection closes then.
    pub refused: Option<Unwelcome>,
}

/// Why a connection is refused after its greeting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unwelcome {
    /// Another cluster answers here.
    WrongCluster,
    /// Another member answers here than the one that was wanted.
    WrongMember,
    /// The certificate is not that of the member it claims to be.
    NotThatMember,
    /// This member number has had another data directory: remove the member and add it anew.
    DataReplaced,
    /// Too many clients are connected.
    Busy,
}

/// A client's question.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Ask {
    /// Apply a command to a VM's record.
    Command(VmName, Command),
    /// The record of a VM.
    Get(VmName),
    /// A page of the VMs behind this one.
    List(Option<VmName>),
    /// Who leads? Keeps the connection warm.
    Ping,
    /// The state of the node asked.
    Status,
    /// Add a member at this address.
    AddMember(NodeId, String),
    /// Remove a member.
    RemoveMember(NodeId),
}

/// A server's answer to a client.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Answer {
    /// To [`Ask::Command`].
    Reply(Reply),
    /// To [`Ask::Get`].
    Record(Option<Record>),
    /// To [`Ask::List`].
    Page(Vec<(VmName, Record)>),
    /// To [`Ask::Ping`]: the leader's address, if there is one.
    Leader(Option<String>),
    /// To [`Ask::Status`].
    Status(Box<Status>),
    /// To [`Ask::AddMember`] and [`Ask::RemoveMember`].
    MembersChanged,
    /// Nothing can be said about what was asked.
    Failed(Failure),
}

/// Why a server has no answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Failure {
    /// Ask the leader at this address.
    #[error("not the leader")]
    NotLeader(Option<String>),
    /// No majority can be reached.
    #[error("no majority of the members can be reached")]
    NoQuorum,
    /// Its disk is full.
    #[error("the disk is full")]
    DiskFull,
    /// Its storage has failed.
    #[error("the storage has failed; see the node's log")]
    Stopped,
    /// The members cannot be changed so, and why.
    #[error("the members cannot be changed: {0}")]
    Members(String),
}

/// One node's view of the cluster.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    /// Its number.
    pub id: NodeId,
    /// Its cluster.
    pub cluster: ClusterName,
    /// `leader`, `follower`, `candidate`, `learner` or `stopped`.
    pub role: String,
    /// The term it is in.
    pub term: u64,
    /// The leader it knows.
    pub leader: Option<NodeId>,
    /// All members by number, with their addresses, and whether they vote.
    pub members: BTreeMap<NodeId, MemberStatus>,
    /// Last index in its log.
    pub last_log_index: Option<u64>,
    /// Last index applied to its state.
    pub applied_index: Option<u64>,
    /// Last index in its snapshot.
    pub snapshot_index: Option<u64>,
    /// Last index purged from its log.
    pub purged_index: Option<u64>,
    /// VMs known, the forgotten ones included.
    pub vms: u64,
    /// Commands it answered as the leader.
    pub commands: u64,
    /// Of these, half took at most this many microseconds, and 99 in 100 at most the second number.
    pub command_us: (u64, u64),
    /// Free bytes on its disk.
    pub disk_free_bytes: u64,
    /// Bytes of its data files.
    pub data_bytes: u64,
    /// Whether the disk is too full to take commands.
    pub disk_full: bool,
}

/// A member as a [`Status`] shows it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MemberStatus {
    /// Where it listens.
    pub address: String,
    /// Whether it votes.
    pub votes: bool,
    /// On the leader: the last index that this member is known to hold.
    pub matched_index: Option<u64>,
}

/// What members ask each other; the bytes are those of the Raft library.
#[derive(Debug, Serialize, Deserialize)]
pub enum PeerAsk {
    /// Append entries, or a heartbeat.
    Append(Vec<u8>),
    /// Request a vote.
    Vote(Vec<u8>),
    /// The next part of a snapshot; the first has offset 0.
    Snapshot {
        /// Where these bytes belong; must be where the last part ended.
        offset: u64,
        /// At most [`CHUNK_BYTES`].
        bytes: Vec<u8>,
        /// In the last part: the vote and the description of the snapshot.
        finish: Option<Vec<u8>>,
    },
}

/// The answer to [`PeerAsk`].
#[derive(Debug, Serialize, Deserialize)]
pub enum PeerAnswer {
    /// The Raft library's bytes; empty while a snapshot is not complete.
    Done(Vec<u8>),
    /// It could not be done here.
    Failed(Failure),
}

/// What is wrong with bytes that were received.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The connection ended or failed.
    #[error("the connection ended: {0}")]
    Io(#[from] std::io::Error),
    /// Something else listens there: the first bytes are not ours.
    #[error("offset 0: magic is {0:02x?}, not \"VMTS\": something else is at the other end")]
    Magic([u8; 4]),
    /// The other side speaks another version: use the same release on both.
    #[error("offset 4: the other side speaks version {0}, this one {VERSION}: use the same release on both")]
    Version(u16),
    /// A greeting is longer than 1024 bytes.
    #[error("offset 6: a greeting of {0} bytes, at most {GREETING_BYTES_MAX} are allowed")]
    Greeting(u16),
    /// A frame is shorter or longer than allowed.
    #[error("offset 0: a frame of {length} bytes, 8 to {most} are allowed")]
    Length {
        /// What the frame says.
        length: u32,
        /// What is allowed.
        most: u32,
    },
    /// A body is not what it should be.
    #[error("the body is not valid: {0}")]
    Body(#[from] postcard::Error),
    /// A body has bytes behind its end.
    #[error("{0} bytes follow the end of the body")]
    Tail(usize),
}

/// Encodes a body.
pub fn encode(body: &impl Serialize) -> Result<Vec<u8>, WireError> {
    Ok(postcard::to_stdvec(body)?)
}

/// Decodes a body; every byte must belong to it.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, WireError> {
    let (body, rest) = postcard::take_from_bytes(bytes)?;
    if rest.is_empty() { Ok(body) } else { Err(WireError::Tail(rest.len())) }
}

/// Writes a greeting.
pub async fn write_greeting(
    to: &mut (impl AsyncWrite + Unpin),
    body: &impl Serialize,
) -> Result<(), WireError> {
    let body = encode(body)?;
    let length = u16::try_from(body.len()).unwrap_or(u16::MAX);
    if length > GREETING_BYTES_MAX {
        return Err(WireError::Greeting(length));
    }
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(length.to_le_bytes());
    bytes.extend(body);
    to.write_all(&bytes).await?;
    Ok(to.flush().await?)
}

/// Reads a greeting.
pub async fn read_greeting<T: DeserializeOwned>(from: &mut (impl AsyncRead + Unpin)) -> Result<T, WireError> {
    let mut head = [0; 8];
    from.read_exact(&mut head).await?;
    let [m0, m1, m2, m3, v0, v1, l0, l1] = head;
    let (magic, version, length) =
        ([m0, m1, m2, m3], u16::from_le_bytes([v0, v1]), u16::from_le_bytes([l0, l1]));
    if magic != MAGIC {
        return Err(WireError::Magic(magic));
    }
    if version != VERSION {
        return Err(WireError::Version(version));
    }
    if length > GREETING_BYTES_MAX {
        return Err(WireError::Greeting(length));
    }
    let mut body = vec![0; length.into()];
    from.read_exact(&mut body).await?;
    decode(&body)
}

/// Encodes a frame.
pub fn frame(number: u64, body: &impl Serialize) -> Result<Vec<u8>, WireError> {
    let mut bytes = postcard::to_extend(body, vec![0; 12])?;
    let length = u32::try_from(bytes.len() - 4).unwrap_or(u32::MAX);
    if length > FRAME_BYTES_MAX {
        return Err(WireError::Length { length, most: FRAME_BYTES_MAX });
    }
    bytes[..4].copy_from_slice(&length.to_le_bytes());
    bytes[4..12].copy_from_slice(&number.to_le_bytes());
    Ok(bytes)
}

/// Reads the length field of a frame; `None` if the connection ended before it.
pub async fn read_length(from: &mut (impl AsyncRead + Unpin), most: u32) -> Result<Option<u32>, WireError> {
    let mut head = [0; 4];
    if from.read(&mut head[..1]).await? == 0 {
        return Ok(None);
    }
    from.read_exact(&mut head[1..]).await?;
    let length = u32::from_le_bytes(head);
    if (8..=most).contains(&length) { Ok(Some(length)) } else { Err(WireError::Length { length, most }) }
}

/// Reads the rest of a frame whose length field was read: its number and body.
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
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
    }

    #[test]
    fn a_frame_reads_back() {
        let bytes = frame(7, &Ask::Get("vm".parse().unwrap())).unwrap();
        let mut from = &bytes[..];
        let (number, body) = block_on(async {
            let length = read_length(&mut from, CLIENT_FRAME_BYTES_MAX).await.unwrap().unwrap();
            read_rest(&mut from, length).await.unwrap()
        });
        assert_eq!(number, 7);
        assert!(matches!(decode(&body), Ok(Ask::Get(vm)) if vm.as_str() == "vm"));
    }

    /// The bytes of version 1, as the module's page describes them.
    #[test]
    fn the_bytes_are_those_of_the_page() {
        assert_eq!(frame(0x0102, &Ask::Ping).unwrap(), [9, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 3]);
        let hello = Hello { cluster: "c".parse().unwrap(), member: None };
        let mut bytes = vec![];
        block_on(write_greeting(&mut bytes, &hello)).unwrap();
        assert_eq!(bytes, [b'V', b'M', b'T', b'S', 1, 0, 3, 0, 1, b'c', 0]);
    }

    #[test]
    fn faults_are_named() {
        let read = |bytes: &[u8]| block_on(read_length(&mut &bytes[..], 64)).map_err(|e| e.to_string());
        assert_eq!(read(&[]), Ok(None));
        assert_eq!(read(&[65, 0, 0, 0]).unwrap_err(), "offset 0: a frame of 65 bytes, 8 to 64 are allowed");
        assert_eq!(read(&[7, 0, 0, 0]).unwrap_err(), "offset 0: a frame of 7 bytes, 8 to 64 are allowed");
        assert!(matches!(
            block_on(read_greeting::<Hello>(&mut &b"GET / HTTP/1.1"[..])),
            Err(WireError::Magic(_))
        ));
        assert!(matches!(
            block_on(read_greeting::<Hello>(&mut &b"VMTS\x02\0\0\0"[..])),
            Err(WireError::Version(2))
        ));
        assert!(matches!(decode::<Ask>(&[3, 0]), Err(WireError::Tail(1))));
    }

    proptest! {
        #[test]
        fn decoding_is_total(bytes: Vec<u8>) {
            // Whatever comes, there is an answer and no panic; what decodes encodes to something that decodes again.
            if let Ok(ask) = decode::<Ask>(&bytes) {
                prop_assert!(decode::<Ask>(&encode(&ask).unwrap()).is_ok());
            }
            drop(decode::<Answer>(&bytes));
            drop(decode::<PeerAsk>(&bytes));
            drop(block_on(read_greeting::<Hello>(&mut &bytes[..])));
        }
    }
}
