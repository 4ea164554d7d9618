//! Keys: every party has its own key and self-signed certificate, and copies of the certificates that it accepts.
//!
//! There is no certificate authority, and names are not checked: a certificate is accepted if the directory has a copy of it.
//!
//! ```text
//! DIR/own.key           the private key, PEM, readable by its owner only
//! DIR/own.crt           its certificate, PEM
//! DIR/members/ID.crt    the certificate of each member of the store, by its number
//! DIR/hosts/NAME.crt    the certificate of each host that runs VMs; for members only
//! DIR/operators/NAME.crt  the certificate of each operator; for members only
//! DIR/peers/NAME.crt    the certificate of each host that may form a pair with this one; for hosts only
//! ```
//!
//! A `.crt` file may hold several certificates, such as the old one and the new one while a key is replaced: each of them is that
//! party's. The same certificate may be a host's and an operator's, but one in `members/` is a member's and nobody else's.
//!
//! The accepted certificates are read again at most a second after a change, so they can be added and removed while a server
//! runs.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::names::{KeyId, NameError, PartyName};
use crate::wire::NodeId;

mod set;

pub use set::make_set;

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
    /// A file is not named by a host's or an operator's name.
    #[error("{path} is not named after a host or an operator: rename or remove it")]
    PartyName {
        /// The file.
        path: PathBuf,
        /// What is wrong with the name.
        source: NameError,
    },
    /// A file holds no certificate.
    #[error("{0} holds no certificate: copy the party's own.crt there")]
    Empty(PathBuf),
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

/// The certificates of a file, at least one.
fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, KeysError> {
    let pem = fs::read(path).map_err(io_error(path))?;
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match all {
        Ok(all) if all.is_empty() => Err(KeysError::Empty(path.into())),
        Ok(all) => Ok(all),
        Err(source) => Err(KeysError::Pem { path: path.into(), source }),
    }
}

/// The id of a certificate's key.
pub fn key_id(certificate: &CertificateDer<'_>) -> KeyId {
    let digest = ring::digest::digest(&ring::digest::SHA256, certificate);
    let mut id = [0; 32];
    id.copy_from_slice(digest.as_ref());
    KeyId(id)
}

/// As whom a certificate is accepted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Roles {
    /// As this member of the store, and then as nobody else.
    pub member: Option<NodeId>,
    /// As this host.
    pub host: Option<PartyName>,
    /// As this operator.
    pub operator: Option<PartyName>,
}

/// A party's keys, and the certificates that it accepts.
#[derive(Debug)]
pub struct Keys {
    dir: PathBuf,
    pub(crate) certificate: CertificateDer<'static>,
    pub(crate) key: PrivateKeyDer<'static>,
    pins: Mutex<(AcceptedCertificates, Instant)>,
}

/// The certificates of one directory, by the party that they belong to.
type CertificatesOf<Id> = BTreeMap<Id, Vec<CertificateDer<'static>>>;

#[derive(Debug)]
struct AcceptedCertificates {
    members: CertificatesOf<NodeId>,
    hosts: CertificatesOf<PartyName>,
    operators: CertificatesOf<PartyName>,
    peers: CertificatesOf<PartyName>,
}

impl AcceptedCertificates {
    fn load(dir: &Path) -> Result<Self, KeysError> {
        let member = |path: &Path, stem: &str| stem.parse().map_err(|_| KeysError::MemberName(path.into()));
        let party = |path: &Path, stem: &str| {
            stem.parse().map_err(|source| KeysError::PartyName { path: path.into(), source })
        };
        Ok(Self {
            members: certificates_in(&dir.join("members"), member)?,
            hosts: certificates_in(&dir.join("hosts"), party)?,
            operators: certificates_in(&dir.join("operators"), party)?,
            peers: certificates_in(&dir.join("peers"), party)?,
        })
    }

    fn roles(&self, certificate: &CertificateDer<'_>) -> Roles {
        if let Some(member) = owner(&self.members, certificate) {
            return Roles { member: Some(*member), ..Roles::default() };
        }
        Roles {
            member: None,
            host: owner(&self.hosts, certificate).cloned(),
            operator: owner(&self.operators, certificate).cloned(),
        }
    }
}

/// Whose certificate this is.
fn owner<'c, Id>(all: &'c CertificatesOf<Id>, certificate: &CertificateDer<'_>) -> Option<&'c Id> {
    all.iter().find(|(_, own)| own.contains(certificate)).map(|(id, _)| id)
}

/// The certificates in the `.crt` files of a directory, by their files' names; none if it does not exist.
fn certificates_in<Id: Ord>(
    dir: &Path,
    parse: impl Fn(&Path, &str) -> Result<Id, KeysError>,
) -> Result<CertificatesOf<Id>, KeysError> {
    let mut all = BTreeMap::new();
    for path in files_in(dir)? {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        all.insert(parse(&path, &stem)?, read_certificates(&path)?);
    }
    Ok(all)
}

/// The `.crt` files of a directory; none if it does not exist.
fn files_in(dir: &Path) -> Result<Vec<PathBuf>, KeysError> {
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
        let certificate = read_certificates(&dir.join("own.crt"))?.swap_remove(0);
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

    /// As whom a certificate is accepted.
    pub fn roles(&self, certificate: &CertificateDer<'_>) -> Roles {
        self.with_accepted(|pins| pins.roles(certificate))
    }

    /// The host that has the key with this id.
    pub fn host_with_key(&self, key: &KeyId) -> Option<PartyName> {
        self.with_accepted(|pins| {
            let mut hosts = pins.hosts.iter();
            hosts.find(|(_, own)| own.iter().any(|one| key_id(one) == *key)).map(|(name, _)| name.clone())
        })
    }

    /// Whether this is a member's certificate.
    pub(crate) fn is_member(&self, certificate: &CertificateDer<'_>) -> bool {
        self.roles(certificate).member.is_some()
    }

    /// Whether this is the certificate of the member with this number.
    pub(crate) fn is_this_member(&self, id: NodeId, certificate: &CertificateDer<'_>) -> bool {
        self.roles(certificate).member == Some(id)
    }

    /// This party's own certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// Whether this is the certificate of a host that may form a pair with this one, or this host's own: two hosts with the same
    /// keys finish their handshake, so that both learn why they are then refused.
    pub(crate) fn is_peer_or_own(&self, certificate: &CertificateDer<'_>) -> bool {
        *certificate == self.certificate
            || self.with_accepted(|pins| owner(&pins.peers, certificate).is_some())
    }

    /// Whether this is a member's, a host's or an operator's certificate.
    pub(crate) fn is_known(&self, certificate: &CertificateDer<'_>) -> bool {
        self.roles(certificate) != Roles::default()
    }
}
