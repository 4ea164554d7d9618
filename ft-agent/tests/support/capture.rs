//! Captures what leaves each host for the guest's network: the guest's frames on the cables of a [`Site`].

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::net::if_::if_nametoindex;
use nix::sys::socket::sockopt::{RcvBuf, ReceiveTimeout};
use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket,
};
use nix::sys::time::TimeVal;

use super::net::GUEST_MAC;
use super::pair::{Host, Site, inside};

/// Packet type of a frame that this end has sent itself (linux/if_packet.h).
const OUTGOING: u8 = 4;

/// A frame of the guest.
pub struct CapturedFrame {
    /// When it was captured.
    pub at: Instant,
    /// The host it came from.
    pub host: Host,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// A capture that is running.
pub struct Capture {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<CapturedFrame>>,
}

impl Capture {
    /// Starts to capture.
    pub fn start(site: &Site) -> Capture {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let (ready, is_ready) = std::sync::mpsc::channel();
        let thread = inside(&site.ns("lan"), move || {
            let socket =
                socket(AddressFamily::Packet, SockType::Raw, SockFlag::empty(), SockProtocol::EthAll);
            let socket = socket.expect("packet socket");
            setsockopt(&socket, ReceiveTimeout, &TimeVal::new(0, 50_000)).expect("timeout");
            setsockopt(&socket, RcvBuf, &(8 << 20)).expect("buffer");
            let ports = [Host::A, Host::B].map(|host| {
                let name = format!("br0-{}", host.name());
                (if_nametoindex(name.as_str()).expect("port") as usize, host)
            });
            ready.send(()).expect("the test waits");
            let octets = GUEST_MAC.split(':').map(|octet| u8::from_str_radix(octet, 16).expect("an octet"));
            let mac: Vec<u8> = octets.collect();
            let (mut frames, mut buffer) = (Vec::new(), vec![0; 1 << 16]);
            while !stopped.load(Ordering::Relaxed) {
                let Ok((n, Some(from))) = recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut buffer) else {
                    continue;
                };
                let host = ports.iter().find(|(index, _)| *index == from.ifindex()).map(|(_, host)| *host);
                if let (Some(host), true) = (host, from.pkttype() != OUTGOING && buffer[6..12] == mac) {
                    frames.push(CapturedFrame { at: Instant::now(), host, bytes: buffer[..n].to_vec() });
                }
            }
            frames
        });
        is_ready.recv().expect("capture");
        Capture { stop, thread }
    }

    /// Stops, and returns the frames.
    pub fn finish(self) -> Vec<CapturedFrame> {
        // Frames that have passed may still wait in the socket for a moment.
        std::thread::sleep(Duration::from_millis(100));
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("capture")
    }
}
