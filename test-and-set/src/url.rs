//! URLs of stores: `raft://`, `etcd://` or `zookeeper://`.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::names::{ClusterName, NameError};

/// A parsed store URL.
///
/// ```text
/// raft://HOST:PORT,HOST:PORT,…?keys=DIR[&cluster=NAME]     our own store; the cluster is "vmft" by default
/// etcd://HOST:PORT,…[/PREFIX][?keys=DIR]                   etcd, version 3 protocol
/// zookeeper://HOST:PORT,…[/PREFIX][?keys=DIR]              ZooKeeper
/// ```
///
/// The prefix is the path of the records, by default `/vmft`. For etcd and ZooKeeper `keys` is a directory as
/// [`crate::client_keys`] describes it: `ca.crt` for TLS, `own.crt` and `own.key` if the servers ask for a client's certificate,
/// and `user` with a name and a password. Without them whoever reaches the store can change the records, and a warning says so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreUrl {
    /// Our own store.
    Raft {
        /// Its nodes.
        nodes: Vec<String>,
        /// The directory of our keys.
        keys: PathBuf,
        /// The name of the cluster.
        cluster: ClusterName,
    },
    /// etcd.
    Etcd {
        /// Its endpoints.
        nodes: Vec<String>,
        /// The path of the records.
        prefix: String,
        /// The directory of the client's keys.
        keys: Option<PathBuf>,
    },
    /// ZooKeeper.
    ZooKeeper {
        /// Its servers.
        nodes: Vec<String>,
        /// The path of the records.
        prefix: String,
        /// The directory of the client's keys.
        keys: Option<PathBuf>,
    },
}

impl StoreUrl {
    /// Its nodes, each HOST:PORT.
    pub fn nodes(&self) -> &[String] {
        match self {
            Self::Raft { nodes, .. } | Self::Etcd { nodes, .. } | Self::ZooKeeper { nodes, .. } => nodes,
        }
    }

    /// The directory of keys that the client reads.
    pub fn keys(&self) -> Option<&Path> {
        match self {
            Self::Raft { keys, .. } => Some(keys),
            Self::Etcd { keys, .. } | Self::ZooKeeper { keys, .. } => keys.as_deref(),
        }
    }
}

/// What is wrong with a store's URL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// The scheme is unknown.
    #[error("a store's URL must start with raft://, etcd:// or zookeeper://; this one starts with {0:?}")]
    Scheme(String),
    /// A node is not HOST:PORT.
    #[error("{0:?} is not HOST:PORT")]
    Node(String),
    /// The path is not a sequence of names.
    #[error("the path {0:?} is not allowed: etcd:// and zookeeper:// take /NAME/…, raft:// takes none")]
    Prefix(String),
    /// The scheme does not have this parameter, or it has no value.
    #[error(
        "the parameter {0:?} is unknown, or has no value: raft:// takes keys= and cluster=, the others take keys="
    )]
    Parameter(String),
    /// A `raft://` URL has no keys.
    #[error("a raft:// URL needs ?keys=DIR, the directory with own.key, own.crt and members/")]
    NoKeys,
    /// The cluster's name is invalid.
    #[error("the cluster's name is invalid: {0}")]
    Cluster(#[from] NameError),
}

impl FromStr for StoreUrl {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        let (scheme, rest) = text.split_once("://").ok_or_else(|| UrlError::Scheme(text.into()))?;
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (hosts, path) = place.find('/').map_or((place, ""), |slash| place.split_at(slash));
        let nodes = hosts.split(',').map(parse_node).collect::<Result<Vec<_>, _>>()?;
        let (mut keys, mut cluster) = (None, None);
        for parameter in query.split('&').filter(|p| !p.is_empty()) {
            match parameter.split_once('=') {
                Some(("keys", dir)) if !dir.is_empty() => keys = Some(PathBuf::from(dir)),
                Some(("cluster", name)) if scheme == "raft" => cluster = Some(name.parse()?),
                _ => return Err(UrlError::Parameter(parameter.into())),
            }
        }
        match scheme {
            "raft" if path.trim_matches('/').is_empty() => {
                let cluster = cluster.map_or_else(|| "vmft".parse(), Ok)?;
                Ok(Self::Raft { nodes, keys: keys.ok_or(UrlError::NoKeys)?, cluster })
            }
            "raft" => Err(UrlError::Prefix(path.into())),
            "etcd" => Ok(Self::Etcd { nodes, prefix: parse_prefix(path)?, keys }),
            "zookeeper" => Ok(Self::ZooKeeper { nodes, prefix: parse_prefix(path)?, keys }),
            other => Err(UrlError::Scheme(other.into())),
        }
    }
}

/// Checks that a text is `HOST:PORT`, and returns it.
pub fn parse_node(text: &str) -> Result<String, UrlError> {
    let fault = || UrlError::Node(text.into());
    let (host, port) = text.rsplit_once(':').ok_or_else(fault)?;
    let port_is_good = port.parse::<u16>().is_ok_and(|port| port > 0);
    if host.is_empty() || text.contains(char::is_whitespace) || !port_is_good {
        Err(fault())
    } else {
        Ok(text.into())
    }
}

fn parse_prefix(path: &str) -> Result<String, UrlError> {
    let trimmed = path.trim_end_matches('/');
    if trimmed.is_empty() {
        return Ok("/vmft".into());
    }
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    let part_is_good =
        |part: &str| !part.is_empty() && part != "." && part != ".." && part.bytes().all(plain);
    if trimmed[1..].split('/').all(part_is_good) {
        Ok(trimmed.into())
    } else {
        Err(UrlError::Prefix(path.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_scheme_parses() {
        let nodes = vec!["a:1".to_string(), "[::1]:2".to_string()];
        assert_eq!(
            "raft://a:1,[::1]:2?keys=/k&cluster=blue".parse(),
            Ok(StoreUrl::Raft { nodes: nodes.clone(), keys: "/k".into(), cluster: "blue".parse().unwrap() })
        );
        assert_eq!(
            "etcd://a:1,[::1]:2/x/y".parse(),
            Ok(StoreUrl::Etcd { nodes: nodes.clone(), prefix: "/x/y".into(), keys: None })
        );
        assert_eq!(
            "zookeeper://a:1,[::1]:2?keys=/k".parse(),
            Ok(StoreUrl::ZooKeeper { nodes, prefix: "/vmft".into(), keys: Some("/k".into()) })
        );
    }

    #[test]
    fn faults_are_named() {
        let fault = |text: &str| text.parse::<StoreUrl>().unwrap_err();
        assert_eq!(fault("consul://a:1"), UrlError::Scheme("consul".into()));
        assert_eq!(fault("raft://a:1"), UrlError::NoKeys);
        assert_eq!(fault("raft://a?keys=/k"), UrlError::Node("a".into()));
        assert_eq!(fault("etcd://a:1,b:0"), UrlError::Node("b:0".into()));
        assert_eq!(fault("etcd://a:1?tls=no"), UrlError::Parameter("tls=no".into()));
        assert_eq!(fault("zookeeper://a:1/../x"), UrlError::Prefix("/../x".into()));
        assert!(matches!(fault("raft://a:1?keys=/k&cluster=-"), UrlError::Cluster(_)));
    }
}
