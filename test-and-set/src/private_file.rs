//! Files that only their owner may read: private keys, and what a store keeps.

use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// Opens a file with these options, and makes it one that only its owner may read, whatever the umask and its mode are. A
/// device keeps its mode.
///
/// # Errors
/// It cannot be opened, or its mode not be set.
pub fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    let file = options.mode(0o600).open(path)?;
    if file.metadata()?.is_file() {
        file.set_permissions(Permissions::from_mode(0o600))?;
    }
    Ok(file)
}

/// Whether others than the owner may read or write a file.
pub(crate) fn others_may_use(file: &File) -> io::Result<bool> {
    Ok(file.metadata()?.permissions().mode() & 0o077 != 0)
}
