//! What is looked at from outside while a guest is loaded: the pair's status and the processes' CPU time.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Error;

/// What the pair tells, of what is looked at here. Counts are since its start.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// `primary` or `backup`.
    pub role: String,
    /// `protected`, `alone`...
    pub phase: String,
    /// How far the backup is behind, ms.
    pub lag_ms: f64,
    /// Bytes of the channel.
    pub log_bytes: u64,
    /// Outputs that have left.
    pub outputs_released: u64,
    /// Where the time went.
    pub spent: Value,
}

/// Asks a replica on its control socket.
///
/// # Errors
/// Nobody answers there.
pub fn status(control: &Path) -> io::Result<Status> {
    let mut socket = UnixStream::connect(control)?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    socket.write_all(b"\"status\"\n")?;
    let mut line = String::new();
    BufReader::new(socket).read_line(&mut line)?;
    let mut reply: Value = serde_json::from_str(&line)?;
    Ok(serde_json::from_value(reply["status"].take())?)
}

/// CPU seconds that these processes have used.
///
/// # Errors
/// One of them is gone.
pub fn cpu_s(pids: &[u32]) -> Result<Vec<f64>, Error> {
    pids.iter().map(|pid| process_cpu_s(*pid)).collect()
}

/// The sum over the process's threads that run still; those of a guest run as long as it does.
fn process_cpu_s(pid: u32) -> Result<f64, Error> {
    let path = PathBuf::from(format!("/proc/{pid}/task"));
    let failed = |source| Error::File { path: path.clone(), source };
    let mut ns = 0;
    for task in path.read_dir().map_err(failed)? {
        let file = task.map_err(failed)?.path().join("schedstat");
        let text = match std::fs::read_to_string(&file) {
            // A thread may end meanwhile.
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            text => text.map_err(failed)?,
        };
        ns += text.split(' ').next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(ns as f64 / 1e9)
}

/// Samples of the lag while `f` runs, ms.
pub fn lags_during<T>(control: Option<&PathBuf>, f: impl FnOnce() -> T) -> (T, Vec<f64>) {
    let Some(control) = control else { return (f(), Vec::new()) };
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let sampler = scope.spawn(|| {
            let mut lags = Vec::new();
            while !done.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(25));
                lags.extend(status(control).map(|s| s.lag_ms));
            }
            lags
        });
        let result = f();
        done.store(true, Ordering::Relaxed);
        (result, sampler.join().unwrap_or_default())
    })
}
