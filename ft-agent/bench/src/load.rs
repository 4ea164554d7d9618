//! Clients of a guest: each loads it for a while and tells how it went.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use crate::workloads::{Guest, Load};

/// How long a guest may take to answer.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// What the source of the bare guest is asked for: more than it sends in a run.
const SOURCE_BYTES: u64 = 1 << 40;

/// Ports of a guest's servers.
struct Ports {
    sink: u16,
    source: u16,
    echo: u16,
    /// Of the bare guest only.
    counter: u16,
    work: u16,
}

/// Those of [`start_servers`] for Linux, and those that the bare guest has.
const fn ports(guest: Guest) -> Ports {
    match guest {
        Guest::Linux => Ports { sink: 5001, source: 5002, echo: 5003, counter: 0, work: 0 },
        Guest::Bare => Ports { sink: 7779, source: 7780, echo: 7778, counter: 7777, work: 7781 },
    }
}

/// How a run went.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// What was done: commands, round trips, requests, bits; seconds when idle.
    pub operations: f64,
    /// In this time.
    pub seconds: f64,
    /// Latency of each operation, µs, where there is one.
    pub latencies_us: Vec<u32>,
}

impl Outcome {
    /// Both, of two guests at the same time.
    pub fn beside(mut self, other: Outcome) -> Outcome {
        self.operations += other.operations;
        self.seconds = self.seconds.max(other.seconds);
        self.latencies_us.extend(other.latencies_us);
        self
    }
}

/// Keeps this thread, and those that it starts, on one core.
///
/// # Errors
/// There is no such core.
pub fn pin(core: usize) -> io::Result<()> {
    let mut set = CpuSet::new();
    set.set(core).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set)).map_err(io::Error::from)
}

/// Starts the servers in a Linux guest that are not there from the start.
///
/// # Errors
/// The guest does not answer.
pub fn start_servers(guest: IpAddr) -> io::Result<()> {
    let Ports { sink, source, echo, .. } = ports(Guest::Linux);
    for (name, port) in [("tcp-sink", sink), ("tcp-source", source), ("tcp-echo", echo)] {
        if connect(guest, port).is_err() {
            work(Guest::Linux, guest, name, u32::from(port))?;
            listens(guest, port)?;
        }
    }
    Ok(())
}

/// Waits until a server that was started in the background listens.
fn listens(guest: IpAddr, port: u16) -> io::Result<()> {
    let start = Instant::now();
    loop {
        match connect(guest, port) {
            Err(e) if e.kind() == ErrorKind::ConnectionRefused && start.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(20));
            }
            connected => return connected.map(drop),
        }
    }
}

/// Loads a guest for about so long.
///
/// # Errors
/// The guest does not answer as it should.
pub fn run(kind: Guest, load: Load, guest: IpAddr, time: Duration) -> io::Result<Outcome> {
    let ports = ports(kind);
    match load {
        Load::Redis(command, connections) => {
            clients(connections, time, || connect(guest, REDIS), redis_request(command))
        }
        Load::Counter(connections) => clients(
            connections,
            time,
            || connect(guest, ports.counter),
            Request { bytes: b"add 1\n", lines: 1 },
        ),
        Load::Paced(rate) => paced(connect(guest, ports.echo)?, rate, time),
        Load::PingPong => {
            let mut socket = connect(guest, ports.echo)?;
            until(time, || {
                socket.write_all(b"x")?;
                socket.read_exact(&mut [0])
            })
        }
        Load::Receive => receive(connect(guest, ports.sink)?, time),
        Load::Transmit => {
            let mut socket = connect(guest, ports.source)?;
            if kind == Guest::Bare {
                writeln!(socket, "{SOURCE_BYTES}")?;
            }
            transmit(socket, time)
        }
        Load::Http(path) => until(time, || http(guest, path).map(drop)),
        // Its time is its value; one run has no distribution.
        Load::Work(name, size) => {
            let outcome = until(Duration::ZERO, || work(kind, guest, name, size))?;
            Ok(Outcome { latencies_us: Vec::new(), ..outcome })
        }
        Load::Idle => {
            std::thread::sleep(time);
            Ok(Outcome {
                operations: time.as_secs_f64(),
                seconds: time.as_secs_f64(),
                latencies_us: Vec::new(),
            })
        }
    }
}

/// Bytes to the guest and back, one after the other: when each left, s from `start`, and how long it took, ms.
///
/// # Errors
/// The connection has ended.
pub fn round_trips(
    kind: Guest,
    guest: IpAddr,
    start: Instant,
    time: Duration,
) -> io::Result<Vec<(f64, f64)>> {
    let mut socket = connect(guest, ports(kind).echo)?;
    let mut trips = Vec::new();
    until(time, || {
        let begin = Instant::now();
        socket.write_all(b"x")?;
        socket.read_exact(&mut [0])?;
        trips.push(((begin - start).as_secs_f64(), begin.elapsed().as_secs_f64() * 1e3));
        Ok(())
    })?;
    Ok(trips)
}

fn connect(guest: IpAddr, port: u16) -> io::Result<TcpStream> {
    let socket = TcpStream::connect_timeout(&(guest, port).into(), PATIENCE)?;
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// Does something again and again, at least once.
fn until(time: Duration, mut operation: impl FnMut() -> io::Result<()>) -> io::Result<Outcome> {
    let start = Instant::now();
    let mut latencies_us = Vec::new();
    loop {
        let begin = Instant::now();
        operation()?;
        latencies_us.push(begin.elapsed().as_micros() as u32);
        if start.elapsed() >= time {
            break;
        }
    }
    Ok(Outcome {
        operations: latencies_us.len() as f64,
        seconds: start.elapsed().as_secs_f64(),
        latencies_us,
    })
}

const REDIS: u16 = 6379;

/// What a client asks again and again, and how many lines the answer has.
#[derive(Clone, Copy)]
struct Request {
    bytes: &'static [u8],
    lines: usize,
}

fn redis_request(command: &str) -> Request {
    match command {
        "set" => Request { bytes: b"*3\r\n$3\r\nSET\r\n$3\r\nkey\r\n$3\r\nxxx\r\n", lines: 1 },
        // The answer has a second line, unless there is nothing.
        "get" => Request { bytes: b"*2\r\n$3\r\nGET\r\n$3\r\nkey\r\n", lines: 2 },
        _ => Request { bytes: b"*2\r\n$4\r\nINCR\r\n$7\r\ncounter\r\n", lines: 1 },
    }
}

/// A connection on which one request follows the other.
struct Client {
    socket: TcpStream,
    sent: Instant,
    answer: [u8; 256],
    len: usize,
}

impl Client {
    fn ask(&mut self, request: Request) -> io::Result<()> {
        (self.sent, self.len) = (Instant::now(), 0);
        self.socket.write_all(request.bytes)
    }

    /// Takes what has come; true when that was all of the answer.
    fn take(&mut self, request: Request) -> io::Result<bool> {
        self.len += read_some(&mut self.socket, &mut self.answer[self.len..])?;
        let answer = &self.answer[..self.len];
        if matches!(answer[0], b'-' | b'e') {
            return Err(io::Error::other(String::from_utf8_lossy(answer).into_owned()));
        }
        Ok(answer.iter().filter(|b| **b == b'\n').count() >= request.lines || answer == b"$-1\r\n")
    }
}

/// So many clients at the same time, each asking on a connection of its own; one thread has them all, as redis-benchmark's.
/// What is answered in time counts, and the others' answers are awaited.
fn clients(
    connections: usize,
    time: Duration,
    connect: impl Fn() -> io::Result<TcpStream>,
    request: Request,
) -> io::Result<Outcome> {
    let client = |socket| Client { socket, sent: Instant::now(), answer: [0; 256], len: 0 };
    let mut asking = (0..connections).map(|_| connect().map(client)).collect::<io::Result<Vec<_>>>()?;
    let end = Instant::now() + time;
    asking.iter_mut().try_for_each(|client| client.ask(request))?;
    let mut latencies_us = Vec::new();
    while !asking.is_empty() {
        for at in readable(&asking)?.into_iter().rev() {
            if !asking[at].take(request)? {
                continue;
            }
            let now = Instant::now();
            if now < end {
                latencies_us.push((now - asking[at].sent).as_micros() as u32);
                asking[at].ask(request)?;
            } else {
                asking.swap_remove(at);
            }
        }
    }
    Ok(Outcome { operations: latencies_us.len() as f64, seconds: time.as_secs_f64(), latencies_us })
}

/// Waits until there is an answer to some; which ones, in order.
fn readable(clients: &[Client]) -> io::Result<Vec<usize>> {
    let mut watched: Vec<_> =
        clients.iter().map(|client| PollFd::new(client.socket.as_fd(), PollFlags::POLLIN)).collect();
    let patience = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX);
    if poll(&mut watched, patience)? == 0 {
        return Err(ErrorKind::TimedOut.into());
    }
    Ok((0..watched.len()).filter(|at| watched[*at].any() == Some(true)).collect())
}

/// Sends so many bytes a second and waits until all have come back. A byte's time runs from when it was due.
fn paced(mut socket: TcpStream, rate: u32, time: Duration) -> io::Result<Outcome> {
    let count = (time.as_secs_f64() * f64::from(rate)).ceil() as u32;
    let start = Instant::now();
    let due = move |n: u32| start + Duration::from_secs(1) / rate * n;
    let mut writer = socket.try_clone()?;
    let sender = std::thread::spawn(move || {
        (0..count).try_for_each(|n| {
            std::thread::sleep(due(n).saturating_duration_since(Instant::now()));
            writer.write_all(b"x")
        })
    });
    let mut latencies_us = Vec::new();
    let mut bytes = [0; 4096];
    while latencies_us.len() < count as usize {
        let len = read_some(&mut socket, &mut bytes)?;
        let now = Instant::now();
        let late = |n| now.saturating_duration_since(due(n)).as_micros() as u32;
        let back = latencies_us.len() as u32;
        latencies_us.extend((back..back + len as u32).map(late));
    }
    sender.join().unwrap_or_else(|_| Err(io::Error::other("a client panicked")))?;
    Ok(Outcome { operations: f64::from(count), seconds: start.elapsed().as_secs_f64(), latencies_us })
}

fn read_some(socket: &mut TcpStream, into: &mut [u8]) -> io::Result<usize> {
    match socket.read(into)? {
        0 => Err(ErrorKind::UnexpectedEof.into()),
        n => Ok(n),
    }
}

/// The guest has all of it when it closes its end.
fn receive(mut socket: TcpStream, time: Duration) -> io::Result<Outcome> {
    let block = vec![0x5a; 64 << 10];
    let (start, mut bytes) = (Instant::now(), 0);
    while start.elapsed() < time {
        bytes += socket.write(&block)?;
    }
    socket.shutdown(std::net::Shutdown::Write)?;
    io::copy(&mut socket, &mut io::sink())?;
    Ok(Outcome {
        operations: bytes as f64 * 8.0,
        seconds: start.elapsed().as_secs_f64(),
        ..Outcome::default()
    })
}

fn transmit(mut socket: TcpStream, time: Duration) -> io::Result<Outcome> {
    let mut block = vec![0; 256 << 10];
    // A process begins in the guest; its start is not bulk.
    read_some(&mut socket, &mut block)?;
    let (start, mut bytes) = (Instant::now(), 0);
    while start.elapsed() < time {
        bytes += read_some(&mut socket, &mut block)?;
    }
    Ok(Outcome {
        operations: bytes as f64 * 8.0,
        seconds: start.elapsed().as_secs_f64(),
        ..Outcome::default()
    })
}

/// Runs a workload of the guest's own to its end.
///
/// # Errors
/// It fails.
pub fn work(kind: Guest, guest: IpAddr, name: &str, size: u32) -> io::Result<()> {
    let told = match kind {
        Guest::Linux => http(guest, &format!("/cgi-bin/workload?{name}+{size}"))?,
        Guest::Bare => {
            let mut socket = connect(guest, ports(kind).work)?;
            writeln!(socket, "{name} {size}")?;
            socket.shutdown(std::net::Shutdown::Write)?;
            let mut answer = Vec::new();
            socket.read_to_end(&mut answer)?;
            answer
        }
    };
    let told = String::from_utf8_lossy(&told);
    if told.lines().any(|line| line.starts_with(&format!("{name} {size} "))) {
        return Ok(());
    }
    Err(io::Error::other(format!("workload {name}: {told}")))
}

fn http(guest: IpAddr, path: &str) -> io::Result<Vec<u8>> {
    let mut socket = connect(guest, 80)?;
    socket.write_all(format!("GET {path} HTTP/1.0\r\nHost: guest\r\n\r\n").as_bytes())?;
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer)?;
    let status = answer.split(|b| *b == b' ').nth(1);
    if status != Some(b"200") {
        return Err(io::Error::other(format!("GET {path}: {}", String::from_utf8_lossy(&answer))));
    }
    Ok(answer)
}
