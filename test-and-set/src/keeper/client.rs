//! The replica's ends: keys and a store that are kept elsewhere.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use rustls::pki_types::CertificateDer;
use rustls::sign::{Signer, SigningKey};
use rustls::{SignatureAlgorithm, SignatureScheme};
use tokio::io::AsyncWriteExt;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::oneshot;
use tracing::error;

use super::{KeeperFailure, KeptRequest, KeptResponse, KeyReply, KeyRequest, receive, send};
use crate::blocking::BlockingStore;
use crate::keys::{KeyKeeper, Keys, OwnKey, key_id};
use crate::names::{KeyId, PartyName, VmName};
use crate::record::{Command, CommandReply, VmRecord};
use crate::store::{StoreError, TestAndSet};
use crate::versions::OURS;
use crate::wire::{self, FRAME_BYTES_MAX, StoreRequest, StoreResponse};

/// How long the keeper may take for an answer about keys. It may have to wait for a CPU, or for name servers.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long after its deadline a call of the store may return.
const GRACE: Duration = Duration::from_millis(100);

/// The socket pair for keys.
#[derive(Debug)]
struct KeyChannel {
    stream: Mutex<UnixStream>,
    /// Whether it is known that the keeper has ended.
    is_lost: AtomicBool,
}

impl KeyChannel {
    fn ask(&self, request: &KeyRequest) -> Result<KeyReply, KeeperFailure> {
        // One request at a time: the mutex is held until the answer is there.
        let stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let lost = |e: &dyn std::error::Error| {
            if !self.is_lost.swap(true, Ordering::Relaxed) {
                // An answer that comes late would be taken for that of another request.
                stream.shutdown(std::net::Shutdown::Both).ok();
                error!(
                    "the process that keeps this replica's keys is lost: {e}; this side asks the store nothing any more, \
                     leaves the VM to its peer if it has one, and cannot record the VM's end"
                );
            }
            KeeperFailure::new(e)
        };
        let reply = send(&stream, request).and_then(|()| receive(&stream)).map_err(|e| lost(&e))?;
        match reply {
            KeyReply::Failed(failure) => Err(failure),
            reply => Ok(reply),
        }
    }
}

fn unfitting(reply: &KeyReply) -> KeeperFailure {
    KeeperFailure { field: String::new(), why: format!("the keeper's answer does not fit: {reply:?}") }
}

/// A keeper's answers about keys.
#[derive(Debug)]
struct KeptKeys {
    channel: Arc<KeyChannel>,
    /// This host's key, as it was last known.
    own: Mutex<Arc<OwnKey>>,
}

/// A key that the keeper has.
#[derive(Clone, Debug)]
struct KeptKey {
    channel: Arc<KeyChannel>,
    key: KeyId,
    algorithm: SignatureAlgorithm,
    schemes: Vec<SignatureScheme>,
}

/// Signs with one scheme of a kept key.
#[derive(Debug)]
struct KeptSigner {
    key: KeptKey,
    scheme: SignatureScheme,
}

impl SigningKey for KeptKey {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        let scheme = *self.schemes.iter().find(|scheme| offered.contains(scheme))?;
        Some(Box::new(KeptSigner { key: self.clone(), scheme }))
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        self.algorithm
    }
}

impl Signer for KeptSigner {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rustls::Error> {
        let (key, scheme) = (self.key.key, self.scheme.into());
        let request = KeyRequest::Sign { key, scheme, message: message.into() };
        match self.key.channel.ask(&request) {
            Ok(KeyReply::Signature(signature)) => Ok(signature),
            Ok(reply) => Err(rustls::Error::General(unfitting(&reply).why)),
            Err(failure) => Err(rustls::Error::General(failure.why)),
        }
    }

    fn scheme(&self) -> SignatureScheme {
        self.scheme
    }
}

fn ask_own(channel: &Arc<KeyChannel>) -> Result<OwnKey, KeeperFailure> {
    let (certificate, algorithm, schemes) = match channel.ask(&KeyRequest::Own)? {
        KeyReply::Own { certificate, algorithm, schemes } => (certificate, algorithm, schemes),
        reply => return Err(unfitting(&reply)),
    };
    let certificate = CertificateDer::from(certificate);
    let key = KeptKey {
        channel: channel.clone(),
        key: key_id(&certificate),
        algorithm: SignatureAlgorithm::from(algorithm),
        schemes: schemes.into_iter().map(SignatureScheme::from).collect(),
    };
    Ok(OwnKey::kept(certificate, Arc::new(key)))
}

impl KeyKeeper for KeptKeys {
    fn own(&self) -> Arc<OwnKey> {
        let asked = ask_own(&self.channel);
        let mut own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(new) = asked.ok().filter(|new| new.certificate() != own.certificate()) {
            *own = Arc::new(new);
        }
        own.clone()
    }

    fn peer(&self, certificate: &CertificateDer<'_>) -> Option<PartyName> {
        match self.channel.ask(&KeyRequest::Peer(certificate.to_vec())) {
            Ok(KeyReply::Peer(name)) => name,
            _ => None,
        }
    }

    fn is_lost(&self) -> bool {
        self.channel.is_lost.load(Ordering::Relaxed)
    }
}

/// What the keeper does with files and names of hosts for the replica.
#[derive(Clone, Debug)]
pub struct KeptFiles(Arc<KeyChannel>);

impl KeptFiles {
    /// Replaces the text of the file with this number.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn replace(&self, number: u32, text: String) -> Result<(), KeeperFailure> {
        match self.0.ask(&KeyRequest::Replace(number, text))? {
            KeyReply::Done => Ok(()),
            reply => Err(unfitting(&reply)),
        }
    }

    /// The addresses of HOST:PORT.
    ///
    /// # Errors
    /// The name cannot be looked up.
    pub fn resolve(&self, address: &str) -> Result<Vec<SocketAddr>, KeeperFailure> {
        match self.0.ask(&KeyRequest::Resolve(address.into()))? {
            KeyReply::Addresses(addresses) => Ok(addresses),
            reply => Err(unfitting(&reply)),
        }
    }
}

/// This host's keys and the replica's files, in the process at the other end of this socket. Waits until it is ready.
///
/// # Errors
/// The keeper cannot use the keys, the store or the files.
pub fn kept_keys(stream: UnixStream) -> Result<(Keys, KeptFiles), KeeperFailure> {
    let failed = |e: std::io::Error| KeeperFailure::new(&e);
    stream.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
    match receive(&stream).map_err(|e| KeeperFailure::new(&e))? {
        KeyReply::Done => {}
        KeyReply::Failed(failure) => return Err(failure),
        reply => return Err(unfitting(&reply)),
    }
    let channel = Arc::new(KeyChannel { stream: stream.into(), is_lost: false.into() });
    let own = Mutex::new(Arc::new(ask_own(&channel)?));
    let keys = KeptKeys { channel: channel.clone(), own };
    Ok((Keys::kept(Box::new(keys)), KeptFiles(channel)))
}

type KeptCalls = HashMap<u64, oneshot::Sender<KeptResponse>>;

/// A store whose client is in the keeper.
struct KeptStore {
    write: tokio::sync::Mutex<OwnedWriteHalf>,
    next: AtomicU64,
    /// The requests without an answer, by number; `None` once the keeper has ended.
    waiting: Arc<Mutex<Option<KeptCalls>>>,
}

impl BlockingStore {
    /// A store whose client is in the keeper at the other end of this socket.
    ///
    /// # Errors
    /// The thread cannot be started, or the socket not be used.
    pub fn kept(stream: UnixStream) -> Result<Self, StoreError> {
        Self::start(move || Ok(Arc::new(KeptStore::new(stream).map_err(StoreError::Thread)?)))
    }
}

impl KeptStore {
    /// The store at the other end of this socket. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// The socket cannot be used.
    fn new(stream: UnixStream) -> std::io::Result<KeptStore> {
        stream.set_nonblocking(true)?;
        let (mut read, write) = tokio::net::UnixStream::from_std(stream)?.into_split();
        let waiting = Arc::new(Mutex::new(Some(KeptCalls::new())));
        let asked = waiting.clone();
        let lock = move || asked.lock().unwrap_or_else(PoisonError::into_inner).take();
        let answered = waiting.clone();
        tokio::spawn(async move {
            while let Ok(Some(length)) = wire::read_length(&mut read, FRAME_BYTES_MAX).await
                && let Ok((number, body)) = wire::read_rest(&mut read, length).await
                && let Ok(response) = wire::decode(OURS.newest, &body)
            {
                let mut waiting = answered.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(caller) = waiting.as_mut().and_then(|waiting| waiting.remove(&number)) {
                    // An error means that the caller has stopped waiting.
                    caller.send(response).ok();
                }
            }
            drop(lock());
        });
        Ok(KeptStore { write: write.into(), next: AtomicU64::new(1), waiting })
    }

    async fn ask(&self, request: StoreRequest, deadline: Instant) -> Result<StoreResponse, StoreError> {
        let patience = deadline.saturating_duration_since(Instant::now());
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let patience_ms = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
        let frame = wire::frame(OURS.newest, number, &KeptRequest { patience_ms, request });
        let frame = frame.map_err(|e| StoreError::Kept(e.to_string()))?;
        let (tell, told) = oneshot::channel();
        let waiting = || self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting().as_mut().ok_or(StoreError::KeeperLost)?.insert(number, tell);
        let sent = async { self.write.lock().await.write_all(&frame).await };
        match tokio::time::timeout(patience + GRACE, sent).await {
            Ok(sent) => sent.map_err(|_| StoreError::KeeperLost)?,
            // A frame may be torn, so that the keeper understands nothing any more.
            Err(_) => {
                *waiting() = None;
                return Err(StoreError::KeeperLost);
            }
        }
        match tokio::time::timeout(patience + GRACE, told).await {
            Ok(Ok(Ok(response))) => Ok(response),
            Ok(Ok(Err(why))) => Err(StoreError::Kept(why)),
            Ok(Err(_)) => Err(StoreError::KeeperLost),
            Err(_) => {
                waiting().as_mut().and_then(|waiting| waiting.remove(&number));
                Err(StoreError::NoAnswer { waited: patience, nodes: vec![] })
            }
        }
    }
}

#[async_trait]
impl TestAndSet for KeptStore {
    async fn command(
        &self,
        vm: &VmName,
        command: &Command,
        deadline: Instant,
    ) -> Result<CommandReply, StoreError> {
        self.ask(StoreRequest::Command(vm.clone(), command.clone()), deadline).await?.into_reply()
    }

    async fn get(&self, vm: &VmName, deadline: Instant) -> Result<Option<VmRecord>, StoreError> {
        self.ask(StoreRequest::Get(vm.clone()), deadline).await?.into_record()
    }

    async fn host_of(&self, key: KeyId, deadline: Instant) -> Result<Option<PartyName>, StoreError> {
        self.ask(StoreRequest::HostOf(key), deadline).await?.into_host()
    }

    async fn list(
        &self,
        after: Option<&VmName>,
        deadline: Instant,
    ) -> Result<Vec<(VmName, VmRecord)>, StoreError> {
        self.ask(StoreRequest::List(after.cloned()), deadline).await?.into_page()
    }
}
