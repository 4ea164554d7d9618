//! Members of etcd on loopback ports of their own, plain or with mutual TLS.

use std::fs;
use std::path::Path;
use std::process::Command;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair};
use tempfile::TempDir;
use test_and_set::etcd::EtcdStore;

use super::{Running, find_program, free_address};

/// Members of etcd.
pub struct Etcd {
    pub clients: Vec<String>,
    has_tls: bool,
    dir: TempDir,
    _nodes: Vec<Running>,
}

impl Etcd {
    /// Why it cannot be started here, if it cannot.
    pub fn missing() -> Option<&'static str> {
        find_program("etcd")
            .is_none()
            .then_some("etcd is not installed, run test-and-set/tests/install-peers")
    }

    /// Starts this number of members, without TLS.
    pub fn start(members: usize) -> Self {
        Self::start_as(members, false)
    }

    /// Starts this number of members, with mutual TLS among them and to their clients.
    pub fn start_with_tls(members: usize) -> Self {
        Self::start_as(members, true)
    }

    fn start_as(members: usize, has_tls: bool) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        if has_tls {
            make_keys(dir.path());
        }
        let scheme = if has_tls { "https" } else { "http" };
        let addresses: Vec<_> = (0..members).map(|_| (free_address(), free_address())).collect();
        let peer = |i: usize| format!("{scheme}://{}", addresses[i].1);
        let cluster: Vec<_> = (0..members).map(|i| format!("n{i}={}", peer(i))).collect();
        let nodes = (0..members).map(|i| {
            let client = format!("{scheme}://{}", addresses[i].0);
            let mut command = Command::new("etcd");
            command.args(["--name", &format!("n{i}"), "--initial-cluster", &cluster.join(",")]);
            command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
            command.args(["--listen-peer-urls", &peer(i), "--initial-advertise-peer-urls", &peer(i)]);
            command.arg("--data-dir").arg(dir.path().join(format!("data{i}")));
            for side in ["", "peer-"].into_iter().filter(|_| has_tls) {
                command.arg(format!("--{side}client-cert-auth"));
                for (option, file) in
                    [("trusted-ca-file", "ca.crt"), ("cert-file", "own.crt"), ("key-file", "own.key")]
                {
                    command.arg(format!("--{side}{option}")).arg(dir.path().join(file));
                }
            }
            Running::start(&mut command, &dir.path().join(format!("{i}.log")))
        });
        let nodes = nodes.collect();
        let clients = addresses.iter().map(|(client, _)| client.to_string()).collect();
        Self { clients, has_tls, dir, _nodes: nodes }
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
        EtcdStore::new(&self.clients[member..=member], "/vmft", self.keys()).expect("a client")
    }
}

/// Makes one certificate for all members and clients, and the authority that signs it.
fn make_keys(dir: &Path) {
    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().expect("a key");
    let authority = CertifiedIssuer::self_signed(authority, key).expect("an authority");
    // Members connect to each other from the first address.
    let addresses = ["127.0.0.1".to_string(), free_address().ip().to_string()];
    let mut own = CertificateParams::new(addresses).expect("a name");
    own.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let key = KeyPair::generate().expect("a key");
    let certificate = own.signed_by(&key, &authority).expect("a certificate");
    let files =
        [("ca.crt", authority.pem()), ("own.crt", certificate.pem()), ("own.key", key.serialize_pem())];
    for (name, pem) in files {
        fs::write(dir.join(name), pem).expect("a file");
    }
}
