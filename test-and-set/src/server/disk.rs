//! A member's data on the disk: the Raft log, its vote and its identity in one redb file, the snapshot in another.
//!
//! There are two files because redb has one writer for each: writing a large snapshot must not delay the log. Every change is on
//! the disk (fsync) when the call returns.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::ops::RangeBounds;
use std::path::{Path, PathBuf};

use redb::{Builder, Database, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition};

use crate::names::{ClusterName, CopyId};
use crate::wire::NodeId;

const LOG: TableDefinition<u64, &[u8]> = TableDefinition::new("log");
const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
const DATA_OF: TableDefinition<NodeId, u128> = TableDefinition::new("data_of");

/// How many bytes of each file redb may cache in memory.
const CACHE_BYTES: usize = 16 << 20;
/// No commands are accepted if less than this is free beside the room for another snapshot: votes and snapshots must still fit.
const RESERVE_BYTES: u64 = 32 << 20;

/// Why a member's data cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The database failed: check the disk, free space if it is full, then start the member again.
    #[error("the member's database failed: {0}")]
    Database(Box<redb::Error>),
    /// The directory cannot be used.
    #[error("cannot open or write {path}")]
    Io {
        /// The directory or file.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// The directory belongs to another member: correct --data, --id or --cluster.
    #[error("the data belongs to {found}, not to {wanted}: correct --data, --id or --cluster")]
    OtherNode {
        /// The member that it belongs to.
        found: String,
        /// This member.
        wanted: String,
    },
    /// The thread that writes the log cannot be started.
    #[error("cannot start the thread that writes the log")]
    Thread(#[source] io::Error),
    /// An earlier write of the log has failed; its error was logged then.
    #[error("an earlier write of the log has failed; see the message about it")]
    NotFlushed,
    /// A stored value cannot be decoded.
    #[error("cannot decode the stored {what}")]
    Decode {
        /// The value's name.
        what: &'static str,
        /// Why.
        source: postcard::Error,
    },
}

impl<E: Into<redb::Error>> From<E> for DiskError {
    fn from(error: E) -> Self {
        Self::Database(Box::new(error.into()))
    }
}

/// An encoded snapshot.
pub struct StoredSnapshot {
    /// Its metadata.
    pub meta: Vec<u8>,
    /// The state.
    pub state: Vec<u8>,
}

/// A member's data.
pub struct MemberDisk {
    log: Database,
    snapshots: Database,
    /// `None` if the data is not in a directory, as in tests.
    dir: Option<PathBuf>,
    data: CopyId,
}

/// The length of the magic number at the start of a database, which redb writes last when it makes one.
const MAGIC_BYTES: usize = 9;

fn open(backend: impl StorageBackend) -> Result<Database, DiskError> {
    let failed = |error| DiskError::from(redb::StorageError::Io(error));
    // A database without its magic number was never completed, so it has no content.
    let mut magic = [0; MAGIC_BYTES];
    let len = backend.len().map_err(failed)?;
    let readable = magic.len().min(usize::try_from(len).unwrap_or(usize::MAX));
    backend.read(0, &mut magic[..readable]).map_err(failed)?;
    if len > 0 && magic == [0; MAGIC_BYTES] {
        backend.set_len(0).map_err(failed)?;
    }
    Ok(Builder::new().set_cache_size(CACHE_BYTES).create_with_backend(backend)?)
}

impl MemberDisk {
    /// Opens the data in a directory, which is made if it does not exist. Only one process may have it open.
    pub fn open(dir: &Path, cluster: &ClusterName, id: NodeId) -> Result<Self, DiskError> {
        let at = |path: &Path| {
            let path = path.to_owned();
            move |source| DiskError::Io { path, source }
        };
        fs::create_dir_all(dir).map_err(at(dir))?;
        let file = |name: &str| {
            let path = dir.join(name);
            let mut options = fs::OpenOptions::new();
            let file =
                options.read(true).write(true).create(true).truncate(false).open(&path).map_err(at(&path))?;
            redb::backends::FileBackend::new(file).map_err(DiskError::from)
        };
        let mut disk = Self::open_on(file("log.redb")?, file("snapshot.redb")?, cluster, id)?;
        // The directory's entries must be on the disk, too.
        fs::File::open(dir).and_then(|d| d.sync_all()).map_err(at(dir))?;
        disk.dir = Some(dir.to_owned());
        Ok(disk)
    }

    /// Opens data on the given backends.
    pub fn open_on(
        log: impl StorageBackend,
        snapshots: impl StorageBackend,
        cluster: &ClusterName,
        id: NodeId,
    ) -> Result<Self, DiskError> {
        let (log, snapshots) = (open(log)?, open(snapshots)?);
        let write = log.begin_write()?;
        let data = {
            write.open_table(LOG)?;
            write.open_table(DATA_OF)?;
            let mut meta = write.open_table(META)?;
            let wanted = format!("node {id} of cluster {cluster}");
            let found = meta.get("owner")?.map(|v| String::from_utf8_lossy(v.value()).into_owned());
            if let Some(found) = found.filter(|found| *found != wanted) {
                return Err(DiskError::OtherNode { found, wanted });
            }
            let known = meta
                .get("data")?
                .and_then(|v| u128::from_le_bytes(v.value().try_into().ok()?).try_into().ok());
            match known {
                Some(data) => data,
                None => {
                    let data = CopyId::random();
                    meta.insert("owner", wanted.as_bytes())?;
                    meta.insert("data", u128::from(data).to_le_bytes().as_slice())?;
                    data
                }
            }
        };
        write.commit()?;
        let write = snapshots.begin_write()?;
        write.open_table(META)?;
        write.commit()?;
        Ok(Self { log, snapshots, dir: None, data })
    }

    /// The id of this data, which was made with it.
    pub fn data(&self) -> CopyId {
        self.data
    }

    /// Appends encoded entries, with their indexes, to the log.
    pub fn append(&self, entries: &[(u64, Vec<u8>)]) -> Result<(), DiskError> {
        let write = self.log.begin_write()?;
        {
            let mut log = write.open_table(LOG)?;
            for (index, entry) in entries {
                log.insert(index, entry.as_slice())?;
            }
        }
        Ok(write.commit()?)
    }

    /// Removes the entries from this index on.
    pub fn truncate(&self, from: u64) -> Result<(), DiskError> {
        let write = self.log.begin_write()?;
        write.open_table(LOG)?.retain_in(from.., |_, _| false)?;
        Ok(write.commit()?)
    }

    /// Removes the entries up to and including this index, and stores `purged` as the value of that name.
    pub fn purge(&self, upto: u64, purged: &[u8]) -> Result<(), DiskError> {
        let write = self.log.begin_write()?;
        write.open_table(LOG)?.retain_in(..=upto, |_, _| false)?;
        write.open_table(META)?.insert("purged", purged)?;
        Ok(write.commit()?)
    }

    /// The encoded entries in a range of indexes.
    pub fn read(&self, range: impl RangeBounds<u64>) -> Result<Vec<Vec<u8>>, DiskError> {
        let log = self.log.begin_read()?.open_table(LOG)?;
        log.range(range)?.map(|entry| Ok(entry?.1.value().to_vec())).collect()
    }

    /// The last encoded entry of the log.
    pub fn last(&self) -> Result<Option<Vec<u8>>, DiskError> {
        let log = self.log.begin_read()?.open_table(LOG)?;
        Ok(log.last()?.map(|(_, entry)| entry.value().to_vec()))
    }

    /// The value stored under this name.
    pub fn get(&self, name: &str) -> Result<Option<Vec<u8>>, DiskError> {
        let meta = self.log.begin_read()?.open_table(META)?;
        Ok(meta.get(name)?.map(|v| v.value().to_vec()))
    }

    /// Stores a value under this name.
    pub fn put(&self, name: &str, value: &[u8]) -> Result<(), DiskError> {
        let write = self.log.begin_write()?;
        write.open_table(META)?.insert(name, value)?;
        Ok(write.commit()?)
    }

    /// The id of the data that each other member is known to have.
    pub fn data_of_members(&self) -> Result<BTreeMap<NodeId, u128>, DiskError> {
        let table = self.log.begin_read()?.open_table(DATA_OF)?;
        table
            .iter()?
            .map(|row| row.map(|(id, data)| (id.value(), data.value())).map_err(DiskError::from))
            .collect()
    }

    /// Stores or forgets the id of the data that a member is known to have.
    pub fn set_data_of_member(&self, id: NodeId, data: Option<CopyId>) -> Result<(), DiskError> {
        let write = self.log.begin_write()?;
        {
            let mut table = write.open_table(DATA_OF)?;
            match data {
                Some(data) => table.insert(id, u128::from(data))?,
                None => table.remove(id)?,
            };
        }
        Ok(write.commit()?)
    }

    /// Stores a snapshot, which replaces the previous one.
    pub fn put_snapshot(&self, meta: &[u8], state: &[u8]) -> Result<(), DiskError> {
        let write = self.snapshots.begin_write()?;
        {
            let mut table = write.open_table(META)?;
            table.insert("meta", meta)?;
            table.insert("state", state)?;
        }
        Ok(write.commit()?)
    }

    /// The stored snapshot.
    pub fn snapshot(&self) -> Result<Option<StoredSnapshot>, DiskError> {
        let table = self.snapshots.begin_read()?.open_table(META)?;
        let (meta, state) = (table.get("meta")?, table.get("state")?);
        Ok(meta.zip(state).map(|(meta, state)| StoredSnapshot {
            meta: meta.value().to_vec(),
            state: state.value().to_vec(),
        }))
    }

    /// The number of free bytes on the disk of the data, and the size of its files in bytes.
    pub fn space(&self) -> (u64, u64) {
        let Some(dir) = &self.dir else { return (u64::MAX, 0) };
        let free = rustix::fs::statvfs(dir).map_or(0, |fs| fs.f_bavail * fs.f_frsize);
        let used =
            ["log.redb", "snapshot.redb"].map(|name| fs::metadata(dir.join(name)).map_or(0, |m| m.len()));
        (free, used.iter().sum())
    }

    /// Whether there is too little space to accept commands.
    pub fn is_full(&self) -> bool {
        let (free, used) = self.space();
        // While a snapshot is replaced the file holds both, so another one needs at most half of the files' size.
        free < RESERVE_BYTES.saturating_add(used / 2)
    }
}
