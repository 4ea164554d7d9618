//! The log in front of the disk, so that a leader writes to its own disk while it sends to the others.
//!
//! openraft 0.9 waits for a leader's own fsync before it sends an entry: two fsyncs one after the other for each verdict. Here a
//! leader's append returns at once, and a thread of its own flushes. That is right (Ongaro's thesis, 10.2.1) as long as
//! nothing comes of an entry before it is on this disk, too, which the callers see to:
//!
//! - the state machine waits with [`Log::flushed_to`] before it applies, and so before anybody is answered;
//! - what the others are told to be committed ends before [`Log::first_unflushed`];
//! - a restarted leader never resumes its term, so that it cannot give an index that it lost to another entry.
//!
//! A follower's append is on the disk when it returns, as everything else is; and nothing overtakes what is being flushed.

use std::collections::BTreeMap;
use std::ops::{Bound, RangeBounds};
use std::sync::{Arc, Mutex, mpsc};

use tokio::sync::watch;

use crate::server::disk::{Disk, DiskError};

type Rows = Vec<(u64, Vec<u8>)>;

/// The log of one member.
pub struct Log {
    disk: Arc<Disk>,
    shared: Arc<Shared>,
    queue: mpsc::Sender<Rows>,
}

struct Shared {
    /// Appended, but perhaps not on the disk yet.
    unflushed: Mutex<BTreeMap<u64, Vec<u8>>>,
    /// Says that something was flushed, or (`true`) that it cannot be.
    failed: watch::Sender<bool>,
}

impl Shared {
    fn unflushed(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, Vec<u8>>> {
        self.unflushed.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Log {
    /// Starts the thread that flushes; it ends with the log.
    pub fn new(disk: Arc<Disk>) -> Result<Self, DiskError> {
        let shared = Arc::new(Shared { unflushed: Mutex::default(), failed: watch::Sender::new(false) });
        let (queue, appended) = mpsc::channel();
        let (flusher, to) = (shared.clone(), disk.clone());
        let thread = std::thread::Builder::new().name("log-flusher".into());
        thread.spawn(move || flush(&to, &flusher, &appended)).map_err(DiskError::Thread)?;
        Ok(Self { disk, shared, queue })
    }

    /// Appends encoded entries; they are on the disk when [`Log::flushed_to`] says so.
    pub fn append_soon(&self, entries: Rows) -> Result<(), DiskError> {
        self.shared.unflushed().extend(entries.iter().cloned());
        self.queue.send(entries).map_err(|_| DiskError::NotFlushed)
    }

    /// Appends encoded entries; they are on the disk when it returns.
    pub async fn append(&self, entries: Rows) -> Result<(), DiskError> {
        self.settle().await?.append(&entries)
    }

    /// The disk, when everything that was appended is on it.
    pub async fn settle(&self) -> Result<&Disk, DiskError> {
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

    /// The first index that is perhaps not on the disk.
    pub fn first_unflushed(&self) -> Option<u64> {
        self.shared.unflushed().first_key_value().map(|(index, _)| *index)
    }

    /// Encoded entries, flushed or not.
    pub fn read(&self, range: impl RangeBounds<u64>) -> Result<Vec<Vec<u8>>, DiskError> {
        let bounds = (range.start_bound().cloned(), range.end_bound().cloned());
        // Copied before the disk is read: what is flushed in between is seen twice, and taken once.
        let fresh: Rows =
            self.shared.unflushed().range(bounds).map(|(i, entry)| (*i, entry.clone())).collect();
        let end = fresh.first().map_or(bounds.1, |(first, _)| Bound::Excluded(*first));
        let mut entries = self.disk.read((bounds.0, end))?;
        entries.extend(fresh.into_iter().map(|(_, entry)| entry));
        Ok(entries)
    }
}

/// Writes what was appended, all that waits with one fsync.
fn flush(disk: &Disk, shared: &Shared, appended: &mpsc::Receiver<Rows>) {
    while let Ok(mut rows) = appended.recv() {
        rows.extend(appended.try_iter().flatten());
        if let Err(error) = disk.append(&rows) {
            eprintln!("the log cannot be written: {error}");
            shared.failed.send_replace(true);
            return;
        }
        let mut unflushed = shared.unflushed();
        rows.iter().for_each(|(index, _)| drop(unflushed.remove(index)));
        drop(unflushed);
        shared.failed.send_replace(false);
    }
}
