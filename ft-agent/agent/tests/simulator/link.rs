//! The connection between the hosts as TCP gives it: bytes in order in each direction, of which the kernels hold some.
//! While a direction is cut its bytes wait, and arrive when it heals.

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
struct Lane {
    flying: VecDeque<Packet>,
    /// In the receiver's kernel, not read.
    arrived: VecDeque<u8>,
    under_way: usize,
    last_arrival: u64,
    ended: bool,
}

/// A connection; `lanes[h]` leads to host `h`, `open[h]` is whether host `h` still uses it.
#[derive(Clone, Debug)]
pub struct Connection {
    lanes: [Lane; 2],
    pub open: [bool; 2],
}

/// What a host reads.
pub struct Read {
    pub bytes: Vec<u8>,
    pub ended: bool,
}

impl Connection {
    pub fn new() -> Connection {
        Connection { lanes: Default::default(), open: [true; 2] }
    }

    /// Takes bytes from a host: how many, and when they arrive.
    pub fn write(&mut self, from: usize, bytes: &[u8], now: u64, rng: &mut Rng) -> Option<(usize, u64)> {
        let room = SOCKET_BYTES - self.lanes[1 - from].under_way;
        let n = bytes.len().min(room);
        if n == 0 {
            return None;
        }
        self.lanes[1 - from].under_way += n;
        Some((n, self.fly(from, Packet::Data(bytes[..n].to_vec()), now, rng)))
    }

    /// A host closes; when the other learns of it.
    pub fn close(&mut self, host: usize, now: u64, rng: &mut Rng) -> u64 {
        self.open[host] = false;
        self.fly(host, Packet::Fin, now, rng)
    }

    fn fly(&mut self, from: usize, packet: Packet, now: u64, rng: &mut Rng) -> u64 {
        let lane = &mut self.lanes[1 - from];
        // Now and then a segment is lost and comes by a retransmission.
        let delay =
            if rng.chance(20) { rng.between(2_000_000, 12_000_000) } else { rng.between(50_000, 500_000) };
        lane.last_arrival = lane.last_arrival.max(now + delay);
        lane.flying.push_back(packet);
        lane.last_arrival
    }

    /// The next packet reaches a host's kernel.
    pub fn arrive(&mut self, to: usize) {
        let lane = &mut self.lanes[to];
        match lane.flying.pop_front() {
            Some(Packet::Data(bytes)) => lane.arrived.extend(bytes),
            Some(Packet::Fin) => lane.ended = true,
            None => {}
        }
    }

    /// What is under way to a host is lost, as when the sending host loses its power, or a middlebox resets.
    pub fn lose(&mut self, to: usize, keep: usize) {
        self.lanes[to].flying.truncate(keep);
    }

    /// The middlebox tells a host that the connection is gone.
    pub fn reset(&mut self, host: usize) {
        self.lanes[host].ended = true;
    }

    /// What a host can read now, at most `max` bytes.
    pub fn read(&mut self, host: usize, max: usize) -> Read {
        let lane = &mut self.lanes[host];
        let n = lane.arrived.len().min(max);
        let bytes: Vec<u8> = lane.arrived.drain(..n).collect();
        lane.under_way = lane.under_way.saturating_sub(n);
        Read { bytes, ended: lane.ended && lane.arrived.is_empty() }
    }
}
