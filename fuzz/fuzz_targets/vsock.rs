//! See `vesta_virtio::fuzz::vsock`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| virtio::fuzz::vsock(data));
