//! `fuzz_target!` as far as `cargo xtask test lint::fuzz` needs it: a target's body has to compile.

/// Compiles the body, and never runs it.
#[macro_export]
macro_rules! fuzz_target {
    (|$data:ident: &[u8]| $body:expr) => {
        const _: fn(&[u8]) = |$data: &[u8]| {
            let _ = $body;
        };
    };
}
