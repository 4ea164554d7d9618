//! The serial console on standard input and output.

use std::io::{self, IsTerminal, Read, Write};
use std::time::{Duration, Instant};

use entry::Console;
use vmm::inbox::{Closed, InboxSender};

use crate::error::Error;

/// Ctrl-A, as in QEMU: the next key is for vmft.
const ESCAPE: u8 = 1;

/// Prints what the guest prints, watches for a text, and tells of progress while there is nothing else to see.
pub struct Printer {
    until: Option<Vec<u8>>,
    /// The end of what was printed: as long as the text watched for, less one.
    tail: Vec<u8>,
    satisfied: bool,
    progress: Option<Instant>,
}

/// Time between two lines of progress.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);

impl Printer {
    /// A printer that is satisfied once `until` was printed.
    pub fn new(until: Option<String>) -> Printer {
        Printer {
            until: until.map(String::into_bytes),
            tail: Vec::new(),
            satisfied: false,
            progress: io::stderr().is_terminal().then(Instant::now),
        }
    }

    /// The text watched for was printed.
    pub fn is_satisfied(&self) -> bool {
        self.satisfied
    }

    /// Prints console output.
    ///
    /// # Errors
    /// Standard output is gone.
    pub fn print(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.clear_progress();
        let mut out = io::stdout().lock();
        out.write_all(bytes).and_then(|()| out.flush()).map_err(Error::host("standard output"))?;
        if let Some(until) = &self.until {
            self.tail.extend_from_slice(bytes);
            self.satisfied |= self.tail.windows(until.len().max(1)).any(|w| w == until);
            let keep = until.len().saturating_sub(1).min(self.tail.len());
            self.tail.drain(..self.tail.len() - keep);
        }
        Ok(())
    }

    /// Says how far the boot is, now and then, until the guest prints something.
    pub fn show_progress(&mut self, instructions: u64) {
        if let Some(last) = &mut self.progress
            && last.elapsed() >= PROGRESS_INTERVAL
        {
            *last = Instant::now();
            eprint!("\rbooting: {} M instructions", instructions / 1_000_000);
        }
    }

    fn clear_progress(&mut self) {
        if self.progress.take().is_some() {
            eprint!("\r\x1b[K");
        }
    }
}

/// Types what comes from standard input on the guest's console, until its end or `Ctrl-A x`.
pub fn read_keys(sender: InboxSender) {
    let mut keys = Keys::default();
    let mut buffer = [0; 256];
    let mut input = io::stdin();
    while let Ok(n @ 1..) = input.read(&mut buffer) {
        let (typed, quit) = keys.take(&buffer[..n]);
        if sender.type_text(Console::Serial, &typed) == Err(Closed) {
            return;
        }
        if quit {
            return sender.stop();
        }
    }
}

/// Keys on their way to the guest, with an escape for vmft itself.
#[derive(Default)]
pub struct Keys {
    escaped: bool,
}

impl Keys {
    /// What of these keys goes to the guest, and whether the user wants out.
    pub fn take(&mut self, keys: &[u8]) -> (Vec<u8>, bool) {
        let mut typed = Vec::new();
        for &key in keys {
            match (std::mem::replace(&mut self.escaped, false), key) {
                (true, b'x' | b'X') => return (typed, true),
                (false, ESCAPE) => self.escaped = true,
                // Ctrl-A twice types one.
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
        let mut keys = Keys::default();
        assert_eq!(keys.take(b"ab\x01"), (b"ab".to_vec(), false));
        assert_eq!(keys.take(b"\x01c"), (b"\x01c".to_vec(), false));
        assert_eq!(keys.take(b"d\x01xe"), (b"d".to_vec(), true));
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
