//! `fuzz_target!` without libFuzzer: a target's body compiles for `cargo xtask test lint::fuzz`,
//! and `cargo xtask soak` runs it with inputs from seeds.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// Defines a program that runs the body: see [`run`].
#[macro_export]
macro_rules! fuzz_target {
    (|$data:ident: &[u8]| $body:expr) => {
        // SAFETY: targets are `no_main`, so no other function has this name.
        #[unsafe(no_mangle)]
        extern "C" fn main() -> i32 {
            $crate::run(|$data: &[u8]| {
                let _ = $body;
            })
        }
    };
}

/// The longest input, in bytes.
const LONGEST: u64 = 4096;

/// `TARGET FIRST COUNT`: runs the body once for each of COUNT seeds. If it panics, prints the seed
/// and returns 1.
pub fn run(body: impl Fn(&[u8])) -> i32 {
    let number = |text: String| text.parse::<u64>().ok();
    let mut args = std::env::args().skip(1);
    let (Some(first), Some(count)) = (args.next().and_then(number), args.next().and_then(number)) else {
        eprintln!("usage: TARGET FIRST COUNT: the first seed, and how many");
        return 2;
    };
    for seed in (0..count).map(|at| first.wrapping_add(at)) {
        let input = input(seed);
        if catch_unwind(AssertUnwindSafe(|| body(&input))).is_err() {
            eprintln!("seed {seed}: the target panics with {} bytes", input.len());
            return 1;
        }
    }
    0
}

/// The bytes of a seed. Short inputs are as frequent as long ones, and small values as large ones:
/// in most fields only small values are valid.
fn input(seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        // SplitMix64.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    };
    let length = next() % (LONGEST >> (next() % 8));
    let mut bytes = Vec::new();
    for _ in 0..length {
        let random = next();
        bytes.push((random >> 8) as u8 >> (random % 8));
    }
    bytes
}
