//! What `vmft` and `vmft-store` tell a host's operators, on standard error: warnings, changes of state, failures.
//!
//! A process that serves (a replica, a member of the store) must go on whatever happens to standard error: its reader may be
//! dead or stuck, its disk full. So messages go through a bounded queue to a thread that writes them. Lines that do not fit, or
//! cannot be written, are counted, and their number is told when lines can be written again. A command that a person runs to
//! its end writes its messages itself, as plain text; those that cannot be written are lost.
//!
//! ```text
//! info!(...) ──> EventLine ──> LineQueue ──> a thread ──> SharedOutput(standard error)
//!                         └──> a command's standard error
//! ```

pub mod descriptor;
mod format;
pub mod queue;

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::{self, ErrorKind, Write};
use std::panic::PanicHookInfo;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use serde::Deserialize;
use tracing_subscriber::EnvFilter;

use descriptor::SharedOutput;
use format::{EventLine, Who};
use queue::{LineQueue, QueuedLines};

/// How long the end of a process waits for its last lines.
const END_PATIENCE: Duration = Duration::from_millis(500);

/// What is logged by default. What openraft has to say, a member of the store says in its own words.
const FILTER: &str = "info,openraft=off,h2=warn,hyper=warn,tonic=warn,tower=warn";

/// What the log's lines are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Text for people
    #[default]
    Text,
    /// A JSON object a line
    Json,
}

/// The log of a process that serves.
struct ServiceLog {
    format: LogFormat,
    who: Who,
    queue: LineQueue,
    /// Until the thread that writes is started.
    lines: Mutex<Option<QueuedLines>>,
}

static SERVICE: OnceLock<ServiceLog> = OnceLock::new();

/// Sends this process's messages to standard error, as a command's: plain text, each written at once. `VMFT_LOG` filters them
/// (`info`, `vmft=debug`). Does nothing if it was called before.
pub fn init() {
    let filter = EnvFilter::try_from_env("VMFT_LOG").unwrap_or_else(|_| EnvFilter::new(FILTER));
    let subscriber = tracing_subscriber::fmt().with_ansi(false).log_internal_errors(false);
    let subscriber = subscriber.event_format(EventLine).with_writer(|| MessageWriter);
    // It fails if it was done before.
    subscriber.with_env_filter(filter).try_init().ok();
}

/// From now on messages are lines in this format that wait in the queue, each with the time, the level and `who` says it. They
/// are written when [`write_on_thread`] or [`flush`] is called. A thread's panic is a message, too.
pub fn serve(format: LogFormat, who: Who) {
    let (queue, lines) = LineQueue::new();
    // The first call has decided.
    SERVICE.set(ServiceLog { format, who, queue, lines: Mutex::new(Some(lines)) }).ok();
    std::panic::set_hook(Box::new(log_panic));
}

/// Starts the thread that writes, if this process serves. It has the confinement of the thread that calls this.
///
/// # Errors
/// The thread cannot be started; that is written at once, and the lines are missing.
pub fn write_on_thread() -> io::Result<()> {
    let Some(service) = SERVICE.get() else { return Ok(()) };
    let lines = service.lines.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some(lines) = lines else { return Ok(()) };
    let started = lines.write_on_thread("log", SharedOutput(io::stderr()), |missing| {
        let why = format!("{missing} lines are missing here: standard error did not take them");
        format::line(service.format, &service.who, &why)
    });
    started.inspect_err(|e| say!("cannot start the thread that writes the log: {e}"))
}

/// At the end of a process: writes the lines that wait, as far as standard error takes them within half a second.
pub fn flush() {
    let Some(service) = SERVICE.get() else { return };
    if write_on_thread().is_ok() {
        service.queue.flush(END_PATIENCE);
    }
}

/// How many lines of this process are missing in its log.
pub fn lines_missing() -> u64 {
    SERVICE.get().map_or(0, |service| service.queue.missing())
}

/// Writes a line to standard error, for a command that a person runs to its end: like `eprintln!`, but a standard error that is
/// closed or full ends nothing.
#[macro_export]
macro_rules! say {
    ($($message:tt)*) => { $crate::write_to_stderr(&format!("{}\n", format_args!($($message)*))) };
}

/// A text for standard error is lost, although somebody could have read it.
static TEXT_LOST: AtomicBool = AtomicBool::new(false);

/// Writes text to standard error as it is, or loses it.
pub fn write_to_stderr(text: &str) {
    if let Err(e) = SharedOutput(io::stderr()).write_all(text.as_bytes())
        && e.kind() != ErrorKind::BrokenPipe
    {
        TEXT_LOST.store(true, Ordering::Relaxed);
    }
}

/// Whether a command's text is lost because standard error is full or broken, and not because its reader has closed it.
pub fn is_text_lost() -> bool {
    TEXT_LOST.load(Ordering::Relaxed)
}

/// Takes each message as one write.
struct MessageWriter;

impl Write for MessageWriter {
    fn write(&mut self, message: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(message);
        match SERVICE.get() {
            Some(service) => service.queue.push(format::one_line(&text)),
            None => write_to_stderr(&format!("{}\n", text.trim_end())),
        }
        Ok(message.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn log_panic(panic: &PanicHookInfo<'_>) {
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("without a name");
    let backtrace = Backtrace::capture();
    match backtrace.status() {
        BacktraceStatus::Captured => tracing::error!("thread {name}: {panic}\n{backtrace}"),
        _ => tracing::error!("thread {name}: {panic}"),
    }
}
