//! What an operator does with a directory of keys: makes a key where it is used, and says whose certificates are accepted.
//!
//! Files come into being by renaming, so that a reader never sees half of one.

use std::fmt;
use std::fs;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rcgen::{CertifiedKey, KeyPair};
use rustls::pki_types::CertificateDer;

use super::{KeysError, OwnKey, io_error, key_id, read_certificates};
use crate::names::{KeyId, NameError, PartyName};
use crate::wire::NodeId;

/// As what another party is accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AcceptedAs {
    /// As this member of the store.
    Member(NodeId),
    /// As this host, by members.
    Host(PartyName),
    /// As this operator, by members.
    Operator(PartyName),
    /// As this host, by a host that may form a pair with it.
    Peer(PartyName),
}

/// The directories of accepted certificates.
const KINDS: [&str; 4] = ["members", "hosts", "operators", "peers"];

impl AcceptedAs {
    /// The file with its certificates, in a directory of keys.
    fn file(&self, dir: &Path) -> PathBuf {
        match self {
            AcceptedAs::Member(id) => dir.join(format!("members/{id}.crt")),
            AcceptedAs::Host(name) => dir.join(format!("hosts/{name}.crt")),
            AcceptedAs::Operator(name) => dir.join(format!("operators/{name}.crt")),
            AcceptedAs::Peer(name) => dir.join(format!("peers/{name}.crt")),
        }
    }
}

/// A certificate in a directory of keys.
#[derive(Debug, PartialEq, Eq)]
pub struct ListedKey {
    /// The file, in the directory of keys.
    pub file: String,
    /// The key's id, or why the file cannot be used.
    pub key: Result<KeyId, String>,
}

impl fmt::Display for ListedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.key {
            Ok(key) => write!(f, "{key}  {}", self.file),
            Err(why) => write!(f, "NOT USABLE: {why}"),
        }
    }
}

pub(super) fn make_pair(name: &str) -> Result<CertifiedKey<KeyPair>, KeysError> {
    let checked: Result<PartyName, NameError> = name.parse();
    checked.map_err(|source| KeysError::PartyName { path: name.into(), source })?;
    rcgen::generate_simple_self_signed([name.to_owned()])
        .map_err(|source| KeysError::Make { name: name.into(), source })
}

/// Makes this party's first key: `own.key` and `own.crt`. The private key never has to leave the host.
///
/// # Errors
/// The directory has a key already, or cannot be written.
pub fn new(dir: &Path, name: &str) -> Result<KeyId, KeysError> {
    let pair = make_pair(name)?;
    write_new(&dir.join("own.key"), &pair.signing_key.serialize_pem(), 0o600)?;
    write_new(&dir.join("own.crt"), &pair.cert.pem(), 0o644)?;
    Ok(key_id(pair.cert.der()))
}

/// Makes the key that is to replace this party's: `own.new.key` and `own.new.crt`, in place of those made before.
///
/// # Errors
/// The directory cannot be written.
pub fn renew(dir: &Path) -> Result<KeyId, KeysError> {
    // Nobody reads the name in a certificate.
    let pair = make_pair("renewed")?;
    replace(&dir.join("own.new.key"), &pair.signing_key.serialize_pem(), 0o600)?;
    replace(&dir.join("own.new.crt"), &pair.cert.pem(), 0o644)?;
    Ok(key_id(pair.cert.der()))
}

/// Puts `own.new.key` and `own.new.crt` in the place of `own.key` and `own.crt`. If that was interrupted, the next call finishes it.
///
/// # Errors
/// There is no new key, it does not fit its certificate, or the directory cannot be written.
pub fn use_new(dir: &Path) -> Result<KeyId, KeysError> {
    let [new_key, new_certificate, own_key] =
        ["own.new.key", "own.new.crt", "own.key"].map(|name| dir.join(name));
    let has_key = new_key.exists() || !new_certificate.exists();
    let new = OwnKey::read(if has_key { &new_key } else { &own_key }, &new_certificate)?;
    // Between the two the files do not fit, and a process that reads them keeps the key that it has.
    if has_key {
        fs::rename(&new_key, &own_key).map_err(io_error(&new_key))?;
    }
    fs::rename(&new_certificate, dir.join("own.crt")).map_err(io_error(&new_certificate))?;
    Ok(new.id())
}

/// Accepts a party's certificate, beside those of it that are accepted already.
///
/// # Errors
/// The file does not hold exactly one certificate that can be used, or it belongs to another party or to this one.
pub fn accept(dir: &Path, who: &AcceptedAs, certificate: &Path) -> Result<KeyId, KeysError> {
    let mut found = read_certificates(certificate)?;
    let (one, more) = (found.swap_remove(0), found.len());
    if more > 0 {
        return Err(KeysError::Several(certificate.into()));
    }
    let usable = webpki::EndEntityCert::try_from(&one);
    usable.map_err(|source| KeysError::Certificate { path: certificate.into(), source })?;
    let file = who.file(dir);
    let id = key_id(&one);
    let is_member = matches!(who, AcceptedAs::Member(_));
    for listed in list(dir).into_iter().filter(|listed| listed.key == Ok(id)) {
        let other = dir.join(&listed.file);
        let is_own = listed.file.starts_with("own.");
        let is_anothers = other != file && other.parent() == file.parent();
        // A member's certificate is nobody else's.
        let crosses = !is_own && listed.file.starts_with("members/") != is_member;
        if is_own && !is_member || !is_own && (is_anothers || crosses) {
            return Err(KeysError::OthersCertificate { path: certificate.into(), owner: other });
        }
    }
    let mut all = if file.exists() { read_certificates(&file)? } else { vec![] };
    if !all.contains(&one) {
        all.push(one);
        write_certificates(&file, &all)?;
    }
    Ok(id)
}

/// Accepts a party no longer, or only its certificate with this key. Returns the ids of the keys that were removed.
///
/// # Errors
/// The party is not accepted, or not with this key, or the file cannot be written.
pub fn remove(dir: &Path, who: &AcceptedAs, key: Option<&KeyId>) -> Result<Vec<KeyId>, KeysError> {
    let file = who.file(dir);
    let Some(key) = key else {
        // It may be a damaged one.
        let removed = read_certificates(&file).unwrap_or_default();
        fs::remove_file(&file).map_err(io_error(&file))?;
        return Ok(removed.iter().map(|one| key_id(one)).collect());
    };
    let (gone, kept): (Vec<_>, Vec<_>) =
        read_certificates(&file)?.into_iter().partition(|one| key_id(one) == *key);
    match (gone.is_empty(), kept.is_empty()) {
        (true, _) => return Err(KeysError::NotThere { path: file, key: *key }),
        (false, true) => fs::remove_file(&file).map_err(io_error(&file))?,
        (false, false) => write_certificates(&file, &kept)?,
    }
    Ok(vec![*key])
}

/// All certificates in a directory of keys: this party's own, then the accepted ones.
pub fn list(dir: &Path) -> Vec<ListedKey> {
    let mut files: Vec<_> = ["own.crt", "own.new.crt"].map(PathBuf::from).into();
    files.retain(|file| dir.join(file).exists());
    for kind in KINDS {
        let entries = fs::read_dir(dir.join(kind)).into_iter().flatten().flatten();
        let mut names: Vec<_> = entries.map(|entry| Path::new(kind).join(entry.file_name())).collect();
        names.retain(|name| name.extension().is_some_and(|e| e == "crt"));
        names.sort();
        files.append(&mut names);
    }
    let mut all = vec![];
    for file in files {
        let name = file.display().to_string();
        match read_certificates(&dir.join(&file)) {
            Ok(found) => {
                all.extend(found.iter().map(|one| ListedKey { file: name.clone(), key: Ok(key_id(one)) }))
            }
            Err(error) => all.push(ListedKey { file: name, key: Err(crate::store::chain(&error)) }),
        }
    }
    all
}

fn write_certificates(path: &Path, all: &[CertificateDer<'_>]) -> Result<(), KeysError> {
    let text: String =
        all.iter().map(|one| pem::encode(&pem::Pem::new("CERTIFICATE", one.to_vec()))).collect();
    replace(path, &text, 0o644)
}

/// Writes a file that does not exist yet.
pub(super) fn write_new(path: &Path, text: &str, mode: u32) -> Result<(), KeysError> {
    if path.exists() {
        let exists = "the file exists and is not overwritten; give another directory";
        return Err(io_error(path)(std::io::Error::new(ErrorKind::AlreadyExists, exists)));
    }
    replace(path, text, mode)
}

/// Writes a file under another name, and then renames it.
fn replace(path: &Path, text: &str, mode: u32) -> Result<(), KeysError> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(io_error(parent))?;
    }
    let draft = path.with_extension("draft");
    let written = (|| {
        if draft.exists() {
            fs::remove_file(&draft)?;
        }
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&draft)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&draft, path)
    })();
    written.map_err(io_error(path))
}

#[cfg(test)]
mod tests {
    use super::super::Keys;
    use super::*;

    /// The directories of member 1 and of hosts `a` and `b`, with keys of their own, who do not know each other yet.
    fn parties() -> (tempfile::TempDir, [PathBuf; 3]) {
        let dir = tempfile::tempdir().unwrap();
        let parties = ["1", "a", "b"].map(|name| dir.path().join(name));
        ["1", "a", "b"].iter().zip(&parties).for_each(|(name, dir)| assert!(new(dir, name).is_ok()));
        (dir, parties)
    }

    fn name(name: &str) -> PartyName {
        name.parse().unwrap()
    }

    #[test]
    fn parties_accept_each_other_and_replace_their_keys() {
        let (_dir, [member, a, b]) = parties();
        let first = accept(&member, &AcceptedAs::Host(name("a")), &a.join("own.crt")).unwrap();
        accept(&member, &AcceptedAs::Member(1), &member.join("own.crt")).unwrap();
        accept(&a, &AcceptedAs::Peer(name("b")), &b.join("own.crt")).unwrap();
        let own = Keys::load(&a).unwrap().own();
        assert_eq!(own.id(), first);
        // A new key, with overlap.
        let second = renew(&a).unwrap();
        assert_eq!(Keys::load(&a).unwrap().own().id(), first, "not in use yet");
        for _ in 0..2 {
            let host = AcceptedAs::Host(name("a"));
            assert_eq!(accept(&member, &host, &a.join("own.new.crt")).unwrap(), second);
        }
        assert_eq!(use_new(&a).unwrap(), second);
        assert!(use_new(&a).unwrap_err().to_string().contains("own.new.key"));
        let (accepts, new_own) = (Keys::load(&member).unwrap(), Keys::load(&a).unwrap().own());
        for certificate in [own.certificate(), new_own.certificate()] {
            assert_eq!(accepts.roles(certificate).host, Some(name("a")));
        }
        assert_eq!(remove(&member, &AcceptedAs::Host(name("a")), Some(&first)).unwrap(), [first]);
        remove(&member, &AcceptedAs::Host(name("a")), Some(&first)).unwrap_err();
        let accepts = Keys::load(&member).unwrap();
        assert!(!accepts.is_known(own.certificate()) && accepts.is_known(new_own.certificate()));
        let listed: Vec<_> = list(&member).into_iter().map(|listed| listed.file).collect();
        assert_eq!(listed, ["own.crt", "members/1.crt", "hosts/a.crt"]);
        assert_eq!(remove(&member, &AcceptedAs::Host(name("a")), None).unwrap(), [second]);
        let left: Vec<_> = fs::read_dir(member.join("hosts")).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
    }

    #[test]
    fn an_interrupted_replacement_is_finished() {
        let (_dir, [_, a, _]) = parties();
        let second = renew(&a).unwrap();
        fs::rename(a.join("own.new.key"), a.join("own.key")).unwrap();
        assert_eq!(use_new(&a).unwrap(), second);
        assert_eq!(Keys::load(&a).unwrap().own().id(), second);
    }

    #[test]
    fn nonsense_is_not_accepted() {
        let (dir, [member, a, b]) = parties();
        let refused = |who: AcceptedAs, certificate: &Path| {
            let before = list(&member);
            let why = accept(&member, &who, certificate).expect_err("refused");
            assert_eq!(list(&member), before, "{why}");
        };
        let file = dir.path().join("file");
        let crt = |party: &Path| fs::read_to_string(party.join("own.crt")).unwrap();
        for content in ["", "nonsense", &(crt(&a) + &crt(&b)), &crt(&a)[..200]] {
            fs::write(&file, content).unwrap();
            refused(AcceptedAs::Host(name("a")), &file);
        }
        refused(AcceptedAs::Host(name("a")), &a.join("own.key"));
        fs::write(&file, pem::encode(&pem::Pem::new("CERTIFICATE", vec![7; 300]))).unwrap();
        refused(AcceptedAs::Host(name("a")), &file);
        // Somebody else's, a member's as a host's, and this party's own.
        accept(&member, &AcceptedAs::Host(name("a")), &a.join("own.crt")).unwrap();
        refused(AcceptedAs::Host(name("c")), &a.join("own.crt"));
        refused(AcceptedAs::Member(2), &a.join("own.crt"));
        refused(AcceptedAs::Operator(name("x")), &member.join("own.crt"));
        accept(&member, &AcceptedAs::Operator(name("a")), &a.join("own.crt")).unwrap();
        new(&a, "a").expect_err("a key is not overwritten");
    }
}
