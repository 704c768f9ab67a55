//! See `vesta_virtio::fuzz::entropy`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| virtio::fuzz::entropy(data));
