//! The peer acceptor of a backup: accepts connections, and lets in the first peer that says hello.

use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use agent::Hello;
use logging_channel::message::{Message, encode};
use logging_channel::stream::MessageReader;
use logging_channel::versions::OURS;
use rustls::ServerConfig;
use test_and_set::blocking::BlockingStore;
use test_and_set::keys::Keys;
use test_and_set::names::VmName;
use test_and_set::store::chain;
use tracing::{debug, info};

use super::admission::{Admission, AdmissionTicket};
use super::hosts;
use super::link::PeerLink;
use super::replica::Replica;
use super::report::role_name;
use super::side::PairSide;
use crate::error::Error;
use crate::service;

/// How long a peer may take for the TLS handshake and its hello.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the store may take for each of two answers about the peer's host.
const STORE_PATIENCE: Duration = Duration::from_secs(1);
/// How many handshakes may run at one time; the oldest is closed if there are more.
const HANDSHAKES_MAX: usize = 16;

/// A peer that has said hello.
pub struct IncomingPeer {
    /// The connection.
    pub link: PeerLink,
    /// Its hello.
    pub hello: Hello,
    /// All bytes that were read from the connection. They begin with the hello.
    pub bytes: Vec<u8>,
}

/// Accepts connections on a thread of its own. A peer that says hello while there is a replica is reported to
/// the replica as a stranger, and refused.
pub struct PeerAcceptor {
    tls: Arc<ServerConfig>,
    keys: Arc<Keys>,
    store: BlockingStore,
    vm: VmName,
    replica: Mutex<Option<Arc<Replica>>>,
    /// `None` once this backup is to end.
    peers: Mutex<Option<SyncSender<IncomingPeer>>>,
}

impl PeerAcceptor {
    /// Starts to accept connections; the receiver gets the peers that are let in.
    ///
    /// # Errors
    /// The keys cannot be used, or the process cannot listen on the address.
    pub fn start(side: &PairSide) -> Result<(Arc<PeerAcceptor>, Receiver<IncomingPeer>), Error> {
        let tls = test_and_set::tls::peer_server(&side.keys).map_err(|e| Error::config("keys", chain(&e)))?;
        let address = side.plan.listen;
        let address =
            address.ok_or_else(|| Error::config("listen", "a backup needs --listen ADDRESS:PORT"))?;
        let unusable = Error::host(format!("cannot listen on {address} for the primary"));
        let listener = TcpListener::bind(address).map_err(unusable)?;
        let (peers, incoming) = sync_channel(0);
        let (keys, store, vm) = (side.keys.clone(), side.store.clone(), side.plan.name.clone());
        let acceptor =
            PeerAcceptor { tls, keys, store, vm, replica: Mutex::default(), peers: Some(peers).into() };
        let acceptor = Arc::new(acceptor);
        let accepting = acceptor.clone();
        let accept = move || {
            let accepting = accepting.clone();
            Admission::new("channel", HANDSHAKES_MAX)
                .accept_all(&listener, move |tcp, ticket| accepting.let_in(tcp, ticket))
        };
        service::start("acceptor", accept)?;
        info!(%address, "waiting for a primary");
        Ok((acceptor, incoming))
    }

    /// The replica of the peer that was let in.
    pub fn replica(&self) -> Option<Arc<Replica>> {
        self.replica.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Sets the replica of the peer that was let in. `None`: the next peer is let in.
    pub fn set_replica(&self, replica: Option<Arc<Replica>>) {
        *self.replica.lock().unwrap_or_else(PoisonError::into_inner) = replica;
    }

    /// Lets in nobody any more: the receiver of the peers is told that this is the end.
    pub fn stop(&self) {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Lets in the peer on a connection, or tells it why it is refused, and returns that. Handshake and hello together
    /// take [`PATIENCE`] at most.
    fn let_in(&self, tcp: TcpStream, ticket: AdmissionTicket<TcpStream>) -> Result<(), String> {
        let deadline = Instant::now() + PATIENCE;
        let mut link =
            PeerLink::accept(tcp, self.tls.clone(), &self.keys, PATIENCE).map_err(|e| e.to_string())?;
        let (hello, bytes) = match read_hello(&mut link, deadline) {
            Ok(greeting) => greeting,
            Err(refusal) => return Err(tell_refusal(link, refusal)),
        };
        let peer = IncomingPeer { link, hello, bytes };
        let wrong_host = if self.replica().is_none() { self.check_host(&peer.link).err() } else { None };
        drop(ticket);
        if let Some(refusal) = wrong_host.or_else(|| self.occupied(&peer)) {
            return Err(tell_refusal(peer.link, refusal));
        }
        let peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(peers) = peers else {
            return Err(tell_refusal(peer.link, "this backup was told to end".into()));
        };
        peers.try_send(peer).map_err(|refused| {
            let (TrySendError::Full(peer) | TrySendError::Disconnected(peer)) = refused;
            tell_refusal(peer.link, "another primary called at the same time".into())
        })
    }

    /// Reports a peer to the replica, if there is one, and returns that this backup has a primary.
    fn occupied(&self, peer: &IncomingPeer) -> Option<String> {
        self.replica()?.stranger_called(&peer.hello, peer.link.keys.peer());
        let (role, vm) = (role_name(peer.hello.role), &peer.hello.vm);
        Some(format!("a {role} of VM {vm:?} called, but this backup has a primary already"))
    }

    /// Refuses a host that may not run this VM, before it can keep a primary out that may. Without an answer
    /// from the store the peer is let in: it cannot open the pair without one.
    fn check_host(&self, link: &PeerLink) -> Result<(), String> {
        let refusal = self.store.get(&self.vm, STORE_PATIENCE).and_then(|record| {
            hosts::refusal(&self.store, record.as_ref(), link.keys.peer(), STORE_PATIENCE)
        });
        match refusal {
            Ok(None) => Ok(()),
            Ok(Some(refusal)) => Err(format!("a host called that may not run VM {}: {refusal}", self.vm)),
            Err(e) => {
                debug!("cannot ask the store whether the peer's host may run this VM: {}", chain(&e));
                Ok(())
            }
        }
    }
}

/// Tells a peer why it is refused, closes its connection, and returns the reason.
fn tell_refusal(link: PeerLink, refusal: String) -> String {
    let mut told = Vec::new();
    encode(OURS.oldest, &Message::Failed { reason: refusal.clone() }, &mut told);
    link.close_with(&told, Instant::now() + PATIENCE);
    refusal
}

/// Reads the hello. Returns it, and all bytes that were read.
fn read_hello(link: &mut PeerLink, deadline: Instant) -> Result<(Hello, Vec<u8>), String> {
    let (mut messages, mut bytes) = (MessageReader::new(), Vec::new());
    loop {
        let more = link.wait_for_bytes(deadline).map_err(|e| e.to_string())?;
        messages.push(&more);
        bytes.extend(more);
        match messages.next_message() {
            Ok(Some(Message::Hello(hello))) => return Ok((*hello, bytes)),
            // Nothing else than a failure may come in place of a hello.
            Ok(Some(other)) => {
                return Err(format!("the other side sent {:?} in place of a hello", other.name()));
            }
            Ok(None) => {}
            Err(e) => return Err(e.to_string()),
        }
    }
}
