//! See `vesta_vsock::fuzz::device`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vsock::fuzz::device(data));
