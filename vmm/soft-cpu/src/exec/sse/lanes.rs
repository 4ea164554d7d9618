//! 128-bit values as lanes: with loops over arrays of fixed size and, for the operations that memcmp, strlen
//! and similar functions use, with 64 bits of lanes at once in a general register.

use std::array::from_fn;

/// The type of a lane, with the array type that fills 128 bits.
pub(super) trait Lane: Copy + Default {
    /// All lanes, the lowest first.
    type Lanes: Copy + AsRef<[Self]> + AsMut<[Self]>;
    fn split(x: u128) -> Self::Lanes;
    fn join(lanes: Self::Lanes) -> u128;
}

macro_rules! lane {
    ($t:ty, $n:literal) => {
        impl Lane for $t {
            type Lanes = [$t; $n];
            #[inline(always)]
            fn split(x: u128) -> [$t; $n] {
                const SIZE: usize = size_of::<$t>();
                let b = x.to_le_bytes();
                from_fn(|i| <$t>::from_le_bytes(from_fn(|k| b[i * SIZE + k])))
            }
            #[inline(always)]
            fn join(lanes: [$t; $n]) -> u128 {
                let mut b = [0; 16];
                for (b, x) in b.chunks_exact_mut(size_of::<$t>()).zip(lanes) {
                    b.copy_from_slice(&x.to_le_bytes());
                }
                u128::from_le_bytes(b)
            }
        }
    };
}

lane!(u8, 16);
lane!(i8, 16);
lane!(u16, 8);
lane!(i16, 8);
lane!(u32, 4);
lane!(i32, 4);
lane!(u64, 2);
lane!(i64, 2);

/// Applies `f` to each pair of lanes.
#[inline(always)]
pub(super) fn zip<T: Lane>(a: u128, b: u128, f: impl Fn(T, T) -> T) -> u128 {
    let (mut x, y) = (T::split(a), T::split(b));
    for (x, y) in x.as_mut().iter_mut().zip(y.as_ref()) {
        *x = f(*x, *y);
    }
    T::join(x)
}

/// Applies `f` to each lane.
#[inline(always)]
pub(super) fn map<T: Lane>(a: u128, f: impl Fn(T) -> T) -> u128 {
    zip(a, 0, |x, _| f(x))
}

/// Applies `f` to each pair of neighbours in `a`, then in `b`.
#[inline(always)]
pub(super) fn horizontal<T: Lane>(a: u128, b: u128, f: impl Fn(T, T) -> T) -> u128 {
    let (x, y, mut r) = (T::split(a), T::split(b), T::split(0));
    let pairs = x.as_ref().chunks_exact(2).chain(y.as_ref().chunks_exact(2));
    for (r, pair) in r.as_mut().iter_mut().zip(pairs) {
        *r = f(pair[0], pair[1]);
    }
    T::join(r)
}

/// Narrows each lane by `f`: those of `a`, then those of `b`.
#[inline(always)]
pub(super) fn narrow<T: Lane, U: Lane>(a: u128, b: u128, f: impl Fn(T) -> U) -> u128 {
    let (x, y, mut r) = (T::split(a), T::split(b), U::split(0));
    for (r, x) in r.as_mut().iter_mut().zip(x.as_ref().iter().chain(y.as_ref())) {
        *r = f(*x);
    }
    U::join(r)
}

/// Widens the low lanes by `f`, as many as fit into the result.
#[inline(always)]
pub(super) fn widen<T: Lane, U: Lane>(a: u128, f: impl Fn(T) -> U) -> u128 {
    let (x, mut r) = (T::split(a), U::split(0));
    for (r, x) in r.as_mut().iter_mut().zip(x.as_ref()) {
        *r = f(*x);
    }
    U::join(r)
}

/// Interleaves the low lanes of `a` and `b`.
#[inline(always)]
pub(super) fn interleave<T: Lane>(a: u128, b: u128) -> u128 {
    let (x, y, mut r) = (T::split(a), T::split(b), T::split(0));
    for (r, (x, y)) in r.as_mut().chunks_exact_mut(2).zip(x.as_ref().iter().zip(y.as_ref())) {
        r[0] = *x;
        r[1] = *y;
    }
    T::join(r)
}

/// Applies `f` to both halves.
#[inline(always)]
pub(super) fn halves(a: u128, b: u128, f: impl Fn(u64, u64) -> u64) -> u128 {
    u128::from(f(a as u64, b as u64)) | u128::from(f((a >> 64) as u64, (b >> 64) as u64)) << 64
}

/// The highest bit of each lane of `bits` bits.
const fn tops(bits: u32) -> u64 {
    (u64::MAX / (u64::MAX >> (64 - bits))) << (bits - 1)
}

/// Fills the lanes whose highest bit is set with ones; all other bits of `x` must be zero.
#[inline(always)]
fn fill<const BITS: u32>(x: u64) -> u64 {
    (x >> (BITS - 1)).wrapping_mul(u64::MAX >> (64 - BITS))
}

/// All ones in the lanes that are equal.
#[inline(always)]
pub(super) fn equal<const BITS: u32>(a: u64, b: u64) -> u64 {
    let (x, low) = (a ^ b, !tops(BITS));
    // The highest bit of a lane of `x | sum` is set unless the whole lane is zero; no sum carries into the
    // next lane.
    let sum = (x & low) + low;
    fill::<BITS>(!(x | sum) & tops(BITS))
}

/// Differences of the low bits of each lane; the highest bit is set if there was no borrow.
#[inline(always)]
fn differences<const BITS: u32>(a: u64, b: u64) -> u64 {
    (a | tops(BITS)) - (b & !tops(BITS))
}

/// Wrapping sums of lanes.
#[inline(always)]
pub(super) fn sums<const BITS: u32>(a: u64, b: u64) -> u64 {
    let low = !tops(BITS);
    ((a & low) + (b & low)) ^ (a ^ b) & !low
}

/// Wrapping differences of lanes.
#[inline(always)]
pub(super) fn wrapping_differences<const BITS: u32>(a: u64, b: u64) -> u64 {
    differences::<BITS>(a, b) ^ !(a ^ b) & tops(BITS)
}

/// All ones in the lanes where `a` is less than `b`, both unsigned.
#[inline(always)]
pub(super) fn less<const BITS: u32>(a: u64, b: u64) -> u64 {
    let borrows = !differences::<BITS>(a, b);
    fill::<BITS>((!a & b | !(a ^ b) & borrows) & tops(BITS))
}

/// The lanes of `a` where `mask` has ones, else those of `b`.
#[inline(always)]
pub(super) fn select(mask: u64, a: u64, b: u64) -> u64 {
    a & mask | b & !mask
}
