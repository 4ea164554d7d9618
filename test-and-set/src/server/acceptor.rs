//! Accepts connections, checks who connects, and answers their requests, all within bounds.
//!
//! A connection that has not completed TLS and its greeting costs little, and there are at most [`GREETINGS_MAX`] of them: one more
//! closes one of the address that has the most ([`PendingPlaces`]). So slow or silent connections never keep out a client that
//! completes its greeting. How many connections a certificate may have is in `quota`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex as PlainMutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, Semaphore};
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tracing::warn;

use crate::keys::{Keys, Permission, Roles, key_id};
use crate::pending::PendingPlaces;
use crate::record::Asker;
use crate::refusal_log::{RefusalLine, RefusalLog};
use crate::server::node::Node;
use crate::server::quota::{ConnectionGrant, ConnectionQuotas, Party};
use crate::wire::{
    self, CLIENT_FRAME_BYTES_MAX, ConnectionRefusal, DataMark, FRAME_BYTES_MAX, NodeId, StoreHello, Welcome,
    WireError,
};

/// The largest number of connections that have not completed their greeting.
pub const GREETINGS_MAX: usize = 192;
/// The largest number of requests of one connection that are answered at once; more wait in the socket.
const REQUESTS_MAX: usize = 64;
const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(5);
/// How long the rest of a frame may take to arrive, and how long the other side may take to accept a response.
const FRAME_PATIENCE: Duration = Duration::from_secs(10);
/// A connection without a request for this long is closed; our clients send one every second.
const IDLE_MAX: Duration = Duration::from_secs(60);

/// Accepts connections for a member; all connections share it.
pub struct StoreAcceptor {
    node: Arc<Node>,
    keys: Arc<Keys>,
    tls: TlsAcceptor,
    quotas: Arc<ConnectionQuotas>,
    refusals: PlainMutex<RefusalLog>,
}

impl StoreAcceptor {
    /// An acceptor for this member.
    pub fn new(node: Arc<Node>, keys: Arc<Keys>, tls: TlsAcceptor) -> Arc<Self> {
        Arc::new(Self { node, keys, tls, quotas: Arc::default(), refusals: PlainMutex::default() })
    }

    /// Accepts connections for ever, and serves each in its own task.
    pub async fn accept(self: Arc<Self>, listener: TcpListener) {
        let mut greeting: PendingPlaces<(AbortHandle, Arc<Greeted>)> = PendingPlaces::new(GREETINGS_MAX);
        loop {
            let (tcp, from) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Most likely there is no free file descriptor: connections that end free theirs.
                    self.refused(format!("cannot accept a connection, trying again: {error}"));
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            greeting.retain(|(task, greeted)| !task.is_finished() && !greeted.is_done());
            let (acceptor, greeted) = (self.clone(), Arc::new(Greeted::default()));
            let task = tokio::spawn(acceptor.serve_counted(tcp, from, greeted.clone()));
            if let (_, Some((closed, _))) = greeting.give(Some(from.ip()), (task.abort_handle(), greeted)) {
                closed.abort();
                self.refused(format!(
                    "closed one of {GREETINGS_MAX} connections that have not completed their greeting: the oldest of the address with the most"
                ));
                self.node.stats.connections_faulty.fetch_add(1, Relaxed);
            }
        }
    }

    fn refusal_log(&self) -> MutexGuard<'_, RefusalLog> {
        self.refusals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Logs a refusal, or counts it and sees to it that the count is logged.
    fn refused(self: &Arc<Self>, why: String) {
        match self.refusal_log().refused(Instant::now()) {
            RefusalLine::Now { left_out: 0 } => warn!("{why}"),
            RefusalLine::Now { left_out } => warn!("{why} ({left_out} more like it since the last line)"),
            RefusalLine::Later(time) => {
                let acceptor = self.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(time).await;
                    if let Some(left_out) = acceptor.refusal_log().report(Instant::now()).checked_sub(1) {
                        warn!("{why} ({left_out} more like it since the last line)");
                    }
                });
            }
            RefusalLine::Counted => {}
        }
    }

    /// Serves a connection, and counts it meanwhile.
    async fn serve_counted(self: Arc<Self>, tcp: TcpStream, from: SocketAddr, greeted: Arc<Greeted>) {
        let _open = CountedConnection::new(&self.node.stats.connections);
        if let Err(error) = self.serve(tcp, &greeted).await
            && !matches!(&error, WireError::Io(e) if e.kind() == std::io::ErrorKind::UnexpectedEof)
        {
            self.refused(format!("closed a connection from {from}: {error}"));
            self.node.stats.connections_faulty.fetch_add(1, Relaxed);
        }
    }

    async fn serve(&self, tcp: TcpStream, greeted: &Greeted) -> Result<(), WireError> {
        tcp.set_nodelay(true)?;
        let handshake = timeout(HANDSHAKE_PATIENCE, self.handshake(tcp)).await;
        let (stream, admission, requester) =
            handshake.map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))??;
        greeted.set_done();
        let (read, write) = tokio::io::split(stream);
        let most = match requester.role {
            RequesterRole::Member(..) => FRAME_BYTES_MAX,
            RequesterRole::Client(_) => CLIENT_FRAME_BYTES_MAX,
        };
        let permission = requester.permission.clone();
        tokio::select! {
            served = self.serve_requests(read, write, most, requester) => served,
            () = permission.ended() => Err(no_longer_accepted()),
            () = admission.evicted() => Err(refused("too many connections of its certificate are open")),
        }
    }

    /// Does the TLS handshake and exchanges greetings. A refusal is sent to the other side before it is returned as an error.
    async fn handshake(
        &self,
        tcp: TcpStream,
    ) -> Result<(TlsStream<TcpStream>, ConnectionGrant, Requester), WireError> {
        // The other side reads its own mark after this.
        let before = self.node.peers.remembered();
        let mut stream = self.tls.accept(tcp).await?;
        let (version, hello) = match wire::read_greeting::<StoreHello>(&mut stream).await {
            Err(error @ WireError::Versions(_)) => {
                // Our versions tell the other side what is wrong.
                wire::write_greeting(&mut stream, &()).await?;
                stream.shutdown().await?;
                return Err(error);
            }
            greeting => greeting?,
        };
        let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        let permission = certificate.map(|certificate| Arc::new(Permission::new(&self.keys, certificate)));
        let admitted = self.admit(&hello, permission.as_deref(), &before);
        let welcome = Welcome {
            cluster: self.node.cluster.clone(),
            id: self.node.id,
            mark: self.node.disk.mark(),
            remembers: hello.member.and_then(|member| self.node.peers.remembered().get(&member.id).copied()),
            refused: admitted.as_ref().err().copied(),
        };
        wire::write_greeting(&mut stream, &welcome).await?;
        match (admitted, permission) {
            (Ok((admission, role)), Some(permission)) => {
                Ok((stream, admission, Requester { role, permission, version }))
            }
            (Ok(_), None) => Err(no_longer_accepted()),
            (Err(reason), permission) => {
                stream.shutdown().await?;
                let key = permission.map_or("none".into(), |p| key_id(p.certificate()).to_string());
                Err(refused(&format!("{reason:?}, its key is {key}")))
            }
        }
    }

    fn admit(
        &self,
        hello: &StoreHello,
        permission: Option<&Permission>,
        before: &BTreeMap<NodeId, DataMark>,
    ) -> Result<(ConnectionGrant, RequesterRole), ConnectionRefusal> {
        if hello.cluster != self.node.cluster {
            return Err(ConnectionRefusal::WrongCluster);
        }
        let permission = permission.ok_or(ConnectionRefusal::NotThatMember)?;
        let own = permission.certificate();
        let Some(member) = &hello.member else {
            let Roles { host, operator, .. } = permission.roles().clone();
            if host.is_none() && operator.is_none() {
                return Err(ConnectionRefusal::NotAClient);
            }
            let grant = self.quotas.admit(own, Party::Client).ok_or(ConnectionRefusal::Busy)?;
            return Ok((grant, RequesterRole::Client(Asker { host, operator })));
        };
        if member.to != self.node.id {
            return Err(ConnectionRefusal::WrongMember);
        }
        if permission.roles().member != Some(member.id) {
            return Err(ConnectionRefusal::NotThatMember);
        }
        // One that was removed and still runs must not make its old data known again.
        if !self.node.raft.may_connect(member.id) {
            return Err(ConnectionRefusal::NotAMember);
        }
        self.node.peers.check(member.id, member.mark, member.remembers.as_ref(), before)?;
        let grant = self.quotas.admit(own, Party::Member(member.id)).ok_or(ConnectionRefusal::Busy)?;
        Ok((grant, RequesterRole::Member(member.id, Mutex::default())))
    }

    /// Reads requests until the connection ends, and answers each in its own task.
    async fn serve_requests(
        &self,
        mut read: ReadHalf<TlsStream<TcpStream>>,
        write: WriteHalf<TlsStream<TcpStream>>,
        most: u32,
        requester: Requester,
    ) -> Result<(), WireError> {
        let (write, permission) = (Mutex::new(write), requester.permission.clone());
        let responses = Arc::new(ResponseWriter { write, permission, broken: AtomicBool::new(false) });
        let (slots, requester) = (Arc::new(Semaphore::new(REQUESTS_MAX)), Arc::new(requester));
        while let Some((number, body)) = next_frame(&mut read, most).await? {
            let Ok(slot) = slots.clone().acquire_owned().await else { break };
            let request = requester.decode(&body)?;
            if responses.broken.load(Relaxed) {
                break;
            }
            if !responses.permission.holds() {
                return Err(no_longer_accepted());
            }
            let (node, requester, responses) = (self.node.clone(), requester.clone(), responses.clone());
            tokio::spawn(async move {
                // A response that cannot be encoded is dropped: the other side runs into its deadline.
                if let Ok(frame) = requester.answer(&node, request, number).await {
                    responses.send(&frame).await;
                }
                drop(slot);
            });
        }
        Ok(())
    }
}

fn refused(why: &str) -> WireError {
    std::io::Error::other(why).into()
}

fn no_longer_accepted() -> WireError {
    refused("its certificate is no longer accepted as before")
}

async fn next_frame(
    read: &mut (impl AsyncRead + Unpin),
    most: u32,
) -> Result<Option<(u64, Vec<u8>)>, WireError> {
    let late = |_| WireError::Io(std::io::ErrorKind::TimedOut.into());
    let Some(length) = timeout(IDLE_MAX, wire::read_length(read, most)).await.map_err(late)?? else {
        return Ok(None);
    };
    timeout(FRAME_PATIENCE, wire::read_rest(read, length)).await.map_err(late)?.map(Some)
}

/// Writes the responses of a connection. Each is written by the task that made it.
struct ResponseWriter {
    write: Mutex<WriteHalf<TlsStream<TcpStream>>>,
    permission: Arc<Permission>,
    broken: AtomicBool,
}

impl ResponseWriter {
    /// Sends a response. After one that fails or takes too long, nothing more is sent, and nothing to somebody who is no longer
    /// accepted, whenever the request came.
    async fn send(&self, frame: &[u8]) {
        let mut write = self.write.lock().await;
        if self.broken.load(Relaxed) || !self.permission.holds() {
            return;
        }
        let written = timeout(FRAME_PATIENCE, async {
            write.write_all(frame).await?;
            write.flush().await
        });
        self.broken.store(!matches!(written.await, Ok(Ok(()))), Relaxed);
    }
}

/// The other end of a connection.
struct Requester {
    role: RequesterRole,
    permission: Arc<Permission>,
    /// The version of the protocol that both sides speak.
    version: u16,
}

/// Who is at the other end of a connection, and the state that belongs to it.
enum RequesterRole {
    /// With the names under which its certificate was known when it connected.
    Client(Asker),
    /// With its number, and the parts of a snapshot that have arrived.
    Member(NodeId, Mutex<Vec<u8>>),
}

enum DecodedRequest {
    Client(wire::StoreRequest),
    Member(wire::PeerAsk),
}

impl Requester {
    fn decode(&self, body: &[u8]) -> Result<DecodedRequest, WireError> {
        Ok(match self.role {
            RequesterRole::Client(_) => DecodedRequest::Client(wire::decode(self.version, body)?),
            RequesterRole::Member(..) => DecodedRequest::Member(wire::decode(self.version, body)?),
        })
    }

    async fn answer(&self, node: &Node, request: DecodedRequest, number: u64) -> Result<Vec<u8>, WireError> {
        match (request, &self.role) {
            (DecodedRequest::Member(ask), RequesterRole::Member(id, parts)) => {
                wire::frame(self.version, number, &node.answer_member(*id, ask, parts).await)
            }
            (DecodedRequest::Client(request), RequesterRole::Client(asker)) => {
                wire::frame(self.version, number, &node.answer(request, asker).await)
            }
            (DecodedRequest::Member(_), RequesterRole::Client(_))
            | (DecodedRequest::Client(_), RequesterRole::Member(..)) => Err(WireError::Tail(0)),
        }
    }
}

/// Whether a connection has completed its greeting.
#[derive(Default)]
struct Greeted(AtomicBool);

impl Greeted {
    fn is_done(&self) -> bool {
        self.0.load(Relaxed)
    }

    fn set_done(&self) {
        self.0.store(true, Relaxed);
    }
}

/// Counts an open connection while it lives.
struct CountedConnection<'c>(&'c AtomicU64);

impl<'c> CountedConnection<'c> {
    fn new(count: &'c AtomicU64) -> Self {
        count.fetch_add(1, Relaxed);
        Self(count)
    }
}

impl Drop for CountedConnection<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}
