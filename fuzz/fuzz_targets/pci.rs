//! See `vesta_virtio::fuzz::pci`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| virtio::fuzz::pci(data));
