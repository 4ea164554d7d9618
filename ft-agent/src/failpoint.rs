//! Failpoints: places in a replica at which a test makes it fail. `VMFT_FAILPOINT=NAME:FILE` arms the failpoint NAME;
//! creating FILE sets it off, and FILE is removed once the failure has happened. A release build has none of this code.

#[cfg(not(debug_assertions))]
pub use disabled::{delay, file, flip_ram_bit, panic, stop, watch, wedge};
#[cfg(debug_assertions)]
pub use enabled::{delay, file, flip_ram_bit, panic, stop, watch, wedge};

#[cfg(debug_assertions)]
mod enabled {
    use std::path::{Path, PathBuf};
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU8, Ordering};
    use std::time::Duration;

    use nix::sys::signal::{Signal, raise};
    use vmm::Machine;

    static ARMED: LazyLock<Option<(String, PathBuf)>> = LazyLock::new(|| {
        let armed = std::env::var("VMFT_FAILPOINT").ok()?;
        armed.split_once(':').map(|(name, file)| (name.to_owned(), file.into()))
    });

    /// State shared by the watching thread and the failing thread, because the failing thread may be confined and unable to
    /// use files.
    static STATE: AtomicU8 = AtomicU8::new(IDLE);
    /// The file does not exist.
    const IDLE: u8 = 0;
    /// The file exists, and the failpoint has not been reached yet.
    const WANTED: u8 = 1;
    /// The failpoint has been reached, and the file has to be removed.
    const REACHED: u8 = 2;

    const POLL_INTERVAL: Duration = Duration::from_millis(1);

    /// The file that sets off the armed failpoint, if one is armed.
    pub fn file() -> Option<&'static Path> {
        ARMED.as_ref().map(|(_, file)| file.as_path())
    }

    /// Starts the thread that watches for the file, if a failpoint is armed.
    pub fn watch() {
        let Some(file) = file() else { return };
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(POLL_INTERVAL);
                match STATE.load(Ordering::Acquire) {
                    IDLE if file.exists() => STATE.store(WANTED, Ordering::Release),
                    REACHED if std::fs::remove_file(file).is_ok() => STATE.store(IDLE, Ordering::Release),
                    _ => {}
                }
            }
        });
    }

    /// Whether the test wants the failure `name` here and now.
    fn reached(name: &str) -> bool {
        let Some((armed, _)) = &*ARMED else { return false };
        let claim = || STATE.compare_exchange(WANTED, REACHED, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        if armed != name || !claim() {
            return false;
        }
        while STATE.load(Ordering::Acquire) == REACHED {
            std::thread::sleep(POLL_INTERVAL);
        }
        true
    }

    /// Failpoint `name`: stops the whole process with SIGSTOP.
    pub fn stop(name: &str) {
        if reached(name) {
            raise(Signal::SIGSTOP).unwrap_or_else(|e| unreachable!("SIGSTOP to this process: {e}"));
        }
    }

    /// Failpoint `name`: holds this thread up for a second.
    pub fn delay(name: &str) {
        if reached(name) {
            std::thread::sleep(Duration::from_secs(1));
        }
    }

    /// Failpoint `name`: blocks this thread forever.
    pub fn wedge(name: &str) {
        if reached(name) {
            loop {
                std::thread::park();
            }
        }
    }

    /// Failpoint `panic-NAME`: makes this thread panic.
    pub fn panic(name: &str) {
        let wanted = ARMED.as_ref().is_some_and(|(armed, _)| armed.strip_prefix("panic-") == Some(name));
        assert!(!(wanted && reached(&format!("panic-{name}"))), "failpoint {name}");
    }

    /// Failpoints `flip` and `flip-unseen`: flip a bit of the machine's RAM, noted as a write or not.
    pub fn flip_ram_bit(machine: &mut Machine) {
        for (name, noted) in [("flip", true), ("flip-unseen", false)] {
            if reached(name) {
                let ram = machine.ram();
                let page = ram.pages() / 2;
                ram.page(page)[0] ^= 1;
                if noted {
                    ram.note_written(page);
                }
            }
        }
    }
}

#[cfg(not(debug_assertions))]
mod disabled {
    use std::path::Path;

    use vmm::Machine;

    /// No file: no failpoint can be armed.
    pub fn file() -> Option<&'static Path> {
        None
    }

    /// Nothing to watch for.
    pub fn watch() {}

    /// Does not stop.
    pub fn stop(_name: &str) {}

    /// Does not wait.
    pub fn delay(_name: &str) {}

    /// Does not block.
    pub fn wedge(_name: &str) {}

    /// Does not panic.
    pub fn panic(_name: &str) {}

    /// Does not change RAM.
    pub fn flip_ram_bit(_machine: &mut Machine) {}
}
