//! Announces to the network's switches that the guest's address is now reached through this host.

use std::sync::Arc;

use tracing::debug;

use crate::outside::tap::Tap;

/// When announcements are sent, ms after going live. They are repeated because a frame may be lost, and
/// because a stray frame of the other host would point the switches to that host again: hosts that do not know yet that
/// their VM was forgotten and runs elsewhere send until their next look at the store, 5 s at most.
const AT_MS: [u64; 10] = [0, 20, 50, 100, 250, 500, 1000, 2000, 4000, 8000];

/// The guest's network devices on this host, and the announcements that are still to be sent for them.
#[derive(Default)]
pub struct Announcer {
    ports: Vec<(Arc<Tap>, [u8; 6])>,
    /// When the announcements that are still to be sent are due, the last one first.
    due: Vec<u64>,
}

impl Announcer {
    /// Announces these MAC addresses of the guest through these taps, once it is started.
    pub fn new(ports: Vec<(Arc<Tap>, [u8; 6])>) -> Announcer {
        Announcer { ports, due: Vec::new() }
    }

    /// Begins to announce: the first announcement is due now, the others later.
    pub fn start(&mut self, now: u64) {
        self.due = AT_MS.iter().rev().map(|ms| now + ms * 1_000_000).collect();
    }

    /// When the next announcement is due.
    pub fn deadline(&self) -> Option<u64> {
        self.due.last().copied()
    }

    /// Sends the announcement that is due, if any. An announcement that is due while this side may not send
    /// is never sent.
    pub fn send_due(&mut self, now: u64, may_speak: impl FnOnce() -> bool) {
        if self.take_due(now) && may_speak() {
            for (tap, mac) in &self.ports {
                // The announcement is repeated, so a lost one does not matter.
                if let Err(e) = tap.send(&announcement(*mac)) {
                    debug!("cannot announce the guest's address: {e}");
                }
            }
        }
    }

    /// Whether an announcement is due. If several are late, only one is sent.
    fn take_due(&mut self, now: u64) -> bool {
        let before = self.due.len();
        self.due.retain(|at| *at > now);
        self.due.len() < before
    }
}

/// A broadcast reverse ARP request (RFC 903): no host answers it, and every switch learns from it where its
/// sender is.
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

    #[test]
    fn announcements_are_due_for_eight_seconds_and_late_ones_are_sent_once() {
        const MS: u64 = 1_000_000;
        let mut announcer = Announcer::default();
        assert_eq!(announcer.deadline(), None);
        announcer.start(7 * MS);
        assert_eq!(announcer.deadline(), Some(7 * MS));
        assert!(announcer.take_due(7 * MS) && !announcer.take_due(26 * MS));
        assert_eq!(announcer.deadline(), Some(27 * MS));
        // 20 to 500 ms were missed.
        assert!(announcer.take_due(600 * MS) && !announcer.take_due(600 * MS));
        assert_eq!(announcer.deadline(), Some(1007 * MS));
        assert!(announcer.take_due(9000 * MS));
        assert_eq!(announcer.deadline(), None);
    }
}
