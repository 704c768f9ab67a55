//! See `vesta_virtio::fuzz::overlay`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| virtio::fuzz::overlay(data));
