//! A member's data on the disk: the Raft log, its vote and its identity in one redb file, the snapshot in another, and the
//! [`journal`] of the first.
//!
//! There are two redb files because redb has one writer for each: writing a large snapshot must not delay the log. Every change
//! is on the disk (fsync) when the call returns. At start all of both is verified, and damaged data is refused.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::ops::RangeBounds;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use redb::{Builder, Database, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition};

use crate::names::{ClusterName, CopyId};
use crate::server::journal::{self, APPEND_BYTES_MAX, DiskChange, Journal, JournalError};
use crate::wire::NodeId;

const LOG: TableDefinition<u64, &[u8]> = TableDefinition::new("log");
const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
const DATA_OF: TableDefinition<NodeId, u128> = TableDefinition::new("data_of");

const LOG_FILE: &str = "log.redb";
const SNAPSHOT_FILE: &str = "snapshot.redb";
const JOURNAL_FILE: &str = "journal";

/// The number of the last change, and that of the last snapshot, in tables of metadata.
const CHANGE_NUMBER: &str = "change";
const SNAPSHOT_NUMBER: &str = "snapshot";
/// Follows the name of the owner. A release that does not know this format takes the data for another member's; data without it
/// is of the first format, which has no journal.
const FORMAT: &str = ", data format 2";

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
    /// A file is damaged. The member may lack what it has acknowledged, and must not vote.
    #[error(
        "{file} in this member's data is damaged: {how}. The member may lack entries that it has acknowledged, so it must not \
         go on with this data: remove it with `vmft-store member remove`, move its --data directory away, start it with --join, \
         and add it with `vmft-store member add`"
    )]
    Damaged {
        /// The file's name.
        file: &'static str,
        /// What was found.
        how: String,
    },
    /// The journal failed: check the disk, free space if it is full, then start the member again.
    #[error(transparent)]
    Journal(JournalError),
    /// A value is in another release's encoding, or empty: start the release that wrote it.
    #[error(
        "the {what} has the encoding {found:?}, which this release does not know: start the release of vmft-store that wrote it"
    )]
    Encoding {
        /// The value's name.
        what: &'static str,
        /// Its encoding.
        found: Option<u8>,
    },
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

impl DiskError {
    fn damaged(file: &'static str, how: impl Into<String>) -> Self {
        Self::Damaged { file, how: how.into() }
    }

    /// An error of redb that comes from a file's content is the damage of that file.
    fn in_file(self, file: &'static str) -> Self {
        use io::ErrorKind::{InvalidData, InvalidInput, UnexpectedEof};
        let Self::Database(error) = self else { return self };
        match *error {
            redb::Error::Corrupted(how) => Self::damaged(file, how),
            redb::Error::UpgradeRequired(version) => {
                Self::damaged(file, format!("its header has the version {version}"))
            }
            redb::Error::Io(e) if matches!(e.kind(), InvalidData | InvalidInput | UnexpectedEof) => {
                Self::damaged(file, e.to_string())
            }
            _ => Self::Database(error),
        }
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
    changes: Mutex<Changes>,
}

/// The journal, and the number of the next change; no number once a change has failed.
struct Changes {
    journal: Journal,
    next: Option<u64>,
}

/// The files of a member's data.
#[derive(Debug, Clone)]
pub struct DataFiles<B> {
    /// The Raft log, the vote and the identity.
    pub log: B,
    /// The snapshot.
    pub snapshots: B,
    /// The journal of the log.
    pub journal: B,
}

/// The length of the magic number at the start of a database, which redb writes last when it makes one.
const MAGIC_BYTES: usize = 9;

/// Opens a database, and verifies all of it: redb itself does not after it was closed in order. Without `has_content` a database
/// that was never completed is made anew.
fn open(file: &'static str, backend: impl StorageBackend, has_content: bool) -> Result<Database, DiskError> {
    let opened = catch_unwind(AssertUnwindSafe(|| -> Result<Database, DiskError> {
        let failed = |error| DiskError::from(redb::StorageError::Io(error));
        let mut magic = [0; MAGIC_BYTES];
        let len = backend.len().map_err(failed)?;
        let readable = magic.len().min(usize::try_from(len).unwrap_or(usize::MAX));
        backend.read(0, &mut magic[..readable]).map_err(failed)?;
        if len > 0 && magic == [0; MAGIC_BYTES] {
            if has_content {
                return Err(DiskError::damaged(file, "its first page is empty"));
            }
            backend.set_len(0).map_err(failed)?;
        }
        let mut database = Builder::new().set_cache_size(CACHE_BYTES).create_with_backend(backend)?;
        if !database.check_integrity()? {
            eprintln!("{file} was not closed in order, and was repaired");
        }
        Ok(database)
    }));
    opened.unwrap_or_else(|_| Err(DiskError::damaged(file, "it cannot be read"))).map_err(|e| e.in_file(file))
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
        let files =
            DataFiles { log: file(LOG_FILE)?, snapshots: file(SNAPSHOT_FILE)?, journal: file(JOURNAL_FILE)? };
        let mut disk = Self::open_on(files, cluster, id)?;
        // The directory's entries must be on the disk, too.
        fs::File::open(dir).and_then(|d| d.sync_all()).map_err(at(dir))?;
        disk.dir = Some(dir.to_owned());
        Ok(disk)
    }

    /// Opens data on the given backends.
    ///
    /// # Errors
    /// It is damaged, cannot be read, or belongs to another member.
    pub fn open_on<B: StorageBackend>(
        files: DataFiles<B>,
        cluster: &ClusterName,
        id: NodeId,
    ) -> Result<Self, DiskError> {
        let journal: Arc<dyn StorageBackend> = Arc::new(files.journal);
        let journalled = journal::newest(&*journal).map_err(redb::StorageError::Io)?;
        let log = open(LOG_FILE, files.log, journalled.is_some())?;
        let write = log.begin_write()?;
        write.open_table(LOG)?;
        write.open_table(DATA_OF)?;
        write.open_table(META)?;
        write.commit()?;
        let has_snapshot = log.begin_read()?.open_table(META)?.get(SNAPSHOT_NUMBER)?.is_some();
        let snapshots = open(SNAPSHOT_FILE, files.snapshots, has_snapshot)?;
        let write = snapshots.begin_write()?;
        write.open_table(META)?;
        write.commit()?;
        let changes =
            Mutex::new(Changes { journal: Journal::new(journal).map_err(DiskError::Journal)?, next: None });
        let mut disk = Self { log, snapshots, dir: None, data: CopyId::random(), changes };
        disk.recover(journalled)?;
        disk.identify(&format!("node {id} of cluster {cluster}"))?;
        disk.check_snapshot()?;
        Ok(disk)
    }

    /// Compares the database with the journal, and makes the journal's newest change again if the database lacks it.
    fn recover(&self, journalled: Option<(u64, DiskChange)>) -> Result<(), DiskError> {
        let has = self.number(&self.log, CHANGE_NUMBER)?;
        let newest = journalled.as_ref().map_or(0, |(number, _)| *number);
        match journalled {
            Some((number, change)) if number == has + 1 => {
                eprintln!("{LOG_FILE} lacks the last change, which was made again from {JOURNAL_FILE}");
                self.change_log(number, &change)?;
            }
            // The write of the journal was torn. The slot must be whole again before the other one is written.
            _ if newest + 1 == has => {
                let changes = self.changes();
                changes.journal.write(has, &DiskChange::Nothing).map_err(DiskError::Journal)?;
            }
            _ if newest == has => {}
            _ if newest < has => return Err(DiskError::damaged(JOURNAL_FILE, "it lacks the last changes")),
            _ => return Err(DiskError::damaged(LOG_FILE, "it lacks the last changes")),
        }
        self.changes().next = Some(has.max(newest) + 1);
        Ok(())
    }

    /// Checks whose data this is, and reads its id; new data gets both.
    fn identify(&mut self, member: &str) -> Result<(), DiskError> {
        let wanted = format!("{member}{FORMAT}");
        let found = self.get("owner")?.map(|owner| String::from_utf8_lossy(&owner).into_owned());
        if let Some(found) = found.as_ref().filter(|found| **found != wanted && *found != member) {
            return Err(DiskError::OtherNode { found: found.clone(), wanted });
        }
        let known = self.get("data")?.and_then(|v| u128::from_le_bytes(v.try_into().ok()?).try_into().ok());
        self.data = known.unwrap_or(self.data);
        if found.as_ref() != Some(&wanted) || known.is_none() {
            self.change(DiskChange::Identify { owner: wanted, data: self.data.into() })?;
        }
        Ok(())
    }

    /// Compares the snapshot with the number of the last one, which is in the log's database.
    fn check_snapshot(&self) -> Result<(), DiskError> {
        let (has, last) =
            (self.number(&self.snapshots, SNAPSHOT_NUMBER)?, self.number(&self.log, SNAPSHOT_NUMBER)?);
        if has < last {
            return Err(DiskError::damaged(SNAPSHOT_FILE, "it lacks the last snapshot"));
        }
        Ok(())
    }

    /// A number in the table of metadata; 0 if it is not there.
    fn number(&self, database: &Database, name: &str) -> Result<u64, DiskError> {
        let meta = database.begin_read()?.open_table(META)?;
        let number = meta.get(name)?.and_then(|v| v.value().try_into().ok().map(u64::from_le_bytes));
        Ok(number.unwrap_or(0))
    }

    fn changes(&self) -> MutexGuard<'_, Changes> {
        self.changes.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Makes a change in the database and in the journal, at the same time. After one that failed no other is made.
    fn change(&self, change: DiskChange) -> Result<(), DiskError> {
        let mut changes = self.changes();
        let number = changes.next.take().ok_or(DiskError::NotFlushed)?;
        changes.journal.begin(number, &change).map_err(DiskError::Journal)?;
        let changed = self.change_log(number, &change);
        let journalled = changes.journal.finish();
        changed?;
        journalled.map_err(DiskError::Journal)?;
        changes.next = Some(number + 1);
        Ok(())
    }

    fn change_log(&self, number: u64, change: &DiskChange) -> Result<(), DiskError> {
        let write = self.log.begin_write()?;
        {
            let (mut log, mut meta) = (write.open_table(LOG)?, write.open_table(META)?);
            match change {
                DiskChange::Nothing => {}
                DiskChange::Identify { owner, data } => {
                    meta.insert("owner", owner.as_bytes())?;
                    meta.insert("data", data.to_le_bytes().as_slice())?;
                }
                DiskChange::Append(entries) => {
                    for (index, entry) in entries {
                        log.insert(index, entry.as_slice())?;
                    }
                }
                DiskChange::Truncate(from) => log.retain_in(*from.., |_, _| false)?,
                DiskChange::Purge { upto, purged } => {
                    log.retain_in(..=*upto, |_, _| false)?;
                    meta.insert("purged", purged.as_slice())?;
                }
                DiskChange::Put { name, value } => drop(meta.insert(name.as_str(), value.as_slice())?),
                DiskChange::DataOf { id, data: Some(data) } => {
                    write.open_table(DATA_OF)?.insert(id, data)?;
                }
                DiskChange::DataOf { id, data: None } => drop(write.open_table(DATA_OF)?.remove(id)?),
            }
            meta.insert(CHANGE_NUMBER, number.to_le_bytes().as_slice())?;
        }
        Ok(write.commit()?)
    }

    /// The id of this data, which was made with it.
    pub fn data(&self) -> CopyId {
        self.data
    }

    /// Appends encoded entries, with their indexes, to the log.
    pub fn append(&self, entries: &[(u64, Vec<u8>)]) -> Result<(), DiskError> {
        let mut bytes = 0;
        let parts = entries.chunk_by(|_, (_, next)| {
            bytes += next.len();
            let fits = bytes <= APPEND_BYTES_MAX;
            bytes = if fits { bytes } else { 0 };
            fits
        });
        parts.into_iter().try_for_each(|part| self.change(DiskChange::Append(part.to_vec())))
    }

    /// Removes the entries from this index on.
    pub fn truncate(&self, from: u64) -> Result<(), DiskError> {
        self.change(DiskChange::Truncate(from))
    }

    /// Removes the entries up to and including this index, and stores `purged` as the value of that name.
    pub fn purge(&self, upto: u64, purged: &[u8]) -> Result<(), DiskError> {
        self.change(DiskChange::Purge { upto, purged: purged.to_vec() })
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
        self.change(DiskChange::Put { name: name.into(), value: value.to_vec() })
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
        self.change(DiskChange::DataOf { id, data: data.map(u128::from) })
    }

    /// Stores a snapshot, which replaces the previous one. The log's database then has the number of the last snapshot, so that
    /// an older one is not taken for it.
    pub fn put_snapshot(&self, meta: &[u8], state: &[u8]) -> Result<(), DiskError> {
        let write = self.snapshots.begin_write()?;
        let number = (self.number(&self.snapshots, SNAPSHOT_NUMBER)? + 1).to_le_bytes();
        {
            let mut table = write.open_table(META)?;
            table.insert("meta", meta)?;
            table.insert("state", state)?;
            table.insert(SNAPSHOT_NUMBER, number.as_slice())?;
        }
        write.commit()?;
        self.put(SNAPSHOT_NUMBER, &number)
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
        let used = [LOG_FILE, SNAPSHOT_FILE, JOURNAL_FILE]
            .map(|name| fs::metadata(dir.join(name)).map_or(0, |m| m.len()));
        (free, used.iter().sum())
    }

    /// Whether there is too little space to accept commands.
    pub fn is_full(&self) -> bool {
        let (free, used) = self.space();
        // While a snapshot is replaced the file holds both, so another one needs at most half of the files' size.
        free < RESERVE_BYTES.saturating_add(used / 2)
    }
}
