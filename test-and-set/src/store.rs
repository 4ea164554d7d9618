//! The trait that every store implements, and its errors.

use std::time::{Duration, Instant};

use async_trait::async_trait;

pub use crate::chain::chain;
use crate::connection::ConnectionError;
use crate::keys::KeysError;
use crate::names::{Generation, Incarnation, KeyId, PartyName, VmName};
use crate::record::{Applied, Command, CommandReply, Members, Refusal, Verdict, VmRecord};
use crate::url::UrlError;
use crate::wire::StoreResponse;
use crate::zookeeper_error::ZooKeeperError;

/// The largest number of records in a page of [`TestAndSet::list`].
pub const PAGE_RECORDS_MAX: usize = 500;

/// A linearizable store of VM records, in which every command may be repeated.
///
/// Every call ends at its deadline. An error means *unknown*, never *no*: the command may have been applied. Implementations
/// retry until the deadline, so a caller repeats a call only to wait longer.
#[async_trait]
pub trait TestAndSet: Send + Sync {
    /// Applies a command to a VM's record, as [`crate::record::decide`] defines.
    async fn command(
        &self,
        vm: &VmName,
        command: &Command,
        deadline: Instant,
    ) -> Result<CommandReply, StoreError>;

    /// The record of a VM, forgotten or not.
    async fn get(&self, vm: &VmName, deadline: Instant) -> Result<Option<VmRecord>, StoreError>;

    /// A page of the VMs that are not forgotten, in the order of their names, starting after `after`. An empty page is the end; a
    /// page has at most [`PAGE_RECORDS_MAX`] records. The records of a page may have been read at different moments.
    async fn list(
        &self,
        after: Option<&VmName>,
        deadline: Instant,
    ) -> Result<Vec<(VmName, VmRecord)>, StoreError>;

    /// The host that has this key; `None` also in a store without roles.
    async fn host_of(&self, _key: KeyId, _deadline: Instant) -> Result<Option<PartyName>, StoreError> {
        Ok(None)
    }

    /// Takes the generation for `who`, if `who` is a member of it and nobody has taken it.
    async fn take(
        &self,
        vm: &VmName,
        generation: Generation,
        who: Incarnation,
        deadline: Instant,
    ) -> Verdict<StoreError> {
        match self.command(vm, &Command::Take { generation, who }, deadline).await {
            Ok(CommandReply::Refused(refusal)) => Verdict::Unknown(StoreError::Refused(refusal)),
            Ok(reply) => Verdict::try_from(reply).unwrap_or_else(|reply| Verdict::Unknown(unfitting(reply))),
            Err(error) => Verdict::Unknown(error),
        }
    }

    /// Opens a generation for a new pair, from the host of its primary. The first generation of a VM can be opened by any host, the
    /// next one after its end by its hosts, and any other only by the holder of the previous one, which becomes the primary.
    async fn open(
        &self,
        vm: &VmName,
        generation: Generation,
        members: &Members,
        deadline: Instant,
    ) -> Result<Applied, StoreError> {
        applied(self.command(vm, &Command::Open { generation, members: members.clone() }, deadline).await?)
    }

    /// Records that the VM's run is over, for `who`: the VM can be opened again by its hosts.
    async fn end(
        &self,
        vm: &VmName,
        generation: Generation,
        who: Incarnation,
        deadline: Instant,
    ) -> Result<Applied, StoreError> {
        applied(self.command(vm, &Command::End { generation, who }, deadline).await?)
    }

    /// Forgets a VM and its hosts, if this is its current generation. The store keeps the number and the newest disks. Only for
    /// operators.
    async fn forget(
        &self,
        vm: &VmName,
        generation: Generation,
        deadline: Instant,
    ) -> Result<Applied, StoreError> {
        applied(self.command(vm, &Command::Forget { generation }, deadline).await?)
    }
}

fn applied(reply: CommandReply) -> Result<Applied, StoreError> {
    match reply {
        CommandReply::Refused(refusal) => Err(StoreError::Refused(refusal)),
        reply => Applied::try_from(reply).map_err(unfitting),
    }
}

fn unfitting(reply: CommandReply) -> StoreError {
    StoreResponse::Reply(reply).unfitting()
}

/// What each request is answered with.
impl StoreResponse {
    pub(crate) fn into_reply(self) -> Result<CommandReply, StoreError> {
        match self {
            StoreResponse::Reply(reply) => Ok(reply),
            other => Err(other.unfitting()),
        }
    }

    pub(crate) fn into_record(self) -> Result<Option<VmRecord>, StoreError> {
        match self {
            StoreResponse::Record(record) => Ok(record),
            other => Err(other.unfitting()),
        }
    }

    pub(crate) fn into_host(self) -> Result<Option<PartyName>, StoreError> {
        match self {
            StoreResponse::Host(host) => Ok(host),
            other => Err(other.unfitting()),
        }
    }

    pub(crate) fn into_page(self) -> Result<Vec<(VmName, VmRecord)>, StoreError> {
        match self {
            StoreResponse::Page(page) => Ok(page),
            other => Err(other.unfitting()),
        }
    }

    pub(crate) fn unfitting(self) -> StoreError {
        StoreError::Unfitting(Box::new(self))
    }
}

/// Why the store gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The store's URL is invalid: correct it.
    #[error("the store's URL is invalid")]
    Url(#[from] UrlError),
    /// The keys cannot be used: correct them.
    #[error("cannot use the keys for the store")]
    Keys(#[from] KeysError),
    /// No node answered in time: ask again. `nodes` says what each node did instead.
    #[error("no answer from the store within {waited:?}: {}", NodeErrors(.nodes))]
    NoAnswer {
        /// How long the call waited.
        waited: Duration,
        /// The last failure of each node that was asked, by address.
        nodes: Vec<(String, NodeError)>,
    },
    /// No node can serve this client: correct the URL, the keys or the program's version.
    #[error("no node of the store can serve this client: {}; correct the URL, the keys or the release", NodeErrors(.0))]
    Unusable(Vec<(String, NodeError)>),
    /// The store's disk is full, and it accepts no more commands; earlier answers stay valid. Free space on that node.
    #[error("the disk of store node {0} is full: free space on it")]
    DiskFull(String),
    /// The file with the user of an etcd or a ZooKeeper cannot be used: correct it.
    #[error("cannot use {path} for the store: {why}")]
    UserFile {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The record in etcd or ZooKeeper was not written by vmft.
    #[error(
        "cannot read the record of VM {vm}: another program wrote it; give vmft its own prefix in the store's URL"
    )]
    Foreign {
        /// The VM of the record.
        vm: VmName,
        /// Why it cannot be decoded.
        source: postcard::Error,
    },
    /// The record cannot be encoded.
    #[error("cannot encode the record")]
    Encode(#[source] postcard::Error),
    /// The command is invalid, or not for the one that asks.
    #[error("the store refuses the command")]
    Refused(#[source] Refusal),
    /// This client has not the role for what it asks.
    #[error("the store does not allow it: {0}")]
    NotAllowed(String),
    /// The requested change of the store's members is not possible.
    #[error("cannot change the members of the store: {0}")]
    Members(String),
    /// The store's answer does not fit the request: client and server disagree about the protocol.
    #[error("the store's answer {0:?} does not fit the request: use the same release on client and server")]
    Unfitting(Box<StoreResponse>),
    /// The client's thread cannot be started.
    #[error("cannot start the thread of the store's client")]
    Thread(#[source] std::io::Error),
    /// The client's thread has ended.
    #[error("the thread of the store's client has ended")]
    Stopped,
    /// The store's client is in a process of its own, which says why there is no answer.
    #[error("{0}")]
    Kept(String),
    /// The process with the store's client has ended: start this replica again.
    #[error("the process with the client of the store is lost; start this replica again")]
    KeeperLost,
}

/// What one node of a store did instead of answering.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The connection failed.
    #[error("{0}")]
    Link(#[from] ConnectionError),
    /// It is not the leader. The address is the leader's, if it knows one.
    #[error("not the leader{}", .0.as_ref().map(|at| format!(", which is {at}")).unwrap_or_default())]
    NotLeader(Option<String>),
    /// It is the leader, but cannot reach a majority of the members.
    #[error("cannot reach a majority of the members")]
    NoQuorum,
    /// Its disk is full.
    #[error("its disk is full")]
    DiskFull,
    /// It cannot make the requested change of members.
    #[error("cannot change the members: {0}")]
    Members(String),
    /// The client has not the role for what it asks.
    #[error("{0}")]
    NotAllowed(String),
    /// Its storage has failed; an operator has to look at it.
    #[error("its storage has failed; see its log")]
    Failed,
    /// etcd's answer.
    #[error("etcd: {0}")]
    Etcd(Box<tonic::Status>),
    /// The connection to etcd failed.
    #[error("etcd: {}", chain(.0))]
    EtcdTransport(#[from] tonic::transport::Error),
    /// ZooKeeper's answer.
    #[error("ZooKeeper: {0}")]
    ZooKeeper(#[from] ZooKeeperError),
    /// It did not answer in time.
    #[error("no answer in time")]
    Silent,
}

impl NodeError {
    /// Whether this node will fail in the same way until an operator corrects something.
    pub(crate) fn is_lasting(&self) -> bool {
        matches!(self, NodeError::Link(link) if link.is_lasting())
    }
}

struct NodeErrors<'a>(&'a [(String, NodeError)]);

impl std::fmt::Display for NodeErrors<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.is_empty() {
            return f.write_str("no node was asked in that time");
        }
        for (i, (node, error)) in self.0.iter().enumerate() {
            write!(f, "{}{node}: {error}", if i == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}
