//! Which device answers at which address: one table for ports, one for memory, built once.

/// A device on the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BusTarget {
    /// The interrupt controllers.
    Pic,
    /// The timer and port 0x61.
    Pit,
    /// The real-time clock.
    Rtc,
    /// The serial port.
    Serial,
    /// The keyboard controller.
    I8042,
    /// The power-off port.
    PowerOff,
    /// The virtio device in this slot.
    Virtio(u8),
}

/// The `len` addresses from `start` on, and the device that answers there.
#[derive(Clone, Copy, Debug)]
struct AddressRange {
    start: u64,
    len: u64,
    target: BusTarget,
}

/// Address ranges that do not overlap, in ascending order.
#[derive(Clone, Debug, Default)]
pub struct Bus {
    ranges: Vec<AddressRange>,
}

impl Bus {
    /// Adds a device's addresses.
    ///
    /// # Panics
    /// When they overlap those of another device: the addresses are constants of this program.
    pub fn add(&mut self, start: u64, len: u64, target: BusTarget) {
        let at = self.ranges.partition_point(|range| range.start < start);
        let free = self.ranges.get(at).is_none_or(|next| start + len <= next.start)
            && (at == 0 || self.ranges[at - 1].start + self.ranges[at - 1].len <= start);
        assert!(free, "two devices at {start:#x}");
        self.ranges.insert(at, AddressRange { start, len, target });
    }

    /// The device that answers an access of `size` bytes at `addr`, and the offset in its range. `None` if the access does not
    /// lie completely in one range.
    pub fn find(&self, addr: u64, size: u64) -> Option<(BusTarget, u64)> {
        let at = self.ranges.partition_point(|range| range.start <= addr).checked_sub(1)?;
        let range = &self.ranges[at];
        let offset = addr - range.start;
        (offset + size <= range.len).then_some((range.target, offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_access_that_lies_completely_in_a_range_is_found() {
        let mut bus = Bus::default();
        bus.add(0x3f8, 8, BusTarget::Serial);
        bus.add(0x20, 2, BusTarget::Pic);
        bus.add(0x40, 4, BusTarget::Pit);
        assert_eq!(bus.find(0x20, 2), Some((BusTarget::Pic, 0)));
        assert_eq!(bus.find(0x43, 1), Some((BusTarget::Pit, 3)));
        assert_eq!(bus.find(0x43, 2), None);
        assert_eq!(bus.find(0x3ff, 1), Some((BusTarget::Serial, 7)));
        assert_eq!((bus.find(0x1f, 1), bus.find(0x400, 1), bus.find(u64::MAX, 8)), (None, None, None));
    }

    #[test]
    #[should_panic(expected = "two devices")]
    fn overlaps_are_a_bug() {
        let mut bus = Bus::default();
        bus.add(0x40, 4, BusTarget::Pit);
        bus.add(0x43, 1, BusTarget::Rtc);
    }
}
