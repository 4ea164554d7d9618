//! Places where a test makes a replica fail, at a moment of its choice: `VMFT_FAILPOINT=NAME:FILE` arms one, and making FILE
//! sets it off; the file goes when that has happened. Debug builds only.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use nix::sys::signal::{Signal, raise};

static ARMED: LazyLock<Option<(String, PathBuf)>> = LazyLock::new(|| {
    let armed = std::env::var("VMFT_FAILPOINT").ok().filter(|_| cfg!(debug_assertions))?;
    armed.split_once(':').map(|(name, file)| (name.to_owned(), file.into()))
});

/// The file is not there; it is; its failpoint was reached, and it has to go. The thread that fails may not see files itself.
static STATE: AtomicU8 = AtomicU8::new(IDLE);
const IDLE: u8 = 0;
const WANTED: u8 = 1;
const REACHED: u8 = 2;

const LOOK: Duration = Duration::from_millis(1);

/// The file that sets the one off that is armed.
pub fn file() -> Option<&'static Path> {
    ARMED.as_ref().map(|(_, file)| file.as_path())
}

/// Looks for the file from now on, if a failpoint is armed.
pub fn watch() {
    let Some(file) = file() else { return };
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(LOOK);
            match STATE.load(Ordering::Acquire) {
                IDLE if file.exists() => STATE.store(WANTED, Ordering::Release),
                REACHED if std::fs::remove_file(file).is_ok() => STATE.store(IDLE, Ordering::Release),
                _ => {}
            }
        }
    });
}

/// Whether the test wants a failure here and now.
pub fn reached(name: &str) -> bool {
    let Some((armed, _)) = &*ARMED else { return false };
    let taken = || STATE.compare_exchange(WANTED, REACHED, Ordering::AcqRel, Ordering::Relaxed).is_ok();
    if armed != name || !taken() {
        return false;
    }
    while STATE.load(Ordering::Acquire) == REACHED {
        std::thread::sleep(LOOK);
    }
    true
}

/// The whole process is stopped here.
pub fn stop(name: &str) {
    if reached(name) {
        raise(Signal::SIGSTOP).unwrap_or_else(|e| unreachable!("SIGSTOP for oneself: {e}"));
    }
}

/// This thread goes no further.
pub fn wedge(name: &str) {
    if reached(name) {
        loop {
            std::thread::park();
        }
    }
}
