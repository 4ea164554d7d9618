//! The guest's serial console: on standard input and output, and for readers that are never waited for.

use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use entry::Console;
use vmm::inbox::{Closed, InboxSender};

use super::terminal::TypedKeys;
use crate::error::Error;
use crate::report;

/// Ctrl-A, as in QEMU: the next key is a command to vmft.
const ESCAPE: u8 = 1;

/// Prints what the guest prints, watches for a text in it, and shows progress until the guest prints something.
pub struct Printer {
    until: Option<Vec<u8>>,
    /// The last bytes that were printed, one byte fewer than the text has.
    tail: Vec<u8>,
    satisfied: bool,
    /// How many bytes were printed.
    printed: u64,
    progress: Option<Instant>,
}

/// Time between two updates of the progress line.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);

impl Printer {
    /// A printer that is satisfied once the guest has printed `until`.
    pub fn new(until: Option<String>) -> Printer {
        Printer {
            until: until.map(String::into_bytes),
            tail: Vec::new(),
            satisfied: false,
            printed: 0,
            progress: io::stderr().is_terminal().then(Instant::now),
        }
    }

    /// Whether the guest has printed the text.
    pub fn is_satisfied(&self) -> bool {
        self.satisfied
    }

    /// How many bytes the guest has printed.
    pub fn printed(&self) -> u64 {
        self.printed
    }

    /// Prints console output.
    ///
    /// # Errors
    /// Standard output cannot be written to.
    pub fn print(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.clear_progress();
        report::stdout().write_all(bytes).map_err(Error::host("cannot write to standard output"))?;
        self.printed += bytes.len() as u64;
        if let Some(until) = &self.until {
            self.tail.extend_from_slice(bytes);
            self.satisfied |= self.tail.windows(until.len().max(1)).any(|w| w == until);
            let keep = until.len().saturating_sub(1).min(self.tail.len());
            self.tail.drain(..self.tail.len() - keep);
        }
        Ok(())
    }

    /// Shows the boot's progress from time to time, until the guest prints something.
    pub fn show_progress(&mut self, instructions: u64) {
        if let Some(last) = &mut self.progress
            && last.elapsed() >= PROGRESS_INTERVAL
        {
            *last = Instant::now();
            host_log::write_to_stderr(&format!("\rbooting: {} M instructions", instructions / 1_000_000));
        }
    }

    fn clear_progress(&mut self) {
        if self.progress.take().is_some() {
            host_log::write_to_stderr("\r\x1b[K");
        }
    }
}

/// How many pieces of console output may wait for a reader; a slower reader misses pieces.
const BACKLOG: usize = 1024;

/// All readers of the guest's console.
#[derive(Default)]
pub struct Readers {
    readers: Vec<SyncSender<Arc<[u8]>>>,
}

impl Readers {
    /// Adds a reader, and forgets those that are gone.
    pub fn add(&mut self) -> Receiver<Arc<[u8]>> {
        self.print(&[]);
        let (sender, reader) = sync_channel(BACKLOG);
        self.readers.push(sender);
        reader
    }

    /// Sends console output to all readers. Never waits.
    pub fn print(&mut self, bytes: &[u8]) {
        let bytes: Arc<[u8]> = bytes.into();
        self.readers
            .retain(|reader| !matches!(reader.try_send(bytes.clone()), Err(TrySendError::Disconnected(_))));
    }
}

/// Passes standard input to the guest's console until its end, or until `Ctrl-A x`.
pub fn pass_keys(mut keys: TypedKeys, sender: &InboxSender) {
    let mut filter = KeyFilter::default();
    let mut buffer = [0; 256];
    while let Ok(n @ 1..) = keys.read(&mut buffer) {
        let (typed, quit) = filter.filter(&buffer[..n]);
        if sender.type_text(Console::Serial, &typed) == Err(Closed) {
            return;
        }
        if quit {
            return sender.stop();
        }
    }
}

/// Filters keys on their way to the guest: takes out the escape key and the commands to vmft.
#[derive(Default)]
pub struct KeyFilter {
    escaped: bool,
}

impl KeyFilter {
    /// The keys that go to the guest, and whether the user wants to quit.
    pub fn filter(&mut self, keys: &[u8]) -> (Vec<u8>, bool) {
        let mut typed = Vec::new();
        for &key in keys {
            match (std::mem::replace(&mut self.escaped, false), key) {
                (true, b'x' | b'X') => return (typed, true),
                (false, ESCAPE) => self.escaped = true,
                // Ctrl-A twice passes one Ctrl-A to the guest.
                (_, key) => typed.push(key),
            }
        }
        (typed, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_escape_key_ends_vmft_and_is_typed_by_pressing_it_twice() {
        let mut keys = KeyFilter::default();
        assert_eq!(keys.filter(b"ab\x01"), (b"ab".to_vec(), false));
        assert_eq!(keys.filter(b"\x01c"), (b"\x01c".to_vec(), false));
        assert_eq!(keys.filter(b"d\x01xe"), (b"d".to_vec(), true));
    }

    #[test]
    fn a_text_is_found_across_pieces() {
        let mut p = Printer { progress: None, ..Printer::new(Some("READY".into())) };
        p.print(b"REA").unwrap();
        assert!(!p.is_satisfied());
        p.print(b"DY").unwrap();
        assert!(p.is_satisfied());
    }
}
