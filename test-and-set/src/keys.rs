//! Keys: every party has a key and a self-signed certificate of its own, and a list of the certificates that it accepts.
//!
//! There is no authority to ask and no name to check: a certificate is accepted when a copy of it lies in the directory.
//!
//! ```text
//! DIR/own.key           the private key, PEM, readable by its owner only
//! DIR/own.crt           its certificate, PEM
//! DIR/members/ID.crt    the certificate of each member of the store, by its number
//! DIR/clients/NAME.crt  the certificate of each client; needed on members only
//! DIR/peers/NAME.crt    the certificate of each host that may form a pair with this one; needed on hosts only
//! ```
//!
//! A certificate that is added while a server runs is found at the next connection that needs it; one that is removed is
//! refused from the next reload on, at most a second later.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
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
    #[error("{path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What happened.
        source: std::io::Error,
    },
    /// A file is not PEM, or holds something else.
    #[error("{path} is not a PEM file with what its name says")]
    Pem {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: rustls::pki_types::pem::Error,
    },
    /// A file in `members/` is not named by a member's number.
    #[error("{0}: the files in members/ are named by numbers, as 1.crt")]
    MemberName(PathBuf),
    /// A certificate cannot be made.
    #[error("a certificate for {name} cannot be made")]
    Make {
        /// For whom.
        name: String,
        /// Why.
        source: rcgen::Error,
    },
    /// The key and its certificate do not fit each other or TLS.
    #[error("own.key and own.crt cannot be used for TLS")]
    Tls(#[from] rustls::Error),
}

fn at(path: &Path) -> impl FnOnce(std::io::Error) -> KeysError {
    move |source| KeysError::Io { path: path.into(), source }
}

fn read_certificate(path: &Path) -> Result<CertificateDer<'static>, KeysError> {
    let pem = fs::read(path).map_err(at(path))?;
    CertificateDer::from_pem_slice(&pem).map_err(|source| KeysError::Pem { path: path.into(), source })
}

/// One party's keys, and whom it accepts.
#[derive(Debug)]
pub struct Keys {
    dir: PathBuf,
    pub(crate) certificate: CertificateDer<'static>,
    pub(crate) key: PrivateKeyDer<'static>,
    pins: Mutex<(Pins, Instant)>,
}

#[derive(Debug)]
struct Pins {
    members: BTreeMap<NodeId, CertificateDer<'static>>,
    clients: Vec<CertificateDer<'static>>,
    peers: Vec<CertificateDer<'static>>,
}

impl Pins {
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
        entries => entries.map_err(at(dir))?,
    };
    let paths =
        entries.map(|entry| entry.map(|e| e.path())).collect::<Result<Vec<_>, _>>().map_err(at(dir))?;
    Ok(paths.into_iter().filter(|path| path.extension().is_some_and(|e| e == "crt")).collect())
}

/// How long a list of accepted certificates is used before it is read again.
const RELOAD_AFTER: Duration = Duration::from_secs(1);

impl Keys {
    /// Reads a party's directory.
    pub fn load(dir: &Path) -> Result<Self, KeysError> {
        let certificate = read_certificate(&dir.join("own.crt"))?;
        let path = dir.join("own.key");
        let pem = fs::read(&path).map_err(at(&path))?;
        let key = PrivateKeyDer::from_pem_slice(&pem).map_err(|source| KeysError::Pem { path, source })?;
        let pins = Mutex::new((Pins::load(dir)?, Instant::now()));
        Ok(Self { dir: dir.into(), certificate, key, pins })
    }

    /// Looks at the accepted certificates, read anew if they are old. A directory that cannot be read leaves the last list.
    fn with_pins<T>(&self, look: impl FnOnce(&Pins) -> T) -> T {
        let mut pins = self.pins.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if pins.1.elapsed() >= RELOAD_AFTER {
            match Pins::load(&self.dir) {
                Ok(read) => pins.0 = read,
                Err(error) => eprintln!("the accepted certificates stay as they were: {error}"),
            }
            pins.1 = Instant::now();
        }
        look(&pins.0)
    }

    /// Whether this is a member's certificate.
    pub(crate) fn is_member(&self, certificate: &CertificateDer<'_>) -> bool {
        self.with_pins(|pins| pins.members.values().any(|pin| pin == certificate))
    }

    /// Whether this is the certificate of just this member.
    pub(crate) fn is_this_member(&self, id: NodeId, certificate: &CertificateDer<'_>) -> bool {
        self.with_pins(|pins| pins.members.get(&id).is_some_and(|pin| pin == certificate))
    }

    /// Whether this is the certificate of a host that may form a pair with this one.
    pub(crate) fn is_peer(&self, certificate: &CertificateDer<'_>) -> bool {
        self.with_pins(|pins| pins.peers.iter().any(|pin| pin == certificate))
    }

    /// Whether this is a member's or a client's certificate.
    pub(crate) fn is_known(&self, certificate: &CertificateDer<'_>) -> bool {
        self.with_pins(|pins| pins.members.values().chain(&pins.clients).any(|pin| pin == certificate))
    }
}

/// Makes the keys for a trial: under `dir` one directory for each member, named by its number, and one for each client,
/// each complete and ready to be copied to its host. The clients are each other's peers. Existing files are an error.
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
        fs::create_dir_all(parent).map_err(at(parent))?;
    }
    let file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes())).map_err(at(path))
}
