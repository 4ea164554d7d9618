//! One TLS connection between the two hosts of a pair. Both certificates are pinned; after the handshake nothing blocks.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant};

use agent::Agent;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection};

/// Bytes that one [`Link::read`] takes at most.
const READ_MAX: usize = 128 << 10;
/// Messages are handed to the socket together until they are so many bytes.
const BATCH: usize = 16 << 10;
/// The socket's send buffer: small, so that a heartbeat is never long behind bulk data.
const SEND_BUFFER: usize = 256 << 10;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The address cannot be used or does not answer.
    #[error("cannot connect: {0}")]
    Connect(io::Error),
    /// The handshake failed: certificates that are not each other's, no TLS 1.3, or garbage.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// The connection broke in the handshake.
    #[error("the handshake broke off: {0}")]
    Broken(io::Error),
    /// The other side took too long.
    #[error("the handshake was not done in time")]
    Slow,
}

/// A connection.
pub struct Link {
    tcp: Arc<TcpStream>,
    tls: Connection,
    /// What the last read took from the socket, and its plaintext.
    taken: Vec<u8>,
    plaintext: Vec<u8>,
}

impl Link {
    /// Connects to the other host.
    ///
    /// # Errors
    /// It does not answer, or is not the peer.
    pub fn connect(address: &str, tls: Arc<ClientConfig>, patience: Duration) -> Result<Link, LinkError> {
        let deadline = Instant::now() + patience;
        let tcp = dial(address, patience).map_err(LinkError::Connect)?;
        // Certificates are pinned, so the name says nothing; TLS wants one.
        let name = ServerName::try_from("vmft").map_err(|e| LinkError::Connect(io::Error::other(e)))?;
        Self::start(tcp, ClientConnection::new(tls, name)?.into(), deadline)
    }

    /// Takes a connection of the other host.
    ///
    /// # Errors
    /// It is not the peer.
    pub fn accept(tcp: TcpStream, tls: Arc<ServerConfig>, patience: Duration) -> Result<Link, LinkError> {
        let deadline = Instant::now() + patience;
        Self::start(tcp, ServerConnection::new(tls)?.into(), deadline)
    }

    fn start(tcp: TcpStream, tls: Connection, deadline: Instant) -> Result<Link, LinkError> {
        tcp.set_nodelay(true).map_err(LinkError::Broken)?;
        let sized = nix::sys::socket::setsockopt(&tcp, nix::sys::socket::sockopt::SndBuf, &SEND_BUFFER);
        sized.map_err(|e| LinkError::Broken(e.into()))?;
        let mut link = Link { tcp: Arc::new(tcp), tls, taken: vec![0; READ_MAX], plaintext: Vec::new() };
        while link.tls.is_handshaking() {
            link.step(deadline)?;
        }
        while link.tls.wants_write() {
            link.step(deadline)?;
        }
        Ok(link)
    }

    /// One blocking read or write, for what comes before the connection is an agent's.
    fn step(&mut self, deadline: Instant) -> Result<(), LinkError> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(LinkError::Slow);
        }
        let timeouts = self.tcp.set_read_timeout(Some(left)).and(self.tcp.set_write_timeout(Some(left)));
        timeouts.map_err(LinkError::Broken)?;
        let moved = if self.tls.wants_write() {
            self.tls.write_tls(&mut &*self.tcp)
        } else {
            self.tls.read_tls(&mut &*self.tcp)
        };
        match moved {
            Ok(0) => return Err(LinkError::Broken(ErrorKind::UnexpectedEof.into())),
            Ok(_) => {}
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                return Err(LinkError::Slow);
            }
            Err(e) => return Err(LinkError::Broken(e)),
        }
        if let Err(e) = self.tls.process_new_packets() {
            // The alert says to the other side what is wrong; it need not arrive.
            self.tls.write_tls(&mut &*self.tcp).ok();
            return Err(e.into());
        }
        Ok(())
    }

    /// Waits for the first bytes of plaintext, before the connection is an agent's.
    ///
    /// # Errors
    /// Nothing came in time.
    pub fn first_bytes(&mut self, deadline: Instant) -> Result<Vec<u8>, LinkError> {
        loop {
            let mut bytes = Vec::new();
            Self::decrypted(&mut self.tls, &mut bytes).map_err(LinkError::Broken)?;
            if !bytes.is_empty() {
                return Ok(bytes);
            }
            self.step(deadline)?;
        }
    }

    /// From now on reads and writes do not wait.
    ///
    /// # Errors
    /// The socket's.
    pub fn set_nonblocking(&self) -> io::Result<()> {
        self.tcp.set_nonblocking(true)
    }

    /// The socket, to wait for it.
    pub fn socket(&self) -> &Arc<TcpStream> {
        &self.tcp
    }

    /// Something encrypted waits for the socket.
    pub fn wants_write(&self) -> bool {
        self.tls.wants_write()
    }

    /// Takes what has come, at most a piece of it; nothing when there is nothing.
    ///
    /// # Errors
    /// The connection has ended or is damaged.
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
            // Behind its goodbye the other side has nothing to say.
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

    /// Writes what the agent has to say, as far as the socket takes it. What is not begun stays with the agent, so that
    /// a heartbeat may still overtake it. Bytes that were begun.
    ///
    /// # Errors
    /// The connection has ended.
    pub fn write(&mut self, agent: &mut Agent) -> io::Result<u64> {
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

    /// Says goodbye, and lets the other side read it: a socket closed with unread bytes would reset the connection.
    pub fn close(mut self) {
        const LINGER: Duration = Duration::from_millis(500);
        self.tls.send_close_notify();
        let said = self.tls.write_tls(&mut &*self.tcp).and_then(|_| self.tcp.shutdown(Shutdown::Write));
        let blocking = said.and_then(|()| self.tcp.set_nonblocking(false));
        if blocking.and_then(|()| self.tcp.set_read_timeout(Some(LINGER))).is_err() {
            return;
        }
        let end = Instant::now() + LINGER;
        let mut rest = [0; 4096];
        while Instant::now() < end && matches!((&*self.tcp).read(&mut rest), Ok(1..)) {}
    }
}

fn dial(address: &str, patience: Duration) -> io::Result<TcpStream> {
    let mut last = io::Error::new(ErrorKind::NotFound, "the name has no address");
    for address in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, patience) {
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

    use test_and_set::keys::{Keys, make_set};
    use test_and_set::tls::{peer_client, peer_server};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    /// Both ends of a connection.
    fn connected() -> (Link, Link) {
        let dir = std::env::temp_dir().join(format!("vmft-link-{}", std::process::id()));
        make_set(&dir, &[], &["a", "b"].map(String::from)).unwrap();
        let [a, b] = ["a", "b"].map(|name| Arc::new(Keys::load(&dir.join(name)).unwrap()));
        std::fs::remove_dir_all(&dir).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let dialled =
            thread::spawn(move || Link::connect(&address, peer_client(&a).unwrap(), PATIENCE).unwrap());
        let accepted =
            Link::accept(listener.accept().unwrap().0, peer_server(&b).unwrap(), PATIENCE).unwrap();
        (dialled.join().unwrap(), accepted)
    }

    #[test]
    fn what_comes_behind_a_goodbye_is_not_read() {
        let (mut leaving, mut staying) = connected();
        leaving.tls.writer().write_all(b"last words").unwrap();
        leaving.tls.send_close_notify();
        while leaving.tls.wants_write() {
            leaving.tls.write_tls(&mut &*leaving.tcp).unwrap();
        }
        (&*leaving.tcp).write_all(&[0; 100_000]).unwrap();
        drop(leaving);
        let (tell, told) = channel();
        thread::spawn(move || {
            let mut words = Vec::new();
            while let Ok(bytes) = staying.read() {
                words.extend_from_slice(bytes);
            }
            tell.send(words)
        });
        assert_eq!(told.recv_timeout(PATIENCE).expect("the end of the connection"), b"last words");
    }
}
