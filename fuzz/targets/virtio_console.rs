//! Fuzz target: [`fuzz::virtio_console`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::virtio_console(data));
