//! What is fuzzed: each target is a function of arbitrary bytes that panics where vmft is wrong. `targets/` makes a
//! libFuzzer program of each, and `tests/corpus.rs` replays `corpus/TARGET.tar.gz` through it.
//!
//! To fuzz (needs cargo-fuzz and a nightly toolchain), unpack the corpus, run, and pack what was found:
//!
//! ```text
//! fuzz/corpora unpack log
//! cargo +nightly fuzz run --fuzz-dir fuzz --features libfuzzer log -- -max_total_time=600
//! fuzz/corpora pack log
//! ```

mod boot;
mod channel;
mod log;
mod virtio;

pub use boot::boot;
pub use channel::channel;
pub use log::log;
pub use virtio::{virtio_blk, virtio_console, virtio_net, virtio_rng};
