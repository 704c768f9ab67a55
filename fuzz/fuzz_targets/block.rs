//! See `vesta_virtio::fuzz::block`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| virtio::fuzz::block(data));
