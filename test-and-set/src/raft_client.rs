//! The client of `raft://`: our own store.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tracing::warn;

use crate::connection::{ConnectionError, Dialer, NodeConnection};
use crate::keys::Keys;
use crate::names::{ClusterName, KeyId, PartyName, VmName};
use crate::record::{Command, CommandReply, VmRecord};
use crate::store::{NodeError, StoreError, TestAndSet};
use crate::wire::{NodeStatus, RequestFailure, StoreRequest, StoreResponse};

/// How long a node may take before the next one is asked. Repeating a command is harmless.
const NODE_PATIENCE: Duration = Duration::from_millis(400);
/// How long connecting to one node may take.
const CONNECT_PATIENCE: Duration = Duration::from_millis(400);
/// How often the idle connection is checked.
const PING_INTERVAL: Duration = Duration::from_secs(1);
/// The pause before the first repetition. It doubles with every round over all nodes up to [`PAUSE_MAX`]; half of it is random.
const PAUSE_FIRST: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_millis(50);

/// A client of our own store. It keeps a connection to the leader open, so that a verdict costs one round trip.
pub struct RaftStore {
    inner: Arc<SharedClient>,
    pinger: tokio::task::AbortHandle,
}

struct SharedClient {
    dialer: Dialer,
    /// The connection in use and its node's address. Locked while connecting, so that all callers share one connection.
    link: tokio::sync::Mutex<Option<(Arc<NodeConnection>, String)>>,
    /// The nodes in the order in which to ask them.
    order: Mutex<Vec<String>>,
}

impl Drop for RaftStore {
    fn drop(&mut self) {
        self.pinger.abort();
    }
}

impl RaftStore {
    /// Makes a client and starts to connect, without waiting for the connection. Must be called in a tokio runtime.
    pub fn new(nodes: Vec<String>, keys: Keys, cluster: ClusterName) -> Result<Self, StoreError> {
        let keys = Arc::new(keys);
        let dialer = Dialer { tls: crate::tls::connector(&keys)?, keys, cluster };
        let inner = Arc::new(SharedClient { dialer, link: Default::default(), order: Mutex::new(nodes) });
        let pinger = tokio::spawn(keep_warm(Arc::downgrade(&inner))).abort_handle();
        Ok(Self { inner, pinger })
    }

    /// Asks one node for its view of the cluster.
    pub async fn status(&self, node: &str, deadline: Instant) -> Result<NodeStatus, NodeError> {
        let patience = deadline.saturating_duration_since(Instant::now());
        let (link, _) = self.inner.dialer.connect(node, None, patience).await?;
        match link.ask(&StoreRequest::Status, patience).await? {
            StoreResponse::Status(status) => Ok(*status),
            StoreResponse::Failed(failure) => Err(from_failure(failure)),
            _ => Err(NodeError::Failed),
        }
    }

    /// Adds a member, which must have been started with `--join`, or removes one.
    pub async fn change_members(&self, request: StoreRequest, deadline: Instant) -> Result<(), StoreError> {
        match self.inner.ask(&request, deadline.saturating_duration_since(Instant::now()), deadline).await? {
            StoreResponse::MembersChanged => Ok(()),
            other => Err(other.unfitting()),
        }
    }
}

impl RaftStore {
    /// A page of all VMs, also those that are forgotten, in the order of their names, starting after `after`. An empty page is the
    /// end.
    pub async fn all(
        &self,
        after: Option<&VmName>,
        deadline: Instant,
    ) -> Result<Vec<(VmName, VmRecord)>, StoreError> {
        self.inner.ask(&StoreRequest::Export(after.cloned()), NODE_PATIENCE, deadline).await?.into_page()
    }
}

fn from_failure(failure: RequestFailure) -> NodeError {
    match failure {
        RequestFailure::NotLeader(leader) => NodeError::NotLeader(leader),
        RequestFailure::NoQuorum => NodeError::NoQuorum,
        RequestFailure::DiskFull => NodeError::DiskFull,
        RequestFailure::Stopped => NodeError::Failed,
        RequestFailure::Members(why) => NodeError::Members(why),
        RequestFailure::NotAllowed(why) => NodeError::NotAllowed(why),
    }
}

/// Keeps a connection to the leader open while there are no requests.
async fn keep_warm(inner: Weak<SharedClient>) {
    let mut refused = None;
    loop {
        let Some(strong) = inner.upgrade() else { return };
        strong.use_new_key(&mut refused).await;
        // A failure here will occur again with the next request, and be reported then.
        strong.ask(&StoreRequest::Ping, NODE_PATIENCE, Instant::now() + 2 * NODE_PATIENCE).await.ok();
        drop(strong);
        tokio::time::sleep(PING_INTERVAL).await;
    }
}

impl SharedClient {
    fn order(&self) -> std::sync::MutexGuard<'_, Vec<String>> {
        self.order.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Moves a node to the end of the order.
    fn demote(&self, node: &str) {
        let mut order = self.order();
        if let Some(at) = order.iter().position(|n| n == node) {
            let node = order.remove(at);
            order.push(node);
        }
    }

    /// Moves a node to the front of the order. It may be missing from the URL, if it was added to the cluster later.
    fn promote(&self, node: String) {
        let mut order = self.order();
        order.retain(|n| *n != node);
        order.insert(0, node);
    }

    async fn link(
        &self,
        patience: Duration,
    ) -> Result<(Arc<NodeConnection>, String), (String, ConnectionError)> {
        let mut kept = self.link.lock().await;
        if let Some((link, node)) = kept.as_ref().filter(|(link, _)| link.is_open()) {
            return Ok((link.clone(), node.clone()));
        }
        *kept = None;
        let node = self.order().first().cloned().unwrap_or_default();
        match self.dialer.connect(&node, None, CONNECT_PATIENCE.min(patience)).await {
            Ok((link, _)) => {
                let link = Arc::new(link);
                *kept = Some((link.clone(), node.clone()));
                Ok((link, node))
            }
            Err(error) => Err((node, error)),
        }
    }

    /// Connects anew if this party's key was replaced since it connected. As long as the new key is not accepted, the connection
    /// stays as it is. `refused` has the key about which that was said.
    async fn use_new_key(&self, refused: &mut Option<KeyId>) {
        let own = self.dialer.keys.own().id();
        let kept = self.link.lock().await.clone();
        let Some((old, node)) = kept.filter(|(link, _)| link.own_key() != own) else { return };
        match self.dialer.connect(&node, None, CONNECT_PATIENCE).await {
            Ok((link, _)) => {
                let mut kept = self.link.lock().await;
                if kept.as_ref().is_some_and(|(now, _)| Arc::ptr_eq(now, &old)) {
                    *kept = Some((Arc::new(link), node));
                }
            }
            Err(error) if refused.replace(own) != Some(own) => {
                warn!(
                    "member {node} cannot be reached with this party's new key {own}, so the connection with the old one \
                     stays: {error}"
                );
            }
            Err(_) => {}
        }
    }

    /// Drops the kept connection, unless it has already been replaced.
    async fn forget_connection(&self, link: &Arc<NodeConnection>) {
        let mut kept = self.link.lock().await;
        if kept.as_ref().is_some_and(|(now, _)| Arc::ptr_eq(now, link)) {
            *kept = None;
        }
    }

    /// Sends the request to one node. If it fails, the connection is dropped and the node moves to the end of the order.
    async fn ask_one(
        &self,
        request: &StoreRequest,
        patience: Duration,
        deadline: Instant,
    ) -> Result<StoreResponse, (String, NodeError)> {
        let left = || deadline.saturating_duration_since(Instant::now());
        let (link, node) = match self.link(left()).await {
            Ok(linked) => linked,
            Err((node, error)) => {
                self.demote(&node);
                return Err((node, error.into()));
            }
        };
        let error = match link.ask(request, patience.min(left())).await {
            Ok(StoreResponse::Failed(failure)) => from_failure(failure),
            // A follower answers a ping with the leader's address: connect to the leader now, not when a verdict is needed.
            Ok(StoreResponse::Leader(Some(leader))) if leader != node => NodeError::NotLeader(Some(leader)),
            Ok(StoreResponse::Leader(None)) => NodeError::NotLeader(None),
            Ok(answer) => return Ok(answer),
            Err(error) => error.into(),
        };
        if !matches!(error, NodeError::Members(_) | NodeError::NotAllowed(_) | NodeError::DiskFull) {
            self.forget_connection(&link).await;
            self.demote(&node);
        }
        if let NodeError::NotLeader(Some(leader)) = &error {
            self.promote(leader.clone());
        }
        Err((node, error))
    }

    async fn ask(
        &self,
        request: &StoreRequest,
        patience: Duration,
        deadline: Instant,
    ) -> Result<StoreResponse, StoreError> {
        let begun = Instant::now();
        let mut said = BTreeMap::new();
        let mut pause = PAUSE_FIRST;
        for tries in 1.. {
            let (node, error) = match self.ask_one(request, patience, deadline).await {
                Ok(answer) => return Ok(answer),
                Err(failed) => failed,
            };
            let follow = matches!(error, NodeError::NotLeader(Some(_)));
            match error {
                NodeError::DiskFull => return Err(StoreError::DiskFull(node)),
                NodeError::Members(why) => return Err(StoreError::Members(why)),
                NodeError::NotAllowed(why) => return Err(StoreError::NotAllowed(why)),
                _ => drop(said.insert(node, error)),
            }
            let all_lasting = self.order().iter().all(|n| said.get(n).is_some_and(NodeError::is_lasting));
            if all_lasting {
                return Err(StoreError::Unusable(said.into_iter().collect()));
            }
            if tries % self.order().len().max(1) == 0 || !follow {
                let wait = pause.mul_f64(rand::random_range(0.5..1.0));
                tokio::time::sleep(wait.min(deadline.saturating_duration_since(Instant::now()))).await;
                pause = (pause * 2).min(PAUSE_MAX);
            }
            if Instant::now() >= deadline {
                break;
            }
        }
        Err(StoreError::NoAnswer { waited: begun.elapsed(), nodes: said.into_iter().collect() })
    }
}

#[async_trait]
impl TestAndSet for RaftStore {
    async fn command(
        &self,
        vm: &VmName,
        command: &Command,
        deadline: Instant,
    ) -> Result<CommandReply, StoreError> {
        let request = StoreRequest::Command(vm.clone(), command.clone());
        self.inner.ask(&request, NODE_PATIENCE, deadline).await?.into_reply()
    }

    async fn get(&self, vm: &VmName, deadline: Instant) -> Result<Option<VmRecord>, StoreError> {
        self.inner.ask(&StoreRequest::Get(vm.clone()), NODE_PATIENCE, deadline).await?.into_record()
    }

    async fn host_of(&self, key: KeyId, deadline: Instant) -> Result<Option<PartyName>, StoreError> {
        self.inner.ask(&StoreRequest::HostOf(key), NODE_PATIENCE, deadline).await?.into_host()
    }

    async fn list(
        &self,
        after: Option<&VmName>,
        deadline: Instant,
    ) -> Result<Vec<(VmName, VmRecord)>, StoreError> {
        self.inner.ask(&StoreRequest::List(after.cloned()), NODE_PATIENCE, deadline).await?.into_page()
    }
}
