//! The integer operand widths, and access to register operands of each width.

/// Size of the register file: a power of two, so that an index needs a mask and no check.
pub const REGS: usize = 32;
/// In an 8-bit register operand: bits 15 to 8 of the register.
pub const HIGH_BYTE: u8 = 0x20;

/// An operand width of the integer set.
pub trait Int:
    Copy
    + Eq
    + Ord
    + std::ops::BitAnd<Output = Self>
    + std::ops::BitOr<Output = Self>
    + std::ops::BitXor<Output = Self>
    + std::ops::Not<Output = Self>
{
    /// Width in bits.
    const BITS: u32;
    /// Width in bytes.
    const SIZE: usize;
    /// The low bits of `v`.
    fn from_u64(v: u64) -> Self;
    /// Zero-extended.
    fn to_u64(self) -> u64;
    /// Sign-extended.
    fn sext(self) -> u64;
    /// Wrapping sum.
    fn add(self, o: Self) -> Self;
    /// Wrapping difference.
    fn sub(self, o: Self) -> Self;
    /// Reads the first `SIZE` bytes, little-endian; `None` when there are fewer.
    fn read(b: &[u8]) -> Option<Self>;
    /// Writes the first `SIZE` bytes; `None` when there are fewer.
    fn write(self, b: &mut [u8]) -> Option<()>;
    /// Value of register operand `r`.
    fn get(regs: &[u64; REGS], r: u8) -> Self;
    /// Writes register operand `r`: 32 bits clear the upper half, 8 and 16 bits leave the rest unchanged.
    fn set(self, regs: &mut [u64; REGS], r: u8);
}

macro_rules! int {
    ($t:ty, $s:ty, $get:expr, $set:expr) => {
        impl Int for $t {
            const BITS: u32 = <$t>::BITS;
            const SIZE: usize = size_of::<$t>();
            #[inline(always)]
            fn from_u64(v: u64) -> Self {
                v as $t
            }
            #[inline(always)]
            fn to_u64(self) -> u64 {
                self as u64
            }
            #[inline(always)]
            fn sext(self) -> u64 {
                self as $s as i64 as u64
            }
            #[inline(always)]
            fn add(self, o: Self) -> Self {
                self.wrapping_add(o)
            }
            #[inline(always)]
            fn sub(self, o: Self) -> Self {
                self.wrapping_sub(o)
            }
            #[inline(always)]
            fn read(b: &[u8]) -> Option<Self> {
                Some(<$t>::from_le_bytes(*b.first_chunk()?))
            }
            #[inline(always)]
            fn write(self, b: &mut [u8]) -> Option<()> {
                *b.first_chunk_mut()? = self.to_le_bytes();
                Some(())
            }
            #[inline(always)]
            fn get(regs: &[u64; REGS], r: u8) -> Self {
                let get: fn(&[u64; REGS], u8) -> Self = $get;
                get(regs, r)
            }
            #[inline(always)]
            fn set(self, regs: &mut [u64; REGS], r: u8) {
                let set: fn(&mut [u64; REGS], u8, Self) = $set;
                set(regs, r, self)
            }
        }
    };
}

int!(
    u8,
    i8,
    |regs, r| {
        let v = regs[slot(r)];
        if r & HIGH_BYTE != 0 { (v >> 8) as u8 } else { v as u8 }
    },
    |regs, r, v| {
        let x = &mut regs[slot(r)];
        if r & HIGH_BYTE != 0 {
            *x = *x & !0xff00 | (v as u64) << 8;
        } else {
            *x = *x & !0xff | v as u64;
        }
    }
);
int!(u16, i16, |regs, r| regs[slot(r)] as u16, |regs, r, v| {
    let x = &mut regs[slot(r)];
    *x = *x & !0xffff | v as u64;
});
int!(u32, i32, |regs, r| regs[slot(r)] as u32, |regs, r, v| regs[slot(r)] = v as u64);
int!(u64, i64, |regs, r| regs[slot(r)], |regs, r, v| regs[slot(r)] = v);

/// Index into the register file; the mask avoids a bounds check.
#[inline(always)]
pub(crate) fn slot(r: u8) -> usize {
    r as usize & (REGS - 1)
}
