//! Makes a member's data from a backup.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::backup::StoreBackup;
use crate::names::ClusterName;
use crate::server::disk::MemberDisk;
use crate::server::disk_error::DiskError;
use crate::server::raft;
use crate::state::StoreState;
use crate::wire::NodeId;

/// Why data cannot be made from a backup.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// There is data already.
    #[error(
        "{0} is not empty; give the restored member an empty --data directory, or one that does not exist"
    )]
    NotEmpty(PathBuf),
    /// A directory cannot be read or made.
    #[error("cannot use {path}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The data cannot be written.
    #[error("cannot write the data")]
    Disk(#[from] DiskError),
}

/// Fails if a directory has data already.
pub fn check_empty(dir: &Path) -> Result<(), RestoreError> {
    match fs::read_dir(dir).map(|mut entries| entries.next().is_none()) {
        Ok(true) => Ok(()),
        Ok(false) => Err(RestoreError::NotEmpty(dir.into())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(RestoreError::Directory { path: dir.into(), source }),
    }
}

/// Makes the data of a new cluster's only member, with the records of a backup: completely, or not at all.
pub fn restore(
    backup: StoreBackup,
    dir: &Path,
    cluster: &ClusterName,
    (id, address): (NodeId, &str),
) -> Result<(), RestoreError> {
    check_empty(dir)?;
    let mut part = dir.as_os_str().to_owned();
    part.push(".part");
    let part = PathBuf::from(part);
    check_empty(&part)?;
    let disk = MemberDisk::open(&part, cluster, id)?;
    raft::store_first_snapshot(&disk, (id, address), &StoreState::restored(backup.records))?;
    drop(disk);
    fs::rename(&part, dir).map_err(|source| RestoreError::Directory { path: dir.into(), source })
}
