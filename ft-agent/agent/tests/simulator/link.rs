//! The connection between the hosts as TCP gives it: bytes in order in each direction, of which the kernels
//! hold some. While a direction is cut its bytes wait, and arrive when it heals.

use std::collections::VecDeque;

use super::rng::Rng;

/// Bytes that a socket takes before its peer has read them.
const SOCKET_BYTES: usize = 16 << 10;

#[derive(Clone, Debug)]
enum Packet {
    Data(Vec<u8>),
    /// The sender has closed.
    Fin,
}

/// One direction of a connection.
#[derive(Clone, Debug, Default)]
struct Direction {
    flying: VecDeque<Packet>,
    /// Bytes in the receiver's kernel that are not read.
    arrived: VecDeque<u8>,
    under_way: usize,
    last_arrival: u64,
    ended: bool,
}

/// A connection. `to[h]` leads to host `h`; `open[h]` tells whether host `h` still uses it.
#[derive(Clone, Debug)]
pub struct Connection {
    to: [Direction; 2],
    pub open: [bool; 2],
}

/// What a host has read.
pub struct ReadResult {
    pub bytes: Vec<u8>,
    pub ended: bool,
}

impl Connection {
    pub fn new() -> Connection {
        Connection { to: Default::default(), open: [true; 2] }
    }

    /// Takes bytes from a host. Returns how many, and when they arrive.
    pub fn write(&mut self, from: usize, bytes: &[u8], now: u64, rng: &mut Rng) -> Option<(usize, u64)> {
        let room = SOCKET_BYTES - self.to[1 - from].under_way;
        let n = bytes.len().min(room);
        if n == 0 {
            return None;
        }
        self.to[1 - from].under_way += n;
        Some((n, self.transmit(from, Packet::Data(bytes[..n].to_vec()), now, rng)))
    }

    /// A host closes the connection. Returns when the other learns of it.
    pub fn close(&mut self, host: usize, now: u64, rng: &mut Rng) -> u64 {
        self.open[host] = false;
        self.transmit(host, Packet::Fin, now, rng)
    }

    fn transmit(&mut self, from: usize, packet: Packet, now: u64, rng: &mut Rng) -> u64 {
        let direction = &mut self.to[1 - from];
        // Now and then a segment is lost and is retransmitted.
        let delay =
            if rng.chance(20) { rng.between(2_000_000, 12_000_000) } else { rng.between(50_000, 500_000) };
        direction.last_arrival = direction.last_arrival.max(now + delay);
        direction.flying.push_back(packet);
        direction.last_arrival
    }

    /// The next packet reaches a host's kernel.
    pub fn arrive(&mut self, to: usize) {
        let direction = &mut self.to[to];
        match direction.flying.pop_front() {
            Some(Packet::Data(bytes)) => direction.arrived.extend(bytes),
            Some(Packet::Fin) => direction.ended = true,
            None => {}
        }
    }

    /// What is under way to a host is lost, as when the sending host loses its power, or a middlebox resets.
    pub fn lose(&mut self, to: usize, keep: usize) {
        self.to[to].flying.truncate(keep);
    }

    /// The middlebox tells a host that the connection is gone.
    pub fn reset(&mut self, host: usize) {
        self.to[host].ended = true;
    }

    /// Reads what has arrived at a host, at most `max` bytes.
    pub fn read(&mut self, host: usize, max: usize) -> ReadResult {
        let direction = &mut self.to[host];
        let n = direction.arrived.len().min(max);
        let bytes: Vec<u8> = direction.arrived.drain(..n).collect();
        direction.under_way = direction.under_way.saturating_sub(n);
        ReadResult { bytes, ended: direction.ended && direction.arrived.is_empty() }
    }
}
