//! See `vesta_virtio::fuzz::net`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| virtio::fuzz::net(data));
