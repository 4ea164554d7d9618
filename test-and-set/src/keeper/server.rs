//! The keeper's ends: what it does for the replica, and what it refuses to do.

use std::net::ToSocketAddrs;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::SignatureScheme;
use rustls::pki_types::CertificateDer;
use tokio::io::AsyncWriteExt;

use super::{KeeperFailure, KeptRequest, KeptResponse, KeyReply, KeyRequest, receive, send};
use crate::blocking::BlockingStore;
use crate::chain::chain;
use crate::keys::{Keys, PROOF_PREFIX};
use crate::names::VmName;
use crate::record::Command;
use crate::store::{StoreError, TestAndSet};
use crate::url::StoreUrl;
use crate::versions::OURS;
use crate::wire::{self, FRAME_BYTES_MAX, StoreRequest, StoreResponse, WireError};

/// Which end of the pair's link a side is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PairEnd {
    /// It connects.
    Client,
    /// It listens.
    Server,
}

/// What a key may sign in TLS 1.3, in the order in which to say so (RFC 8446, 4.2.3).
const SCHEMES: [SignatureScheme; 6] = [
    SignatureScheme::ECDSA_NISTP256_SHA256,
    SignatureScheme::ECDSA_NISTP384_SHA384,
    SignatureScheme::ED25519,
    SignatureScheme::RSA_PSS_SHA512,
    SignatureScheme::RSA_PSS_SHA384,
    SignatureScheme::RSA_PSS_SHA256,
];

/// The keys of a host, for one replica.
pub struct Keeper<R> {
    /// The keys.
    pub keys: Keys,
    /// Which handshakes are signed.
    pub end: PairEnd,
    /// Replaces the text of a file, by its number.
    pub replace: R,
}

impl<R: FnMut(u32, &str) -> std::io::Result<()>> Keeper<R> {
    /// Says that the keeper is ready, or why it is not, and answers requests until the replica has ended.
    pub fn serve(ready: Result<Self, KeeperFailure>, stream: &UnixStream) {
        let mut keeper = match ready {
            Ok(keeper) => keeper,
            // If the replica is gone nobody wants to know.
            Err(failure) => return drop(send(stream, &KeyReply::Failed(failure))),
        };
        let mut sent = send(stream, &KeyReply::Done);
        while sent.is_ok() {
            let Ok(request) = receive(stream) else { return };
            sent = send(stream, &keeper.answer(request).unwrap_or_else(KeyReply::Failed));
        }
    }

    fn answer(&mut self, request: KeyRequest) -> Result<KeyReply, KeeperFailure> {
        let refused = |why: &str| Err(KeeperFailure { field: String::new(), why: why.into() });
        match request {
            KeyRequest::Own => {
                let own = self.keys.own();
                let key = own.signing_key();
                let can = |scheme: &&SignatureScheme| key.choose_scheme(&[**scheme]).is_some();
                Ok(KeyReply::Own {
                    certificate: own.certificate().to_vec(),
                    algorithm: key.algorithm().into(),
                    schemes: SCHEMES.iter().filter(can).map(|scheme| (*scheme).into()).collect(),
                })
            }
            KeyRequest::Peer(certificate) => {
                Ok(KeyReply::Peer(self.keys.peer(&CertificateDer::from(certificate))))
            }
            KeyRequest::Sign { key, scheme, message } => {
                if !may_sign(self.end, &message) {
                    return refused("the keeper signs only handshakes of the pair's link");
                }
                let own = self.keys.own();
                // A key that was replaced since signs no more; the caller asks for the new one with its next handshake.
                let signer = own.signing_key().choose_scheme(&[scheme.into()]).filter(|_| own.id() == key);
                let Some(signer) = signer else { return refused("the key has just been replaced") };
                let signature = signer.sign(&message).map_err(|e| KeeperFailure::new(&e))?;
                Ok(KeyReply::Signature(signature))
            }
            KeyRequest::Resolve(address) => {
                let found = address.to_socket_addrs().map_err(|e| KeeperFailure::new(&e))?;
                Ok(KeyReply::Addresses(found.collect()))
            }
            KeyRequest::Replace(number, text) => {
                (self.replace)(number, &text).map_err(|e| KeeperFailure::new(&e))?;
                Ok(KeyReply::Done)
            }
        }
    }
}

/// Whether this is what the end of the pair's link signs in a handshake (RFC 8446, 4.4.3), or a proof of a new key.
pub(super) fn may_sign(end: PairEnd, message: &[u8]) -> bool {
    let context = match end {
        PairEnd::Client => "TLS 1.3, client CertificateVerify\0",
        PairEnd::Server => "TLS 1.3, server CertificateVerify\0",
    };
    let handshake = [&[b' '; 64], context.as_bytes()].concat();
    // A transcript's hash is SHA-256 or SHA-384.
    let is_handshake =
        message.strip_prefix(&handshake[..]).is_some_and(|hash| [32, 48].contains(&hash.len()));
    is_handshake || message.strip_prefix(PROOF_PREFIX).is_some_and(|exported| exported.len() == 32)
}

/// The store, for one VM.
pub struct KeptVm {
    /// The store's URL.
    pub url: StoreUrl,
    /// The VM.
    pub vm: VmName,
}

impl KeptVm {
    /// Starts the store's client on a thread of its own, and answers requests until the replica has ended.
    ///
    /// # Errors
    /// The client cannot be made.
    pub fn start(self, stream: UnixStream) -> Result<(), StoreError> {
        stream.set_nonblocking(true).map_err(StoreError::Thread)?;
        let client = BlockingStore::connect_to(self.url.clone())?;
        client.spawn(|store| async move {
            // Without the socket, and after invalid bytes, it ends as after the end of the stream: nobody else writes there.
            if let Ok(ends) = tokio::net::UnixStream::from_std(stream) {
                self.serve(store, ends).await.ok();
            }
        });
        Ok(())
    }

    pub(super) async fn serve(
        self,
        store: Arc<dyn TestAndSet>,
        ends: tokio::net::UnixStream,
    ) -> Result<(), WireError> {
        let (mut read, write) = ends.into_split();
        let write = Arc::new(tokio::sync::Mutex::new(write));
        while let Some(length) = wire::read_length(&mut read, FRAME_BYTES_MAX).await? {
            let (number, body) = wire::read_rest(&mut read, length).await?;
            let KeptRequest { patience_ms, request } = wire::decode(OURS.newest, &body)?;
            let deadline = Instant::now() + Duration::from_millis(patience_ms.min(3_600_000));
            let (store, write, vm) = (store.clone(), write.clone(), self.vm.clone());
            tokio::spawn(async move {
                let response: KeptResponse = answer(&*store, &vm, request, deadline).await;
                if let Ok(frame) = wire::frame(OURS.newest, number, &response) {
                    // An error means that the replica has ended.
                    write.lock().await.write_all(&frame).await.ok();
                }
            });
        }
        Ok(())
    }
}

async fn answer(
    store: &dyn TestAndSet,
    own: &VmName,
    request: StoreRequest,
    deadline: Instant,
) -> KeptResponse {
    let told = |e: StoreError| chain(&e);
    match request {
        StoreRequest::Command(vm, command) if vm == *own && !matches!(command, Command::Forget { .. }) => {
            store.command(&vm, &command, deadline).await.map(StoreResponse::Reply).map_err(told)
        }
        StoreRequest::Get(vm) if vm == *own => {
            store.get(&vm, deadline).await.map(StoreResponse::Record).map_err(told)
        }
        StoreRequest::HostOf(key) => {
            store.host_of(key, deadline).await.map(StoreResponse::Host).map_err(told)
        }
        _ => Err("the keeper does not ask the store for that".into()),
    }
}
