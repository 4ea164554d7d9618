//! Members of etcd on loopback ports of their own, plain or with mutual TLS.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
};
use tempfile::TempDir;
use test_and_set::etcd::EtcdStore;

use super::{Running, find_program, free_address};

/// Members of etcd.
pub struct Etcd {
    pub clients: Vec<String>,
    has_tls: bool,
    dir: TempDir,
    commands: Vec<Command>,
    nodes: Vec<Running>,
}

impl Etcd {
    /// Why it cannot be started here, if it cannot.
    pub fn missing() -> Option<&'static str> {
        (find_program("etcd").is_none() || find_program("etcdctl").is_none())
            .then_some("etcd is not installed, run test-and-set/tests/install-peers")
    }

    /// Starts this number of members, without TLS.
    pub fn start(members: usize) -> Self {
        Self::start_as(members, None)
    }

    /// Starts this number of members, with mutual TLS among them and to their clients.
    pub fn start_with_tls(members: usize) -> Self {
        Self::start_with_certificate(members, "somebody")
    }

    /// The same, with this name in the clients' certificate.
    pub fn start_with_certificate(members: usize, name: &str) -> Self {
        Self::start_as(members, Some(name))
    }

    fn start_as(members: usize, name: Option<&str>) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        if let Some(name) = name {
            make_keys(dir.path(), name);
        }
        let has_tls = name.is_some();
        let scheme = if has_tls { "https" } else { "http" };
        let addresses: Vec<_> = (0..members).map(|_| (free_address(), free_address())).collect();
        let peer = |i: usize| format!("{scheme}://{}", addresses[i].1);
        let cluster: Vec<_> = (0..members).map(|i| format!("n{i}={}", peer(i))).collect();
        let commands = (0..members).map(|i| {
            let client = format!("{scheme}://{}", addresses[i].0);
            let mut command = Command::new("etcd");
            command.args(["--name", &format!("n{i}"), "--initial-cluster", &cluster.join(",")]);
            command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
            command.args(["--listen-peer-urls", &peer(i), "--initial-advertise-peer-urls", &peer(i)]);
            command.arg("--data-dir").arg(dir.path().join(format!("data{i}")));
            // A password is checked in little time, also on a busy machine.
            command.args(["--bcrypt-cost", "4"]);
            for side in ["", "peer-"].into_iter().filter(|_| has_tls) {
                command.arg(format!("--{side}client-cert-auth"));
                for (option, file) in
                    [("trusted-ca-file", "ca.crt"), ("cert-file", "own.crt"), ("key-file", "own.key")]
                {
                    command.arg(format!("--{side}{option}")).arg(dir.path().join(file));
                }
            }
            command
        });
        let clients = addresses.iter().map(|(client, _)| client.to_string()).collect();
        let mut etcd = Self { clients, has_tls, commands: commands.collect(), dir, nodes: vec![] };
        (0..members).for_each(|i| etcd.start_member(i));
        etcd
    }

    fn start_member(&mut self, i: usize) {
        let log = self.dir.path().join(format!("{i}.log"));
        self.nodes.push(Running::start(&mut self.commands[i], &log));
    }

    /// Kills all members, and starts them again with their data: they have forgotten the tokens that they gave.
    pub fn restart(&mut self) {
        self.nodes.clear();
        (0..self.commands.len()).for_each(|i| self.start_member(i));
    }

    /// Enables etcd's authentication, with a user `vmft` that may use only the records of vmft.
    pub fn enable_users(&self, password: &str) {
        let begun = Instant::now();
        while !self.tool(&["endpoint", "health"]).0 {
            assert!(begun.elapsed() < Duration::from_secs(20), "etcd does not start");
        }
        for command in [
            "user add root:secret",
            "user grant-role root root",
            &format!("user add vmft:{password}"),
            "role add vmft",
            "role grant-permission vmft readwrite /vmft/ --prefix",
            "user grant-role vmft vmft",
            "auth enable",
        ] {
            let (done, said) = self.tool(&command.split(' ').collect::<Vec<_>>());
            assert!(done, "{command}: {said}");
        }
    }

    /// Whether `etcdctl` succeeds, with the client's certificate if there is one, and what it prints.
    pub fn tool(&self, arguments: &[&str]) -> (bool, String) {
        let mut command = Command::new("etcdctl");
        let scheme = if self.has_tls { "https" } else { "http" };
        command.env("ETCDCTL_API", "3").arg(format!("--endpoints={scheme}://{}", self.clients[0]));
        let files = [("cacert", "ca.crt"), ("cert", "own.crt"), ("key", "own.key")];
        for (option, file) in files.into_iter().filter(|_| self.has_tls) {
            command.arg(format!("--{option}={}", self.dir.path().join(file).display()));
        }
        let output = command.args(arguments).output().expect("etcdctl");
        (
            output.status.success(),
            String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned(),
        )
    }

    /// The URL with TLS and a user.
    pub fn url_as(&self, name: &str, password: &str) -> String {
        let dir = keys_as(self.dir.path(), name, password);
        format!("etcd://{}?keys={}", self.clients.join(","), dir.display())
    }

    fn keys(&self) -> Option<&Path> {
        self.has_tls.then(|| self.dir.path())
    }

    pub fn url(&self) -> String {
        let keys = self.keys().map(|dir| format!("?keys={}", dir.display())).unwrap_or_default();
        format!("etcd://{}{keys}", self.clients.join(","))
    }

    /// A client of one member only.
    pub fn client_of(&self, member: usize) -> EtcdStore {
        EtcdStore::new(&self.clients[member..=member], "/vmft", self.keys().into()).expect("a client")
    }
}

/// Makes one certificate for all members and clients, with this common name, and the authority that signs it.
pub fn make_keys(dir: &Path, name: &str) {
    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().expect("a key");
    let authority = CertifiedIssuer::self_signed(authority, key).expect("an authority");
    // Members connect to each other from the first address.
    let addresses = ["127.0.0.1".to_string(), free_address().ip().to_string()];
    let mut own = CertificateParams::new(addresses).expect("a name");
    own.distinguished_name.push(DnType::CommonName, name);
    own.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let key = KeyPair::generate().expect("a key");
    let certificate = own.signed_by(&key, &authority).expect("a certificate");
    let files =
        [("ca.crt", authority.pem()), ("own.crt", certificate.pem()), ("own.key", key.serialize_pem())];
    for (name, pem) in files {
        fs::write(dir.join(name), pem).expect("a file");
    }
    fs::set_permissions(dir.join("own.key"), fs::Permissions::from_mode(0o600)).expect("its mode");
}

/// The directory of a user with the keys in `dir`.
pub fn keys_as(dir: &Path, name: &str, password: &str) -> PathBuf {
    let keys = dir.join(format!("{name}-{password}"));
    fs::create_dir_all(&keys).expect("a directory");
    for file in ["ca.crt", "own.crt", "own.key"] {
        fs::copy(dir.join(file), keys.join(file)).expect("a copy");
    }
    fs::write(keys.join("user"), format!("{name}:{password}\n")).expect("a file");
    fs::set_permissions(keys.join("user"), fs::Permissions::from_mode(0o600)).expect("its mode");
    keys
}
