#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmft_vmm_fuzz::boot(data));
