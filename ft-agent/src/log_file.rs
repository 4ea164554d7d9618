//! Writes a log to a file, and reads it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use entry::Position;
use entry::block::{Decoder, Encoder};
use entry::identity::Identity;
use entry::log::Record;
use nix::time::{ClockId, clock_gettime};
use vmm::record::RecordSink;
use vmm::replay::Records;

use crate::error::Error;
use crate::private_file;

/// A block is closed when it has this many bytes, or at the first check after [`OPEN_MAX`].
const BLOCK_BYTES: usize = 64 << 10;
/// How long a record may wait in an open block, and so the most that a crash of the recorder can lose.
const OPEN_MAX: Duration = Duration::from_secs(1);

/// Writes a log to a file.
pub struct LogWriter {
    encoder: Encoder,
    file: File,
    path: PathBuf,
    /// A block was not written completely.
    torn: bool,
    /// When the last block was closed, on the clock of [`now`].
    closed: Duration,
}

impl LogWriter {
    /// Creates the file and writes the header.
    ///
    /// # Errors
    /// The file exists already, or cannot be written.
    pub fn create(path: &Path, identity: &Identity) -> Result<LogWriter, Error> {
        let file = private_file::create_new(path).map_err(|e| {
            Error::config(
                "log",
                format!("cannot create log {}: {e}; give the name of a new file", path.display()),
            )
        })?;
        let encoder = Encoder::new(identity);
        let mut writer = LogWriter { encoder, file, path: path.into(), torn: false, closed: now() };
        writer.close_block()?;
        Ok(writer)
    }

    /// Writes the open block and syncs the file.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn finish(&mut self) -> Result<(), Error> {
        self.close_block()?;
        self.file.sync_all().map_err(Error::host(self.failed()))
    }

    fn close_block(&mut self) -> Result<(), Error> {
        self.encoder.close_block();
        self.closed = now();
        let bytes = self.encoder.take_bytes();
        if self.torn {
            let source = io::Error::other("an earlier write has failed");
            return Err(Error::Host { what: self.failed(), source });
        }
        // A block that is cut off must be the last one.
        self.torn = true;
        self.file.write_all(&bytes).map_err(Error::host(self.failed()))?;
        self.torn = false;
        self.encoder.reuse(bytes);
        Ok(())
    }

    fn failed(&self) -> String {
        format!("cannot write log {}", self.path.display())
    }
}

impl RecordSink for LogWriter {
    type Error = Error;

    fn append(&mut self, record: &Record) -> Result<(), Error> {
        self.encoder.append(record);
        if self.encoder.open_bytes() >= BLOCK_BYTES { self.close_block() } else { Ok(()) }
    }

    fn on_turn(&mut self, _at: Position) -> Result<(), Error> {
        let waits = self.encoder.open_bytes() > 0;
        if waits && now().saturating_sub(self.closed) >= OPEN_MAX { self.close_block() } else { Ok(()) }
    }
}

/// The time, with a resolution of a few ms: a precise clock would cost too much, as the guest's loop asks at every turn.
fn now() -> Duration {
    let clock = ClockId::CLOCK_MONOTONIC_COARSE;
    clock_gettime(clock).unwrap_or_else(|e| unreachable!("CLOCK_MONOTONIC_COARSE: {e}")).into()
}

/// Reads a log from a file.
pub struct LogReader {
    decoder: Decoder,
    file: File,
    path: PathBuf,
    block: std::vec::IntoIter<Record>,
    bytes: u64,
    buffer: Vec<u8>,
}

impl LogReader {
    /// Opens a log and returns it with its identity.
    ///
    /// # Errors
    /// The file cannot be read or has no header.
    pub fn open(path: &Path) -> Result<(LogReader, Identity), Error> {
        let unusable = |e: &dyn std::fmt::Display| {
            Error::config("log", format!("cannot read log {}: {e}", path.display()))
        };
        let file = File::open(path).map_err(|e| unusable(&e))?;
        let bytes = file.metadata().map_err(|e| unusable(&e))?.len();
        let decoder = Decoder::new();
        let mut reader = LogReader {
            decoder,
            file,
            path: path.into(),
            block: Vec::new().into_iter(),
            bytes,
            buffer: vec![0; 64 << 10],
        };
        loop {
            if let Some(identity) = reader.decoder.identity().map_err(|e| unusable(&e))? {
                let identity = identity.clone();
                return Ok((reader, identity));
            }
            if !reader.fill().map_err(|e| unusable(&e))? {
                return Err(unusable(&"its header is cut off, so that it has no records"));
            }
        }
    }

    /// Size of the file, bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Offset of the end of the last whole block that was read.
    pub fn offset(&self) -> u64 {
        self.decoder.offset()
    }

    /// Bytes after the last whole block, once the end of the file is reached: a block that a crash has cut off.
    pub fn cut_off(&self) -> usize {
        self.decoder.incomplete()
    }

    fn fill(&mut self) -> io::Result<bool> {
        let n = self.file.read(&mut self.buffer)?;
        self.decoder.push(&self.buffer[..n]);
        Ok(n > 0)
    }
}

impl Records for LogReader {
    type Error = Error;

    fn next(&mut self) -> Result<Option<Record>, Error> {
        loop {
            if let Some(record) = self.block.next() {
                return Ok(Some(record));
            }
            let path = self.path.display().to_string();
            match self
                .decoder
                .next_block()
                .map_err(|e| Error::config("log", format!("cannot read log {path}: {e}")))?
            {
                Some(records) => self.block = records.into_iter(),
                None if !self.fill().map_err(Error::host(format!("cannot read log {path}")))? => {
                    return Ok(None);
                }
                None => {}
            }
        }
    }
}
