//! Why a member's data cannot be used.

use std::io;
use std::path::PathBuf;

use crate::server::journal::JournalError;

/// The version of the format of a member's data. Formats 1 to 3 were made before the first release.
pub const DATA_FORMAT: u32 = 4;

/// Why a member's data cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The database failed: check the disk, free space if it is full, then start the member again.
    #[error("the member's database failed: {0}")]
    Database(Box<redb::Error>),
    /// The directory cannot be used.
    #[error("cannot open or write {path}")]
    Io {
        /// The directory or file.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// The directory belongs to another member: correct --data, --id or --cluster.
    #[error("the data belongs to {found}, not to {wanted}: correct --data, --id or --cluster")]
    OtherNode {
        /// The member that it belongs to.
        found: String,
        /// This member.
        wanted: String,
    },
    /// The thread that writes the log cannot be started.
    #[error("cannot start the thread that writes the log")]
    Thread(#[source] io::Error),
    /// An earlier write of the log has failed; its error was logged then.
    #[error("an earlier write of the log has failed; see the message about it")]
    NotFlushed,
    /// A file is damaged. The member may lack what it has acknowledged, and must not vote.
    #[error(
        "{file} in this member's data is damaged: {how}. The member may lack entries that it has acknowledged, so it must not \
         go on with this data: remove it with `vmft-store member remove`, move its --data directory away, start it with --join, \
         and add it with `vmft-store member add`"
    )]
    Damaged {
        /// The file's name.
        file: &'static str,
        /// What was found.
        how: String,
    },
    /// This data is an old copy, or the disk has lost writes. The member may lack what it has acknowledged, and must not vote.
    #[error(
        "this member's data lacks what the member has acknowledged: {0}. It is an old copy, or the disk has lost writes. Votes and \
         verdicts may be missing, so the member must not go on with this data: remove it with `vmft-store member remove`, move its \
         --data directory away, start it with --join, and add it with `vmft-store member add`"
    )]
    RolledBack(String),
    /// The data was made by a release whose format this one does not have.
    #[error(
        "the data has format {found}, but this release has format {DATA_FORMAT}: {}",
        format_advice(*.found)
    )]
    Format {
        /// The version of the data's format.
        found: u32,
    },
    /// The journal failed: check the disk, free space if it is full, then start the member again.
    #[error(transparent)]
    Journal(JournalError),
    /// A value is in another release's encoding, or empty: start the release that wrote it.
    #[error(
        "the {what} has the encoding {found:?}, which this release does not know: start the release of vmft-store that wrote it"
    )]
    Encoding {
        /// The value's name.
        what: &'static str,
        /// Its encoding.
        found: Option<u8>,
    },
    /// A stored value cannot be decoded.
    #[error("cannot decode the stored {what}")]
    Decode {
        /// The value's name.
        what: &'static str,
        /// Why.
        source: postcard::Error,
    },
}

fn format_advice(found: u32) -> &'static str {
    match found > DATA_FORMAT {
        true => "it was made by a newer release; start the member with that release",
        false => {
            "it was made before the first release and cannot be used; start a new store with empty --data directories"
        }
    }
}

impl<E: Into<redb::Error>> From<E> for DiskError {
    fn from(error: E) -> Self {
        Self::Database(Box::new(error.into()))
    }
}

impl DiskError {
    pub(super) fn damaged(file: &'static str, how: impl Into<String>) -> Self {
        Self::Damaged { file, how: how.into() }
    }

    /// An error of redb that comes from a file's content is the damage of that file.
    pub(super) fn in_file(self, file: &'static str) -> Self {
        use io::ErrorKind::{InvalidData, InvalidInput, UnexpectedEof};
        let Self::Database(error) = self else { return self };
        match *error {
            redb::Error::Corrupted(how) => Self::damaged(file, how),
            redb::Error::UpgradeRequired(version) => {
                Self::damaged(file, format!("its header has the version {version}"))
            }
            redb::Error::Io(e) if matches!(e.kind(), InvalidData | InvalidInput | UnexpectedEof) => {
                Self::damaged(file, e.to_string())
            }
            _ => Self::Database(error),
        }
    }
}
