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
//! The directory is read again each second, so certificates can be added and removed, and the party's own key replaced, while a
//! server runs. What cannot be read stays in use for 5 s, because files are replaced in steps; then nobody is accepted by it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use crate::names::{KeyId, NameError, PartyName};

mod accepted;
mod kept;
pub mod manage;
mod own;
mod permission;
mod set;

use accepted::AcceptedCertificates;
pub use accepted::Roles;
pub use kept::KeyKeeper;
use own::OwnFiles;
pub(crate) use own::PROOF_PREFIX;
pub(crate) use own::read_private;
pub use own::{OwnKey, check_proof};
pub use permission::Permission;
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
    #[error("{path} is not a host's or an operator's name: rename or remove it")]
    PartyName {
        /// The file.
        path: PathBuf,
        /// What is wrong with the name.
        source: NameError,
    },
    /// Others may read a private key, so that it may be theirs too.
    #[error(
        "others than its owner may read or write {0}, so it may be no secret any more: make a new key, or run chmod 600 if nobody \
         has read it"
    )]
    Readable(PathBuf),
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
    /// A key and a certificate do not belong together, or cannot be used for TLS.
    #[error(
        "{key} and {certificate} do not fit together, or cannot be used for TLS: put both files of one key there"
    )]
    Misfit {
        /// The key's file.
        key: PathBuf,
        /// The certificate's file.
        certificate: PathBuf,
        /// What is wrong.
        source: rustls::Error,
    },
    /// TLS cannot be set up.
    #[error("cannot set up TLS")]
    Tls(#[from] rustls::Error),
    /// A file that is to be accepted holds more than one certificate.
    #[error(
        "{0} holds several certificates: give a file with the one to be accepted, such as the party's own.crt"
    )]
    Several(PathBuf),
    /// A certificate is not one that TLS can use.
    #[error("{path} is not a certificate for TLS: give the party's own.crt")]
    Certificate {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: webpki::Error,
    },
    /// A certificate is known as somebody else's.
    #[error("the certificate in {path} is that of {owner}: each party needs a key of its own")]
    OthersCertificate {
        /// The file that is to be accepted.
        path: PathBuf,
        /// The file in which it is.
        owner: PathBuf,
    },
    /// The key that is to be removed is not there.
    #[error("{path} has no certificate with key {key}: `vmft-store keys show` lists them")]
    NotThere {
        /// The party's file.
        path: PathBuf,
        /// The key.
        key: KeyId,
    },
}

fn io_error(path: &Path) -> impl FnOnce(std::io::Error) -> KeysError {
    move |source| KeysError::Io { path: path.into(), source }
}

/// The certificates of a file, at least one.
fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, KeysError> {
    parse_certificates(path, &fs::read(path).map_err(io_error(path))?)
}

/// The certificates in the content of a file, at least one.
fn parse_certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, KeysError> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
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

/// How long what was read is used before it is read again.
const RELOAD_AFTER: Duration = Duration::from_secs(1);
/// The same for a certificate that is not accepted: it may just have been added.
const RELOAD_FOR_UNKNOWN_AFTER: Duration = Duration::from_millis(100);

/// A party's keys, and the certificates that it accepts.
#[derive(Debug)]
pub struct Keys(KeySource);

/// Where keys come from.
#[derive(Debug)]
enum KeySource {
    /// A directory.
    Directory(PathBuf, Box<Mutex<KeysContent>>),
    /// Another process, which has a host's keys.
    Keeper(Box<dyn KeyKeeper>),
}

#[derive(Debug)]
struct KeysContent {
    own: OwnFiles,
    accepted: AcceptedCertificates,
    read_at: Instant,
    /// How often other certificates were found than before.
    revision: u64,
}

impl Keys {
    /// Reads a party's directory.
    ///
    /// # Errors
    /// There is no key, or it does not fit its certificate. Certificates that cannot be read are only told, and not accepted.
    pub fn load(dir: &Path) -> Result<Self, KeysError> {
        let (own, mut accepted, now) =
            (OwnFiles::load(dir)?, AcceptedCertificates::default(), Instant::now());
        accepted.read(dir, now);
        let content = KeysContent { own, accepted, read_at: now, revision: 0 };
        Ok(Self(KeySource::Directory(dir.into(), Box::new(Mutex::new(content)))))
    }

    /// The keys of a host that another process has. Only peers are known, no members and no clients of the store.
    pub fn kept(keeper: Box<dyn KeyKeeper>) -> Self {
        Self(KeySource::Keeper(keeper))
    }

    /// Whether another process had the keys, and has ended: this host can authenticate itself to nobody any more.
    pub fn is_lost(&self) -> bool {
        matches!(&self.0, KeySource::Keeper(keeper) if keeper.is_lost())
    }

    /// Calls `look` with what was read, after reading again if that is older than `age`. `None`: there is no directory.
    fn look<T>(&self, age: Duration, look: impl FnOnce(&KeysContent) -> T) -> Option<T> {
        let KeySource::Directory(dir, read) = &self.0 else { return None };
        let mut content = read.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if now.saturating_duration_since(content.read_at) >= age {
            content.own.reload();
            if content.accepted.read(dir, now) {
                content.revision += 1;
            }
            content.read_at = now;
        }
        Some(look(&content))
    }

    /// Looks something up among the accepted certificates; looks again in fresher ones before it is said not to be there.
    fn find<T: Default + PartialEq>(&self, find: impl Fn(&AcceptedCertificates) -> T) -> T {
        match self.look(RELOAD_AFTER, |content| find(&content.accepted)) {
            Some(found) if found != T::default() => found,
            _ => self.look(RELOAD_FOR_UNKNOWN_AFTER, |content| find(&content.accepted)).unwrap_or_default(),
        }
    }

    /// A number that grows when other certificates are accepted than before.
    fn revision(&self) -> u64 {
        self.look(RELOAD_AFTER, |content| content.revision).unwrap_or_default()
    }

    /// As whom a certificate is accepted.
    pub fn roles(&self, certificate: &CertificateDer<'_>) -> Roles {
        self.find(|accepted| accepted.roles(certificate))
    }

    /// The host that has the key with this id.
    pub fn host_with_key(&self, key: &KeyId) -> Option<PartyName> {
        self.find(|accepted| accepted.host_with_key(key))
    }

    /// The name of the host that may form a pair with this one and has this certificate.
    pub fn peer(&self, certificate: &CertificateDer<'_>) -> Option<PartyName> {
        match &self.0 {
            KeySource::Directory(..) => self.find(|accepted| accepted.peer(certificate)),
            KeySource::Keeper(keeper) => keeper.peer(certificate),
        }
    }

    /// Whether this is a member's certificate.
    pub(crate) fn is_member(&self, certificate: &CertificateDer<'_>) -> bool {
        self.roles(certificate).member.is_some()
    }

    /// This party's own key.
    pub fn own(&self) -> Arc<OwnKey> {
        match &self.0 {
            KeySource::Directory(_, read) => {
                self.look(RELOAD_AFTER, |_| ());
                read.lock().unwrap_or_else(PoisonError::into_inner).own.key.clone()
            }
            KeySource::Keeper(keeper) => keeper.own(),
        }
    }

    /// Whether this is the certificate of a host that may form a pair with this one, or this host's own: two hosts with the same
    /// keys finish their handshake, so that both learn why they are then refused.
    pub(crate) fn is_peer_or_own(&self, certificate: &CertificateDer<'_>) -> bool {
        self.peer(certificate).is_some() || self.own().certificate() == certificate
    }

    /// Whether this is a member's, a host's or an operator's certificate.
    pub(crate) fn is_known(&self, certificate: &CertificateDer<'_>) -> bool {
        self.roles(certificate) != Roles::default()
    }
}
