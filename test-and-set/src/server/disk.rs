//! What a member keeps on its disk: the Raft log, its vote and identity in one redb file, the snapshot in another.
//!
//! Two files, because redb has one writer for each: a large snapshot being written must not hold up the log. Every change here
//! is on the disk (fsync) when the call returns.

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

/// Bytes of each file that redb may keep in memory.
const CACHE_BYTES: usize = 16 << 20;
/// Free space, beside that for another snapshot, under which no commands are taken: votes and snapshots must still fit.
const RESERVE_BYTES: u64 = 32 << 20;

/// What is wrong with a member's data.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The database failed: look at the disk, free space if it is full, then start the node again.
    #[error("the node's database failed: {0}")]
    Database(Box<redb::Error>),
    /// The directory cannot be used.
    #[error("{path}")]
    Io {
        /// The directory or file.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// The directory belongs to another node: correct --data, --id or --cluster.
    #[error("the data belongs to {found}, not to {wanted}: correct --data, --id or --cluster")]
    OtherNode {
        /// Whose it is.
        found: String,
        /// Who asks.
        wanted: String,
    },
    /// The thread that writes the log cannot be started.
    #[error("the thread that writes the log cannot be started")]
    Thread(#[source] io::Error),
    /// An earlier write of the log has failed, as was said then.
    #[error("an earlier write of the log has failed")]
    NotFlushed,
    /// A stored value cannot be decoded.
    #[error("the stored {what} cannot be decoded")]
    Decode {
        /// Which.
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

/// A snapshot as it is stored.
pub struct StoredSnapshot {
    /// Its description.
    pub meta: Vec<u8>,
    /// The state.
    pub state: Vec<u8>,
}

/// A member's data.
pub struct Disk {
    log: Database,
    snapshots: Database,
    /// `None` for a disk that is not a directory.
    dir: Option<PathBuf>,
    data: CopyId,
}

/// The first bytes of a database; redb writes them last when it makes one.
const MAGIC_BYTES: usize = 9;

fn open(backend: impl StorageBackend) -> Result<Database, DiskError> {
    let failed = |error| DiskError::from(redb::StorageError::Io(error));
    // A database without its magic was never finished, so nothing was ever in it.
    let mut magic = [0; MAGIC_BYTES];
    let len = backend.len().map_err(failed)?;
    let readable = magic.len().min(usize::try_from(len).unwrap_or(usize::MAX));
    backend.read(0, &mut magic[..readable]).map_err(failed)?;
    if len > 0 && magic == [0; MAGIC_BYTES] {
        backend.set_len(0).map_err(failed)?;
    }
    Ok(Builder::new().set_cache_size(CACHE_BYTES).create_with_backend(backend)?)
}

impl Disk {
    /// Opens a directory, making it if it does not exist. One process may have it open.
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
        // The files' names must be on the disk as well.
        fs::File::open(dir).and_then(|d| d.sync_all()).map_err(at(dir))?;
        disk.dir = Some(dir.to_owned());
        Ok(disk)
    }

    /// Opens a disk on backends of the caller's.
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

    /// The id of this data, made when it was empty.
    pub fn data(&self) -> CopyId {
        self.data
    }

    /// Appends encoded entries to the log, by index.
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

    /// Removes the log from this index on.
    pub fn truncate(&self, from: u64) -> Result<(), DiskError> {
        let write = self.log.begin_write()?;
        write.open_table(LOG)?.retain_in(from.., |_, _| false)?;
        Ok(write.commit()?)
    }

    /// Removes the log up to and with this index, and keeps `purged` as a value of that name.
    pub fn purge(&self, upto: u64, purged: &[u8]) -> Result<(), DiskError> {
        let write = self.log.begin_write()?;
        write.open_table(LOG)?.retain_in(..=upto, |_, _| false)?;
        write.open_table(META)?.insert("purged", purged)?;
        Ok(write.commit()?)
    }

    /// Encoded entries of the log.
    pub fn read(&self, range: impl RangeBounds<u64>) -> Result<Vec<Vec<u8>>, DiskError> {
        let log = self.log.begin_read()?.open_table(LOG)?;
        log.range(range)?.map(|entry| Ok(entry?.1.value().to_vec())).collect()
    }

    /// The last encoded entry of the log.
    pub fn last(&self) -> Result<Option<Vec<u8>>, DiskError> {
        let log = self.log.begin_read()?.open_table(LOG)?;
        Ok(log.last()?.map(|(_, entry)| entry.value().to_vec()))
    }

    /// A value by its name.
    pub fn get(&self, name: &str) -> Result<Option<Vec<u8>>, DiskError> {
        let meta = self.log.begin_read()?.open_table(META)?;
        Ok(meta.get(name)?.map(|v| v.value().to_vec()))
    }

    /// Keeps a value.
    pub fn put(&self, name: &str, value: &[u8]) -> Result<(), DiskError> {
        let write = self.log.begin_write()?;
        write.open_table(META)?.insert(name, value)?;
        Ok(write.commit()?)
    }

    /// The data that each other member is known to have.
    pub fn data_of_members(&self) -> Result<BTreeMap<NodeId, u128>, DiskError> {
        let table = self.log.begin_read()?.open_table(DATA_OF)?;
        table
            .iter()?
            .map(|row| row.map(|(id, data)| (id.value(), data.value())).map_err(DiskError::from))
            .collect()
    }

    /// Keeps or forgets the data that a member is known to have.
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

    /// Keeps a snapshot in place of the last one.
    pub fn put_snapshot(&self, meta: &[u8], state: &[u8]) -> Result<(), DiskError> {
        let write = self.snapshots.begin_write()?;
        {
            let mut table = write.open_table(META)?;
            table.insert("meta", meta)?;
            table.insert("state", state)?;
        }
        Ok(write.commit()?)
    }

    /// The snapshot.
    pub fn snapshot(&self) -> Result<Option<StoredSnapshot>, DiskError> {
        let table = self.snapshots.begin_read()?.open_table(META)?;
        let (meta, state) = (table.get("meta")?, table.get("state")?);
        Ok(meta.zip(state).map(|(meta, state)| StoredSnapshot {
            meta: meta.value().to_vec(),
            state: state.value().to_vec(),
        }))
    }

    /// Free bytes for this node's data, and the bytes that its files have.
    pub fn space(&self) -> (u64, u64) {
        let Some(dir) = &self.dir else { return (u64::MAX, 0) };
        let free = rustix::fs::statvfs(dir).map_or(0, |fs| fs.f_bavail * fs.f_frsize);
        let used =
            ["log.redb", "snapshot.redb"].map(|name| fs::metadata(dir.join(name)).map_or(0, |m| m.len()));
        (free, used.iter().sum())
    }

    /// Whether there is too little space to take commands.
    pub fn is_full(&self) -> bool {
        let (free, used) = self.space();
        // The files may hold two snapshots at once while one is replaced, so their size bounds what another one needs.
        free < RESERVE_BYTES.saturating_add(used / 2)
    }
}
