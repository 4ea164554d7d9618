//! Who reads the socket: the pump, woken by each arrival, or, while much goes over it, the guest's thread from time to time.
//! As network drivers have it, a busy host polls: a wake-up costs both hosts more than what it brings.

/// How often the guest's thread reads.
const INTERVAL_NS: u64 = 100_000;
/// For how long the pump leaves the socket to it.
const GRACE_NS: u64 = 2_000_000;
/// Bytes moved at once that are much.
const BULK: u64 = 16 << 10;

/// See the module. Times are those of one monotonic clock, in ns.
#[derive(Debug, Default)]
pub(super) struct Polling {
    /// When somebody last read.
    read_at: u64,
    /// Until when the pump leaves the socket to the guest's thread.
    until: u64,
}

impl Polling {
    /// So many bytes were written or read at once.
    pub(super) fn moved(&mut self, now: u64, bytes: u64) {
        if bytes >= BULK {
            self.until = now + GRACE_NS;
        }
    }

    /// Somebody reads.
    pub(super) fn reads(&mut self, now: u64) {
        self.read_at = now;
    }

    /// When the guest's thread is to read, if it is for it to do.
    pub(super) fn due(&self, now: u64) -> Option<u64> {
        self.until(now).map(|_| self.read_at + INTERVAL_NS)
    }

    /// Until when the pump leaves the socket alone, if it does.
    pub(super) fn until(&self, now: u64) -> Option<u64> {
        (now < self.until).then_some(self.until)
    }

    /// The guest's thread cannot read for a while. True: the pump is to be woken, for it leaves the socket alone.
    pub(super) fn end(&mut self, now: u64) -> bool {
        std::mem::take(&mut self.until) > now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_s_thread_reads_while_much_goes_over() {
        let mut polling = Polling::default();
        polling.moved(1_000_000, BULK - 1);
        assert_eq!((polling.until(1_000_000), polling.due(1_000_000)), (None, None));
        polling.reads(1_000_000);
        polling.moved(1_000_000, BULK);
        assert_eq!((polling.until(1_000_000), polling.due(1_000_000)), (Some(3_000_000), Some(1_100_000)));
        polling.reads(1_250_000);
        assert_eq!(polling.due(1_300_000), Some(1_350_000));
        assert_eq!((polling.until(3_000_000), polling.due(3_000_000)), (None, None), "it has become quiet");
    }

    #[test]
    fn the_pump_takes_over_when_the_guest_s_thread_cannot() {
        let mut polling = Polling::default();
        assert!(!polling.end(1_000_000));
        polling.moved(1_000_000, BULK);
        assert!(polling.end(1_020_000), "the pump must know");
        assert_eq!(polling.until(1_020_000), None);
    }
}
