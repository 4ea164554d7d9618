//! Bit patterns that are hard for arithmetic.
#![allow(dead_code)]

use soft_cpu::float::F80;

/// Whether the host's CPU is AMD's. It differs from Intel's, which the soft CPU follows on every host, in one
/// case: with underflow unmasked (`control`), FSCALE, FPREM and FPREM1 of a denormal that they return
/// unchanged report an underflow and wrap its exponent. The manuals list #U for these instructions but do not
/// mention this case.
pub fn differs_in_underflow(a: F80, control: u16) -> bool {
    const UNDERFLOW: u16 = 1 << 4;
    is_amd() && control & UNDERFLOW == 0 && a.sign_exp & 0x7fff == 0 && a.significand != 0
}

fn is_amd() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0);
    let name = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat();
    matches!(name.as_slice(), b"AuthenticAMD" | b"HygonGenuine")
}

/// Prints how many cases a test has skipped.
pub fn tell_left_out(name: &str, count: u32) {
    if count != 0 {
        println!("{name}: {count} cases not compared, AMD reports an underflow of an unchanged denormal");
    }
}

/// A seeded generator of cases (splitmix64).
pub struct Cases(pub u64);

impl Cases {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// A fraction of `bits` bits, left-justified in 64 bits: few bits set, long runs of bits, or random.
    fn fraction(&mut self, bits: u32) -> u64 {
        let n = self.next();
        let any = match self.below(10) {
            0 | 1 => 0,
            2 => u64::MAX,
            3 => 1 << (n & 63),
            4 => u64::MAX << (n & 63),
            5 => !(1 << (n & 63)),
            6 => n & 7,
            7 => (n & 7) << (64 - bits),
            8 => 1 << 63 | n >> (n & 63),
            _ => n,
        };
        any & u64::MAX << (64 - bits)
    }

    /// A biased exponent, of a format with this bias.
    fn exponent(&mut self, bias: u64) -> u64 {
        let max = 2 * bias + 1;
        let near = self.below(140);
        match self.below(12) {
            0 => 0,
            1 => self.below(4),
            2 => max,
            3 => max - self.below(4),
            4..=7 => (bias + near).wrapping_sub(70).min(max),
            8 => bias / 2 + near % 8,
            9 => bias + bias / 2 - near % 8,
            _ => self.below(max + 1),
        }
    }

    pub fn f32(&mut self) -> u32 {
        let sign = self.next() as u32 & 1 << 31;
        sign | (self.exponent(127) as u32) << 23 | (self.fraction(23) >> 41) as u32
    }

    pub fn f64(&mut self) -> u64 {
        let sign = self.next() & 1 << 63;
        sign | self.exponent(1023) << 52 | self.fraction(52) >> 12
    }

    pub fn f80(&mut self) -> F80 {
        let biased = match self.below(8) {
            0 => 16383 - 1023 - 60 + self.below(70),
            1 => 16383 + 1020 + self.below(6),
            2 => 16383 - 127 - 30 + self.below(40),
            3 => 16383 + 120 + self.below(12),
            _ => self.exponent(16383),
        };
        let integer_bit = match self.below(20) {
            0 => 0,
            1 => self.next() & 1 << 63,
            _ => u64::from(biased != 0) << 63,
        };
        F80 {
            sign_exp: biased as u16 | (self.next() as u16 & 1 << 15),
            significand: integer_bit | self.fraction(63) >> 1,
        }
    }

    /// A number near `a`, so that sums cancel and comparisons are close.
    pub fn near(&mut self, a: u64, fraction_bits: u32) -> u64 {
        let sign_bit = self.next() & 1 << (fraction_bits + if fraction_bits == 52 { 11 } else { 8 });
        match self.below(3) {
            0 => a.wrapping_add(self.below(5)).wrapping_sub(2) ^ sign_bit,
            1 => a.wrapping_add(self.below(5) << fraction_bits).wrapping_sub(2 << fraction_bits) ^ sign_bit,
            _ => (a ^ self.next() >> (64 - fraction_bits)) ^ sign_bit,
        }
    }

    pub fn f32_pair(&mut self) -> (u32, u32) {
        let a = self.f32();
        let b = if self.below(3) == 0 { self.near(a.into(), 23) as u32 } else { self.f32() };
        (a, b)
    }

    pub fn f64_pair(&mut self) -> (u64, u64) {
        let a = self.f64();
        let b = if self.below(3) == 0 { self.near(a, 52) } else { self.f64() };
        (a, b)
    }

    pub fn f80_pair(&mut self) -> (F80, F80) {
        let a = self.f80();
        let mut b = self.f80();
        match self.below(4) {
            0 => {
                b.sign_exp =
                    a.sign_exp.wrapping_add(self.below(140) as u16).wrapping_sub(70) ^ b.sign_exp & 1 << 15
            }
            1 => {
                b.sign_exp = a.sign_exp ^ b.sign_exp & 1 << 15;
                b.significand = a.significand.wrapping_add(self.below(5)).wrapping_sub(2);
            }
            _ => {}
        }
        (a, b)
    }

    pub fn integer(&mut self) -> i64 {
        let n = self.next();
        match self.below(4) {
            0 => (n as i64) >> (n >> 7 & 63),
            1 => (1i64 << (n & 63)).wrapping_add((n >> 8 & 3) as i64 - 2),
            2 => (n & 15) as i64 - 8,
            _ => n as i64,
        }
    }
}
