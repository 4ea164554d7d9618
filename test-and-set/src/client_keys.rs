//! The directory of keys for a store that vmft does not run itself, an etcd or a ZooKeeper:
//!
//! ```text
//! ca.crt             the authority that signs the servers' certificates; needed, since the connection uses TLS
//! own.crt, own.key   this client's certificate and key, if the servers ask for one
//! user               one line NAME:PASSWORD; nobody but its owner may read the file
//! ```

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Once;

use tracing::warn;

use crate::keys::{KeysError, read_private};
use crate::private_file::others_may_use;
use crate::store::StoreError;

/// The directory, if the store's URL names one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientKeys(pub Option<PathBuf>);

/// A user's name and password. It has no `Debug`, so that it is never logged.
pub(crate) struct StoreUser {
    pub(crate) name: String,
    pub(crate) password: String,
}

/// A certificate and its key, both PEM.
type CertificateAndKey = (Vec<u8>, Vec<u8>);

impl ClientKeys {
    /// Reads a file; `None` if there is no directory or no such file.
    pub(crate) fn read(&self, name: &str) -> Result<Option<Vec<u8>>, StoreError> {
        let Some(path) = self.path(name) else { return Ok(None) };
        std::fs::read(&path).map(Some).map_err(unreadable(path))
    }

    /// Reads a file that must be there if there is a directory.
    pub(crate) fn read_needed(&self, name: &str) -> Result<Option<Vec<u8>>, StoreError> {
        let Some(path) = self.0.as_ref().map(|dir| dir.join(name)) else { return Ok(None) };
        std::fs::read(&path).map(Some).map_err(unreadable(path))
    }

    /// The path of a file, if it exists.
    fn path(&self, name: &str) -> Option<PathBuf> {
        self.0.as_ref().map(|dir| dir.join(name)).filter(|path| path.exists())
    }

    /// Reads the certificate and the key of this client, if it has them.
    pub(crate) fn own(&self) -> Result<Option<CertificateAndKey>, StoreError> {
        let Some(certificate) = self.read("own.crt")? else { return Ok(None) };
        let Some(path) = self.0.as_ref().map(|dir| dir.join("own.key")) else { return Ok(None) };
        Ok(Some((certificate, read_private(&path).map_err(StoreError::Keys)?)))
    }

    /// Reads the user, if there is one.
    pub(crate) fn user(&self) -> Result<Option<StoreUser>, StoreError> {
        let Some(path) = self.path("user") else { return Ok(None) };
        let faulty = |why| StoreError::UserFile { path: path.clone(), why };
        let mut file = File::open(&path).map_err(unreadable(path.clone()))?;
        if others_may_use(&file).map_err(unreadable(path.clone()))? {
            return Err(faulty("others than its owner may read it, so its password is no secret: chmod 600"));
        }
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(unreadable(path.clone()))?;
        let line = text.strip_suffix('\n').unwrap_or(&text);
        match line.split_once(':') {
            Some((name, password)) if !name.is_empty() && !password.is_empty() && !line.contains('\n') => {
                Ok(Some(StoreUser { name: name.into(), password: password.into() }))
            }
            _ => Err(faulty("it has to be one line, NAME:PASSWORD")),
        }
    }

    /// Says once in this process what anybody can do to the store, if something is missing that prevents it.
    pub(crate) fn warn(&self, store: &str, is_known_by_certificate: bool) {
        static WARNED: Once = Once::new();
        let known = self.path("user").is_some() || is_known_by_certificate && self.path("own.crt").is_some();
        if let Some(warning) = warning(store, self.0.is_some(), known) {
            WARNED.call_once(|| warn!("{warning}"));
        }
    }
}

fn unreadable(path: PathBuf) -> impl FnOnce(std::io::Error) -> StoreError {
    move |source| StoreError::Keys(KeysError::Io { path, source })
}

fn warning(store: &str, has_tls: bool, is_known: bool) -> Option<String> {
    let faults = match (has_tls, is_known) {
        (true, true) => return None,
        (true, false) => {
            "without authentication: whoever reaches it can read, change and delete every VM's record"
        }
        // A user's name and password are only ever sent over TLS.
        (false, _) => {
            "without TLS and without authentication: whoever reaches it can read, change and delete every VM's record, and whoever is on the network between can forge its answers"
        }
    };
    Some(format!(
        "WARNING: {store} is used {faults}, and so make two of a VM run, or none. Give ?keys=DIR in the store's URL, with ca.crt and user; docs/operations.md says how"
    ))
}

impl From<Option<&Path>> for ClientKeys {
    fn from(dir: Option<&Path>) -> Self {
        Self(dir.map(Path::to_owned))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_is_missing_is_said() {
        assert_eq!(warning("etcd://a:1", true, true), None);
        for (has_tls, is_known, words) in [
            (true, false, "can read, change and delete every VM's record"),
            (false, false, "without TLS and without authentication"),
        ] {
            let text = warning("etcd://a:1", has_tls, is_known).expect("a warning");
            assert!(text.contains(words) && text.contains("etcd://a:1 is used"), "{text}");
        }
    }

    #[test]
    fn a_users_file_is_one_line_that_only_its_owner_reads() {
        let dir = tempfile::tempdir().expect("a directory");
        let (keys, path) = (ClientKeys::from(Some(dir.path())), dir.path().join("user"));
        assert!(keys.user().expect("no file").is_none());
        let write = |text: &str, mode| {
            std::fs::write(&path, text).expect("a file");
            std::fs::set_permissions(&path, Permissions::from_mode(mode)).expect("its mode");
            keys.user().map(|user| user.map(|user| (user.name, user.password)))
        };
        assert_eq!(write("vmft:a:b\n", 0o600).expect("a user"), Some(("vmft".into(), "a:b".into())));
        for (text, mode, words) in [
            ("vmft:a\n", 0o640, "chmod 600"),
            ("vmft:a\n", 0o604, "chmod 600"),
            ("vmft\n", 0o600, "NAME:PASSWORD"),
            (":a\n", 0o600, "NAME:PASSWORD"),
            ("vmft:\n", 0o600, "NAME:PASSWORD"),
            ("vmft:a\nb\n", 0o600, "NAME:PASSWORD"),
        ] {
            let error = write(text, mode).expect_err(text).to_string();
            assert!(error.contains(words) && error.contains("/user"), "{error}");
        }
    }
}
