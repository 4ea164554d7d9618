//! Digest of a part of the machine's state.

use entry::Digest;
use serde::Serialize;
use twox_hash::XxHash3_128;

/// Digest of a value's serialised form.
pub(crate) fn digest_of(value: &impl Serialize) -> Digest {
    let bytes = postcard::to_stdvec(value).unwrap_or_else(|error| unreachable!("plain data: {error}"));
    Digest(XxHash3_128::oneshot(&bytes))
}
