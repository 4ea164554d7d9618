//! Tells the switches of a network that the guest's address is behind this host now.

use std::sync::Arc;
use std::time::Duration;

use tracing::debug;

use crate::outside::tap::Tap;

/// When the frames are sent, after going live. Repeated, since one may be lost, and a stray frame of the other host would
/// teach the switches wrongly.
const AT_MS: [u64; 8] = [0, 20, 50, 100, 250, 500, 1000, 2000];

/// The guest's network devices on this host.
#[derive(Default)]
pub struct Announcer {
    ports: Vec<(Arc<Tap>, [u8; 6])>,
}

impl Announcer {
    /// For the guest's addresses behind these taps.
    pub fn new(ports: Vec<(Arc<Tap>, [u8; 6])>) -> Announcer {
        Announcer { ports }
    }

    /// Sends the first frames now, and the others from a thread.
    pub fn start(&self) {
        let ports = self.ports.clone();
        std::thread::spawn(move || {
            let mut waited = 0;
            for at in AT_MS {
                std::thread::sleep(Duration::from_millis(at - waited));
                waited = at;
                for (tap, mac) in &ports {
                    // A frame that is lost is one of several.
                    if let Err(e) = tap.send(&announcement(*mac)) {
                        debug!("announcement: {e}");
                    }
                }
            }
        });
    }
}

/// A reverse ARP request (RFC 903) as broadcast: it asks nothing of anybody, and shows every switch where its sender is.
fn announcement(mac: [u8; 6]) -> Vec<u8> {
    const ETHERNET_IPV4_RARP_REQUEST: [u8; 10] = [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3];
    const FRAME_MIN: usize = 60;
    let no_address = [0; 4];
    let mut frame =
        [&[0xff; 6][..], &mac, &ETHERNET_IPV4_RARP_REQUEST, &mac, &no_address, &mac, &no_address].concat();
    frame.resize(FRAME_MIN, 0);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_announcement_is_a_broadcast_from_the_guest() {
        let mac = [2, 0x76, 0x6d, 0x66, 0x74, 1];
        let frame = announcement(mac);
        assert_eq!((frame.len(), &frame[..6], &frame[6..12]), (60, &[0xff; 6][..], &mac[..]));
        assert_eq!(frame[12..22], [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
        assert_eq!((&frame[22..28], &frame[32..38]), (&mac[..], &mac[..]));
    }
}
