//! A worse cable for the logging channel of a [`Site`]: a bridge in this process that delays frames, sends them at a
//! rate, and loses some.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::ifaddrs::getifaddrs;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::socket::sockopt::RcvBuf;
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, recvfrom, sendto, setsockopt, socket,
};
use nix::sys::time::TimeSpec;

use super::net::ip;
use super::pair::{Host, Site, inside};

/// Packet type of a frame that this end has sent itself (linux/if_packet.h).
const OUTGOING: u8 = 4;
/// How many bytes wait for their turn, at most; more are lost, as in a switch.
const QUEUE_BYTES: u64 = 256 << 10;

/// What a link is like, the same in both directions.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Round trip, ms.
    pub round_trip_ms: u64,
    /// Rate, Mbit/s.
    pub mbit_per_s: u64,
    /// Frames that are lost, percent.
    pub loss_percent: u64,
}

/// The bridge that is running. Stopped on drop.
pub struct Relay {
    link: Arc<Mutex<Link>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    /// Puts it into the cable between the two hosts.
    pub fn start(site: &Site, link: Link) -> Relay {
        let lan = site.ns("lan");
        for host in ["a", "b"] {
            ip(&["-n", &lan, "link", "set", &format!("log-{host}"), "nomaster"]);
            // One frame is one segment.
            ip(&["-n", &site.ns(host), "link", "set", "link0", "gso_max_segs", "1"]);
        }
        let (link, stop) = (Arc::new(Mutex::new(link)), Arc::new(AtomicBool::new(false)));
        let (shared, stopped) = (link.clone(), stop.clone());
        let (ready, is_ready) = std::sync::mpsc::channel();
        let thread = inside(&lan, move || {
            let bridge = Bridge::new();
            ready.send(()).expect("the test waits");
            bridge.run(&shared, &stopped);
        });
        is_ready.recv().expect("a bridge");
        Relay { link, stop, thread: Some(thread) }
    }

    /// Makes the link like this from now on.
    pub fn set(&self, link: Link) {
        *self.link.lock().expect("no panic") = link;
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            eprintln!("the relay panicked");
        }
    }
}

/// When a frame arrives, its number, to which port, and its bytes.
type FrameUnderWay = (Instant, u64, usize, Vec<u8>);

struct Bridge {
    socket: std::os::fd::OwnedFd,
    ports: [LinkAddr; 2],
    under_way: BinaryHeap<Reverse<FrameUnderWay>>,
    /// When the last frame to each port has been sent.
    sent_until: [Instant; 2],
    frames: u64,
    random: u64,
}

impl Bridge {
    fn new() -> Bridge {
        let socket =
            socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_NONBLOCK, SockProtocol::EthAll);
        let socket = socket.expect("packet socket");
        setsockopt(&socket, RcvBuf, &(8 << 20)).expect("buffer");
        let ports = [Host::A, Host::B].map(|host| {
            let name = format!("log-{}", host.name());
            let mut found = getifaddrs().expect("interfaces").filter(|i| i.interface_name == name);
            found.find_map(|i| i.address?.as_link_addr().copied()).expect("a port")
        });
        let now = Instant::now();
        Bridge {
            socket,
            ports,
            under_way: BinaryHeap::new(),
            sent_until: [now; 2],
            frames: 0,
            random: 0x9e37_79b9_7f4a_7c15,
        }
    }

    fn run(mut self, link: &Mutex<Link>, stop: &AtomicBool) {
        let mut buffer = vec![0; 1 << 16];
        while !stop.load(Ordering::Relaxed) {
            let next = self.under_way.peek().map(|Reverse((at, ..))| *at);
            let most = Duration::from_millis(50);
            let wait = next.map_or(most, |at| at.saturating_duration_since(Instant::now()).min(most));
            let mut polled = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            ppoll(&mut polled, Some(TimeSpec::from_duration(wait)), None).ok();
            let now = *link.lock().expect("no panic");
            while let Ok((n, Some(from))) = recvfrom::<LinkAddr>(self.socket.as_raw_fd(), &mut buffer) {
                let port = self.ports.iter().position(|port| port.ifindex() == from.ifindex());
                if let (Some(port), true) = (port, from.pkttype() != OUTGOING) {
                    self.received(now, 1 - port, &buffer[..n]);
                }
            }
            self.send_due();
        }
    }

    /// A frame has come that is for this port.
    fn received(&mut self, link: Link, to: usize, frame: &[u8]) {
        // xorshift64
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let now = Instant::now();
        let begin = self.sent_until[to].max(now);
        let bits_per_us = link.mbit_per_s;
        let waits = (begin - now).as_micros() as u64 * bits_per_us / 8;
        if self.random % 100 < link.loss_percent || waits > QUEUE_BYTES {
            return;
        }
        self.sent_until[to] = begin + Duration::from_micros(frame.len() as u64 * 8 / bits_per_us);
        let at = self.sent_until[to] + Duration::from_millis(link.round_trip_ms) / 2;
        let mut frame = frame.to_vec();
        fill_in_checksum(&mut frame);
        self.frames += 1;
        self.under_way.push(Reverse((at, self.frames, to, frame)));
    }

    fn send_due(&mut self) {
        while self.under_way.peek().is_some_and(|Reverse((at, ..))| *at <= Instant::now()) {
            let Some(Reverse((_, _, to, frame))) = self.under_way.pop() else { return };
            // A frame that cannot be sent is lost.
            sendto(self.socket.as_raw_fd(), &frame, &self.ports[to], MsgFlags::empty()).ok();
        }
    }
}

/// The sender leaves the checksum of a TCP segment to its network card, and a virtual cable has none.
fn fill_in_checksum(frame: &mut [u8]) {
    const ETHERNET: usize = 14;
    const TCP: u8 = 6;
    if frame.len() < ETHERNET + 40 || frame[12..14] != [8, 0] || frame[ETHERNET + 9] != TCP {
        return;
    }
    let header = usize::from(frame[ETHERNET] & 15) * 4;
    let end = ETHERNET + usize::from(u16::from_be_bytes([frame[ETHERNET + 2], frame[ETHERNET + 3]]));
    let (start, checksum) = (ETHERNET + header, ETHERNET + header + 16);
    if end > frame.len() || checksum + 2 > end {
        return;
    }
    frame[checksum..checksum + 2].fill(0);
    let words = |bytes: &[u8]| -> u32 {
        bytes.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w.get(1).copied().unwrap_or(0))).sum()
    };
    let mut sum = words(&frame[ETHERNET + 12..ETHERNET + 20]) + u32::from(TCP) + (end - start) as u32;
    sum += words(&frame[start..end]);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    frame[checksum..checksum + 2].copy_from_slice(&(!(sum as u16)).to_be_bytes());
}
