//! The 8254 timer (Intel 231164) and system control port B, in exact integer arithmetic on guest time.
//!
//! Nothing ticks: a counter remembers when it began and everything is computed from the time at which it is asked.
//! Counter 0 drives interrupt line 0, counter 2 the speaker, whose gate is in port 0x61. The count is loaded at
//! the clock pulse after it was written.

use serde::{Deserialize, Serialize};

/// Pulses in a second.
pub const FREQUENCY_HZ: u64 = 1_193_182;
/// Ports of the timer and of system control port B, for the bus.
pub const PORTS: [(u16, u16); 2] = [(0x40, 4), (0x61, 1)];
const NS: u128 = 1_000_000_000;

/// Clock pulses that have passed at a guest time.
fn pulses(now_ns: u64) -> u64 {
    (now_ns as u128 * FREQUENCY_HZ as u128 / NS) as u64
}

/// The first ns at which that many pulses have passed.
fn time_of(pulse: u64) -> u64 {
    (pulse as u128 * NS).div_ceil(FREQUENCY_HZ as u128).min(u64::MAX as u128) as u64
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Access {
    Low,
    High,
    LowHigh,
}

/// A count in progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Run {
    /// Pulses in one round, 1 to 65536.
    count: u32,
    /// Pulses counted before `since`.
    counted: u64,
    /// Pulse from which it counts; `None`: it is stopped.
    since: Option<u64>,
}

impl Run {
    fn elapsed(&self, now: u64) -> u64 {
        self.counted + self.since.map_or(0, |since| now.saturating_sub(since))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Counter {
    mode: u8,
    access: Access,
    bcd: bool,
    gate: bool,
    /// What counts; `None`: no count was written since the mode.
    run: Option<Run>,
    /// In modes 2 and 3 the round that ends when `run` begins.
    before: Option<Run>,
    /// In modes 1 and 5 the count that the next gate starts.
    armed: Option<u32>,
    /// First byte of a count of two.
    write_low: Option<u8>,
    /// The second byte is read next.
    read_high: bool,
    /// Latched count.
    latch: Option<u16>,
    /// Latched status.
    status: Option<u8>,
}

impl Counter {
    fn new() -> Counter {
        Counter {
            mode: 3,
            access: Access::LowHigh,
            bcd: false,
            gate: true,
            run: None,
            before: None,
            armed: None,
            write_low: None,
            read_high: false,
            latch: None,
            status: None,
        }
    }

    fn is_periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    /// The round that is in progress at pulse `now`.
    fn current(&self, now: u64) -> Option<Run> {
        let run = self.run?;
        match self.before {
            Some(before) if run.since.is_some_and(|since| now < since) => Some(before),
            _ => Some(run),
        }
    }

    fn set_mode(&mut self, control: u8) {
        let mode = control >> 1 & 7;
        *self = Counter {
            mode: if mode > 5 { mode - 4 } else { mode },
            access: match control >> 4 & 3 {
                1 => Access::Low,
                2 => Access::High,
                _ => Access::LowHigh,
            },
            bcd: control & 1 != 0,
            gate: self.gate,
            ..Counter::new()
        };
    }

    fn write(&mut self, value: u8, now: u64) {
        let raw = match self.access {
            Access::Low => value as u16,
            Access::High => (value as u16) << 8,
            Access::LowHigh => match self.write_low.take() {
                None => {
                    self.write_low = Some(value);
                    // In mode 0 the first byte stops the count and lowers OUT.
                    if self.mode == 0 {
                        self.run = None;
                    }
                    return;
                }
                Some(low) => u16::from_le_bytes([low, value]),
            },
        };
        self.load(if self.bcd { from_bcd(raw) } else { raw as u32 }, now);
    }

    fn load(&mut self, raw: u32, now: u64) {
        let count = match (raw, self.bcd) {
            (0, false) => 0x10000,
            (0, true) => 10_000,
            _ => raw,
        };
        match self.mode {
            1 | 5 => self.armed = Some(count),
            2 | 3 => {
                // A round in progress is finished first.
                let current = self.current(now).filter(|run| run.since.is_some());
                let since = match current {
                    Some(run) => now + run.count as u64 - run.elapsed(now) % run.count as u64,
                    None => now + 1,
                };
                self.before = current;
                self.run = Some(Run { count, counted: 0, since: self.gate.then_some(since) });
            }
            _ => self.run = Some(Run { count, counted: 0, since: self.gate.then_some(now + 1) }),
        }
    }

    fn set_gate(&mut self, gate: bool, now: u64) {
        let rises = gate && !self.gate;
        let falls = !gate && self.gate;
        self.gate = gate;
        match self.mode {
            1 | 5 if rises => {
                if let Some(count) = self.armed {
                    self.run = Some(Run { count, counted: 0, since: Some(now + 1) });
                }
            }
            2 | 3 => {
                if falls && let Some(run) = self.current(now) {
                    self.run = Some(Run { since: None, ..run });
                    self.before = None;
                } else if rises && let Some(run) = &mut self.run {
                    *run = Run { counted: 0, since: Some(now + 1), ..*run };
                }
            }
            0 | 4 => {
                if let Some(run) = &mut self.run {
                    if falls {
                        *run = Run { counted: run.elapsed(now), since: None, ..*run };
                    } else if rises {
                        run.since = Some(now);
                    }
                }
            }
            _ => {}
        }
    }

    /// The OUT pin.
    fn out(&self, now: u64) -> bool {
        let Some(run) = self.current(now) else { return self.mode != 0 };
        let (elapsed, count) = (run.elapsed(now), run.count as u64);
        match self.mode {
            0 => elapsed >= count,
            1 => elapsed >= count,
            _ if self.is_periodic() && run.since.is_none() => true,
            2 => elapsed % count != count - 1,
            3 => elapsed % count < count.div_ceil(2),
            _ => elapsed != count,
        }
    }

    /// The first pulse after `after` at which OUT rises, if there will be one.
    fn next_rise(&self, after: u64) -> Option<u64> {
        let run = self.run?;
        let since = run.since?;
        let count = run.count as u64;
        // The pulse at which the counting element began this run.
        let begin = since as i128 - run.counted as i128;
        let rise = match self.mode {
            0 | 1 => begin + count as i128,
            2 | 3 => {
                // A round that ends when this run begins ends with a rise.
                let rounds = (after as i128 - begin).div_euclid(count as i128) + 1;
                let first = if self.before.is_some() { 0 } else { 1 };
                begin + rounds.max(first) * count as i128
            }
            _ => begin + count as i128 + 1,
        };
        (rise > after as i128).then_some(rise as u64)
    }

    /// The counting element.
    fn value(&self, now: u64) -> u16 {
        let Some(run) = self.current(now) else { return 0 };
        let (elapsed, count) = (run.elapsed(now), run.count as u64);
        let modulus = if self.bcd { 10_000 } else { 0x10000 };
        let value = match self.mode {
            2 => count - elapsed % count,
            3 => {
                // It counts by two, and for each half anew; the first pulse of an odd count takes one or three.
                let (high, place) = (count.div_ceil(2), elapsed % count);
                let in_half = if place < high { place } else { place - high };
                (count & !1).saturating_sub(2 * in_half)
            }
            _ => (count + modulus - elapsed % modulus) % modulus,
        } % modulus;
        if self.bcd { to_bcd(value as u32) } else { value as u16 }
    }

    fn status(&self, now: u64) -> u8 {
        let waiting =
            self.write_low.is_some() || self.run.and_then(|run| run.since).is_none_or(|since| now < since);
        let access = match self.access {
            Access::Low => 1,
            Access::High => 2,
            Access::LowHigh => 3,
        };
        (self.out(now) as u8) << 7 | (waiting as u8) << 6 | access << 4 | self.mode << 1 | self.bcd as u8
    }

    fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.status.take() {
            return status;
        }
        let [low, high] = self.latch.unwrap_or_else(|| self.value(now)).to_le_bytes();
        match self.access {
            Access::LowHigh if !self.read_high => {
                self.read_high = true;
                low
            }
            access => {
                self.read_high = false;
                self.latch = None;
                if matches!(access, Access::Low) { low } else { high }
            }
        }
    }

    fn latch_value(&mut self, now: u64) {
        if self.latch.is_none() {
            self.latch = Some(self.value(now));
        }
    }
}

fn from_bcd(raw: u16) -> u32 {
    (0..4).rev().fold(0, |sum, digit| sum * 10 + (raw >> (4 * digit) & 15) as u32)
}

fn to_bcd(value: u32) -> u16 {
    (0..4).fold(0, |bcd, digit| bcd | ((value / 10u32.pow(digit) % 10) as u16) << (4 * digit))
}

/// The timer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pit {
    counters: [Counter; 3],
    /// Pulse up to which rises of counter 0 were reported.
    reported: u64,
    /// Bit 1 of port 0x61: the speaker listens.
    speaker: bool,
}

impl Default for Pit {
    fn default() -> Pit {
        Pit::new()
    }
}

impl Pit {
    /// After power-on: nothing counts, the gate of counter 2 is closed.
    pub fn new() -> Pit {
        let mut counters = [Counter::new(), Counter::new(), Counter::new()];
        counters[2].gate = false;
        Pit { counters, reported: 0, speaker: false }
    }

    /// Whether a state that was read is one that the timer can be in.
    pub fn is_sane(&self) -> bool {
        let run = |run: &Run| {
            (1..=0x10000).contains(&run.count) && run.since.unwrap_or(0).max(run.counted) < 1 << 62
        };
        self.counters.iter().all(|c| c.mode < 6 && c.run.iter().chain(&c.before).all(run))
    }

    /// Guest time of the next rise of interrupt line 0 that was not reported.
    pub fn deadline_ns(&self) -> Option<u64> {
        self.counters[0].next_rise(self.reported).map(time_of)
    }

    /// Whether line 0 has risen since the last call. Several rises are one: the controller would have seen but one.
    pub fn advance(&mut self, now_ns: u64) -> bool {
        let now = pulses(now_ns);
        let risen = self.counters[0].next_rise(self.reported).is_some_and(|rise| rise <= now);
        self.reported = self.reported.max(now);
        risen
    }

    /// The level of line 0.
    pub fn line(&self, now_ns: u64) -> bool {
        self.counters[0].out(pulses(now_ns))
    }

    /// The guest reads a port of [`PORTS`].
    pub fn read(&mut self, port: u16, now_ns: u64) -> u8 {
        let now = pulses(now_ns);
        match port {
            0x40..=0x42 => self.counters[port as usize - 0x40].read(now),
            0x61 => {
                // Bit 4 shows memory refreshes, one every 15.085 us.
                let refresh = now_ns / 15_085 & 1 != 0;
                let counter = &self.counters[2];
                (counter.out(now) as u8) << 5
                    | (refresh as u8) << 4
                    | (self.speaker as u8) << 1
                    | counter.gate as u8
            }
            _ => 0xff,
        }
    }

    /// The guest writes a port of [`PORTS`].
    pub fn write(&mut self, port: u16, value: u8, now_ns: u64) {
        let now = pulses(now_ns);
        match port {
            0x40..=0x42 => self.counters[port as usize - 0x40].write(value, now),
            0x43 => self.control(value, now),
            _ => {
                self.speaker = value & 2 != 0;
                self.counters[2].set_gate(value & 1 != 0, now);
            }
        }
        self.reported = self.reported.max(now);
    }

    fn control(&mut self, value: u8, now: u64) {
        let selected = value >> 6;
        if selected == 3 {
            // Read-back: bits 5 and 4 low latch count and status of the counters in bits 3:1.
            for (i, counter) in
                self.counters.iter_mut().enumerate().filter(|(i, _)| value >> (i + 1) & 1 != 0)
            {
                debug_assert!(i < 3);
                if value & 0x20 == 0 {
                    counter.latch_value(now);
                }
                if value & 0x10 == 0 && counter.status.is_none() {
                    counter.status = Some(counter.status(now));
                }
            }
        } else if value & 0x30 == 0 {
            self.counters[selected as usize].latch_value(now);
        } else {
            self.counters[selected as usize].set_mode(value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Linux's periodic tick at 100 Hz: mode 2, 11932 pulses.
    fn periodic(now_ns: u64) -> Pit {
        let mut pit = Pit::new();
        pit.write(0x43, 0x34, now_ns);
        pit.write(0x40, 0x9c, now_ns);
        pit.write(0x40, 0x2e, now_ns);
        pit
    }

    #[test]
    fn a_periodic_tick_comes_every_count_pulses() {
        let mut pit = periodic(0);
        let mut last = 0;
        for tick in 1..=1000u64 {
            let deadline = pit.deadline_ns().unwrap();
            assert_eq!(deadline, time_of(1 + tick * 11932));
            assert!(!pit.advance(deadline - 1));
            assert!(pit.advance(deadline) && pit.line(deadline));
            assert!(deadline > last);
            last = deadline;
        }
        assert_eq!(last / 10_000, 1_000_015, "ten seconds and 15 ppm");
    }

    #[test]
    fn missed_ticks_are_one() {
        let mut pit = periodic(0);
        assert!(pit.advance(1_000_000_000));
        assert!(!pit.advance(1_000_000_000));
        assert!(pit.deadline_ns().unwrap() > 1_000_000_000);
    }

    #[test]
    fn mode_0_rises_at_the_end_and_stays() {
        let mut pit = Pit::new();
        pit.write(0x43, 0x30, 0);
        assert!(!pit.line(0));
        pit.write(0x40, 100, 0);
        assert_eq!(pit.deadline_ns(), None, "only half of the count is written");
        pit.write(0x40, 0, 0);
        let deadline = pit.deadline_ns().unwrap();
        assert_eq!(deadline, time_of(101), "N + 1 pulses");
        assert!(!pit.line(deadline - 1) && pit.line(deadline));
        assert!(pit.advance(deadline));
        assert_eq!(pit.deadline_ns(), None);
        assert!(pit.line(deadline * 1000));
    }

    #[test]
    fn mode_4_strobes_once() {
        let mut pit = Pit::new();
        pit.write(0x43, 0x38, 0);
        pit.write(0x40, 10, 0);
        pit.write(0x40, 0, 0);
        assert!(pit.line(time_of(10)) && !pit.line(time_of(11)) && pit.line(time_of(12)));
        assert_eq!(pit.deadline_ns(), Some(time_of(12)));
        // A new count starts it again.
        pit.advance(time_of(20));
        pit.write(0x40, 5, time_of(20));
        pit.write(0x40, 0, time_of(20));
        assert_eq!(pit.deadline_ns(), Some(time_of(27)));
    }

    #[test]
    fn mode_3_is_a_square_wave() {
        let mut pit = Pit::new();
        pit.write(0x43, 0x16, 0);
        pit.write(0x40, 5, 0);
        let wave: Vec<bool> = (1..=10).map(|pulse| pit.line(time_of(pulse))).collect();
        assert_eq!(wave, [true, true, true, false, false, true, true, true, false, false]);
        assert_eq!(pit.deadline_ns(), Some(time_of(6)));
    }

    #[test]
    fn a_new_count_waits_for_the_end_of_the_round() {
        let mut pit = Pit::new();
        pit.write(0x43, 0x14, 0);
        pit.write(0x40, 100, 0);
        pit.write(0x40, 10, time_of(50));
        assert_eq!(pit.deadline_ns(), Some(time_of(101)));
        assert!(pit.advance(time_of(101)));
        assert_eq!(pit.deadline_ns(), Some(time_of(111)));
    }

    #[test]
    fn counts_latch_and_read_back() {
        let mut pit = periodic(0);
        pit.write(0x43, 0x00, time_of(101));
        let later = time_of(5_000);
        let value = u16::from_le_bytes([pit.read(0x40, later), pit.read(0x40, later)]);
        assert_eq!(value, 11932 - 100, "the latch holds");
        pit.write(0x43, 0xc2, later);
        assert_eq!(pit.read(0x40, later), 0xb4, "status: OUT high, both bytes, mode 2");
        let value = u16::from_le_bytes([pit.read(0x40, later), pit.read(0x40, later)]);
        assert_eq!(value, 11932 - 4_999);
    }

    #[test]
    fn calibration_through_port_61_sees_the_count_fall_and_out_rise() {
        // quick_pit_calibrate and pit_calibrate_tsc of Linux: counter 2, mode 0, gate by port 0x61.
        let mut pit = Pit::new();
        pit.write(0x61, pit.clone().read(0x61, 0) & !2 | 1, 0);
        pit.write(0x43, 0xb0, 0);
        pit.write(0x42, 0xff, 0);
        pit.write(0x42, 0xff, 0);
        let at = time_of(1 + 256);
        assert_eq!((pit.read(0x42, at), pit.read(0x42, at)), (0xff, 0xfe));
        assert_eq!(pit.read(0x61, at) & 0x20, 0);
        assert_ne!(pit.read(0x61, time_of(65_536)) & 0x20, 0);
    }

    #[test]
    fn a_closed_gate_holds_the_count() {
        let mut pit = Pit::new();
        pit.write(0x61, 1, 0);
        pit.write(0x43, 0xb0, 0);
        pit.write(0x42, 100, 0);
        pit.write(0x42, 0, 0);
        pit.write(0x61, 0, time_of(51));
        assert_eq!(pit.read(0x42, time_of(500)), 50);
        pit.read(0x42, time_of(500));
        pit.write(0x61, 1, time_of(500));
        assert_eq!(pit.read(0x61, time_of(549)) & 0x20, 0);
        assert_ne!(pit.read(0x61, time_of(550)) & 0x20, 0);
    }

    #[test]
    fn bcd_counts_are_decimal() {
        let mut pit = Pit::new();
        pit.write(0x43, 0x35, 0);
        pit.write(0x40, 0x00, 0);
        pit.write(0x40, 0x10, 0);
        assert_eq!(pit.deadline_ns(), Some(time_of(1_001)));
        let at = time_of(2);
        assert_eq!((pit.read(0x40, at), pit.read(0x40, at)), (0x99, 0x09));
    }

    proptest! {
        /// What is computed agrees with a counter that ticks.
        #[test]
        fn rises_are_those_of_the_wave(mode in 0u8..6, count in 2u32..40, after in 0u64..200) {
            let mut counter = Counter::new();
            counter.gate = !matches!(mode, 1 | 5);
            counter.set_mode(0x10 | mode << 1);
            counter.write(count as u8, 3);
            counter.set_gate(true, 3);
            let rise = (after + 1..after + 100).find(|&pulse| counter.out(pulse) && !counter.out(pulse - 1));
            prop_assert_eq!(counter.next_rise(after).filter(|rise| *rise < after + 100), rise);
        }

        /// Whatever a guest writes, nothing overflows and a deadline lies ahead.
        #[test]
        fn any_program_is_survived(program in prop::collection::vec((0u8..5, any::<u8>(), 0u64..1 << 40), 1..200)) {
            let mut pit = Pit::new();
            let mut now = 0;
            for (port, value, step) in program {
                now += step;
                let port = [0x40, 0x41, 0x42, 0x43, 0x61][port as usize];
                pit.write(port, value, now);
                pit.read(port, now);
                pit.advance(now);
                prop_assert!(pit.deadline_ns().is_none_or(|deadline| deadline > now));
            }
        }
    }
}
