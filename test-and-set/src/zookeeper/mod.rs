//! The client of `zookeeper://`: one znode for each VM, created if absent and then set by version.
//!
//! ZooKeeper's reads may be old, and its `sync` is not confirmed by a quorum. So for a fresh read this session first writes to a
//! barrier znode: what the same server returns after that write includes everything that was decided before it.
//!
//! With a user ([`crate::client_keys`]) every znode belongs to the user alone, and one that does not is refused: whoever may
//! delete a parent's children, or set the barrier's, could forge a verdict.

mod jute;
mod session;

use std::collections::BTreeSet;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use tokio::sync::Mutex;

use crate::cas::{self, CasError, CasStore};
use crate::client_keys::ClientKeys;
use crate::names::VmName;
use crate::record::{VmPhase, VmRecord};
use crate::store::{NodeError, PAGE_RECORDS_MAX, StoreError};
use crate::zookeeper_error::ZooKeeperError;
use session::ZooKeeperSession;

/// How long a session lives without a word from this client.
const SESSION: Duration = Duration::from_secs(6);
/// How long a request, or the start of a session, may take.
const REQUEST_PATIENCE: Duration = Duration::from_secs(1);
const START_PATIENCE: Duration = Duration::from_secs(3);

/// A client of ZooKeeper.
pub struct ZooKeeperStore(Arc<ZooKeeperClient>);

struct ZooKeeperClient {
    servers: Vec<String>,
    prefix: String,
    keys: ClientKeys,
    state: Mutex<ClientState>,
}

#[derive(Default)]
struct ClientState {
    /// `None` before the first request, after a failure, and while a request runs: one that is abandoned leaves none.
    session: Option<CheckedSession>,
    /// How many sessions were started; the next one is with the next server.
    started: usize,
}

/// A session whose parents belong to the user, if there is one.
struct CheckedSession {
    session: ZooKeeperSession,
    /// The user, as ZooKeeper calls it in permissions.
    owner: Option<String>,
    /// The records that were seen to belong to the user. Only the user could change that.
    checked: BTreeSet<VmName>,
}

impl CheckedSession {
    /// Refuses a znode that does not belong to the user alone.
    async fn check(&mut self, path: &str) -> Result<(), ZooKeeperError> {
        let Some(owner) = &self.owner else { return Ok(()) };
        let identities = self.session.get_acl(path).await?;
        match identities.iter().find(|(scheme, id)| scheme != "digest" || id != owner) {
            None => Ok(()),
            Some((scheme, id)) => {
                Err(ZooKeeperError::NotOurs { path: path.into(), owner: format!("{scheme}:{id}") })
            }
        }
    }

    async fn create(&mut self, path: &str, data: &[u8]) -> Result<(), ZooKeeperError> {
        self.session.create(path, data, self.owner.as_deref()).await
    }

    /// Makes the parents of the records and the barrier, if they do not exist. The parents of the prefix may belong to others: a
    /// znode that has children cannot be deleted.
    async fn prepare(&mut self, prefix: &str) -> Result<(), ZooKeeperError> {
        let parents = prefix.match_indices('/').skip(1).map(|(end, _)| prefix[..end].to_owned());
        let own = [prefix.to_owned(), format!("{prefix}/vm"), format!("{prefix}/barrier")];
        for path in parents.chain(own.clone()) {
            match self.create(&path, &[]).await {
                Ok(()) | Err(ZooKeeperError::NodeExists) => {}
                // A parent of others, in which this user may create nothing, exists already if the next can be made.
                Err(ZooKeeperError::NoAuth) if !own.contains(&path) => {}
                Err(error) => return Err(error),
            }
        }
        for path in &own {
            self.check(path).await?;
        }
        Ok(())
    }

    async fn read(
        &mut self,
        vm: &VmName,
        path: &str,
    ) -> Result<(Option<Vec<u8>>, Option<i32>), ZooKeeperError> {
        let (data, version) = match self.session.get_data(path).await {
            Ok(read) => read,
            Err(ZooKeeperError::NoNode) => return Ok((None, None)),
            Err(error) => return Err(error),
        };
        if !self.checked.contains(vm) {
            self.check(path).await?;
            self.checked.insert(vm.clone());
        }
        Ok((Some(data), Some(version)))
    }

    async fn write(
        &mut self,
        path: &str,
        record: &[u8],
        version: Option<i32>,
    ) -> Result<bool, ZooKeeperError> {
        let written = match version {
            None => self.create(path, record).await,
            version => self.session.set_data(path, record, version).await,
        };
        match written {
            Ok(()) => Ok(true),
            Err(ZooKeeperError::NodeExists | ZooKeeperError::BadVersion) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

impl ZooKeeperClient {
    fn path(&self, vm: &VmName) -> String {
        format!("{}/vm/{vm}", self.prefix)
    }

    /// Starts a session with the next server.
    async fn start(&self, started: usize) -> Result<CheckedSession, CasError> {
        let server = &self.servers[started % self.servers.len()];
        let (tls, user) = (session::tls(&self.keys)?, self.keys.user()?);
        let session =
            ZooKeeperSession::start(server, tls.as_ref(), user.as_ref(), SESSION.as_millis() as i32);
        let begun = async {
            let owner = user.as_ref().map(session::owner_of);
            let session = session.await?;
            let mut checked = CheckedSession { session, owner, checked: BTreeSet::new() };
            checked.prepare(&self.prefix).await?;
            Ok(checked)
        };
        match tokio::time::timeout(START_PATIENCE, begun).await {
            Ok(begun) => begun.map_err(|error| failed(server, error)),
            Err(_) => Err(CasError::Retry(vec![(server.clone(), NodeError::Silent)])),
        }
    }

    /// Does something in the session; starts one if there is none. What is repeated after a failure is safe, as for every other
    /// write whose outcome is unknown.
    async fn with_session<T>(
        &self,
        act: impl AsyncFnOnce(&mut CheckedSession) -> Result<T, ZooKeeperError>,
    ) -> Result<T, CasError> {
        let mut state = self.state.lock().await;
        let mut session = match state.session.take() {
            Some(session) => session,
            None => {
                state.started += 1;
                self.start(state.started).await?
            }
        };
        let server = &self.servers[state.started % self.servers.len()];
        match tokio::time::timeout(REQUEST_PATIENCE, act(&mut session)).await {
            Err(_) => Err(CasError::Retry(vec![(server.clone(), NodeError::Silent)])),
            Ok(Ok(value)) => {
                state.session = Some(session);
                Ok(value)
            }
            Ok(Err(error)) => {
                if !error.ends_session() {
                    state.session = Some(session);
                }
                Err(failed(server, error))
            }
        }
    }

    async fn names(&self) -> Result<Vec<VmName>, CasError> {
        let (barrier, records) = (format!("{}/barrier", self.prefix), format!("{}/vm", self.prefix));
        let names = self.with_session(async |checked| {
            checked.session.set_data(&barrier, &[], None).await?;
            checked.session.list_children(&records).await
        });
        Ok(names.await?.iter().filter_map(|name| name.parse().ok()).collect())
    }
}

/// Whether a failed request is repeated.
fn failed(server: &str, error: ZooKeeperError) -> CasError {
    match error {
        error @ (ZooKeeperError::NoAuth | ZooKeeperError::AuthFailed | ZooKeeperError::NotOurs { .. }) => {
            CasError::Report(StoreError::Unusable(vec![(server.into(), NodeError::ZooKeeper(error))]))
        }
        error => CasError::Retry(vec![(server.into(), NodeError::ZooKeeper(error))]),
    }
}

/// Keeps the client's session alive, so that a verdict does not have to wait for a new one.
async fn keep_alive(client: Weak<ZooKeeperClient>) {
    loop {
        tokio::time::sleep(SESSION / 3).await;
        let Some(client) = client.upgrade() else { return };
        let has_session = client.state.lock().await.session.is_some();
        if has_session {
            // A failure ends the session, and the next request starts another.
            client.with_session(async |checked| checked.session.ping().await).await.ok();
        }
    }
}

impl ZooKeeperStore {
    /// Makes a client, which connects with the first request. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// The keys cannot be used.
    pub fn new(servers: &[String], prefix: &str, keys: ClientKeys) -> Result<Self, StoreError> {
        session::tls(&keys)?;
        keys.user()?;
        // A certificate is not enough: the znodes would belong to one host's certificate, and the other's could not read them.
        keys.warn(&format!("zookeeper://{}", servers.join(",")), false);
        let (servers, prefix, state) = (servers.to_vec(), prefix.into(), Mutex::default());
        let client = Arc::new(ZooKeeperClient { servers, prefix, keys, state });
        tokio::spawn(keep_alive(Arc::downgrade(&client)));
        Ok(Self(client))
    }
}

impl CasStore for ZooKeeperStore {
    /// The znode's version; `None` if it does not exist.
    type Revision = Option<i32>;

    async fn read(&self, vm: &VmName, fresh: bool) -> Result<(Option<Vec<u8>>, Option<i32>), CasError> {
        let (path, barrier) = (self.0.path(vm), format!("{}/barrier", self.0.prefix));
        let read = self.0.with_session(async |checked| {
            if fresh {
                checked.session.set_data(&barrier, &[], None).await?;
            }
            checked.read(vm, &path).await
        });
        read.await
    }

    async fn write(&self, vm: &VmName, record: Vec<u8>, revision: Option<i32>) -> Result<bool, CasError> {
        let path = self.0.path(vm);
        self.0.with_session(async |checked| checked.write(&path, &record, revision).await).await
    }

    async fn list(
        &self,
        after: Option<&VmName>,
        deadline: Instant,
    ) -> Result<Vec<(VmName, VmRecord)>, StoreError> {
        let mut names = cas::retry_until(deadline, || self.0.names()).await?;
        names.retain(|vm| after.is_none_or(|after| vm > after));
        names.sort();
        let mut page = vec![];
        for vm in names {
            // The names were read at one moment; each record is read later.
            let record = cas::retry_until(deadline, || self.read(&vm, false)).await?.0;
            let record = record.map(|bytes| cas::decode(&vm, &bytes)).transpose()?;
            if let Some(record) = record.filter(|r| r.phase != VmPhase::Forgotten) {
                page.push((vm, record));
            }
            if page.len() == PAGE_RECORDS_MAX {
                break;
            }
        }
        Ok(page)
    }
}
