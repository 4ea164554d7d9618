//! The keeper: a small process beside a replica that has what a guest must never get hold of: the private key, and the client of
//! the store with its connections. The replica asks it over two socket pairs, a handful of messages:
//!
//! ```text
//!  replica                                              keeper
//!    Keys ──── KeyRequest, one after the other ──────── Keys: own.key, own.crt, peers/
//!    BlockingStore ── KeptRequest, any number at once ── the store's client, with its own keys
//! ```
//!
//! So whoever controls the replica's process does not have the key, but may use it while that process lives: the keeper signs
//! only what a handshake of TLS 1.3 on the pair's link signs, on the end that this side is, and proofs of a new key. To the store
//! it passes only commands that a replica needs, for its own VM.
//!
//! The frames are those of [`crate::wire`], of the newest version: both ends are the same program. On the socket pair for keys the
//! number of a request is 0. The keeper ends when the replica's ends are closed.

mod client;
mod server;

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::names::{KeyId, PartyName};
use crate::versions::OURS;
use crate::wire::{self, FRAME_BYTES_MAX, StoreRequest, StoreResponse, WireError};

pub use client::{KeptFiles, kept_keys};
pub use server::{Keeper, KeptVm, PairEnd};

/// What a replica asks about keys, and of files that it may not write itself.
#[derive(Debug, Serialize, Deserialize)]
enum KeyRequest {
    /// This host's certificate and what its key can sign.
    Own,
    /// The name of the peer that has this certificate.
    Peer(Vec<u8>),
    /// Sign this with the key of this id.
    Sign { key: KeyId, scheme: u16, message: Vec<u8> },
    /// The addresses of HOST:PORT.
    Resolve(String),
    /// Replace the text of the file with this number among those that the keeper may write.
    Replace(u32, String),
}

/// The keeper's answer.
#[derive(Debug, Serialize, Deserialize)]
enum KeyReply {
    /// To [`KeyRequest::Own`].
    Own { certificate: Vec<u8>, algorithm: u8, schemes: Vec<u16> },
    /// To [`KeyRequest::Peer`].
    Peer(Option<PartyName>),
    /// To [`KeyRequest::Sign`].
    Signature(Vec<u8>),
    /// To [`KeyRequest::Resolve`].
    Addresses(Vec<SocketAddr>),
    /// To [`KeyRequest::Replace`], and the first message if the keeper is ready.
    Done,
    /// It cannot be done.
    Failed(KeeperFailure),
}

/// Why the keeper cannot do what it was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{why}")]
pub struct KeeperFailure {
    /// The option that is wrong, if it is one.
    pub field: String,
    /// The reason.
    pub why: String,
}

impl KeeperFailure {
    fn new(error: &dyn std::error::Error) -> Self {
        KeeperFailure::of("", error)
    }

    /// A failure for which an option is to blame.
    pub fn of(field: &str, error: &dyn std::error::Error) -> Self {
        KeeperFailure { field: field.into(), why: crate::chain::chain(error) }
    }
}

/// A request to the store, and for how long it may take.
#[derive(Debug, Serialize, Deserialize)]
struct KeptRequest {
    patience_ms: u64,
    request: StoreRequest,
}

/// The store's answer, or why there is none.
type KeptResponse = Result<StoreResponse, String>;

/// Sends a message on the socket pair for keys.
fn send(mut to: &UnixStream, message: &impl Serialize) -> Result<(), WireError> {
    Ok(to.write_all(&wire::frame(OURS.newest, 0, message)?)?)
}

/// Waits for a message on the socket pair for keys.
fn receive<T: DeserializeOwned>(mut from: &UnixStream) -> Result<T, WireError> {
    let mut head = [0; 12];
    from.read_exact(&mut head)?;
    let [a, b, c, d, ..] = head;
    let length = u32::from_le_bytes([a, b, c, d]);
    if !(8..=FRAME_BYTES_MAX).contains(&length) {
        return Err(WireError::Length { length, most: FRAME_BYTES_MAX });
    }
    let mut body = Vec::new();
    let most = u64::from(length) - 8;
    if from.take(most).read_to_end(&mut body)? as u64 != most {
        return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
    }
    wire::decode(OURS.newest, &body)
}

#[cfg(test)]
mod tests;
