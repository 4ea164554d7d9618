//! Who owns the socket, that is, reads it: the pump, woken by each arrival, or, while much data moves, the
//! guest's thread at intervals. Network drivers do the same: a busy host polls, because a wake-up costs both
//! hosts more than the data it brings.

/// Time between two reads by the guest's thread.
const INTERVAL_NS: u64 = 100_000;
/// How long the pump leaves the socket to the guest's thread after the last bulk transfer.
const GRACE_NS: u64 = 2_000_000;
/// A transfer of at least this many bytes is a bulk transfer.
const BULK: u64 = 16 << 10;

/// Decides between the pump and the guest's thread. Times are those of one monotonic clock, in ns.
#[derive(Debug, Default)]
pub(super) struct SocketOwner {
    /// When the socket was last read.
    read_at: u64,
    /// Until when the guest's thread owns the socket.
    guest_until: u64,
}

impl SocketOwner {
    /// `bytes` bytes were written or read at once.
    pub(super) fn bytes_moved(&mut self, now: u64, bytes: u64) {
        if bytes >= BULK {
            self.guest_until = now + GRACE_NS;
        }
    }

    /// The socket is being read.
    pub(super) fn read_begins(&mut self, now: u64) {
        self.read_at = now;
    }

    /// When the guest's thread has to read next; `None`: the pump owns the socket.
    pub(super) fn guest_reads_at(&self, now: u64) -> Option<u64> {
        self.guest_owns_until(now).map(|_| self.read_at + INTERVAL_NS)
    }

    /// Until when the guest's thread owns the socket; `None`: the pump owns it.
    pub(super) fn guest_owns_until(&self, now: u64) -> Option<u64> {
        (now < self.guest_until).then_some(self.guest_until)
    }

    /// Gives the socket to the pump, because the guest's thread cannot read for a while. True: the guest's
    /// thread owned it, so the pump has to be woken.
    pub(super) fn return_to_pump(&mut self, now: u64) -> bool {
        std::mem::take(&mut self.guest_until) > now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_thread_reads_while_much_data_moves() {
        let mut owner = SocketOwner::default();
        owner.bytes_moved(1_000_000, BULK - 1);
        assert_eq!((owner.guest_owns_until(1_000_000), owner.guest_reads_at(1_000_000)), (None, None));
        owner.read_begins(1_000_000);
        owner.bytes_moved(1_000_000, BULK);
        assert_eq!(owner.guest_owns_until(1_000_000), Some(3_000_000));
        assert_eq!(owner.guest_reads_at(1_000_000), Some(1_100_000));
        owner.read_begins(1_250_000);
        assert_eq!(owner.guest_reads_at(1_300_000), Some(1_350_000));
        let quiet = (owner.guest_owns_until(3_000_000), owner.guest_reads_at(3_000_000));
        assert_eq!(quiet, (None, None), "no bulk transfer for the grace period");
    }

    #[test]
    fn the_pump_takes_over_when_the_guests_thread_cannot_read() {
        let mut owner = SocketOwner::default();
        assert!(!owner.return_to_pump(1_000_000));
        owner.bytes_moved(1_000_000, BULK);
        assert!(owner.return_to_pump(1_020_000), "the pump has to be woken");
        assert_eq!(owner.guest_owns_until(1_020_000), None);
    }
}
