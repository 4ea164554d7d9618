//! Gives a process a part of one core only.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A control group whose processes get this part of a core. Its processes have to end before it is dropped.
pub struct Quota(PathBuf);

impl Quota {
    /// Makes one; `None` if this host's control groups do not allow it.
    pub fn new(percent: u64) -> Option<Quota> {
        let name = format!("vmft-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let quota = percent * 1000;
        let old = Path::new("/sys/fs/cgroup/cpu");
        let (dir, file, text) = match old.is_dir() {
            true => (old.join(name), "cpu.cfs_quota_us", quota.to_string()),
            false => (Path::new("/sys/fs/cgroup").join(name), "cpu.max", format!("{quota} 100000")),
        };
        std::fs::create_dir(&dir).ok()?;
        let made = Quota(dir);
        std::fs::write(made.0.join(file), text).ok().map(|()| made)
    }

    /// Puts a process into it.
    pub fn add(&self, process: u32) {
        std::fs::write(self.0.join("cgroup.procs"), process.to_string()).expect("a control group");
    }
}

impl Drop for Quota {
    fn drop(&mut self) {
        // The kernel needs a moment to forget the last process.
        for _ in 0..100 {
            if std::fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        eprintln!("the control group {} could not be removed", self.0.display());
    }
}
