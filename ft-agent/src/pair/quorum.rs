//! Whether the store outlives this host: if not, a failover finds nobody to give the verdict.

use std::net::{IpAddr, ToSocketAddrs};

use nix::ifaddrs::getifaddrs;
use test_and_set::url::StoreUrl;
use tracing::warn;

/// Warns if the loss of this host would take the store's quorum with it, by the addresses in the store's URL. Each side of
/// a pair looks at its own. Names may take long to resolve: it is for a thread.
pub fn warn_if_lost_with_this_host(url: &StoreUrl) {
    let Ok(interfaces) = getifaddrs() else { return };
    let ours: Vec<IpAddr> = interfaces.filter_map(|i| i.address).filter_map(|a| ip(&a)).collect();
    let nodes = url.nodes();
    let here = nodes.iter().filter(|node| is_here(node, &ours)).count();
    if is_lost(nodes.len(), here) {
        warn!(
            "{here} of the store's {} nodes on this host: if it is lost so is the store's quorum, and the other side \
             cannot go on; put them on hosts that do not fail together",
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

/// Whether fewer than a majority of `nodes` are left without those that are here.
fn is_lost(nodes: usize, here: usize) -> bool {
    here > 0 && nodes - here < nodes / 2 + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quorum_is_lost_with_a_host_that_has_too_many_of_its_nodes() {
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
