//! One connection to a node of the store: TLS, greeting, then any number of questions at once.

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

use crate::keys::Keys;
use crate::names::ClusterName;
use crate::wire::{self, FRAME_BYTES_MAX, Hello, MemberHello, Unwelcome, Welcome, WireError};

/// Why a connection cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The node cannot be reached, or does not accept our certificate.
    #[error("cannot connect: {0}")]
    Connect(std::io::Error),
    /// The certificates do not fit: copy each side's certificate to the other.
    #[error("the certificates do not fit: {0}")]
    Certificate(std::io::Error),
    /// What was received is not what it should be.
    #[error("{0}")]
    Wire(#[from] WireError),
    /// Another cluster answers at this address.
    #[error("it belongs to cluster {0}: correct the address or the cluster's name")]
    WrongCluster(ClusterName),
    /// Another member answers at this address.
    #[error("member {0} answers there: correct the address")]
    WrongMember(u64),
    /// The node refuses this connection.
    #[error("it refuses: {}", refusal(*.0))]
    Refused(Unwelcome),
    /// The connection has ended; the question may or may not have been done.
    #[error("the connection has ended")]
    Ended,
    /// No answer in time.
    #[error("no answer in time")]
    Silent,
}

fn refusal(reason: Unwelcome) -> &'static str {
    match reason {
        Unwelcome::WrongCluster => "another cluster answers there",
        Unwelcome::WrongMember => "another member answers there",
        Unwelcome::NotThatMember => "the certificate is not that of this member in its members/ directory",
        Unwelcome::DataReplaced => {
            "this member has had another data directory: remove the member and add it anew"
        }
        Unwelcome::Busy => "too many clients are connected",
    }
}

impl LinkError {
    /// Whether trying again is of no use until somebody corrects something.
    pub fn is_lasting(&self) -> bool {
        match self {
            LinkError::Certificate(_) | LinkError::WrongCluster(_) | LinkError::WrongMember(_) => true,
            LinkError::Wire(error) => matches!(error, WireError::Magic(_) | WireError::Version(_)),
            LinkError::Refused(reason) => *reason != Unwelcome::Busy,
            LinkError::Connect(_) | LinkError::Ended | LinkError::Silent => false,
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

/// How to connect: our keys, and whom we expect.
#[derive(Clone)]
pub struct Dialer {
    /// Made by [`crate::tls::connector`].
    pub tls: TlsConnector,
    /// Our keys, which also say whom to accept.
    pub keys: Arc<Keys>,
    /// The cluster that must answer.
    pub cluster: ClusterName,
}

type Waiting = HashMap<u64, oneshot::Sender<Vec<u8>>>;

struct Shared {
    /// `None` once the connection has ended.
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

/// A connection that is ready for questions.
pub struct Link {
    shared: Arc<Shared>,
    next: AtomicU64,
    write: tokio::sync::Mutex<WriteHalf<TlsStream<TcpStream>>>,
    reader: tokio::task::AbortHandle,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.close();
    }
}

impl Dialer {
    /// Connects within `patience`. `member` is how a member introduces itself; `None` for a client.
    pub async fn connect(
        &self,
        address: &str,
        member: Option<MemberHello>,
        patience: Duration,
    ) -> Result<(Link, Welcome), LinkError> {
        tokio::time::timeout(patience, self.connect_patiently(address, member))
            .await
            .unwrap_or(Err(LinkError::Silent))
    }

    async fn connect_patiently(
        &self,
        address: &str,
        member: Option<MemberHello>,
    ) -> Result<(Link, Welcome), LinkError> {
        let tcp = TcpStream::connect(address).await.map_err(LinkError::Connect)?;
        tcp.set_nodelay(true).map_err(LinkError::Connect)?;
        // Certificates are pinned, so the name says nothing; TLS wants one.
        let name =
            ServerName::try_from("vmft-store").map_err(|e| LinkError::Connect(std::io::Error::other(e)))?;
        let mut stream = self.tls.connect(name, tcp).await.map_err(LinkError::from_handshake)?;
        let wanted = member.as_ref().map(|m| m.to);
        wire::write_greeting(&mut stream, &Hello { cluster: self.cluster.clone(), member }).await?;
        let welcome: Welcome = wire::read_greeting(&mut stream).await.map_err(|error| match error {
            // In TLS 1.3 the client's certificate is judged after its handshake is done: the verdict comes as an alert here.
            WireError::Io(io) if io.get_ref().is_some_and(|e| e.is::<rustls::Error>()) => {
                LinkError::from_handshake(io)
            }
            other => other.into(),
        })?;
        if welcome.cluster != self.cluster {
            return Err(LinkError::WrongCluster(welcome.cluster));
        }
        let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        let is_right = certificate.is_some_and(|c| self.keys.is_this_member(welcome.id, c));
        if wanted.is_some_and(|to| to != welcome.id) || !is_right {
            return Err(LinkError::WrongMember(welcome.id));
        }
        match welcome.refused {
            Some(reason) => Err(LinkError::Refused(reason)),
            None => Ok((Link::start(stream), welcome)),
        }
    }
}

impl Link {
    fn start(stream: TlsStream<TcpStream>) -> Self {
        let (mut read, write) = tokio::io::split(stream);
        let shared = Arc::new(Shared {
            waiting: Mutex::new(Some(HashMap::new())),
            last_heard: Mutex::new(Instant::now()),
        });
        let heard = shared.clone();
        let reader = tokio::spawn(async move {
            while let Ok(Some(length)) = wire::read_length(&mut read, FRAME_BYTES_MAX).await
                && let Ok((number, body)) = wire::read_rest(&mut read, length).await
            {
                *heard.last_heard() = Instant::now();
                let asker = heard.waiting().as_mut().and_then(|waiting| waiting.remove(&number));
                if let Some(asker) = asker {
                    // An asker that gave up in the meantime is not an error.
                    asker.send(body).ok();
                }
            }
            heard.waiting().take();
        });
        Link { shared, next: AtomicU64::new(1), write: write.into(), reader: reader.abort_handle() }
    }

    /// Sends a frame at once, without a task in between. An asker that is dropped in the middle of it ends the connection,
    /// because half a frame cannot be taken back.
    async fn send(&self, frame: &[u8]) -> Result<(), LinkError> {
        let mut write = self.write.lock().await;
        let half_sent = CloseOnDrop(self);
        write.write_all(frame).await.and(write.flush().await).map_err(|_| LinkError::Ended)?;
        std::mem::forget(half_sent);
        Ok(())
    }

    /// Whether the connection still stands, as far as is known.
    pub fn is_open(&self) -> bool {
        self.shared.waiting().is_some()
    }

    /// When the other side was last heard.
    pub fn last_heard(&self) -> Instant {
        *self.shared.last_heard()
    }

    /// Ends the connection; every question under way ends with [`LinkError::Ended`].
    pub fn close(&self) {
        self.reader.abort();
        self.shared.waiting().take();
    }

    /// Asks, and waits at most `patience` for the answer.
    pub async fn ask<T: DeserializeOwned>(
        &self,
        ask: &impl Serialize,
        patience: Duration,
    ) -> Result<T, LinkError> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let frame = wire::frame(number, ask)?;
        let (tell, told) = oneshot::channel();
        self.shared.waiting().as_mut().ok_or(LinkError::Ended)?.insert(number, tell);
        let forget = Forget { shared: &self.shared, number };
        let answer = tokio::time::timeout(patience, async {
            self.send(&frame).await?;
            told.await.map_err(|_| LinkError::Ended)
        });
        let body = answer.await.unwrap_or(Err(LinkError::Silent))?;
        drop(forget);
        Ok(wire::decode(&body)?)
    }
}

/// Ends the connection unless it is forgotten.
struct CloseOnDrop<'l>(&'l Link);

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Takes a question off the list when its asker has gone, so that lost answers leave nothing behind.
struct Forget<'l> {
    shared: &'l Shared,
    number: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        if let Some(waiting) = self.shared.waiting().as_mut() {
            waiting.remove(&self.number);
        }
    }
}
