//! See `vesta_virtio::fuzz::pci_bus`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| virtio::fuzz::pci_bus(data));
