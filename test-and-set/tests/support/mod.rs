//! Stores that a test starts on free loopback ports, and that end with the test.
#![allow(dead_code, reason = "each test uses its part")]

pub mod damage;
mod disturbed;
pub mod etcd;
pub mod hostile;
pub mod latency;
pub mod membership;
pub mod nemesis;
pub mod net;
pub mod restoring;
pub mod roles;
pub mod rollback;
pub mod scale;
pub mod steady;
pub mod upgrade;
mod zookeeper;

use std::fs::{self, File};
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};
use std::time::{Duration, Instant};

pub use etcd::Etcd;
use libtest_mimic::{Failed, Trial};
use tempfile::TempDir;
use test_and_set::keys;
use test_and_set::store::TestAndSet;
#[allow(unused_imports, reason = "each test uses its part")]
pub use zookeeper::ZooKeeper;

/// An address on which nobody listens or will: a loopback address of this process alone, and a port that it has not used yet and
/// that the kernel gives to no outgoing connection.
pub fn free_address() -> SocketAddr {
    static NEXT: AtomicU16 = AtomicU16::new(10_000);
    // A process id has at most 22 bits.
    let [_, a, b, c] = std::process::id().to_be_bytes();
    SocketAddr::from(([127, 64 | a, b, c], NEXT.fetch_add(1, Relaxed)))
}

/// A process that is killed when this is dropped.
pub struct Running(pub Child);

impl Running {
    /// Starts a program with its output in a file.
    pub fn start(command: &mut Command, log: &Path) -> Self {
        let file = File::options().create(true).append(true).open(log).expect("a log file");
        command.stdin(Stdio::null()).stdout(file.try_clone().expect("the log file")).stderr(file);
        Self(command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}")))
    }

    /// Kills it, without a chance to clean up.
    pub fn kill(&mut self) {
        self.0.kill().expect("to kill the process");
        self.0.wait().expect("its end");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // An error means that it has already ended.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Members of our own store.
pub struct Cluster {
    pub dir: TempDir,
    pub addresses: Vec<SocketAddr>,
    pub nodes: Vec<Option<Running>>,
    pub extra: Vec<String>,
    /// A rule that its members leave out.
    pub left_out: Option<&'static str>,
    /// The `vmft-store` that members which are started run.
    pub program: PathBuf,
}

impl Cluster {
    /// Starts this number of members.
    pub fn start(members: usize) -> Self {
        Self::start_with(members, &[])
    }

    /// Starts this number of members, each with these additional arguments.
    pub fn start_with(members: usize, extra: &[&str]) -> Self {
        let mut cluster = Self::prepare(members, extra);
        (1..=members).for_each(|id| cluster.start_node(id));
        cluster
    }

    /// Makes the keys of this number of members, which are not started.
    pub fn prepare(members: usize, extra: &[&str]) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let ids: Vec<u64> = (1..=members as u64 + 1).collect();
        let [hosts, operators] = [&["client", "a", "b", "c"][..], &["client", "admin"]]
            .map(|names| names.iter().map(|name| name.to_string()).collect::<Vec<_>>());
        keys::make_set(&dir.path().join("keys"), &ids, &hosts, &operators).expect("keys");
        let addresses = ids.iter().map(|_| free_address()).collect();
        let extra = extra.iter().map(|s| s.to_string()).collect();
        let (nodes, program) = (ids.iter().map(|_| None).collect(), env!("CARGO_BIN_EXE_vmft-store").into());
        Self { dir, addresses, nodes, extra, left_out: None, program }
    }

    /// The number of members that it was started with.
    pub fn first_members(&self) -> usize {
        self.nodes.len() - 1
    }

    pub fn address(&self, id: usize) -> String {
        self.addresses[id - 1].to_string()
    }

    pub fn keys(&self, name: &str) -> PathBuf {
        self.dir.path().join("keys").join(name)
    }

    pub fn data(&self, id: usize) -> PathBuf {
        self.dir.path().join(format!("data{id}"))
    }

    /// Starts a member, or starts it again with its data.
    pub fn start_node(&mut self, id: usize) {
        let peers: Vec<_> = (1..=self.first_members()).map(|i| format!("{i}={}", self.address(i))).collect();
        self.start_node_as(id, &["--peers", &peers.join(",")]);
    }

    /// Starts a member; `how` has the arguments by which it joins or forms the cluster.
    pub fn start_node_as(&mut self, id: usize, how: &[&str]) {
        let mut command = Command::new(&self.program);
        command
            .args(["serve", "--id", &id.to_string(), "--listen", &self.address(id)])
            .args(how)
            .args(&self.extra);
        command.envs(self.left_out.map(|rule| ("VMFT_LEAVE_OUT", rule)));
        command.arg("--data").arg(self.data(id)).arg("--keys").arg(self.keys(&id.to_string()));
        self.nodes[id - 1] = Some(Running::start(&mut command, &self.log(id)));
    }

    pub fn log(&self, id: usize) -> PathBuf {
        self.dir.path().join(format!("{id}.log"))
    }

    /// Kills a member, without a chance to clean up.
    pub fn kill(&mut self, id: usize) {
        self.nodes[id - 1].take().expect("a running member").kill();
    }

    /// The URL for a client that is a host and an operator.
    pub fn url(&self) -> String {
        self.url_as("client")
    }

    /// The URL with the keys of a party: the hosts are client, a, b and c, the operators client and admin.
    pub fn url_as(&self, party: &str) -> String {
        let nodes: Vec<_> = (1..=self.first_members()).map(|i| self.address(i)).collect();
        format!("raft://{}?keys={}", nodes.join(","), self.keys(party).display())
    }

    /// The output of a `vmft-store` command for this store.
    pub fn tool(&self, args: &[&str]) -> std::process::Output {
        self.tool_as("client", args)
    }

    /// The output of a `vmft-store` command for this store, with the keys of a party.
    pub fn tool_as(&self, party: &str, args: &[&str]) -> std::process::Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmft-store"));
        command.args(args).args(["--store", &self.url_as(party)]);
        command.output().expect("vmft-store")
    }

    /// `vmft-store status --json`, parsed.
    pub fn status(&self) -> serde_json::Value {
        serde_json::from_slice(&self.tool(&["status", "--json", "--patience", "2"]).stdout).expect("JSON")
    }

    /// The number of the leader; waits until there is one.
    pub fn leader(&self) -> usize {
        wait_for("a leader", || {
            let status = self.status();
            let rows = status.as_array()?.iter().map(|row| &row["answer"]["status"]);
            let leader = rows.filter(|s| s["role"] == "leader").max_by_key(|s| s["term"].as_u64());
            leader?["id"].as_u64().map(|id| id as usize)
        })
    }
}

/// A small file system in the place of a member's data, which is unmounted when this is dropped.
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Why it cannot be mounted here, if it cannot.
    pub fn missing() -> Option<&'static str> {
        (!rustix::process::geteuid().is_root()).then_some("a small file system can be mounted by root only")
    }

    /// Mounts 64 MiB at this path, which must not exist.
    pub fn mount(at: &Path) -> std::io::Result<Self> {
        fs::create_dir(at)?;
        let mut mount = Command::new("mount");
        let mounted = mount.args(["-t", "tmpfs", "-o", "size=64m", "tmpfs"]).arg(at).status()?;
        assert!(mounted.success());
        Ok(Self(at.into()))
    }

    fn ballast(&self) -> PathBuf {
        self.0.join("ballast")
    }

    /// Fills it, up to a few MiB.
    pub fn fill(&self) -> std::io::Result<()> {
        fs::write(self.ballast(), vec![1; 44 << 20])
    }

    /// Fills it to the last byte.
    pub fn fill_completely(&self) -> std::io::Result<()> {
        let mut ballast = File::create(self.ballast())?;
        while ballast.write_all(&[1; 1 << 16]).is_ok() {}
        Ok(())
    }

    /// Makes room again.
    pub fn empty(&self) -> std::io::Result<()> {
        fs::remove_file(self.ballast())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        Command::new("umount").arg("-l").arg(&self.0).status().ok();
    }
}

/// Waits up to 20 s for something.
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "no {what} within 20 s");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A client; must be called in a runtime.
pub fn client(url: &str) -> std::sync::Arc<dyn TestAndSet> {
    test_and_set::connect(&url.parse().expect("a URL")).expect("a client")
}

/// The path of a program, if it is installed.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let places = ["/usr/bin", "/usr/sbin", "/usr/local/bin", "/bin", "/sbin"];
    places.iter().map(|dir| Path::new(dir).join(name)).find(|path| path.exists())
}

/// Checks the interface for plain threads.
pub fn blocking_suite(store: &test_and_set::blocking::BlockingStore) {
    use test_and_set::names::{Generation, Incarnation};
    use test_and_set::record::{Applied, Member, Members, Verdict};
    let patience = Duration::from_secs(10);
    let [a, b] = [Incarnation::random(), Incarnation::random()];
    let members = Members { primary: Member::new(a), backup: Some(Member::new(b)) };
    let vm = "plain".parse().expect("a name");
    let first = Generation::FIRST;
    assert_eq!(store.open(&vm, first, &members, patience).expect("open"), Applied::Done);
    let (tell, told) = std::sync::mpsc::channel();
    store.begin_take(vm.clone(), first, a, patience, move |verdict| tell.send(verdict).expect("a receiver"));
    assert!(matches!(told.recv_timeout(patience), Ok(Verdict::Won)));
    assert!(matches!(store.take(&vm, first, b, patience), Verdict::Lost(holder) if holder == a));
    assert_eq!(store.get(&vm, patience).expect("get").and_then(|r| r.holder()), Some(a));
    assert_eq!(store.list(None, patience).expect("list").len(), 1);
    assert_eq!(store.forget(&vm, first, patience).expect("forget"), Applied::Done);
}

/// A test that is skipped if something that it needs is missing. The reason goes to the file that $VMFT_SKIPPED names, whose reader
/// does not count the test as passed; without that variable the test is ignored, with the reason in its name.
pub fn with_need(
    name: &str,
    missing: Option<&'static str>,
    test: impl FnOnce() -> Result<(), Failed> + Send + 'static,
) -> Trial {
    let Some(why) = missing else { return Trial::test(name, test) };
    let Some(list) = std::env::var_os("VMFT_SKIPPED") else {
        return Trial::test(format!("{name} SKIPPED: {why}"), test).with_ignored_flag(true);
    };
    let line = format!("test-and-set {name}: {why}\n");
    Trial::test(name, move || Ok(File::options().append(true).open(list)?.write_all(line.as_bytes())?))
}
