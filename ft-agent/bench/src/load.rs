//! Clients of a guest: each loads it for a while and tells how it went.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::workloads::Load;

/// How long a guest may take to answer.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// Ports of the guest's own servers of [`start_servers`].
const SINK: u16 = 5001;
const SOURCE: u16 = 5002;
const ECHO: u16 = 5003;

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

/// Starts the servers in a guest that are not there from the start.
///
/// # Errors
/// The guest does not answer.
pub fn start_servers(guest: IpAddr) -> io::Result<()> {
    for (name, port) in [("tcp-sink", SINK), ("tcp-source", SOURCE), ("tcp-echo", ECHO)] {
        if connect(guest, port).is_err() {
            work(guest, name, u32::from(port))?;
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
pub fn run(load: Load, guest: IpAddr, time: Duration) -> io::Result<Outcome> {
    match load {
        Load::Redis(command, connections) => redis(guest, command, connections, time),
        Load::PingPong => {
            let mut socket = connect(guest, ECHO)?;
            until(time, || {
                socket.write_all(b"x")?;
                socket.read_exact(&mut [0])
            })
        }
        Load::Receive => receive(guest, time),
        Load::Transmit => transmit(guest, time),
        Load::Http(path) => until(time, || http(guest, path).map(drop)),
        // Its time is its value; one run has no distribution.
        Load::Work(name, size) => {
            let outcome = until(Duration::ZERO, || work(guest, name, size))?;
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
pub fn round_trips(guest: IpAddr, start: Instant, time: Duration) -> io::Result<Vec<(f64, f64)>> {
    let mut socket = connect(guest, ECHO)?;
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

fn redis(guest: IpAddr, command: &str, connections: usize, time: Duration) -> io::Result<Outcome> {
    let sockets = (0..connections).map(|_| connect(guest, 6379)).collect::<io::Result<Vec<_>>>()?;
    let start = Instant::now();
    let clients: Vec<_> = sockets.into_iter().map(|s| client_of_redis(s, command, time)).collect();
    let mut sum = Outcome::default();
    for client in clients {
        let one = client.join().unwrap_or_else(|_| Err(io::Error::other("a client panicked")))?;
        sum.operations += one.operations;
        sum.latencies_us.extend(one.latencies_us);
    }
    sum.seconds = start.elapsed().as_secs_f64();
    Ok(sum)
}

/// Sends one command after the other, on a thread of its own.
fn client_of_redis(
    mut socket: TcpStream,
    command: &str,
    time: Duration,
) -> std::thread::JoinHandle<io::Result<Outcome>> {
    let request: &[u8] = match command {
        "set" => b"*3\r\n$3\r\nSET\r\n$3\r\nkey\r\n$3\r\nxxx\r\n",
        "get" => b"*2\r\n$3\r\nGET\r\n$3\r\nkey\r\n",
        _ => b"*2\r\n$4\r\nINCR\r\n$7\r\ncounter\r\n",
    };
    // The answer to a GET has a second line, unless there is nothing.
    let lines = if command == "get" { 2 } else { 1 };
    std::thread::spawn(move || {
        let mut answer = [0; 256];
        until(time, || {
            socket.write_all(request)?;
            let mut len = 0;
            while answer[..len].split(|b| *b == b'\n').count() <= lines && &answer[..len] != b"$-1\r\n" {
                len += read_some(&mut socket, &mut answer[len..])?;
            }
            if answer[0] == b'-' {
                return Err(io::Error::other(String::from_utf8_lossy(&answer[..len]).into_owned()));
            }
            Ok(())
        })
    })
}

fn read_some(socket: &mut TcpStream, into: &mut [u8]) -> io::Result<usize> {
    match socket.read(into)? {
        0 => Err(ErrorKind::UnexpectedEof.into()),
        n => Ok(n),
    }
}

/// The guest has all of it when it closes its end.
fn receive(guest: IpAddr, time: Duration) -> io::Result<Outcome> {
    let mut socket = connect(guest, SINK)?;
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

fn transmit(guest: IpAddr, time: Duration) -> io::Result<Outcome> {
    let mut socket = connect(guest, SOURCE)?;
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
pub fn work(guest: IpAddr, name: &str, size: u32) -> io::Result<()> {
    let told = http(guest, &format!("/cgi-bin/workload?{name}+{size}"))?;
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
