//! Clients that count, in the bare guest or in redis, and check that all replies belong to one history.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::net::GUEST;
use super::pair::inside;

/// What a client has seen.
#[derive(Clone, Debug)]
pub struct ClientResult {
    /// How many replies came.
    pub replies: u64,
    /// The longest time from a request to its reply.
    pub gap: Duration,
    /// The time from each request to its reply, µs, sorted.
    pub round_trips_us: Vec<u32>,
}

/// A client that counts on one connection until it is told to stop.
pub struct Counter {
    stop: Arc<AtomicBool>,
    replies: Arc<AtomicU64>,
    thread: JoinHandle<Result<ClientResult, String>>,
}

/// Sends a line to the bare guest's counter to which it does not reply.
pub fn tell_bare(namespace: &str, line: &str) {
    let line = format!("{line}\n");
    let say = move || {
        let mut stream = connect(BareCounter::PORT, Duration::from_secs(20)).expect("connect");
        stream.write_all(line.as_bytes()).expect("write");
        std::thread::sleep(Duration::from_millis(200));
    };
    inside(namespace, say).join().expect("the client");
}

fn fnv1a(hash: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(hash, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

impl Counter {
    /// Counts in the bare guest from this namespace. It must be the guest's only client since its boot.
    pub fn bare(namespace: &str) -> Counter {
        let service = BareCounter { sequence: 0, value: 0, history: 0xcbf2_9ce4_8422_2325, ms: 0 };
        Self::start(namespace, service)
    }

    /// Counts in redis from this namespace. It must be the only client since redis started.
    pub fn redis(namespace: &str) -> Counter {
        Self::start(namespace, Redis { count: 0 })
    }

    fn start<S: Service>(namespace: &str, service: S) -> Counter {
        let stop = Arc::new(AtomicBool::new(false));
        let replies = Arc::new(AtomicU64::new(0));
        let (stopped, count) = (stop.clone(), replies.clone());
        let thread = inside(namespace, move || run(service, &stopped, &count));
        Counter { stop, replies, thread }
    }

    /// Replies so far.
    pub fn replies(&self) -> u64 {
        self.replies.load(Ordering::Relaxed)
    }

    /// Waits for `more` replies. Panics if the client fails or the replies take longer than `seconds`.
    pub fn wait_for(&self, more: u64, seconds: u64) {
        let (from, deadline) = (self.replies(), Instant::now() + Duration::from_secs(seconds));
        while self.replies() < from + more && !self.thread.is_finished() {
            assert!(Instant::now() < deadline, "only {} replies in {seconds} s", self.replies() - from);
            std::thread::sleep(Duration::from_millis(1));
        }
        let ended = self.thread.is_finished();
        assert!(!ended, "the client has ended");
    }

    /// Ends the client. Returns what it has seen, or what was wrong.
    pub fn finish(self) -> Result<ClientResult, String> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the client does not panic")
    }
}

/// A service of the guest, and what its replies must be.
trait Service: Send + 'static {
    const PORT: u16;

    /// The next request, and what its reply must begin with.
    fn next(&mut self) -> (String, String);

    /// Checks the rest of the reply; for the bare guest that is guest time in ms.
    fn check_rest(&mut self, rest: &str) -> Result<(), String>;
}

struct BareCounter {
    sequence: u64,
    value: i64,
    history: u64,
    ms: u64,
}

impl Service for BareCounter {
    const PORT: u16 = 7777;

    fn next(&mut self) -> (String, String) {
        self.sequence += 1;
        let addend = (self.sequence * 7 % 1000) as i64 - 300;
        let request = format!("add {addend}\n");
        self.value = self.value.wrapping_add(addend);
        self.history = fnv1a(self.history, request.as_bytes());
        (request, format!("ok {} {} {:016x} ", self.sequence, self.value, self.history))
    }

    fn check_rest(&mut self, rest: &str) -> Result<(), String> {
        let ms: u64 = rest.parse().map_err(|_| format!("{rest:?} is not a time"))?;
        if ms < self.ms {
            return Err(format!("guest time went back from {} to {ms} ms", self.ms));
        }
        self.ms = ms;
        Ok(())
    }
}

struct Redis {
    count: u64,
}

impl Service for Redis {
    const PORT: u16 = 6379;

    fn next(&mut self) -> (String, String) {
        self.count += 1;
        ("INCR visits\r\n".into(), format!(":{}", self.count))
    }

    fn check_rest(&mut self, rest: &str) -> Result<(), String> {
        if rest.is_empty() { Ok(()) } else { Err(format!("{rest:?} follows the reply")) }
    }
}

fn run<S: Service>(mut service: S, stop: &AtomicBool, count: &AtomicU64) -> Result<ClientResult, String> {
    let stream = connect(S::PORT, Duration::from_secs(20))?;
    let mut replies = BufReader::new(stream.try_clone().map_err(|e| e.to_string())?);
    let mut requests = stream;
    let mut seen = ClientResult { replies: 0, gap: Duration::ZERO, round_trips_us: Vec::new() };
    while !stop.load(Ordering::Relaxed) {
        let (request, expected) = service.next();
        let n = seen.replies + 1;
        let asked = Instant::now();
        requests.write_all(request.as_bytes()).map_err(|e| format!("request {n}: {e}"))?;
        let mut reply = String::new();
        let read = replies.read_line(&mut reply).map_err(|e| format!("reply {n}: {e}"))?;
        if read == 0 {
            return Err(format!("the connection ended before reply {n}"));
        }
        let took = asked.elapsed();
        let rest = reply.trim_end().strip_prefix(&expected);
        service.check_rest(rest.ok_or_else(|| format!("reply {n} is {reply:?}, not {expected:?}"))?)?;
        seen.replies += 1;
        seen.gap = seen.gap.max(took);
        seen.round_trips_us.push(took.as_micros() as u32);
        count.fetch_add(1, Ordering::Relaxed);
    }
    seen.round_trips_us.sort_unstable();
    Ok(seen)
}

fn connect(port: u16, patience: Duration) -> Result<TcpStream, String> {
    let address = format!("{GUEST}:{port}").parse().map_err(|_| "address")?;
    let stream = TcpStream::connect_timeout(&address, patience).map_err(|e| format!("connect: {e}"))?;
    stream.set_nodelay(true).map_err(|e| e.to_string())?;
    stream.set_read_timeout(Some(Duration::from_secs(30))).map_err(|e| e.to_string())?;
    Ok(stream)
}
