//! What leaves each host for the guest's network: the frames of the guest on the cables of a [`Site`], as they pass.

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

use super::pair::{Host, Site, inside};

const GUEST_MAC: [u8; 6] = [2, 0x76, 0x6d, 0x66, 0x74, 1];
/// Packet type of what this end sends itself (linux/if_packet.h).
const OUTGOING: u8 = 4;

/// A frame of the guest.
pub struct Frame {
    /// When it passed.
    pub at: Instant,
    /// The host it came from.
    pub host: Host,
    /// The frame.
    pub bytes: Vec<u8>,
}

/// A capture that goes on.
pub struct Capture {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Frame>>,
}

impl Capture {
    /// From now on.
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
            let (mut frames, mut buffer) = (Vec::new(), vec![0; 1 << 16]);
            while !stopped.load(Ordering::Relaxed) {
                let Ok((n, Some(from))) = recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut buffer) else {
                    continue;
                };
                let host = ports.iter().find(|(index, _)| *index == from.ifindex()).map(|(_, host)| *host);
                if let (Some(host), true) = (host, from.pkttype() != OUTGOING && buffer[6..12] == GUEST_MAC) {
                    frames.push(Frame { at: Instant::now(), host, bytes: buffer[..n].to_vec() });
                }
            }
            frames
        });
        is_ready.recv().expect("capture");
        Capture { stop, thread }
    }

    /// What has passed.
    pub fn finish(self) -> Vec<Frame> {
        // What has come waits in the socket at most for a moment.
        std::thread::sleep(Duration::from_millis(100));
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("capture")
    }
}
