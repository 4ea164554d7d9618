//! The test-and-set store of vmft.

pub mod blocking;
mod cas;
pub mod conformance;
pub mod etcd;
pub mod fake;
pub mod keys;
pub mod link;
pub mod names;
pub mod raft_client;
pub mod record;
pub mod server;
pub mod store;
pub mod tls;
pub mod url;
pub mod wire;
pub mod zookeeper;

use std::sync::Arc;

use keys::Keys;
use store::{StoreError, TestAndSet};
use url::StoreUrl;

/// Makes a client for the store at this URL and begins to connect, without waiting for it. Must be called inside a tokio
/// runtime; for plain threads there is [`blocking::Blocking`].
pub fn connect(url: &StoreUrl) -> Result<Arc<dyn TestAndSet>, StoreError> {
    Ok(match url {
        StoreUrl::Raft { nodes, keys, cluster } => {
            Arc::new(raft_client::RaftStore::new(nodes.clone(), Keys::load(keys)?, cluster.clone())?)
        }
        StoreUrl::Etcd { nodes, prefix, keys } => {
            Arc::new(etcd::EtcdStore::new(nodes, prefix, keys.as_deref())?)
        }
        StoreUrl::ZooKeeper { nodes, prefix } => Arc::new(zookeeper::ZooKeeperStore::new(nodes, prefix)),
    })
}
