//! The certificates that a party accepts, read from its directory again and again, and what holds while they cannot be read.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustls::pki_types::CertificateDer;
use tracing::{info, warn};

use super::{KeysError, io_error, read_certificates};
use crate::names::{KeyId, PartyName};
use crate::wire::NodeId;

/// How long what was read before stays in use when a file or a directory cannot be read: files are replaced in steps.
pub(super) const GRACE: Duration = Duration::from_secs(5);

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

/// What cannot be read, since when, and whether that has lasted for [`GRACE`]. Each is said when it begins, when its certificates
/// are given up, and when it ends.
#[derive(Debug, Default)]
struct Unreadables(BTreeMap<PathBuf, Unreadable>);

#[derive(Debug)]
struct Unreadable {
    since: Instant,
    /// Whether it was noted since the last round.
    noted: bool,
    given_up: bool,
}

impl Unreadables {
    /// Notes that this cannot be read now. Returns whether what was read of it before stays in use.
    fn note(&mut self, path: &Path, error: &KeysError, now: Instant) -> bool {
        let begins = || {
            let why = crate::chain::chain(error);
            warn!("{why}; certificates that were read from it before stay accepted for {GRACE:?} at most");
            Unreadable { since: now, noted: true, given_up: false }
        };
        let noted = self.0.entry(path.into()).or_insert_with(begins);
        noted.noted = true;
        let lasts = now.saturating_duration_since(noted.since) >= GRACE;
        if lasts && !std::mem::replace(&mut noted.given_up, true) {
            let path = path.display();
            warn!("{path} cannot be used for {GRACE:?} now: no certificate in it is accepted until it can");
        }
        !lasts
    }

    /// Forgets what was not noted in this round.
    fn end_round(&mut self) {
        self.0.retain(|path, noted| {
            let remains = std::mem::take(&mut noted.noted);
            if !remains {
                info!("{} is no longer in the way", path.display());
            }
            remains
        });
    }
}

/// The certificates of one directory, by the party that they belong to.
type CertificatesOf<Id> = BTreeMap<Id, Vec<CertificateDer<'static>>>;

#[derive(Debug, Default)]
pub(super) struct AcceptedCertificates {
    members: CertificatesOf<NodeId>,
    hosts: CertificatesOf<PartyName>,
    operators: CertificatesOf<PartyName>,
    peers: CertificatesOf<PartyName>,
    unreadable: Unreadables,
}

impl AcceptedCertificates {
    /// Reads all directories. Returns whether other certificates are accepted than before.
    pub(super) fn read(&mut self, dir: &Path, now: Instant) -> bool {
        let member = |path: &Path, stem: &str| stem.parse().map_err(|_| KeysError::MemberName(path.into()));
        let party = |path: &Path, stem: &str| {
            stem.parse().map_err(|source| KeysError::PartyName { path: path.into(), source })
        };
        let Self { members, hosts, operators, peers, unreadable } = self;
        let before = (members.clone(), hosts.clone(), operators.clone(), peers.clone());
        read_directory(members, dir, "members", member, unreadable, now);
        read_directory(hosts, dir, "hosts", party, unreadable, now);
        read_directory(operators, dir, "operators", party, unreadable, now);
        read_directory(peers, dir, "peers", party, unreadable, now);
        unreadable.end_round();
        (&before.0, &before.1, &before.2, &before.3) != (&*members, &*hosts, &*operators, &*peers)
    }

    pub(super) fn roles(&self, certificate: &CertificateDer<'_>) -> Roles {
        if let Some(member) = owner(&self.members, certificate) {
            return Roles { member: Some(*member), ..Roles::default() };
        }
        Roles {
            member: None,
            host: owner(&self.hosts, certificate).cloned(),
            operator: owner(&self.operators, certificate).cloned(),
        }
    }

    pub(super) fn peer(&self, certificate: &CertificateDer<'_>) -> Option<PartyName> {
        owner(&self.peers, certificate).cloned()
    }

    pub(super) fn host_with_key(&self, key: &KeyId) -> Option<PartyName> {
        let mut hosts = self.hosts.iter();
        hosts.find(|(_, own)| own.iter().any(|one| super::key_id(one) == *key)).map(|(name, _)| name.clone())
    }
}

/// Whose certificate this is.
fn owner<'c, Id>(all: &'c CertificatesOf<Id>, certificate: &CertificateDer<'_>) -> Option<&'c Id> {
    all.iter().find(|(_, own)| own.contains(certificate)).map(|(id, _)| id)
}

/// Reads the `.crt` files of a directory, which are named by the parties. One that cannot be read takes out only its own party.
fn read_directory<Id: Ord>(
    all: &mut CertificatesOf<Id>,
    dir: &Path,
    kind: &str,
    parse: impl Fn(&Path, &str) -> Result<Id, KeysError>,
    unreadable: &mut Unreadables,
    now: Instant,
) {
    let path = dir.join(kind);
    let files = match files_in(&path) {
        Ok(files) => files,
        Err(error) => {
            if !unreadable.note(&path, &error, now) {
                all.clear();
            }
            return;
        }
    };
    let mut before = std::mem::take(all);
    for file in files {
        let id = match parse(&file, &file.file_stem().unwrap_or_default().to_string_lossy()) {
            Ok(id) => id,
            Err(error) => {
                unreadable.note(&file, &error, now);
                continue;
            }
        };
        let certificates = match read_certificates(&file) {
            Ok(certificates) => certificates,
            // It has been removed since the directory was read.
            Err(KeysError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => continue,
            Err(error) if unreadable.note(&file, &error, now) => before.remove(&id).unwrap_or_default(),
            Err(_) => continue,
        };
        all.entry(id).or_default().extend(certificates);
    }
}

/// The `.crt` files of a directory; none if it does not exist where there are keys.
fn files_in(dir: &Path) -> Result<Vec<PathBuf>, KeysError> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == ErrorKind::NotFound && dir.parent().is_some_and(Path::is_dir) => {
            return Ok(vec![]);
        }
        entries => entries.map_err(io_error(dir))?,
    };
    let paths =
        entries.map(|entry| entry.map(|e| e.path())).collect::<Result<Vec<_>, _>>().map_err(io_error(dir))?;
    Ok(paths.into_iter().filter(|path| path.extension().is_some_and(|e| e == "crt")).collect())
}

#[cfg(test)]
mod tests {
    use super::super::make_set;
    use super::*;

    fn certificate(dir: &Path, party: &str) -> CertificateDer<'static> {
        read_certificates(&dir.join(party).join("own.crt")).unwrap().remove(0)
    }

    /// A member's directory, with hosts `a` and `b` and the operator `admin`, and what it accepts.
    fn member() -> (tempfile::TempDir, PathBuf, AcceptedCertificates, Instant) {
        let dir = tempfile::tempdir().unwrap();
        make_set(dir.path(), &[1, 2], &["a".into(), "b".into()], &["admin".into(), "b".into()]).unwrap();
        let (own, now) = (dir.path().join("1"), Instant::now());
        let mut accepted = AcceptedCertificates::default();
        accepted.read(&own, now);
        (dir, own, accepted, now)
    }

    fn party(name: &str) -> Option<PartyName> {
        Some(name.parse().unwrap())
    }

    #[test]
    fn roles_are_those_of_the_directories() {
        let (dir, own, mut accepted, now) = member();
        let roles = |accepted: &AcceptedCertificates, who| accepted.roles(&certificate(dir.path(), who));
        assert_eq!(roles(&accepted, "2"), Roles { member: Some(2), ..Roles::default() });
        assert_eq!(roles(&accepted, "a"), Roles { host: party("a"), ..Roles::default() });
        assert_eq!(roles(&accepted, "b"), Roles { host: party("b"), operator: party("b"), member: None });
        assert_eq!(roles(&accepted, "admin"), Roles { operator: party("admin"), ..Roles::default() });
        // A member's certificate is nobody else's, and a file may hold several.
        let both = [fs::read(own.join("hosts/a.crt")), fs::read(dir.path().join("2/own.crt"))];
        fs::write(own.join("hosts/a.crt"), both.map(Result::unwrap).concat()).unwrap();
        accepted.read(&own, now);
        assert_eq!(roles(&accepted, "2"), Roles { member: Some(2), ..Roles::default() });
        assert_eq!(roles(&accepted, "a").host, party("a"));
        let key = super::super::key_id(&certificate(dir.path(), "b"));
        assert_eq!(accepted.host_with_key(&key), party("b"));
    }

    #[test]
    fn a_damaged_file_takes_out_its_own_party_and_only_after_a_while() {
        let (dir, own, mut accepted, now) = member();
        let [a, b] = ["a", "b"].map(|name| certificate(dir.path(), name));
        let whole = fs::read(own.join("hosts/a.crt")).unwrap();
        for damaged in [&whole[..whole.len() / 2], b"", b"-----BEGIN nothing"] {
            fs::write(own.join("hosts/a.crt"), damaged).unwrap();
            fs::write(own.join("hosts/not a name.crt"), &whole).unwrap();
            accepted.read(&own, now);
            assert_eq!(accepted.roles(&a).host, party("a"));
            accepted.read(&own, now + GRACE - Duration::from_millis(1));
            assert_eq!(accepted.roles(&a).host, party("a"));
            accepted.read(&own, now + GRACE);
            assert_eq!(accepted.roles(&a).host, None);
            assert_eq!(accepted.roles(&b).host, party("b"));
            fs::write(own.join("hosts/a.crt"), &whole).unwrap();
            accepted.read(&own, now + GRACE);
            assert_eq!(accepted.roles(&a).host, party("a"));
        }
        // A removal is no damage.
        fs::remove_file(own.join("hosts/a.crt")).unwrap();
        accepted.read(&own, now + GRACE);
        assert_eq!(accepted.roles(&a), Roles::default());
    }

    #[test]
    fn a_directory_that_cannot_be_read_keeps_nobody_in() {
        let (dir, own, mut accepted, now) = member();
        let a = certificate(dir.path(), "a");
        // Root may read everything: a file in the directory's place cannot be read as one.
        fs::rename(own.join("hosts"), own.join("kept")).unwrap();
        fs::write(own.join("hosts"), "").unwrap();
        accepted.read(&own, now);
        assert_eq!(accepted.roles(&a).host, party("a"));
        accepted.read(&own, now + GRACE);
        assert_eq!(accepted.roles(&a), Roles::default());
        assert_eq!(accepted.roles(&certificate(dir.path(), "2")).member, Some(2));
        fs::remove_file(own.join("hosts")).unwrap();
        fs::rename(own.join("kept"), own.join("hosts")).unwrap();
        accepted.read(&own, now + GRACE);
        assert_eq!(accepted.roles(&a).host, party("a"));
        // All of the keys are away, as between two steps of a replacement.
        fs::rename(&own, dir.path().join("away")).unwrap();
        accepted.read(&own, now + GRACE);
        assert_eq!(accepted.roles(&a).host, party("a"));
        accepted.read(&own, now + 2 * GRACE);
        assert_eq!(accepted.roles(&a), Roles::default());
    }
}
