//! Places where a test makes a replica fail, at a moment of its choice: `VMFT_FAILPOINT=NAME:FILE` arms one, and making FILE
//! sets it off; the file goes when that has happened. Debug builds only.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use nix::sys::signal::{Signal, raise};

static ARMED: LazyLock<Option<(String, PathBuf)>> = LazyLock::new(|| {
    let armed = std::env::var("VMFT_FAILPOINT").ok()?;
    armed.split_once(':').map(|(name, file)| (name.to_owned(), file.into()))
});

/// The file that sets the one off that is armed.
pub fn file() -> Option<&'static Path> {
    ARMED.as_ref().filter(|_| cfg!(debug_assertions)).map(|(_, file)| file.as_path())
}

/// Whether the test wants a failure here and now.
pub fn reached(name: &str) -> bool {
    let wanted =
        || ARMED.as_ref().is_some_and(|(armed, file)| armed == name && std::fs::remove_file(file).is_ok());
    cfg!(debug_assertions) && wanted()
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
