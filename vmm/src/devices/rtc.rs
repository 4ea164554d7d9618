//! The real-time clock and CMOS memory (Motorola MC146818) on interrupt line 8, driven by guest time.
//!
//! The clock shows `epoch + guest time`; when the guest sets the clock, the epoch moves. Updates take no time, but the
//! update-in-progress bit announces them 244 us ahead as on the real part.

use serde::{Deserialize, Serialize};

/// Index port; the data port follows.
pub const PORT: u16 = 0x70;
/// Interrupt line.
pub const IRQ: u8 = 8;
const SECOND_NS: u64 = 1_000_000_000;
/// The update-in-progress bit rises this long before an update, ns.
const UPDATE_AHEAD_NS: u64 = 244_000;
/// Index of the century's register.
const CENTURY: u8 = 0x32;

/// Bits of register B.
mod register_b {
    pub const SET: u8 = 0x80;
    pub const PERIODIC: u8 = 0x40;
    pub const ALARM: u8 = 0x20;
    pub const UPDATED: u8 = 0x10;
    pub const BINARY: u8 = 0x04;
    pub const HOURS_24: u8 = 0x02;
}

/// A calendar time, UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Calendar {
    second: u8,
    minute: u8,
    hour: u8,
    /// 1 is Sunday.
    weekday: u8,
    day: u8,
    month: u8,
    year: u16,
}

/// The clock. Everything in it is state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rtc {
    index: u8,
    /// Seconds since 1970 at guest time 0.
    epoch_s: i64,
    /// The time that the clock shows while the SET bit of register B holds it.
    held: Option<Calendar>,
    /// The CMOS memory. Registers A to D are from 0x0a on, the alarm time at 1, 3 and 5.
    memory: Vec<u8>,
    /// Guest time in ns up to which the flags of register C were computed.
    seen_ns: u64,
}

impl Rtc {
    /// A clock that shows `epoch_s` seconds since 1970 at guest time 0.
    pub fn new(epoch_s: i64) -> Rtc {
        let mut memory = vec![0; 128];
        memory[0x0a] = 0x26;
        memory[0x0b] = register_b::HOURS_24;
        memory[0x0d] = 0x80;
        Rtc { index: 0, epoch_s, held: None, memory, seen_ns: 0 }
    }

    /// Whether a state that was read from a file is one that the clock can be in.
    pub fn is_sane(&self) -> bool {
        let held = |time: &Calendar| (1..=12).contains(&time.month) && time.year < 10_000;
        self.memory.len() == 128
            && self.index < 128
            && self.held.iter().all(held)
            && self.epoch_s.unsigned_abs() < 1 << 48
    }

    /// Resets the clock with the machine: the battery keeps time and memory, interrupts are disabled.
    pub fn reset(&mut self) {
        self.memory[0x0b] &= !(register_b::PERIODIC | register_b::ALARM | register_b::UPDATED);
        self.memory[0x0c] = 0;
        self.index = 0;
    }

    /// Level of the interrupt line.
    pub fn irq(&self) -> bool {
        self.memory[0x0c]
            & self.memory[0x0b]
            & (register_b::PERIODIC | register_b::ALARM | register_b::UPDATED)
            != 0
    }

    /// Guest time in ns at which the next flag will rise whose interrupt is enabled.
    pub fn deadline_ns(&self) -> Option<u64> {
        let enabled = self.memory[0x0b] & !self.memory[0x0c];
        let second = (enabled & (register_b::ALARM | register_b::UPDATED) != 0 && self.held.is_none())
            .then_some((self.seen_ns / SECOND_NS + 1).saturating_mul(SECOND_NS));
        let period = self.period_ns().filter(|_| enabled & register_b::PERIODIC != 0);
        let period = period.map(|ns| (self.seen_ns / ns + 1).saturating_mul(ns));
        second.into_iter().chain(period).min()
    }

    /// Computes the flags of register C up to a guest time.
    pub fn advance(&mut self, now_ns: u64) {
        let seen_ns = self.seen_ns;
        self.seen_ns = seen_ns.max(now_ns);
        let passes = |ns: u64| seen_ns / ns != now_ns.max(seen_ns) / ns;
        if self.period_ns().is_some_and(passes) {
            self.memory[0x0c] |= register_b::PERIODIC;
        }
        if passes(SECOND_NS) && self.held.is_none() {
            self.memory[0x0c] |= register_b::UPDATED;
            // An alarm repeats at least once a day.
            let first = seen_ns / SECOND_NS + 1;
            let last = (now_ns / SECOND_NS).min(first + 86_400);
            if self.memory[0x0c] & register_b::ALARM == 0
                && (first..=last).any(|second| self.alarm_matches(second))
            {
                self.memory[0x0c] |= register_b::ALARM;
            }
        }
    }

    /// Period of the periodic interrupt. The rate in register A selects 2^(rate-1) / 32768 s; rates 1 and 2 mean 8 and 9.
    fn period_ns(&self) -> Option<u64> {
        match self.memory[0x0a] & 0x0f {
            0 => None,
            rate => Some((SECOND_NS << (if rate < 3 { rate + 6 } else { rate - 1 })) / 32_768),
        }
    }

    fn alarm_matches(&self, second: u64) -> bool {
        let now = calendar_of(self.epoch_s.saturating_add(second as i64));
        let shown = [self.encode(now.second), self.encode(now.minute), self.encode_hour(now.hour)];
        // An alarm value with both upper bits set matches everything.
        shown.iter().zip([1, 3, 5]).all(|(shown, at)| self.memory[at] >= 0xc0 || self.memory[at] == *shown)
    }

    fn now(&self, now_ns: u64) -> Calendar {
        self.held.unwrap_or_else(|| calendar_of(self.epoch_s.saturating_add((now_ns / SECOND_NS) as i64)))
    }

    fn encode(&self, value: u8) -> u8 {
        if self.memory[0x0b] & register_b::BINARY != 0 { value } else { value / 10 % 10 << 4 | value % 10 }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.memory[0x0b] & register_b::BINARY != 0 {
            value
        } else {
            (value >> 4).min(9) * 10 + (value & 15).min(9)
        }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.memory[0x0b] & register_b::HOURS_24 != 0 {
            return self.encode(hour);
        }
        let afternoon = if hour >= 12 { 0x80 } else { 0 };
        self.encode((hour + 11) % 12 + 1) | afternoon
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.memory[0x0b] & register_b::HOURS_24 != 0 {
            return self.decode(value);
        }
        self.decode(value & 0x7f) % 12 + if value & 0x80 != 0 { 12 } else { 0 }
    }

    /// Serves a read of the index port (`offset` 0, which reads as ones) or of the data port.
    pub fn read(&mut self, offset: u16, now_ns: u64) -> u8 {
        if offset == 0 {
            return 0xff;
        }
        self.advance(now_ns);
        let now = self.now(now_ns);
        match self.index {
            0 => self.encode(now.second),
            2 => self.encode(now.minute),
            4 => self.encode_hour(now.hour),
            6 => self.encode(now.weekday),
            7 => self.encode(now.day),
            8 => self.encode(now.month),
            9 => self.encode((now.year % 100) as u8),
            CENTURY => self.encode((now.year / 100) as u8),
            0x0a => {
                let soon = self.held.is_none() && SECOND_NS - now_ns % SECOND_NS <= UPDATE_AHEAD_NS;
                self.memory[0x0a] & 0x7f | (soon as u8) << 7
            }
            0x0c => {
                let any = (self.irq() as u8) << 7;
                std::mem::take(&mut self.memory[0x0c]) | any
            }
            index => self.memory[index as usize],
        }
    }

    /// Serves a write to the index port (`offset` 0) or to the data port.
    pub fn write(&mut self, offset: u16, value: u8, now_ns: u64) {
        if offset == 0 {
            self.index = value & 0x7f;
            return;
        }
        self.advance(now_ns);
        match self.index {
            0 | 2 | 4 | 6 | 7 | 8 | 9 | CENTURY => self.set_time(value, now_ns),
            0x0a => self.memory[0x0a] = value & 0x7f,
            0x0b => {
                let (set, was_set) = (value & register_b::SET != 0, self.held.is_some());
                self.memory[0x0b] = value;
                if set && !was_set {
                    self.held = Some(self.now(now_ns));
                } else if !set && let Some(held) = self.held.take() {
                    self.epoch_s = seconds_of(held) - (now_ns / SECOND_NS) as i64;
                }
            }
            // Registers C and D cannot be written.
            0x0c | 0x0d => {}
            index => self.memory[index as usize] = value,
        }
    }

    fn set_time(&mut self, value: u8, now_ns: u64) {
        let mut time = self.now(now_ns);
        let plain = self.decode(value);
        match self.index {
            0 => time.second = plain.min(59),
            2 => time.minute = plain.min(59),
            4 => time.hour = self.decode_hour(value).min(23),
            6 => time.weekday = plain.clamp(1, 7),
            7 => time.day = plain.clamp(1, 31),
            8 => time.month = plain.clamp(1, 12),
            9 => time.year = time.year / 100 * 100 + plain.min(99) as u16,
            _ => time.year = plain.clamp(1, 99) as u16 * 100 + time.year % 100,
        }
        if self.held.is_some() {
            self.held = Some(time);
        } else {
            self.epoch_s = seconds_of(time) - (now_ns / SECOND_NS) as i64;
        }
    }
}

/// The calendar time of a number of seconds since 1970. Days are counted in eras of 400 years that begin in March.
fn calendar_of(seconds: i64) -> Calendar {
    let days = seconds.div_euclid(86_400);
    let rest = seconds.rem_euclid(86_400);
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + (month <= 2) as i64;
    Calendar {
        second: (rest % 60) as u8,
        minute: (rest / 60 % 60) as u8,
        hour: (rest / 3_600) as u8,
        // 1 January 1970 was a Thursday, the fifth day.
        weekday: ((days + 4).rem_euclid(7) + 1) as u8,
        day: (day_of_year - (153 * month_from_march + 2) / 5 + 1) as u8,
        month: month as u8,
        year: year.clamp(0, 9_999) as u16,
    }
}

/// Seconds since 1970 of a calendar time. The weekday is ignored.
fn seconds_of(time: Calendar) -> i64 {
    let month_from_march = (time.month as i64 + 9) % 12;
    let year = time.year as i64 - (time.month <= 2) as i64;
    let day_of_year = (153 * month_from_march + 2) / 5 + time.day as i64 - 1;
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    let days = era * 146_097 + day_of_era - 719_468;
    days * 86_400 + time.hour as i64 * 3_600 + time.minute as i64 * 60 + time.second as i64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn get(rtc: &mut Rtc, index: u8, now_ns: u64) -> u8 {
        rtc.write(0, index, now_ns);
        rtc.read(1, now_ns)
    }

    fn set(rtc: &mut Rtc, index: u8, value: u8, now_ns: u64) {
        rtc.write(0, index, now_ns);
        rtc.write(1, value, now_ns);
    }

    #[test]
    fn it_shows_epoch_plus_guest_time_in_bcd() {
        // 2026-11-20 10:40:05 UTC, a Friday.
        let mut rtc = Rtc::new(1_795_171_200);
        let now = 5 * SECOND_NS;
        let shown: Vec<u8> = [CENTURY, 9, 8, 7, 6, 4, 2, 0].map(|index| get(&mut rtc, index, now)).to_vec();
        assert_eq!(shown, [0x20, 0x26, 0x11, 0x20, 6, 0x10, 0x40, 0x05]);
        assert_eq!(get(&mut rtc, 0x0d, now), 0x80, "the battery is good");
    }

    #[test]
    fn update_in_progress_announces_the_second() {
        let mut rtc = Rtc::new(0);
        assert_eq!(get(&mut rtc, 0x0a, SECOND_NS - 244_001), 0x26);
        assert_eq!(get(&mut rtc, 0x0a, SECOND_NS - 244_000), 0xa6);
        assert_eq!(get(&mut rtc, 0x0a, SECOND_NS), 0x26);
    }

    #[test]
    fn setting_moves_the_epoch() {
        let mut rtc = Rtc::new(0);
        let now = 100 * SECOND_NS;
        set(&mut rtc, 0x0b, register_b::SET | register_b::BINARY, now);
        for (index, value) in [(CENTURY, 20), (9, 27), (8, 2), (7, 28), (4, 0x80 | 11), (2, 59), (0, 58)] {
            set(&mut rtc, index, value, now);
        }
        assert_eq!(get(&mut rtc, 0, now + 10 * SECOND_NS), 58, "held");
        set(&mut rtc, 0x0b, register_b::BINARY | register_b::HOURS_24, now);
        let later = now + 2 * SECOND_NS;
        assert_eq!([4, 2, 0].map(|index| get(&mut rtc, index, later)), [0, 0, 0], "midnight");
        assert_eq!([7, 8].map(|index| get(&mut rtc, index, later)), [1, 3]);
    }

    #[test]
    fn interrupts_come_at_their_deadlines_and_reading_c_clears_them() {
        let mut rtc = Rtc::new(0);
        assert_eq!(rtc.deadline_ns(), None);
        set(&mut rtc, 0x0b, register_b::PERIODIC | register_b::HOURS_24, 0);
        // Rate 6 is 1024 Hz.
        let deadline = rtc.deadline_ns().unwrap();
        assert_eq!(deadline, 976_562);
        rtc.advance(deadline - 1);
        assert!(!rtc.irq());
        rtc.advance(deadline);
        assert!(rtc.irq());
        assert_eq!(get(&mut rtc, 0x0c, deadline), 0xc0);
        assert!(!rtc.irq());

        set(&mut rtc, 0x0b, register_b::UPDATED | register_b::HOURS_24, deadline);
        assert_eq!(rtc.deadline_ns(), Some(SECOND_NS));
    }

    #[test]
    fn the_alarm_rings_at_its_time() {
        let mut rtc = Rtc::new(0);
        for (index, value) in
            [(1, 0x30), (3, 0x01), (5, 0xff), (0x0b, register_b::ALARM | register_b::HOURS_24)]
        {
            set(&mut rtc, index, value, 0);
        }
        while let Some(deadline) = rtc.deadline_ns().filter(|_| !rtc.irq()) {
            rtc.advance(deadline);
        }
        assert_eq!(rtc.seen_ns, 90 * SECOND_NS);
    }

    proptest! {
        #[test]
        fn calendar_and_seconds_are_inverse(seconds_ in -2_000_000_000i64..200_000_000_000) {
            prop_assert_eq!(seconds_of(calendar_of(seconds_)), seconds_);
        }

        #[test]
        fn any_access_is_survived(program in prop::collection::vec((any::<u8>(), any::<u8>(), any::<u8>(), 0u64..1 << 44), 1..60)) {
            let mut rtc = Rtc::new(1_700_000_000);
            let mut now = 0;
            for (index, write, value, step) in program {
                now += step;
                rtc.write(0, index, now);
                if write & 1 != 0 { rtc.write(1, value, now) } else { rtc.read(1, now); }
                rtc.advance(now);
                prop_assert!(rtc.deadline_ns().is_none_or(|deadline| deadline > now));
            }
        }
    }
}
