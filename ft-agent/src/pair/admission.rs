//! Admission to a port: a bounded number of connections that have not yet shown who they are or what they want,
//! each for a bounded time. If there are too many, one is closed in favour of the newest ([`PendingPlaces`] says
//! which), so that silent clients keep nobody out. Refusals are logged at a bounded rate.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use test_and_set::pending::PendingPlaces;
use test_and_set::refusal_log::{RefusalLine, RefusalLog};
use tracing::warn;

use crate::failpoint;

/// How long a new connection waits for the threads of those that were closed for it.
const GRACE: Duration = Duration::from_secs(1);
/// How long the acceptor pauses when the system cannot give it a connection.
const PAUSE: Duration = Duration::from_millis(100);

/// A socket that can be bounded in time, and closed from another thread.
pub trait AdmittedStream: Read + Write + Send + Sized + 'static {
    /// Another handle of the same socket.
    ///
    /// # Errors
    /// The process has too many files open.
    fn duplicate(&self) -> io::Result<Self>;

    /// How long a single read or write may take.
    ///
    /// # Errors
    /// `time` is zero.
    fn set_timeouts(&self, time: Duration) -> io::Result<()>;

    /// Ends the connection for all handles.
    fn disconnect(&self);
}

/// A socket that takes connections.
pub trait ListeningPort {
    /// Its connections.
    type Stream: AdmittedStream;

    /// Waits for the next connection. Returns it, and where it comes from, unless that is this host.
    ///
    /// # Errors
    /// The system cannot give one at the moment.
    fn next_connection(&self) -> io::Result<(Self::Stream, Option<SocketAddr>)>;
}

macro_rules! admitted_stream {
    ($stream:ty, $listener:ty, $from:expr) => {
        impl AdmittedStream for $stream {
            fn duplicate(&self) -> io::Result<Self> {
                self.try_clone()
            }

            fn set_timeouts(&self, time: Duration) -> io::Result<()> {
                self.set_read_timeout(Some(time)).and(self.set_write_timeout(Some(time)))
            }

            fn disconnect(&self) {
                // This fails if the connection has ended already.
                self.shutdown(Shutdown::Both).ok();
            }
        }

        impl ListeningPort for $listener {
            type Stream = $stream;

            fn next_connection(&self) -> io::Result<(Self::Stream, Option<SocketAddr>)> {
                self.accept().map(|(stream, address)| (stream, $from(address)))
            }
        }
    };
}

admitted_stream!(TcpStream, TcpListener, Some);
admitted_stream!(UnixStream, UnixListener, |_| None);

/// A stream whose reads and writes together may take until a deadline.
pub struct TimedStream<S> {
    /// The stream.
    stream: S,
    /// The deadline.
    deadline: Instant,
}

impl<S: AdmittedStream> TimedStream<S> {
    /// Bounds a stream.
    pub fn new(stream: S, time: Duration) -> TimedStream<S> {
        TimedStream { stream, deadline: Instant::now() + time }
    }

    /// Sets the timeouts of the next read or write.
    fn bound_next(&self) -> io::Result<()> {
        match self.deadline.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(ErrorKind::TimedOut.into()),
            left => self.stream.set_timeouts(left),
        }
    }
}

impl<S: AdmittedStream> Read for TimedStream<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.bound_next()?;
        self.stream.read(buffer)
    }
}

impl<S: AdmittedStream> Write for TimedStream<S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bound_next()?;
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// A connection that has not shown who it is.
struct PendingConnection<S> {
    stream: S,
    evicted: Arc<AtomicBool>,
}

struct PendingConnections<S> {
    places: PendingPlaces<PendingConnection<S>>,
    /// Tickets that exist, also of connections that were closed.
    tickets: usize,
    log: RefusalLog,
}

/// The connections to one port that have not yet shown who they are.
pub struct Admission<S> {
    /// What the port is for, in log messages.
    port: &'static str,
    limit: usize,
    pending: Mutex<PendingConnections<S>>,
    ticket_returned: Condvar,
}

/// A connection's place among those that have not yet shown who they are. The connection may be closed as long
/// as this exists.
pub struct AdmissionTicket<S> {
    admission: Arc<Admission<S>>,
    number: u64,
    evicted: Arc<AtomicBool>,
}

impl<S> Drop for AdmissionTicket<S> {
    fn drop(&mut self) {
        let mut pending = self.admission.lock();
        pending.places.take_back(self.number);
        pending.tickets -= 1;
        drop(pending);
        self.admission.ticket_returned.notify_all();
    }
}

impl<S> Admission<S> {
    /// Admission to a port. `limit` connections may be pending.
    pub fn new(port: &'static str, limit: usize) -> Arc<Admission<S>> {
        let (places, log) = (PendingPlaces::new(limit), RefusalLog::default());
        let pending = PendingConnections { places, tickets: 0, log };
        Arc::new(Admission { port, limit, pending: pending.into(), ticket_returned: Condvar::new() })
    }

    fn lock(&self) -> MutexGuard<'_, PendingConnections<S>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Logs a refusal, or counts it. May wait to report what others left out.
    fn refused(&self, from: &str, why: &str) {
        let line = self.lock().log.refused(Instant::now());
        match line {
            RefusalLine::Now { left_out: 0 } => warn!(%from, "{}: connection refused: {why}", self.port),
            RefusalLine::Now { left_out } => {
                warn!(%from, left_out, "{}: connection refused: {why}", self.port)
            }
            RefusalLine::Later(time) => {
                std::thread::sleep(time);
                let count = self.lock().log.report(Instant::now());
                if let Some(left_out) = count.checked_sub(1) {
                    warn!(%from, left_out, "{}: connection refused: {why}", self.port);
                }
            }
            RefusalLine::Counted => {}
        }
    }
}

impl<S: AdmittedStream> Admission<S> {
    /// Admits a connection. If there are too many, closes another one.
    fn admit(self: &Arc<Self>, stream: &S, from: Option<SocketAddr>) -> io::Result<AdmissionTicket<S>> {
        let stream = stream.duplicate()?;
        let evicted = Arc::new(AtomicBool::new(false));
        let connection = PendingConnection { stream, evicted: evicted.clone() };
        let mut pending = self.lock();
        let (number, closed) = pending.places.give(from.map(|from| from.ip()), connection);
        if let Some(closed) = closed {
            closed.evicted.store(true, Ordering::Release);
            closed.stream.disconnect();
        }
        pending.tickets += 1;
        // A connection that was closed has a thread until that has noticed.
        let many = |pending: &mut PendingConnections<S>| pending.tickets > 2 * self.limit;
        drop(self.ticket_returned.wait_timeout_while(pending, GRACE, many));
        Ok(AdmissionTicket { admission: self.clone(), number, evicted })
    }

    /// Accepts connections for ever. `serve` has a connection on a thread of its own, drops the ticket as soon as
    /// it knows whom or what the connection is for, and returns why it refuses the connection.
    pub fn accept_all<L: ListeningPort<Stream = S>>(
        self: &Arc<Self>,
        listener: &L,
        serve: impl Fn(S, AdmissionTicket<S>) -> Result<(), String> + Send + Sync + 'static,
    ) {
        let serve = Arc::new(serve);
        loop {
            let admitted = listener.next_connection().and_then(|(stream, from)| {
                failpoint::panic(self.port);
                let ticket = self.admit(&stream, from)?;
                let (admission, serve) = (self.clone(), serve.clone());
                let from = from.map_or("a process on this host".into(), |from| from.to_string());
                let thread = std::thread::Builder::new().name(self.port.into());
                thread.spawn(move || admission.serve_one(&from, stream, ticket, &*serve))
            });
            // Too many files or threads: those that are open have to end first.
            if let Err(e) = admitted {
                if let RefusalLine::Now { left_out } = self.lock().log.refused(Instant::now()) {
                    warn!(left_out, "{}: cannot accept a connection: {e}", self.port);
                }
                std::thread::sleep(PAUSE);
            }
        }
    }

    fn serve_one(
        &self,
        from: &str,
        stream: S,
        ticket: AdmissionTicket<S>,
        serve: &impl Fn(S, AdmissionTicket<S>) -> Result<(), String>,
    ) {
        let evicted = ticket.evicted.clone();
        match serve(stream, ticket) {
            _ if evicted.load(Ordering::Acquire) => {
                let limit = self.limit;
                let why = format!(
                    "{limit} had not said who they are and more came, and it was the oldest of the address with the most"
                );
                self.refused(from, &why);
            }
            Err(why) => self.refused(from, &why),
            Ok(()) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// A port whose connections have to send one byte. Returns its address, and who has sent one.
    fn port(limit: usize, time: Duration) -> (SocketAddr, std::sync::mpsc::Receiver<u8>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, served) = channel();
        std::thread::spawn(move || {
            Admission::new("test", limit).accept_all(&listener, move |stream, ticket| {
                let mut byte = [0];
                let read = TimedStream::new(stream, time).read_exact(&mut byte);
                drop(ticket);
                read.and_then(|()| sender.send(byte[0]).map_err(io::Error::other)).map_err(|e| e.to_string())
            })
        });
        (address, served)
    }

    /// Whether the other side has closed a connection.
    fn is_closed(mut tcp: &TcpStream) -> bool {
        tcp.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        !matches!(tcp.read(&mut [0]), Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut))
    }

    #[test]
    fn the_oldest_silent_connection_is_closed_for_the_newest() {
        let (address, served) = port(4, 60 * SECOND);
        let connect = || TcpStream::connect(address).unwrap();
        let silent: Vec<_> = (0..20).map(|_| connect()).collect();
        connect().write_all(&[7]).unwrap();
        assert_eq!(served.recv_timeout(10 * SECOND), Ok(7));
        assert!(silent[..16].iter().all(is_closed));
        // The newest are still there, and may speak.
        for (n, mut tcp) in silent[17..].iter().enumerate() {
            assert!(!is_closed(tcp));
            tcp.write_all(&[n as u8]).unwrap();
            assert_eq!(served.recv_timeout(10 * SECOND), Ok(n as u8));
        }
    }

    #[test]
    fn all_reads_together_are_bounded_in_time() {
        let (mut near, far) = UnixStream::pair().unwrap();
        let slow = std::thread::spawn(move || {
            while near.write_all(b"x").is_ok() {
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let begin = Instant::now();
        let mut far = TimedStream::new(far, Duration::from_millis(200));
        let mut text = Vec::new();
        let ended = far.read_to_end(&mut text).unwrap_err();
        assert!(matches!(ended.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{ended}");
        assert!(begin.elapsed() < 10 * SECOND && !text.is_empty());
        drop(far);
        slow.join().unwrap();
    }
}
