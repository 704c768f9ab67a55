//! See `vesta_mmds::fuzz`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mmds::fuzz::run(data));
