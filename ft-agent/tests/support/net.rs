//! Two hosts in network namespaces: one runs the guest, the other is its client.

use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Address of the guest as `--ip` takes it.
pub const GUEST_IP: &str = "10.77.0.2/24,10.77.0.1";
/// Address of the guest.
pub const GUEST: &str = "10.77.0.2";
/// Its MAC address, as `--mac` takes it.
pub const GUEST_MAC: &str = "02:76:6d:66:74:01";

/// A host namespace with a tap on a bridge, and a client namespace on the same bridge. Removed on drop.
pub struct Hosts {
    /// Namespace in which the guest runs.
    pub host: String,
    /// Namespace of its client.
    pub client: String,
}

impl Hosts {
    /// Makes both namespaces and a tap `tap0` in the host's.
    pub fn new() -> Hosts {
        let id = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let hosts = Hosts { host: format!("vmft-h{id}"), client: format!("vmft-c{id}") };
        let (h, c) = (&hosts.host, &hosts.client);
        ip(&["netns", "add", h]);
        ip(&["netns", "add", c]);
        ip(&["-n", h, "link", "set", "lo", "up"]);
        ip(&["-n", h, "link", "add", "br0", "type", "bridge"]);
        ip(&["-n", h, "link", "set", "br0", "up"]);
        ip(&["-n", h, "link", "add", "veth0", "type", "veth", "peer", "name", "eth0", "netns", c]);
        ip(&["-n", h, "link", "set", "veth0", "master", "br0", "up"]);
        ip(&["-n", h, "tuntap", "add", "tap0", "mode", "tap"]);
        ip(&["-n", h, "link", "set", "tap0", "master", "br0", "up"]);
        ip(&["-n", c, "address", "add", "10.77.0.1/24", "dev", "eth0"]);
        ip(&["-n", c, "link", "set", "eth0", "up"]);
        hosts
    }

    /// A command to run on the client.
    pub fn on_client(&self, program: &str) -> Command {
        let mut c = Command::new("ip");
        c.args(["netns", "exec", &self.client, program]);
        c
    }

    /// Runs a command on the client; panics with its output when it fails.
    pub fn client(&self, program: &str, args: &[&str]) -> String {
        let output = self.on_client(program).args(args).output().expect("ip netns exec");
        succeeded(&format!("{program} {}", args.join(" ")), output)
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for ns in [&self.host, &self.client] {
            let deleted = Command::new("ip").args(["netns", "delete", ns]).status();
            if !deleted.is_ok_and(|s| s.success()) {
                eprintln!("namespace {ns} could not be removed");
            }
        }
    }
}

/// Runs `ip`; panics with its output when it fails.
pub fn ip(args: &[&str]) {
    let output = Command::new("ip").args(args).output().expect("the ip command");
    succeeded(&format!("ip {}", args.join(" ")), output);
}

fn succeeded(what: &str, output: Output) -> String {
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    assert!(
        output.status.success(),
        "{what}: {}\n{}{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}
