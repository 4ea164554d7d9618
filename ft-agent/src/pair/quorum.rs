//! Checks whether the store survives the loss of this host. If it does not, the other side gets no verdict
//! and cannot go on.

use std::net::{IpAddr, ToSocketAddrs};

use nix::ifaddrs::getifaddrs;
use test_and_set::url::StoreUrl;
use tracing::warn;

/// Warns if the store would lose its quorum together with this host, judging by the addresses in the store's
/// URL. Each side of a pair checks its own host. Resolving names may take long, so call it on a thread of its
/// own.
pub fn warn_if_lost_with_this_host(url: &StoreUrl) {
    let Ok(interfaces) = getifaddrs() else { return };
    let ours: Vec<IpAddr> = interfaces.filter_map(|i| i.address).filter_map(|a| ip(&a)).collect();
    let nodes = url.nodes();
    let here = nodes.iter().filter(|node| is_here(node, &ours)).count();
    if is_lost(nodes.len(), here) {
        warn!(
            "{here} of the store's {} nodes run on this host: if this host is lost, the store has no quorum and \
             the other side cannot go on; move nodes to other hosts",
            nodes.len()
        );
    }
}

fn ip(address: &nix::sys::socket::SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|a| a.ip().into());
    v4.or_else(|| address.as_sockaddr_in6().map(|a| a.ip().into()))
}

fn is_here(node: &str, ours: &[IpAddr]) -> bool {
    let Ok(mut addresses) = node.to_socket_addrs() else { return false };
    addresses.any(|a| a.ip().is_loopback() || ours.contains(&a.ip()))
}

/// Whether the nodes that do not run here are fewer than a majority of all `nodes`.
fn is_lost(nodes: usize, here: usize) -> bool {
    here > 0 && nodes - here < nodes / 2 + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_quorum_is_lost_with_a_host_that_runs_too_many_nodes() {
        for (nodes, here, lost) in [
            (1, 0, false),
            (1, 1, true),
            (2, 1, true),
            (3, 1, false),
            (3, 2, true),
            (5, 2, false),
            (5, 3, true),
        ] {
            assert_eq!(is_lost(nodes, here), lost, "{here} of {nodes}");
        }
        let ours = ["192.0.2.7".parse().unwrap()];
        assert!(is_here("192.0.2.7:1", &ours) && is_here("127.0.0.1:1", &ours) && is_here("[::1]:1", &ours));
        assert!(!is_here("192.0.2.8:1", &ours));
    }
}
