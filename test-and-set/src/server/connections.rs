//! The port: accepts connections, judges who they are, and answers what they ask, all within bounds.
//!
//! A stranger costs a TCP connection and a TLS handshake that is not finished. Of these there are at most
//! [`STRANGERS_MAX`], and a new one ends the oldest: so slow strangers never keep a quick friend out.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, Semaphore};
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use crate::keys::Keys;
use crate::server::Node;
use crate::wire::{
    self, CLIENT_FRAME_BYTES_MAX, FRAME_BYTES_MAX, Hello, MemberHello, Unwelcome, Welcome, WireError,
};

/// Connections that have not said yet who they are.
pub const STRANGERS_MAX: usize = 192;
/// Clients that may be connected at once.
pub const CLIENTS_MAX: usize = 512;
/// Questions of one connection that may be under way at once; more wait in the socket.
const QUESTIONS_MAX: usize = 64;
const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(5);
/// A frame that has begun must be there after this time, and an answer must have been taken.
const FRAME_PATIENCE: Duration = Duration::from_secs(10);
/// A connection on which nothing is asked for so long is closed; our clients ask every second.
const IDLE_MAX: Duration = Duration::from_secs(60);

/// What every connection shares.
pub struct Door {
    node: Arc<Node>,
    keys: Arc<Keys>,
    tls: TlsAcceptor,
    clients: Arc<AtomicUsize>,
}

impl Door {
    /// A door to this node.
    pub fn new(node: Arc<Node>, keys: Arc<Keys>, tls: TlsAcceptor) -> Arc<Self> {
        Arc::new(Self { node, keys, tls, clients: Arc::default() })
    }

    /// Accepts connections for ever.
    pub async fn accept(self: Arc<Self>, listener: TcpListener) {
        let mut strangers: VecDeque<(AbortHandle, Arc<Stranger>)> = VecDeque::new();
        loop {
            let tcp = match listener.accept().await {
                Ok((tcp, _)) => tcp,
                Err(error) => {
                    // Out of file descriptors, most likely: those that end give theirs back.
                    eprintln!("a connection cannot be accepted: {error}");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            strangers.retain(|(task, stranger)| !task.is_finished() && !stranger.is_known());
            if strangers.len() >= STRANGERS_MAX
                && let Some((oldest, _)) = strangers.pop_front()
            {
                oldest.abort();
                self.node.stats.connections_faulty.fetch_add(1, Relaxed);
            }
            let (door, stranger) = (self.clone(), Arc::new(Stranger::default()));
            let known = stranger.clone();
            let task = tokio::spawn(async move {
                let _open = Counted::new(&door.node.stats.connections);
                if let Err(error) = door.serve(tcp, &known).await
                    && !matches!(&error, WireError::Io(e) if e.kind() == std::io::ErrorKind::UnexpectedEof)
                {
                    door.node.stats.connections_faulty.fetch_add(1, Relaxed);
                }
            });
            strangers.push_back((task.abort_handle(), stranger));
        }
    }

    async fn serve(&self, tcp: TcpStream, stranger: &Stranger) -> Result<(), WireError> {
        tcp.set_nodelay(true)?;
        let greeted = timeout(HANDSHAKE_PATIENCE, self.greet(tcp)).await;
        let (stream, member) = greeted.map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))??;
        stranger.become_known();
        let (read, write) = tokio::io::split(stream);
        match member {
            Some(_) => self.converse(read, write, FRAME_BYTES_MAX, Asker::Member(Mutex::default())).await,
            None => self.converse(read, write, CLIENT_FRAME_BYTES_MAX, self.client()).await,
        }
    }

    fn client(&self) -> Asker {
        self.clients.fetch_add(1, Relaxed);
        Asker::Client(self.clients.clone())
    }

    /// TLS, then the greetings; a refusal is told before it is an error.
    async fn greet(&self, tcp: TcpStream) -> Result<(TlsStream<TcpStream>, Option<MemberHello>), WireError> {
        let mut stream = self.tls.accept(tcp).await?;
        let hello: Hello = wire::read_greeting(&mut stream).await?;
        let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        let refused = self.judge(&hello, certificate);
        let welcome = Welcome {
            cluster: self.node.cluster.clone(),
            id: self.node.id,
            data: self.node.disk.data(),
            refused,
        };
        wire::write_greeting(&mut stream, &welcome).await?;
        match refused {
            None => Ok((stream, hello.member)),
            Some(reason) => {
                stream.shutdown().await?;
                Err(std::io::Error::other(format!("{reason:?}")).into())
            }
        }
    }

    fn judge(&self, hello: &Hello, certificate: Option<&CertificateDer<'_>>) -> Option<Unwelcome> {
        if hello.cluster != self.node.cluster {
            return Some(Unwelcome::WrongCluster);
        }
        let Some(member) = &hello.member else {
            return (self.clients.load(Relaxed) >= CLIENTS_MAX).then_some(Unwelcome::Busy);
        };
        if member.to != self.node.id {
            return Some(Unwelcome::WrongMember);
        }
        if !certificate.is_some_and(|c| self.keys.is_this_member(member.id, c)) {
            return Some(Unwelcome::NotThatMember);
        }
        (!self.node.peers.data_of.allows(member.id, member.data)).then_some(Unwelcome::DataReplaced)
    }

    /// Reads questions until the connection ends, and answers each in its own task.
    async fn converse(
        &self,
        mut read: ReadHalf<TlsStream<TcpStream>>,
        write: WriteHalf<TlsStream<TcpStream>>,
        most: u32,
        asker: Asker,
    ) -> Result<(), WireError> {
        let answers = Arc::new(Answers { write: Mutex::new(write), broken: AtomicBool::new(false) });
        let (slots, asker) = (Arc::new(Semaphore::new(QUESTIONS_MAX)), Arc::new(asker));
        while let Some((number, body)) = next_frame(&mut read, most).await? {
            let Ok(slot) = slots.clone().acquire_owned().await else { break };
            let question = asker.decode(&body)?;
            if answers.broken.load(Relaxed) {
                break;
            }
            let (node, asker, answers) = (self.node.clone(), asker.clone(), answers.clone());
            tokio::spawn(async move {
                // An answer that cannot be sent goes with its connection.
                if let Ok(frame) = asker.answer(&node, question, number).await {
                    answers.send(&frame).await;
                }
                drop(slot);
            });
        }
        Ok(())
    }
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

/// The way back to the asker. Each answer is written by the task that made it.
struct Answers {
    write: Mutex<WriteHalf<TlsStream<TcpStream>>>,
    broken: AtomicBool,
}

impl Answers {
    /// Sends an answer; if that fails or takes too long, it is the last.
    async fn send(&self, frame: &[u8]) {
        let mut write = self.write.lock().await;
        if self.broken.load(Relaxed) {
            return;
        }
        let written = timeout(FRAME_PATIENCE, async {
            write.write_all(frame).await?;
            write.flush().await
        });
        self.broken.store(!matches!(written.await, Ok(Ok(()))), Relaxed);
    }
}

/// Who is at the other end, and what belongs to its connection.
enum Asker {
    Client(Arc<AtomicUsize>),
    /// With the parts of a snapshot that have come.
    Member(Mutex<Vec<u8>>),
}

impl Drop for Asker {
    fn drop(&mut self) {
        if let Asker::Client(clients) = self {
            clients.fetch_sub(1, Relaxed);
        }
    }
}

enum Question {
    Client(wire::Ask),
    Member(wire::PeerAsk),
}

impl Asker {
    fn decode(&self, body: &[u8]) -> Result<Question, WireError> {
        Ok(match self {
            Asker::Client(_) => Question::Client(wire::decode(body)?),
            Asker::Member(_) => Question::Member(wire::decode(body)?),
        })
    }

    async fn answer(&self, node: &Node, question: Question, number: u64) -> Result<Vec<u8>, WireError> {
        match (question, self) {
            (Question::Member(ask), Asker::Member(parts)) => {
                frame(number, &node.raft.answer(ask, parts).await)
            }
            (Question::Client(ask), _) => frame(number, &node.answer(ask).await),
            (Question::Member(_), Asker::Client(_)) => Err(WireError::Tail(0)),
        }
    }
}

fn frame(number: u64, answer: &impl Serialize) -> Result<Vec<u8>, WireError> {
    wire::frame(number, answer)
}

/// Whether a connection has said who it is.
#[derive(Default)]
struct Stranger(AtomicUsize);

impl Stranger {
    fn is_known(&self) -> bool {
        self.0.load(Relaxed) == 1
    }

    fn become_known(&self) {
        self.0.store(1, Relaxed);
    }
}

/// Counts itself while it lives.
struct Counted<'c>(&'c AtomicU64);

impl<'c> Counted<'c> {
    fn new(count: &'c AtomicU64) -> Self {
        count.fetch_add(1, Relaxed);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}
