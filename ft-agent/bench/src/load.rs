//! Clients of a guest: each loads it for a while and returns what was done and how long it took.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use crate::workloads::{BenchGuest, Load};

/// How long a guest may take to answer.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// How many bytes the bare guest's source is asked for: more than it can send in a run.
const SOURCE_BYTES: u64 = 1 << 40;

/// Ports of a guest's servers.
struct Ports {
    sink: u16,
    source: u16,
    echo: u16,
    /// Only the bare guest has one.
    counter: u16,
    work: u16,
}

/// For Linux, the ports on which [`start_servers`] starts servers; for the bare guest, the ports of its own services.
const fn ports(guest: BenchGuest) -> Ports {
    match guest {
        BenchGuest::Linux => Ports { sink: 5001, source: 5002, echo: 5003, counter: 0, work: 0 },
        BenchGuest::Bare => Ports { sink: 7779, source: 7780, echo: 7778, counter: 7777, work: 7781 },
    }
}

/// The result of a run.
#[derive(Clone, Debug, Default)]
pub struct LoadResult {
    /// What was done, in commands, round trips, requests or bits; seconds for an idle guest.
    pub operations: f64,
    /// The time that it took, s.
    pub seconds: f64,
    /// Latency of each operation, µs; empty for loads without single operations.
    pub latencies_us: Vec<u32>,
}

impl LoadResult {
    /// The sum of the results of two guests that were loaded at the same time.
    pub fn combine(mut self, other: LoadResult) -> LoadResult {
        self.operations += other.operations;
        self.seconds = self.seconds.max(other.seconds);
        self.latencies_us.extend(other.latencies_us);
        self
    }
}

/// Pins this thread, and the threads that it starts, to one core.
///
/// # Errors
/// There is no such core.
pub fn pin(core: usize) -> io::Result<()> {
    let mut set = CpuSet::new();
    set.set(core).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set)).map_err(io::Error::from)
}

/// Starts those servers of a Linux guest that do not run from its boot on.
///
/// # Errors
/// The guest does not answer.
pub fn start_servers(guest: IpAddr) -> io::Result<()> {
    let Ports { sink, source, echo, .. } = ports(BenchGuest::Linux);
    for (name, port) in [("tcp-sink", sink), ("tcp-source", source), ("tcp-echo", echo)] {
        if connect(guest, port).is_err() {
            run_workload(BenchGuest::Linux, guest, name, u32::from(port))?;
            wait_until_listening(guest, port)?;
        }
    }
    Ok(())
}

/// Waits until a server that was started in the background accepts connections.
fn wait_until_listening(guest: IpAddr, port: u16) -> io::Result<()> {
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

/// Loads a guest for about `time`.
///
/// # Errors
/// The guest does not answer as it should.
pub fn run(kind: BenchGuest, load: Load, guest: IpAddr, time: Duration) -> io::Result<LoadResult> {
    let ports = ports(kind);
    match load {
        Load::Redis(command, connections) => {
            clients(connections, time, || connect(guest, REDIS), redis_request(command))
        }
        Load::Counter(connections) => clients(
            connections,
            time,
            || connect(guest, ports.counter),
            ClientRequest { bytes: b"add 1\n", lines: 1 },
        ),
        Load::Paced(rate) => paced(connect(guest, ports.echo)?, rate, time),
        Load::PingPong => {
            let mut socket = connect(guest, ports.echo)?;
            repeat_for(time, || {
                socket.write_all(b"x")?;
                socket.read_exact(&mut [0])
            })
        }
        Load::Receive => receive(connect(guest, ports.sink)?, time),
        Load::Transmit => {
            let mut socket = connect(guest, ports.source)?;
            if kind == BenchGuest::Bare {
                writeln!(socket, "{SOURCE_BYTES}")?;
            }
            transmit(socket, time)
        }
        Load::Http(path) => repeat_for(time, || http(guest, path).map(drop)),
        // One run of a workload is one value; there is no distribution of latencies.
        Load::Work(name, size) => {
            let outcome = repeat_for(Duration::ZERO, || run_workload(kind, guest, name, size))?;
            Ok(LoadResult { latencies_us: Vec::new(), ..outcome })
        }
        Load::Idle => {
            std::thread::sleep(time);
            Ok(LoadResult {
                operations: time.as_secs_f64(),
                seconds: time.as_secs_f64(),
                latencies_us: Vec::new(),
            })
        }
    }
}

/// Sends bytes to the guest and back, one after the other; for each, when it left (s from `start`) and its round trip (ms).
///
/// # Errors
/// The connection has ended.
pub fn round_trips(
    kind: BenchGuest,
    guest: IpAddr,
    start: Instant,
    time: Duration,
) -> io::Result<Vec<(f64, f64)>> {
    let mut socket = connect(guest, ports(kind).echo)?;
    let mut trips = Vec::new();
    repeat_for(time, || {
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

/// Repeats an operation for `time`, at least once.
fn repeat_for(time: Duration, mut operation: impl FnMut() -> io::Result<()>) -> io::Result<LoadResult> {
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
    Ok(LoadResult {
        operations: latencies_us.len() as f64,
        seconds: start.elapsed().as_secs_f64(),
        latencies_us,
    })
}

const REDIS: u16 = 6379;

/// The request that a client repeats, and how many lines its answer has.
#[derive(Clone, Copy)]
struct ClientRequest {
    bytes: &'static [u8],
    lines: usize,
}

fn redis_request(command: &str) -> ClientRequest {
    match command {
        "set" => ClientRequest { bytes: b"*3\r\n$3\r\nSET\r\n$3\r\nkey\r\n$3\r\nxxx\r\n", lines: 1 },
        // The answer has a second line, unless the key does not exist.
        "get" => ClientRequest { bytes: b"*2\r\n$3\r\nGET\r\n$3\r\nkey\r\n", lines: 2 },
        _ => ClientRequest { bytes: b"*2\r\n$4\r\nINCR\r\n$7\r\ncounter\r\n", lines: 1 },
    }
}

/// A connection on which a request is sent as soon as the one before is answered.
struct Client {
    socket: TcpStream,
    sent: Instant,
    answer: [u8; 256],
    len: usize,
}

impl Client {
    fn send(&mut self, request: ClientRequest) -> io::Result<()> {
        (self.sent, self.len) = (Instant::now(), 0);
        self.socket.write_all(request.bytes)
    }

    /// Reads what has arrived; true when the answer is complete.
    fn read_answer(&mut self, request: ClientRequest) -> io::Result<bool> {
        self.len += read_some(&mut self.socket, &mut self.answer[self.len..])?;
        let answer = &self.answer[..self.len];
        if matches!(answer[0], b'-' | b'e') {
            return Err(io::Error::other(String::from_utf8_lossy(answer).into_owned()));
        }
        Ok(answer.iter().filter(|b| **b == b'\n').count() >= request.lines || answer == b"$-1\r\n")
    }
}

/// Runs `connections` clients at the same time, each on a connection of its own and all on one thread, as redis-benchmark
/// does. Requests answered within `time` count; the answers to the remaining ones are waited for and not counted.
fn clients(
    connections: usize,
    time: Duration,
    connect: impl Fn() -> io::Result<TcpStream>,
    request: ClientRequest,
) -> io::Result<LoadResult> {
    let client = |socket| Client { socket, sent: Instant::now(), answer: [0; 256], len: 0 };
    let mut asking = (0..connections).map(|_| connect().map(client)).collect::<io::Result<Vec<_>>>()?;
    let end = Instant::now() + time;
    asking.iter_mut().try_for_each(|client| client.send(request))?;
    let mut latencies_us = Vec::new();
    while !asking.is_empty() {
        for at in readable(&asking)?.into_iter().rev() {
            if !asking[at].read_answer(request)? {
                continue;
            }
            let now = Instant::now();
            if now < end {
                latencies_us.push((now - asking[at].sent).as_micros() as u32);
                asking[at].send(request)?;
            } else {
                asking.swap_remove(at);
            }
        }
    }
    Ok(LoadResult { operations: latencies_us.len() as f64, seconds: time.as_secs_f64(), latencies_us })
}

/// Waits until some clients have data to read; their indices in ascending order.
fn readable(clients: &[Client]) -> io::Result<Vec<usize>> {
    let mut watched: Vec<_> =
        clients.iter().map(|client| PollFd::new(client.socket.as_fd(), PollFlags::POLLIN)).collect();
    let patience = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX);
    if poll(&mut watched, patience)? == 0 {
        return Err(ErrorKind::TimedOut.into());
    }
    Ok((0..watched.len()).filter(|at| watched[*at].any() == Some(true)).collect())
}

/// Sends `rate` bytes a second and waits until all have come back. A byte's latency counts from when it was due.
fn paced(mut socket: TcpStream, rate: u32, time: Duration) -> io::Result<LoadResult> {
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
    Ok(LoadResult { operations: f64::from(count), seconds: start.elapsed().as_secs_f64(), latencies_us })
}

fn read_some(socket: &mut TcpStream, into: &mut [u8]) -> io::Result<usize> {
    match socket.read(into)? {
        0 => Err(ErrorKind::UnexpectedEof.into()),
        n => Ok(n),
    }
}

/// Bulk transfer into the guest: it has received everything when it closes its end.
fn receive(mut socket: TcpStream, time: Duration) -> io::Result<LoadResult> {
    let block = vec![0x5a; 64 << 10];
    let (start, mut bytes) = (Instant::now(), 0);
    while start.elapsed() < time {
        bytes += socket.write(&block)?;
    }
    socket.shutdown(std::net::Shutdown::Write)?;
    io::copy(&mut socket, &mut io::sink())?;
    Ok(LoadResult {
        operations: bytes as f64 * 8.0,
        seconds: start.elapsed().as_secs_f64(),
        ..LoadResult::default()
    })
}

/// Bulk transfer out of the guest.
fn transmit(mut socket: TcpStream, time: Duration) -> io::Result<LoadResult> {
    let mut block = vec![0; 256 << 10];
    // A process starts in the guest first; its start is not part of the bulk transfer.
    read_some(&mut socket, &mut block)?;
    let (start, mut bytes) = (Instant::now(), 0);
    while start.elapsed() < time {
        bytes += read_some(&mut socket, &mut block)?;
    }
    Ok(LoadResult {
        operations: bytes as f64 * 8.0,
        seconds: start.elapsed().as_secs_f64(),
        ..LoadResult::default()
    })
}

/// Runs one of the guest's own workloads to its end.
///
/// # Errors
/// It fails.
pub fn run_workload(kind: BenchGuest, guest: IpAddr, name: &str, size: u32) -> io::Result<()> {
    let answer = match kind {
        BenchGuest::Linux => http(guest, &format!("/cgi-bin/workload?{name}+{size}"))?,
        BenchGuest::Bare => {
            let mut socket = connect(guest, ports(kind).work)?;
            writeln!(socket, "{name} {size}")?;
            socket.shutdown(std::net::Shutdown::Write)?;
            let mut answer = Vec::new();
            socket.read_to_end(&mut answer)?;
            answer
        }
    };
    let answer = String::from_utf8_lossy(&answer);
    if answer.lines().any(|line| line.starts_with(&format!("{name} {size} "))) {
        return Ok(());
    }
    Err(io::Error::other(format!("workload {name} {size} answered unexpectedly: {answer}")))
}

fn http(guest: IpAddr, path: &str) -> io::Result<Vec<u8>> {
    let mut socket = connect(guest, 80)?;
    socket.write_all(format!("GET {path} HTTP/1.0\r\nHost: guest\r\n\r\n").as_bytes())?;
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer)?;
    let status = answer.split(|b| *b == b' ').nth(1);
    if status != Some(b"200") {
        return Err(io::Error::other(format!("GET {path} failed: {}", String::from_utf8_lossy(&answer))));
    }
    Ok(answer)
}
