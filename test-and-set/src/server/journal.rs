//! The journal: a second copy of the last two changes of a member's log, in a file of its own.
//!
//! redb takes a damaged newest page for a write that a power cut has torn, and goes back to the commit before without a word. So
//! every change of the log has a number, which is committed with it, and is written here, too, at the same time. A change is
//! acknowledged when both are on the disk. At start the database may lack the newest change in the journal, which is then made
//! again, and the journal may lack the newest change of the database. Anything else is damage.
//!
//! ```text
//! the slot of change n is at offset n % 2 * SLOT_BYTES; numbers are little-endian
//!   offset 0   4 bytes   magic "VMTJ"
//!          4   u32       length of the body
//!          8   u64       n, from 1
//!         16   u64       XXH3 of the 16 bytes before and of the body
//!         24   body      DiskChange, in postcard's encoding
//! ```

use std::hash::Hasher;
use std::io;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use redb::StorageBackend;
use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_64;

use crate::wire::{DataMark, NodeId};

const MAGIC: [u8; 4] = *b"VMTJ";
const HEAD_BYTES: usize = 24;
/// The size of each of the two slots.
const SLOT_BYTES: usize = 1 << 20;
/// The number of bytes of entries that one change may append; the rest of a slot is for their encoding.
pub const APPEND_BYTES_MAX: usize = SLOT_BYTES / 2;

/// Why a change cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The thread that writes cannot be started.
    #[error("cannot start the thread that writes the journal")]
    Thread(#[source] io::Error),
    /// The file cannot be written.
    #[error("cannot write the journal: {0}")]
    Write(#[source] io::Error),
    /// The thread has ended.
    #[error("the thread that writes the journal has ended")]
    Ended,
    /// A change is larger than a slot.
    #[error("a change of {0} bytes is too large for the journal")]
    TooLarge(usize),
    /// A change cannot be encoded.
    #[error("cannot encode a change for the journal")]
    Encode(#[source] postcard::Error),
}

/// A change of the log's database, which is made as a whole or not at all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskChange {
    /// Changes nothing.
    Nothing,
    /// Names the owner of the data, and gives the data its id.
    Identify {
        /// The owner.
        owner: String,
        /// The id.
        data: u128,
    },
    /// Appends encoded entries, with their indexes.
    Append(Vec<(u64, Vec<u8>)>),
    /// Removes the entries from this index on.
    Truncate(u64),
    /// Removes the entries up to and including an index, and stores `purged` as the value of that name.
    Purge {
        /// The index.
        upto: u64,
        /// The value.
        purged: Vec<u8>,
    },
    /// Stores a value under a name.
    Put {
        /// The name.
        name: String,
        /// The value.
        value: Vec<u8>,
    },
    /// Stores or forgets what is known of a member's data.
    Known {
        /// The member.
        id: NodeId,
        /// How far its data has come.
        mark: Option<DataMark>,
    },
}

/// The journal, and the thread that writes it while redb commits the same change.
pub struct Journal {
    queue: Option<mpsc::Sender<(u64, Vec<u8>)>>,
    written: mpsc::Receiver<io::Result<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Journal {
    /// Starts the thread, which ends when the journal is dropped.
    pub fn new(file: Arc<dyn StorageBackend>) -> Result<Self, JournalError> {
        let (queue, slots) = mpsc::channel::<(u64, Vec<u8>)>();
        let (tell, written) = mpsc::channel();
        let write = move || {
            for (number, slot) in slots {
                let done = file.write(offset(number), &slot).and_then(|()| file.sync_data());
                if tell.send(done).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("journal".into()).spawn(write);
        Ok(Self { queue: Some(queue), written, thread: Some(thread.map_err(JournalError::Thread)?) })
    }

    /// Writes a change, and waits until it is on the disk.
    pub fn write(&self, number: u64, change: &DiskChange) -> Result<(), JournalError> {
        self.begin(number, change)?;
        self.finish()
    }

    /// Begins to write a change; [`Journal::finish`] must be called next.
    pub fn begin(&self, number: u64, change: &DiskChange) -> Result<(), JournalError> {
        let slot = encode_slot(number, change)?;
        let queue = self.queue.as_ref().ok_or(JournalError::Ended)?;
        queue.send((number, slot)).map_err(|_| JournalError::Ended)
    }

    /// Waits until the change is on the disk.
    pub fn finish(&self) -> Result<(), JournalError> {
        let written = self.written.recv().map_err(|_| JournalError::Ended)?;
        written.map_err(JournalError::Write)
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        self.queue.take();
        // An error means that the thread has panicked; nothing is left to do.
        self.thread.take().map(JoinHandle::join);
    }
}

fn offset(number: u64) -> u64 {
    number % 2 * SLOT_BYTES as u64
}

fn encode_slot(number: u64, change: &DiskChange) -> Result<Vec<u8>, JournalError> {
    let encoded = postcard::to_extend(change, vec![0; HEAD_BYTES]);
    let mut slot = encoded.map_err(JournalError::Encode)?;
    if slot.len() > SLOT_BYTES {
        return Err(JournalError::TooLarge(slot.len()));
    }
    let length = (slot.len() - HEAD_BYTES) as u32;
    slot[..4].copy_from_slice(&MAGIC);
    slot[4..8].copy_from_slice(&length.to_le_bytes());
    slot[8..16].copy_from_slice(&number.to_le_bytes());
    let sum = checksum(&slot);
    slot[16..HEAD_BYTES].copy_from_slice(&sum.to_le_bytes());
    Ok(slot)
}

fn checksum(slot: &[u8]) -> u64 {
    let mut sum = XxHash3_64::new();
    sum.write(&slot[..16]);
    sum.write(&slot[HEAD_BYTES..]);
    sum.finish()
}

/// Reads the newest change and its number, and makes room for both slots in a new file.
///
/// # Errors
/// The file cannot be read or written. A slot that is not valid is no error.
pub fn newest(file: &dyn StorageBackend) -> io::Result<Option<(u64, DiskChange)>> {
    let room = 2 * SLOT_BYTES as u64;
    if file.len()? < room {
        file.set_len(room)?;
    }
    let (even, odd) = (read_slot(file, 0)?, read_slot(file, 1)?);
    Ok(even.into_iter().chain(odd).max_by_key(|(number, _)| *number))
}

/// Reads the slot of even or odd numbers; `None` if it is not valid.
fn read_slot(file: &dyn StorageBackend, parity: u64) -> io::Result<Option<(u64, DiskChange)>> {
    let mut slot = vec![0; HEAD_BYTES];
    file.read(offset(parity), &mut slot)?;
    let length = slot[4..8].iter().rev().fold(0, |all, byte| all << 8 | usize::from(*byte));
    if slot[..4] != MAGIC || length > SLOT_BYTES - HEAD_BYTES {
        return Ok(None);
    }
    slot.resize(HEAD_BYTES + length, 0);
    file.read(offset(parity) + HEAD_BYTES as u64, &mut slot[HEAD_BYTES..])?;
    let u64_at = |at: usize| slot[at..at + 8].iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte));
    let number = u64_at(8);
    if u64_at(16) != checksum(&slot) || number % 2 != parity {
        return Ok(None);
    }
    Ok(postcard::from_bytes(&slot[HEAD_BYTES..]).ok().map(|change| (number, change)))
}
