//! The server behind `raft://`: one member of the store.
//!
//! ```text
//! acceptor ──> node ──> raft (the only module that names openraft) ──> raft_log ──> disk (redb and journal, fsync)
//!  TLS, bounds   |        |
//! metrics ───────┘        └──> peers ──> connection (the same protocol, to the other members)
//! ```

mod absence;
pub mod acceptor;
pub mod audit;
#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod damage_tests;
pub mod disk;
pub mod disk_error;
pub mod journal;
mod left_out;
pub mod marks;
pub mod metrics;
pub mod node;
pub mod peers;
mod quota;
pub mod raft;
pub mod raft_log;
pub mod restore;
mod slow_disk;
pub mod stats;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tracing::{info, warn};

use crate::connection::Dialer;
use crate::keys::{Keys, KeysError};
use crate::names::ClusterName;
use crate::server::disk::MemberDisk;
use crate::server::disk_error::DiskError;
use crate::server::node::Node;
use crate::server::peers::OtherMembers;
use crate::server::raft::{Raft, RaftStartError, RaftTiming};
use crate::server::stats::NodeStats;
use crate::wire::NodeId;

/// Without changes for this long, what a member remembers of the others is stored on its own.
const IDLE_PAUSE: Duration = Duration::from_millis(500);

/// The settings of a member.
#[derive(Debug, Clone)]
pub struct ServerSettings {
    /// Its number.
    pub id: NodeId,
    /// Where it listens.
    pub listen: SocketAddr,
    /// The first members by number, including this one, with the addresses at which the others reach them.
    pub peers: BTreeMap<NodeId, String>,
    /// The directory of its data.
    pub data: PathBuf,
    /// The directory of its keys.
    pub keys: PathBuf,
    /// The name of the cluster.
    pub cluster: ClusterName,
    /// Whether it waits to be added to a running cluster, instead of forming one with `peers`.
    pub join: bool,
    /// Where it serves metrics for Prometheus.
    pub metrics: Option<SocketAddr>,
    /// When it suspects the leader, and when it compacts the log.
    pub timing: RaftTiming,
    /// How many VM names one host may open.
    pub names_per_host: u64,
}

impl ServerSettings {
    /// The default of [`ServerSettings::names_per_host`].
    pub const NAMES_PER_HOST: u64 = 1000;
}

/// Why a member does not run, or has stopped.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Its keys cannot be used.
    #[error("cannot use this member's keys (--keys)")]
    Keys(#[from] KeysError),
    /// Its data cannot be used.
    #[error("cannot use this member's data (--data)")]
    Disk(#[from] DiskError),
    /// It cannot listen on an address.
    #[error("cannot listen on {at}")]
    Listen {
        /// The address.
        at: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// It cannot start.
    #[error(transparent)]
    Start(#[from] RaftStartError),
    /// It has found out that its data is an old copy, or that its disk has lost writes.
    #[error("this member has stopped")]
    RolledBack(#[source] DiskError),
    /// Its storage has failed. Everything that it acknowledged is safe; start it again when the disk works.
    #[error(
        "this member has stopped because its storage failed: {0}; repair the disk or free space on it, then start it again"
    )]
    Stopped(String),
}

/// Runs a member until its storage fails. In a single-threaded runtime all its threads get a short time slice.
///
/// # Errors
/// Always: this returns only if the member cannot start, or has stopped.
pub async fn serve(settings: ServerSettings) -> Result<(), ServeError> {
    if let Err(error) = crate::time_slice::shorten() {
        warn!("verdicts will be slower on a busy machine: cannot set a short time slice: {error}");
    }
    let keys = Arc::new(Keys::load(&settings.keys)?);
    let dialer =
        Dialer { tls: crate::tls::connector(&keys)?, keys: keys.clone(), cluster: settings.cluster.clone() };
    let disk = Arc::new(MemberDisk::open(&settings.data, &settings.cluster, settings.id)?);
    let peers = Arc::new(OtherMembers::new(settings.id, disk.clone(), Some(dialer)));
    let listener = listen(settings.listen).await?;
    let metrics = match settings.metrics {
        Some(at) => Some(listen(at).await?),
        None => None,
    };
    let raft = Raft::start(settings.id, disk.clone(), peers.clone(), settings.timing).await?;
    raft.set_elections(false);
    let ServerSettings { id, cluster, names_per_host, .. } = settings;
    let (stats, node_keys) = (NodeStats::default(), keys.clone());
    let node = Node { id, cluster, disk, peers, raft, stats, keys: node_keys, names_per_host };
    let node = Arc::new(node);
    let acceptor = acceptor::StoreAcceptor::new(node.clone(), keys.clone(), crate::tls::acceptor(&keys)?);
    tokio::spawn(acceptor.accept(listener));
    if let Some(listener) = metrics {
        tokio::spawn(metrics::serve(node.clone(), listener));
    }
    tokio::spawn(write_known(node.disk.clone()));
    tokio::spawn(node.raft.clone().tell_changes());
    let serving = async {
        // Before it votes, the others may know that it must not.
        node.raft.reach_others().await;
        node.peers.set_asked();
        node.raft.set_elections(true);
        if !settings.join {
            node.raft.initialize(&settings.peers).await?;
        }
        info!("member {} of cluster {} serves on {}", node.id, node.cluster, settings.listen);
        Err(ServeError::Stopped(node.raft.stopped().await))
    };
    tokio::select! {
        biased;
        why = node.peers.rolled_back() => {
            node.raft.stop().await;
            Err(ServeError::RolledBack(DiskError::RolledBack(why)))
        }
        ended = serving => ended,
    }
}

/// Stores what is known of other members when no change of this member's own data has done so for a while.
async fn write_known(disk: Arc<MemberDisk>) {
    let mut before = disk.mark();
    loop {
        tokio::time::sleep(IDLE_PAUSE).await;
        let now = disk.mark();
        if now == before
            && let Err(error) = disk.write_known()
        {
            warn!("cannot store what is known of the other members: {error}");
        }
        before = now;
    }
}

async fn listen(at: SocketAddr) -> Result<TcpListener, ServeError> {
    TcpListener::bind(at).await.map_err(|source| ServeError::Listen { at, source })
}
