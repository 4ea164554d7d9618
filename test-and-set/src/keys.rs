//! Keys: every party has its own key and self-signed certificate, and copies of the certificates that it accepts.
//!
//! There is no certificate authority, and names are not checked: a certificate is accepted if the directory has a copy of it.
//!
//! ```text
//! DIR/own.key           the private key, PEM, readable by its owner only
//! DIR/own.crt           its certificate, PEM
//! DIR/members/ID.crt    the certificate of each member of the store, by its number
//! DIR/clients/NAME.crt  the certificate of each client; for members only
//! DIR/peers/NAME.crt    the certificate of each host that may form a pair with this one; for hosts only
//! ```
//!
//! The accepted certificates are read again at most a second after a change, so they can be added and removed while a server
//! runs.

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::wire::NodeId;

/// What is wrong with a directory of keys.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// A file cannot be read or written.
    #[error("cannot read or write {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What happened.
        source: std::io::Error,
    },
    /// A file is not PEM, or holds something else.
    #[error("{path} is not a PEM file with a key or certificate, as its name requires")]
    Pem {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: rustls::pki_types::pem::Error,
    },
    /// A file in `members/` is not named by a member's number.
    #[error("{0} is not named after a member's number, such as 1.crt: rename or remove it")]
    MemberName(PathBuf),
    /// A certificate cannot be made.
    #[error("cannot make a certificate for {name}")]
    Make {
        /// The party that it is for.
        name: String,
        /// Why.
        source: rcgen::Error,
    },
    /// The key and the certificate do not belong together, or cannot be used for TLS.
    #[error("cannot use own.key and own.crt for TLS: make both anew with `vmft-store keys`")]
    Tls(#[from] rustls::Error),
}

fn io_error(path: &Path) -> impl FnOnce(std::io::Error) -> KeysError {
    move |source| KeysError::Io { path: path.into(), source }
}

fn read_certificate(path: &Path) -> Result<CertificateDer<'static>, KeysError> {
    let pem = fs::read(path).map_err(io_error(path))?;
    CertificateDer::from_pem_slice(&pem).map_err(|source| KeysError::Pem { path: path.into(), source })
}

/// A party's keys, and the certificates that it accepts.
#[derive(Debug)]
pub struct Keys {
    dir: PathBuf,
    pub(crate) certificate: CertificateDer<'static>,
    pub(crate) key: PrivateKeyDer<'static>,
    pins: Mutex<(AcceptedCertificates, Instant)>,
}

#[derive(Debug)]
struct AcceptedCertificates {
    members: BTreeMap<NodeId, CertificateDer<'static>>,
    clients: Vec<CertificateDer<'static>>,
    peers: Vec<CertificateDer<'static>>,
}

impl AcceptedCertificates {
    fn load(dir: &Path) -> Result<Self, KeysError> {
        let mut members = BTreeMap::new();
        for path in certificates_in(&dir.join("members"))? {
            let id = path.file_stem().and_then(|stem| stem.to_str()?.parse().ok());
            let id = id.ok_or_else(|| KeysError::MemberName(path.clone()))?;
            members.insert(id, read_certificate(&path)?);
        }
        let all = |kind: &str| {
            certificates_in(&dir.join(kind))?
                .iter()
                .map(|path| read_certificate(path))
                .collect::<Result<_, _>>()
        };
        Ok(Self { members, clients: all("clients")?, peers: all("peers")? })
    }
}

/// The `.crt` files of a directory; none if it does not exist.
fn certificates_in(dir: &Path) -> Result<Vec<PathBuf>, KeysError> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
        entries => entries.map_err(io_error(dir))?,
    };
    let paths =
        entries.map(|entry| entry.map(|e| e.path())).collect::<Result<Vec<_>, _>>().map_err(io_error(dir))?;
    Ok(paths.into_iter().filter(|path| path.extension().is_some_and(|e| e == "crt")).collect())
}

/// How long the accepted certificates are used before they are read again.
const RELOAD_AFTER: Duration = Duration::from_secs(1);

impl Keys {
    /// Reads a party's directory.
    pub fn load(dir: &Path) -> Result<Self, KeysError> {
        let certificate = read_certificate(&dir.join("own.crt"))?;
        let path = dir.join("own.key");
        let pem = fs::read(&path).map_err(io_error(&path))?;
        let key = PrivateKeyDer::from_pem_slice(&pem).map_err(|source| KeysError::Pem { path, source })?;
        let pins = Mutex::new((AcceptedCertificates::load(dir)?, Instant::now()));
        Ok(Self { dir: dir.into(), certificate, key, pins })
    }

    /// Calls `look` with the accepted certificates, after reading them again if they are old. If they cannot be read, those read
    /// before stay in use.
    fn with_accepted<T>(&self, look: impl FnOnce(&AcceptedCertificates) -> T) -> T {
        let mut pins = self.pins.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if pins.1.elapsed() >= RELOAD_AFTER {
            match AcceptedCertificates::load(&self.dir) {
                Ok(read) => pins.0 = read,
                Err(error) => {
                    eprintln!(
                        "cannot reload the accepted certificates, so those read before stay in use: {error}"
                    )
                }
            }
            pins.1 = Instant::now();
        }
        look(&pins.0)
    }

    /// Whether this is a member's certificate.
    pub(crate) fn is_member(&self, certificate: &CertificateDer<'_>) -> bool {
        self.with_accepted(|pins| pins.members.values().any(|pin| pin == certificate))
    }

    /// Whether this is the certificate of the member with this number.
    pub(crate) fn is_this_member(&self, id: NodeId, certificate: &CertificateDer<'_>) -> bool {
        self.with_accepted(|pins| pins.members.get(&id).is_some_and(|pin| pin == certificate))
    }

    /// This party's own certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// Whether this is the certificate of a host that may form a pair with this one, or this host's own: two hosts with the same
    /// keys finish their handshake, so that both learn why they are then refused.
    pub(crate) fn is_peer_or_own(&self, certificate: &CertificateDer<'_>) -> bool {
        *certificate == self.certificate
            || self.with_accepted(|pins| pins.peers.iter().any(|pin| pin == certificate))
    }

    /// Whether this is a member's or a client's certificate.
    pub(crate) fn is_known(&self, certificate: &CertificateDer<'_>) -> bool {
        self.with_accepted(|pins| pins.members.values().chain(&pins.clients).any(|pin| pin == certificate))
    }
}

/// Makes keys: in `dir` one directory for each member, named by its number, and one for each client, each complete and ready to
/// be copied to its host. The clients accept each other as peers.
///
/// # Errors
/// A file exists already, or cannot be written.
pub fn make_set(dir: &Path, members: &[NodeId], clients: &[String]) -> Result<(), KeysError> {
    let parties =
        members.iter().map(|id| (id.to_string(), true)).chain(clients.iter().map(|c| (c.clone(), false)));
    let mut made = vec![];
    for (name, is_member) in parties {
        let pair = rcgen::generate_simple_self_signed([name.clone()])
            .map_err(|source| KeysError::Make { name: name.clone(), source })?;
        made.push((name, is_member, pair));
    }
    for (name, is_member, pair) in &made {
        let own = dir.join(name);
        write_new(&own.join("own.key"), &pair.signing_key.serialize_pem(), 0o600)?;
        write_new(&own.join("own.crt"), &pair.cert.pem(), 0o644)?;
        for (other, other_is_member, other_pair) in &made {
            let kind = match (is_member, other_is_member) {
                (_, true) => "members",
                (true, false) => "clients",
                (false, false) => "peers",
            };
            if other != name || *other_is_member {
                write_new(&own.join(kind).join(format!("{other}.crt")), &other_pair.cert.pem(), 0o644)?;
            }
        }
    }
    Ok(())
}

fn write_new(path: &Path, text: &str, mode: u32) -> Result<(), KeysError> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(io_error(parent))?;
    }
    let file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    let existing = |e: std::io::Error| match e.kind() {
        kind @ ErrorKind::AlreadyExists => {
            std::io::Error::new(kind, "the file exists and is not overwritten; give another directory")
        }
        _ => e,
    };
    file.map_err(existing).and_then(|mut file| file.write_all(text.as_bytes())).map_err(io_error(path))
}
