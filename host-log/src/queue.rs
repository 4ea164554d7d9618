//! Lines that wait for a thread that writes them, so that nobody else waits for whoever reads them.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How many lines may wait.
pub const LINES_MAX: usize = 4096;

/// A bounded queue of lines. Clones are the same queue.
#[derive(Clone, Debug)]
pub struct LineQueue {
    lines: SyncSender<QueuedLine>,
    counts: Arc<LineCounts>,
}

/// The other end of a queue, for the thread that writes.
#[derive(Debug)]
pub struct QueuedLines {
    lines: Receiver<QueuedLine>,
    counts: Arc<LineCounts>,
}

#[derive(Debug)]
struct QueuedLine {
    text: String,
    /// How many lines had been left out before it because the queue was full.
    left_out: u64,
}

#[derive(Debug, Default)]
struct LineCounts {
    queued: AtomicU64,
    /// Lines that are not in the output: the queue was full, or they could not be written.
    missing: AtomicU64,
    /// How many of them did not fit into the queue.
    left_out: AtomicU64,
    /// How many of the queued lines were written, or could not be.
    handled: Mutex<u64>,
    progress: Condvar,
}

impl LineCounts {
    fn handled(&self) -> MutexGuard<'_, u64> {
        self.handled.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LineQueue {
    /// A queue, and its other end.
    pub fn new() -> (LineQueue, QueuedLines) {
        let (sender, receiver) = sync_channel(LINES_MAX);
        let counts = Arc::new(LineCounts::default());
        (LineQueue { lines: sender, counts: counts.clone() }, QueuedLines { lines: receiver, counts })
    }

    /// Adds a line, which has no line feed at its end, or leaves it out and counts it. Never waits.
    pub fn push(&self, text: String) {
        let left_out = self.counts.left_out.load(Relaxed);
        match self.lines.try_send(QueuedLine { text, left_out }) {
            Ok(()) => self.counts.queued.fetch_add(1, Relaxed),
            Err(_) => {
                self.counts.left_out.fetch_add(1, Relaxed);
                self.counts.missing.fetch_add(1, Relaxed)
            }
        };
    }

    /// How many lines are missing in the output since the start.
    pub fn missing(&self) -> u64 {
        self.counts.missing.load(Relaxed)
    }

    /// Waits until all lines that are in the queue now are written, but not longer than `limit`.
    pub fn flush(&self, limit: Duration) {
        let queued = self.counts.queued.load(Relaxed);
        let handled = self.counts.handled();
        // What is left after the limit is lost with the process.
        drop(self.counts.progress.wait_timeout_while(handled, limit, |handled| *handled < queued));
    }
}

impl QueuedLines {
    /// Writes the lines until the last [`LineQueue`] is gone. A line that cannot be written is dropped. When lines can be
    /// written again, the line that `note` makes of the number of missing ones is in their place.
    pub fn write_to(self, out: impl Write, note: impl Fn(u64) -> String) {
        let mut output =
            LineOutput { out, note, torn: false, unwritten: 0, told: 0, counts: self.counts.clone() };
        loop {
            let line = match self.lines.try_recv() {
                Ok(line) => line,
                Err(TryRecvError::Empty) => {
                    output.tell_missing(self.counts.left_out.load(Relaxed));
                    let Ok(line) = self.lines.recv() else { return };
                    line
                }
                Err(TryRecvError::Disconnected) => {
                    output.tell_missing(self.counts.left_out.load(Relaxed));
                    return;
                }
            };
            output.line(&line);
            *self.counts.handled() += 1;
            self.counts.progress.notify_all();
        }
    }

    /// Does [`QueuedLines::write_to`] on a thread of its own.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn write_on_thread(
        self,
        name: &str,
        out: impl Write + Send + 'static,
        note: impl Fn(u64) -> String + Send + 'static,
    ) -> io::Result<()> {
        std::thread::Builder::new().name(name.into()).spawn(move || self.write_to(out, note)).map(drop)
    }
}

struct LineOutput<W, N> {
    out: W,
    note: N,
    /// The last line was written in part.
    torn: bool,
    /// Lines that could not be written, and of which nothing was told yet.
    unwritten: u64,
    /// How many lines that were left out have been told of.
    told: u64,
    counts: Arc<LineCounts>,
}

impl<W: Write, N: Fn(u64) -> String> LineOutput<W, N> {
    fn line(&mut self, line: &QueuedLine) {
        if !self.tell_missing(line.left_out) || self.write(&line.text).is_err() {
            self.unwritten += 1;
            self.counts.missing.fetch_add(1, Relaxed);
        }
    }

    /// Writes how many lines are missing here, if there are any: those that could not be written, and those that were left out
    /// up to this count. Returns whether lines can be written.
    fn tell_missing(&mut self, left_out: u64) -> bool {
        // A line may have been pushed before one that was left out earlier.
        let missing = self.unwritten + left_out.saturating_sub(self.told);
        if missing == 0 {
            return true;
        }
        let written = self.write(&(self.note)(missing)).is_ok();
        if written {
            (self.unwritten, self.told) = (0, self.told.max(left_out));
        }
        written
    }

    fn write(&mut self, line: &str) -> io::Result<()> {
        let text = format!("{}{line}\n", if self.torn { "\n" } else { "" });
        let mut rest = text.as_bytes();
        while !rest.is_empty() {
            let written = self.out.write(rest).and_then(|n| match n {
                0 => Err(io::ErrorKind::WriteZero.into()),
                n => Ok(n),
            });
            match written {
                Ok(n) => rest = &rest[n..],
                Err(e) => {
                    self.torn |= rest.len() < text.len();
                    return Err(e);
                }
            }
        }
        self.torn = false;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};

    use super::*;

    /// Does with each write what it is told to.
    struct Told {
        next: Receiver<Result<usize, io::ErrorKind>>,
        out: Sender<String>,
    }

    impl Write for Told {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let n = self.next.recv().unwrap_or(Ok(usize::MAX))?.min(bytes.len());
            self.out.send(String::from_utf8_lossy(&bytes[..n]).into_owned()).ok();
            Ok(n)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    type Answers = Sender<Result<usize, io::ErrorKind>>;

    fn queue() -> (LineQueue, Answers, Receiver<String>) {
        let ((answers, next), (out, written)) = (channel(), channel());
        let (queue, lines) = LineQueue::new();
        lines.write_on_thread("test", Told { next, out }, |n| format!("{n} missing")).unwrap();
        (queue, answers, written)
    }

    #[test]
    fn a_reader_that_is_stuck_delays_nobody_and_is_told_what_is_missing() {
        let (queue, answers, written) = queue();
        (0..3 * LINES_MAX).for_each(|n| queue.push(format!("line {n}")));
        queue.flush(Duration::from_millis(1));
        let missing = queue.missing();
        // One line is with the writer, or none.
        let expected = (2 * LINES_MAX - 1) as u64..=2 * LINES_MAX as u64;
        assert!(expected.contains(&missing), "{missing}");
        drop(answers);
        queue.flush(Duration::from_secs(10));
        queue.push("later".into());
        drop(queue);
        let text: Vec<_> = written.iter().collect();
        // The writer may have taken a line in the middle: then lines are missing at two places.
        let told = |line: &String| line.strip_suffix(" missing\n")?.parse::<u64>().ok();
        let notes: Vec<_> = text.iter().filter_map(told).collect();
        assert_eq!(notes.iter().sum::<u64>(), missing);
        assert_eq!((text.len() - notes.len()) as u64, 3 * LINES_MAX as u64 - missing + 1);
        assert!(told(&text[text.len() - 2]).is_some() && text[text.len() - 1] == "later\n", "{notes:?}");
    }

    #[test]
    fn lines_that_cannot_be_written_are_counted_and_told_in_their_place() {
        let (queue, answers, written) = queue();
        let full = io::ErrorKind::StorageFull;
        // The second line in part, nothing of the third, and of the note for the fourth; then all.
        for answer in [Ok(99), Ok(2), Err(full), Err(full), Err(full), Ok(99)] {
            answers.send(answer).unwrap();
        }
        for line in ["first", "second", "third", "fourth", "fifth"] {
            queue.push(line.into());
            if line != "fourth" {
                queue.flush(Duration::from_millis(20));
            }
        }
        drop(answers);
        queue.flush(Duration::from_secs(10));
        let missing = queue.missing();
        drop(queue);
        let text: String = written.iter().collect();
        assert!(text.starts_with(&format!("first\nse\n{missing} missing\n")), "{text}");
        assert!((1..=3).contains(&missing) && text.ends_with("fifth\n"), "{text}");
    }
}
