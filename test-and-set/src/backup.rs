//! A backup of the store: the records of all VMs in one file.
//!
//! ```text
//! numbers are little-endian
//!   offset 0    8 bytes   magic "VMTSBACK"
//!          8    u32       version of the format, 1
//!         12    u64       length of the body
//!         20    body      StoreBackup, in postcard's encoding
//!         end   u64       XXH3 of everything before
//! ```
//!
//! Each record is as it was at some moment while the backup was made. **Verdicts given later are not in it.** So a store that is
//! restored from it marks all records (`VmRecord::restored`), and nobody wins by them who had not won by the backup.

use std::fs::{self, File};
use std::hash::Hasher;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_64;

use crate::names::{ClusterName, VmName};
use crate::private_file;
use crate::raft_client::RaftStore;
use crate::record::VmRecord;
use crate::store::StoreError;

const MAGIC: [u8; 8] = *b"VMTSBACK";
const VERSION: u32 = 1;
const HEAD_BYTES: usize = 20;
const SUM_BYTES: usize = 8;

/// The content of a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreBackup {
    /// The cluster that it was made of.
    pub cluster: ClusterName,
    /// When it was begun, in seconds since 1970-01-01 UTC.
    pub begun_s: u64,
    /// The records of all VMs, the forgotten ones included.
    pub records: Vec<(VmName, VmRecord)>,
}

/// Why a backup cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The store gave no answer.
    #[error("cannot read the store's records")]
    Store(#[from] StoreError),
    /// The file exists, and a backup replaces nothing.
    #[error("{0} exists; give a backup a file of its own")]
    Exists(PathBuf),
    /// The file cannot be read or written.
    #[error("cannot read or write {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is no backup of a store, or damaged.
    #[error("{path}: offset {offset}: {what}; restore from another backup")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: usize,
        /// What was found.
        what: String,
    },
    /// The records cannot be encoded.
    #[error("cannot encode the records")]
    Encode(#[source] postcard::Error),
}

impl StoreBackup {
    /// Reads all records from the store.
    pub async fn read(
        store: &RaftStore,
        cluster: ClusterName,
        deadline: Instant,
    ) -> Result<Self, BackupError> {
        let begun_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let mut records: Vec<(VmName, VmRecord)> = vec![];
        loop {
            let page = store.all(records.last().map(|(vm, _)| vm), deadline).await?;
            if page.is_empty() {
                return Ok(Self { cluster, begun_s, records });
            }
            records.extend(page);
        }
    }

    /// The bytes of the file.
    pub fn to_bytes(&self) -> Result<Vec<u8>, BackupError> {
        let mut bytes = postcard::to_extend(self, vec![0; HEAD_BYTES]).map_err(BackupError::Encode)?;
        let length = (bytes.len() - HEAD_BYTES) as u64;
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..HEAD_BYTES].copy_from_slice(&length.to_le_bytes());
        let sum = checksum(&bytes);
        bytes.extend(sum.to_le_bytes());
        Ok(bytes)
    }

    /// Writes the file: as a whole, or not at all. It must not exist.
    pub fn write(&self, path: &Path) -> Result<(), BackupError> {
        let failed = |source| BackupError::File { path: path.into(), source };
        if path.try_exists().map_err(failed)? {
            return Err(BackupError::Exists(path.into()));
        }
        let bytes = self.to_bytes()?;
        let mut part = path.as_os_str().to_owned();
        part.push(".part");
        let written =
            private_file::open(Path::new(&part), File::options().write(true).create(true).truncate(true));
        let written = written.and_then(|mut file| {
            file.write_all(&bytes)?;
            file.sync_all()?;
            // Unlike a renaming, a link never replaces a file that was made meanwhile.
            fs::hard_link(&part, path)
        });
        fs::remove_file(&part).map_err(failed)?;
        written.map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => BackupError::Exists(path.into()),
            _ => failed(source),
        })?;
        let directory = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(directory).and_then(|dir| dir.sync_all()).map_err(failed)
    }

    /// Reads a file, and checks all of it.
    pub fn load(path: &Path) -> Result<Self, BackupError> {
        let bytes = fs::read(path).map_err(|source| BackupError::File { path: path.into(), source })?;
        Self::from_bytes(&bytes).map_err(|(offset, what)| BackupError::Damaged {
            path: path.into(),
            offset,
            what,
        })
    }

    /// Decodes a file; an error has the offset of what is wrong.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, (usize, String)> {
        let short =
            |wanted: usize| (bytes.len(), format!("the file ends here, but has {wanted} bytes or more"));
        let head = bytes.get(..HEAD_BYTES).ok_or_else(|| short(HEAD_BYTES + SUM_BYTES))?;
        let number = |from: &[u8]| from.iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte));
        if head[..8] != MAGIC {
            return Err((0, "this is no backup of a store".into()));
        }
        let version = number(&head[8..12]);
        if version != u64::from(VERSION) {
            return Err((
                8,
                format!("the backup has format {version}, but this release has format {VERSION}"),
            ));
        }
        let length = usize::try_from(number(&head[12..])).unwrap_or(usize::MAX);
        let end = length.saturating_add(HEAD_BYTES);
        let body = bytes.get(HEAD_BYTES..end).ok_or_else(|| short(end.saturating_add(SUM_BYTES)))?;
        if bytes.len() < end + SUM_BYTES {
            return Err(short(end + SUM_BYTES));
        }
        if bytes.len() > end + SUM_BYTES {
            return Err((end, format!("{} bytes follow the body instead of {SUM_BYTES}", bytes.len() - end)));
        }
        if number(&bytes[end..]) != checksum(&bytes[..end]) {
            return Err((
                end,
                format!("the checksum is not that of the {end} bytes before, so these are damaged"),
            ));
        }
        let (backup, rest) = postcard::take_from_bytes(body).map_err(|e| (HEAD_BYTES, e.to_string()))?;
        match rest.len() {
            0 => Ok(backup),
            rest => Err((end - rest, format!("{rest} bytes follow the last record"))),
        }
    }
}

fn checksum(bytes: &[u8]) -> u64 {
    let mut sum = XxHash3_64::new();
    sum.write(bytes);
    sum.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backup() -> StoreBackup {
        let records = ["a", "b"].map(|vm| (vm.parse().unwrap(), VmRecord::NOT_IN_BACKUP));
        StoreBackup { cluster: "c".parse().unwrap(), begun_s: 7, records: records.into() }
    }

    #[test]
    fn a_backup_reads_back_and_every_damage_is_found() {
        let bytes = backup().to_bytes().unwrap();
        assert_eq!(StoreBackup::from_bytes(&bytes), Ok(backup()));
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << (at % 8);
            assert!(StoreBackup::from_bytes(&damaged).is_err(), "a flip at {at}");
            let (offset, _) = StoreBackup::from_bytes(&bytes[..at]).unwrap_err();
            assert_eq!(offset, at, "the file ends there");
        }
        let longer = [&bytes[..], &[0]].concat();
        assert!(StoreBackup::from_bytes(&longer).is_err());
    }

    #[test]
    fn a_file_is_written_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("backup");
        backup().write(&path).unwrap();
        assert_eq!(StoreBackup::load(&path).unwrap(), backup());
        assert!(matches!(backup().write(&path), Err(BackupError::Exists(_))));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
