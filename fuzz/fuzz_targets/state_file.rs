//! See `vesta_snapshot::fuzz::decode`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| snapshot::fuzz::decode(data));
