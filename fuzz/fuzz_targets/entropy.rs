//! See `vesta_entropy::fuzz::device`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| entropy::fuzz::device(data));
