#![no_main]

use vmft_vmm::Slot;

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmft_vmm_fuzz::virtio(&Slot::Disk { bytes: 1 << 20, read_only: false }, data));
