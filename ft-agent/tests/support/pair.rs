//! A pair of hosts in network namespaces: a primary, a backup, a client of the guest, and a store with three
//! members.
//!
//! ```text
//!   client 10.77.0.1 ──┐            guest's network, 10.77.0.0/24
//!   A: br0, tap0  ─────┼─ lan
//!   B: br0, tap0  ─────┘
//!   A 10.78.0.1, B 10.78.0.2 ── log             the logging channel; strangers call from the store's host, 10.78.0.3
//!   A 10.79.0.1, B 10.79.0.2, store 10.79.0.3 ── ctl
//! ```

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use test_and_set::blocking::BlockingStore;
use test_and_set::keys::{Keys, key_id, make_set};
use test_and_set::server::{ServerSettings, raft::RaftTiming, serve};

use super::net::{GUEST_IP, GUEST_MAC, ip};
use super::vm::{Vm, vmft_in};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Runs `f` inside a network namespace, on a thread of its own.
pub fn inside<T: Send + 'static>(
    namespace: &str,
    f: impl FnOnce() -> T + Send + 'static,
) -> std::thread::JoinHandle<T> {
    let file = File::open(format!("/run/netns/{namespace}")).expect("namespace");
    std::thread::spawn(move || {
        setns(file.as_fd(), CloneFlags::CLONE_NEWNET).expect("setns");
        f()
    })
}

/// The namespaces, the keys and the store of a pair. All are removed on drop.
pub struct Site {
    id: String,
    /// Keys, data and sockets.
    pub dir: PathBuf,
    stores: Vec<(u64, tokio::sync::oneshot::Sender<()>, std::thread::JoinHandle<()>)>,
}

/// One of the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// The host that starts as primary.
    A,
    /// The host that starts as backup.
    B,
}

impl Site {
    /// Makes everything, with the store running.
    pub fn new() -> Site {
        let id = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(format!("vmft-pair-{id}"));
        let mut site = Site { id, dir, stores: Vec::new() };
        for name in ["lan", "a", "b", "client", "store"] {
            ip(&["netns", "add", &site.ns(name)]);
            ip(&["-n", &site.ns(name), "link", "set", "lo", "up"]);
        }
        for bridge in ["br0", "ctl", "log"] {
            ip(&["-n", &site.ns("lan"), "link", "add", bridge, "type", "bridge"]);
            ip(&["-n", &site.ns("lan"), "link", "set", bridge, "up"]);
        }
        for host in ["a", "b"] {
            let ns = site.ns(host);
            ip(&["-n", &ns, "link", "add", "br0", "type", "bridge"]);
            ip(&["-n", &ns, "link", "set", "br0", "up"]);
            ip(&["-n", &ns, "tuntap", "add", "tap0", "mode", "tap"]);
            ip(&["-n", &ns, "link", "set", "tap0", "master", "br0", "up"]);
            site.plug("br0", host, "lan0", None);
            ip(&["-n", &ns, "link", "set", "lan0", "master", "br0"]);
        }
        site.plug("br0", "client", "eth0", Some("10.77.0.1/24"));
        for (host, address) in [("a", "10.79.0.1/24"), ("b", "10.79.0.2/24"), ("store", "10.79.0.3/24")] {
            site.plug("ctl", host, "ctl0", Some(address));
        }
        for (host, address) in [("a", "10.78.0.1/24"), ("b", "10.78.0.2/24"), ("store", "10.78.0.3/24")] {
            site.plug("log", host, "link0", Some(address));
        }
        let hosts = ["a", "b", "stranger"].map(String::from);
        make_set(&site.dir.join("keys"), &[1, 2, 3], &hosts, &["admin".into()]).expect("keys");
        for id in 1..=3 {
            site.start_store(id);
        }
        site
    }

    /// Full name of a namespace: lan, a, b, client, store.
    pub fn ns(&self, name: &str) -> String {
        format!("vmft-{name}-{}", self.id)
    }

    /// Connects a host with a bridge of `lan` by a cable.
    fn plug(&self, bridge: &str, host: &str, interface: &str, address: Option<&str>) {
        let (lan, ns, port) = (self.ns("lan"), self.ns(host), format!("{bridge}-{host}"));
        ip(&["-n", &lan, "link", "add", &port, "type", "veth", "peer", "name", interface, "netns", &ns]);
        ip(&["-n", &lan, "link", "set", &port, "master", bridge, "up"]);
        if let Some(address) = address {
            ip(&["-n", &ns, "address", "add", address, "dev", interface]);
        }
        ip(&["-n", &ns, "link", "set", interface, "up"]);
    }

    /// Pulls or plugs the cable of a host to a bridge of `lan` (`br0`, `ctl` or `log`). While it is pulled
    /// nothing passes, and neither end is notified.
    pub fn set_port(&self, bridge: &str, host: Host, up: bool) {
        let port = format!("{bridge}-{}", host.name());
        ip(&["-n", &self.ns("lan"), "link", "set", &port, if up { "up" } else { "down" }]);
    }

    /// Drops everything that a host sends over the logging channel's network, or stops dropping it. The other
    /// direction works.
    pub fn set_mute(&self, host: Host, mute: bool) {
        let other = ["10.78.0.2", "10.78.0.1"][host as usize];
        lose(&self.ns(host.name()), other, "link0", mute);
    }

    /// Drops everything that the store sends to a host, or stops dropping it.
    pub fn set_store_mute(&self, host: Host, mute: bool) {
        lose(&self.ns("store"), ["10.79.0.1", "10.79.0.2"][host as usize], "ctl0", mute);
    }

    /// Starts a member of the store.
    pub fn start_store(&mut self, id: u64) {
        let address = |id: u64| format!("10.79.0.3:{}", 7400 + id);
        let settings = ServerSettings {
            id,
            listen: address(id).parse().expect("address"),
            peers: (1..=3).map(|id| (id, address(id))).collect(),
            data: self.dir.join(format!("store-{id}")),
            keys: self.keys(&id.to_string()),
            cluster: "vmft".parse().expect("name"),
            join: false,
            metrics: None,
            timing: RaftTiming::default(),
            names_per_host: ServerSettings::NAMES_PER_HOST,
        };
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let thread = inside(&self.ns("store"), move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
            runtime.block_on(async {
                tokio::select! {
                    ended = serve(settings) => ended.expect("store"),
                    _ = stopped => {}
                }
            });
        });
        self.stores.push((id, stop, thread));
    }

    /// Stops a member of the store.
    pub fn stop_store(&mut self, id: u64) {
        let at = self.stores.iter().position(|(i, ..)| *i == id).expect("a store that runs");
        let (_, stop, thread) = self.stores.swap_remove(at);
        drop(stop);
        thread.join().expect("store");
    }

    /// Moves a host's certificate on all members of the store, or removes it, and waits until the store knows.
    pub fn rename_host(&self, key_of: &str, from: &str, to: Option<&str>) {
        for member in ["1", "2", "3"] {
            let hosts = self.keys(member).join("hosts");
            let from = hosts.join(format!("{from}.crt"));
            let moved = match to {
                Some(to) => std::fs::rename(from, hosts.join(format!("{to}.crt"))),
                None => std::fs::remove_file(from),
            };
            moved.expect("a certificate");
        }
        let key = key_id(Keys::load(&self.keys(key_of)).expect("keys").own().certificate());
        let (url, to) = (self.store_url("admin"), to.map(|name| name.parse().expect("a name")));
        let wait = inside(&self.ns("a"), move || {
            let store = BlockingStore::connect(&url).expect("a client");
            let deadline = Instant::now() + Duration::from_secs(20);
            while store.host_of(key, Duration::from_secs(5)).expect("an answer") != to {
                assert!(Instant::now() < deadline, "the store does not read its keys again");
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        wait.join().expect("the store's answer");
    }

    /// Keys of a party.
    pub fn keys(&self, party: &str) -> PathBuf {
        self.dir.join("keys").join(party)
    }

    /// URL of the store for a party.
    pub fn store_url(&self, party: &str) -> String {
        let keys = self.keys(party);
        format!("raft://10.79.0.3:7401,10.79.0.3:7402,10.79.0.3:7403?keys={}", keys.display())
    }

    /// The control socket of a host.
    pub fn control(&self, host: Host) -> PathBuf {
        self.dir.join(format!("{}.sock", host.name()))
    }

    /// `vmft primary` on A or `vmft backup` on B, with these options for the machine.
    pub fn replica(&self, host: Host, machine: &[&str]) -> Command {
        let mut command = vmft_in(&self.ns(host.name()));
        let name = host.name();
        match host {
            Host::A => command.args(["primary", "--peer", "10.78.0.2:7500"]),
            Host::B => command.args(["backup", "--listen", "10.78.0.2:7500"]),
        };
        command.args(["--name", "vm", "--store", &self.store_url(name), "--keys"]).arg(self.keys(name));
        command.arg("--control").arg(self.control(host));
        command.args(["--tap", "tap0", "--ip", GUEST_IP, "--mac", GUEST_MAC]).args(machine);
        command
    }

    /// Starts both sides of a pair, and waits until the guest is ready.
    pub fn pair(&self, machine: &[&str]) -> (Vm, Vm) {
        self.pair_with(machine, &[])
    }

    /// The same with these environment variables.
    pub fn pair_with(&self, machine: &[&str], variables: &[(&str, &str)]) -> (Vm, Vm) {
        let start = |host| Vm::start(self.replica(host, machine).envs(variables.iter().copied()));
        let mut b = start(Host::B);
        b.wait_for("waiting for a primary", 30);
        let mut a = start(Host::A);
        a.wait_for("READY", 180);
        (a, b)
    }
}

/// Sends packets for an address to a neighbour that does not exist, so that they are lost, or stops doing
/// that.
fn lose(namespace: &str, address: &str, interface: &str, lost: bool) {
    let begin =
        ["-n", namespace, "neigh", if lost { "replace" } else { "delete" }, address, "dev", interface];
    let end: &[&str] = if lost { &["lladdr", "02:00:00:00:00:99"] } else { &[] };
    ip(&[&begin[..], end].concat());
}

impl Host {
    /// Its name in a [`Site`].
    pub fn name(self) -> &'static str {
        match self {
            Host::A => "a",
            Host::B => "b",
        }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        for (_, stop, thread) in self.stores.drain(..) {
            drop(stop);
            if thread.join().is_err() {
                eprintln!("a member of the store panicked");
            }
        }
        for name in ["a", "b", "client", "store", "lan"] {
            let ns = self.ns(name);
            if !Command::new("ip").args(["netns", "delete", &ns]).status().is_ok_and(|s| s.success()) {
                eprintln!("namespace {ns} could not be removed");
            }
        }
        remove(&self.dir);
    }
}

fn remove(dir: &Path) {
    if let Err(e) = std::fs::remove_dir_all(dir) {
        eprintln!("{}: {e}", dir.display());
    }
    // Threads of a stopped store may still be closing their files.
    std::thread::sleep(Duration::from_millis(1));
}
