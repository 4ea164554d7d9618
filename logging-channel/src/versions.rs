//! The versions of the channel's protocol: which of them a side knows, and which one a connection speaks.
//!
//! A version moves once a release. A release also knows the version of the release before it, so that hosts can be
//! upgraded one at a time, and back.

use std::fmt;

/// The versions that this build knows, in ascending order, each with the fields that follow the last one of a beat. No
/// version that is released has such fields.
const KNOWN: &[(u16, &[u64])] = &[
    (3, &[]),
    // Its beats carry the sender's risks and the backup's lag.
    (RISKS_IN_BEATS, &[]),
    #[cfg(feature = "next-version")]
    next_version::ENTRY,
];

/// The first version whose beats carry [`crate::message::Beat::risks`] and [`crate::message::Beat::lag_ns`].
pub(crate) const RISKS_IN_BEATS: u16 = 4;
/// The first version in which a handover is prepared, and then yielded.
pub const YIELDS_FROM: u16 = 4;

/// The versions that this build knows.
pub const OURS: ChannelVersions = ChannelVersions { newest: KNOWN[KNOWN.len() - 1].0, oldest: KNOWN[0].0 };

/// A version more, which tests of upgrades build: its beats are invalid in the version before it, and the other way
/// round.
#[cfg(feature = "next-version")]
mod next_version {
    pub const ENTRY: (u16, &[u64]) = (5, &[0x5eed]);
}

#[cfg(all(feature = "next-version", not(debug_assertions)))]
compile_error!(
    "the feature `next-version` is for tests of upgrades: build without --release, or without the feature"
);

/// The versions that one side knows: all from the oldest to the newest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChannelVersions {
    /// The newest.
    pub newest: u16,
    /// The oldest.
    pub oldest: u16,
}

impl ChannelVersions {
    /// The version that two sides speak with each other: the newest that both know. `None` if there is none.
    pub fn common(self, theirs: ChannelVersions) -> Option<u16> {
        let newest = self.newest.min(theirs.newest);
        (newest >= self.oldest.max(theirs.oldest)).then_some(newest)
    }
}

impl fmt::Display for ChannelVersions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.oldest == self.newest {
            write!(f, "version {}", self.newest)
        } else {
            write!(f, "versions {} to {}", self.oldest, self.newest)
        }
    }
}

/// The fields that end a beat of this version.
pub(crate) fn beat_end(version: u16) -> &'static [u64] {
    KNOWN.iter().find(|(known, _)| *known == version).map_or(&[], |(_, end)| end)
}
