//! The client of `zookeeper://`: one znode for each VM, created if absent and then set by version.
//!
//! ZooKeeper's reads may be old, and its `sync` is not confirmed by a quorum. So for a fresh read this session first writes to a
//! barrier znode: what the same server returns after that write includes everything that was decided before it.

use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::sync::Mutex;
use zookeeper_client::{Acls, Client, CreateMode, CreateOptions, Error};

use crate::cas::{self, CasError, CasStore};
use crate::names::VmName;
use crate::record::{Command, CommandReply, VmPhase, VmRecord};
use crate::store::{NodeError, PAGE_RECORDS_MAX, StoreError, TestAndSet};

const SESSION: Duration = Duration::from_secs(6);
const PERSISTENT: CreateOptions<'static> = CreateMode::Persistent.with_acls(Acls::anyone_all());

/// A client of ZooKeeper.
pub struct ZooKeeperStore {
    servers: String,
    prefix: String,
    /// The session; `None` before the first request, and after the session was lost.
    client: Mutex<Option<Client>>,
}

impl ZooKeeperStore {
    /// Makes a client, which connects with the first request. Must be called in a tokio runtime.
    pub fn new(nodes: &[String], prefix: &str) -> Self {
        Self { servers: nodes.join(","), prefix: prefix.into(), client: Mutex::new(None) }
    }

    fn path(&self, vm: &VmName) -> String {
        format!("{}/vm/{vm}", self.prefix)
    }

    fn barrier_path(&self) -> String {
        format!("{}/barrier", self.prefix)
    }

    fn retry(&self, error: Error) -> CasError {
        CasError::Retry(self.servers.clone(), NodeError::ZooKeeper(error))
    }

    /// Returns the session, after making one if there is none. A failure loses nothing: no request is pending at that time.
    async fn client(&self) -> Result<Client, CasError> {
        let mut kept = self.client.lock().await;
        if let Some(client) = kept.as_ref() {
            return Ok(client.clone());
        }
        let connector = Client::connector().with_session_timeout(SESSION).with_fail_eagerly();
        let client = connector.connect(&self.servers).await.map_err(|e| self.retry(e))?;
        for path in [format!("{}/vm", self.prefix), self.barrier_path()] {
            client.mkdir(&path, &PERSISTENT).await.map_err(|e| self.retry(e))?;
        }
        *kept = Some(client.clone());
        Ok(client)
    }

    /// Decides whether a failed request is repeated. A lost session is reported; the next call makes a new one.
    async fn failed(&self, error: Error) -> CasError {
        match error {
            Error::SessionExpired | Error::SessionMoved | Error::ClientClosed | Error::NoHosts => {
                *self.client.lock().await = None;
                CasError::Report(StoreError::SessionLost)
            }
            Error::NoAuth | Error::AuthFailed | Error::QuotaExceeded | Error::InvalidAcl => {
                let said = (self.servers.clone(), NodeError::ZooKeeper(error));
                CasError::Report(StoreError::Unusable(vec![said]))
            }
            other => self.retry(other),
        }
    }

    async fn barrier(&self, client: &Client) -> Result<(), CasError> {
        match client.set_data(&self.barrier_path(), &[], None).await {
            Ok(_) => Ok(()),
            Err(error) => Err(self.failed(error).await),
        }
    }

    async fn names(&self) -> Result<Vec<VmName>, CasError> {
        let client = self.client().await?;
        self.barrier(&client).await?;
        match client.list_children(&format!("{}/vm", self.prefix)).await {
            Ok(names) => Ok(names.iter().filter_map(|name| name.parse().ok()).collect()),
            Err(error) => Err(self.failed(error).await),
        }
    }
}

impl CasStore for ZooKeeperStore {
    /// The znode's version; `None` if it does not exist.
    type Revision = Option<i32>;

    async fn read(&self, vm: &VmName, fresh: bool) -> Result<(Option<Vec<u8>>, Option<i32>), CasError> {
        let client = self.client().await?;
        if fresh {
            self.barrier(&client).await?;
        }
        match client.get_data(&self.path(vm)).await {
            Ok((bytes, stat)) => Ok((Some(bytes), Some(stat.version))),
            Err(Error::NoNode) => Ok((None, None)),
            Err(error) => Err(self.failed(error).await),
        }
    }

    async fn write(&self, vm: &VmName, record: Vec<u8>, revision: Option<i32>) -> Result<bool, CasError> {
        let client = self.client().await?;
        let path = self.path(vm);
        let written = match revision {
            None => client.create(&path, &record, &PERSISTENT).await.map(|_| ()),
            Some(version) => client.set_data(&path, &record, Some(version)).await.map(|_| ()),
        };
        match written {
            Ok(()) => Ok(true),
            Err(Error::NodeExists | Error::BadVersion) => Ok(false),
            Err(error) => Err(self.failed(error).await),
        }
    }
}

#[async_trait]
impl TestAndSet for ZooKeeperStore {
    async fn command(
        &self,
        vm: &VmName,
        command: &Command,
        deadline: Instant,
    ) -> Result<CommandReply, StoreError> {
        cas::command(self, vm, command, deadline).await
    }

    async fn get(&self, vm: &VmName, deadline: Instant) -> Result<Option<VmRecord>, StoreError> {
        cas::get(self, vm, deadline).await
    }

    async fn list(
        &self,
        after: Option<&VmName>,
        deadline: Instant,
    ) -> Result<Vec<(VmName, VmRecord)>, StoreError> {
        let mut names = cas::retry_until(deadline, || self.names()).await?;
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
