//! Makes the client for the store that a URL names.

use std::sync::Arc;

use crate::etcd::EtcdStore;
use crate::keys::Keys;
use crate::raft_client::RaftStore;
use crate::store::{StoreError, TestAndSet};
use crate::url::StoreUrl;
use crate::zookeeper::ZooKeeperStore;

/// Makes a client for the store at this URL and starts to connect, without waiting for the connection. Must be called in a
/// tokio runtime; for plain threads there is [`crate::blocking::BlockingStore`].
pub fn connect(url: &StoreUrl) -> Result<Arc<dyn TestAndSet>, StoreError> {
    Ok(match url {
        StoreUrl::Raft { nodes, keys, cluster } => {
            Arc::new(RaftStore::new(nodes.clone(), Keys::load(keys)?, cluster.clone())?)
        }
        StoreUrl::Etcd { nodes, prefix, keys } => {
            Arc::new(EtcdStore::new(nodes, prefix, keys.as_deref().into())?)
        }
        StoreUrl::ZooKeeper { nodes, prefix, keys } => {
            Arc::new(ZooKeeperStore::new(nodes, prefix, keys.as_deref().into())?)
        }
    })
}
