//! The TCP services: see the library's page for what they say.

use crate::console::finish;
use crate::ram::Free;
use crate::{timer, workload};
use bare::counter::{Counter, Line, Lines, Outcome, REPLY_LEN_MAX};
use bare::pattern::{Checksum, Spin, fill, mem_pass};
use core::fmt::Write;
use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp::{Socket, SocketBuffer};
use smoltcp::time::Duration;

const COUNTERS: usize = 64;
const BULKS: usize = 4;
const WORKS: usize = 4;
const WORK_PORT: u16 = 7781;
/// Words that `mem` rewrites: 1 MiB.
const AREA: u64 = 1 << 17;

/// Connections that can be open at the same time, of all services.
pub const CONNECTIONS: usize = COUNTERS + 3 * BULKS + WORKS;

const SMALL: usize = 4096;
const LARGE: usize = 65536;
/// What a sink takes at once: a window like those that other systems come to, so that the round trip does not limit it.
const SINK_WINDOW: usize = 512 << 10;

/// A client that says nothing and answers nothing for this long is gone.
const TIMEOUT: Duration = Duration::from_secs(60);
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// How long an acknowledgement waits for an answer to go with.
const ACK_DELAY: Duration = Duration::from_millis(10);

/// All connections, open or waiting for a client.
pub struct Connections {
    all: [Connection; CONNECTIONS],
    /// What `mem` rewrites.
    area: &'static mut [u64],
}

struct Connection {
    socket: SocketHandle,
    port: u16,
    service: Service,
}

enum Service {
    Counter(Lines),
    Echo,
    Sink(Checksum),
    Source { lines: Lines, at: u64, end: u64 },
    Work(Lines),
}

impl Service {
    fn new(port: u16) -> Self {
        match port {
            7777 => Self::Counter(Lines::new()),
            7778 => Self::Echo,
            7779 => Self::Sink(Checksum::default()),
            WORK_PORT => Self::Work(Lines::new()),
            _ => Self::Source { lines: Lines::new(), at: 0, end: 0 },
        }
    }
}

impl Connections {
    /// Makes the sockets; they listen from the first [`Self::serve`] on.
    pub fn new(sockets: &mut SocketSet, free: &mut Free) -> Self {
        let connection = |i: usize| {
            let (port, len) = match i.checked_sub(COUNTERS) {
                None => (7777, SMALL),
                Some(i) if i < 3 * BULKS => (7778 + (i / BULKS) as u16, LARGE),
                Some(_) => (WORK_PORT, SMALL),
            };
            let window = if port == 7779 { SINK_WINDOW } else { len };
            let mut socket = Socket::new(
                SocketBuffer::new(free.take_bytes(window)),
                SocketBuffer::new(free.take_bytes(len)),
            );
            socket.set_timeout(Some(TIMEOUT));
            socket.set_keep_alive(Some(KEEP_ALIVE));
            // What is asked for is answered at once, and the answer acknowledges it.
            let answers = matches!(port, 7777 | WORK_PORT);
            socket.set_ack_delay(answers.then_some(ACK_DELAY));
            socket.set_nagle_enabled(false);
            Connection { socket: sockets.add(socket), port, service: Service::new(port) }
        };
        let all = core::array::from_fn(connection);
        let area = free.take_words(AREA);
        // RAM is zero at power-on, but not after a reset by another guest's code.
        area.fill(0);
        Self { all, area }
    }

    /// Does what clients ask for, as far as it goes now. True if a socket changed.
    pub fn serve(&mut self, sockets: &mut SocketSet, counter: &mut Counter) -> bool {
        let mut changed = false;
        for connection in &mut self.all {
            changed |= connection.serve(sockets.get_mut(connection.socket), counter, self.area);
        }
        changed
    }
}

impl Connection {
    fn serve(&mut self, socket: &mut Socket, counter: &mut Counter, area: &mut [u64]) -> bool {
        if !socket.is_open() {
            self.service = Service::new(self.port);
            socket.listen(self.port).expect("a closed socket can listen");
            return true;
        }
        let changed = match &mut self.service {
            Service::Counter(lines) => count(lines, socket, counter),
            Service::Echo => echo(socket),
            Service::Sink(checksum) => sink(checksum, socket),
            Service::Source { lines, at, end } => source(lines, at, end, socket),
            Service::Work(lines) => work(lines, socket, area),
        };
        // The client has said all it wants, and got its answers: they leave before the FIN.
        let busy = matches!(self.service, Service::Source { at, end, .. } if at < end);
        let done = socket.may_send() && !socket.may_recv() && !socket.can_recv() && !busy;
        if done {
            if let Service::Sink(checksum) = &self.service {
                reply(socket, format_args!("{} {:016x} {}", checksum.len(), checksum.value(), timer::ms()));
            }
            socket.close();
        }
        changed || done
    }
}

fn count(lines: &mut Lines, socket: &mut Socket, counter: &mut Counter) -> bool {
    let mut changed = false;
    while socket.can_recv() && room(socket) >= REPLY_LEN_MAX {
        changed = true;
        let outcome = next_line(lines, socket, |line| counter.request(line, timer::ms()));
        match outcome {
            Some(Outcome::Reply(line)) => reply(socket, format_args!("{line}")),
            Some(end) => finish(end),
            None => {}
        }
    }
    changed
}

fn echo(socket: &mut Socket) -> bool {
    let mut changed = false;
    let mut bytes = [0; 2048];
    while socket.can_recv() && room(socket) > 0 {
        changed = true;
        let len = room(socket).min(bytes.len());
        let len = socket.recv_slice(&mut bytes[..len]).expect("it can receive");
        socket.send_slice(&bytes[..len]).expect("it has room, so it may send");
    }
    changed
}

fn sink(checksum: &mut Checksum, socket: &mut Socket) -> bool {
    let mut changed = false;
    while socket.can_recv() {
        changed = true;
        let take = |bytes: &mut [u8]| {
            checksum.update(bytes);
            (bytes.len(), ())
        };
        socket.recv(take).expect("it can receive");
    }
    changed
}

fn source(lines: &mut Lines, at: &mut u64, end: &mut u64, socket: &mut Socket) -> bool {
    let mut changed = false;
    while *at == *end && socket.can_recv() {
        changed = true;
        let parse = |line: &[u8]| str::from_utf8(line).ok()?.parse::<u64>().ok();
        match next_line(lines, socket, parse) {
            Some(Some(len)) => (*at, *end) = (0, len),
            Some(None) => socket.abort(),
            None => {}
        }
    }
    while *at < *end && room(socket) > 0 {
        changed = true;
        let give = |bytes: &mut [u8]| {
            let len = usize::try_from(*end - *at).map_or(bytes.len(), |left| left.min(bytes.len()));
            fill(*at, &mut bytes[..len]);
            (len, len as u64)
        };
        *at += socket.send(give).expect("it has room, so it may send");
    }
    changed
}

/// Computes what one line asks for, and answers it with the name, the size and the result.
fn work(lines: &mut Lines, socket: &mut Socket, area: &mut [u64]) -> bool {
    if !socket.can_recv() || room(socket) < REPLY_LEN_MAX {
        return false;
    }
    let parse = |line: &[u8]| {
        let (name, size) = str::from_utf8(line).ok()?.split_once(' ')?;
        Some((
            name == "mem",
            size.parse::<u64>().ok().filter(|&size| size > 0 && matches!(name, "spin" | "mem"))?,
        ))
    };
    match next_line(lines, socket, parse) {
        Some(Some((true, passes))) => {
            let sum = (0..passes).fold(0, |_, pass| mem_pass(area, 1, pass));
            reply(socket, format_args!("mem {passes} {sum:016x}"));
        }
        Some(Some((false, rounds))) => {
            let mut spin = Spin::new(1);
            workload::spin_rounds(&mut spin, rounds);
            reply(socket, format_args!("spin {rounds} {:016x}", spin.x));
        }
        Some(None) => socket.abort(),
        None => {}
    }
    true
}

/// Bytes that can be written to a socket now.
fn room(socket: &Socket) -> usize {
    if socket.may_send() { socket.send_capacity() - socket.send_queue() } else { 0 }
}

/// Takes bytes from the socket; if they end a line, what `f` makes of it. Too long a line resets the connection.
fn next_line<R>(lines: &mut Lines, socket: &mut Socket, f: impl FnOnce(&[u8]) -> R) -> Option<R> {
    let take = |bytes: &mut [u8]| {
        let (taken, line) = lines.take(bytes);
        let result = match line {
            Line::Whole(line) => Ok(Some(f(line))),
            Line::Partial => Ok(None),
            Line::TooLong => Err(()),
        };
        (taken, result)
    };
    socket.recv(take).expect("it can receive").unwrap_or_else(|()| {
        socket.abort();
        None
    })
}

/// Sends a line; the caller has seen that there is room for it.
fn reply(socket: &mut Socket, line: core::fmt::Arguments) {
    writeln!(socket, "{line}").expect("there is room");
}
