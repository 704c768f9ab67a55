//! See `vesta_block::fuzz::overlay`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| block::fuzz::overlay(data));
