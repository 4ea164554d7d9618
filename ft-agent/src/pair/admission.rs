//! Admission to a port: a bounded number of connections that have not yet shown who they are or what they want,
//! each for a bounded time. If there are too many, the oldest is closed in favour of the newest, so that silent
//! clients keep nobody out. Refusals are logged at a bounded rate.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing::warn;

/// Time between two refusals in the log.
const LOG_INTERVAL: Duration = Duration::from_secs(1);
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

    /// Waits for the next connection. Returns it, and where it comes from.
    ///
    /// # Errors
    /// The system cannot give one at the moment.
    fn next_connection(&self) -> io::Result<(Self::Stream, String)>;
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

            fn next_connection(&self) -> io::Result<(Self::Stream, String)> {
                self.accept().map(|(stream, address)| (stream, $from(address)))
            }
        }
    };
}

admitted_stream!(TcpStream, TcpListener, |address: std::net::SocketAddr| address.to_string());
admitted_stream!(UnixStream, UnixListener, |_| "a process on this host".to_owned());

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

/// Whether a refusal is logged.
#[derive(Debug, PartialEq, Eq)]
enum RefusalLine {
    /// Now, with the number of refusals that were left out since the last line.
    Now { left_out: u64 },
    /// It is counted. Somebody should report it after this time.
    Later(Duration),
    /// It is counted, and somebody will report it already.
    Counted,
}

/// Decides which refusals are logged: one in [`LOG_INTERVAL`], with the number of the others.
#[derive(Debug, Default)]
struct RefusalLog {
    logged_at: Option<Instant>,
    left_out: u64,
    /// A thread waits, to report those that were left out.
    has_reporter: bool,
}

impl RefusalLog {
    fn refused(&mut self, now: Instant) -> RefusalLine {
        let next = self.logged_at.map(|at| at + LOG_INTERVAL).filter(|next| *next > now);
        let Some(next) = next else {
            self.logged_at = Some(now);
            return RefusalLine::Now { left_out: std::mem::take(&mut self.left_out) };
        };
        self.left_out += 1;
        match self.has_reporter {
            false => RefusalLine::Later(next - now),
            true => RefusalLine::Counted,
        }
    }

    /// The reporter has waited. Returns how many refusals it has to report.
    fn report(&mut self, now: Instant) -> u64 {
        self.has_reporter = false;
        if self.left_out > 0 {
            self.logged_at = Some(now);
        }
        std::mem::take(&mut self.left_out)
    }
}

/// A connection that has not shown who it is.
struct PendingConnection<S> {
    number: u64,
    stream: S,
    evicted: Arc<AtomicBool>,
}

struct PendingConnections<S> {
    /// The oldest first.
    queue: VecDeque<PendingConnection<S>>,
    accepted: u64,
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
        pending.queue.retain(|p| p.number != self.number);
        pending.tickets -= 1;
        drop(pending);
        self.admission.ticket_returned.notify_all();
    }
}

impl<S> Admission<S> {
    /// Admission to a port. `limit` connections may be pending.
    pub fn new(port: &'static str, limit: usize) -> Arc<Admission<S>> {
        let (queue, log) = (VecDeque::new(), RefusalLog::default());
        let pending = PendingConnections { queue, accepted: 0, tickets: 0, log };
        Arc::new(Admission { port, limit, pending: pending.into(), ticket_returned: Condvar::new() })
    }

    fn lock(&self) -> MutexGuard<'_, PendingConnections<S>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Logs a refusal, or counts it. May wait to report what others left out.
    fn refused(&self, from: &str, why: &str) {
        let line = {
            let log = &mut self.lock().log;
            let line = log.refused(Instant::now());
            log.has_reporter |= matches!(line, RefusalLine::Later(_));
            line
        };
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
    /// Admits a connection. If there are too many, closes the oldest.
    fn admit(self: &Arc<Self>, stream: &S) -> io::Result<AdmissionTicket<S>> {
        let stream = stream.duplicate()?;
        let evicted = Arc::new(AtomicBool::new(false));
        let mut pending = self.lock();
        while pending.queue.len() >= self.limit {
            if let Some(oldest) = pending.queue.pop_front() {
                oldest.evicted.store(true, Ordering::Release);
                oldest.stream.disconnect();
            }
        }
        // A connection that was closed has a thread until that has noticed.
        let many = |pending: &mut PendingConnections<S>| pending.tickets >= 2 * self.limit;
        let waited = self.ticket_returned.wait_timeout_while(pending, GRACE, many);
        let mut pending = waited.unwrap_or_else(PoisonError::into_inner).0;
        pending.accepted += 1;
        pending.tickets += 1;
        let number = pending.accepted;
        pending.queue.push_back(PendingConnection { number, stream, evicted: evicted.clone() });
        drop(pending);
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
                let ticket = self.admit(&stream)?;
                let (admission, serve) = (self.clone(), serve.clone());
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
                let why =
                    format!("it was the oldest of {limit} that had not said who they are, and more came");
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
    fn port(limit: usize, time: Duration) -> (std::net::SocketAddr, std::sync::mpsc::Receiver<u8>) {
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

    #[test]
    fn refusals_are_logged_once_a_second_with_a_count_of_the_others() {
        let (mut log, begin) = (RefusalLog::default(), Instant::now());
        let ms = |n| begin + Duration::from_millis(n);
        assert_eq!(log.refused(ms(0)), RefusalLine::Now { left_out: 0 });
        assert_eq!(log.refused(ms(400)), RefusalLine::Later(Duration::from_millis(600)));
        log.has_reporter = true;
        for n in 0..1000 {
            assert_eq!(log.refused(ms(500 + n % 400)), RefusalLine::Counted);
        }
        assert_eq!(log.report(ms(1000)), 1001);
        assert_eq!(log.refused(ms(1500)), RefusalLine::Later(Duration::from_millis(500)));
        log.has_reporter = true;
        // The reporter is late, and another refusal says it first.
        assert_eq!(log.refused(ms(2100)), RefusalLine::Now { left_out: 1 });
        assert_eq!(log.report(ms(2101)), 0);
        assert_eq!(log.refused(ms(3100)), RefusalLine::Now { left_out: 0 });
    }
}
