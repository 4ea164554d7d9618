//! The pseudo-random sequences and checksums that hosts compute again.

/// Word `index` of the sequence of `seed`: SplitMix64's output function over a counter, so any word can be had alone.
pub const fn word(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
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
