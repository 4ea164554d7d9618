//! The pseudo-random sequences and checksums that hosts compute again.

/// Word `index` of the sequence of `seed`: SplitMix64's output function over a counter, so any word can be had alone.
pub const fn word(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Writes the bytes of the sequence of seed 0 from byte `offset` on, each word little-endian.
pub fn fill(offset: u64, bytes: &mut [u8]) {
    let head = bytes.len().min(offset.wrapping_neg() as usize % 8);
    let (head, rest) = bytes.split_at_mut(head);
    let word_at = |offset: u64| word(0, offset / 8).to_le_bytes();
    for (at, byte) in (offset..).zip(head.iter_mut()) {
        *byte = word_at(at)[at as usize % 8];
    }
    let offset = offset + head.len() as u64;
    for (at, part) in (offset..).step_by(8).zip(rest.chunks_mut(8)) {
        part.copy_from_slice(&word_at(at)[..part.len()]);
    }
}

/// A checksum over a stream of bytes, however it is cut: for each little-endian word, the last padded with zeros,
/// `hash = (hash ^ word) * 0x9e3779b97f4a7c15; hash ^= hash >> 32`, from 0; then the same with the length as the word.
#[derive(Clone, Copy, Default)]
pub struct Checksum {
    hash: u64,
    partial: u64,
    len: u64,
}

impl Checksum {
    /// Adds bytes.
    pub fn update(&mut self, mut bytes: &[u8]) {
        while !self.len.is_multiple_of(8) {
            let Some((&byte, rest)) = bytes.split_first() else { return };
            bytes = rest;
            self.partial |= u64::from(byte) << (self.len % 8 * 8);
            self.len += 1;
            if self.len.is_multiple_of(8) {
                self.hash = mix(self.hash, core::mem::take(&mut self.partial));
            }
        }
        let (words, tail) = bytes.as_chunks::<8>();
        self.hash = words.iter().fold(self.hash, |hash, word| mix(hash, u64::from_le_bytes(*word)));
        self.len += bytes.len() as u64;
        self.partial = tail.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte));
    }

    /// Bytes so far.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True before the first byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The checksum of the bytes so far.
    pub fn value(&self) -> u64 {
        let hash = if self.len.is_multiple_of(8) { self.hash } else { mix(self.hash, self.partial) };
        mix(hash, self.len)
    }
}

const fn mix(hash: u64, word: u64) -> u64 {
    let hash = (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    hash ^ hash >> 32
}

/// One pass of `workload=mem` over `area`: each word becomes its old value rotated left by one, XOR the pass's sequence
/// (that of `seed + pass`).
///
/// Returns the checksum: the sum of `new * (2 * index + 1)` over all words, wrapping.
pub fn mem_pass(area: &mut [u64], seed: u64, pass: u64) -> u64 {
    let mut sum = 0u64;
    for (index, value) in (0u64..).zip(area) {
        *value = value.rotate_left(1) ^ word(seed.wrapping_add(pass), index);
        sum = sum.wrapping_add(value.wrapping_mul(2 * index + 1));
    }
    sum
}

/// The registers of `workload=spin`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spin {
    /// xorshift64 state; never 0.
    pub x: u64,
    /// Changed by every round in one of two ways, as bit 0 of `x` says.
    pub a: u64,
    /// Rounds in which bits 4 and 5 of `x` were both 0.
    pub b: u64,
}

impl Spin {
    /// The registers at the start.
    pub const fn new(seed: u64) -> Self {
        Self { x: if seed == 0 { 1 } else { seed }, a: 0, b: 0 }
    }

    /// What one round does. The guest runs the same in assembly, so that its branches are branches.
    pub const fn round(&mut self) {
        self.x ^= self.x << 13;
        self.x ^= self.x >> 7;
        self.x ^= self.x << 17;
        if self.x & 1 != 0 {
            self.a = self.a.wrapping_add(self.x);
        } else {
            self.a = self.a.rotate_left(5);
        }
        if self.x & 0x30 == 0 {
            self.b += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn word_is_splitmix64() {
        // The first outputs of the published SplitMix64 for seed 1234567.
        assert_eq!(word(1_234_567, 0), 6_457_827_717_110_365_317);
        assert_eq!(word(1_234_567, 1), 3_203_168_211_198_807_973);
    }

    #[test]
    fn fill_can_start_and_stop_anywhere() {
        let mut whole = [0; 64];
        fill(0, &mut whole);
        assert_eq!(whole[8..16], word(0, 1).to_le_bytes());
        for start in 0..32 {
            for end in start..64 {
                let mut part = vec![0; end - start];
                fill(start as u64, &mut part);
                assert_eq!(part, whole[start..end], "{start}..{end}");
            }
        }
    }

    #[test]
    fn checksum_does_not_depend_on_the_cuts() {
        let mut bytes = [0; 61];
        fill(0, &mut bytes);
        let words = bytes.chunks(8).map(|chunk| {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            u64::from_le_bytes(word)
        });
        let expected = words.chain([61]).fold(0, mix);
        for cut in 0..bytes.len() {
            for second in cut..bytes.len() {
                let mut sum = Checksum::default();
                [&bytes[..cut], &bytes[cut..second], &bytes[second..]]
                    .iter()
                    .for_each(|part| sum.update(part));
                assert_eq!((sum.value(), sum.len()), (expected, 61), "{cut} {second}");
            }
        }
    }

    #[test]
    fn spin_is_what_the_guest_printed() {
        // Printed by the guest's assembly on KVM for `workload=spin every=16777216`.
        let mut spin = Spin::new(1);
        (0..1 << 24).for_each(|_| spin.round());
        assert_eq!(spin, Spin { x: 0x88b4_2240_800b_c1c9, a: 0x1cf8_b849_73d1_d09e, b: 4_195_887 });
    }

    #[test]
    fn mem_passes_depend_on_each_other_and_on_the_seed() {
        let mut area = [0; 64];
        let first = mem_pass(&mut area, 1, 0);
        let second = mem_pass(&mut area, 1, 1);
        let mut fresh = [0; 64];
        assert_ne!(mem_pass(&mut fresh, 1, 1), second);
        assert_ne!(mem_pass(&mut [0; 64], 2, 0), first);
        assert_eq!(mem_pass(&mut [0; 64], 1, 0), first);
    }
}
