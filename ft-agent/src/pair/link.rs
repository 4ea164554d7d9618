//! The TLS connection between the two hosts of a pair. Both certificates are pinned. After the handshake
//! nothing blocks.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use agent::{Agent, Role};
use rustls::pki_types::ServerName;
use rustls::{CertificateError, ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection};
use test_and_set::keys::{Keys, OwnKey, key_id};

use super::link_keys::{KeyCheck, LinkKeys};

/// The most bytes that one [`PeerLink::read`] takes from the socket.
const READ_MAX: usize = 128 << 10;
/// Messages are encrypted and written together until they make up this many bytes.
const BATCH: usize = 16 << 10;
/// Size of the socket's send buffer: small, so that a heartbeat never waits long for bulk data sent before
/// it.
const SEND_BUFFER: usize = 256 << 10;

/// The label under which a value is exported that a new key signs.
const EXPORT_LABEL: &[u8] = b"EXPORTER-vmft-key";

/// Why a connection could not be made.
#[derive(Debug, thiserror::Error)]
pub enum PeerLinkError {
    /// The address is invalid, or nothing answers there.
    #[error("cannot connect: {0}")]
    Connect(io::Error),
    /// The handshake failed: a certificate that is not the peer's, no TLS 1.3, or data that is not TLS.
    #[error("the TLS handshake failed: {0}; check that each host has the other's certificate in peers/")]
    Tls(#[from] rustls::Error),
    /// Both hosts have the same keys, so that neither can be told from the other.
    #[error("own.crt is the peer's certificate; give each host keys of its own")]
    SameCertificate,
    /// The connection broke during the handshake.
    #[error("the connection broke during the handshake: {0}")]
    Broken(io::Error),
    /// The other side took too long.
    #[error("the handshake was not finished in time")]
    Slow,
}

/// A connection to the peer.
pub struct PeerLink {
    tcp: Arc<TcpStream>,
    tls: Connection,
    /// The keys by which the two sides know each other.
    pub keys: LinkKeys,
    /// The bytes that the last read took from the socket.
    taken: Vec<u8>,
    /// The plaintext of the last read.
    plaintext: Vec<u8>,
}

impl PeerLink {
    /// Connects to the other host, which has these addresses. `keys` are this host's.
    ///
    /// # Errors
    /// The host does not answer, or is not the peer.
    pub fn connect(
        addresses: &[SocketAddr],
        tls: Arc<ClientConfig>,
        keys: &Keys,
        patience: Duration,
    ) -> Result<PeerLink, PeerLinkError> {
        let deadline = Instant::now() + patience;
        let tcp = dial(addresses, patience).map_err(PeerLinkError::Connect)?;
        // The certificates are pinned, so the name means nothing, but TLS requires one.
        let name = ServerName::try_from("vmft").map_err(|e| PeerLinkError::Connect(io::Error::other(e)))?;
        Self::handshake(tcp, ClientConnection::new(tls, name)?.into(), keys, deadline)
    }

    /// Accepts a connection of the other host. `keys` are this host's.
    ///
    /// # Errors
    /// The host is not the peer.
    pub fn accept(
        tcp: TcpStream,
        tls: Arc<ServerConfig>,
        keys: &Keys,
        patience: Duration,
    ) -> Result<PeerLink, PeerLinkError> {
        let deadline = Instant::now() + patience;
        Self::handshake(tcp, ServerConnection::new(tls)?.into(), keys, deadline)
    }

    fn handshake(
        tcp: TcpStream,
        mut tls: Connection,
        keys: &Keys,
        deadline: Instant,
    ) -> Result<PeerLink, PeerLinkError> {
        let own = keys.own();
        tcp.set_nodelay(true).map_err(PeerLinkError::Broken)?;
        let sized = nix::sys::socket::setsockopt(&tcp, nix::sys::socket::sockopt::SndBuf, &SEND_BUFFER);
        sized.map_err(|e| PeerLinkError::Broken(e.into()))?;
        while tls.is_handshaking() || tls.wants_write() {
            blocking_step(&tcp, &mut tls, deadline)?;
        }
        let certificates = tls.peer_certificates().unwrap_or_default();
        let peer = certificates.first().ok_or(rustls::Error::NoCertificatesPresented)?.clone().into_owned();
        if peer == *own.certificate() {
            return Err(PeerLinkError::SameCertificate);
        }
        let refused = rustls::Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure);
        let keys = LinkKeys::new(keys, &own, peer).ok_or(refused)?;
        let (taken, plaintext) = (vec![0; READ_MAX], Vec::new());
        Ok(PeerLink { tcp: Arc::new(tcp), tls, keys, taken, plaintext })
    }

    /// Begins a check of the two sides' keys. `own` is this side's key, and `role` its role.
    pub fn begin_key_check(&mut self, role: Role, own: &Arc<OwnKey>) -> KeyCheck {
        let tls = &self.tls;
        self.keys.begin_check(role, own, |role, certificate| {
            let mut context = vec![matches!(role, Role::Backup) as u8];
            context.extend(key_id(certificate).0);
            tls.export_keying_material([0; 32], EXPORT_LABEL, Some(&context)).ok()
        })
    }

    /// Waits for the next bytes of plaintext. Used before the agent has the connection.
    ///
    /// # Errors
    /// Nothing arrives before the deadline, or the connection breaks.
    pub fn wait_for_bytes(&mut self, deadline: Instant) -> Result<Vec<u8>, PeerLinkError> {
        loop {
            let mut bytes = Vec::new();
            Self::decrypted(&mut self.tls, &mut bytes).map_err(PeerLinkError::Broken)?;
            if !bytes.is_empty() {
                return Ok(bytes);
            }
            blocking_step(&self.tcp, &mut self.tls, deadline)?;
        }
    }

    /// Makes reads and writes return at once from now on.
    ///
    /// # Errors
    /// The mode of the socket cannot be changed.
    pub fn set_nonblocking(&self) -> io::Result<()> {
        self.tcp.set_nonblocking(true)
    }

    /// The socket, to wait for it to become readable or writable.
    pub fn socket(&self) -> &Arc<TcpStream> {
        &self.tcp
    }

    /// Whether encrypted bytes wait to be written to the socket.
    pub fn wants_write(&self) -> bool {
        self.tls.wants_write()
    }

    /// Reads what has arrived, up to 128 KiB at a time; returns no bytes if nothing has.
    ///
    /// # Errors
    /// The connection has ended, or the data is not valid TLS.
    pub fn read(&mut self) -> io::Result<&[u8]> {
        self.plaintext.clear();
        let n = match (&*self.tcp).read(&mut self.taken) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(n) => n,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return Ok(&[]),
            Err(e) => return Err(e),
        };
        let mut taken = &self.taken[..n];
        while !taken.is_empty() {
            // After its close notification the other side sends nothing more.
            if self.tls.read_tls(&mut taken)? == 0 {
                break;
            }
            self.tls.process_new_packets().map_err(io::Error::other)?;
            Self::decrypted(&mut self.tls, &mut self.plaintext)?;
        }
        Ok(&self.plaintext)
    }

    fn decrypted(tls: &mut Connection, into: &mut Vec<u8>) -> io::Result<()> {
        match tls.reader().read_to_end(into) {
            Ok(_) => Ok(()),
            Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// Writes the agent's outgoing bytes, as far as the socket takes them. Messages of which nothing was written stay
    /// with the agent, so that a heartbeat can still overtake them. Returns how many bytes were taken from
    /// the agent.
    ///
    /// # Errors
    /// The connection has ended.
    pub fn write_from(&mut self, agent: &mut Agent) -> io::Result<u64> {
        let mut begun = 0;
        loop {
            while self.tls.wants_write() {
                match self.tls.write_tls(&mut &*self.tcp) {
                    Ok(_) => {}
                    Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(begun),
                    Err(e) if e.kind() == ErrorKind::Interrupted => {}
                    Err(e) => return Err(e),
                }
            }
            let mut batch = 0;
            while batch < BATCH && !agent.outgoing().is_empty() {
                let taken = self.tls.writer().write(agent.outgoing())?;
                agent.wrote(taken);
                batch += taken;
                if taken == 0 {
                    break;
                }
            }
            if batch == 0 {
                return Ok(begun);
            }
            begun += batch as u64;
        }
    }

    /// Sends a last message on a connection that the agent never had, and closes it.
    pub fn close_with(mut self, message: &[u8], deadline: Instant) {
        // If the message cannot be sent, the other side sees only the end of the connection.
        if self.tls.writer().write_all(message).is_ok() {
            while self.tls.wants_write() && blocking_step(&self.tcp, &mut self.tls, deadline).is_ok() {}
        }
        self.close();
    }

    /// Closes the connection. Reads for up to half a second what the other side still sends: closing a socket
    /// that has unread bytes would reset the connection, and the other side could lose the last messages.
    pub fn close(mut self) {
        const LINGER: Duration = Duration::from_millis(500);
        self.tls.send_close_notify();
        let sent = self.tls.write_tls(&mut &*self.tcp).and_then(|_| self.tcp.shutdown(Shutdown::Write));
        let blocking = sent.and_then(|()| self.tcp.set_nonblocking(false));
        if blocking.and_then(|()| self.tcp.set_read_timeout(Some(LINGER))).is_err() {
            return;
        }
        let end = Instant::now() + LINGER;
        let mut rest = [0; 4096];
        while Instant::now() < end && matches!((&*self.tcp).read(&mut rest), Ok(1..)) {}
    }
}

/// Does one blocking read or write. Used before the agent has the connection.
fn blocking_step(mut tcp: &TcpStream, tls: &mut Connection, deadline: Instant) -> Result<(), PeerLinkError> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(PeerLinkError::Slow);
    }
    let timeouts = tcp.set_read_timeout(Some(left)).and(tcp.set_write_timeout(Some(left)));
    timeouts.map_err(PeerLinkError::Broken)?;
    let moved = if tls.wants_write() { tls.write_tls(&mut tcp) } else { tls.read_tls(&mut tcp) };
    match moved {
        Ok(0) => return Err(PeerLinkError::Broken(ErrorKind::UnexpectedEof.into())),
        Ok(_) => {}
        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
            return Err(PeerLinkError::Slow);
        }
        Err(e) => return Err(PeerLinkError::Broken(e)),
    }
    if let Err(e) = tls.process_new_packets() {
        // The alert tells the other side what is wrong; it does not matter if it does not arrive.
        tls.write_tls(&mut tcp).ok();
        return Err(e.into());
    }
    Ok(())
}

fn dial(addresses: &[SocketAddr], patience: Duration) -> io::Result<TcpStream> {
    let mut last = io::Error::new(ErrorKind::NotFound, "the host name has no address");
    for address in addresses {
        match TcpStream::connect_timeout(address, patience) {
            Ok(tcp) => return Ok(tcp),
            Err(e) => last = e,
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::sync::mpsc::channel;
    use std::thread;

    use test_and_set::keys::make_set;
    use test_and_set::tls::{peer_client, peer_server};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    type Ends = [Result<PeerLink, PeerLinkError>; 2];

    /// Both ends of a connection between hosts with these keys: the one that connects, and the one that accepts.
    fn connect(test: &str, names: [&str; 2]) -> Ends {
        let dir = std::env::temp_dir().join(format!("vmft-link-{test}-{}", std::process::id()));
        make_set(&dir, &[], &["a", "b"].map(String::from), &[]).unwrap();
        let [a, b] = names.map(|name| Arc::new(Keys::load(&dir.join(name)).unwrap()));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = [listener.local_addr().unwrap()];
        let dialled =
            thread::spawn(move || PeerLink::connect(&address, peer_client(&a).unwrap(), &a, PATIENCE));
        let tcp = listener.accept().unwrap().0;
        let accepted = PeerLink::accept(tcp, peer_server(&b).unwrap(), &b, PATIENCE);
        let dialled = dialled.join().unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
        [dialled, accepted]
    }

    #[test]
    fn hosts_with_the_same_keys_are_refused_on_both_sides_with_the_reason() {
        for end in connect("same", ["a", "a"]) {
            let refused = end.err().expect("refused").to_string();
            assert!(refused.contains("own.crt is the peer's certificate"), "{refused}");
        }
        let [dialled, accepted] = connect("different", ["a", "b"]).map(Result::unwrap);
        assert_ne!(dialled.keys.peer(), accepted.keys.peer());
    }

    #[test]
    fn bytes_after_the_close_notification_are_not_read() {
        let [mut leaving, mut staying] = connect("close", ["a", "b"]).map(Result::unwrap);
        leaving.tls.writer().write_all(b"last words").unwrap();
        leaving.tls.send_close_notify();
        while leaving.tls.wants_write() {
            leaving.tls.write_tls(&mut &*leaving.tcp).unwrap();
        }
        (&*leaving.tcp).write_all(&[0; 100_000]).unwrap();
        drop(leaving);
        let (sender, received) = channel();
        thread::spawn(move || {
            let mut words = Vec::new();
            while let Ok(bytes) = staying.read() {
                words.extend_from_slice(bytes);
            }
            sender.send(words)
        });
        assert_eq!(received.recv_timeout(PATIENCE).expect("the end of the connection"), b"last words");
    }
}
