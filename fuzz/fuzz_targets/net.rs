//! See `vesta_net::fuzz::device`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| net::fuzz::device(data));
