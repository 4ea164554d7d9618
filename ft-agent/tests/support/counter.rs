//! A client of the bare guest's counter that checks every reply: it must continue one history.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::net::GUEST;
use super::pair::inside;

/// What a client saw.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Replies.
    pub replies: u64,
    /// The longest time from a request to its reply.
    pub gap: Duration,
    /// Time from a request to its reply, µs, sorted.
    pub round_trips_us: Vec<u32>,
}

/// A client that counts on one connection until it is told to stop.
pub struct Counter {
    stop: Arc<AtomicBool>,
    replies: Arc<AtomicU64>,
    thread: JoinHandle<Result<Seen, String>>,
}

fn fnv1a(hash: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(hash, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

impl Counter {
    /// Connects from this namespace. It must be the only client of the counter since the guest's boot.
    pub fn start(namespace: &str) -> Counter {
        let stop = Arc::new(AtomicBool::new(false));
        let replies = Arc::new(AtomicU64::new(0));
        let (stopped, count) = (stop.clone(), replies.clone());
        let thread = inside(namespace, move || run(&stopped, &count));
        Counter { stop, replies, thread }
    }

    /// Replies so far.
    pub fn replies(&self) -> u64 {
        self.replies.load(Ordering::Relaxed)
    }

    /// Waits for so many more replies; panics when the client fails or it takes too long.
    pub fn wait_for(&self, more: u64, seconds: u64) {
        let (from, deadline) = (self.replies(), Instant::now() + Duration::from_secs(seconds));
        while self.replies() < from + more && !self.thread.is_finished() {
            assert!(Instant::now() < deadline, "only {} replies in {seconds} s", self.replies() - from);
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(!self.thread.is_finished(), "the client has ended");
    }

    /// Ends the client; what it saw, or what was wrong.
    pub fn finish(self) -> Result<Seen, String> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the client does not panic")
    }
}

fn run(stop: &AtomicBool, count: &AtomicU64) -> Result<Seen, String> {
    let stream = connect(Duration::from_secs(20))?;
    let mut replies = BufReader::new(stream.try_clone().map_err(|e| e.to_string())?);
    let mut requests = stream;
    let (mut sequence, mut value, mut history, mut last_ms) = (0u64, 0i64, 0xcbf2_9ce4_8422_2325u64, 0u64);
    let mut seen = Seen { replies: 0, gap: Duration::ZERO, round_trips_us: Vec::new() };
    while !stop.load(Ordering::Relaxed) {
        sequence += 1;
        let addend = (sequence * 7 % 1000) as i64 - 300;
        let request = format!("add {addend}");
        let asked = Instant::now();
        requests
            .write_all(format!("{request}\n").as_bytes())
            .map_err(|e| format!("request {sequence}: {e}"))?;
        let mut reply = String::new();
        let read = replies.read_line(&mut reply).map_err(|e| format!("reply {sequence}: {e}"))?;
        if read == 0 {
            return Err(format!("the connection ended before reply {sequence}"));
        }
        let took = asked.elapsed();
        value = value.wrapping_add(addend);
        history = fnv1a(fnv1a(history, request.as_bytes()), b"\n");
        let expected = format!("ok {sequence} {value} {history:016x} ");
        let ms = reply.trim_end().strip_prefix(&expected).and_then(|ms| ms.parse().ok());
        let ms: u64 = ms.ok_or_else(|| format!("{reply:?} is not {expected:?}"))?;
        if ms < last_ms {
            return Err(format!("guest time goes back from {last_ms} to {ms} ms"));
        }
        last_ms = ms;
        seen.replies += 1;
        seen.gap = seen.gap.max(took);
        seen.round_trips_us.push(took.as_micros() as u32);
        count.fetch_add(1, Ordering::Relaxed);
    }
    seen.round_trips_us.sort_unstable();
    Ok(seen)
}

fn connect(patience: Duration) -> Result<TcpStream, String> {
    let address = format!("{GUEST}:7777").parse().map_err(|_| "address")?;
    let stream = TcpStream::connect_timeout(&address, patience).map_err(|e| format!("connect: {e}"))?;
    stream.set_nodelay(true).map_err(|e| e.to_string())?;
    stream.set_read_timeout(Some(Duration::from_secs(30))).map_err(|e| e.to_string())?;
    Ok(stream)
}
