//! Reads the lists of files that `guest-images/build` leaves in its cache for each guest. The tests include this file.

use std::path::PathBuf;

/// Path of the list for a guest, which is `linux` or `bare`.
pub fn path(guest: &str) -> PathBuf {
    let from = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let cache = from("VMFT_CACHE")
        .or_else(|| from("XDG_CACHE_HOME").map(|d| d.join("vmft")))
        .unwrap_or_else(|| from("HOME").unwrap_or_default().join(".cache/vmft"));
    cache.join("images").join(guest)
}

/// The value in the line `guest.key=value` of a list.
pub fn value(text: &str, guest: &str, key: &str) -> Option<String> {
    let mut lines = text.lines().filter_map(|l| l.strip_prefix(guest)?.strip_prefix('.')?.split_once('='));
    lines.find(|(k, _)| *k == key).map(|(_, v)| v.to_owned())
}
