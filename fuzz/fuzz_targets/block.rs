//! See `vesta_block::fuzz::device`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| block::fuzz::device(data));
