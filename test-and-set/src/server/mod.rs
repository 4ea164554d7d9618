//! The server behind `raft://`: one member of the store.
//!
//! ```text
//! connections ──> Node ──> raft (the only module that names openraft) ──> log ──> disk (redb, fsync)
//!   TLS, bounds     |        |
//! metrics ──────────┘        └──> peers ──> link (the same bytes, to the other members)
//! ```

pub mod connections;
#[cfg(test)]
mod crash_tests;
pub mod disk;
pub mod log;
pub mod metrics;
pub mod peers;
pub mod raft;
pub mod stats;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use tokio::net::TcpListener;

use crate::keys::{Keys, KeysError};
use crate::link::Dialer;
use crate::names::{ClusterName, VmName};
use crate::record::Record;
use crate::server::disk::{Disk, DiskError};
use crate::server::peers::Peers;
use crate::server::raft::{Raft, StartError, Timing};
use crate::server::stats::{Latency, Stats};
use crate::store::PAGE_RECORDS_MAX;
use crate::wire::{Answer, Ask, Failure, NodeId, PAGE_BYTES, Status};

/// How a member is served.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Its number.
    pub id: NodeId,
    /// Where it listens.
    pub listen: SocketAddr,
    /// The first members by number, this one among them, as the others reach them.
    pub peers: BTreeMap<NodeId, String>,
    /// Its data.
    pub data: PathBuf,
    /// Its keys.
    pub keys: PathBuf,
    /// The name of the cluster.
    pub cluster: ClusterName,
    /// Whether it waits to be added to a cluster instead of forming one.
    pub join: bool,
    /// Where Prometheus scrapes.
    pub metrics: Option<SocketAddr>,
    /// When to suspect the leader, and when to compact the log.
    pub timing: Timing,
}

/// Why a member does not run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Its keys cannot be used.
    #[error("the keys cannot be used")]
    Keys(#[from] KeysError),
    /// Its data cannot be used.
    #[error("the data cannot be used")]
    Disk(#[from] DiskError),
    /// It cannot listen.
    #[error("cannot listen on {at}")]
    Listen {
        /// Where.
        at: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// It cannot start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// It ran and has stopped: its storage has failed. What it has acknowledged is safe; start it again when the disk is well.
    #[error("the storage has failed: {0}")]
    Stopped(String),
}

/// A running member.
pub struct Node {
    id: NodeId,
    cluster: ClusterName,
    disk: Arc<Disk>,
    peers: Arc<Peers>,
    raft: Raft,
    stats: Stats,
}

impl Node {
    /// Answers a client.
    async fn answer(&self, ask: Ask) -> Answer {
        let answer = match ask {
            Ask::Command(vm, command) => {
                timed(&self.stats.commands, self.raft.command(vm, command)).await.map(Answer::Reply)
            }
            Ask::Get(vm) => {
                let look = self.raft.look(|state| state.get(&vm).cloned());
                timed(&self.stats.reads, look).await.map(Answer::Record)
            }
            Ask::List(after) => {
                let look = self.raft.look(|state| page(state.list(after.as_ref())));
                timed(&self.stats.reads, look).await.map(Answer::Page)
            }
            Ask::Ping => Ok(Answer::Leader(self.raft.leader().map(|(_, address)| address))),
            Ask::Status => Ok(Answer::Status(Box::new(self.status()))),
            Ask::AddMember(id, address) => {
                self.raft.add_member(id, address).await.map(|()| Answer::MembersChanged)
            }
            Ask::RemoveMember(id) => self.raft.remove_member(id).await.map(|()| Answer::MembersChanged),
        };
        answer.unwrap_or_else(|failure| {
            if !matches!(failure, Failure::NotLeader(_)) {
                self.stats.failures.fetch_add(1, Relaxed);
            }
            Answer::Failed(failure)
        })
    }

    fn status(&self) -> Status {
        let view = self.raft.view();
        let (disk_free_bytes, data_bytes) = self.disk.space();
        let commands = &self.stats.commands;
        Status {
            id: self.id,
            cluster: self.cluster.clone(),
            role: view.role.into(),
            term: view.term,
            leader: view.leader,
            members: view.members,
            last_log_index: view.last_log_index,
            applied_index: view.applied_index,
            snapshot_index: view.snapshot_index,
            purged_index: view.purged_index,
            vms: view.vms,
            commands: commands.count(),
            command_us: (commands.quantile_us(0.5), commands.quantile_us(0.99)),
            disk_free_bytes,
            data_bytes,
            disk_full: self.disk.is_full(),
        }
    }
}

/// Counts how long an answer took; what has none is not counted.
async fn timed<T>(latency: &Latency, answer: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let begun = Instant::now();
    let answer = answer.await;
    if answer.is_ok() {
        latency.add(begun.elapsed());
    }
    answer
}

/// As many records as one answer may have.
fn page<'s>(records: impl Iterator<Item = (&'s VmName, &'s Record)>) -> Vec<(VmName, Record)> {
    let mut bytes = 0;
    let fits = |(vm, record): &(&VmName, &Record)| {
        let before = bytes;
        bytes += postcard::experimental::serialized_size(&(vm, record)).unwrap_or(PAGE_BYTES);
        before < PAGE_BYTES
    };
    records.take(PAGE_RECORDS_MAX).take_while(fits).map(|(vm, record)| (vm.clone(), record.clone())).collect()
}

/// Runs a member until its storage fails. On a runtime of this thread only, its threads have a short time slice.
pub async fn serve(settings: Settings) -> Result<(), ServeError> {
    if let Err(error) = crate::slice::shorten() {
        eprintln!("slower on a busy machine, without a short time slice: {error}");
    }
    let keys = Arc::new(Keys::load(&settings.keys)?);
    let dialer =
        Dialer { tls: crate::tls::connector(&keys)?, keys: keys.clone(), cluster: settings.cluster.clone() };
    let disk = Arc::new(Disk::open(&settings.data, &settings.cluster, settings.id)?);
    let peers = Arc::new(Peers::new(settings.id, disk.clone(), Some(dialer))?);
    let listener = listen(settings.listen).await?;
    let metrics = match settings.metrics {
        Some(at) => Some(listen(at).await?),
        None => None,
    };
    let raft = Raft::start(settings.id, disk.clone(), peers.clone(), settings.timing).await?;
    let (id, cluster) = (settings.id, settings.cluster);
    let node = Arc::new(Node { id, cluster, disk, peers, raft, stats: Stats::default() });
    let door = connections::Door::new(node.clone(), keys.clone(), crate::tls::acceptor(&keys)?);
    tokio::spawn(door.accept(listener));
    if let Some(listener) = metrics {
        tokio::spawn(metrics::serve(node.clone(), listener));
    }
    if !settings.join {
        node.raft.form(&settings.peers).await?;
    }
    eprintln!("member {} of cluster {} serves on {}", node.id, node.cluster, settings.listen);
    Err(ServeError::Stopped(node.raft.stopped().await))
}

async fn listen(at: SocketAddr) -> Result<TcpListener, ServeError> {
    TcpListener::bind(at).await.map_err(|source| ServeError::Listen { at, source })
}
