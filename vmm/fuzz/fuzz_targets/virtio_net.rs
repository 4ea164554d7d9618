#![no_main]

use vmft_vmm::Slot;

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmft_vmm_fuzz::virtio(&Slot::Net { mac: [2; 6] }, data));
