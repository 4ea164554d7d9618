//! The versions of the store's protocol: which of them a side knows, and which one a connection speaks.
//!
//! A version moves once a release. A release also knows the version of the release before it, so that members and clients can
//! be replaced one process at a time, and back.

use std::fmt;

/// The versions that this build knows, in ascending order, each with the bytes that follow the last field of every body in a
/// frame. No version that is released has such bytes.
const KNOWN: &[(u16, &[u8])] = &[
    (2, &[]),
    #[cfg(feature = "next-version")]
    next_version::ENTRY,
];

/// The versions that this build knows.
pub const OURS: StoreVersions = StoreVersions { newest: KNOWN[KNOWN.len() - 1].0, oldest: KNOWN[0].0 };

/// A version more, which tests of upgrades build: its bodies are invalid in the version before it, and the other way round.
#[cfg(feature = "next-version")]
mod next_version {
    pub const ENTRY: (u16, &[u8]) = (3, &[0xf3]);
}

#[cfg(all(feature = "next-version", not(debug_assertions)))]
compile_error!(
    "the feature `next-version` is for tests of upgrades: build without --release, or without the feature"
);

/// The versions that one side knows: all from the oldest to the newest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreVersions {
    /// The newest.
    pub newest: u16,
    /// The oldest.
    pub oldest: u16,
}

impl StoreVersions {
    /// The version that two sides speak with each other: the newest that both know. `None` if there is none.
    pub fn common(self, theirs: StoreVersions) -> Option<u16> {
        let newest = self.newest.min(theirs.newest);
        (newest >= self.oldest.max(theirs.oldest)).then_some(newest)
    }
}

impl fmt::Display for StoreVersions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.oldest == self.newest {
            write!(f, "version {}", self.newest)
        } else {
            write!(f, "versions {} to {}", self.oldest, self.newest)
        }
    }
}

/// The bytes that end a body in a frame of this version.
pub(crate) fn tail(version: u16) -> &'static [u8] {
    KNOWN.iter().find(|(known, _)| *known == version).map_or(&[], |(_, tail)| tail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_common_version_is_spoken() {
        let versions = |oldest, newest| StoreVersions { oldest, newest };
        for (ours, theirs, common) in [
            (versions(2, 2), versions(2, 2), Some(2)),
            (versions(2, 3), versions(2, 2), Some(2)),
            (versions(2, 3), versions(3, 4), Some(3)),
            (versions(2, 3), versions(2, 9), Some(3)),
            (versions(2, 3), versions(4, 5), None),
            (versions(2, 9), versions(5, 4), None),
        ] {
            assert_eq!(ours.common(theirs), common, "{ours} and {theirs}");
            assert_eq!(theirs.common(ours), common, "{theirs} and {ours}");
        }
        assert_eq!(versions(2, 2).to_string(), "version 2");
        assert_eq!(versions(2, 3).to_string(), "versions 2 to 3");
    }
}
