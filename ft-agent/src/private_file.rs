//! Files that only this user may read, whatever the umask is: they hold what a guest holds.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;

/// Creates a file, which must not exist yet, to write and to read it.
///
/// # Errors
/// It exists, or cannot be created.
pub fn create_new(path: &Path) -> io::Result<File> {
    open(path, OpenOptions::new().create_new(true))
}

/// Creates a file, or empties the one that exists.
///
/// # Errors
/// It cannot be created or emptied.
pub fn create(path: &Path) -> io::Result<File> {
    open(path, OpenOptions::new().create(true).truncate(true))
}

fn open(path: &Path, how: &mut OpenOptions) -> io::Result<File> {
    test_and_set::private_file::open(path, how.read(true).write(true))
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_file_that_others_could_read_is_made_private() {
        let path = std::env::temp_dir().join(format!("vmft-private-{}", std::process::id()));
        std::fs::write(&path, "old").unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o666)).unwrap();
        let mode = |file: File| file.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(create_new(&path).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(mode(create(&path).unwrap()), 0o600);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(mode(create_new(&path).unwrap()), 0o600);
        std::fs::remove_file(&path).unwrap();
    }
}
