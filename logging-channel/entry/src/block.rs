//! Header and blocks: FORMAT.md, "Header" and "Block".
//!
//! [`Encoder`] and [`Decoder`] are pure: bytes go in and out of buffers, and the owner of the file or socket
//! moves them. A decoder takes its bytes in pieces of any size and holds at most one block.

use crc32fast::Hasher;

use crate::codec::{ByteReader, DecodeError, DecodeFault, encode};
use crate::identity::{IDENTITY_MAX, Identity};
use crate::log::Record;
use crate::{Position, PositionUnit};

/// The first bytes of a log.
pub const MAGIC: [u8; 8] = *b"VMFTLOG\0";
/// Version of the format.
pub const VERSION: u16 = 3;
/// Most bytes of entries in a block.
pub const BLOCK_MAX: usize = 1 << 20;
/// A block is closed once it has this many bytes of entries: so far below [`BLOCK_MAX`] that
/// one more entry always fits.
const BLOCK_FULL: usize = BLOCK_MAX / 2;
/// Bytes of the header before the identity.
const HEADER_FIXED: usize = 14;
/// Bytes of a checksum.
const CHECKSUM: usize = 4;
/// Bytes of a block's length and its check byte.
const LENGTH: usize = 4;
/// Bytes of a block before its entries.
const BLOCK_HEAD: usize = LENGTH + CHECKSUM;
/// Keeps four zero bytes from being a valid length.
const LENGTH_CHECK: u8 = 0xa5;

/// Encodes a log.
#[derive(Debug)]
pub struct Encoder {
    unit: PositionUnit,
    last: Position,
    checksum: u32,
    /// The open block: empty, or `room` free bytes, space for its head, and the entries appended so far.
    open: Vec<u8>,
    /// Finished bytes that were not taken yet.
    done: Vec<u8>,
    /// Size of the last block, as an estimate of the next one's.
    expected: usize,
    /// Bytes left free before a block.
    room: usize,
}

impl Encoder {
    /// Begins the log of the machine with this identity. Its header is ready to be taken.
    pub fn new(identity: &Identity) -> Encoder {
        let identity_bytes = identity.encode();
        let mut done = Vec::with_capacity(HEADER_FIXED + identity_bytes.len() + CHECKSUM);
        done.extend(MAGIC);
        done.extend(VERSION.to_le_bytes());
        done.extend((identity_bytes.len() as u32).to_le_bytes());
        done.extend(identity_bytes);
        let checksum = crc32fast::hash(&done);
        done.extend(checksum.to_le_bytes());
        let (unit, last) = (identity.unit(), Position::default());
        Encoder { unit, last, checksum, open: Vec::new(), done, expected: 0, room: 0 }
    }

    /// Leaves `room` bytes free before the blocks that [`Encoder::take_bytes`] returns, so that the caller
    /// can put a prefix there.
    pub fn with_room(mut self, room: usize) -> Encoder {
        self.room = room;
        self
    }

    /// Appends a record to the open block.
    pub fn append(&mut self, record: &Record) {
        if self.open.is_empty() {
            self.open.reserve(self.expected);
            self.open.resize(self.room + BLOCK_HEAD, 0);
        }
        encode(self.unit, &mut self.last, record, &mut self.open);
        if self.open_bytes() >= BLOCK_FULL {
            self.close_block();
        }
    }

    /// Closes the open block, so that [`Encoder::take_bytes`] returns everything appended so far.
    pub fn close_block(&mut self) {
        if self.open.is_empty() {
            return;
        }
        self.expected = self.open.len();
        let (head, entries) = self.open[self.room..].split_at_mut(BLOCK_HEAD);
        let length = length_field(entries.len());
        self.checksum = continue_checksum(self.checksum, &length, entries);
        head[..LENGTH].copy_from_slice(&length);
        head[LENGTH..].copy_from_slice(&self.checksum.to_le_bytes());
        if self.done.is_empty() {
            self.done = std::mem::take(&mut self.open);
        } else {
            self.done.extend(&self.open[self.room..]);
            self.open.clear();
        }
    }

    /// Bytes of entries in the open block.
    pub fn open_bytes(&self) -> usize {
        self.open.len().saturating_sub(self.room + BLOCK_HEAD)
    }

    /// Returns the bytes finished since the last call.
    pub fn take_bytes(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.done)
    }

    /// Takes back the memory that [`Encoder::take_bytes`] returned, so that the next block needs no new
    /// memory.
    pub fn reuse(&mut self, mut bytes: Vec<u8>) {
        if self.open.is_empty() {
            bytes.clear();
            self.open = bytes;
        }
    }
}

/// Decodes a log.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// The offset in the log of the buffer's first byte.
    base: u64,
    last: Position,
    checksum: u32,
    identity: Option<Identity>,
    failed: Option<DecodeError>,
}

impl Decoder {
    /// A decoder that expects the start of a log.
    pub fn new() -> Decoder {
        Decoder::default()
    }

    /// Takes more bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend(bytes);
    }

    /// The log's identity, once the header is complete.
    ///
    /// # Errors
    /// The header is damaged or has another version. Every later call fails with the same error.
    pub fn identity(&mut self) -> Result<Option<&Identity>, DecodeError> {
        if self.identity.is_none() {
            self.check_failed()?;
            let header = self.decode_header();
            self.identity = self.keep_failure(header)?;
        }
        Ok(self.identity.as_ref())
    }

    /// The records of the next block, once it is complete.
    ///
    /// # Errors
    /// The header or the block is damaged. Every later call fails with the same error.
    pub fn next_block(&mut self) -> Result<Option<Vec<Record>>, DecodeError> {
        let Some(unit) = self.identity()?.map(Identity::unit) else { return Ok(None) };
        self.check_failed()?;
        let block = self.decode_block(unit);
        self.keep_failure(block)
    }

    /// Bytes that do not form a whole block yet. At the end of a log these are the rest of a block that a
    /// crash has cut off.
    pub fn incomplete(&self) -> usize {
        self.buffer.len()
    }

    /// The offset in the log at which the last whole block ends.
    pub fn offset(&self) -> u64 {
        self.base
    }

    fn check_failed(&self) -> Result<(), DecodeError> {
        self.failed.clone().map_or(Ok(()), Err)
    }

    fn keep_failure<T>(&mut self, result: Result<T, DecodeError>) -> Result<T, DecodeError> {
        if let Err(e) = &result {
            self.failed = Some(e.clone());
        }
        result
    }

    fn decode_header(&mut self) -> Result<Option<Identity>, DecodeError> {
        let known = self.buffer.len().min(MAGIC.len());
        if self.buffer[..known] != MAGIC[..known] {
            return Err(DecodeError { offset: 0, fault: DecodeFault::Magic });
        }
        if self.buffer.len() < HEADER_FIXED {
            return Ok(None);
        }
        let mut r = ByteReader::new(&self.buffer, 0);
        r.take(MAGIC.len(), "header")?;
        let version = u16::from_le_bytes(r.array("header")?);
        if version != VERSION {
            return Err(DecodeError { offset: 8, fault: DecodeFault::Version(version) });
        }
        let len = u32::from_le_bytes(r.array("header")?) as usize;
        if len > IDENTITY_MAX {
            let (value, max) = (len as u64, IDENTITY_MAX as u64);
            let what = DecodeFault::Range { what: "identity", value, min: 0, max };
            return Err(DecodeError { offset: 10, fault: what });
        }
        let end = HEADER_FIXED + len;
        if self.buffer.len() < end + CHECKSUM {
            return Ok(None);
        }
        let bytes = r.take(len, "identity")?;
        self.checksum = crc32fast::hash(&self.buffer[..end]);
        if r.array("header checksum")? != self.checksum.to_le_bytes() {
            return Err(DecodeError { offset: 0, fault: DecodeFault::Checksum });
        }
        let identity = Identity::decode(bytes, HEADER_FIXED as u64)?;
        self.consume(end + CHECKSUM);
        Ok(Some(identity))
    }

    fn decode_block(&mut self, unit: PositionUnit) -> Result<Option<Vec<Record>>, DecodeError> {
        let mut r = ByteReader::new(&self.buffer, self.base);
        if self.buffer.len() < LENGTH {
            return Ok(None);
        }
        let length: [u8; LENGTH] = r.array("block")?;
        let len = block_length(length).map_err(|what| DecodeError { offset: self.base, fault: what })?;
        if self.buffer.len() < BLOCK_HEAD + len {
            return Ok(None);
        }
        let stored: [u8; CHECKSUM] = r.array("checksum")?;
        let start = r.offset();
        let entries = r.take(len, "block")?;
        let checksum = continue_checksum(self.checksum, &length, entries);
        if stored != checksum.to_le_bytes() {
            return Err(DecodeError { offset: self.base, fault: DecodeFault::Checksum });
        }
        let mut entries = ByteReader::new(entries, start);
        let mut last = self.last;
        let mut records = Vec::new();
        while !entries.is_done() {
            records.push(entries.record(unit, &mut last)?);
        }
        self.checksum = checksum;
        self.last = last;
        self.consume(BLOCK_HEAD + len);
        Ok(Some(records))
    }

    fn consume(&mut self, n: usize) {
        self.buffer.drain(..n);
        self.base += n as u64;
    }
}

/// The length with its check byte, which distinguishes a damaged length from that of an incomplete block.
fn length_field(len: usize) -> [u8; LENGTH] {
    let [a, b, c, _] = (len as u32).to_le_bytes();
    [a, b, c, a ^ b ^ c ^ LENGTH_CHECK]
}

fn block_length(field: [u8; LENGTH]) -> Result<usize, DecodeFault> {
    let [a, b, c, check] = field;
    if check != a ^ b ^ c ^ LENGTH_CHECK {
        return Err(DecodeFault::Checksum);
    }
    let (value, max) = (u32::from_le_bytes([a, b, c, 0]) as usize, BLOCK_MAX);
    if !(1..=max).contains(&value) {
        let (value, max) = (value as u64, max as u64);
        return Err(DecodeFault::Range { what: "block", value, min: 1, max });
    }
    Ok(value)
}

fn continue_checksum(before: u32, length: &[u8], entries: &[u8]) -> u32 {
    let mut h = Hasher::new_with_initial(before);
    h.update(length);
    h.update(entries);
    h.finalize()
}
