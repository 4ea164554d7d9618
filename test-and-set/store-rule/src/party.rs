//! Who asks the store, and how hosts are named.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::names::{KeyId, PartyName};

/// Who asks: the names under which the store knows the certificate. [`crate::record::decide`] applies no roles without one: etcd and ZooKeeper
/// have no certificates of ours.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Asker {
    /// The host that it is.
    pub host: Option<PartyName>,
    /// The operator that it is.
    pub operator: Option<PartyName>,
}

impl fmt::Display for Asker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.host, &self.operator) {
            (Some(host), Some(operator)) => write!(f, "host {host}, operator {operator}"),
            (Some(host), None) => write!(f, "host {host}"),
            (None, Some(operator)) => write!(f, "operator {operator}"),
            (None, None) => f.write_str("somebody without a role"),
        }
    }
}

/// How a host is named.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum HostId {
    /// By its certificate. That is how clients name hosts; the store's leader replaces it by the name.
    Key(KeyId),
    /// By its name in the store. Records have names, so that a host keeps its rights when its key is replaced.
    Name(PartyName),
}

impl fmt::Display for HostId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HostId::Key(key) => write!(f, "the host with key {key}"),
            HostId::Name(name) => write!(f, "host {name}"),
        }
    }
}
