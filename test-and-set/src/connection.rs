//! One connection to a node of the store: TLS, the greetings, then any number of requests at once.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncWriteExt, WriteHalf};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::keys::{Keys, Permission};
use crate::names::{ClusterName, KeyId};
use crate::wire::{self, ConnectionRefusal, FRAME_BYTES_MAX, MemberHello, StoreHello, Welcome, WireError};

/// Why a connection cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The node cannot be reached.
    #[error("cannot connect: {0}")]
    Connect(std::io::Error),
    /// One side does not accept the other's certificate: copy each side's certificate to the other.
    #[error(
        "one side does not accept the other's certificate: {0}; copy each side's own.crt into the other's keys directory"
    )]
    Certificate(std::io::Error),
    /// A message could not be sent or received.
    #[error("{0}")]
    Wire(#[from] WireError),
    /// Another cluster answers at this address.
    #[error("the node belongs to cluster {0}: correct the address or the cluster's name")]
    WrongCluster(ClusterName),
    /// Another member answers at this address, or one with an unknown certificate.
    #[error(
        "the node calls itself member {0}, but that is not the expected member, or members/{0}.crt is not its certificate"
    )]
    WrongMember(u64),
    /// The node refuses this connection.
    #[error("the node refuses the connection: {}", refusal(*.0))]
    Refused(ConnectionRefusal),
    /// The connection has ended. What was requested may or may not have been done.
    #[error("the connection has ended")]
    Ended,
    /// No answer in time.
    #[error("no answer in time")]
    Silent,
}

fn refusal(reason: ConnectionRefusal) -> &'static str {
    match reason {
        ConnectionRefusal::WrongCluster => "it belongs to another cluster",
        ConnectionRefusal::WrongMember => "it is another member",
        ConnectionRefusal::NotThatMember => {
            "this member's certificate is not the one in its directory members/; copy it there"
        }
        ConnectionRefusal::DataReplaced => {
            "this member had another data directory before; remove the member and add it again"
        }
        ConnectionRefusal::RolledBack => {
            "the member that connected lacks what it has acknowledged: its data is an old copy, or its disk has lost writes; \
             remove the member, empty its --data directory, and add it again"
        }
        ConnectionRefusal::Busy => "too many clients are connected",
        ConnectionRefusal::NotAClient => {
            "this certificate is neither in its directory hosts/ nor in operators/; only hosts and operators are clients"
        }
        ConnectionRefusal::NotAMember => {
            "the cluster has no member with this number: it was removed, or is not added yet"
        }
    }
}

impl ConnectionError {
    /// Whether this will fail in the same way until an operator corrects something.
    pub fn is_lasting(&self) -> bool {
        match self {
            ConnectionError::Certificate(_)
            | ConnectionError::WrongCluster(_)
            | ConnectionError::WrongMember(_) => true,
            ConnectionError::Wire(error) => matches!(error, WireError::Magic(_) | WireError::Versions(_)),
            ConnectionError::Refused(reason) => {
                !matches!(reason, ConnectionRefusal::Busy | ConnectionRefusal::NotAMember)
            }
            ConnectionError::Connect(_) | ConnectionError::Ended | ConnectionError::Silent => false,
        }
    }

    fn from_handshake(error: std::io::Error) -> Self {
        let tls = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
        match tls {
            Some(rustls::Error::InvalidCertificate(_) | rustls::Error::AlertReceived(_)) => {
                Self::Certificate(error)
            }
            _ => Self::Connect(error),
        }
    }
}

/// How to connect: with which keys, and to which cluster.
#[derive(Clone)]
pub struct Dialer {
    /// Made by [`crate::tls::connector`].
    pub tls: TlsConnector,
    /// Our keys, which also determine whose certificates are accepted.
    pub keys: Arc<Keys>,
    /// The cluster that the node must belong to.
    pub cluster: ClusterName,
}

type Waiting = HashMap<u64, oneshot::Sender<Vec<u8>>>;

struct Shared {
    /// The requests without an answer, by number; `None` once the connection has ended.
    waiting: Mutex<Option<Waiting>>,
    last_heard: Mutex<Instant>,
}

impl Shared {
    fn waiting(&self) -> std::sync::MutexGuard<'_, Option<Waiting>> {
        self.waiting.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn last_heard(&self) -> std::sync::MutexGuard<'_, Instant> {
        self.last_heard.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// A connection that is ready for requests.
pub struct NodeConnection {
    shared: Arc<Shared>,
    /// The version of the protocol that both sides speak.
    version: u16,
    /// The key with which this side has connected.
    own: KeyId,
    next: AtomicU64,
    write: tokio::sync::Mutex<WriteHalf<TlsStream<TcpStream>>>,
    reader: tokio::task::AbortHandle,
}

impl Drop for NodeConnection {
    fn drop(&mut self) {
        self.close();
    }
}

/// How a member introduces itself: called when its greeting is sent.
pub type Introduction<'i> = &'i (dyn Fn() -> MemberHello + Sync);

impl Dialer {
    /// Connects within `patience`. A member introduces itself with `member`, and finds a refusal in the other member's greeting; a
    /// client passes `None`.
    pub async fn connect(
        &self,
        address: &str,
        member: Option<Introduction<'_>>,
        patience: Duration,
    ) -> Result<(NodeConnection, Welcome), ConnectionError> {
        tokio::time::timeout(patience, self.connect_patiently(address, member))
            .await
            .unwrap_or(Err(ConnectionError::Silent))
    }

    async fn connect_patiently(
        &self,
        address: &str,
        member: Option<Introduction<'_>>,
    ) -> Result<(NodeConnection, Welcome), ConnectionError> {
        let own = self.keys.own().id();
        let tcp = TcpStream::connect(address).await.map_err(ConnectionError::Connect)?;
        tcp.set_nodelay(true).map_err(ConnectionError::Connect)?;
        // TLS wants a name, which nobody checks: certificates are pinned.
        let name = ServerName::try_from("vmft-store")
            .map_err(|e| ConnectionError::Connect(std::io::Error::other(e)))?;
        let mut stream = self.tls.connect(name, tcp).await.map_err(ConnectionError::from_handshake)?;
        let member = member.map(|introduce| introduce());
        let wanted = member.as_ref().map(|m| m.to);
        wire::write_greeting(&mut stream, &StoreHello { cluster: self.cluster.clone(), member }).await?;
        let greeted = wire::read_greeting::<Welcome>(&mut stream).await;
        let (version, welcome) = greeted.map_err(|error| match error {
            // In TLS 1.3 the server checks the client's certificate after the client's handshake has ended: a refusal comes as
            // an alert here.
            WireError::Io(io) if io.get_ref().is_some_and(|e| e.is::<rustls::Error>()) => {
                ConnectionError::from_handshake(io)
            }
            other => other.into(),
        })?;
        if welcome.cluster != self.cluster {
            return Err(ConnectionError::WrongCluster(welcome.cluster));
        }
        let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        let permission = certificate.map(|certificate| Arc::new(Permission::new(&self.keys, certificate)));
        let permission = permission.filter(|permission| permission.roles().member == Some(welcome.id));
        let Some(permission) = permission.filter(|_| wanted.is_none_or(|to| to == welcome.id)) else {
            return Err(ConnectionError::WrongMember(welcome.id));
        };
        match welcome.refused {
            Some(reason) if wanted.is_none() => Err(ConnectionError::Refused(reason)),
            _ => Ok((NodeConnection::start(stream, version, own, permission), welcome)),
        }
    }
}

impl NodeConnection {
    fn start(stream: TlsStream<TcpStream>, version: u16, own: KeyId, permission: Arc<Permission>) -> Self {
        let (mut read, write) = tokio::io::split(stream);
        let shared = Arc::new(Shared {
            waiting: Mutex::new(Some(HashMap::new())),
            last_heard: Mutex::new(Instant::now()),
        });
        let heard = shared.clone();
        let member = permission.clone();
        let read_all = async move {
            while let Ok(Some(length)) = wire::read_length(&mut read, FRAME_BYTES_MAX).await
                && let Ok((number, body)) = wire::read_rest(&mut read, length).await
                && member.holds()
            {
                *heard.last_heard() = Instant::now();
                let caller = heard.waiting().as_mut().and_then(|waiting| waiting.remove(&number));
                if let Some(caller) = caller {
                    // An error means that the caller has stopped waiting.
                    caller.send(body).ok();
                }
            }
        };
        let ended = shared.clone();
        let reader = tokio::spawn(async move {
            tokio::select! {
                () = read_all => {}
                // Its certificate was removed from `members/`, or has become another's.
                () = permission.ended() => {}
            }
            ended.waiting().take();
        });
        let (next, reader) = (AtomicU64::new(1), reader.abort_handle());
        NodeConnection { shared, version, own, next, write: write.into(), reader }
    }

    /// Sends a frame in the caller's task. If the caller is dropped in the middle of a frame, the connection is closed, because
    /// the rest of the frame is missing.
    async fn send(&self, frame: &[u8]) -> Result<(), ConnectionError> {
        let mut write = self.write.lock().await;
        let half_sent = CloseOnDrop(self);
        write.write_all(frame).await.and(write.flush().await).map_err(|_| ConnectionError::Ended)?;
        std::mem::forget(half_sent);
        Ok(())
    }

    /// Whether the connection is open, as far as is known.
    pub fn is_open(&self) -> bool {
        self.shared.waiting().is_some()
    }

    /// The key with which this side has connected; it may have a newer one since.
    pub fn own_key(&self) -> KeyId {
        self.own
    }

    /// When a frame was last received.
    pub fn last_heard(&self) -> Instant {
        *self.shared.last_heard()
    }

    /// Closes the connection; every pending request ends with [`ConnectionError::Ended`].
    pub fn close(&self) {
        self.reader.abort();
        self.shared.waiting().take();
    }

    /// Sends a request, and waits at most `patience` for the answer.
    pub async fn ask<T: DeserializeOwned>(
        &self,
        request: &impl Serialize,
        patience: Duration,
    ) -> Result<T, ConnectionError> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let frame = wire::frame(self.version, number, request)?;
        let (tell, told) = oneshot::channel();
        self.shared.waiting().as_mut().ok_or(ConnectionError::Ended)?.insert(number, tell);
        let forget = PendingGuard { shared: &self.shared, number };
        let answer = tokio::time::timeout(patience, async {
            self.send(&frame).await?;
            told.await.map_err(|_| ConnectionError::Ended)
        });
        let body = answer.await.unwrap_or(Err(ConnectionError::Silent))?;
        drop(forget);
        Ok(wire::decode(self.version, &body)?)
    }
}

/// Closes the connection when it is dropped, unless [`std::mem::forget`] prevents that.
struct CloseOnDrop<'l>(&'l NodeConnection);

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Removes a request from the pending ones when its caller is done or gone, so that unanswered requests do not pile up.
struct PendingGuard<'l> {
    shared: &'l Shared,
    number: u64,
}

impl Drop for PendingGuard<'_> {
    fn drop(&mut self) {
        if let Some(waiting) = self.shared.waiting().as_mut() {
            waiting.remove(&self.number);
        }
    }
}
