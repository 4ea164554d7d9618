//! The 8254 timer (Intel 231164) and system control port B, in exact integer arithmetic on guest time.
//!
//! Nothing ticks: a counter stores when it began to count, and everything else is computed from the time at which it is
//! read. Counter 0 drives interrupt line 0, counter 2 the speaker, whose gate is a bit of port 0x61. A count is loaded
//! at the clock pulse after it was written.

use serde::{Deserialize, Serialize};

/// Clock pulses per second.
pub const FREQUENCY_HZ: u64 = 1_193_182;
/// Ports of the timer and of system control port B, for the bus.
pub const PORTS: [(u16, u16); 2] = [(0x40, 4), (0x61, 1)];
const NS: u128 = 1_000_000_000;

/// Clock pulses that have passed at a guest time.
fn pulses(now_ns: u64) -> u64 {
    (now_ns as u128 * FREQUENCY_HZ as u128 / NS) as u64
}

/// The guest time in ns at which pulse number `pulse` has just passed.
fn time_of(pulse: u64) -> u64 {
    (pulse as u128 * NS).div_ceil(FREQUENCY_HZ as u128).min(u64::MAX as u128) as u64
}

/// Which bytes of a count the guest writes and reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum AccessMode {
    Low,
    High,
    LowHigh,
}

/// A count in progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Countdown {
    /// Pulses in one round, 1 to 65536.
    count: u32,
    /// Pulses counted before `since`.
    counted: u64,
    /// Pulse from which it counts on; `None`: it is stopped.
    since: Option<u64>,
}

impl Countdown {
    fn elapsed(&self, now: u64) -> u64 {
        self.counted + self.since.map_or(0, |since| now.saturating_sub(since))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct PitCounter {
    mode: u8,
    access: AccessMode,
    bcd: bool,
    gate: bool,
    /// The count in progress; `None`: no count was written since the mode was set.
    run: Option<Countdown>,
    /// In modes 2 and 3: the round that goes on until `run` begins.
    before: Option<Countdown>,
    /// In modes 1 and 5: the count that the next rise of the gate starts.
    armed: Option<u32>,
    /// The low byte of a count whose high byte was not written yet.
    write_low: Option<u8>,
    /// The next read returns the high byte.
    read_high: bool,
    /// Latched count.
    latch: Option<u16>,
    /// Latched status.
    status: Option<u8>,
}

impl PitCounter {
    fn new() -> PitCounter {
        PitCounter {
            mode: 3,
            access: AccessMode::LowHigh,
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

    /// The round in progress at pulse `now`.
    fn current(&self, now: u64) -> Option<Countdown> {
        let run = self.run?;
        match self.before {
            Some(before) if run.since.is_some_and(|since| now < since) => Some(before),
            _ => Some(run),
        }
    }

    fn set_mode(&mut self, control: u8) {
        let mode = control >> 1 & 7;
        *self = PitCounter {
            mode: if mode > 5 { mode - 4 } else { mode },
            access: match control >> 4 & 3 {
                1 => AccessMode::Low,
                2 => AccessMode::High,
                _ => AccessMode::LowHigh,
            },
            bcd: control & 1 != 0,
            gate: self.gate,
            ..PitCounter::new()
        };
    }

    fn write(&mut self, value: u8, now: u64) {
        let raw = match self.access {
            AccessMode::Low => value as u16,
            AccessMode::High => (value as u16) << 8,
            AccessMode::LowHigh => match self.write_low.take() {
                None => {
                    self.write_low = Some(value);
                    // In mode 0 the low byte stops the count and lowers OUT.
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
                // The new count starts when the round in progress ends.
                let current = self.current(now).filter(|run| run.since.is_some());
                let since = match current {
                    Some(run) => now + run.count as u64 - run.elapsed(now) % run.count as u64,
                    None => now + 1,
                };
                self.before = current;
                self.run = Some(Countdown { count, counted: 0, since: self.gate.then_some(since) });
            }
            _ => self.run = Some(Countdown { count, counted: 0, since: self.gate.then_some(now + 1) }),
        }
    }

    fn set_gate(&mut self, gate: bool, now: u64) {
        let rises = gate && !self.gate;
        let falls = !gate && self.gate;
        self.gate = gate;
        match self.mode {
            1 | 5 if rises => {
                if let Some(count) = self.armed {
                    self.run = Some(Countdown { count, counted: 0, since: Some(now + 1) });
                }
            }
            2 | 3 => {
                if falls && let Some(run) = self.current(now) {
                    self.run = Some(Countdown { since: None, ..run });
                    self.before = None;
                } else if rises && let Some(run) = &mut self.run {
                    *run = Countdown { counted: 0, since: Some(now + 1), ..*run };
                }
            }
            0 | 4 => {
                if let Some(run) = &mut self.run {
                    if falls {
                        *run = Countdown { counted: run.elapsed(now), since: None, ..*run };
                    } else if rises {
                        run.since = Some(now);
                    }
                }
            }
            _ => {}
        }
    }

    /// Level of the OUT pin.
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

    /// The first pulse after `after` at which OUT rises, if it will rise.
    fn next_rise(&self, after: u64) -> Option<u64> {
        let run = self.run?;
        let since = run.since?;
        let count = run.count as u64;
        // The pulse at which this count would have begun had it never been stopped.
        let begin = since as i128 - run.counted as i128;
        let rise = match self.mode {
            0 | 1 => begin + count as i128,
            2 | 3 => {
                // The round before ends with a rise when this one begins.
                let rounds = (after as i128 - begin).div_euclid(count as i128) + 1;
                let first = if self.before.is_some() { 0 } else { 1 };
                begin + rounds.max(first) * count as i128
            }
            _ => begin + count as i128 + 1,
        };
        (rise > after as i128).then_some(rise as u64)
    }

    /// Value of the counting element, in BCD if the counter counts in BCD.
    fn value(&self, now: u64) -> u16 {
        let Some(run) = self.current(now) else { return 0 };
        let (elapsed, count) = (run.elapsed(now), run.count as u64);
        let modulus = if self.bcd { 10_000 } else { 0x10000 };
        let value = match self.mode {
            2 => count - elapsed % count,
            3 => {
                // Each half of the wave counts down by two; the first pulse of an odd count takes one or three.
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
            AccessMode::Low => 1,
            AccessMode::High => 2,
            AccessMode::LowHigh => 3,
        };
        (self.out(now) as u8) << 7 | (waiting as u8) << 6 | access << 4 | self.mode << 1 | self.bcd as u8
    }

    fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.status.take() {
            return status;
        }
        let [low, high] = self.latch.unwrap_or_else(|| self.value(now)).to_le_bytes();
        match self.access {
            AccessMode::LowHigh if !self.read_high => {
                self.read_high = true;
                low
            }
            access => {
                self.read_high = false;
                self.latch = None;
                if matches!(access, AccessMode::Low) { low } else { high }
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
    counters: [PitCounter; 3],
    /// Pulse up to which rises of counter 0's OUT were reported.
    reported: u64,
    /// Bit 1 of port 0x61: the speaker is connected to counter 2.
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
        let mut counters = [PitCounter::new(), PitCounter::new(), PitCounter::new()];
        counters[2].gate = false;
        Pit { counters, reported: 0, speaker: false }
    }

    /// Whether a state that was read from a file is one that the timer can be in.
    pub fn is_sane(&self) -> bool {
        let run = |run: &Countdown| {
            (1..=0x10000).contains(&run.count) && run.since.unwrap_or(0).max(run.counted) < 1 << 62
        };
        self.counters.iter().all(|c| c.mode < 6 && c.run.iter().chain(&c.before).all(run))
    }

    /// Guest time in ns of the next rise of interrupt line 0 that was not reported yet.
    pub fn deadline_ns(&self) -> Option<u64> {
        self.counters[0].next_rise(self.reported).map(time_of)
    }

    /// Whether line 0 has risen since the last call. Several rises count as one: the interrupt controller latches one only.
    pub fn advance(&mut self, now_ns: u64) -> bool {
        let now = pulses(now_ns);
        let risen = self.counters[0].next_rise(self.reported).is_some_and(|rise| rise <= now);
        self.reported = self.reported.max(now);
        risen
    }

    /// Level of interrupt line 0.
    pub fn line(&self, now_ns: u64) -> bool {
        self.counters[0].out(pulses(now_ns))
    }

    /// Serves a read of one of the [`PORTS`].
    pub fn read(&mut self, port: u16, now_ns: u64) -> u8 {
        let now = pulses(now_ns);
        match port {
            0x40..=0x42 => self.counters[port as usize - 0x40].read(now),
            0x61 => {
                // Bit 4 toggles with each memory refresh, every 15.085 us.
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

    /// Serves a write to one of the [`PORTS`].
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
            // Read-back: bit 5 low latches the count, bit 4 low the status, of the counters selected by bits 3:1.
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
mod tests;
