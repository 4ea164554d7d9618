#![no_main]

use vmft_vmm::Slot;

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmft_vmm_fuzz::virtio(&Slot::Console, data));
