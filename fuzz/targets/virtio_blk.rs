//! Fuzz target: [`fuzz::virtio_blk`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::virtio_blk(data));
