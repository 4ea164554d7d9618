//! The Raft log in front of the disk, which lets a leader write to its own disk while it sends to the others.
//!
//! openraft 0.9 sends an entry only after the leader's own fsync: two fsyncs in sequence for each verdict. Here a leader's append
//! returns at once, and a separate thread flushes. This is correct (Ongaro's thesis, 10.2.1) as long as an entry has no effect
//! before it is on this disk, too. The callers ensure that:
//!
//! - the state machine waits with [`RaftLog::flushed_to`] before it applies an entry, and so before a client is answered;
//! - the commit index that the other members are told is lower than [`RaftLog::first_unflushed`];
//! - a restarted leader never resumes its term, so it cannot use the index of an entry that it lost for another one.
//!
//! A follower's append, and every other change, is on the disk when it returns, and waits until earlier appends are flushed.

use std::collections::BTreeMap;
use std::ops::{Bound, RangeBounds};
use std::sync::{Arc, Mutex, mpsc};

use tokio::sync::watch;
use tracing::error;

use crate::server::disk::MemberDisk;
use crate::server::disk_error::DiskError;

type EncodedEntries = Vec<(u64, Vec<u8>)>;

/// The Raft log of this member.
pub struct RaftLog {
    disk: Arc<MemberDisk>,
    shared: Arc<FlushState>,
    queue: mpsc::Sender<EncodedEntries>,
}

struct FlushState {
    /// The entries that were appended and may not be on the disk yet.
    unflushed: Mutex<BTreeMap<u64, Vec<u8>>>,
    /// Changes when something was flushed (`false`), or cannot be (`true`).
    failed: watch::Sender<bool>,
}

impl FlushState {
    fn unflushed(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, Vec<u8>>> {
        self.unflushed.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl RaftLog {
    /// Starts the thread that flushes, which ends when the log is dropped.
    pub fn new(disk: Arc<MemberDisk>) -> Result<Self, DiskError> {
        let shared = Arc::new(FlushState { unflushed: Mutex::default(), failed: watch::Sender::new(false) });
        let (queue, appended) = mpsc::channel();
        let (flusher, to) = (shared.clone(), disk.clone());
        let thread = std::thread::Builder::new().name("log-flusher".into());
        thread.spawn(move || flush(&to, &flusher, &appended)).map_err(DiskError::Thread)?;
        Ok(Self { disk, shared, queue })
    }

    /// Appends encoded entries without waiting for the disk; see [`RaftLog::flushed_to`].
    pub fn append_unflushed(&self, entries: EncodedEntries) -> Result<(), DiskError> {
        self.shared.unflushed().extend(entries.iter().cloned());
        self.queue.send(entries).map_err(|_| DiskError::NotFlushed)
    }

    /// Appends encoded entries, and waits until they are on the disk.
    pub async fn append(&self, entries: EncodedEntries) -> Result<(), DiskError> {
        self.flushed_disk().await?.append(&entries)
    }

    /// Waits until every appended entry is on the disk, and returns the disk.
    pub async fn flushed_disk(&self) -> Result<&MemberDisk, DiskError> {
        self.flushed_to(u64::MAX).await?;
        Ok(&self.disk)
    }

    /// Waits until everything up to this index is on the disk.
    pub async fn flushed_to(&self, index: u64) -> Result<(), DiskError> {
        let mut failed = self.shared.failed.subscribe();
        loop {
            if *failed.borrow_and_update() {
                return Err(DiskError::NotFlushed);
            }
            if self.first_unflushed().is_none_or(|first| first > index) {
                return Ok(());
            }
            failed.changed().await.map_err(|_| DiskError::NotFlushed)?;
        }
    }

    /// The first index that may not be on the disk.
    pub fn first_unflushed(&self) -> Option<u64> {
        self.shared.unflushed().first_key_value().map(|(index, _)| *index)
    }

    /// The encoded entries in a range of indexes, flushed or not.
    pub fn read(&self, range: impl RangeBounds<u64>) -> Result<Vec<Vec<u8>>, DiskError> {
        let bounds = (range.start_bound().cloned(), range.end_bound().cloned());
        // These are copied before the disk is read: an entry that is flushed in between is in both, and returned once.
        let fresh: EncodedEntries =
            self.shared.unflushed().range(bounds).map(|(i, entry)| (*i, entry.clone())).collect();
        let end = fresh.first().map_or(bounds.1, |(first, _)| Bound::Excluded(*first));
        let mut entries = self.disk.read((bounds.0, end))?;
        entries.extend(fresh.into_iter().map(|(_, entry)| entry));
        Ok(entries)
    }
}

/// Writes appended entries, all that are waiting with one fsync.
fn flush(disk: &MemberDisk, shared: &FlushState, appended: &mpsc::Receiver<EncodedEntries>) {
    while let Ok(mut rows) = appended.recv() {
        rows.extend(appended.try_iter().flatten());
        if let Err(error) = disk.append(&rows) {
            error!("cannot write the log: {error}");
            shared.failed.send_replace(true);
            return;
        }
        let mut unflushed = shared.unflushed();
        rows.iter().for_each(|(index, _)| drop(unflushed.remove(index)));
        drop(unflushed);
        shared.failed.send_replace(false);
    }
}
