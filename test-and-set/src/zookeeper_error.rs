//! What goes wrong with ZooKeeper.

/// Why a request to ZooKeeper failed.
#[derive(Debug, thiserror::Error)]
pub enum ZooKeeperError {
    /// The connection failed or has ended.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// The server's answer cannot be decoded.
    #[error("its answer has no valid {0}")]
    Malformed(&'static str),
    /// The server has ended the session.
    #[error("it has ended the session")]
    SessionEnded,
    /// The znode does not exist.
    #[error("the znode does not exist")]
    NoNode,
    /// The znode exists already.
    #[error("the znode exists already")]
    NodeExists,
    /// The znode has another version.
    #[error("the znode has another version")]
    BadVersion,
    /// Another user owns the records.
    #[error(
        "it denies access to the znode: another user has made it, or the password in the file user is another one"
    )]
    NoAuth,
    /// It does not take the file `user`.
    #[error("it refuses the user: correct the file user in ?keys=DIR")]
    AuthFailed,
    /// Others than the user can change a znode.
    #[error(
        "the znode {path} belongs to {owner} and not only to this user: what it says may be forged. Compare it with what runs, and then give it to the user: `addauth digest NAME:PASSWORD`, `setAcl -R {path} auth::cdrwa` in zkCli.sh"
    )]
    NotOurs {
        /// The znode.
        path: String,
        /// Who may do something with it.
        owner: String,
    },
    /// Another error.
    #[error("error {0}")]
    Code(i32),
}

impl ZooKeeperError {
    pub(crate) fn of(code: i32) -> Self {
        match code {
            -101 => Self::NoNode,
            -102 => Self::NoAuth,
            -103 => Self::BadVersion,
            -110 => Self::NodeExists,
            -112 | -118 => Self::SessionEnded,
            -115 => Self::AuthFailed,
            code => Self::Code(code),
        }
    }

    /// Whether the session can go on after this.
    pub(crate) fn ends_session(&self) -> bool {
        matches!(self, Self::Io(_) | Self::Malformed(_) | Self::SessionEnded | Self::AuthFailed)
    }
}
