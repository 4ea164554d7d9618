//! The sidecar of a disk image: which VM's disk the image is a copy of, and whether it is in use.
//!
//! The sidecar of `IMAGE` is the file `IMAGE.vmft`. The store knows the newest copies of each disk; a primary
//! is not allowed to start from another copy, because what the guest has written since would be lost.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use test_and_set::names::{CopyId, DiskName, Generation, VmName};
use test_and_set::record::VmRecord;

use crate::error::Error;
use crate::options::DiskConfig;

/// What is in a sidecar.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SidecarContent {
    /// The VM whose disk it is.
    vm: VmName,
    /// The id of this copy.
    copy: String,
    /// The generation of the pair that used it last.
    generation: u64,
    /// A replica has it open, or did not close it: then the image is as after a power cut.
    in_use: bool,
}

/// The sidecars of a VM's writable disk images.
pub struct Sidecars {
    vm: VmName,
    /// For each disk, the sidecar's path and the id of this host's copy.
    disks: BTreeMap<DiskName, (PathBuf, CopyId)>,
    /// The user has given `--discard-newer`.
    discard: bool,
}

impl Sidecars {
    /// Reads the sidecars of the VM's writable disks. An image without a sidecar is a new copy; with
    /// `discard` all images are.
    ///
    /// # Errors
    /// A sidecar cannot be read or is damaged, or an image belongs to another VM.
    pub fn read(vm: &VmName, images: &[DiskConfig], discard: bool) -> Result<Sidecars, Error> {
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
                    "{} is a disk of VM {}; give another image, or --discard-newer to use this one anyway",
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

    /// The paths of the sidecars.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.disks.values().map(|(path, _)| path.as_path())
    }

    /// The ids of this host's copies.
    pub fn copies(&self) -> BTreeMap<DiskName, CopyId> {
        self.disks.iter().map(|(name, (_, copy))| (name.clone(), *copy)).collect()
    }

    /// Checks that a primary may start from these copies, given the store's record of the VM.
    ///
    /// # Errors
    /// There is a newer copy of a disk.
    pub fn check_newest(&self, record: Option<&VmRecord>) -> Result<(), Error> {
        let none = BTreeSet::new();
        for (name, (path, copy)) in &self.disks {
            let newest = record.and_then(|r| r.disks.get(name)).unwrap_or(&none);
            if !self.discard && !newest.is_empty() && !newest.contains(copy) {
                let newest = newest.iter().map(CopyId::to_string).collect::<Vec<_>>().join(" or ");
                let why = format!(
                    "{} names copy {copy}, but the newest copy of {name} is {newest}; start the primary on the host \
                     that has the newest copy, or give --discard-newer to start anyway and lose what only that copy has",
                    path.display()
                );
                return Err(Error::config("disk", why));
            }
        }
        Ok(())
    }

    /// Writes the sidecars: the images are in use by this generation of the pair, or no longer in use. `replace` replaces the
    /// text of the file with a number, which is its place in [`Sidecars::paths`].
    ///
    /// # Errors
    /// A sidecar cannot be written.
    pub fn write<E: std::error::Error + Send + Sync + 'static>(
        &self,
        generation: Generation,
        in_use: bool,
        replace: impl Fn(u32, String) -> Result<(), E>,
    ) -> Result<(), Error> {
        for (number, (path, copy)) in (0..).zip(self.disks.values()) {
            let content = SidecarContent {
                vm: self.vm.clone(),
                copy: copy.to_string(),
                generation: generation.0,
                in_use,
            };
            let text =
                serde_json::to_string_pretty(&content).unwrap_or_else(|e| unreachable!("plain data: {e}"));
            let failed = Error::host(format!("cannot write sidecar {}", path.display()));
            replace(number, text).map_err(std::io::Error::other).map_err(failed)?;
        }
        Ok(())
    }
}

fn read(path: &Path) -> Result<Option<SidecarContent>, Error> {
    let text = match std::fs::read_to_string(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        text => text.map_err(Error::host(format!("cannot read sidecar {}", path.display())))?,
    };
    let content = serde_json::from_str(&text);
    content.map(Some).map_err(|e| damaged(path, &e))
}

fn parse_copy(path: &Path, copy: &str) -> Result<CopyId, Error> {
    copy.parse().map_err(|e| damaged(path, &e))
}

fn damaged(path: &Path, e: &dyn std::fmt::Display) -> Error {
    let why = format!(
        "sidecar {} is damaged: {e}; remove it if the image may be used as a new copy",
        path.display()
    );
    Error::config("disk", why)
}

/// Replaces the text of a file at once: a reader finds either the old text or the new one.
///
/// # Errors
/// The file cannot be written.
pub fn replace_file(path: &Path, text: &str) -> std::io::Result<()> {
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
    use test_and_set::record::{Command, Member, Members};
    use test_and_set::state::StoreState;

    #[test]
    fn a_primary_may_start_only_from_a_newest_copy() {
        let image = std::env::temp_dir().join(format!("vmft-sidecar-{}", std::process::id()));
        let vm: VmName = "web".parse().unwrap();
        let disk = DiskConfig { path: image.clone(), read_only: false, raw: false };
        let read = |vm: &VmName, discard| Sidecars::read(vm, std::slice::from_ref(&disk), discard);
        let first = read(&vm, false).unwrap();
        assert!(first.check_newest(None).is_ok());
        let path = first.paths().next().unwrap();
        first.write(Generation(1), true, |_, text| replace_file(path, &text)).unwrap();
        let again = read(&vm, false).unwrap();
        assert_eq!(again.copies(), first.copies());

        let mut store = StoreState::default();
        let member = |copies| Member { disks: copies, ..Member::new(Incarnation::random()) };
        let mut open = |generation, primary| {
            let members = Members { primary, backup: None };
            store.apply(&vm, &Command::Open { generation, members }, None);
            store.apply(&vm, &Command::Forget { generation }, None);
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
