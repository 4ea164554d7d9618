//! A disk image's sidecar: which VM's copy it is, and whether it is in use.
//!
//! `IMAGE.vmft` lies beside the image. The store names the newest copies of each disk; a primary that starts from another
//! one is refused, because what was written since would be lost.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use test_and_set::names::{CopyId, DiskName, Generation, VmName};
use test_and_set::record::Record;

use crate::error::Error;
use crate::options::Disk;

/// What a sidecar says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    /// Whose disk it is.
    vm: VmName,
    /// This copy.
    copy: String,
    /// The pair that used it last.
    generation: u64,
    /// Its user has not closed it: it is as a power cut would leave it.
    in_use: bool,
}

/// The sidecars of a VM's writable images.
pub struct Sidecars {
    vm: VmName,
    /// By the disk's name.
    disks: BTreeMap<DiskName, (PathBuf, CopyId)>,
    /// The user wants to lose what newer copies have.
    discard: bool,
}

impl Sidecars {
    /// Reads the sidecars of the VM's writable disks; an image without one is a new copy, as are all with `discard`.
    ///
    /// # Errors
    /// A sidecar is damaged, or the image is another VM's.
    pub fn read(vm: &VmName, images: &[Disk], discard: bool) -> Result<Sidecars, Error> {
        let mut disks = BTreeMap::new();
        for (n, disk) in images.iter().enumerate().filter(|(_, disk)| !disk.read_only) {
            let image = &disk.path;
            let name = format!("disk-{n}").parse().unwrap_or_else(|e| unreachable!("a good name: {e}"));
            let mut path = image.as_os_str().to_owned();
            path.push(".vmft");
            let path = PathBuf::from(path);
            let content = read(&path)?.filter(|_| !discard);
            if let Some(other) = content.as_ref().filter(|c| c.vm != *vm) {
                let why = format!(
                    "{} is a disk of VM {}; --discard-newer takes it all the same",
                    image.display(),
                    other.vm
                );
                return Err(Error::config("disk", why));
            }
            let copy = match &content {
                Some(content) => parse_copy(&path, &content.copy)?,
                None => CopyId::random(),
            };
            disks.insert(name, (path, copy));
        }
        Ok(Sidecars { vm: vm.clone(), disks, discard })
    }

    /// Where they lie.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.disks.values().map(|(path, _)| path.as_path())
    }

    /// This side's copies.
    pub fn copies(&self) -> BTreeMap<DiskName, CopyId> {
        self.disks.iter().map(|(name, (_, copy))| (name.clone(), *copy)).collect()
    }

    /// Whether a primary may start from these copies, by what the store knows.
    ///
    /// # Errors
    /// There is a newer copy.
    pub fn check_newest(&self, record: Option<&Record>) -> Result<(), Error> {
        let none = BTreeSet::new();
        for (name, (path, copy)) in &self.disks {
            let newest = record.and_then(|r| r.disks.get(name)).unwrap_or(&none);
            if !self.discard && !newest.is_empty() && !newest.contains(copy) {
                let newest = newest.iter().map(CopyId::to_string).collect::<Vec<_>>().join(" or ");
                let why = format!(
                    "{}: the newest copy of {name} is {newest}, this one is {copy}; start where that is, or give --discard-newer to lose what it has",
                    path.display()
                );
                return Err(Error::config("disk", why));
            }
        }
        Ok(())
    }

    /// Notes that the images are in use by a pair, or no longer.
    ///
    /// # Errors
    /// A sidecar cannot be written.
    pub fn write(&self, generation: Generation, in_use: bool) -> Result<(), Error> {
        for (path, copy) in self.disks.values() {
            let content =
                Content { vm: self.vm.clone(), copy: copy.to_string(), generation: generation.0, in_use };
            let text =
                serde_json::to_string_pretty(&content).unwrap_or_else(|e| unreachable!("plain data: {e}"));
            replace(path, &text).map_err(Error::host(path.display().to_string()))?;
        }
        Ok(())
    }
}

fn read(path: &Path) -> Result<Option<Content>, Error> {
    let text = match std::fs::read_to_string(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        text => text.map_err(Error::host(path.display().to_string()))?,
    };
    let content = serde_json::from_str(&text);
    content.map(Some).map_err(|e| Error::config("disk", format!("{}: {e}", path.display())))
}

fn parse_copy(path: &Path, copy: &str) -> Result<CopyId, Error> {
    copy.parse().map_err(|e| Error::config("disk", format!("{}: {e}", path.display())))
}

/// Whoever reads the file finds the old text or the new one.
fn replace(path: &Path, text: &str) -> std::io::Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let mut file = std::fs::File::create(&new)?;
    std::io::Write::write_all(&mut file, text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&new, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use test_and_set::names::Incarnation;
    use test_and_set::record::{Command, Member, Members, State};

    #[test]
    fn only_a_newest_copy_may_start() {
        let image = std::env::temp_dir().join(format!("vmft-sidecar-{}", std::process::id()));
        let vm: VmName = "web".parse().unwrap();
        let disk = Disk { path: image.clone(), read_only: false };
        let read = |vm: &VmName, discard| Sidecars::read(vm, std::slice::from_ref(&disk), discard);
        let first = read(&vm, false).unwrap();
        assert!(first.check_newest(None).is_ok());
        first.write(Generation(1), true).unwrap();
        let again = read(&vm, false).unwrap();
        assert_eq!(again.copies(), first.copies());

        let mut store = State::default();
        let member = |copies| Member { disks: copies, ..Member::new(Incarnation::random()) };
        let mut open = |generation, primary| {
            let members = Members { primary, backup: None };
            store.apply(&vm, &Command::Open { generation, members });
            store.apply(&vm, &Command::Forget { generation });
            store.get(&vm).cloned()
        };
        let record = open(Generation(1), member(again.copies()));
        assert!(again.check_newest(record.as_ref()).is_ok());
        let elsewhere = BTreeMap::from([("disk-0".parse().unwrap(), CopyId::random())]);
        let record = open(Generation(2), member(elsewhere));
        let refused = again.check_newest(record.as_ref()).unwrap_err().to_string();
        assert!(refused.contains("the newest copy of disk-0"), "{refused}");
        let refused = read(&"mail".parse().unwrap(), false).err().expect("another VM's").to_string();
        assert!(refused.contains("a disk of VM web"), "{refused}");
        assert_ne!(read(&vm, true).unwrap().copies(), first.copies());
        std::fs::remove_file(format!("{}.vmft", image.display())).unwrap();
    }
}
