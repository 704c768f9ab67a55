//! See `vesta_virtio::fuzz::mmio`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| virtio::fuzz::mmio(data));
