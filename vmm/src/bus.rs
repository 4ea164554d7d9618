//! Which device answers at which address: one table for ports, one for memory, built once.

/// A device on the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
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

/// Addresses from `start` on, `len` of them, and who answers there.
#[derive(Clone, Copy, Debug)]
struct Range {
    start: u64,
    len: u64,
    target: Target,
}

/// Ranges that do not overlap.
#[derive(Clone, Debug, Default)]
pub struct Bus {
    ranges: Vec<Range>,
}

impl Bus {
    /// Adds a device's addresses.
    ///
    /// # Panics
    /// When they overlap another's: the table is the program's own.
    pub fn add(&mut self, start: u64, len: u64, target: Target) {
        let at = self.ranges.partition_point(|range| range.start < start);
        let free = self.ranges.get(at).is_none_or(|next| start + len <= next.start)
            && (at == 0 || self.ranges[at - 1].start + self.ranges[at - 1].len <= start);
        assert!(free, "two devices at {start:#x}");
        self.ranges.insert(at, Range { start, len, target });
    }

    /// Who answers `size` bytes at `addr`, and the offset in its range. An access that no range holds whole has
    /// no one.
    pub fn find(&self, addr: u64, size: u64) -> Option<(Target, u64)> {
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
    fn finds_what_lies_wholly_inside() {
        let mut bus = Bus::default();
        bus.add(0x3f8, 8, Target::Serial);
        bus.add(0x20, 2, Target::Pic);
        bus.add(0x40, 4, Target::Pit);
        assert_eq!(bus.find(0x20, 2), Some((Target::Pic, 0)));
        assert_eq!(bus.find(0x43, 1), Some((Target::Pit, 3)));
        assert_eq!(bus.find(0x43, 2), None);
        assert_eq!(bus.find(0x3ff, 1), Some((Target::Serial, 7)));
        assert_eq!((bus.find(0x1f, 1), bus.find(0x400, 1), bus.find(u64::MAX, 8)), (None, None, None));
    }

    #[test]
    #[should_panic(expected = "two devices")]
    fn overlaps_are_a_bug() {
        let mut bus = Bus::default();
        bus.add(0x40, 4, Target::Pit);
        bus.add(0x43, 1, Target::Rtc);
    }
}
