//! A member's data on the disk: the Raft log, its vote and its identity in one redb file, the snapshot in another, and the
//! [`journal`] of the first.
//!
//! There are two redb files because redb has one writer for each: writing a large snapshot must not delay the log. Every change
//! is on the disk (fsync) when the call returns. At start all of both is verified, and damaged data is refused.

use std::collections::BTreeMap;
use std::fs;
use std::ops::RangeBounds;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use redb::{Builder, Database, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tracing::warn;

use crate::names::{ClusterName, CopyId, RunId};
use crate::private_file;
use crate::server::disk_error::{DATA_FORMAT, DiskError};
use crate::server::journal::{self, APPEND_BYTES_MAX, DiskChange, Journal};
use crate::server::marks::{KnownMembers, RunList};
use crate::server::slow_disk::SlowDisk;
use crate::wire::{DataMark, NodeId};

const LOG: TableDefinition<u64, &[u8]> = TableDefinition::new("log");
const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");

const LOG_FILE: &str = "log.redb";
const SNAPSHOT_FILE: &str = "snapshot.redb";
const JOURNAL_FILE: &str = "journal";

/// The number of the last change with what is known of the other members, and the number of the last snapshot, in tables of metadata.
const CHANGE: &str = "change";
const SNAPSHOT_NUMBER: &str = "snapshot";
/// Stands between the name of the owner and the number of the format; data without it is of format 1.
const FORMAT: &str = ", data format ";
/// The names of values in the table of metadata: this member's runs, and why its data must not be used any more.
const RUNS: &str = "runs";
const ROLLED_BACK: &str = "rolled back";

/// What is stored as [`CHANGE`].
type LastChange = (u64, BTreeMap<NodeId, DataMark>);

/// How many bytes of each file redb may cache in memory.
const CACHE_BYTES: usize = 16 << 20;
/// No commands are accepted if less than this is free beside the room for another snapshot: votes and snapshots must still fit.
const RESERVE_BYTES: u64 = 32 << 20;

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
    run: RunId,
    runs: RunList,
    changes: Mutex<Changes>,
    /// The number of the last change that is on the disk.
    last: AtomicU64,
    known: Mutex<KnownMembers>,
    slow: SlowDisk,
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
            warn!("{file} was not closed in order, and was repaired");
        }
        Ok(database)
    }));
    opened.unwrap_or_else(|_| Err(DiskError::damaged(file, "it cannot be read"))).map_err(|e| e.in_file(file))
}

/// Checks whose data this is, before anything else of it is read: the rest may be in another format.
fn check_owner(log: &Database, member: &str) -> Result<(), DiskError> {
    let meta = log.begin_read()?.open_table(META)?;
    let Some(owner) = meta.get("owner")?.map(|owner| String::from_utf8_lossy(owner.value()).into_owned())
    else {
        return Ok(());
    };
    let (found, format) = owner.split_once(FORMAT).unwrap_or((&owner, "1"));
    let format = format.parse().map_err(|_| DiskError::damaged(LOG_FILE, "it has no number of a format"))?;
    if format != DATA_FORMAT {
        return Err(DiskError::Format { found: format });
    }
    if found != member {
        return Err(DiskError::OtherNode { found: found.into(), wanted: member.into() });
    }
    Ok(())
}

fn encode(value: &impl Serialize) -> Result<Vec<u8>, DiskError> {
    postcard::to_stdvec(value).map_err(|source| DiskError::Decode { what: "value", source })
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
            options.read(true).write(true).create(true).truncate(false);
            let file = private_file::open(&path, &mut options).map_err(at(&path))?;
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
        write.open_table(META)?;
        write.commit()?;
        let member = format!("node {id} of cluster {cluster}");
        check_owner(&log, &member)?;
        let has_snapshot = log.begin_read()?.open_table(META)?.get(SNAPSHOT_NUMBER)?.is_some();
        let snapshots = open(SNAPSHOT_FILE, files.snapshots, has_snapshot)?;
        let write = snapshots.begin_write()?;
        write.open_table(META)?;
        write.commit()?;
        let journal = Journal::new(journal).map_err(DiskError::Journal)?;
        let mut disk = Self {
            log,
            snapshots,
            dir: None,
            data: CopyId::random(),
            run: RunId::random(),
            runs: RunList::default(),
            changes: Mutex::new(Changes { journal, next: None }),
            last: AtomicU64::new(0),
            known: Mutex::default(),
            slow: SlowDisk::default(),
        };
        let (has, known): LastChange = disk.stored(CHANGE)?.unwrap_or_default();
        disk.known = Mutex::new(KnownMembers::stored(known));
        disk.recover(has, journalled)?;
        disk.identify(member)?;
        disk.check_snapshot()?;
        if let Some(why) = disk.stored(ROLLED_BACK)? {
            return Err(DiskError::RolledBack(why));
        }
        disk.begin_run()?;
        Ok(disk)
    }

    /// Compares the database, which `has` this last change, with the journal, and makes the journal's newest change again if the
    /// database lacks it.
    fn recover(&self, has: u64, journalled: Option<(u64, DiskChange)>) -> Result<(), DiskError> {
        let newest = journalled.as_ref().map_or(0, |(number, _)| *number);
        match journalled {
            Some((number, change)) if number == has + 1 => {
                warn!("{LOG_FILE} lacks the last change, which was made again from {JOURNAL_FILE}");
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
        self.last.store(has.max(newest), SeqCst);
        Ok(())
    }

    /// Reads the id of the data; new data gets one, and its owner.
    fn identify(&mut self, member: String) -> Result<(), DiskError> {
        let known = self.get("data")?.and_then(|v| u128::from_le_bytes(v.try_into().ok()?).try_into().ok());
        match known {
            Some(data) => self.data = data,
            None => {
                let owner = format!("{member}{FORMAT}{DATA_FORMAT}");
                self.change(DiskChange::Identify { owner, data: self.data.into() })?;
            }
        }
        Ok(())
    }

    /// Stores that another run has begun. Nothing is told of it before.
    fn begin_run(&mut self) -> Result<(), DiskError> {
        self.runs = self.stored(RUNS)?.unwrap_or_default();
        self.runs.begin(self.run, self.last.load(SeqCst));
        self.put(RUNS, &encode(&self.runs)?)
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
        let begun = Instant::now();
        let number = changes.next.take().ok_or(DiskError::NotFlushed)?;
        changes.journal.begin(number, &change).map_err(DiskError::Journal)?;
        let changed = self.change_log(number, &change);
        let journalled = changes.journal.finish();
        changed?;
        journalled.map_err(DiskError::Journal)?;
        changes.next = Some(number + 1);
        self.last.store(number, SeqCst);
        self.slow.note(begun);
        Ok(())
    }

    fn change_log(&self, number: u64, change: &DiskChange) -> Result<(), DiskError> {
        let write = self.log.begin_write()?;
        let mut known = self.known().clone();
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
                DiskChange::Known { id, mark } => known.set(*id, *mark),
            }
            meta.insert(CHANGE, encode(&(number, known.all()))?.as_slice())?;
        }
        write.commit()?;
        let mut now = self.known();
        if let DiskChange::Known { id, mark } = change {
            now.set(*id, *mark);
        }
        now.set_written(known.all());
        Ok(())
    }

    fn known(&self) -> MutexGuard<'_, KnownMembers> {
        self.known.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The id of this data, which was made with it.
    pub fn data(&self) -> CopyId {
        self.data
    }

    /// How far this data has come.
    pub fn mark(&self) -> DataMark {
        DataMark { data: self.data, run: self.run, change: self.last.load(SeqCst) }
    }

    /// Whether this data has a change that another member remembers of it.
    pub fn has(&self, mark: &DataMark) -> bool {
        mark.data != self.data || self.runs.have(mark, self.last.load(SeqCst))
    }

    /// Stores why this data must not be used any more.
    pub fn set_rolled_back(&self, why: &String) -> Result<(), DiskError> {
        self.put(ROLLED_BACK, &encode(why)?)
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

    fn stored<T: DeserializeOwned>(&self, what: &'static str) -> Result<Option<T>, DiskError> {
        let bytes = self.get(what)?;
        bytes
            .map(|bytes| postcard::from_bytes(&bytes).map_err(|source| DiskError::Decode { what, source }))
            .transpose()
    }

    /// Stores a value under this name.
    pub fn put(&self, name: &str, value: &[u8]) -> Result<(), DiskError> {
        self.change(DiskChange::Put { name: name.into(), value: value.to_vec() })
    }

    /// What is known of the other members' data.
    pub fn known_members(&self) -> BTreeMap<NodeId, DataMark> {
        self.known().all().clone()
    }

    /// Stores or forgets what is known of a member's data, whatever was known before.
    pub fn set_known(&self, id: NodeId, mark: Option<DataMark>) -> Result<(), DiskError> {
        self.change(DiskChange::Known { id, mark })
    }

    /// Notes what is known of members' data, without waiting for the disk: the next change stores it, too, or
    /// [`MemberDisk::write_known`].
    pub fn note(&self, note: impl FnOnce(&mut KnownMembers)) {
        note(&mut self.known());
    }

    /// Stores what is known of members' data, unless it is stored. This is no change, and not in the journal: what is lost of it
    /// with a damaged page was told to nobody.
    pub fn write_known(&self) -> Result<(), DiskError> {
        if self.known().is_written() {
            return Ok(());
        }
        let changes = self.changes();
        let last = changes.next.ok_or(DiskError::NotFlushed)? - 1;
        let write = self.log.begin_write()?;
        let known = self.known_members();
        write.open_table(META)?.insert(CHANGE, encode(&(last, &known))?.as_slice())?;
        write.commit()?;
        self.known().set_written(&known);
        Ok(())
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
