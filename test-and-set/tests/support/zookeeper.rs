//! One ZooKeeper server on loopback ports of its own: a plain one, and one with mutual TLS.

use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::etcd::{keys_as, make_keys};
use super::{Running, find_program, free_address};

/// One ZooKeeper server.
pub struct ZooKeeper {
    /// The plain port's address.
    pub address: String,
    secure_address: String,
    dir: TempDir,
    node: Running,
}

const ZOOKEEPER_JAR: &str = "/usr/share/java/zookeeper.jar";
const NETTY_JAR: &str = "/usr/share/java/netty-handler.jar";
const CLASS_PATH: [&str; 2] = ["-cp", "/etc/zookeeper/conf:/usr/share/java/*"];

impl ZooKeeper {
    /// Why it cannot be started here, if it cannot.
    pub fn missing() -> Option<&'static str> {
        let there = [ZOOKEEPER_JAR, NETTY_JAR].iter().all(|jar| Path::new(jar).exists())
            && find_program("java").is_some();
        (!there).then_some("ZooKeeper is not installed, run test-and-set/tests/install-peers")
    }

    pub fn start() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let (address, secure_address) = (free_address(), free_address());
        let (ip, port, secure_port) = (address.ip(), address.port(), secure_address.port());
        let path = |name: &str| dir.path().join(name);
        make_keys(dir.path(), "somebody");
        let text = |name: &str| fs::read_to_string(path(name)).expect("a file");
        fs::write(path("server.pem"), text("own.key") + &text("own.crt")).expect("a file");
        fs::write(path("trusted.pem"), text("ca.crt")).expect("a file");
        fs::create_dir(path("data")).expect("a directory");
        let config = format!(
            "tickTime=500\ndataDir={}\nclientPort={port}\nclientPortAddress={ip}\nadmin.enableServer=false\n\
             serverCnxnFactory=org.apache.zookeeper.server.NettyServerCnxnFactory\n\
             secureClientPort={secure_port}\nsecureClientPortAddress={ip}\nssl.clientAuth=need\n\
             ssl.keyStore.location={}\nssl.trustStore.location={}\n",
            path("data").display(),
            path("server.pem").display(),
            path("trusted.pem").display(),
        );
        fs::write(path("zoo.cfg"), config).expect("a configuration");
        let mut command = Command::new("java");
        command.arg("-Xmx128m").args(CLASS_PATH);
        command.arg("org.apache.zookeeper.server.quorum.QuorumPeerMain").arg(path("zoo.cfg"));
        let node = Running::start(&mut command, &path("log"));
        // Java takes its time on a busy machine.
        let deadline = Instant::now() + Duration::from_secs(90);
        while [address, secure_address].iter().any(|at| TcpStream::connect(at).is_err()) {
            assert!(Instant::now() < deadline, "ZooKeeper does not listen");
            std::thread::sleep(Duration::from_millis(50));
        }
        let [address, secure_address] = [address, secure_address].map(|at| at.to_string());
        Self { address, secure_address, dir, node }
    }

    /// The URL without TLS and without a user.
    pub fn url(&self) -> String {
        format!("zookeeper://{}", self.address)
    }

    /// The URL with TLS and a certificate, without a user.
    pub fn url_with_certificate(&self) -> String {
        format!("zookeeper://{}?keys={}", self.secure_address, self.dir.path().display())
    }

    /// The URL with TLS and a user.
    pub fn url_as(&self, name: &str, password: &str) -> String {
        let keys = keys_as(self.dir.path(), name, password);
        format!("zookeeper://{}?keys={}", self.secure_address, keys.display())
    }

    /// What ZooKeeper's own client prints when it is given these commands at the plain port.
    pub fn shell(&self, commands: &[String]) -> String {
        let mut command = Command::new("java");
        command.arg("-Xmx64m").args(CLASS_PATH).arg("org.apache.zookeeper.ZooKeeperMain");
        command.args(["-server", &self.address, "-timeout", "10000"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut shell = command.spawn().expect("zkCli");
        let mut input = shell.stdin.take().expect("its input");
        input.write_all((commands.join("\n") + "\nquit\n").as_bytes()).expect("to write");
        drop(input);
        let said = shell.wait_with_output().expect("its output");
        String::from_utf8_lossy(&[said.stdout, said.stderr].concat()).into_owned()
    }

    /// Kills it, without a chance to clean up.
    pub fn kill(&mut self) {
        self.node.kill();
    }
}
