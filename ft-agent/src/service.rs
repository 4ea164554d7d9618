//! Threads that serve a replica as long as its process lives. One that panics is reported and started again: neither the
//! guest nor its protection may depend on that an operator notices a thread that is gone.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use tracing::error;

use crate::error::Error;

/// How often each of this process's service threads has failed.
static FAILURES: Mutex<BTreeMap<&str, u64>> = Mutex::new(BTreeMap::new());

/// Pause before a thread that has failed goes on; it doubles with each failure, up to [`PAUSE_MAX`].
const PAUSE: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// How often service threads have failed and were started again, by their names.
pub fn failures() -> BTreeMap<String, u64> {
    let failures = FAILURES.lock().unwrap_or_else(PoisonError::into_inner);
    failures.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
}

/// Starts a service thread. If `work` panics it is begun again; when it returns, the thread ends.
///
/// # Errors
/// The thread cannot be started.
pub fn start(name: &'static str, work: impl Fn() + Send + 'static) -> Result<(), Error> {
    let run = move || {
        let mut pause = PAUSE;
        while catch_unwind(AssertUnwindSafe(&work)).is_err() {
            *FAILURES.lock().unwrap_or_else(PoisonError::into_inner).entry(name).or_default() += 1;
            error!("thread {name:?} has failed, and is started again; please report this");
            std::thread::sleep(pause);
            pause = (pause * 2).min(PAUSE_MAX);
        }
    };
    let thread = std::thread::Builder::new().name(name.into()).spawn(run);
    thread.map(drop).map_err(Error::host(format!("cannot start thread {name:?}")))
}

/// Starts a thread without which the guest cannot go on. If this host has no threads left, it is tried again until it
/// has.
pub fn start_at_last<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> JoinHandle<T> {
    let work = std::sync::Arc::new(Mutex::new(Some(work)));
    let mut tries = 0_u64;
    loop {
        let work = work.clone();
        let run = move || {
            let work = work.lock().unwrap_or_else(PoisonError::into_inner).take();
            // It is still there: only one of the threads that were to do it has started.
            work.unwrap_or_else(|| unreachable!("the work is done once"))()
        };
        match std::thread::Builder::new().name(name.into()).spawn(run) {
            Ok(thread) => return thread,
            Err(e) => {
                if tries.is_multiple_of(100) {
                    error!("cannot start thread {name:?} yet, and try again: {e}");
                }
                tries += 1;
                std::thread::sleep(PAUSE);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn a_service_that_panics_is_counted_and_started_again() {
        let (sender, served) = channel();
        let begun = std::sync::atomic::AtomicU64::new(0);
        let work = move || {
            let n = begun.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            assert!(n > 1, "it fails twice");
            sender.send(n).unwrap();
        };
        start("fragile", work).unwrap();
        assert_eq!(served.recv_timeout(Duration::from_secs(10)), Ok(2));
        assert_eq!(failures().get("fragile"), Some(&2));
    }

    #[test]
    fn work_is_done_once_its_thread_starts() {
        let (sender, done) = channel();
        let thread = start_at_last("late", move || sender.send(7).unwrap());
        assert_eq!(done.recv_timeout(Duration::from_secs(10)), Ok(7));
        thread.join().unwrap();
    }
}
