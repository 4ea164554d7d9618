//! A log in a file.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use entry::Position;
use entry::block::{Decoder, Encoder};
use entry::identity::Identity;
use entry::log::Record;
use nix::time::{ClockId, clock_gettime};
use vmm::record::Log;
use vmm::replay::Records;

use crate::error::Error;

/// A block is closed when it has this many bytes, or at the first look after [`OPEN_MAX`].
const BLOCK_BYTES: usize = 64 << 10;
/// How long a record may wait in an open block: what a crash of the recorder can cost at most.
const OPEN_MAX: Duration = Duration::from_secs(1);

/// Writes a log.
pub struct LogWriter {
    encoder: Encoder,
    file: File,
    path: PathBuf,
    /// On [`now`]'s clock.
    closed: Duration,
}

impl LogWriter {
    /// Makes the file and writes the header.
    ///
    /// # Errors
    /// The file exists already, or cannot be written.
    pub fn create(path: &Path, identity: &Identity) -> Result<LogWriter, Error> {
        let created = File::options().write(true).create_new(true).open(path);
        let file = created.map_err(|e| Error::config("log", format!("{}: {e}", path.display())))?;
        let encoder = Encoder::new(identity);
        let mut writer = LogWriter { encoder, file, path: path.into(), closed: now() };
        writer.close_block()?;
        Ok(writer)
    }

    /// Writes what is left and makes the log durable.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn finish(&mut self) -> Result<(), Error> {
        self.close_block()?;
        self.file.sync_all().map_err(Error::host(self.name()))
    }

    fn close_block(&mut self) -> Result<(), Error> {
        self.encoder.close_block();
        self.closed = now();
        let bytes = self.encoder.take();
        self.file.write_all(&bytes).map_err(Error::host(self.name()))?;
        self.encoder.reuse(bytes);
        Ok(())
    }

    fn name(&self) -> String {
        format!("log {}", self.path.display())
    }
}

impl Log for LogWriter {
    type Error = Error;

    fn append(&mut self, record: &Record) -> Result<(), Error> {
        self.encoder.append(record);
        if self.encoder.open_bytes() >= BLOCK_BYTES { self.close_block() } else { Ok(()) }
    }

    fn look(&mut self, _at: Position) -> Result<(), Error> {
        let waits = self.encoder.open_bytes() > 0;
        if waits && now().saturating_sub(self.closed) >= OPEN_MAX { self.close_block() } else { Ok(()) }
    }
}

/// The time, to a few ms: it is asked for at every turn of the guest's loop.
fn now() -> Duration {
    let clock = ClockId::CLOCK_MONOTONIC_COARSE;
    clock_gettime(clock).unwrap_or_else(|e| unreachable!("CLOCK_MONOTONIC_COARSE: {e}")).into()
}

/// Reads a log.
pub struct LogReader {
    decoder: Decoder,
    file: File,
    path: PathBuf,
    block: std::vec::IntoIter<Record>,
    bytes: u64,
    buffer: Vec<u8>,
}

impl LogReader {
    /// Opens a log; its identity.
    ///
    /// # Errors
    /// The file cannot be read or has no header.
    pub fn open(path: &Path) -> Result<(LogReader, Identity), Error> {
        let unusable = |e: &dyn std::fmt::Display| Error::config("log", format!("{}: {e}", path.display()));
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
                return Err(unusable(&"the header is cut off: nothing was recorded"));
            }
        }
    }

    /// Size of the file, bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Offset behind the last whole block read.
    pub fn offset(&self) -> u64 {
        self.decoder.offset()
    }

    /// Bytes behind the last whole block, once the end was reached: what a crash has cut off.
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
            match self.decoder.block().map_err(|e| Error::config("log", format!("{path}: {e}")))? {
                Some(records) => self.block = records.into_iter(),
                None if !self.fill().map_err(Error::host(path))? => return Ok(None),
                None => {}
            }
        }
    }
}
