//! See `vesta_control::api::fuzz`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| control::api::fuzz::run(data));
