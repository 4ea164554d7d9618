//! Network namespaces: a bridge, and hosts on it whose links can be cut silently, also in one direction.

use std::process::Command;

/// A small network, which is removed when this is dropped.
pub struct Net {
    name: String,
    hosts: Vec<u8>,
}

/// Runs `ip`; an error has its output.
fn ip(arguments: &str) -> Result<(), String> {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().map_err(|e| e.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("ip {arguments}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

impl Net {
    /// Why a network cannot be made here, if it cannot.
    pub fn missing() -> Option<&'static str> {
        if super::find_program("ip").is_none() {
            return Some("ip is not installed, run test-and-set/tests/install-peers");
        }
        let probe = format!("vmft-{}-probe", std::process::id());
        let made = ip(&format!("netns add {probe}")).and_then(|()| ip(&format!("netns del {probe}")));
        made.is_err().then_some("network namespaces cannot be made, run as root")
    }

    /// Makes a network with these hosts.
    pub fn new(hosts: &[u8]) -> Self {
        let net = Self {
            name: format!("vmft-{}-{}", std::process::id(), super::free_address().port()),
            hosts: hosts.to_vec(),
        };
        let bridge = net.namespace(0);
        let must = |arguments: String| ip(&arguments).expect("a network");
        must(format!("netns add {bridge}"));
        must(format!("-n {bridge} link add bridge type bridge"));
        must(format!("-n {bridge} link set bridge up"));
        for &host in hosts {
            let own = net.namespace(host);
            must(format!("netns add {own}"));
            must(format!("-n {own} link add eth0 type veth peer name port{host} netns {bridge}"));
            must(format!("-n {bridge} link set port{host} master bridge up"));
            must(format!("-n {own} addr add {}/24 dev eth0", Self::address(host)));
            must(format!("-n {own} link set eth0 up"));
            must(format!("-n {own} link set lo up"));
        }
        net
    }

    /// The name of a host's namespace.
    pub fn namespace(&self, host: u8) -> String {
        format!("{}-{host}", self.name)
    }

    /// A host's address.
    pub fn address(host: u8) -> String {
        format!("10.77.0.{host}")
    }

    /// Drops all packets from one host to the other, by sending them to an Ethernet address that no host has.
    pub fn cut(&self, from: u8, to: u8) {
        let (own, to) = (self.namespace(from), Self::address(to));
        ip(&format!("-n {own} neigh replace {to} lladdr 02:00:00:00:00:99 dev eth0 nud permanent"))
            .expect("to cut");
    }

    /// Restores every link.
    pub fn heal(&self) {
        for &from in &self.hosts {
            for &to in self.hosts.iter().filter(|to| **to != from) {
                // This fails if the link was never used, because it then has no entry.
                ip(&format!("-n {} neigh del {} dev eth0", self.namespace(from), Self::address(to))).ok();
            }
        }
    }

    /// Moves this thread into a host's namespace, in which it makes its sockets from now on.
    pub fn enter(&self, host: u8) {
        use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
        use std::os::fd::AsFd;
        let path = format!("/run/netns/{}", self.namespace(host));
        let file = std::fs::File::open(path).expect("the namespace");
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
            .expect("to enter the namespace");
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for host in self.hosts.iter().chain(&[0]) {
            if let Err(error) = ip(&format!("netns del {}", self.namespace(*host))) {
                eprintln!("{error}");
            }
        }
    }
}
