//! The trait that every store implements, its answers and its errors.

use std::time::{Duration, Instant};

use async_trait::async_trait;

use crate::keys::KeysError;
use crate::link::LinkError;
use crate::names::{Generation, Incarnation, VmName};
use crate::record::{Command, Members, Record, Refusal, Reply};
use crate::url::UrlError;
use crate::wire::Answer;

/// Most records in one page of [`TestAndSet::list`].
pub const PAGE_RECORDS_MAX: usize = 500;

/// Who lives.
#[derive(Debug)]
pub enum Verdict {
    /// The one who asked holds the generation.
    Won,
    /// This other one holds it: halt, and never output again.
    Lost(Incarnation),
    /// Not a member, or not the current generation. Nothing was changed.
    Stale,
    /// No answer: the command may or may not have been done. Stay silent and ask again.
    Unknown(StoreError),
}

/// The answer to [`TestAndSet::open`] and [`TestAndSet::forget`].
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is so now.
    Done,
    /// The record has moved on, or belongs to somebody else. Nothing was changed.
    Stale,
}

/// A store of verdicts: linearizable, and every command may be repeated.
///
/// Every call ends at its deadline. An error means *unknown*, never *no*: what was asked may have been done. The
/// implementations retry inside the deadline, so a caller only repeats a call to wait longer.
#[async_trait]
pub trait TestAndSet: Send + Sync {
    /// Applies a command to a VM's record, as [`crate::record::decide`] defines.
    async fn command(&self, vm: &VmName, command: &Command, deadline: Instant) -> Result<Reply, StoreError>;

    /// The record of a VM, forgotten or not.
    async fn get(&self, vm: &VmName, deadline: Instant) -> Result<Option<Record>, StoreError>;

    /// A page of the VMs that are not forgotten, in the order of their names, from behind `after` on. An empty page is the end; a page
    /// has at most [`PAGE_RECORDS_MAX`] records. Records of one page may be of different moments.
    async fn list(
        &self,
        after: Option<&VmName>,
        deadline: Instant,
    ) -> Result<Vec<(VmName, Record)>, StoreError>;

    /// Takes the generation for `who`, if `who` is a member of it and nobody has taken it.
    async fn take(
        &self,
        vm: &VmName,
        generation: Generation,
        who: Incarnation,
        deadline: Instant,
    ) -> Verdict {
        match self.command(vm, &Command::Take { generation, who }, deadline).await {
            Ok(Reply::Won) => Verdict::Won,
            Ok(Reply::Lost(holder)) => Verdict::Lost(holder),
            Ok(Reply::Stale) => Verdict::Stale,
            Ok(reply @ (Reply::Done | Reply::Refused(_))) => {
                Verdict::Unknown(StoreError::Unfitting(Box::new(Answer::Reply(reply))))
            }
            Err(error) => Verdict::Unknown(error),
        }
    }

    /// Opens a generation for a new pair: the first is create-if-absent, a later one is for the holder of the last only,
    /// as the primary of the new pair.
    async fn open(
        &self,
        vm: &VmName,
        generation: Generation,
        members: &Members,
        deadline: Instant,
    ) -> Result<Outcome, StoreError> {
        outcome(self.command(vm, &Command::Open { generation, members: members.clone() }, deadline).await?)
    }

    /// Forgets a VM whose last generation this is. The number and the newest disks stay known.
    async fn forget(
        &self,
        vm: &VmName,
        generation: Generation,
        deadline: Instant,
    ) -> Result<Outcome, StoreError> {
        outcome(self.command(vm, &Command::Forget { generation }, deadline).await?)
    }
}

fn outcome(reply: Reply) -> Result<Outcome, StoreError> {
    match reply {
        Reply::Done => Ok(Outcome::Done),
        Reply::Stale => Ok(Outcome::Stale),
        Reply::Refused(refusal) => Err(StoreError::Refused(refusal)),
        reply @ (Reply::Won | Reply::Lost(_)) => Err(StoreError::Unfitting(Box::new(Answer::Reply(reply)))),
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The store's URL is wrong: correct it.
    #[error("the store's URL is wrong")]
    Url(#[from] UrlError),
    /// The keys cannot be used: correct them.
    #[error("the keys for the store cannot be used")]
    Keys(#[from] KeysError),
    /// No node answered in time: ask again, and look at what each node said.
    #[error("no answer from the store within {waited:?}; {}", Said(.nodes))]
    NoAnswer {
        /// How long the call waited.
        waited: Duration,
        /// The last failure of each node that was asked, by address.
        nodes: Vec<(String, NodeError)>,
    },
    /// No node can serve this client: correct the URL, the keys or the program's version.
    #[error("no node of the store can serve this client; {}", Said(.0))]
    Unusable(Vec<(String, NodeError)>),
    /// The store's disk is full, and it takes no more commands; what it has answered before holds. Free space on that node.
    #[error("the disk of store node {0} is full: free space there")]
    DiskFull(String),
    /// The ZooKeeper session was lost with a command under way: ask again.
    #[error("the ZooKeeper session was lost: ask again")]
    SessionLost,
    /// The record in the foreign store is not one of ours: it was written by something else.
    #[error("the record of {vm} in the store cannot be read: something else has written it")]
    Foreign {
        /// Whose record it is.
        vm: VmName,
        /// What is wrong with it.
        source: postcard::Error,
    },
    /// The record cannot be encoded.
    #[error("the record cannot be encoded")]
    Encode(#[source] postcard::Error),
    /// The command can never be done.
    #[error("the store refused the command")]
    Refused(#[source] Refusal),
    /// The members of the store cannot be changed so.
    #[error("the members of the store cannot be changed: {0}")]
    Members(String),
    /// The store's answer does not fit the question: client and server disagree about the protocol.
    #[error("the store's answer {0:?} does not fit the question")]
    Unfitting(Box<Answer>),
    /// The client's own thread cannot be started.
    #[error("the thread of the store's client cannot be started")]
    Thread(#[source] std::io::Error),
    /// The client's own thread has ended.
    #[error("the store client has stopped")]
    Stopped,
}

/// What one node of a store did instead of answering.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The connection failed.
    #[error("{0}")]
    Link(#[from] LinkError),
    /// It is not the leader, and knows of none or of this other one.
    #[error("not the leader{}", .0.as_ref().map(|at| format!(", which is {at}")).unwrap_or_default())]
    NotLeader(Option<String>),
    /// It leads, but reaches no majority of the members.
    #[error("reaches no majority of the members")]
    NoQuorum,
    /// Its disk is full.
    #[error("its disk is full")]
    DiskFull,
    /// It cannot change the members so.
    #[error("cannot change the members: {0}")]
    Members(String),
    /// Its storage has failed; it needs its operator.
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
    ZooKeeper(#[from] zookeeper_client::Error),
    /// It did not answer in time.
    #[error("no answer in time")]
    Silent,
}

impl NodeError {
    /// Whether asking this node again is of no use until somebody corrects something.
    pub(crate) fn is_lasting(&self) -> bool {
        matches!(self, NodeError::Link(link) if link.is_lasting())
    }
}

/// An error and its sources in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |e| e.source());
    causes.map(|e| e.to_string()).collect::<Vec<_>>().join(": ")
}

struct Said<'a>(&'a [(String, NodeError)]);

impl std::fmt::Display for Said<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.is_empty() {
            return f.write_str("no node was asked");
        }
        for (i, (node, error)) in self.0.iter().enumerate() {
            write!(f, "{}{node}: {error}", if i == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}
